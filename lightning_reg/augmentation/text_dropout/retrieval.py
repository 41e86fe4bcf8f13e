"""The scores of retrieval over a whole evaluation."""

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_reg.augmentation.text_dropout.core import retrieval_scores

__all__ = ["RetrievalScores"]


class RetrievalScores(Metric):
    """Recall at k and median rank of queries among all rows of an evaluation, see :func:`retrieval_scores`.

    The embeddings of the whole evaluation are kept, in float32, and gathered from all ranks.

    Source:
        McKee et al., "Language-Guided Music Recommendation for Video via Prompt Analogies", CVPR 2023, arXiv
        2306.09327.

    Differs:
        Reconstruction: which k and which similarity the paper reports was not read. Rows as similar to the query as its
        own count as found before it.

    Args:
        ks: At which ranks recall is taken, each a whole number of at least 1.

    Raises:
        ValueError: If a rank is below 1, or there is none.

    Example:
        >>> import torch
        >>> scores = RetrievalScores([1])
        >>> scores.update(torch.eye(2), torch.eye(2))
        >>> scores.compute()
        {'recall@1': tensor(1.), 'median_rank': tensor(1.)}

    """

    full_state_update = False

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        if not ks or min(ks) < 1:
            raise ValueError(f"RetrievalScores: `ks` must be whole numbers of at least 1, got {ks!r}.")
        self.ks = list(ks)
        self.add_state("queries", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")
        self.queries: list[Tensor]
        self.targets: list[Tensor]

    @override
    def update(self, queries: Tensor, targets: Tensor) -> None:
        """Takes a batch.

        Args:
            queries: ``(B, D)``.
            targets: What is to be found for each, ``(B, D)``.

        """
        self.queries.append(queries.detach().float())
        self.targets.append(targets.detach().float())

    @override
    def compute(self) -> dict[str, Tensor]:
        """The scores."""
        return retrieval_scores(dim_zero_cat(self.queries), dim_zero_cat(self.targets), self.ks)
