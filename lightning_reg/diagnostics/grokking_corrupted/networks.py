"""The paper's networks for modular arithmetic: one hidden layer of squares, and a transformer of one layer."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.diagnostics.grokking_corrupted.core import analytic_weights
from lightning_reg.engine.host.arguments import check_choice, check_number

__all__ = ["ModularTransformer", "QuadraticMLP"]


class QuadraticMLP(nn.Module):
    r"""One hidden layer of squares, without biases, for two residues: :math:`f(m, n) = W (U e_m + V e_n)^2`.

    Its hidden layer is ``hidden``, weight ``(width, 2p)``, U beside V; its last one ``head``, weight ``(p, width)``.
    All weights begin normal, with standard deviation :math:`\tfrac12 (2N)^{-1/3}`.

    Source:
        Doshi, Das, He and Gromov, "To Grok or not to Grok: Disentangling Generalization and Memorization on Corrupted
        Algorithmic Datasets", ICLR 2024, arXiv 2310.13061; ``fcn`` and ``fcn_norm`` of d-doshi/Grokking.

    Differs:
        Of residues given as indices the columns are gathered, which is the same product with less work.

    Args:
        p: Modulus, at least 2. Paper: 97.
        width: Hidden neurons, N. Paper: 500.
        norm: ``"batch"``: a batch normalisation ``norm`` after the squares. Paper: none, or this.
        dropout: Probability of dropout before the squares, in [0, 1). Neutral: 0.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> network = QuadraticMLP(p=7, width=40)
        >>> network(torch.tensor([[2, 6], [0, 1]])).shape
        torch.Size([2, 7])

    """

    def __init__(
        self, p: int = 97, width: int = 500, norm: Literal["batch"] | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_number(self, "p", p, low=2, integer=True)
        check_number(self, "width", width, low=1, integer=True)
        check_choice(self, "norm", norm, ("batch", None))
        check_number(self, "dropout", dropout, low=0, high=1, high_open=True)
        self.p = p
        self.hidden = nn.Linear(2 * p, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(width) if norm == "batch" else nn.Identity()
        self.head = nn.Linear(width, p, bias=False)
        for layer in (self.hidden, self.head):
            nn.init.normal_(layer.weight, std=0.5 / (2 * width) ** (1 / 3))

    @classmethod
    def analytic(cls, p: int = 97, width: int = 500, seed: int = 0) -> "QuadraticMLP":
        """One that adds modulo p without training, see :func:`analytic_weights`.

        Args:
            p: Modulus.
            width: Hidden neurons; with p = 97 all sums are right from about 2p on, small p need more.
            seed: Of its phases and frequencies.

        Returns:
            The network.

        """
        with torch.random.fork_rng(devices=[]):  # what construction draws is written over
            network = cls(p, width)
        weights = analytic_weights(p, width, torch.Generator().manual_seed(seed))
        for layer, weight in zip((network.hidden, network.head), weights, strict=True):
            layer.weight.data.copy_(weight)
        return network

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Outputs for each residue.

        Args:
            x: Two residues ``(B, 2)``, integer, or both one-hot, ``(B, 2p)``, floating.

        Returns:
            ``(B, p)``.

        """
        if x.is_floating_point():
            before = self.hidden(x)
        else:
            places = x + self.p * torch.arange(2, device=x.device)
            before = F.embedding(places, self.hidden.weight.T).sum(1)
        out: Tensor = self.head(self.norm(self.dropout(before).square()))
        return out


class ModularTransformer(nn.Module):
    r"""A transformer of one layer for two residues, as in the paper: no biases, no layer normalisation.

    Token and position embeddings, attention of all positions to all, with logits over the size of a head (not its
    root), a ReLU layer four times as wide, both with skip connections; the last position is read out by ``head`` and
    divided by the width. Embeddings begin standard normal, all else normal with variance one over its inputs.

    Its input layer is ``tokens``, an embedding ``(p, width)``, and its last one ``head``, weight ``(p, width)``.

    Source:
        Doshi, Das, He and Gromov, "To Grok or not to Grok: Disentangling Generalization and Memorization on Corrupted
        Algorithmic Datasets", ICLR 2024, arXiv 2310.13061; ``EncoderOnlyTransformers`` of d-doshi/Grokking, in the
        setting of its notebook.

    Differs:
        It returns the last position alone. Weight tying, several layers and layer normalisation are left out.

    Args:
        p: Modulus, at least 2. Paper: 97.
        width: Of the embedding, a multiple of ``heads``. Paper: 128.
        heads: Of the attention. Paper: 4.
        dropout: Probability of dropout, in [0, 1). Neutral and paper: 0.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> network = ModularTransformer(p=7, width=16)
        >>> network(torch.tensor([[2, 6], [0, 1]])).shape
        torch.Size([2, 7])

    """

    def __init__(self, p: int = 97, width: int = 128, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        check_number(self, "p", p, low=2, integer=True)
        check_number(self, "heads", heads, low=1, integer=True)
        check_number(self, "width", width, low=1, integer=True)
        check_number(self, "dropout", dropout, low=0, high=1, high_open=True)
        if width % heads:
            raise ValueError(f"ModularTransformer: `width` must be a multiple of heads={heads}, got {width}.")
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(p, width), nn.Embedding(2, width)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.inner, self.outer = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.head = nn.Linear(width, p, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.attention, self.mixed, self.inner, self.outer, self.head):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Outputs for each residue.

        Args:
            x: Two residues ``(B, 2)``, integer.

        Returns:
            ``(B, p)``.

        """
        hidden = self.dropout(self.tokens(x) + self.positions.weight)
        hidden = hidden + self.dropout(self.mixed(self._attended(hidden)))
        hidden = hidden + self.dropout(self.outer(self.inner(hidden).relu()))
        out: Tensor = self.head(hidden[:, -1]) / self.head.in_features
        return out

    def _attended(self, hidden: Tensor) -> Tensor:
        parts = self.attention(hidden).unflatten(2, (3, self.heads, -1))  # (B, T, 3, heads, size)
        query, key, value = parts.movedim(2, 0).transpose(2, 3).unbind()
        shares = self.dropout((query @ key.transpose(2, 3) / query.shape[-1]).softmax(-1))
        mixed: Tensor = (shares @ value).transpose(1, 2).flatten(2)
        return mixed
