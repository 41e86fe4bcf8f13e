"""Techniques on dropout."""
