"""The formulas of OGEN: synthesized features of unknown classes, what is asked of them, and the window of a teacher."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number

__all__ = ["FeatureGenerator", "nearest_classes", "synthesis_losses", "window_shares", "window_size"]


class FeatureGenerator(nn.Module):
    r"""Makes an image feature for a class out of features of other classes, by cross-attention.

    .. math:: G(Q, K, V) = \frac{h}{\|h\|}, \qquad h = \operatorname{FFN}(Q) + \operatorname{MHA}(Q, K, V)

    Q are embeddings of the classes that features are made for, K of those that they are made from, V features of the
    latter. FFN has two layers with a ReLU between them; the residual is FFN(Q), not Q; nothing is normalised before.

    Source:
        Zang et al., "Overcoming the Pitfalls of Vision-Language Model Finetuning for OOD Generalization", ICLR 2024,
        arXiv 2401.15914; code: apple/ml-ogen, ``PromptLearner`` and ``CustomCLIP.feature_generator``.

    Differs:
        Float32 in place of half precision, and what dropout leaves out is given.

    Args:
        width: D, a multiple of ``heads``. Paper: 512.
        heads: Heads of the attention. Paper: 4.
        dropout: Share of attention weights that ``keep`` leaves out, in [0, 1). Authors' code: 0.1.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> generator = FeatureGenerator(width=8)
        >>> generator(torch.randn(2, 1, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)).shape
        torch.Size([2, 1, 8])

    """

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        check_number(self, "heads", heads, low=1, integer=True)
        check_number(self, "dropout", dropout, low=0, high=1, high_open=True)
        if width < 1 or width % heads:
            raise ValueError(f"FeatureGenerator: `width` must be a multiple of `heads`={heads}, got {width!r}.")
        self.dropout = dropout
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    @override
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """Makes features.

        Args:
            queries: ``(B, q, D)``.
            keys: ``(B, k, D)``.
            values: ``(B, k, D)``.
            keep: Which attention weights stay, bool ``(B, heads, q, k)``; ``None``: all, as in evaluation.

        Returns:
            ``(B, q, D)``, each of length 1.

        """
        heads = self.attention.num_heads
        weights, biases = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(given, w, b).reshape(*given.shape[:2], heads, -1).transpose(1, 2)
            for given, w, b in zip((queries, keys, values), weights, biases, strict=True)
        )
        shares = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        if keep is not None:
            shares = shares * keep / (1 - self.dropout)
        attended = self.attention.out_proj((shares @ v).transpose(1, 2).flatten(2))
        return F.normalize(self.ffn(queries) + attended, dim=-1)


def nearest_classes(means: Tensor, count: int, seen: Tensor | None = None, classes: Tensor | None = None) -> Tensor:
    """The classes whose mean features have the largest products with that of each class, itself left out.

    Of classes that are as near the one with the lower number comes first.

    Args:
        means: ``(C, D)``, not normalised again, as in the authors' code.
        count: How many, below C.
        seen: Which classes have a mean, bool ``(C,)``; others come last. ``None``: all.
        classes: Whose neighbours are wanted, ``(B,)``; ``None``: those of all.

    Returns:
        Class numbers ``(C, count)``, or ``(B, count)``, the nearest first.

    """
    classes = torch.arange(len(means), device=means.device) if classes is None else classes
    products = means[classes] @ means.T
    if seen is not None:
        products = products.masked_fill(~seen, torch.finfo(products.dtype).min)
    products = products.scatter(1, classes[:, None], -math.inf)
    return products.argsort(dim=1, descending=True, stable=True)[:, :count]


def synthesis_losses(
    generator: nn.Module,
    features: Tensor,
    labels: Tensor,
    known: Tensor,
    unknown: Tensor,
    neighbours: Tensor,
    values: Tensor,
    scale: float = 100.0,
    *,
    scheme: Literal["joint", "each"] = "joint",
    keep: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""What features that a generator makes cost, in three directions.

    - a: a feature for the sample's own class out of its K neighbours, as if it were unknown; it is to be the sample's.
    - b: features for the neighbours out of the sample; they are to be the neighbours' values.
    - c: features out of the sample for the K unknown classes whose embeddings are nearest to its class's.

    .. math:: \ell_{reg} = \|a - v\|^2 + \frac1K \sum_k \|b_k - V_k\|^2, \quad
        \ell_a = \operatorname{CE}(\tau a W^T, y), \quad \ell_b = \frac1K \sum_k \operatorname{CE}(\tau b_k W^T, n_k),
        \quad \ell_c = \frac1K \sum_k \operatorname{CE}(\tau c_k W'^T, y'_k)

    In a and b the embeddings that the generator is asked with are constants; in c those of the unknown classes are not.

    Args:
        generator: G, a :class:`FeatureGenerator`.
        features: Of the images, v, ``(B, D)`` of length 1.
        labels: y, ``(B,)``.
        known: Class embeddings W, ``(C, D)`` of length 1.
        unknown: Embeddings W' of classes without images, ``(C', D)`` of length 1, at least K of them.
        neighbours: Classes n near each sample's own, ``(B, K)``.
        values: Features V of these classes, ``(B, K, D)``.
        scale: tau.
        scheme: Whether a has all neighbours as keys at once, or one at a time and the mean of what comes of them.
        keep: Which attention weights stay: ``"a"`` bool ``(B, heads, 1, K)``, ``"b"`` and ``"c"`` ``(B, heads, K, 1)``.
            ``None``: all.

    Returns:
        ``"regression"``, ``"a"``, ``"b"`` and ``"c"``, ``(B,)`` each.

    """
    kept = keep or {}
    own, near = known.detach()[labels][:, None], known.detach()[neighbours]
    if scheme == "joint":
        a = generator(own, near, values, kept.get("a"))[:, 0]
    else:
        a = F.normalize(_one_at_a_time(generator, own, near, values, kept.get("a")).mean(1), dim=1)
    b = generator(near, own, features[:, None], kept.get("b"))
    targets = (own[:, 0] @ unknown.detach().T).topk(neighbours.shape[1]).indices
    c = generator(unknown[targets], own, features[:, None], kept.get("c"))
    back = (b - values).square().sum(2).mean(1)
    return {
        "regression": (a - features.detach()).square().sum(1) + back,
        "a": F.cross_entropy(scale * a @ known.T, labels, reduction="none"),
        "b": _cross_entropy(scale * b @ known.T, neighbours),
        "c": _cross_entropy(scale * c @ unknown.T, targets),
    }


