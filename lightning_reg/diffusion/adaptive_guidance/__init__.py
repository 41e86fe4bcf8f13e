"""Adaptive guidance: the unconditional pass of guidance is skipped once it says nothing new, or forecast."""
