"""GatheredNegatives: the documents of all ranks are candidates of each rank's queries."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.retrieval._candidates import tell_short_batch
from lightning_reg.retrieval._embeddings import Direction, rows_and_columns
from lightning_reg.retrieval._gathered import GathersColumns, OtherRanks
from lightning_reg.retrieval.in_batch_negatives.core import fitted_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall

__all__ = ["GatheredNegatives"]


class GatheredNegatives(GathersColumns, LossTechnique):
    r"""The documents of all ranks are candidates of each rank's queries, in a contrastive loss under DDP.

    A query's documents and hard negatives on W ranks become columns behind those that your code has scored, with
    gradient over the ranks; the targets stay what they are, so a query is never trained towards another column. W ranks
    of batch B train as one of batch W B, in loss and gradient, with hard negatives or without:

    .. math:: \ell_i = -\log \frac{e^{s(q_i, p_i) / \tau}}{\sum_{j \in \text{this rank}} e^{s(q_i, d_j) / \tau} +
        \sum_{j \in \text{other ranks}} e^{s(q_i, d_j) / \tau}}

    On one process nothing changes, to the last bit. A loss in both directions has two calls, and an instance for each::

        callbacks = [GatheredNegatives("text", loss=0),
                     GatheredNegatives("text", direction="doc_to_query", loss=1, name="reversed")]

    Use it where ``F.cross_entropy`` gets similarities ``(B, candidates)`` and the batch of one device has too few
    negatives; accumulation of gradients adds none. Leave it where your code gathers already. ``FocalContrastive`` sees
    the probabilities among all candidates, ``FalseNegativeMask`` masks those of other ranks too if it stands behind,
    and ``HardNegativeMixing`` mixes them.

    Source:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, arXiv 1807.03748
        (InfoNCE); over devices with gradient: Radford et al., "Learning Transferable Visual Models From Natural
        Language Supervision", ICML 2021, arXiv 2103.00020.

    Differs:
        From code that scores the global batch on every rank, whose gradient is 1 / W of the right one if the other
        ranks' rows are constants: each rank has the losses of its own queries. Ranks with unequal numbers of queries
        count alike, as in any mean under DDP, which then is not that of the joined batch; their numbers of documents
        may differ.

    Under DDP two collectives per step, of all documents' embeddings; every rank must make the loss in every step.

    Args:
        layer: Layer that puts out embeddings ``(rows, D)`` of documents, in the order of the logits' columns, in one
            pass or several; without ``query_layer`` of the queries first. A mapping counts by its
            ``"sentence_embedding"``.
        query_layer: Layer that puts out the embeddings of queries; ``None``: the same.
        temperature: What your similarities are divided by, above 0. ``None``: read off the logits, learned or not.
        similarity: ``"cosine"``, or ``"dot"``: products of the outputs as they are.
        direction: Whether the rows of the logits are queries or documents; with ``"doc_to_query"`` the queries of all
            ranks become columns.
        interleaved: With ``"doc_to_query"`` and hard negatives, which are no rows there: whether each document's own
            follow it. ``False``: they come behind all documents.
        loss: Which loss call it works on, if there are several: its position in the step, its function's name, or its
            place in the code. ``None``: there must be just one.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = GatheredNegatives("encoder")
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        query_layer: str | None = None,
        temperature: float | None = None,
        similarity: Literal["cosine", "dot"] = "cosine",
        direction: Direction = "query_to_doc",
        interleaved: bool = False,
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "temperature", temperature, low=0, low_open=True, optional=True)
        check_choice(self, "similarity", similarity, ("cosine", "dot"))
        check_choice(self, "direction", direction, ("query_to_doc", "doc_to_query"))
        check_bool(self, "interleaved", interleaved)
        self.layer, self.query_layer, self.temperature = layer, query_layer, temperature
        self.similarity, self.direction, self.interleaved = similarity, direction, interleaved
        self._is_checked, self._most = False, 0

    @override
    def describe(self) -> str:
        layers = self.layer if self.query_layer is None else f"{self.query_layer} and {self.layer}"
        divided = "" if self.temperature is None else f" over {self.temperature:g}"
        reversed_ = ", queries of documents" if self.direction == "doc_to_query" else ""
        return f"{layers}, {self.similarity}{divided}{reversed_}, {distributed.world_size()} ranks"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if other.loss == self.loss and isinstance(other, GatheredNegatives):
            return (
                "both would add the documents of the other ranks to the same call. Let them work on different calls"
                " with `loss=...`."
            )
        if other.mixes != "none":
            return "a mixed sample has two documents, and GatheredNegatives would know one. Remove one of them."
        if "change_targets" in phases_of(other) and other.loss == self.loss:
            return (
                f"{type(other).__name__} replaces the targets of the same call by others of its own columns, and"
                " GatheredNegatives adds columns. Remove one of them, or let them work on different calls with"
                " `loss=...`."
            )
        if other.copies_rows or "extra_views" in phases_of(other):
            return (
                f"{type(other).__name__} passes each row several times, and which embeddings GatheredNegatives is to"
                " gather is then not known. Remove one of them."
            )
        return None

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._is_checked, self._most = False, 0

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer] if self.query_layer is None else [self.layer, self.query_layer]

    @override
    def change_input(self, call: "LossCall") -> Tensor | None:
        tell_short_batch(call, "GatheredNegatives")
        step, group = call.step, host.data_parallel_group(call.step.trainer)
        looks = step.is_logging or not self._is_checked
        if group is None and not looks:
            return None
        given = rows_and_columns(call, self.layer, self.query_layer, self.direction, interleaved=self.interleaved)
        with torch.autocast(call.input.device.type, enabled=False):
            rows, columns = (self._wide(each) for each in given)
            factor = self._factor(call, rows, columns, {each.dtype for each in given} if looks else None)
            self._is_checked = True
            others = added = None
            if group is not None:
                capacity = self._capacity(call, len(columns), group)
                others, there = distributed.rows_of_other_ranks(columns, group, capacity)
                # Masked last: a learned factor has no gradient from what is not there.
                added = (factor * (rows @ others.T)).masked_fill(~there, -torch.inf)
        if step.is_logging:
            more = 0 if added is None else (added > -torch.inf).sum(1).amax()
            step.log(self, "candidates", torch.tensor(float(len(columns)), device=rows.device) + more)
        if others is None or added is None:
            return None
        step.notes[self] = OtherRanks(call.loss_input.shape[1], others, added)
        wide = torch.promote_types(call.loss_input.dtype, added.dtype)
        return torch.cat([call.loss_input.to(wide), added.to(wide)], dim=1)

    def _wide(self, features: Tensor) -> Tensor:
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(wide, dim=1) if self.similarity == "cosine" else wide

    def _factor(
        self, call: "LossCall", rows: Tensor, columns: Tensor, dtypes: "set[torch.dtype] | None"
    ) -> Tensor | float:
        """What similarities are multiplied by; with types of the embeddings it is checked, a host sync."""
        if self.temperature is not None and dtypes is None:
            return 1.0 / self.temperature
        scores, similarities = call.logits.to(rows.dtype), rows @ columns.T
        counts = scores > -5e3  # what the user's code has masked is below
        factor = fitted_scale(scores, similarities, counts)
        if dtypes is not None:
            self._check(call, torch.where(counts, scores, 0.0), torch.where(counts, similarities, 0.0), factor, dtypes)
        return factor if self.temperature is None else 1.0 / self.temperature

    def _check(
        self, call: "LossCall", scores: Tensor, similarities: Tensor, fitted: Tensor, dtypes: "set[torch.dtype]"
    ) -> None:
        scores, similarities, fitted = scores.detach(), similarities.detach(), fitted.detach()
        factor = float(fitted) if self.temperature is None else 1.0 / self.temperature
        roundings = max(torch.finfo(dtype).eps for dtype in (*dtypes, call.logits.dtype))
        tolerance = max(2e-3, 4 * roundings) * float(similarities.abs().amax())

        def fits(factor: float) -> bool:
            return factor > 0 and bool(((similarities * factor - scores).abs() <= tolerance * factor).all())

        if fits(factor):
            return
        what = f"over {1 / float(fitted):.3g}" if fits(float(fitted)) else "over no temperature"
        given = "" if self.temperature is None else f", and `temperature` is {self.temperature:g}"
        raise MisconfigurationException(
            f"The logits of {call} are {self.similarity} similarities {what}, as far as the outputs of"
            f" {' and '.join(map(repr, self.feature_layers))} say{given}. Name the layers whose rows, in this order,"
            " the logits are made of, their `similarity` and their `direction`, or leave `temperature` out."
        )

    def _capacity(self, call: "LossCall", count: int, group: "torch.distributed.ProcessGroup") -> int | None:
        """Most columns of a rank; agreed on once in a fit, a host sync, where the loader has a batch size."""
        nominal = call.step.capacity
        if nominal is None:
            return None
        if not self._most:
            most = max(count, nominal * -(-count // max(call.logits.shape[0], 1)))
            self._most = int(distributed.all_reduce_max(torch.tensor(most, device=call.input.device), group))
        if count > self._most:
            raise MisconfigurationException(
                f"{call} has {count} columns, and the first step's batch, of {nominal} samples at most, says"
                f" {self._most} on any rank. Give each query as many documents in all steps and on all ranks."
            )
        return self._most
