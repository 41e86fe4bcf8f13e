"""Diffusion classifier: the class under which a denoiser errs least."""
