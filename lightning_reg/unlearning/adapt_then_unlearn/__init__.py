"""Adapt, then unlearn: a generator is taught more of what is unwanted, and then trained away from those weights."""
