"""Weights put in and out around a step, trained through maps, penalized, split over processes."""
