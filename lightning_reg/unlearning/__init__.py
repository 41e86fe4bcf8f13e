"""Techniques that make a trained network forget: a feature that it generates, a class, a bad solution."""
