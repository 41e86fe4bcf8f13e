"""ConR: a contrastive regularizer for regression whose targets are imbalanced."""
