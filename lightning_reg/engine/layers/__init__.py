"""Named layers: their outputs read and changed."""
