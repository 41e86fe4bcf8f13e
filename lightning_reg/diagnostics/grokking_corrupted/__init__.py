"""Grokking on wrong labels: which neurons generalise, which memorise, and what is left without the latter."""
