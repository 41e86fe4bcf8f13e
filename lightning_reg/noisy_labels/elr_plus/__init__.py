"""ELR+: early-learning regularization with two networks, averaged teachers and mixup."""
