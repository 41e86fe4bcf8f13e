"""Averages of weights: the weighted mean, the greedy soup, the moving average's decay, batch statistics anew."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.averaging._factors import stacked_factors, warn_of_factors
from lightning_reg.averaging._not_finite import spoilers, warn_of_spoiled
from lightning_reg.averaging._soup_results import Candidate, SoupResult
from lightning_reg.averaging._state_dicts import (
    Aligned,
    StateDict,
    aligned,
    check_patterns,
    is_continuous,
    is_wrapped,
    widest,
    wrapped_differently,
)
from lightning_reg.averaging.model_soups._learned_soup import LearnedSoup
from lightning_reg.averaging.model_soups._mean import RunningSum, Workspace, mean_of_parts
from lightning_reg.engine.host.distributed import all_reduce_mean, rank
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.host.names import Patterns, is_selected

__all__ = [
    "LearnedSoup",
    "SoupResult",
    "average_state_dicts",
    "ema_decay",
    "gaussian_epoch_weights",
    "greedy_soup",
    "reestimate_batchnorm",
]


def average_state_dicts(
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    accumulate_dtype: torch.dtype = torch.float64,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    names: Sequence[str] | None = None,
    factors: Literal["mean", "stack"] = "mean",
) -> dict[str, Any]:
    r"""Weighted mean of state dicts, tensor by tensor.

    .. math:: \theta = \sum_i w_i \theta_i \Big/ \sum_i w_i

    Floating-point and complex tensors are averaged; integers, booleans and entries that are no tensors are those of the
    first state dict. Tensors that share their memory in every state dict (tied weights) are averaged once and share
    it in the result. ``_orig_mod.`` and, where the state dicts disagree about it, ``module.`` are taken off the keys.

    Args:
        state_dicts: At least one, with the same keys and shapes. Any mapping will do: one that reads a file when it is
            asked keeps one tensor of each in memory.
        weights: One finite number per state dict with a positive sum, ``None`` for equal ones. They are divided by
            their sum.
        accumulate_dtype: Type of the sums, ``torch.float32`` or ``torch.float64``. The mean goes back to the tensor's
            own type (to the widest, where the state dicts differ).
        include: Patterns of keys to average (``"net.*"``), or one pattern; ``None`` for all. Others are the first state
            dict's.
        exclude: Patterns of keys to leave as the first state dict has them. Those may differ, or be in one alone.
        names: What to call the state dicts in an error; ``None`` for their positions.
        factors: What becomes of the factors of low-rank updates (``lora_A`` and ``lora_B``, ``lora_down`` and
            ``lora_up``). ``"mean"``: each is averaged as any tensor, with a warning where the product of the means is
            far from the mean of the products. ``"stack"``: they are put side by side, B times its weight, so that their
            product is exactly the mean of the products; the rank is the sum of the members'. Load the result with the
            rank and ``lora_alpha`` both times the number of members, so that the scale alpha/r stays (which must be the
            members' own; for scale alpha/sqrt(r), alpha times the root of that number). An ``alpha`` in the state dicts
            is taken account of.

    Returns:
        A new state dict with the keys of the first, on the CPU or wherever the first one's tensors are.

    Raises:
        StateDictMismatchError: If keys, shapes or kinds of tensors differ; it is a ``ValueError``.
        ValueError: If there is nothing to average, ``weights``, ``accumulate_dtype`` or ``factors`` are not as said, or
            a pattern matches no key.

    Example:
        >>> one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
        >>> two = {"w": torch.zeros(2), "n": torch.tensor(5)}
        >>> average_state_dicts([one, two])
        {'w': tensor([0.5000, 1.0000]), 'n': tensor(3)}

    """
    shares = _shares(len(state_dicts), weights)
    if accumulate_dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"average_state_dicts: `accumulate_dtype` must be torch.float32 or torch.float64, got {accumulate_dtype!r}."
        )
    members = aligned(state_dicts, names, exclude)
    check_patterns("average_state_dicts", "include", include, [members[0]])
    check_patterns("average_state_dicts", "exclude", exclude, members)
    result: dict[str, Any] = _stacked(members, shares, factors, include, exclude)
    done: dict[tuple[Any, ...], Tensor] = {}
    suspicious: list[str] = []
    labels = list(names) if names is not None else [f"state dict {i}" for i in range(len(members))]
    with Workspace() as workspace:
        for key in members[0]:
            if key in result:
                continue
            mixed = members if is_selected(key, include, exclude) else members[:0]
            dtypes = [dtype for _, dtype in filter(None, [member.shape_and_dtype(key) for member in mixed])]
            if not (dtypes and is_continuous(dtypes[0])):
                first = members[0][key]
                result[key] = first.detach().clone() if isinstance(first, Tensor) else first
                continue
            places = tuple(member.place(key) for member in members)
            if places not in done:
                done[places] = members[0].empty(key, widest(dtypes))
                parts = [member.part(key) for member in members]
                if not mean_of_parts(done[places], parts, dtypes, shares, accumulate_dtype, workspace):
                    suspicious.append(key)
            result[key] = done[places]
    used = [(member, label) for member, label, share in zip(members, labels, shares, strict=True) if share != 0]
    _warn_of_spoiled("average_state_dicts", result, suspicious, used)
    return {key: result[key] for key in members[0]}


def _stacked(
    members: Sequence[Aligned], shares: Sequence[float], factors: str, include: Patterns, exclude: Patterns
) -> dict[str, Tensor]:
    if factors == "stack":
        return stacked_factors(members, shares, lambda key: is_selected(key, include, exclude))
    if factors != "mean":
        raise ValueError(f"average_state_dicts: `factors` must be 'mean' or 'stack', got {factors!r}.")
    warn_of_factors("average_state_dicts", members, exclude)
    return {}


def _warn_of_spoiled(
    owner: str, mixed: StateDict, keys: Iterable[str], members: Sequence[tuple[StateDict, str]]
) -> None:
    names = [label for _, label in members]
    found = {key: spoilers(mixed[key], [member[key].detach() for member, _ in members], names) for key in keys}
    warn_of_spoiled(owner, {key: by for key, by in found.items() if by})


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise ValueError("average_state_dicts: `state_dicts` must hold at least one state dict, got none.")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(
            f"average_state_dicts: `weights` must have one number per state dict ({count}), got {weights}."
        )
    total = sum(weights)
    if not 0 < total < float("inf"):  # NaN is refused too
        raise ValueError(f"average_state_dicts: `weights` must be finite with a positive sum, got {list(weights)}.")
    return list(weights)


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
    exclude: Patterns = None,
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
        exclude: Patterns of keys to leave as the best model has them. Those may differ, or be in one alone.

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
    check_patterns("greedy_soup", "exclude", exclude, state_dicts)
    labels: list[Any] = list(range(len(scores))) if names is None else list(names)
    order = ranking(scores, labels, mode)
    first = order[0]
    # `module.` goes where not all have it, as in any average; asked of all where it matters, since that may read files.
    unwrap = is_wrapped(state_dicts[first]) and wrapped_differently(state_dicts[position] for position in order)
    members = aligned([state_dicts[first]], unwrap=unwrap)
    soup, warned = RunningSum(members[0], exclude), False
    best = scores[first]
    result = SoupResult({}, [labels[first]], [Candidate(str(labels[first]), best, best, True)], best)
    for position in order[1:]:
        if max_ingredients is not None and soup.count >= max_ingredients:
            result.trace.append(Candidate(str(labels[position]), scores[position], None, False))
            continue
        pair = [str(labels[first]), str(labels[position])]
        both = aligned([state_dicts[first], state_dicts[position]], pair, exclude, unwrap=unwrap)
        member, warned = both[1], warned or warn_of_factors("greedy_soup", both, exclude)
        score = float(evaluate(soup.mean(member)))
        accepted = accepts(score, best, strict=strict, min_delta=min_delta, mode=mode)
        result.trace.append(Candidate(str(labels[position]), scores[position], score, accepted))
        if accepted:
            soup.add(member)
            best = score
            result.ingredients.append(labels[position])
    result.state_dict, result.score = soup.mean(), best
    suspicious = [key for key in soup.averaged if not result.state_dict[key].isfinite().all()]
    if suspicious:
        inside = [labels.index(label) for label in result.ingredients]
        parts = aligned([state_dicts[position] for position in inside], None, exclude, unwrap=unwrap)
        _warn_of_spoiled(
            "greedy_soup", result.state_dict, suspicious, list(zip(parts, map(str, result.ingredients), strict=True))
        )
    return result


def greedy_soup_of_numbers(
    owner: str,
    state_dicts: Sequence[StateDict],
    scores: Sequence[float],
    evaluate: Callable[[dict[str, Any]], float],
    *,
    names: Sequence[str],
    mode: Literal["max", "min"] = "max",
    strict: bool = True,
    min_delta: float = 0.0,
    max_ingredients: int | None = None,
    exclude: Patterns = None,
) -> SoupResult:
    """As :func:`greedy_soup`, where a model with a score of NaN ranks last and is not taken, with a warning.

    Args:
        owner: Who asks, for the warning.
        state_dicts: The models.
        scores: Score of each.
        evaluate: Score of a state dict.
        names: Distinct names of the models.
        mode: As there, like those that follow.
        strict: See there.
        min_delta: See there.
        max_ingredients: See there.
        exclude: See there.

    Returns:
        The soup; without ingredients and weights if no score is a number.

    """
    positions = [position for position, score in enumerate(scores) if not math.isnan(score)]
    without = [name for name, score in zip(names, scores, strict=True) if math.isnan(score)]
    if without:
        warn_of_no_numbers(owner, without)
    result = SoupResult({}, [])
    if positions:
        result = greedy_soup(
            _Chosen(state_dicts, positions),
            [scores[i] for i in positions],
            evaluate,
            strict=strict,
            min_delta=min_delta,
            mode=mode,
            names=[names[i] for i in positions],
            max_ingredients=max_ingredients,
            exclude=exclude,
        )
    result.trace += [Candidate(name, math.nan, None, False) for name in without]
    return result


def warn_of_no_numbers(owner: str, names: Sequence[str]) -> None:
    """Says whose score is NaN; on the first rank."""
    if rank() == 0:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(f"{owner}: the score of {listed} is NaN, which ranks last and is never taken.", stacklevel=3)


class _Chosen(Sequence[StateDict]):
    """Some of several state dicts, each read when it is asked for."""

    def __init__(self, state_dicts: Sequence[StateDict], positions: Sequence[int]) -> None:
        self._state_dicts, self._positions = state_dicts, positions

    @override
    def __getitem__(self, position: Any) -> Any:
        return self._state_dicts[self._positions[position]]

    @override
    def __len__(self) -> int:
        return len(self._positions)


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


def gaussian_epoch_weights(epochs: int, mean: float, std: float) -> Tensor:
    r"""Weights of the weights at the ends of epochs 1 to N, the most for those around one of them.

    .. math:: w_t = \exp\Bigl(-\frac{(t - \mu)^2}{2 s^2}\Bigr) \Big/ \sum_{k=1}^N
        \exp\Bigl(-\frac{(k - \mu)^2}{2 s^2}\Bigr)

    Source: Khattak, Wasim et al., "Self-regulating Prompts", ICCV 2023, arXiv 2307.06948.

    Args:
        epochs: N, at least 1.
        mean: :math:`\mu`, in epochs; the first is 1.
        std: s, in epochs, above 0.

    Returns:
        ``(N,)`` float64, with sum 1.

    Raises:
        ValueError: If ``epochs`` is below 1 or ``std`` not above 0.

    Example:
        >>> gaussian_epoch_weights(3, mean=2.0, std=1.0)
        tensor([0.2741, 0.4519, 0.2741], dtype=torch.float64)

    """
    for argument, value, good in (("epochs", epochs, epochs >= 1), ("std", std, std > 0)):
        if not good:
            least = "at least 1" if argument == "epochs" else "above 0"
            raise ValueError(f"gaussian_epoch_weights: `{argument}` must be {least}, got {value!r}.")
    at = torch.arange(1, epochs + 1, dtype=torch.float64)
    return (-(((at - mean) / std) ** 2) / 2).softmax(0)


def ema_decay(updates: int, decay: float, warmup_steps: int) -> float:
    r"""Decay of an exponential moving average before its next update.

    .. math:: d_n = \min(d, n / (n + 1)) \text{ for } n < N, \text{ else } d

    So the average starts as the plain mean of what came so far, and knows nothing of the initial weights.

    Args:
        updates: Updates n made so far; the average of none is the first weights.
        decay: d, in [0, 1).
        warmup_steps: N.

    Returns:
        The decay.

    """
    if updates == 0:
        return 0.0
    return min(decay, updates / (updates + 1)) if updates < warmup_steps else decay


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    n: int | None = None,
    forward: Callable[[Any], Any] | None = None,
) -> int:
    r"""Sets the running statistics of batch-norm layers to their cumulative average over batches, in place.

    .. math:: \mu = \frac1n \sum_{b=1}^n \mu_b, \qquad \sigma^2 = \frac1n \sum_{b=1}^n \sigma_b^2

    The model runs in train mode without gradient; modes, momenta and everything else are put back, after an exception
    as well. Under a process group each rank uses its own batches, and the means over the ranks are kept.

    Args:
        model: Changed in place.
        loader: Training batches.
        n: Number of batches; ``None`` for all.
        forward: Runs the model on one batch; ``None`` for ``model(batch)``, or ``model(batch[0])`` if the batch is a
            tuple or list.

    Returns:
        Number of batches used; 0 without a layer that tracks statistics (then nothing is read).

    Raises:
        ValueError: If ``n`` is below 1, or the loader is empty.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> reestimate_batchnorm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        2
        >>> model.running_mean, model.running_var
        (tensor([4.]), tensor([2.]))

    """
    if n is not None and n < 1:
        raise ValueError(f"reestimate_batchnorm: `n` must be at least 1, got {n!r}.")
    layers = tracking_layers(model)
    if not layers:
        return 0
    run = forward or (lambda batch: model(batch[0] if isinstance(batch, tuple | list) else batch))
    count = 0
    with _cumulative(model, layers):
        for batch in islice(loader, n):
            run(batch)
            count += 1
    if count == 0:
        raise ValueError("reestimate_batchnorm: `loader` gave no batch, so the statistics are reset and nothing else.")
    for layer in layers:
        for name in ("running_mean", "running_var"):
            statistic = getattr(layer, name)
            statistic.copy_(all_reduce_mean(statistic))
    return count


def tracking_layers(model: nn.Module) -> list[BatchNorm]:
    """Batch-norm layers with running statistics."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


@contextmanager
def _cumulative(model: nn.Module, layers: Sequence[BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the cumulative average
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
