"""Mask tuning: weights of a trained network are switched off, and none is changed."""
