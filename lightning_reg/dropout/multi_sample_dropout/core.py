r"""The maths of multi-sample dropout: copies of features under masks of their own, and the mean of their losses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number

__all__ = [
    "MultiSampleDropoutLayer",
    "dropout_copies",
    "fold",
    "multi_sample_dropout",
    "multi_sample_loss",
]


def multi_sample_loss(
    head: Callable[[Tensor], Tensor],
    h: Tensor,
    target: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    p: float,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Mean of the losses of M dropout samples; the head runs once, on M times the rows.

    .. math:: L = \frac1M \sum_{j=1}^M \frac1B \sum_{b=1}^B \ell\bigl(f(h_b \odot m_{jb}), y_b\bigr)

    It is the mean of the losses and not the loss of the mean logits, which would average the masks away.

    Args:
        head: What follows the dropout ``f``: from ``(M * B, ...)`` to ``(M * B, ...)``, row by row.
        h: Output of the backbone, ``(B, ...)``.
        target: ``(B, ...)``.
        loss_fn: A mean over rows, or a loss per row. Not a sum: that would be M times as large.
        p: Drop rate, in [0, 1).
        num_samples: Number of dropout samples M, at least 1.
        generator: Source of the masks; ``None`` for the global one.

    Returns:
        A scalar, float32 at least.

    Example:
        >>> h, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
        >>> multi_sample_loss(nn.Linear(8, 3), h, y, nn.functional.cross_entropy, p=0.5, num_samples=8).shape
        torch.Size([])

    """
    logits = head(multi_sample_dropout(h, p, num_samples, generator))
    losses = loss_fn(logits, target.repeat(num_samples, *(1 for _ in target.shape[1:])))
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()


