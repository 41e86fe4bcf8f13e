"""OVDiff: images are segmented by names, by prototypes of what a diffusion model draws for them."""
