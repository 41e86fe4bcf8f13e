"""The formulas of active multi-task representation learning, for any training loop."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_reg.reweighting.amtrl_lasso._lasso import lasso, lasso_path

__all__ = [
    "allocate",
    "first_of_tasks",
    "head_noise",
    "relevance_l1",
    "relevance_l2",
    "residual_lam",
    "sampling_probs",
    "target_head",
    "task_draws",
]


def relevance_l1(heads: Tensor, target: Tensor, lam: float = 0.0, *, scale: bool = False) -> Tensor:
    r"""The sparse relevance of the sources: the target's head as a combination of few heads.

    .. math:: \nu = \arg\min_\nu \tfrac12 \lVert W \nu - w_T \rVert_2^2 + \lambda \lVert \nu \rVert_1

    Args:
        heads: W, the heads of M sources as columns, ``(k, M)``.
        target: :math:`w_T`, ``(k,)``.
        lam: :math:`\lambda`, at least 0. 0: the limit, the solution of least :math:`\lVert \nu \rVert_1` among those
            that fit best.
        scale: Whether the problem is solved for heads of length 1, and :math:`\nu` given for the heads as they are.

    Returns:
        :math:`\nu`, ``(M,)`` float64; a head of zeros has 0.

    Raises:
        ValueError: If shapes do not fit, ``lam`` is below 0, or the solver does not converge.

    Example:
        >>> relevance_l1(torch.eye(3), torch.tensor([2.0, -0.5, 1.0]), lam=0.75)
        tensor([1.2500, 0.0000, 0.2500], dtype=torch.float64)

    """
    heads, target, lengths = _scaled(heads, target, scale)
    return lasso(heads, target, lam) / lengths


def relevance_l2(heads: Tensor, target: Tensor, *, scale: bool = False) -> Tensor:
    r"""The dense relevance of the predecessor, of least squares: :math:`\nu = W^+ w_T`.

    Args:
        heads: W, ``(k, M)``.
        target: :math:`w_T`, ``(k,)``.
        scale: Whether heads are of length 1 in the problem, as for :func:`relevance_l1`.

    Returns:
        :math:`\nu`, ``(M,)`` float64.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> relevance_l2(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))
        tensor([0.5000, 0.5000], dtype=torch.float64)

    """
    heads, target, lengths = _scaled(heads, target, scale)
    nu: Tensor = torch.linalg.pinv(heads) @ target / lengths
    return nu


def residual_lam(heads: Tensor, target: Tensor, noise: float, *, scale: bool = False) -> float:
    r"""The largest :math:`\lambda` whose residual :math:`\lVert W \nu - w_T \rVert_2^2` is not above the noise.

    It is at least :math:`10^{-4}` of the least value at which :math:`\nu = 0`, even where that leaves more, and at most
    this value.

    Args:
        heads: W, ``(k, M)``.
        target: :math:`w_T`, ``(k,)``.
        noise: Expected squared error of the target's head, as :func:`head_noise` gives it.
        scale: As for :func:`relevance_l1`.

    Returns:
        :math:`\lambda`.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> round(residual_lam(torch.eye(2), torch.tensor([1.0, 1.0]), noise=0.5), 4)
        0.5

    """
    heads, target, _ = _scaled(heads, target, scale)
    top = float((heads.T @ target).abs().max())
    for low, fixed, slope in lasso_path(heads, target, 1e-4 * top):
        # of right angles: what no head on the support explains, and what lam leaves of the others
        alone, shrunk = (float(v.square().sum()) for v in (target - heads @ fixed, heads @ slope))
        if alone + low**2 * shrunk <= noise:
            return min(math.sqrt((noise - alone) / shrunk), top)
    return 1e-4 * top


def sampling_probs(
    nu: Tensor,
    order: Literal["l1", "l2", "uniform"] = "l1",
    floor: float = 0.0,
    costs: Sequence[float] | None = None,
) -> Tensor:
    r"""How often the sources are drawn.

    .. math:: p_m = \frac{f}{M} + (1 - f) \frac{a_m}{\sum_j a_j}, \qquad a_m = |\nu_m| / \sqrt{c_m}

    Args:
        nu: Relevance, ``(M,)``; signs do not count.
        order: ``"l1"``: :math:`|\nu|`, by which :math:`\sum_m \nu_m^2 / n_m` is least. ``"l2"``: the predecessor's
            :math:`\nu^2`. ``"uniform"``: all alike, but for costs.
        floor: f, the share that is drawn from all alike, in [0, 1].
        costs: :math:`c_m`, cost of a sample of each source, above 0; ``None``: they cost the same.

    Returns:
        Probabilities ``(M,)`` float64; the same for all where :math:`\nu` is 0.

    Example:
        >>> sampling_probs(torch.tensor([3.0, -1.0, 0.0, 0.0]), floor=0.2)
        tensor([0.6500, 0.2500, 0.0500, 0.0500], dtype=torch.float64)

    """
    nu = nu.double().abs()
    # by the largest: squares of small numbers do not vanish
    nu = nu / nu.max() if float(nu.max()) else torch.ones_like(nu)
    each = {"l1": nu, "l2": nu.square(), "uniform": torch.ones_like(nu)}[order]
    if costs is not None:
        each = each / torch.tensor(costs, dtype=torch.float64, device=nu.device).sqrt()
    return floor / len(nu) + (1 - floor) * each / each.sum()


def allocate(
    weights: Tensor,
    budget: float,
    n_min: int | Tensor = 0,
    available: Tensor | None = None,
    costs: Sequence[float] | None = None,
) -> Tensor:
    r"""Shares a budget among the sources, in whole samples.

    .. math:: n_m = \min(\max(t\, a_m,\; n_{\min}),\; N_m), \qquad \sum_m c_m n_m = \text{budget}

    with one t for all, by which :math:`\sum_m \nu_m^2 / n_m` is least where :math:`a_m = |\nu_m| / \sqrt{c_m}`: what a
    source cannot take goes to the others in proportion, and when all that count have given what they have, the rest is
    shared by the others alike. Fractions are rounded down; what that leaves buys a further sample each, the largest
    fraction first, and then further ones of the first that it pays for.

    Args:
        weights: :math:`a_m`, such as :func:`sampling_probs`, at least 0, ``(M,)``; all 0: alike.
        budget: What the samples may cost together; without costs their number.
        n_min: Least number of each, one for all or ``(M,)``; a source with fewer gives all that it has.
        available: :math:`N_m`, ``(M,)``; ``None``: no limit.
        costs: :math:`c_m`, cost of a sample of each source, above 0; ``None``: 1.

    Returns:
        :math:`n_m`, ``(M,)`` int64. They cost the budget, or as much of it as whole samples can, or are all that is
        available.

    Raises:
        ValueError: If the least numbers cost more than the budget.

    Example:
        >>> allocate(torch.tensor([6.0, 3.0, 1.0]), 20, n_min=3, available=torch.tensor([10, 100, 100]))
        tensor([10,  7,  3])
        >>> allocate(torch.tensor([1.0, 1.0]) / torch.tensor([4.0, 1.0]).sqrt(), 60, costs=[4.0, 1.0])
        tensor([10, 20])

    """
    weights = weights.double().abs().cpu()
    cost = torch.ones_like(weights) if costs is None else torch.tensor(costs, dtype=torch.float64)
    most = (budget / cost).ceil() if available is None else available.double().cpu()
    least = torch.minimum(torch.as_tensor(n_min).double().cpu().expand_as(weights), most)
    if budget < float(cost @ least) * (1 - 1e-12):
        raise ValueError(f"allocate: `budget` must be at least {cost @ least:g}, the least of all, got {budget}.")
    wanted = min(budget, float(cost @ most))
    if float(cost @ torch.where(weights > 0, most, least)) < wanted:
        least, weights = torch.where(weights > 0, most, least), torch.ones_like(weights)
    weights, low, high = weights / weights.max(), 0.0, 1.0
    while float(cost @ (high * weights).clamp(least, most)) < wanted and high < 1e300:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        enough = float(cost @ (middle * weights).clamp(least, most)) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    exact = (high * weights).clamp(least, most)
    whole = (exact + 1e-9).floor()
    order = [m for m in (exact - whole).argsort(descending=True, stable=True).tolist() if weights[m] > 0]
    for at_once in (1.0, torch.inf):
        for m in order:
            affordable = (budget * (1 + 1e-12) - float(cost @ whole)) // float(cost[m])
            whole[m] += max(min(at_once, float(most[m] - whole[m]), affordable), 0.0)
    return whole.long()


def target_head(features: Tensor, targets: Tensor, ridge: float = 1e-3, *, bias: bool = False) -> Tensor:
    r"""The linear head of a task on frozen features.

    .. math:: w = \arg\min_w \tfrac1n \lVert F w - y \rVert_2^2 + r \lVert w \rVert_2^2

    Args:
        features: F, ``(n, k)``.
        targets: y, ``(n,)`` or ``(n, c)``.
        ridge: r, at least 0.
        bias: Whether there is a bias beside w, which is not penalized and not returned.

    Returns:
        w, ``(k,)`` or ``(k, c)``, float64.

    Example:
        >>> target_head(torch.eye(2), torch.tensor([1.0, 3.0]), ridge=0.5)
        tensor([0.5000, 1.5000], dtype=torch.float64)

    """
    return _ridge(features, targets, ridge, bias)[0]


def head_noise(features: Tensor, targets: Tensor, ridge: float = 1e-3, *, bias: bool = False) -> float:
    r"""The expected squared error that the noise of the targets leaves in :func:`target_head`.

    .. math:: \sigma^2 \operatorname{tr}(A^{-1} S A^{-1}) / n, \qquad S = F^\top F / n, \quad A = S + r I

    Args:
        features: F, ``(n, k)``.
        targets: y, ``(n,)`` or ``(n, c)``; the errors of all c are added up.
        ridge: r.
        bias: As for :func:`target_head`.

    Returns:
        The error; :math:`\sigma^2` is the mean squared residual, over n less the degrees of freedom that were fitted.
        Infinite where those are all n: such a sample says nothing about its noise.

    """
    return _ridge(features, targets, ridge, bias)[1]


def _ridge(features: Tensor, targets: Tensor, ridge: float, bias: bool) -> tuple[Tensor, float]:
    features, targets = (v - v.mean(0) if bias else v for v in (features.double(), targets.double()))
    n, k = features.shape
    values, vectors = torch.linalg.eigh(features.T @ features / n)
    inverse = torch.where(values > 1e-12 * values[-1], 1 / (values + ridge), 0.0)
    solved = vectors @ (inverse[:, None] * (vectors.T @ (features.T @ targets / n).view(k, -1)))
    head = solved.view(k, *targets.shape[1:])
    left = n - bias - float(values @ inverse)
    if left <= 1e-6 * n:
        return head, float("inf")
    variance = float((features @ head - targets).square().sum()) / left
    return head, variance * float(values @ inverse.square()) / n


def task_draws(tasks: Tensor, probs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Samples drawn with replacement: a task by its probability first, then one of its samples, all alike.

    Args:
        tasks: Task of each sample, ``(N,)``, whole numbers; others than 0 to M - 1 are not drawn.
        probs: Probabilities of the tasks, ``(M,)``.
        count: How many are drawn.
        generator: Draws, on the CPU.

    Returns:
        Positions ``(count,)`` on the CPU.

    Raises:
        ValueError: If a task that may be drawn has no sample.

    Example:
        >>> task_draws(torch.tensor([0, 1, 0, 2]), torch.tensor([0.0, 1.0, 0.0]), 3, torch.Generator())
        tensor([1, 1, 1])

    """
    probs = probs.double().cpu()
    order, sizes = _by_task(tasks.cpu(), torch.arange(len(tasks)), len(probs))
    empty = ((sizes == 0) & (probs > 0)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"task {empty[0]} has no sample to draw")
    # by quantiles: multinomial takes 2^24 categories only, and its draws are of no documented order
    ends = (probs / probs.sum()).cumsum(0)
    drawn = torch.searchsorted(ends, torch.rand(count, generator=generator, dtype=torch.float64), right=True)
    drawn = drawn.clamp(max=int(probs.nonzero().max()))
    places = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes[drawn]).long()
    return order[(sizes.cumsum(0) - sizes)[drawn] + places]