def multi_sample_dropout(h: Tensor, p: float, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Copies of the features, each under a dropout mask of its own; a mask for every row of every copy.

    Args:
        h: Features ``(B, ...)``.
        p: Drop rate, in [0, 1).
        num_samples: Number of copies M, at least 1. At 1 this is ordinary dropout.
        generator: Source of the masks, on the device of ``h``; ``None`` for the global one.

    Returns:
        ``(M * B, ...)`` in the type of ``h``; row ``j * B + b`` is copy j of row b.

    Raises:
        ValueError: If ``p`` or ``num_samples`` is outside its range.

    Example:
        >>> multi_sample_dropout(torch.ones(2, 3), p=0.0, num_samples=2).shape
        torch.Size([4, 3])

    """
    if not 0 <= p < 1:
        raise ValueError(f"multi_sample_dropout: `p` must be in [0, 1), got {p}.")
    if num_samples < 1:
        raise ValueError(f"multi_sample_dropout: `num_samples` must be at least 1, got {num_samples}.")
    keep = torch.empty(num_samples, *h.shape, device=h.device).bernoulli_(1 - p, generator=generator)
    return dropout_copies(h, keep.bool(), p)


def dropout_copies(
    h: Tensor, keep: Tensor, p: float, layer: type[nn.Module] = nn.Dropout, *, copied: bool = False
) -> Tensor:
    r"""Rows under given dropout masks.

    .. math:: h_{jb} = h_b\, m_{jb} / (1 - p)

    Args:
        h: Features ``(B, ...)``, or ``(M * B, ...)`` if they are copies already.
        keep: Masks ``m``, bool ``(M, B, ...)``, broadcast to the features.
        p: Drop rate, in [0, 1).
        layer: Which of torch's dropout modules to follow: what is dropped becomes 0, or, for alpha dropout, the value
            that keeps mean and variance.
        copied: Whether ``h`` holds M copies.

    Returns:
        ``(M * B, ...)`` in the type of ``h``, copy after copy.

    """
    h = fold(h, len(keep)) if copied else h[None]
    return drop(layer, h, keep, p).flatten(0, 1)


def fold(x: Tensor, num_samples: int) -> Tensor:
    """Copies of rows, one after the other, as a dimension of their own.

    Args:
        x: ``(M * B, ...)``: row ``j * B + b`` is copy j of row b.
        num_samples: Number of copies M.

    Returns:
        ``(M, B, ...)``, a view.

    Raises:
        ValueError: If the rows are no multiple of M.

    Example:
        >>> fold(torch.tensor([1, 2, 10, 20]), num_samples=2)
        tensor([[ 1,  2],
                [10, 20]])

    """
    if num_samples < 1 or x.shape[0] % num_samples:
        raise ValueError(f"fold: {x.shape[0]} rows are no multiple of `num_samples`={num_samples}.")
    return x.reshape(num_samples, x.shape[0] // num_samples, *x.shape[1:])


class MultiSampleDropoutLayer(nn.Module):
    """For a head of your own: in training ``(B, ...)`` becomes ``(M * B, ...)``, in evaluation it stays.

    Repeat the targets M times, ``y.repeat(num_samples)``, and take the mean of the losses. In a LightningModule that
    has a dropout layer already, :class:`MultiSampleDropout` does all this from outside.

    Source:
        Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019, arXiv 1905.09788.

    Differs:
        The layers behind it run once on all copies, where the paper has a layer per copy with shared weights: the same
        function, as one matrix product.

    Args:
        p: Drop rate, in [0, 1).
        num_samples: Number of copies M, at least 1.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> head = nn.Sequential(MultiSampleDropoutLayer(p=0.5, num_samples=4), nn.Linear(8, 3))
        >>> head(torch.zeros(2, 8)).shape, head.eval()(torch.zeros(2, 8)).shape
        (torch.Size([8, 3]), torch.Size([2, 3]))

    """

    def __init__(self, p: float = 0.5, num_samples: int = 8) -> None:
        super().__init__()
        check_number(self, "p", p, low=0, high=1, high_open=True)
        check_number(self, "num_samples", num_samples, low=1, integer=True)
        self.p, self.num_samples = p, num_samples

    @override
    def forward(self, h: Tensor) -> Tensor:
        return multi_sample_dropout(h, self.p, self.num_samples) if self.training else h

    @override
    def extra_repr(self) -> str:
        return f"p={self.p}, num_samples={self.num_samples}"


# -- dropout as each of torch's modules does it, with masks that are drawn elsewhere -----------------------------------

ALPHA = -1.7580993408473766  # the value of dropped elements: minus SELU's scale times its alpha

# Modules with the number of dimensions of a batch; None where any will do.
_KINDS: dict[type[nn.Module], tuple[int, ...] | None] = {
    nn.Dropout: None,
    nn.Dropout1d: (3,),
    nn.Dropout2d: (3, 4),
    nn.Dropout3d: (5,),
    nn.AlphaDropout: None,
    nn.FeatureAlphaDropout: None,
}
_ELEMENTWISE, _ALPHA = (nn.Dropout, nn.AlphaDropout), (nn.AlphaDropout, nn.FeatureAlphaDropout)


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The dropout module of torch whose ``forward`` the layer runs, ``None`` if it is none of these."""
    return next((kind for kind in _KINDS if type(layer).forward is kind.forward), None)


def mask_shape(kind: type[nn.Module], shape: Sequence[int]) -> tuple[int, ...] | None:
    """Shape of a row's draws: of its elements, or of its channels.

    Args:
        kind: One of torch's dropout modules.
        shape: ``(B, ...)``.

    Returns:
        The shape, which broadcasts to the row; ``None`` where the module takes no such input for a batch.

    """
    dims = _KINDS[kind]
    if not shape or (dims is not None and len(shape) not in dims):
        return None
    return tuple(shape[1:]) if kind in _ELEMENTWISE else (*shape[1:2], *(1 for _ in shape[2:]))


def drop(kind: type[nn.Module], h: Tensor, keep: Tensor, p: float) -> Tensor:
    r"""Dropout with given masks.

    .. math:: h\,m / (1 - p) \quad\text{or, for alpha dropout,}\quad a\,(h\,m + \alpha' (1 - m)) + b

    with :math:`a = ((1 - p)(1 + p \alpha'^2))^{-1/2}` and :math:`b = -a \alpha' p`, which keep mean 0 and variance 1.

    Args:
        kind: One of torch's dropout modules.
        h: Features, broadcast to ``keep``.
        keep: Masks ``m``, bool.
        p: Drop rate, in [0, 1).

    Returns:
        In the type of ``h``.

    """
    if kind in _ALPHA:
        a = ((1 - p) * (1 + p * ALPHA**2)) ** -0.5
        alpha: Tensor = torch.where(keep, h, ALPHA) * a - a * ALPHA * p
        return alpha
    # The features are scaled before they are spread over the copies, and what backward keeps is the bool mask.
    dropped: Tensor = torch.where(keep, h * (1 / (1 - p)), 0.0)
    return dropped
