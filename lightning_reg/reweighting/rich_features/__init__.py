"""Rich feature construction: networks that each find what the earlier ones have missed, and one network of all."""
