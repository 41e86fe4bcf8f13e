"""Techniques that only look: what a network has learned, and what it has memorised, read while it trains."""
