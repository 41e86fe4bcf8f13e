"""Maestro: weights trained as products of factors with ordered columns, of which those that add nothing are cut."""
