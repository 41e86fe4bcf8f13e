"""Multi-scale consistency: predictions at several scales of an image agree."""
