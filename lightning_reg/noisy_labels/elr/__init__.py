"""Early-learning regularization: a term that keeps a network from memorising wrong labels."""
