"""The formulas of regularized mask tuning, for any training loop."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

__all__ = [
    "binary_mask",
    "gradient_dropout",
    "keep_probability",
    "knowledge_loss",
    "most_important",
    "norm_gradient",
    "pack_bits",
    "unpack_bits",
]


def binary_mask(mask: Tensor, threshold: float = 5e-3) -> Tensor:
    r"""The zeros and ones of a real mask; the gradient passes as it is (straight-through).

    .. math:: M = [\,m > \alpha\,], \qquad \partial L / \partial m := \partial L / \partial M

    Args:
        mask: Real mask m, of any shape.
        threshold: :math:`\alpha`; a number that equals it gives 0.

    Returns:
        Of the mask's shape and type.

    Example:
        >>> binary_mask(torch.tensor([0.01, 0.005, -1.0]))
        tensor([1., 0., 0.])

    """
    found: Tensor = _Binary.apply(mask, threshold)  # type: ignore[no-untyped-call]  # torch's
    return found


class _Binary(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, mask: Tensor, threshold: float) -> Tensor:
        return (mask > threshold).to(mask.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def keep_probability(task: Tensor, knowledge: Tensor, eps: float = 1e-8) -> Tensor:
    r"""How likely gradient dropout keeps an entry of the task's gradient.

    .. math:: P = \frac12 \Bigl(1 + \operatorname{sign}(a)\,\frac{a + b}{|a| + |b| + \epsilon}\Bigr)

    Up to :math:`\epsilon` that is 1 where both have one sign or b is 0, and :math:`|a| / (|a| + |b|)` where they do not
    agree.

    Args:
        task: Gradient a of the task's loss, of any shape.
        knowledge: Gradient b of the loss that keeps what the network knew, of the same shape.
        eps: :math:`\epsilon`. Code: 1e-8; gradients that are not far above it are kept less often.

    Returns:
        In [0, 1], of the same shape.

    Example:
        >>> keep_probability(torch.tensor([1.0, 1.0, 1.0, -2.0]), torch.tensor([1.0, -1.0, -3.0, 0.0]))
        tensor([1.0000, 0.5000, 0.2500, 1.0000])

    """
    return (1 + task.sign() * (task + knowledge) / (task.abs() + knowledge.abs() + eps)) / 2


def gradient_dropout(
    task: Tensor, knowledge: Tensor, strength: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""The task's gradient, of which entries are dropped by chance that fight what the network knew.

    .. math:: g = \bigl((1 - \lambda) + \lambda\,[P > u]\bigr)\,a, \qquad u \sim U(0, 1)

    with P of :func:`keep_probability`. Nothing is rescaled by 1/P, and b itself is never a gradient.

    Args:
        task: Gradient a of the task's loss, of any shape.
        knowledge: Gradient b, of the same shape. An entry that is not finite counts as 0: a is kept.
        strength: :math:`\lambda` in [0, 1]: 1 drops to 0, 0 drops nothing.
        generator: For the draws, one for each entry.

    Returns:
        g, of the same shape and type.

    Example:
        >>> gradient_dropout(torch.tensor([2.0, 2.0]), torch.tensor([5.0, -1e12]))
        tensor([2., 0.])

    """
    known = knowledge.to(task.dtype).nan_to_num(0.0, 0.0, 0.0)
    draws = torch.rand(task.shape, generator=generator, dtype=task.dtype, device=task.device)
    return torch.where(keep_probability(task, known) > draws, task, (1 - strength) * task)


def knowledge_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    r"""Cross-entropy with what the network said before, softened by T.

    .. math:: -\frac{T^2}{B} \sum_i \sum_c \operatorname{softmax}(t_i / T)_c \log \operatorname{softmax}(z_i / T)_c

    Args:
        logits: z, ``(B, C)`` or ``(B, C, ...)``.
        teacher_logits: t, of the same shape; no gradient flows into them.
        temperature: T, above 0.
        reduction: ``"mean"`` over all but the classes, or ``"none"``.

    Returns:
        float32: a scalar, or ``(B, ...)``.

    Example:
        >>> knowledge_loss(torch.zeros(1, 4), torch.tensor([[3.0, 0.0, 0.0, 0.0]]))
        tensor(1.3863)

    """
    wanted = (teacher_logits.detach().float() / temperature).softmax(1)
    losses = -(temperature**2) * (wanted * (logits.float() / temperature).log_softmax(1)).sum(1)
    return losses.mean() if reduction == "mean" else losses


def norm_gradient(mask: Tensor) -> Tensor:
    r"""The gradient :math:`m / \lVert m \rVert_2` of a real mask's norm; 0 at 0.

    Args:
        mask: Real mask m, of any shape.

    Returns:
        Of the same shape.

    Example:
        >>> norm_gradient(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])

    """
    gradient: Tensor = mask / torch.linalg.vector_norm(mask).clamp_min(torch.finfo(mask.dtype).tiny)
    return gradient


def most_important(scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Where the largest scores are, over all tensors together.

    Args:
        scores: By name, of any shapes, at least 0.
        fraction: Share of all entries, in (0, 1], rounded to a number of them, at least one.

    Returns:
        Of each tensor the positions in its flat form, ``(K,)``, int64, rising; ``K`` may be 0.

    Example:
        >>> most_important({"a": torch.tensor([[1.0, 7.0]]), "b": torch.tensor([5.0, 2.0])}, 0.5)
        {'a': tensor([1]), 'b': tensor([0])}

    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(max(1, round(fraction * len(flat))), sorted=False).indices] = True
    ends = list(accumulate(score.numel() for score in scores.values()))
    parts = torch.tensor_split(chosen, ends[:-1])
    return {name: part.nonzero()[:, 0] for name, part in zip(scores, parts, strict=True)}


def pack_bits(mask: Tensor) -> Tensor:
    """A mask with one bit for each entry, the first of a byte in its highest bit; the rest of the last byte is 0.

    Args:
        mask: Boolean, of any shape; N entries.

    Returns:
        uint8, ``(ceil(N / 8),)``.

    Example:
        >>> pack_bits(torch.tensor([True, False, True, True, False, False, False, False, True]))
        tensor([176, 128], dtype=torch.uint8)

    """
    flat = mask.flatten().to(torch.uint8)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (rows << torch.arange(7, -1, -1, dtype=torch.uint8, device=rows.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that :func:`pack_bits` packed.

    Args:
        packed: uint8.
        shape: Of the mask.

    Returns:
        Boolean, of that shape.

    Example:
        >>> unpack_bits(torch.tensor([176], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [ True,  True]])

    """
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> places) & 1
    return bits.flatten()[: prod(shape)].bool().view(tuple(shape))
