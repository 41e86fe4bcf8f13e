"""Metric learning beside the user's loss: terms that say which samples shall lie close in feature space."""
