"""Attention of denoisers, as units import it."""

from lightning_reg.diffusion.attention import AttentionMaps, AttentionPlace, check_tokens

__all__ = ["AttentionMaps", "AttentionPlace", "check_tokens"]
