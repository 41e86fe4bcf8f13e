"""Techniques for training on one task after the other without forgetting: penalties that tie weights or outputs."""
