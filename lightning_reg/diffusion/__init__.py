"""Diffusion models read, guided and probed: what is done with a denoiser that somebody has trained."""
