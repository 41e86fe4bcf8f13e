"""Label smoothing: a share of the target goes to all classes."""
