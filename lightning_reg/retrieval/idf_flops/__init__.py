"""Sparse retrieval without a query encoder: IDF of tokens, the FLOPS penalty, teachers that answer together."""
