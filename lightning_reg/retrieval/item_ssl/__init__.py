"""An item encoder that must know an item by either half of its features."""
