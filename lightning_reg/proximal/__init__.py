"""Networks that are proximal operators, what trains them, and inverse problems solved with them."""
