"""Negatives of a contrastive batch: those of all ranks, without those that answer the query."""
