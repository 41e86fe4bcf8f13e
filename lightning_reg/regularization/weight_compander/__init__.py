"""Weight Compander: weights as a bounded function of what is trained."""
