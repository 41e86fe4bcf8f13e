"""The formulas of active multi-task representation learning, for any training loop."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_reg.reweighting.amtrl_lasso._lasso import lasso

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

    It is searched between :math:`10^{-4}` and 1 of the least value at which :math:`\nu = 0`, by bisection in 40 steps;
    where even the least of them leaves more, it is that one.

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
    low, high = -4.0, 0.0
    for _ in range(40 if top else 0):
        middle = (low + high) / 2
        residual = heads @ lasso(heads, target, top * 10**middle) - target
        low, high = (middle, high) if float(residual @ residual) <= noise else (low, middle)
    return top * 10**low


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


def allocate(weights: Tensor, budget: int, n_min: int | Tensor = 0, available: Tensor | None = None) -> Tensor:
    r"""Shares a budget of samples among the sources, in whole numbers.

    .. math:: n_m = \min(\max(t\, a_m,\; n_{\min}),\; N_m), \qquad \sum_m n_m = \text{budget}

    with one t for all: what a source cannot take goes to the others in proportion, and when all that count have given
    what they have, the rest is shared by the others alike. Fractions are rounded so that the sum is kept, the largest
    up.

    Args:
        weights: :math:`a_m`, such as :math:`|\nu_m|` or :func:`sampling_probs`, at least 0, ``(M,)``; all 0: alike.
        budget: Samples in all.
        n_min: Least number of each, one for all or ``(M,)``; a source with fewer gives all that it has.
        available: :math:`N_m`, ``(M,)``; ``None``: no limit.

    Returns:
        :math:`n_m`, ``(M,)`` int64. Their sum is the budget, or all that is available if that is less.

    Raises:
        ValueError: If the budget is below the sum of the least numbers.

    Example:
        >>> allocate(torch.tensor([6.0, 3.0, 1.0]), 20, n_min=3, available=torch.tensor([10, 100, 100]))
        tensor([10,  7,  3])

    """
    weights = weights.double().abs().cpu()
    most = torch.full_like(weights, float(budget)) if available is None else available.double().cpu()
    least = torch.minimum(torch.as_tensor(n_min).double().cpu().expand_as(weights), most)
    if budget < float(least.sum()):
        raise ValueError(f"allocate: `budget` must be at least {int(least.sum())}, the least of all, got {budget}.")
    wanted = min(float(budget), float(most.sum()))
    if float(torch.where(weights > 0, most, least).sum()) < wanted:
        least, weights = torch.where(weights > 0, most, least), torch.ones_like(weights)
    weights, low, high = weights / weights.max(), 0.0, 1.0
    while float((high * weights).clamp(least, most).sum()) < wanted and high < 1e300:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        enough = float((middle * weights).clamp(least, most).sum()) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    exact = (high * weights).clamp(least, most)
    whole = (exact + 1e-9).floor()
    order = torch.where(whole < most, exact - whole, -1.0).argsort(descending=True, stable=True)
    whole[order[: int(wanted - whole.sum())]] += 1
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
    features, targets = _centred(features, bias), _centred(targets, bias)
    n, k = features.shape
    regularized = features.T @ features / n + ridge * torch.eye(k, dtype=torch.float64, device=features.device)
    wanted = (features.T @ targets / n).view(k, -1)
    head: Tensor = (torch.linalg.pinv(regularized, hermitian=True) @ wanted).view(k, *targets.shape[1:])
    return head


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
    head = target_head(features, targets, ridge, bias=bias)
    features, targets = _centred(features, bias), _centred(targets, bias)
    n = len(features)
    eigenvalues = torch.linalg.svdvals(features).square() / n
    left = n - bias - float((eigenvalues / (eigenvalues + ridge).clamp(min=1e-300)).sum())
    if left <= 1e-6 * n:
        return float("inf")
    variance = float((features @ head - targets).square().sum()) / left
    inverse = torch.where(eigenvalues > 1e-12 * eigenvalues.max(), eigenvalues / (eigenvalues + ridge).square(), 0.0)
    return variance * float(inverse.sum()) / n


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
    tasks, probs = tasks.cpu(), probs.double().cpu()
    order = tasks.argsort(stable=True)
    order = order[(tasks[order] >= 0) & (tasks[order] < len(probs))]
    sizes = tasks[order].bincount(minlength=len(probs))
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
    tasks, counts = tasks.cpu(), counts.cpu()
    order = torch.randperm(len(tasks), generator=generator)
    order = order[(tasks[order] >= 0) & (tasks[order] < len(counts))]
    order = order[tasks[order].argsort(stable=True)]
    sizes = tasks[order].bincount(minlength=len(counts))
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[tasks[order]]
    chosen = torch.zeros(len(tasks), dtype=torch.bool)
    chosen[order[place < counts[tasks[order]]]] = True
    return chosen


def _scaled(heads: Tensor, target: Tensor, scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    if heads.dim() != 2 or target.shape != heads.shape[:1]:
        raise ValueError(
            f"relevance: `heads` must be (k, M) and `target` (k,), got {tuple(heads.shape)} and {tuple(target.shape)}."
        )
    heads, target = heads.double(), target.double()
    lengths = heads.norm(dim=0) if scale else torch.ones_like(heads[0])
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return heads / lengths, target, lengths


def _centred(values: Tensor, bias: bool) -> Tensor:
    values = values.double()
    return values - values.mean(0) if bias else values
