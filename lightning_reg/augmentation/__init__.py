"""Techniques that change the data or the batch: what the network is shown, and the labels that go with it."""