def _one_at_a_time(generator: nn.Module, own: Tensor, near: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
    count = near.shape[1]
    if keep is not None:
        keep = keep.permute(0, 3, 1, 2).flatten(0, 1)[..., None]
    queries = own.repeat_interleave(count, 0)
    made: Tensor = generator(queries, near.flatten(0, 1)[:, None], values.flatten(0, 1)[:, None], keep)
    return made.reshape(*near.shape)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def window_size(taken: int, total: int, smallest: int = 2, largest: int = 9) -> int:
    r"""How many snapshots beside the newest a local teacher takes the mean of; it grows while training runs.

    .. math:: m_t = \Big\lfloor \frac{1 + \cos(\pi (T + t) / T)}{2} (m_{max} - m_{min}) + m_{min} \Big\rfloor

    Args:
        taken: t, snapshots taken before the newest one.
        total: T, after how many of them the window is largest, at least 1.
        smallest: :math:`m_{min}`.
        largest: :math:`m_{max}`.

    Returns:
        :math:`m_t`; ``largest`` from T on.

    """
    share = (1 + math.cos(math.pi * (total + min(taken, total)) / total)) / 2
    return math.floor(share * (largest - smallest) + smallest + 1e-9)  # 2.9999... is 3


def window_shares(size: int, decay: float) -> Tensor:
    """What each snapshot of a window counts in its mean, a moving average that starts at the oldest.

    Args:
        size: m, snapshots beside the newest.
        decay: a, in [0, 1].

    Returns:
        ``(m + 1,)`` float64, oldest first, with sum 1: ``a^m``, then ``(1 - a) a^(m - i)`` for the i-th after it.

    """
    shares = (1 - decay) * decay ** torch.arange(size, -1, -1, dtype=torch.float64)
    shares[0] = decay**size
    return shares
