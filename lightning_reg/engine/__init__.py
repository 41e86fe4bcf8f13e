"""What all techniques share, one file per part of a training step; it imports no technique."""
