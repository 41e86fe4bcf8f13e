"""Learned proximal networks: a denoiser that is the proximal operator of a prior that can be read off it."""
