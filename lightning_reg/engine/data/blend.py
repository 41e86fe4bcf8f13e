r"""Samples blended in pairs, free of Lightning: the draws, mixup, the labels.

A mixed sample has two owners: itself with share :math:`\lambda_i`, and sample ``permutation[i]`` with the rest.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["blend", "draw_lam", "draw_permutation", "mix_targets", "mixup", "problem_with_blending"]


def draw_lam(alpha: float, generator: torch.Generator | None = None, size: int | None = None) -> float | Tensor:
    r"""Shares :math:`\lambda \sim \text{Beta}(\alpha, \alpha)`, drawn on the host.

    Args:
        alpha: Parameter of the Beta distribution, above 0. 1 is uniform.
        generator: Generator on the CPU; ``None`` for the global one.
        size: Number of shares; ``None`` for one number.

    Returns:
        A number in [0, 1], or float32 ``(size,)`` on the CPU.

    Raises:
        ValueError: If ``alpha`` is not above 0.

    """
    if not alpha > 0:
        raise ValueError(f"`alpha` must be above 0, got {alpha!r}.")
    # torch draws from a Beta distribution with the global generator only.
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    drawn = np.random.default_rng(seed).beta(alpha, alpha, size)
    return float(drawn) if size is None else torch.from_numpy(drawn).float()


def problem_with_blending(inputs: Tensor) -> str:
    """Why inputs cannot be blended, for an error; "" if they can."""
    return "" if inputs.is_floating_point() else "floating-point inputs are needed"


def draw_permutation(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A partner for each sample of ``x``: a random permutation ``(B,)``, drawn on the host, on the device of ``x``."""
    return torch.randperm(len(x), generator=generator, device="cpu").to(x.device, non_blocking=True)


def mixup(
    x: Tensor, lam: float | Tensor | None = None, alpha: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, float | Tensor]:
    r"""Each sample of a batch blended with another one.

    .. math:: \tilde x_i = \lambda x_i + (1 - \lambda)\, x_{\pi(i)}

    Args:
        x: Inputs ``(B, ...)``, floating point; not changed.
        lam: Share of the sample itself, in [0, 1]: a number, or one for each sample ``(B,)``. ``None`` draws one number
            for the batch.
        alpha: Parameter of the Beta distribution that ``lam`` is drawn from, above 0.
        generator: Generator on the CPU; ``None`` for the global one.

    Returns:
        The mixed inputs, in type and memory format of ``x``; the partners ``(B,)``; ``lam``.

    Raises:
        TypeError: If ``x`` is not floating point.

    Example:
        >>> mixed, permutation, lam = mixup(torch.tensor([[0.0], [8.0]]), 0.75, generator=torch.manual_seed(1))
        >>> permutation, mixed
        (tensor([1, 0]), tensor([[2.],
                [6.]]))

    """
    if not x.is_floating_point():
        raise TypeError(f"mixup needs floating-point inputs, got {x.dtype}; convert them first, as in `x.float()`.")
    lam = draw_lam(alpha, generator) if lam is None else lam
    lam = lam.to(x.device, non_blocking=True) if isinstance(lam, Tensor) else lam
    permutation = draw_permutation(x, generator)
    return blend(x, permutation, lam), permutation, lam


def blend(x: Tensor, permutation: Tensor, lam: float | Tensor) -> Tensor:
    """``lam * x + (1 - lam) * x[permutation]``, in the type of ``x``; ``lam`` is a number or ``(B,)``."""
    other = x[permutation]
    if not isinstance(lam, Tensor):
        return torch.lerp(x, other, 1.0 - lam)
    rest = (1.0 - lam).reshape(-1, *[1] * (x.dim() - 1))
    # Shares are float32: rounded to half precision they would no longer be those that the labels are mixed with.
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch.lerp(x.to(exact), other.to(exact), rest.to(exact)).to(x.dtype)


def mix_targets(targets: Tensor, permutation: Tensor, lam: float | Tensor, num_classes: int | None = None) -> Tensor:
    r"""Targets of mixed samples in one tensor.

    .. math:: t_i = \lambda\, y_i + (1 - \lambda)\, y_{\pi(i)}, \qquad \text{class indices as one-hot vectors}

    Args:
        targets: Class indices ``(B,)``, or floating-point targets ``(B, ...)``: probabilities, several labels, numbers.
        permutation: Partner of each sample, ``(B,)``.
        lam: Share of the sample itself: a number, or one for each sample ``(B,)``.
        num_classes: Number of classes K; needed for class indices.

    Returns:
        ``(B, K)`` float32 for class indices, else ``(B, ...)`` in the type of ``targets``.

    Raises:
        ValueError: If class indices come without ``num_classes``.

    Example:
        >>> mix_targets(torch.tensor([0, 1]), torch.tensor([1, 0]), lam=0.75, num_classes=3)
        tensor([[0.7500, 0.2500, 0.0000],
                [0.2500, 0.7500, 0.0000]])

    """
    if not targets.is_floating_point():
        if num_classes is None:
            raise ValueError("`num_classes` is needed to mix class indices, got None.")
        targets = F.one_hot(targets.long(), num_classes).float()
    return blend(targets, permutation, lam)
