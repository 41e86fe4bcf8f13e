"""Techniques that fine-tune trained networks: with few trained numbers, and without changing the network."""
