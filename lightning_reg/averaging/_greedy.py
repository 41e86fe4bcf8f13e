"""Greedy soup: ingredients join while the held-out score says so."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.averaging._state_dicts import Aligned, StateDict, aligned, is_averaged

__all__ = ["Candidate", "RunningSum", "SoupResult", "accepts", "greedy_soup", "ranking"]


@dataclass(frozen=True)
class Candidate:
    """One decision on the way to a soup.

    Args:
        name: The ingredient that was tried.
        own_score: Its score alone; ``None`` if nobody asked for it.
        score: Score of the soup with it; ``None`` if nobody asked for it.
        accepted: Whether it stayed.

    """

    name: str
    own_score: float | None
    score: float | None
    accepted: bool


@dataclass
class SoupResult:
    """A soup, and how it came about.

    Args:
        state_dict: The averaged weights.
        ingredients: What is in it, in the order of joining: names if they were given, else positions.
        trace: Every decision, in order.
        score: Score of the soup; ``None`` if nothing was evaluated.
        scores_before_batch_norm: For each evaluated model with batch statistics its score before they were estimated
            anew, in the order of evaluation.

    """

    state_dict: dict[str, Any]
    ingredients: list[Any]
    trace: list[Candidate] = field(default_factory=list)
    score: float | None = None
    scores_before_batch_norm: list[float] = field(default_factory=list)


def greedy_soup(
    state_dicts: Sequence[StateDict],
    scores: Sequence[float],
    evaluate: Callable[[dict[str, Any]], float],
    *,
    strict: bool = True,
    min_delta: float = 0.0,
    mode: Literal["max", "min"] = "max",
    names: Sequence[str] | None = None,
    max_ingredients: int | None = None,
) -> SoupResult:
    r"""Adds models in the order of their held-out score and keeps each one that improves the average (recipe 1).

    The soup of n ingredients is :math:`\frac1n \sum \theta_i`, from a running sum in float64 that is divided once. It
    never scores below the best model, because it starts as that one. Of equal scores the smaller name comes first
    (the earlier position, without names).

    Args:
        state_dicts: The models, with the same keys and shapes. Each is read once more than it is ranked, so a sequence
            that loads from files will do.
        scores: Held-out score of each model.
        evaluate: Held-out score of a state dict; called once per candidate, ``len(state_dicts) - 1`` times at most.
            It must not keep the state dict, which is used again.
        strict: Whether a candidate must beat the best score (``>``, the authors' code) or may equal it (``>=``, the
            paper's text).
        min_delta: By how much it must beat it, at least 0.
        mode: Whether larger (``"max"``) or smaller scores are better.
        names: Distinct names of the models, for ``ingredients`` and ``trace``; ``None`` for positions.
        max_ingredients: Largest number of ingredients, at least 1; ``None`` for no limit.

    Returns:
        The soup; its ``state_dict`` shares no memory with the models.

    Raises:
        ValueError: If an argument is not as said, a score is NaN, or the state dicts differ.

    Example:
        >>> models = [{"w": torch.tensor([w])} for w in (0.0, 1.0, 5.0)]
        >>> distance = lambda state: -abs(float(state["w"]) - 0.4)
        >>> soup = greedy_soup(models, [distance(m) for m in models], distance)
        >>> soup.ingredients, soup.state_dict
        ([0, 1], {'w': tensor([0.5000])})

    """
    _check(state_dicts, scores, names, min_delta, max_ingredients)
    labels: list[Any] = list(range(len(scores))) if names is None else list(names)
    order = ranking(scores, labels, mode)
    first = order[0]
    members = aligned([state_dicts[first]], None)
    soup = RunningSum(members[0])
    best = scores[first]
    result = SoupResult({}, [labels[first]], [Candidate(str(labels[first]), best, best, True)], best)
    for position in order[1:]:
        if max_ingredients is not None and soup.count >= max_ingredients:
            result.trace.append(Candidate(str(labels[position]), scores[position], None, False))
            continue
        member = aligned([state_dicts[first], state_dicts[position]], [str(labels[first]), str(labels[position])])[1]
        score = float(evaluate(soup.mean(member)))
        accepted = accepts(score, best, strict=strict, min_delta=min_delta, mode=mode)
        result.trace.append(Candidate(str(labels[position]), scores[position], score, accepted))
        if accepted:
            soup.add(member)
            best = score
            result.ingredients.append(labels[position])
    result.state_dict, result.score = soup.mean(), best
    return result


def ranking(scores: Sequence[float], names: Sequence[Any], mode: str) -> list[int]:
    """Positions by score, best first, then by name."""
    sign = -1.0 if mode == "max" else 1.0
    return sorted(range(len(scores)), key=lambda i: (sign * scores[i], names[i]))


def accepts(score: float, best: float, *, strict: bool, min_delta: float, mode: str) -> bool:
    """Whether a candidate's score is good enough; NaN never is."""
    gain = score - best if mode == "max" else best - score
    if score == best:  # infinities
        gain = 0.0
    return gain > min_delta if strict else gain >= min_delta


def _check(
    state_dicts: Sequence[StateDict],
    scores: Sequence[float],
    names: Sequence[str] | None,
    min_delta: float,
    max_ingredients: int | None,
) -> None:
    count = len(state_dicts)
    if count == 0:
        raise ValueError("greedy_soup: `state_dicts` must hold at least one state dict, got none.")
    if len(scores) != count:
        raise ValueError(f"greedy_soup: `scores` must be {count} numbers, one per state dict, got {len(scores)}.")
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"greedy_soup: `scores` must be numbers, got {list(scores)}.")
    if names is not None and (len(names) != count or len(set(names)) != count):
        raise ValueError(f"greedy_soup: `names` must be {count} distinct names, got {list(names)}.")
    if not min_delta >= 0:
        raise ValueError(f"greedy_soup: `min_delta` must be at least 0, got {min_delta!r}.")
    if max_ingredients is not None and max_ingredients < 1:
        raise ValueError(f"greedy_soup: `max_ingredients` must be at least 1, got {max_ingredients!r}.")


