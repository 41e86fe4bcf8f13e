"""Hard negatives of a contrastive loss, mixed while it trains."""

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
from lightning_reg.retrieval._embeddings import check_cosines, embeddings_over_ranks
from lightning_reg.retrieval._gathered import OtherRanks, other_ranks
from lightning_reg.retrieval.kalm_embedding.core import (
    draw_mixtures,
    hardest_negatives,
    mix_hard_negatives,
    own_negatives,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.distributed import ProcessGroup

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["HardNegativeMixing"]


class HardNegativeMixing(LossTechnique):
    r"""Mixtures of the hardest negatives join the candidates of each query, made anew in every step.

    In a contrastive loss of queries and documents each query is a row of logits, cosines over a temperature. Two of
    its hardest negatives are drawn and mixed, and the mixture is one more wrong answer, for this query alone:

    .. math:: h = \operatorname{unit}\bigl(\lambda\, n_m + (1 - \lambda)\, n_{m'}\bigr), \quad
        \lambda \sim \text{Beta}(a, a), \qquad \ell_i = -\log \frac{e^{q_i \cdot p_i / \tau}}
        {\sum_j e^{q_i \cdot d_j / \tau} + \sum_h e^{q_i \cdot h / \tau}}

    and with ``list_mix`` one mixture of all of them, weighted by the softmax of their cosines. So negatives that were
    mined once stay hard, at the price of arithmetic on embeddings. Losses only become larger.

    Use it where the loss is ``F.cross_entropy`` of cosines over a temperature, ``(B, candidates)``, and queries have
    hard negatives. The embeddings are outputs of layers, before or after they are brought to length 1; in the first
    step and in logged ones they must give your logits. Leave it where documents stand twice in a batch, or negatives
    answer the query: mixtures make more of both, unless ``FalseNegativeMask`` stands before it. Behind
    ``GatheredNegatives`` the documents of other ranks are mixed, too, and so are those that your code has gathered with
    gradient, rank after rank and as many from each (for one collective more): W ranks of batch B train as one of batch
    W B. On search over docstrings with a small encoder (``benchmarks/effects/kalm_embedding.py``) three seeds showed no
    effect: compare.

    Source:
        Zhao et al., "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
        2025, arXiv 2506.20923, online hard-negative mixing.

    Differs:
        Reconstruction: the released code has no mixing, and the formulas are those of notes on the paper. Not known
        are the number of mixtures, the weights of the list (here of cosines without temperature), and whether a
        gradient reaches the mixed documents (``detach``). The paper mixes a query's own mined negatives, whose place
        ``negatives`` tells; by default the hardest of all candidates of the batch are taken.

    Args:
        layer: Layer that puts out embeddings ``(rows, D)`` of documents, in the order of the logits' columns, in one
            pass or several; without ``query_layer`` of the queries first. A mapping counts by its
            ``"sentence_embedding"``.
        temperature: :math:`\tau` of your logits, above 0. Paper: 0.01.
        query_layer: Layer that puts out the embeddings of queries; ``None``: the same.
        num_pairs: Mixtures of two for each query, at least 0. Neutral: 0.
        list_mix: Whether a mixture of all of the pool is one more. Neutral: ``False``.
        pool: Number of hardest negatives of a query that are mixed, at least 2. Paper: 7, all of a query's own.
        beta: :math:`a`, above 0. Paper: 2.
        negatives: Where the pool is taken from: ``"any"``, all columns but the query's document; or a query's own
            negatives, which are ``"interleaved"`` (document, its negatives, next document), ``"grouped"`` (all
            documents, then the negatives query by query) or ``"stacked"`` (all documents, then the first negative of
            each query, then the second).
        detach: Whether the mixed documents are constants, so that the query alone moves away from them.
        loss: Which loss call it works on, if there are several: its position in the step, its function's name, or its
            place in the code. ``None``: there must be just one.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = HardNegativeMixing("encoder", temperature=0.05, num_pairs=2)
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        temperature: float,
        query_layer: str | None = None,
        num_pairs: int = 1,
        list_mix: bool = False,
        pool: int = 7,
        beta: float = 2.0,
        negatives: Literal["any", "interleaved", "grouped", "stacked"] = "any",
        detach: bool = False,
        loss: int | str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, name=name, seed=seed)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "num_pairs", num_pairs, low=0, integer=True)
        check_bool(self, "list_mix", list_mix)
        check_number(self, "pool", pool, low=2, integer=True)
        check_number(self, "beta", beta, low=0, low_open=True)
        check_choice(self, "negatives", negatives, ("any", "interleaved", "grouped", "stacked"))
        check_bool(self, "detach", detach)
        self.layer, self.temperature, self.query_layer = layer, temperature, query_layer
        self.num_pairs, self.list_mix, self.pool, self.beta = num_pairs, list_mix, pool, beta
        self.negatives, self.detach = negatives, detach
        self._is_checked = False

    @override
    def describe(self) -> str:
        if not self._acts:
            return "num_pairs=0: inactive"
        layers = self.layer if self.query_layer is None else f"{self.query_layer} and {self.layer}"
        what = [f"{self.num_pairs} by Beta({self.beta:g}, {self.beta:g})"] if self.num_pairs else []
        what += ["the list"] if self.list_mix else []
        which = "hardest" if self.negatives == "any" else f"hardest of its own, {self.negatives}"
        constant = ", constants" if self.detach else ""
        return (
            f"{layers}, temperature={self.temperature:g}; mixtures of the {self.pool} {which}: {' and '.join(what)}"
            f"{constant}"
        )

    @override
    def conflict_with(self, other: Member) -> str | None:
        if other.mixes != "none":
            return "a mixed sample has two documents, and HardNegativeMixing would know one. Remove one of them."
        if "change_targets" in phases_of(other) and other.loss == self.loss:
            return (
                f"{type(other).__name__} replaces the targets of the same call, and HardNegativeMixing would mix what"
                " is no negative then. Remove one of them, or let them work on different calls with `loss=...`."
            )
        if other.copies_rows or "extra_views" in phases_of(other):
            return (
                f"{type(other).__name__} passes each row several times, and whose embeddings HardNegativeMixing mixes"
                " is then not known. Remove one of them."
            )
        return None

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._is_checked = False

    @override
    def is_active(self, step: "Step") -> bool:
        return self._acts

    @property
    def _acts(self) -> bool:
        return self.num_pairs > 0 or self.list_mix

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        if not self._acts:
            return []
        return [self.layer] if self.query_layer is None else [self.layer, self.query_layer]

    @override
    def change_input(self, call: "LossCall") -> Tensor | None:
        tell_short_batch(call, "HardNegativeMixing")
        logits, labels = call.logits, call.labels
        group, others = host.data_parallel_group(call.step.trainer), self._others(call)
        *given, mine = embeddings_over_ranks(call, self.layer, self.query_layer, group)
        own = self._own(call, mine)
        with torch.autocast(logits.device.type, enabled=False):
            queries, documents = (F.normalize(each.float(), dim=1) for each in given)
            similarities, counted = logits.float() * self.temperature, call.loss_input[:, : logits.shape[1]]
            if not self._is_checked or call.step.is_logging:
                check_cosines(call, queries, documents, self.temperature, {each.dtype for each in (logits, *given)})
                self._check(call, mine, others)
                self._is_checked = True
            if others is not None:
                documents = torch.cat([documents, F.normalize(others.rows.float(), dim=1)])
                similarities = torch.cat([similarities, others.scores.float() * self.temperature], dim=1)
                counted = torch.cat([counted, call.loss_input[:, others.columns]], dim=1)
            pool = min(self.pool, (len(documents) if own is None else (mine.stop - mine.start) // len(logits)) - 1)
            if pool < 2:
                return None  # the short batch at an epoch's end
            similarities = similarities.masked_fill(counted == -torch.inf, -torch.inf)  # by a technique before
            near, there = hardest_negatives(similarities, labels, pool, own)
            shares, chances = self._draws(call.step, len(logits), pool, group, logits.device)
            mixed = mix_hard_negatives(queries, documents[near], shares, chances, self.list_mix, there)
            cosines = ((mixed.detach() if self.detach else mixed) @ queries[:, :, None])[..., 0]
            enough = there.sum(1, keepdim=True) >= 2
            added = torch.where(enough, cosines / self.temperature, -torch.inf)
        if call.step.is_logging:
            call.step.log(self, "cosine", (cosines * enough).sum() / (enough.sum() * cosines.shape[1]).clamp(min=1))
        return torch.cat([call.loss_input, added.to(call.loss_input.dtype)], dim=1)

    def _others(self, call: "LossCall") -> OtherRanks | None:
        """Candidates of other ranks that are mixed as well; a query's own negatives are on its rank."""
        return other_ranks(call, self) if self.negatives == "any" else None

    def _own(self, call: "LossCall", mine: slice) -> Tensor | None:
        if self.negatives == "any":
            return None
        (rows, columns), count = call.logits.shape, mine.stop - mine.start
        if count % rows or count // rows < 3:
            raise MisconfigurationException(
                f'HardNegativeMixing(negatives="{self.negatives}") needs a document and two negatives or more of each'
                f' query among the columns, and {call} has {count} for {rows} queries. Write `negatives="any"` to mix'
                " the hardest of all columns."
            )
        own = own_negatives(rows, count, self.negatives, call.input.device)
        return F.pad(own, (mine.start, columns - mine.stop))

    def _check(self, call: "LossCall", mine: slice, others: OtherRanks | None) -> None:
        """Refuses a layout that the targets contradict; a host sync."""
        rows, columns = call.logits.shape
        if not self._is_checked and columns < 3 and others is None:
            raise MisconfigurationException(f"{call} has {columns} candidates: there are no two negatives to mix.")
        width = (mine.stop - mine.start) // rows if self.negatives == "interleaved" else 1
        documents = mine.start + width * torch.arange(rows, device=call.labels.device)
        if self.negatives != "any" and (call.labels != documents).any():
            raise MisconfigurationException(
                f'HardNegativeMixing(negatives="{self.negatives}"): the targets of {call} are other columns than those'
                " of the documents in this order."
            )

    def _draws(
        self, step: "Step", rows: int, pool: int, group: "ProcessGroup | None", device: torch.device
    ) -> "Sequence[Tensor]":
        ranks, rank = (1, 0) if group is None else (distributed.world_size(group), distributed.rank(group))
        generator = self.generator(step, same_on_ranks=True)
        drawn = draw_mixtures(rows * ranks, self.num_pairs, pool, self.beta, generator)  # the ranks' rows in turns
        return [draws[rank::ranks].to(device, non_blocking=True) for draws in drawn]
