"""Distribution regularization with semantic calibration, for any training loop."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FeatureBank", "calibrate", "class_translate", "dr_loss", "kabsch"]


@torch.no_grad()
def kabsch(source: Tensor, target: Tensor) -> Tensor:
    r"""The rotation that brings one cloud of points nearest to another, after both are centred.

    .. math:: \min_{R^\top R = I,\ \det R = 1} \sum_k \lVert R (p_k - \bar p) - (d_k - \bar d) \rVert^2

    With :math:`\sum_k (p_k - \bar p)(d_k - \bar d)^\top = U \Sigma V^\top` it is
    :math:`R = V \operatorname{diag}(1, \dots, 1, \det V U^\top)\, U^\top`. A decomposition of a ``(D, D)`` matrix.

    Args:
        source: p, ``(K, D)``.
        target: d, ``(K, D)``, row by row what the points are to come to.

    Returns:
        R, ``(D, D)``, float32 at least; ``source @ R.T`` are the rotated points.

    Example:
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> points = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
        >>> torch.allclose(kabsch(points, points @ quarter.T), quarter, atol=1e-6)
        True

    """
    p, d = _wide(source), _wide(target)
    with torch.autocast(p.device.type, enabled=False):
        u, _, vh = torch.linalg.svd((p - p.mean(0)).T @ (d - d.mean(0)))
        sign = torch.linalg.det(vh.T @ u.T).sign()
        rotation: Tensor = torch.cat([vh.T[:, :-1], vh.T[:, -1:] * sign], dim=1) @ u.T
    return rotation


@torch.no_grad()
def class_translate(source: Tensor, target: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    r"""Moves the points of each class so that their mean is a confident mean of the points they belong to.

    .. math:: p_k + \mu^d_c - \mu^p_c,\quad \mu^d_c = \sum_{k \in c} a_k d_k,\quad
        a = \operatorname{softmax}_{k \in c} \frac{d_k \cdot \phi_c}{\lVert \phi_c \rVert}

    with :math:`\mu^p_c` the plain mean of the class.

    Args:
        source: p, ``(K, D)``.
        target: d, ``(K, D)``.
        labels: ``(K,)`` class numbers below C.
        prototypes: The rows of the head, ``(C, D)``.

    Returns:
        ``(K, D)``, float32 at least. Classes of which there is no point change nothing.

    """
    p, d, phi = _wide(source), _wide(target), F.normalize(_wide(prototypes), dim=1)
    confidence = (d * phi[labels]).sum(1)
    # The largest is subtracted for each class, so that rows of any length will do.
    largest = confidence.new_zeros(len(phi)).scatter_reduce(0, labels, confidence, "amax", include_self=False)
    share = (confidence - largest[labels]).exp()
    total = share.new_zeros(len(phi)).index_add(0, labels, share)
    count = share.new_zeros(len(phi)).index_add(0, labels, torch.ones_like(share))
    moves = d * (share / total[labels])[:, None] - p / count[labels][:, None]
    return p + torch.zeros_like(phi).index_add(0, labels, moves)[labels]


@torch.no_grad()
def calibrate(
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    length: Tensor | float,
    rotation: Tensor | None = None,
) -> Tensor:
    r"""Features of the first encoder, brought to where the present one puts the same images.

    Both are scaled to unit rows; then the rotation, the translation of each class, and a common length.

    Args:
        source: Features by the first encoder, ``(K, D)``.
        target: Features of the same images by the present one, ``(K, D)``.
        labels: ``(K,)`` class numbers.
        prototypes: The rows of the head, ``(C, D)``.
        length: Norm of the result's rows.
        rotation: ``(D, D)``, by :func:`kabsch` of the unit rows; ``None`` for none. Centres do not matter: the
            translation of the classes takes them back.

    Returns:
        ``(K, D)``, without gradient.

    """
    p, d = F.normalize(_wide(source), dim=1), F.normalize(_wide(target), dim=1)
    if rotation is not None:
        with torch.autocast(p.device.type, enabled=False):
            p = p @ rotation.T
    return F.normalize(class_translate(p, d, labels, prototypes), dim=1) * length


def dr_loss(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Mean cross-entropy of a linear head on features, which get no gradient.

    Args:
        features: ``(K, D)``.
        labels: ``(K,)`` class numbers.
        weight: The head's, ``(C, D)``.
        bias: ``(C,)``.

    Returns:
        A scalar, float32 at least, with gradient for the head alone.

    Example:
        >>> round(dr_loss(torch.ones(1, 2), torch.tensor([0]), torch.zeros(4, 2)).exp().item(), 4)
        4.0

    """
    bias = None if bias is None else _wide(bias)
    with torch.autocast(features.device.type, enabled=False):
        log_p = F.linear(_wide(features.detach()), _wide(weight), bias).log_softmax(1)
    return -log_p.gather(1, labels[:, None]).mean()


class FeatureBank:
    """The last features of both encoders, entry by entry of the same image at the same moment; first in, first out.

    Memory: ``2 * size * D`` numbers of four bytes.

    Args:
        size: Most entries, at least 1.

    Attributes:
        filled: Number of entries.

    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.filled = self._next = 0
        self._kept: list[Tensor] = []

    def entries(self) -> list[Tensor]:
        """What it holds, in no order of time.

        Returns:
            First features and present features ``(filled, D)``, labels ``(filled,)``; nothing before the first entry.
            They are copies: a graph may outlive the next :meth:`add`.

        """
        return [kept[: self.filled].clone() for kept in self._kept]

    @torch.no_grad()
    def add(self, first: Tensor, present: Tensor, labels: Tensor) -> None:
        """Puts entries in place of the oldest ones; of more than it holds the last.

        Args:
            first: Features by the first encoder, ``(B, D)``.
            present: Features by the present one, ``(B, D)``.
            labels: ``(B,)``.

        """
        rows = [value.detach()[-self.size :] for value in (first.float(), present.float(), labels)]
        if not self._kept:
            self._kept = [value.new_zeros(self.size, *value.shape[1:]) for value in rows]
        self._kept = [kept.to(value.device) for kept, value in zip(self._kept, rows, strict=True)]
        count = len(rows[0])
        end = min(count, self.size - self._next)
        for kept, value in zip(self._kept, rows, strict=True):
            kept[self._next : self._next + end] = value[:end]
            kept[: count - end] = value[end:]
        self._next = (self._next + count) % self.size
        self.filled = min(self.filled + count, self.size)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, copied, and plain numbers."""
        return {"kept": [kept.clone() for kept in self._kept], "filled": self.filled, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: If it was of a bank of another size.

        """
        kept = [value.clone() for value in state["kept"]]
        if kept and len(kept[0]) != self.size:
            raise ValueError(f"FeatureBank: there was room for {len(kept[0])} entries, and there is for {self.size}.")
        self._kept, self.filled, self._next = kept, state["filled"], state["next"]


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
