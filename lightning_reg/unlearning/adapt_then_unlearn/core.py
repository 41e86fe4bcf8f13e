"""How far weights are from others, and the terms that keep them away, for any training loop."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_reg.engine.weights.squares import weighted_squares

__all__ = ["joint_reference", "repulsion", "weight_distance"]

Kind = Literal["el2", "nl2", "il2"]


def repulsion(distance: Tensor, kind: Kind = "el2", alpha: float = 1.0) -> Tensor:
    r"""A term that falls as weights move away, to be added to a loss.

    .. math:: \mathrm{EL2} = e^{-\alpha d}, \qquad \mathrm{NL2} = -\alpha d, \qquad
        \mathrm{IL2} = \frac{1}{\alpha d}

    With :math:`d = \|\theta - \theta_N\|^2` their gradients are :math:`-2 \alpha e^{-\alpha d} (\theta - \theta_N)`,
    which fades as it succeeds; :math:`-2 \alpha (\theta - \theta_N)`, which grows without bound; and :math:`-2 (\theta
    - \theta_N) / (\alpha d^2)`, which explodes near :math:`\theta_N`. At :math:`\theta_N` itself none of them has a
    direction: the gradient is 0 there, that of IL2 too.

    Args:
        distance: d, a scalar of at least 0, with gradient (:func:`weight_distance`).
        kind: Which term.
        alpha: Scale of the distance, above 0; paper: of EL2 alone.

    Returns:
        A scalar.

    Raises:
        ValueError: If ``kind`` or ``alpha`` is outside its range.

    Example:
        >>> torch.stack([repulsion(torch.tensor(2.0), kind, alpha=0.5) for kind in ("el2", "nl2", "il2")])
        tensor([ 0.3679, -1.0000,  1.0000])

    """
    if not alpha > 0:
        raise ValueError(f"repulsion: `alpha` must be above 0, got {alpha!r}.")
    scaled = alpha * distance
    if kind == "el2":
        return (-scaled).exp()
    if kind == "nl2":
        return -scaled
    if kind == "il2":
        # Where the inverse would be infinite the bound takes its place, which has no gradient.
        return 1.0 / scaled.clamp(min=torch.finfo(scaled.dtype).tiny)
    raise ValueError(f"repulsion: `kind` must be one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}.")


def weight_distance(params: Sequence[Tensor], references: Sequence[Tensor], per_tensor_mean: bool = False) -> Tensor:
    r"""Squared distance of weights from others.

    .. math:: \sum_l \|\theta_l - \theta_{N,l}\|^2 \qquad\text{or}\qquad
        \frac1L \sum_{l=1}^L \frac{1}{n_l} \|\theta_l - \theta_{N,l}\|^2

    Fused operations over all tensors, two temporary copies of them. It can be differentiated once.

    Args:
        params: L tensors, with gradient.
        references: Constants of the same shapes.
        per_tensor_mean: Whether the mean of each tensor's :math:`n_l` squares counts, every tensor alike, however large
            it is.

    Returns:
        A scalar, in float32 at least.

    Example:
        >>> w = [torch.tensor([1.0, 3.0]), torch.tensor([2.0])]
        >>> weight_distance(w, [torch.zeros(2), torch.zeros(1)])
        tensor(14.)
        >>> weight_distance(w, [torch.zeros(2), torch.zeros(1)], per_tensor_mean=True)
        tensor(4.5000)

    """
    shares = [1.0 / (len(params) * max(1, p.numel())) for p in params] if per_tensor_mean else None
    return weighted_squares(params, references, shares)


def joint_reference(sets: Sequence[Sequence[Tensor]], per_tensor_mean: bool = False) -> tuple[list[Tensor], Tensor]:
    r"""One set of weights that stands for several in a mean of squared distances.

    .. math:: \frac1K \sum_{k=1}^K \|\theta - \theta_k\|^2 =
        \|\theta - \bar\theta\|^2 + \frac1K \sum_{k=1}^K \|\theta_k - \bar\theta\|^2

    Args:
        sets: K sets of weights, each of tensors of the same shapes.
        per_tensor_mean: As in :func:`weight_distance`.

    Returns:
        The mean of the sets, in float32 at least; and their spread, the last term, which is a scalar.

    Raises:
        ValueError: If there is no set.

    Example:
        >>> joint_reference([[torch.tensor([1.0, 4.0])], [torch.tensor([3.0, 4.0])]])
        ([tensor([2., 4.])], tensor(1.))

    """
    if not sets:
        raise ValueError("joint_reference: `sets` must hold a set of weights at least, got none.")
    wide = [[t.to(torch.promote_types(t.dtype, torch.float32)) for t in one] for one in sets]
    means = [torch.stack(tensors).mean(0) for tensors in zip(*wide, strict=True)]
    return means, torch.stack([weight_distance(one, means, per_tensor_mean) for one in wide]).mean()
