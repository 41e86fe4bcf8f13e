"""Labels with distances as arguments give them: checked, and the rows of the classes that a classifier knows."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.host import lightning as host
from lightning_reg.metric_learning.loki.core import is_complete

__all__ = ["LabelSpace"]


class LabelSpace:
    """A metric space of N labels, of which a classifier knows K.

    Args:
        owner: Whose arguments these are; its class is named in errors.
        distances: ``(N, N)``, or the rows ``(K, N)`` of the classes that are known.
        observed: Label of each class; ``None``: all labels in their order, or of K rows the label at distance 0.

    Attributes:
        rows: ``(K, N)``, as given.
        observed: ``(K,)`` int64, label of each class.

    Raises:
        ValueError: If these are no distances, or no different labels.

    """

    def __init__(
        self, owner: object, distances: Tensor | Sequence[Sequence[float]], observed: Sequence[int] | None
    ) -> None:
        name = type(owner).__name__
        given = _as_matrix(name, distances)
        square = given.shape[0] == given.shape[1]
        if observed is not None:
            _check_observed(name, observed, given)
        own = torch.arange(len(given)) if square else given.argmin(1)
        self.observed = own if observed is None else torch.tensor(list(observed))
        self.rows = given[self.observed] if square and observed is not None else given
        zeros = given.diagonal() if square else given[torch.arange(len(given)), self.observed]
        if bool(zeros.any()):
            raise ValueError(
                f"{name}: `distances` must be 0 between a label and itself: on the diagonal, or once in each of K rows,"
                " where `observed` says so if it is given. Are the labels in the same order in both?"
            )
        if square and not torch.allclose(given.float(), given.T.float(), rtol=1e-4):
            host.rank_zero_warn(f"{name}: `distances` are not the same in both directions; row i is that from label i.")

    @property
    def size(self) -> int:
        """Number of labels."""
        return self.rows.shape[1]

    @property
    def is_neutral(self) -> bool:
        """Whether the rule is ``argmax``: all labels are known, in their order, and equally far apart."""
        return is_complete(self.rows)  # in another order the zeros are beside the diagonal


def _as_matrix(name: str, distances: Tensor | Sequence[Sequence[float]]) -> Tensor:
    try:
        given = torch.as_tensor(distances).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: `distances` must be rows of numbers, all of one length: {error}.") from error
    if given.dim() != 2 or given.shape[0] > given.shape[1] or not given.numel() or given.is_complex():
        raise ValueError(
            f"{name}: `distances` must be (N, N), or the rows (K, N) of the K classes that are known, got a shape of"
            f" {tuple(given.shape)}."
        )
    low, high = given.aminmax()
    if not (low >= 0 and torch.isfinite(high)):
        raise ValueError(f"{name}: `distances` must be finite and at least 0, got {low:g} to {high:g}.")
    return given


def _check_observed(name: str, observed: Sequence[Any], given: Tensor) -> None:
    rows, size = given.shape
    whole = all(isinstance(label, Integral) and 0 <= int(label) < size for label in observed)
    if not whole or len(set(observed)) < len(observed):
        shown = f"{list(observed)[:8]}{' and more' if len(observed) > 8 else ''}"
        raise ValueError(f"{name}: `observed` must be different labels in [0, {size}), got {shown}.")
    if len(observed) == 0 or rows not in (size, len(observed)):
        raise ValueError(
            f"{name}: `observed` must have the label of each class, got {len(observed)} for distances of shape"
            f" {tuple(given.shape)}."
        )
