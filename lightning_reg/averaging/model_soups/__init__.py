"""Model soups: averages of the weights of one run, or of several runs from one start."""
