"""Null-text inversion: real images are sampled again under guidance, and edited by their prompt."""
