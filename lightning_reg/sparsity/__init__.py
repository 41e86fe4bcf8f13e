"""Techniques that leave out weights: networks that are sparse in a pattern when training ends."""
