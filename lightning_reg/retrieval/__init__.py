"""Retrieval: embeddings, dense and sparse, that find documents for queries."""
