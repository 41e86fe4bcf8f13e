"""Loki's rule on the device of the logits, and what a layer's output has to look like."""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.metric_learning.loki._space import LabelSpace
from lightning_reg.metric_learning.loki.core import embedding_distances, frechet_scores, powered

__all__ = ["Kind", "Rule", "check_kind", "own_distances"]

Kind = Literal["softmax", "sigmoid", "given"]


class Rule:
    """The fixed matrix that probabilities are multiplied with, and where its columns go.

    Args:
        space: The labels.
        outputs: Whether scores are of all labels or of the known classes.
        power: Exponent of the distances.
        chunk: Labels at a time.
        device: Device of the logits.

    """

    def __init__(
        self,
        space: LabelSpace,
        outputs: Literal["all", "observed"],
        power: float,
        chunk: int | None,
        device: torch.device,
    ) -> None:
        self.device, self._size, self._only_known = device, space.size, outputs == "observed"
        self._observed, rows = space.observed.to(device), space.rows.to(device)
        rows = rows[:, self._observed] if self._only_known else rows
        # In chunks the distances stay in the type they were given in, which may be a byte each.
        self._power, self._chunk = 1.0 if chunk is None else power, chunk
        self._matrix = powered(rows, power) if chunk is None else rows

    def fits(self, width: int) -> bool:
        """Whether a layer with so many columns has one for each class, or for each label."""
        return width in (len(self._observed), self._size)

    def __call__(self, values: Tensor, kind: Kind, temperature: float) -> tuple[Tensor, Tensor]:
        """Scores in place of a layer's output, and which predictions are no longer the most probable class.

        Args:
            values: ``(..., K)``, or ``(..., N)`` with a column for each label.
            kind: What they are.
            temperature: Divides logits.

        Returns:
            ``(..., N)``, or ``(..., K)`` for the known classes (of N columns the others then have minus infinity); and
            ``(...)`` bool.

        """
        width, classes = values.shape[-1], len(self._observed)
        known = values if width == classes else values[..., self._observed]
        probabilities = _probabilities(known, kind, temperature)
        scores = frechet_scores(probabilities, self._matrix, self._power, self._chunk).to(
            torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else torch.float32
        )
        best, most = scores.detach().argmax(-1), known.detach().argmax(-1)
        if not self._only_known:
            return scores, best != self._observed[most]
        if width > classes:
            scores = scores.new_full((*scores.shape[:-1], width), -torch.inf).index_copy(-1, self._observed, scores)
        return scores, best != most


def _probabilities(values: Tensor, kind: Kind, temperature: float) -> Tensor:
    wide = values.float() if values.device.type == "mps" else values.double()
    if kind == "softmax":
        return (wide / temperature).softmax(-1)
    shares = (wide / temperature).sigmoid() if kind == "sigmoid" else wide
    return shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)


def check_kind(values: Tensor, kind: Kind, layer: str) -> None:
    """Refuses numbers that are not what they are said to be.

    Args:
        values: ``(..., C)``, the first that the layer returned.
        kind: What the user says that they are.
        layer: Name of the layer.

    Raises:
        MisconfigurationException: If probabilities are below 0, or logits are probabilities.

    """
    if not values.numel():
        return
    positive = bool((values >= 0).all())
    if kind == "given" and not positive:
        raise MisconfigurationException(
            f"Loki(probabilities='given'): {layer!r} returned numbers below 0, which are no probabilities. Logits are"
            ' "softmax".'
        )
    if kind == "softmax" and positive and bool(((values.float().sum(-1) - 1).abs() < 1e-2).all()):
        raise MisconfigurationException(
            f"Loki: {layer!r} returned probabilities (none is below 0, and the rows sum to 1), of which another softmax"
            ' would make nearly equal ones. Write probabilities="given", or name the layer before the softmax.'
        )


def own_distances(layer: nn.Module, name: str) -> Tensor:
    """Distances between the rows of a layer's own weight, one for each class.

    Args:
        layer: The layer.
        name: Its name.

    Returns:
        ``(N, N)``.

    Raises:
        MisconfigurationException: If it has no weight with a row for each class.

    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise MisconfigurationException(
            f"Loki: {name!r} ({type(layer).__name__}) has no weight with a row for each class that distances could be"
            " taken from. Give `distances`, or name the classifier's last linear layer."
        )
    whole = getattr(weight, "full_tensor", None)  # of a weight that is split over processes
    rows = weight if whole is None else whole()
    return embedding_distances(rows.detach().flatten(1))
