"""SaRA: the smallest weights of a trained network are trained, all others stay to the bit."""
