"""Mixes of few models: sums of task vectors (TIES, DARE), the arc (slerp) and the line (WiSE-FT) between two."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.averaging._factors import warn_of_factors
from lightning_reg.averaging._not_finite import spoilers, warn_of_spoiled
from lightning_reg.averaging._state_dicts import StateDict, accumulated, aligned, check_patterns, is_averaged
from lightning_reg.engine.host.names import Patterns, matches

__all__ = ["dare_merge", "slerp_merge", "ties_merge", "wise_ft", "wise_ft_curve"]


def ties_merge(
    base: StateDict,
    state_dicts: Sequence[StateDict],
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    *,
    normalize: bool = True,
    exclude: Patterns = None,
) -> dict[str, Any]:
    r"""Adds task vectors after trimming them and agreeing on signs (Yadav et al., NeurIPS 2023, arXiv 2306.01708).

    With :math:`\tau_i = \theta_i - \theta_0`: keep the :math:`\lfloor d\,n \rfloor` largest entries of each tensor of
    :math:`\tau_i`; elect the sign of :math:`\sum_i w_i \tau_i` (plus where it is 0); sum the :math:`w_i \tau_i` of that
    sign and divide by the sum of their :math:`w_i` (by 1 where none is left).

    Differs from the paper, which trims over the whole model and takes equal weights: per tensor and weighted, as in
    mergekit.

    Args:
        base: The common start :math:`\theta_0`.
        state_dicts: The fine-tuned models.
        density: Share d of entries to keep, in [0, 1]. Paper: 0.2. Neutral: 1.
        weights: One number per model; ``None`` for ones.
        lam: Factor of the merged task vector. Paper: 1. At 0 the result is ``base``.
        normalize: Whether to divide by the sum of weights.
        exclude: Patterns of keys to leave as ``base`` has them. Those may differ, or be in one alone.

    Returns:
        A new state dict; integers, booleans and other entries are ``base``'s.

    Raises:
        ValueError: If an argument is outside its range, or the state dicts differ.

    """
    shares = _task_weights("ties_merge", state_dicts, density, weights, lam)

    def merge(key: str, vectors: list[Tensor]) -> Tensor:
        return _elect([_trim(v, density) for v in vectors], shares, normalize=normalize)

    return _add_task_vectors("ties_merge", base, state_dicts, merge, lam, exclude)


def _trim(vector: Tensor, density: float) -> Tensor:
    kept = torch.zeros_like(vector)
    flat = vector.flatten()
    largest = flat.abs().argsort(descending=True, stable=True)[: int(density * flat.numel())]
    kept.view(-1)[largest] = flat[largest]
    return kept


def _elect(vectors: list[Tensor], shares: list[float], *, normalize: bool) -> Tensor:
    if vectors[0].is_complex():  # real and imaginary parts have signs of their own
        parts = [torch.view_as_real(vector) for vector in vectors]
        return torch.view_as_complex(_elect(parts, shares, normalize=normalize))
    stacked = torch.stack(vectors)
    weights = stacked.new_tensor(shares).view(-1, *[1] * vectors[0].dim())
    weighted = weights * stacked
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = (stacked.sign() == sign).to(stacked)
    total = (weighted * agrees).sum(0)
    if not normalize:
        return total
    divisor = (weights * agrees).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor)


def dare_merge(
    base: StateDict,
    state_dicts: Sequence[StateDict],
    density: float = 0.5,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    *,
    rescale: Literal["density", "norm"] = "density",
    elect_signs: bool = False,
    normalize: bool = False,
    generator: torch.Generator | None = None,
    masks: Sequence[Mapping[str, Tensor]] | None = None,
    exclude: Patterns = None,
) -> dict[str, Any]:
    r"""Adds task vectors with entries dropped at random (Yu et al., ICML 2024, arXiv 2311.03099).

    Each entry of :math:`\tau_i = \theta_i - \theta_0` is kept with probability d, the rest is scaled up, and
    :math:`\theta_0 + \lambda \sum_i w_i \tau_i` is returned.

    Args:
        base: The common start :math:`\theta_0`.
        state_dicts: The fine-tuned models.
        density: Probability d to keep an entry, in (0, 1]; 1 - p in the paper's letters. Neutral: 1.
        weights: One number per model; ``None`` for ones.
        lam: Factor of the sum. At 0 the result is ``base``.
        rescale: ``"density"`` divides by d, so that the expectation stays (the paper); ``"norm"`` restores each
            tensor's sum of absolute values (mergekit).
        elect_signs: Whether entries must agree on a sign as in :func:`ties_merge`.
        normalize: Whether to divide by the sum of the weights.
        generator: Draws what is kept; ``None`` for a new one with seed 0.
        masks: What is kept, one mapping from the result's keys to tensors of zeros and ones per model, in place of
            drawing.
        exclude: Patterns of keys to leave as ``base`` has them. Those may differ, or be in one alone.

    Returns:
        A new state dict; integers, booleans and other entries are ``base``'s.

    Raises:
        ValueError: If an argument is outside its range, or the state dicts differ.

    """
    shares = _task_weights("dare_merge", state_dicts, density, weights, lam, low_open=True)
    if normalize and not elect_signs and sum(shares) == 0:
        raise ValueError(f"dare_merge: `weights` must not sum to 0 with normalize=True, got {shares}.")
    if rescale not in ("density", "norm"):
        raise ValueError(f"dare_merge: `rescale` must be 'density' or 'norm', got {rescale!r}.")
    drawn = generator or torch.Generator().manual_seed(0)

    def merge(key: str, vectors: list[Tensor]) -> Tensor:
        kept = []
        for position, vector in enumerate(vectors):
            if masks is not None:
                mask = masks[position][key].to(vector)
            else:
                draws = torch.rand(vector.shape, generator=drawn, dtype=torch.float64, device="cpu")
                mask = (draws < density).to(vector)
            kept.append(_rescaled(vector, vector * mask, density, rescale))
        if elect_signs:
            return _elect(kept, shares, normalize=normalize)
        total = torch.stack([share * vector for share, vector in zip(shares, kept, strict=True)]).sum(0)
        return total / sum(shares) if normalize else total

    return _add_task_vectors("dare_merge", base, state_dicts, merge, lam, exclude)


def _rescaled(whole: Tensor, kept: Tensor, density: float, rescale: str) -> Tensor:
    if rescale == "density":
        return kept / density
    left = kept.abs().sum()
    return kept * (whole.abs().sum() / left) if left > 0 else kept


def _task_weights(
    owner: str,
    state_dicts: Sequence[StateDict],
    density: float,
    weights: Sequence[float] | None,
    lam: float,
    *,
    low_open: bool = False,
) -> list[float]:
    if not state_dicts:
        raise ValueError(f"{owner}: `state_dicts` must hold at least one state dict, got none.")
    if not 0 <= density <= 1 or (low_open and density == 0):
        raise ValueError(f"{owner}: `density` must be in {'(' if low_open else '['}0, 1], got {density!r}.")
    if not math.isfinite(lam):
        raise ValueError(f"{owner}: `lam` must be a finite number, got {lam!r}.")
    shares = [1.0] * len(state_dicts) if weights is None else list(weights)
    if len(shares) != len(state_dicts) or not all(math.isfinite(share) for share in shares):
        raise ValueError(f"{owner}: `weights` must be {len(state_dicts)} finite numbers, got {shares}.")
    return shares


def _add_task_vectors(
    owner: str,
    base: StateDict,
    state_dicts: Sequence[StateDict],
    merge: Callable[[str, list[Tensor]], Tensor],
    lam: float,
    exclude: Patterns,
) -> dict[str, Any]:
    names = ["base", *(f"state dict {i}" for i in range(len(state_dicts)))]

    def mix(key: str, start: Tensor, *ends: Tensor) -> Tensor:
        return start + lam * merge(key, [end - start for end in ends])

    return _combine(owner, [base, *state_dicts], names, mix, exclude)


def slerp_merge(
    start: StateDict, end: StateDict, t: float, *, threshold: float = 0.9995, exclude: Patterns = None
) -> dict[str, Any]:
    r"""Interpolates along the arc between two models, each tensor taken as one vector.

    .. math:: \theta = \frac{\sin((1-t)\omega)}{\sin \omega} \theta_0 + \frac{\sin(t \omega)}{\sin \omega} \theta_1,
        \qquad \cos\omega = \frac{\langle \theta_0, \theta_1 \rangle}{\|\theta_0\| \|\theta_1\|}

    The angle is that of the normalised vectors, the mix that of the given ones, as in mergekit.

    Args:
        start: State dict at ``t`` = 0.
        end: State dict at ``t`` = 1.
        t: Position on the arc, in [0, 1].
        threshold: Straight interpolation where the vectors are parallel or opposite up to this \|cos\|, in (0, 1].
        exclude: Patterns of keys to leave as the nearer end has them. Those may differ, or be in one alone.

    Returns:
        A new state dict. Integers, booleans and other entries are those of the nearer end.

    Raises:
        ValueError: If ``t`` or ``threshold`` are outside their range, or the state dicts differ.

    Example:
        >>> mixed = slerp_merge({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}, t=0.5)
        >>> mixed["w"]
        tensor([0.7071, 0.7071])

    """
    if not 0 <= t <= 1:
        raise ValueError(f"slerp_merge: `t` must be in [0, 1], got {t!r}.")
    if not 0 < threshold <= 1:
        raise ValueError(f"slerp_merge: `threshold` must be in (0, 1], got {threshold!r}.")

    def mix(key: str, one: Tensor, two: Tensor) -> Tensor:
        if t in (0, 1):
            return two if t else one
        norms = float(one.norm() * two.norm())
        # Of complex tensors the real part: that of the angle between them as vectors of real numbers.
        cosine = float((one.conj() * two).sum().real) / norms if norms > 0 else 1.0
        if abs(cosine) > threshold:
            return (1 - t) * one + t * two
        angle = math.acos(cosine)
        return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)

    return _combine("slerp_merge", [start, end], ["start", "end"], mix, exclude, like=int(t >= 0.5))


def wise_ft(
    zeroshot: StateDict, finetuned: StateDict, alpha: float, *, extrapolate: bool = False, exclude: Patterns = None
) -> dict[str, Any]:
    r"""Interpolates between a model before and after fine-tuning (Wortsman et al., CVPR 2022, arXiv 2109.01903).

    .. math:: \theta = (1 - \alpha)\, \theta_0 + \alpha\, \theta_1

    Args:
        zeroshot: State dict before fine-tuning.
        finetuned: State dict after it.
        alpha: 0 is ``zeroshot``, 1 is ``finetuned``, each to the last bit. Usual: 0.5 to 0.75.
        extrapolate: Whether ``alpha`` may lie outside [0, 1].
        exclude: Patterns of keys to leave as the nearer end has them. Those may differ, or be in one alone.

    Returns:
        A new state dict. Integers, booleans and other entries are those of the nearer end.

    Raises:
        ValueError: If ``alpha`` is outside [0, 1], unless asked, or the state dicts differ.

    Example:
        >>> wise_ft({"w": torch.zeros(2)}, {"w": torch.ones(2)}, alpha=0.75)
        {'w': tensor([0.7500, 0.7500])}

    """
    if not math.isfinite(alpha) or not (extrapolate or 0 <= alpha <= 1):
        raise ValueError(f"wise_ft: `alpha` must be in [0, 1] (or `extrapolate=True`), got {alpha!r}.")

    def mix(key: str, start: Tensor, end: Tensor) -> Tensor:
        if alpha in (0, 1):  # 0 * inf is not 0
            return end if alpha else start
        return (1 - alpha) * start + alpha * end

    return _combine("wise_ft", [zeroshot, finetuned], ["zeroshot", "finetuned"], mix, exclude, like=int(alpha >= 0.5))


def wise_ft_curve(
    zeroshot: StateDict,
    finetuned: StateDict,
    evaluate: Callable[[dict[str, Any]], Mapping[str, float]],
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *,
    exclude: Patterns = None,
) -> dict[str, list[float]]:
    """What mixes between a model before and after fine-tuning score, from the one end to the other.

    Args:
        zeroshot: State dict before fine-tuning.
        finetuned: State dict after it.
        evaluate: Gives the scores of a state dict by name, the same names each time.
        alphas: The mixes, see :func:`wise_ft`; at least one.
        exclude: Patterns of keys to leave as the nearer end has them.

    Returns:
        ``"alpha"`` and each score, a value for each mix; ``lightning_reg.plots.interpolation`` draws it.

    Raises:
        ValueError: If there is no ``alpha`` or one is outside [0, 1], or the scores have other names than before.

    Example:
        >>> ends = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> wise_ft_curve(*ends, lambda state: {"sum": float(state["w"].sum())}, alphas=[0.0, 0.5, 1.0])
        {'alpha': [0.0, 0.5, 1.0], 'sum': [0.0, 1.0, 2.0]}

    """
    if not alphas:
        raise ValueError("wise_ft_curve: `alphas` must have at least one number, got none.")
    curve: dict[str, list[float]] = {}
    for alpha in alphas:
        scores = {"alpha": alpha, **evaluate(wise_ft(zeroshot, finetuned, alpha, exclude=exclude))}
        if curve and scores.keys() != curve.keys():
            raise ValueError(
                f"wise_ft_curve: `evaluate` must give scores of the same names each time, got {[*scores][1:]} after"
                f" {[*curve][1:]}."
            )
        for name, value in scores.items():
            curve.setdefault(name, []).append(float(value))
    return curve


def _combine(
    owner: str,
    state_dicts: Sequence[StateDict],
    names: Sequence[str],
    mix: Callable[..., Tensor],
    exclude: Patterns,
    like: int = 0,
) -> dict[str, Any]:
    """Applies ``mix(key, *values)`` to float and complex tensors in double precision; others are member ``like``'s."""
    members = aligned(state_dicts, names, exclude)
    check_patterns(owner, "exclude", exclude, members)
    warn_of_factors(owner, members, exclude)
    result: dict[str, Any] = {}
    done: dict[tuple[Any, ...], Tensor] = {}
    spoiled: dict[str, list[str]] = {}
    for key in members[like]:
        mixed = members if not matches(key, exclude) else members[like : like + 1]
        values = [member[key] for member in mixed]
        if len(mixed) > 1 and is_averaged(values[0]):
            places = tuple(member.place(key) for member in members)
            if places not in done:
                wide = [accumulated(value) for value in values]
                done[places] = mix(key, *wide).to(values[0].dtype)
                if by := spoilers(done[places], wide, names):
                    spoiled[key] = by
            result[key] = done[places]
        else:
            chosen = values[like] if len(mixed) > 1 else values[0]
            result[key] = chosen.detach().clone() if isinstance(chosen, Tensor) else chosen
    warn_of_spoiled(owner, spoiled)
    return result
