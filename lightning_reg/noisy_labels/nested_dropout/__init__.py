"""Nested dropout: features that are ordered by importance, and cut where that is best."""