class RunningSum:
    """Sum of state dicts in float64, and the mean with one more without adding it.

    Memory: the sum takes two float32 models, each mean that is asked for one.
    """

    def __init__(self, first: Aligned) -> None:
        self.count = 1
        self._sums: dict[str, Any] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._tied: dict[str, str] = {}
        places: dict[tuple[Any, ...], str] = {}
        for key, value in first.items():
            self._sums[key] = value
            if is_averaged(value):
                self._dtypes[key] = value.dtype
                self._sums[key] = value.detach().to(_wide(value), copy=True)
                one_of_it = places.setdefault(first.place(key), key)
                if one_of_it != key:
                    self._tied[key] = one_of_it
            elif isinstance(value, Tensor):
                self._sums[key] = value.detach().clone()

    def add(self, member: Aligned) -> None:
        """Adds a state dict with the same keys."""
        for key in self._dtypes:
            self._sums[key].add_(member[key].detach().to(self._sums[key].device))
        self._tied = {key: other for key, other in self._tied.items() if member.place(key) == member.place(other)}
        self.count += 1

    def mean(self, member: Aligned | None = None) -> dict[str, Any]:
        """The mean so far, or with one more, which is not added."""
        result: dict[str, Any] = {}
        count = self.count + (member is not None)
        for key, value in self._sums.items():
            if key not in self._dtypes:
                result[key] = value.clone() if isinstance(value, Tensor) else value
                continue
            other = self._tied.get(key)
            if other is not None and (member is None or member.place(key) == member.place(other)):
                result[key] = result[other]
                continue
            total = value if member is None else value + member[key].detach().to(value.device)
            result[key] = (total / count).to(self._dtypes[key])
        return result


def _wide(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64
