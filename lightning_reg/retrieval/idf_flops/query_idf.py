"""A query encoder without a network: the IDF of each token that occurs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_bool, check_number

__all__ = ["QueryIDF"]


class QueryIDF(nn.Module):
    r"""Token ids of a query to its sparse vector: :math:`q_v = [v \in \text{query}] \max(\text{idf}_v, 0)`.

    A token counts once however often it occurs, special tokens not at all. With documents' weights w the score is
    :math:`\sum_v q_v w_v`; the ranking loss then sees idf times w, and the FLOPS penalty w alone: tokens that are in
    many documents are sparsified first.

    Source:
        Geng, Wang, Ru, Yang, "Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers", 2024,
        arXiv 2411.04403.

    Differs:
        Nothing.

    Args:
        idf: Of each token of the vocabulary, finite: ``idf_from_corpus(...)`` of ``lightning_reg.functional``. It must
            be by the tokenizer of documents and queries.
        special_token_ids: Tokens that never count, padding among them.
        trainable: Whether the IDF is a parameter; else it is a buffer.

    Raises:
        ValueError: If ``idf`` is no row of finite numbers, or a special token is outside the vocabulary.

    Example:
        >>> QueryIDF([0.0, 0.5, 2.0], special_token_ids=[0])(torch.tensor([[2, 2, 0]]))
        tensor([[0., 0., 2.]])

    """

    idf: Tensor
    counts: Tensor

    def __init__(
        self, idf: Sequence[float] | Tensor, special_token_ids: Sequence[int] = (), trainable: bool = False
    ) -> None:
        super().__init__()
        given = torch.as_tensor(idf, dtype=torch.float32).detach().clone()
        if given.dim() != 1 or not given.numel() or not bool(given.isfinite().all()):
            raise ValueError(
                "QueryIDF: `idf` must be one finite number for each token of the vocabulary, got a shape of"
                f" {tuple(given.shape)}."
            )
        check_bool(self, "trainable", trainable)
        for token in special_token_ids:
            check_number(self, "special_token_ids", token, low=0, high=len(given) - 1, integer=True)
        if trainable:
            self.idf = nn.Parameter(given)
        else:
            self.register_buffer("idf", given)
        counts = torch.ones(len(given), dtype=torch.bool)
        counts[list(special_token_ids)] = False
        self.register_buffer("counts", counts)

    @override
    def forward(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encodes queries.

        Args:
            token_ids: ``(B, T)`` int64.
            attention_mask: ``(B, T)``, 0 for what is padding, whatever token it is; ``None``: all count.

        Returns:
            ``(B, V)``.

        """
        there = torch.ones_like(token_ids) if attention_mask is None else attention_mask.to(token_ids)
        occurs = token_ids.new_zeros(len(token_ids), len(self.idf)).scatter_add(1, token_ids, there) > 0
        return (occurs & self.counts) * self.idf.relu()
