"""The formulas of six penalties for training on several environments, for any training loop."""

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "clove_penalty",
    "fishr_average",
    "fishr_penalty",
    "head_gradient_moments",
    "iga_penalty",
    "irm_penalty",
    "logit_gradients",
    "sd_penalty",
    "vrex_penalty",
]

Form = Literal["domainbed", "rfc"]


def irm_penalty(slopes: Tensor, membership: Tensor, form: Form = "domainbed") -> Tensor:
    r"""IRMv1: how far a factor on the logits is from being best in every environment.

    With :math:`s_i = \partial \ell_i(w z_i) / \partial w |_{w=1} = \langle \partial \ell_i / \partial z_i, z_i \rangle`
    and the number E of environments

    .. math:: \frac1E \sum_e \bar s_e^{\,even}\, \bar s_e^{\,odd}
        \quad\text{or}\quad \frac1E \sum_e \bar s_e^{\,2}

    Args:
        slopes: :math:`s`, ``(N,)``, with gradient; :func:`logit_gradients` times the logits, summed over the classes.
        membership: ``(N, E)``, 1 where a sample is in an environment and 0 elsewhere.
        form: ``"domainbed"``: the product of the means over samples at even and at odd places of an environment, an
            unbiased estimate of the square, which may be negative; ``"rfc"``: the square of the mean.

    Returns:
        The mean over the environments that have samples (two for the product); 0 without any.

    Example:
        >>> irm_penalty(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 1)), irm_penalty(
        ...     torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 1), form="rfc"
        ... )
        (tensor(4.), tensor(4.))

    """
    if form == "rfc":
        means, counts = _means(slopes, membership)
        return _over_present(means.square(), counts > 0)
    even = membership * (membership.cumsum(0) % 2)  # counted from 0
    (first, _), (second, rest) = _means(slopes, even), _means(slopes, membership - even)
    return _over_present(first * second, rest > 0)


def vrex_penalty(losses: Tensor, membership: Tensor, form: Form = "domainbed") -> Tensor:
    """V-REx: the variance of the mean losses of the environments.

    Args:
        losses: Losses of the samples ``(N,)``, with gradient.
        membership: ``(N, E)``.
        form: ``"domainbed"``: the mean of the squared distances to the mean; ``"rfc"``: their sum over E - 1.

    Returns:
        The variance over the environments that have samples; 0 where it is fewer than two.

    Example:
        >>> membership = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> losses = torch.tensor([1.0, 3.0])
        >>> vrex_penalty(losses, membership), vrex_penalty(losses, membership, form="rfc")
        (tensor(1.), tensor(2.))

    """
    means, counts = _means(losses, membership)
    present = counts > 0
    distances = means - _over_present(means, present)
    number = present.sum() - int(form == "rfc")
    return torch.where(present, distances.square(), 0.0).sum() / number.clamp(min=1)


def sd_penalty(squares: Tensor, membership: Tensor, form: Form = "domainbed") -> Tensor:
    """Spectral decoupling: the mean of the squared logits.

    Args:
        squares: Mean over the classes of each sample's squared logits, ``(N,)``, with gradient.
        membership: ``(N, E)``; a sample of no environment does not count.
        form: ``"domainbed"``: the mean over all samples; ``"rfc"``: the sum over the environments of their means.

    Returns:
        The penalty.

    """
    if form == "rfc":
        return _means(squares, membership)[0].sum()
    return _means(squares, membership.amax(1, keepdim=True))[0].sum()


def iga_penalty(gradients: Tensor, present: Tensor) -> Tensor:
    r"""IGA: how far the gradients of the environments are from their mean, which has no gradient.

    .. math:: \sum_e \lVert g_e - \bar g \rVert^2

    Args:
        gradients: Gradients of the mean losses of the environments by the weights, ``(E, P)``, with a graph.
        present: bool ``(E,)``, which environments have samples.

    Returns:
        The penalty; its gradient is that of the authors' code, in both of its forms.

    """
    there = present[:, None]
    mean = torch.where(there, gradients, 0.0).detach().sum(0) / present.sum().clamp(min=1)
    return torch.where(there, gradients - mean, 0.0).square().sum()


