"""Multi-sample dropout."""
