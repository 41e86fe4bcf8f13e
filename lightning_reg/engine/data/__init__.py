"""Batches, samples and the loaders that they come from."""
