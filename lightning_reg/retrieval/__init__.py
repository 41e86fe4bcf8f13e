"""Retrieval and recommendation: queries, documents and items as rows that are compared."""
