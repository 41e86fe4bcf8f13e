"""Attention of denoisers, as units import it."""

from lightning_reg.diffusion.attention import AttentionMaps, AttentionPlace

__all__ = ["AttentionMaps", "AttentionPlace"]
