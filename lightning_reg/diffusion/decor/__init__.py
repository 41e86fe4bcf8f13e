"""DECOR: what is undesired of a prompt is projected out of its embedding."""
