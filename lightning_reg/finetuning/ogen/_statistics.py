"""Means and standard deviations of each class's features, as the batches come."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ClassStatistics"]


class ClassStatistics:
    """Counts, means and sums of squared deviations of features by class, merged batch by batch (Chan et al., 1983)."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # (C, 1)
        self._means = self._squares = torch.empty(0)  # (C, D)

    def clear(self) -> None:
        """Forgets all features."""
        self._counts = None

    def add(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Adds features ``(B, D)`` with their class numbers ``(B,)``."""
        chosen = F.one_hot(labels, classes).to(features).T
        counts = chosen.sum(1, keepdim=True)
        means = chosen @ features / counts.clamp(min=1)
        squares = chosen @ (features - means[labels]).square()
        if self._counts is not None:
            before, old, held = (t.to(features.device) for t in (self._counts, self._means, self._squares))
            total = before + counts
            share = counts / total.clamp(min=1)
            squares = held + squares + (means - old).square() * before * share
            means, counts = old + (means - old) * share, total
        self._counts, self._means, self._squares = counts, means, squares

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means and standard deviations ``(C, D)`` of the features so far, and of which classes there are any."""
        if self._counts is None:
            raise RuntimeError("There are no features yet.")
        return self._means, (self._squares / self._counts.clamp(min=1)).sqrt(), self._counts[:, 0] > 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name; empty before the first features."""
        if self._counts is None:
            return {}
        return {"counts": self._counts.clone(), "means": self._means.clone(), "squares": self._squares.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._counts = state.get("counts")
        self._means, self._squares = state.get("means", self._means), state.get("squares", self._squares)
