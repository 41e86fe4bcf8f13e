"""Techniques that shape the weights themselves while they are trained."""
