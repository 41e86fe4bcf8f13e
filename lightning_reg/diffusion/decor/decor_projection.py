"""DecorProjection: takes undesired directions out of the embedding of a prompt."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.diffusion.decor.core import decor_project, undesired_basis
from lightning_reg.engine.host.arguments import check_number

__all__ = ["DecorProjection"]


class DecorProjection(nn.Module):
    r"""Removes from token vectors what they have in common with those of an undesired prompt; nothing is trained.

    .. math:: X' = X - \alpha X V V^T, \qquad \tilde X = U S V^T

    Encode the undesired words as the model encodes prompts (after its last norm; of several encoders joined along d),
    and take their rows: ``undesired_rows(encode(ids), ids, end)``. Then hand ``projection(encode(prompt))`` to the
    sampler as its condition (:func:`decor_condition`, where there is a pooled vector besides), and leave the null
    condition alone, or guidance cancels what was done. :class:`DecorSampling` does both for a module's own ``encode``.

    On digits (``benchmarks/effects/decor.py``) a style went, and most of the content stayed, where each style has a
    word, "plain" as well; the rows of the undesired words were enough, those of the end and the padding alone did
    nothing. Where the plain style is what is drawn when no style is named, the style stayed: what is left of the
    embedding is not that of a prompt without the word, in which other rows stand in its place. Try it on the model you
    have. Causal encoders copy a word's meaning to the end and the padding: with all three kinds of rows more is
    removed, of what is wanted too. Pooled vectors (SDXL) carry the concept past this: they need a projection of their
    own, of the undesired pooled vectors; it takes ``(B, d)`` as well.

    Several concepts are removed together by their rows in one projection. One projection after another brings back a
    part of what the first has removed, where their directions are not orthogonal.

    Use it where a customised model drags in what was in its training images, or as a negative prompt that costs no
    second pass. Leave it where desired and undesired words share their directions.

    Source:
        Jang et al., "DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization", arXiv
        2412.09169, 2024.

    Differs:
        Reconstruction: the abstract and summaries were read, not the paper's body. Which rows make up the undesired
        vectors, the strength by task and whether all rows of a prompt are changed are not known; all are here, unless
        masked.

    Args:
        undesired: Undesired token vectors ``(m, d)``, or a set for each prompt ``(B, m, d)``.
        alpha: Strength, in [0, 1]. 1: orthogonal. Neutral: 0. Two after one another of the same vectors are one of
            1 - (1 - a)(1 - b).
        rank: Leading directions that are taken; ``None``: all.
        rtol: Directions below this share of the strongest are rounding, in [0, 1).
        widths: Lengths of the vectors of several text encoders that stand side by side along d (SDXL:
            ``[768, 1280]``), each of which then has directions of its own; ``None``: the vectors are one.

    Raises:
        ValueError: If an argument is outside its range, or the vectors are all zero.

    Example:
        >>> import torch
        >>> projection = DecorProjection(torch.tensor([[0.0, 2.0, 0.0, 0.0]]))
        >>> projection(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
        tensor([[[1., 0., 3., 4.]]])

    """

    basis: Tensor

    def __init__(
        self,
        undesired: Tensor,
        alpha: float = 1.0,
        rank: int | None = None,
        rtol: float = 1e-5,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_number(self, "alpha", alpha, low=0, high=1)
        check_number(self, "rtol", rtol, low=0, high=1, high_open=True)
        if rank is not None:
            check_number(self, "rank", rank, low=1, high=min(undesired.shape[-2:]), integer=True)
        if undesired.dim() not in (2, 3) or not bool(undesired.any()):
            raise ValueError(
                f"DecorProjection: `undesired` must be vectors (m, d) or (B, m, d) that are not all zero, got shape"
                f" {tuple(undesired.shape)}."
            )
        if widths is not None and (min(widths, default=0) < 1 or sum(widths) != undesired.shape[-1]):
            raise ValueError(
                f"DecorProjection: `widths` must be at least 1 and sum to {undesired.shape[-1]}, the length of a"
                f" vector, got {list(widths)}."
            )
        self.alpha, self.rank, self.rtol, self.widths = alpha, rank, rtol, widths
        basis = undesired_basis(undesired, rank, rtol, widths=widths)
        size, found = basis.shape[-2:]
        if found > size / 4:
            warnings.warn(
                f"DecorProjection: {found} of {size} directions are undesired, and little is left of a prompt. Take"
                " fewer rows, or a smaller `rank`.",
                stacklevel=2,
            )
        self.register_buffer("basis", basis.to(torch.promote_types(undesired.dtype, torch.float32)))

    @override
    def forward(self, embeddings: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Token vectors ``(B, l, d)`` or pooled ones ``(B, d)`` without them; rows outside the mask ``(B, l)`` stay."""
        return decor_project(embeddings, self.basis, self.alpha, token_mask)
