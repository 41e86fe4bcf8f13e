"""Diagnostics: what a network has learned and what it has memorised, read off its neurons."""
