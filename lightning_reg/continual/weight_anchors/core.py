"""Weights tied to anchors: the penalty, and how much each weight matters."""

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.host.distributed import all_reduce_sum
from lightning_reg.engine.weights.finite import all_finite
from lightning_reg.engine.weights.squares import add_row_squares_, weighted_squares

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["fisher_diagonal", "fisher_losses", "quadratic_penalty"]

Labels = Literal["argmax", "sample", "true"]
Outputs = Literal["classes", "numbers", "several", "counts"]


def quadratic_penalty(
    params: Sequence[Tensor], anchors: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    r"""Weighted squared distance of parameters from anchors; its gradient is :math:`2 w (\theta - \theta^*)`.

    .. math:: \sum_j w_j (\theta_j - \theta^*_j)^2

    Fused operations over all tensors, two temporary copies of them. It can be differentiated once.

    Args:
        params: Parameters, or parts of them, with gradient.
        anchors: Constants of the same shapes.
        weights: Constants of the same shapes, at least 0; ``None`` for 1.

    Returns:
        A scalar, in float32 at least.

    Example:
        >>> quadratic_penalty([torch.tensor([1.0, 3.0])], [torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 0.5])])
        tensor(3.)

    """
    return weighted_squares(params, anchors, weights)


def parts_like(params: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
    """The first rows of each parameter, as many as its anchor has."""
    return [p if p.shape == a.shape else p[: len(a)] for p, a in zip(params, anchors, strict=True)]


@torch.no_grad()
def pull_(params: Sequence[Tensor], anchors: Sequence[Tensor], among: Sequence[Tensor], share: float) -> None:
    """Moves parameters towards their anchors, in place.

    Args:
        params: Parameters.
        anchors: Where to, for the first rows of each.
        among: Only those of ``params`` that are in here and have a gradient are moved.
        share: Part of the way, in [0, 1].

    """
    meant = {id(p) for p in among if p.grad is not None}
    pairs = [(p, a) for p, a in zip(params, anchors, strict=True) if id(p) in meant]
    if pairs:
        parts = parts_like([p.detach() for p, _ in pairs], [a for _, a in pairs])
        torch._foreach_lerp_(parts, [a for _, a in pairs], share)


# -- how much each one matters ----------------------------------------------------------------------------------------


def fisher_losses(
    logits: Tensor,
    labels: Tensor | None,
    which: Labels = "argmax",
    generator: torch.Generator | None = None,
    outputs: Outputs = "classes",
    variances: Tensor | None = None,
) -> Tensor:
    r"""Losses whose squared gradients estimate the Fisher information of a classifier, or of a regression.

    .. math:: -\log \operatorname{softmax}(z_b)_{\hat y_b}, \qquad
        \tfrac12 \sum_k \bigl(\log v_{bk} + (z_{bk} - \hat y_{bk})^2 / v_{bk}\bigr), \qquad
        \sum_k \bigl(\log(1 + e^{z_{bk}}) - \hat y_{bk} z_{bk}\bigr), \qquad
        \sum_k \bigl(e^{z_{bk}} - \hat y_{bk} z_{bk}\bigr)

    Of one class of several, of a Gaussian around predictions with variance v, of several labels that are each there or
    not, of counts (Poisson).

    Args:
        logits: ``(B, C)`` with gradient; ``(B, K)`` predictions of a regression, logits of labels, logarithms of rates.
        labels: ``(B,)`` int64, or ``(B, K)`` numbers, read with ``which="true"`` only.
        which: Whose label :math:`\hat y` is: the model's most probable one (``"argmax"``, not of numbers and counts: of
            a regression it is the prediction itself, where the gradient is 0), one drawn from its probabilities
            (``"sample"``, which is the Fisher information itself in the mean), or the given one (``"true"``, the
            empirical Fisher).
        generator: For the draws.
        outputs: What the outputs are: scores of classes, predicted numbers, logits of several labels, or logarithms of
            the rates of counts.
        variances: Of predicted numbers, ``(B, K)`` above 0, with gradient or without; ``None`` for 1.

    Returns:
        float32 ``(B,)`` with gradient.

    Raises:
        ValueError: If the true labels are asked for and not given, or the most probable numbers or counts.

    """
    if which == "true" and labels is None:
        raise ValueError("fisher_losses: `labels` must be given with which='true', got None.")
    if outputs in ("numbers", "counts") and which == "argmax":
        raise ValueError(f"fisher_losses: `which` must be 'sample' or 'true' for {outputs}, got 'argmax'.")
    if outputs == "numbers":
        return _gaussian_losses(logits, labels if which == "true" else None, variances, generator)
    scores = logits.float()
    if outputs == "several":
        return _bernoulli_losses(scores, labels, which, generator)
    if outputs == "counts":
        rates = scores.exp()
        counts = labels if which == "true" and labels is not None else torch.poisson(rates.detach(), generator)
        return (rates - counts.float() * scores).sum(1)
    if which == "argmax":
        labels = scores.argmax(1)
    elif which == "sample":
        shares = scores.detach().softmax(1)
        # A row that is not finite has no class to draw; its loss is not finite whichever is drawn.
        shares = torch.where(shares.isfinite().all(1, keepdim=True), shares, 1.0)
        labels = torch.multinomial(shares, 1, generator=generator)[:, 0]
    return F.cross_entropy(scores, labels, reduction="none")  # type: ignore[arg-type]  # checked above


def _gaussian_losses(
    predictions: Tensor, targets: Tensor | None, variances: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    means = predictions.float()
    if targets is None:
        noise = torch.randn(means.shape, generator=generator, device=means.device)
        noise = noise if variances is None else noise * variances.detach().float().sqrt()
        targets = means.detach() + noise
    squares = (means - targets.float()).square()
    if variances is not None:
        squares = squares / variances.float() + variances.float().log()
    return 0.5 * squares.flatten(1).sum(1)


def _bernoulli_losses(
    logits: Tensor, labels: Tensor | None, which: Labels, generator: torch.Generator | None
) -> Tensor:
    if which == "argmax":
        labels = logits > 0
    elif which == "sample":
        drawn = torch.rand(logits.shape, generator=generator, device=logits.device)
        labels = drawn < logits.detach().sigmoid()
    each = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")  # type: ignore[union-attr]  # checked above
    return each.sum(1)


def fisher_diagonal(
    params: Sequence[Tensor],
    batches: Iterable[Tensor],
    per_sample: bool = True,
    group: "ProcessGroup | None" = None,
) -> list[Tensor]:
    r"""Diagonal of the Fisher information: the mean squared gradient of the samples' losses.

    .. math:: F_j = \frac1N \sum_i \Bigl(\frac{\partial \ell_i}{\partial \theta_j}\Bigr)^2

    Samples with a gradient that is not finite are left out of the mean, with a warning. In a batch they may spoil the
    gradients of the others, which are left out too then: give suspicious samples alone.

    Args:
        params: Parameters.
        batches: Losses of one batch after the other, ``(B,)`` each, with gradient (:func:`fisher_losses`), of a network
            in which samples do not meet (eval mode).
        per_sample: ``False`` squares the gradient of each batch's mean instead, :math:`\frac1K \sum_k B_k\,
            (\overline{\partial \ell})^2` over K batches: much cheaper, and something else unless batches are of one.
        group: Ranks that have seen other samples; ``None``: these are all.

    Returns:
        For each parameter a tensor of its shape, in float32 at least.

    Raises:
        ValueError: If there is no sample with a finite gradient.

    Example:
        >>> w, x = torch.zeros(2, requires_grad=True), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> fisher_diagonal([w], [x @ w])
        [tensor([5., 2.])]

    """
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    offered = counted = 0
    for losses in batches:
        if per_sample:
            counted += add_row_squares_(sums, losses, params)
            offered += len(losses)
        elif len(losses):
            gradients = torch.autograd.grad(losses.mean(), params, allow_unused=True)
            counted += _add_square_(sums, gradients, len(losses))
            offered += 1
    if counted < offered:
        what = "samples" if per_sample else "batches"
        text = f"fisher_diagonal: the gradients of {offered - counted} of {offered} {what} were not finite: left out."
        warnings.warn(text, stacklevel=2)
    total = torch.tensor(float(counted), device=sums[0].device)
    if group is not None:
        sums, total = [all_reduce_sum(s, group) for s in sums], all_reduce_sum(total, group)
    if not total:
        raise ValueError(
            "fisher_diagonal: `batches` must hold a sample with a finite gradient, got"
            f" {'none.' if not offered else f'{offered} without one.'}"
        )
    return [s / total for s in sums]


def _add_square_(sums: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float) -> int:
    """Adds the squares of a batch's gradients if they are finite, and returns 1 then, else 0."""
    found = [(s, g.to(s.dtype)) for s, g in zip(sums, gradients, strict=True) if g is not None]
    if not all_finite([g for _, g in found]):
        return 0
    if found:
        torch._foreach_addcmul_([s for s, _ in found], [g for _, g in found], [g for _, g in found], value=factor)
    return 1
