"""How well documents are ranked, over queries in chunks and over ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.retrieval.idf_flops.core import ranking_scores

__all__ = ["RetrievalMetrics"]


class RetrievalMetrics(Metric):
    """NDCG at k and MRR over queries, of which each has scores for all documents.

    ``compute`` gives ``ndcg@k``, ``mrr`` and ``mrr@k``, which counts no document below rank k. Queries come in chunks,
    of which four sums are kept, so no table of all pairs is held, and each rank may have its own share of the queries.
    A query without a relevant document does not count.

    Source:
        Järvelin and Kekäläinen, "Cumulated Gain-based Evaluation of IR Techniques", TOIS 2002,
        doi 10.1145/582415.582418, with relevance 0 or 1.

    Differs:
        From torchmetrics' ``RetrievalNormalizedDCG`` and ``RetrievalMRR``, which keep all pairs: of equal scores the
        irrelevant documents count as found first. ``ndcg@k`` and ``mrr@k`` are those of sentence-transformers'
        ``InformationRetrievalEvaluator``; ``mrr`` counts the first relevant document however low it stands.

    Args:
        k: Ranks that count for NDCG and MRR at k, at least 1.
        **kwargs: torchmetrics' own.

    Raises:
        ValueError: If ``k`` is outside its range.

    Example:
        >>> metric = RetrievalMetrics(k=1)
        >>> metric.update(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([[True, False], [False, True]]))
        >>> metric.compute()
        {'ndcg@1': tensor(0.5000), 'mrr': tensor(0.7500), 'mrr@1': tensor(0.5000)}

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(self, k: int = 10, **kwargs: Any) -> None:  # noqa: ANN401 # torchmetrics' own
        super().__init__(**kwargs)
        check_number(self, "k", k, low=1, integer=True)
        self.k = k
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, scores: Tensor, relevant: Tensor) -> None:
        """Takes a chunk of queries: their scores ``(Q, N)``, and which documents are relevant, bool ``(Q, N)``."""
        rank, ndcg = ranking_scores(scores.detach().float(), relevant, self.k)
        counts = relevant.any(1)
        cut = rank * (rank.reciprocal().round() <= self.k)
        found = torch.stack([ndcg * counts, rank * counts, cut * counts, counts.float()])
        self.sums += found.double().sum(1).to(self.sums)

    @override
    def compute(self) -> dict[str, Tensor]:
        """``ndcg@k``, ``mrr`` and ``mrr@k``, ``()`` each; NaN without a query."""
        ndcg, rank, cut = (self.sums[:3] / self.sums[3]).float()
        return {f"ndcg@{self.k}": ndcg, "mrr": rank, f"mrr@{self.k}": cut}
