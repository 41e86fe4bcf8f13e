"""Retrieval and recommendation: embeddings, dense and sparse, by which documents and items are found."""
