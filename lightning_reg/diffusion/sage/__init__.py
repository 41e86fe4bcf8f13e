"""SAGE: inputs are searched at which a text-to-image model fails, through or around its sampler."""
