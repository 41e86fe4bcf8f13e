"""FalseNegativeMask: candidates that answer a query, too, do not count as its negatives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.retrieval._candidates import tell_short_batch
from lightning_reg.retrieval._gathered import other_ranks
from lightning_reg.retrieval._guide import check_count, keys_of, names_of, unit_rows_of_batch
from lightning_reg.retrieval.in_batch_negatives.core import (
    same_document_mask,
    similar_document_mask,
    text_hashes,
    token_hashes,
)

if TYPE_CHECKING:
    from lightning_reg.engine.loss.call import LossCall

__all__ = ["FalseNegativeMask"]


class FalseNegativeMask(LossTechnique):
    r"""Candidates that are known to answer a query, too, are taken out of its contrastive loss.

    In a batch of queries and documents every other document counts as wrong, and some are not: the same document stands
    twice, or another one answers the query. Their scores become -inf, for that query alone:

    .. math:: \ell_i = -\log \frac{e^{s_{i y_i}}}{\sum_{j \notin F_i} e^{s_{ij}}}, \qquad F_i = \{j \ne y_i :
        \text{id}_j = \text{id}_{y_i}\} \cup \{j \ne y_i : g_{ij} > g_{i y_i} - m\}

    with ids or texts of the documents, or cosines g of a guide, a better model whose embeddings the batch has. The
    query's own document is never masked. This costs no look through the data, where a sampler without duplicates
    searches for each batch and leaves rows out.

    Use it where ``F.cross_entropy`` gets scores ``(B, candidates)`` and documents are shared by queries, or negatives
    were mined. Leave it where each document answers one query. On search over docstrings where one query in six met its
    own document twice in a batch (``benchmarks/effects/in_batch_negatives.py``) three seeds showed no effect, and a
    guide where each document has one query cost 0.9 points of NDCG@10 (``benchmarks/effects/search.py``): compare.
    In the order of the callbacks it stands behind ``GatheredNegatives``, whose columns are masked as well, and before
    ``HardNegativeMixing``, which then mixes no masked one; ``FocalContrastive`` sees the probabilities without them.

    Logged are ``masked``, the share of candidates beside the own document that is masked, and ``negatives``, how many
    are left for a query. A short last batch has fewer, which is told once: give the loader ``drop_last=True``.

    Source:
        Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning", 2024,
        arXiv 2402.16829; margins as in sentence-transformers' ``CachedGISTEmbedLoss``.

    Differs:
        The relative margin is one of the size of the positive's score, so that the threshold is below it for negative
        scores as well. Similarities among queries and among documents, which GISTEmbed takes into the loss, are no
        scores of yours and join nothing. In mixed precision the guide's cosines are float32.

    Args:
        ids: Entries of the batch with a whole number for each column of the scores, in their order: keys and positions,
            separated by dots. Equal numbers are the same document. ``None``: not known.
        texts: Entries with the text of each column, in their order: strings, or rows of tokens ``(n, T)``; equal ones
            are the same document. ``None``: not known.
        guide_queries: Entry with the guide's embeddings of the rows ``(B, E)``. ``None``: no guide.
        guide_documents: Entries with those of the columns ``(n, E)``, in their order.
        margin: m: above 0 masks more, and below 0 less than what the guide finds more similar than the own document.
            GISTEmbed: 0. Neutral: below -2, ``"absolute"``.
        margin_strategy: ``"absolute"``: of cosines; ``"relative"``: a share of the own document's cosine, of its size.
        pad_token_id: The token behind the others in ``texts`` of tokens, which counts nothing.
        loss: Which loss call it works on, if there are several: its position in the step, its function's name, or its
            place in the code. ``None``: there must be just one.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range, nothing says which documents are known, or half a guide does.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = FalseNegativeMask(ids="doc_id")
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        ids: list[str] | str | None = None,
        texts: list[str] | str | None = None,
        guide_queries: str | None = None,
        guide_documents: list[str] | str | None = None,
        margin: float = 0.0,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        pad_token_id: int = 0,
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "margin", margin)
        check_choice(self, "margin_strategy", margin_strategy, ("absolute", "relative"))
        check_number(self, "pad_token_id", pad_token_id, integer=True)
        if (guide_queries is None) != (guide_documents is None):
            raise ValueError(
                "FalseNegativeMask: `guide_queries` and `guide_documents` must be given together, got"
                f" {guide_queries!r} and {guide_documents!r}."
            )
        if ids is None and texts is None and guide_queries is None:
            raise ValueError(
                "FalseNegativeMask: `ids`, `texts` or `guide_queries` must name an entry of the batch, got none."
            )
        self.ids, self.texts, self.pad_token_id = ids, texts, pad_token_id
        self.guide_queries, self.guide_documents = guide_queries, guide_documents
        self.margin, self.margin_strategy = margin, margin_strategy

    @override
    def describe(self) -> str:
        given = [f"{name} {names_of(of)}" for name, of in (("ids", self.ids), ("texts", self.texts)) if of is not None]
        if self.guide_queries is not None:
            given.append(
                f"guide {self.guide_queries} and {names_of(self.guide_documents)}, {self.margin_strategy} margin"
                f" {self.margin:g}"
            )
        return "; ".join(given)

    @override
    def conflict_with(self, other: Member) -> str | None:
        if other.mixes != "none":
            return "a mixed sample has two documents, and FalseNegativeMask would know one. Remove one of them."
        if "change_targets" in phases_of(other) and other.loss == self.loss:
            return (
                f"{type(other).__name__} replaces the targets of the same call, and FalseNegativeMask might mask one."
                " Remove one of them, or let them work on different calls with `loss=...`."
            )
        if isinstance(other, FalseNegativeMask) and other.loss == self.loss and other.describe() == self.describe():
            return "both mask the same candidates of the same call. Remove one of them."
        return None

    @override
    def change_input(self, call: "LossCall") -> Tensor | None:
        scores, width = call.loss_input, call.logits.shape[-1]
        self._check(call)
        tell_short_batch(call, "FalseNegativeMask")
        gathered = self._gathered(call, width)
        labels = call.labels
        known = torch.zeros(len(scores), width + gathered, dtype=torch.bool, device=scores.device)
        with torch.autocast(scores.device.type, enabled=False):
            for ids in self._numbers(call, width):
                known |= same_document_mask(ids, labels, self._of_all_ranks(call, ids, gathered))
            if self.guide_queries is not None:
                queries, documents = unit_rows_of_batch(
                    call, "FalseNegativeMask", self.guide_queries, self.guide_documents or []
                )
                similarities = queries @ self._of_all_ranks(call, documents, gathered).T
                known |= similar_document_mask(similarities, labels, self.margin, self.margin_strategy)
        if call.step.is_logging:
            there = scores > -torch.inf
            of_rows = ((labels >= 0) & (labels < width))[:, None] & there
            others, masked = of_rows.sum() - of_rows.any(1).sum(), (known & of_rows).sum()
            call.step.log(self, "masked", masked / others.clamp(min=1))
            call.step.log(self, "negatives", (others - masked) / max(len(scores), 1))
        return scores.masked_fill(known, -torch.inf)

    def _check(self, call: "LossCall") -> None:
        soft = call.target is not None and call.target.is_floating_point()
        if call.name != "cross_entropy" or call.logits.dim() != 2 or soft or call.arguments.get("label_smoothing"):
            raise MisconfigurationException(
                "FalseNegativeMask takes columns out of a plain `F.cross_entropy` of scores (B, candidates) with a"
                f" column as each row's target, and {call} is another loss, or has probabilities as targets or"
                " `label_smoothing`, of which each column has a part. Name the contrastive call by `loss=...`, or leave"
                " the argument out."
            )

    def _gathered(self, call: "LossCall", width: int) -> int:
        """How many columns of other ranks are behind the given ones."""
        others = other_ranks(call, self)
        first, count = (width, 0) if others is None else (others.first, others.scores.shape[1])
        if (first, first + count) != (width, call.loss_input.shape[1]):
            raise MisconfigurationException(
                f"FalseNegativeMask knows the {width} columns of {call} and those that GatheredNegatives adds, and"
                f" finds {call.loss_input.shape[1]}. Let it stand directly behind GatheredNegatives in the list of"
                " callbacks, and before what adds other columns."
            )
        return count

    def _of_all_ranks(self, call: "LossCall", columns: Tensor, gathered: int) -> Tensor:
        """What columns have, in the order of the scores: those of this rank, then of the others."""
        if not gathered:
            return columns
        group = host.data_parallel_group(call.step.trainer)
        capacity = gathered // (distributed.world_size(group) - 1)
        padded = columns.new_zeros(capacity, *columns.shape[1:])
        padded[: len(columns)] = columns
        of_ranks = distributed.all_gather(padded, group)
        first = distributed.rank(group)
        return torch.cat([columns, of_ranks[:first].flatten(0, 1), of_ranks[first + 1 :].flatten(0, 1)])

    def _numbers(self, call: "LossCall", width: int) -> "Sequence[Tensor]":
        """Numbers ``(C,)`` that say which columns are the same, from ids and from texts."""
        found = []
        for argument, given in (("ids", self.ids), ("texts", self.texts)):
            if given is not None:
                parts = [self._number(call, argument, key) for key in keys_of(given)]
                found.append(torch.cat(parts))
                check_count(call, "FalseNegativeMask", names_of(given), len(found[-1]), width)
        return found

    def _number(self, call: "LossCall", argument: str, key: str) -> Tensor:
        entry, device = find_entry(call.step.batch, key, f"FalseNegativeMask: {argument}"), call.input.device
        if isinstance(entry, Tensor) and not (entry.is_floating_point() or entry.is_complex()):
            if argument == "ids":
                return entry.to(device).long().flatten()
            if entry.dim() > 1:
                return token_hashes(entry.to(device).flatten(0, -2), self.pad_token_id)
        if argument == "texts" and isinstance(entry, Sequence) and all(isinstance(text, str) for text in entry):
            return text_hashes(entry).to(device, non_blocking=True)
        wanted = "whole numbers" if argument == "ids" else "strings, or whole numbers (n, T) of tokens"
        shape = f"{entry.dtype} {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
        raise MisconfigurationException(f"FalseNegativeMask: {argument}={key!r} must name {wanted}, found {shape}.")
