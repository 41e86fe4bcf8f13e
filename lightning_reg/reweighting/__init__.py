"""Weights per sample: which samples of a batch count how much."""
