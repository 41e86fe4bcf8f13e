"""Contrastive distillation: the distribution over the candidates of a batch follows a better model's."""