def clove_penalty(
    confidences: Tensor, correct: Tensor, membership: Tensor, form: Form = "domainbed", kernel_width: float = 0.4
) -> Tensor:
    r"""CLOvE: the calibration error of the environments, by a kernel over the pairs of their samples (MMCE).

    .. math:: \sum_e \frac{1}{n_e^2} \sum_{i,j \in e} (c_i - r_i)\,(c_j - r_j)\,e^{-|r_i - r_j| / h}

    Args:
        confidences: r, the probability of the predicted class ``(N,)``, with gradient.
        correct: c, 1 where the prediction is right and 0 where not, ``(N,)``.
        membership: ``(N, E)``.
        form: ``"domainbed"``: the mean over the environments with samples, as the authors' code has it for data of
            DomainBed and WILDS; ``"rfc"``: the sum, as they have it for coloured digits.
        kernel_width: h.

    Returns:
        The penalty.

    """
    with torch.autocast(confidences.device.type, enabled=False):
        error = correct.to(confidences) - confidences
        kernel = (-(confidences[:, None] - confidences).abs() / kernel_width).exp()
        pairs = kernel * error[:, None] * error
        counts = membership.sum(0)
        values = ((pairs @ membership.to(pairs)) * membership).sum(0) / counts.clamp(min=1).square()
    return values.sum() if form == "rfc" else _over_present(values, counts > 0)


def fishr_penalty(variances: Tensor, present: Tensor, form: Form = "domainbed") -> Tensor:
    r"""Fishr: how far the variances of the per-sample gradients are from their mean over the environments.

    Args:
        variances: v, of each environment and weight of the head, ``(E, P)``, with gradient.
        present: bool ``(E,)``, which environments have samples.
        form: ``"domainbed"``: :math:`\frac{1}{E P} \sum_e \lVert v_e - \bar v \rVert^2`; ``"rfc"``: without the
            division.

    Returns:
        The penalty.

    """
    there = present[:, None]
    mean = torch.where(there, variances, 0.0).sum(0) / present.sum().clamp(min=1)
    distances = torch.where(there, variances - mean, 0.0).square().sum(1)
    return distances.sum() if form == "rfc" else _over_present(distances / variances.shape[1], present)


def head_gradient_moments(deltas: Tensor, features: Tensor, membership: Tensor, *, centred: bool = True) -> Tensor:
    r"""Variance over an environment's samples of the gradients of a linear head.

    The gradient of a sample is the outer product of :math:`\delta_i = \partial \ell_i / \partial z_i` and the features
    :math:`h_i`, so that mean and mean square of all entries are products of matrices; no gradient of a sample is made.

    Args:
        deltas: ``(N, C)``, with gradient, see :func:`logit_gradients`.
        features: Inputs of the head ``(N, D)``, with a column of ones for its bias.
        membership: ``(N, E)``.
        centred: Whether the square of the mean is taken off (DomainBed), or it is the mean square (RFC).

    Returns:
        ``(E, C * D)``; 0 for an environment without samples.

    """
    with torch.autocast(deltas.device.type, enabled=False):
        counts = membership.sum(0).clamp(min=1)[:, None]
        own = (membership.to(deltas)[:, :, None] * deltas[:, None]).flatten(1)  # (N, E * C)
        squares = (own.square().T @ features.square()).reshape(len(counts), -1) / counts
        if not centred:
            return squares
        return squares - ((own.T @ features).reshape(len(counts), -1) / counts).square()


def fishr_average(variances: Tensor, kept: Tensor | None, present: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    r"""Variances smoothed over the steps, :math:`a \leftarrow \gamma a + (1 - \gamma) v`.

    Args:
        variances: ``(E, P)`` of this step, with gradient.
        kept: a, without gradient; ``None`` for zeros.
        present: bool ``(E,)``; the average of the others stays.
        decay: :math:`\gamma`.

    Returns:
        :math:`a / (1 - \gamma)`, so that the gradient does not depend on :math:`\gamma`, and a without gradient.

    """
    kept = torch.zeros_like(variances) if kept is None else kept
    average = torch.where(present[:, None], decay * kept + (1 - decay) * variances, kept)
    return average / (1 - decay), average.detach()


def logit_gradients(logits: Tensor, targets: Tensor, *, binary: bool = False) -> Tensor:
    """Gradient of each sample's own loss by its logits, with a graph.

    Args:
        logits: ``(N, C)``.
        targets: Probabilities of the classes ``(N, C)``.
        binary: Whether the loss is the mean over C of binary cross-entropies, and not the cross-entropy of C classes.

    Returns:
        ``(N, C)``.

    """
    return (logits.sigmoid() - targets) / logits.shape[1] if binary else logits.softmax(1) - targets


def _means(values: Tensor, membership: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each environment ``(E,)``, 0 without samples, and their numbers."""
    counts = membership.sum(0)
    with torch.autocast(values.device.type, enabled=False):
        return values @ membership.to(values) / counts.clamp(min=1), counts


def _over_present(values: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, values, 0.0).sum() / present.sum().clamp(min=1)
