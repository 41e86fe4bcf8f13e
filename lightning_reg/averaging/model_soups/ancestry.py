"""Do the members of a soup come from one start, and point the same way?"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_reg.averaging._state_dicts import Aligned, StateDict, aligned
from lightning_reg.averaging.model_soups._mean import in_chunks
from lightning_reg.engine.host.distributed import rank
from lightning_reg.engine.host.names import Patterns, matches

__all__ = ["ancestry"]

_CHUNK = 1 << 14  # elements at a time
_CHUNKS = 4  # of a tensor


@dataclass(frozen=True)
class Ancestry:
    """How far models are from their start and from one another.

    Args:
        distances: Distance of each model to the start (to the mean, without one), over the start's norm.
        cosines: Cosine between each two models' task vectors (between their weights, without a start): ``(k, k)``.
        has_start: Whether a common start was given.
        suspicions: What speaks against one basin, as sentences; empty if nothing does.

    """

    distances: list[float]
    cosines: Tensor
    has_start: bool
    suspicions: list[str]


def ancestry(
    state_dicts: Sequence[StateDict],
    start: StateDict | None = None,
    *,
    names: Sequence[str] | None = None,
    max_distance: float = 0.5,
    min_cosine: float = 0.5,
    warn: bool = True,
    exclude: Patterns = None,
) -> Ancestry:
    r"""Measures whether models can share a basin, which averaging needs, and warns if it seems not so.

    The two measures are :math:`\|\theta_i - \theta_0\| / \|\theta_0\|` and the cosine between
    :math:`\theta_i - \theta_0` and :math:`\theta_j - \theta_0`. Without a start :math:`\theta_0` is the mean of
    the models for the distance and 0 for the cosine: two random initialisations have cosine 0, two fine-tunings of one
    model nearly 1. The limits are rules of thumb; only the held-out score decides.

    Of a tensor with more than 65,536 elements that many are looked at, in four pieces spread over it: the measures are
    then estimates, good to about a per cent.

    Args:
        state_dicts: The models.
        start: Weights they were all trained from; ``None`` if they are not known.
        names: What to call the models.
        max_distance: Distance above which a model is suspicious. Fine-tuning usually stays below 0.1.
        min_cosine: Cosine below which two models without a known start are suspicious. With a start one below -0.2
            is: the two runs moved apart.
        warn: Whether to warn.
        exclude: Patterns of keys that are not looked at.

    Returns:
        The measures and the suspicions.

    """
    labels = list(names) if names is not None else [f"state dict {i}" for i in range(len(state_dicts))]
    everyone = [*state_dicts, *([start] if start is not None else [])]
    members = aligned(everyone, labels + ["start"] * (start is not None), exclude)
    keys = [key for key in members[0] if not matches(key, exclude)]
    gram, to_start, norm = _products(keys, members[: len(state_dicts)], members[-1] if start is not None else None)
    distances = [math.sqrt(max(d, 0.0)) / math.sqrt(norm) if norm > 0 else math.inf for d in to_start]
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scale = lengths[:, None] * lengths[None]
    cosines = torch.where(scale > 0, gram / scale.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    suspicions = [
        f"{label} is {distance:.2g} of the norm away from {'the start' if start is not None else 'the mean'}"
        f" (more than {max_distance:g})"
        for label, distance in zip(labels, distances, strict=True)
        if distance > max_distance
    ]
    least, what = (-0.2, "task vectors") if start is not None else (min_cosine, "weights")
    suspicions += [
        f"the {what} of {labels[i]} and {labels[j]} have cosine {cosines[i, j]:.2f} (less than {least:g})"
        for i, j in combinations(range(len(labels)), 2)
        if cosines[i, j] < least
    ]
    if suspicions and warn and rank() == 0:
        warnings.warn(
            "These models may not share a basin, and then their average is nonsense: "
            + "; ".join(suspicions[:3])
            + ("; and more" if len(suspicions) > 3 else "")
            + ". Let the held-out score decide (greedy).",
            stacklevel=2,
        )
    return Ancestry(distances, cosines, start is not None, suspicions)


def _products(
    keys: Sequence[str], members: Sequence[Aligned], start: Aligned | None
) -> tuple[Tensor, list[float], float]:
    """Inner products of the (task) vectors, squared distances to the start or mean, squared norm of that."""
    count = len(members)
    gram, norm = torch.zeros(count, count, dtype=torch.float64, device="cpu"), 0.0
    squares = gram.new_zeros(count)
    everyone = [*members, *([] if start is None else [start])]
    for key in keys:
        known = [member.shape_and_dtype(key) for member in everyone]
        if known[0] is None or not known[0][1].is_floating_point:
            continue
        buffers = [torch.empty(_CHUNK, dtype=dtype, device="cpu") for _, dtype in filter(None, known)]
        parts = [member.part(key) for member in everyone]
        for first, size, weight in _sample(math.prod(known[0][0])):
            chunk = [part(first, buffer[:size]) for part, buffer in zip(parts, buffers, strict=True)]
            rows = torch.stack([values.double().cpu() for values in chunk])
            origin = rows[:count].mean(0) if start is None else rows[count]
            rows = rows[:count]
            vectors = rows if start is None else rows - origin
            gram += weight * (vectors @ vectors.T)
            norm += weight * float(origin @ origin)
            squares += weight * (rows - origin).square().sum(1)
    return gram, squares.tolist(), norm


def _sample(numel: int) -> list[tuple[int, int, float]]:
    """Chunks of a tensor, spread evenly over it, with what each of their elements counts for: all of a small tensor."""
    chunks = in_chunks(numel, _CHUNK)
    if len(chunks) > _CHUNKS:
        chunks = [chunks[k * (len(chunks) - 1) // _CHUNKS] for k in range(_CHUNKS)]
    seen = sum(size for _, size in chunks)
    return [(first, size, numel / seen) for first, size in chunks]