def first_of_tasks(tasks: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """As many samples of each task as a budget gives it: the first ones of a random order.

    Args:
        tasks: Task of each sample, ``(N,)``, whole numbers; others than 0 to M - 1 are left out.
        counts: Samples of each task, ``(M,)``.
        generator: Draws the order, on the CPU; with the same state larger counts keep all samples of smaller ones.

    Returns:
        Which samples they are, bool ``(N,)`` on the CPU.

    Example:
        >>> first_of_tasks(torch.tensor([0, 1, 0, 1]), torch.tensor([2, 0]), torch.Generator())
        tensor([ True, False,  True, False])

    """
    order, sizes = _by_task(tasks.cpu(), torch.randperm(len(tasks), generator=generator), len(counts))
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    chosen = torch.zeros(len(tasks), dtype=torch.bool)
    chosen[order[place < counts.cpu().repeat_interleave(sizes)]] = True
    return chosen


def _by_task(tasks: Tensor, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the samples of the tasks 0 to ``count`` - 1, task by task in the given order, and their numbers."""
    order = order[(tasks[order] >= 0) & (tasks[order] < count)]
    return order[tasks[order].argsort(stable=True)], tasks[order].bincount(minlength=count)


def _scaled(heads: Tensor, target: Tensor, scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    if heads.dim() != 2 or target.shape != heads.shape[:1]:
        raise ValueError(
            f"relevance: `heads` must be (k, M) and `target` (k,), got {tuple(heads.shape)} and {tuple(target.shape)}."
        )
    heads, target = heads.double(), target.double()
    lengths = heads.norm(dim=0) if scale else torch.ones_like(heads[0])
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return heads / lengths, target, lengths
