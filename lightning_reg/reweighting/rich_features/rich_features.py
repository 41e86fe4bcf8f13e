"""Rich features, first part: rounds of training, each against what the earlier networks have found."""

from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.records import Wanted, record
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.phases import Member
from lightning_reg.reweighting._group_weights import GroupWeights
from lightning_reg.reweighting.rich_features._rounds import check_paths, read_rounds, write_round
from lightning_reg.reweighting.rich_features.core import rich_groups

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from lightning_reg.engine.step import Step

__all__ = ["RichFeatures"]


class RichFeatures(GroupWeights):
    r"""Trains a network that cannot do with the features of earlier ones, and records what it gets right.

    .. math:: \min_f \max_{r < R,\; c \in \{0, 1\}} \; \frac1{|G_r^c|} \sum_{i \in G_r^c} \ell(f(x_i), y_i), \qquad
        G_r^c = \{i : [f_r(x_i) = y_i] = c\}

    Without ``rounds`` the loss is left as it is: round 0. A later round is trained against the worst of the groups that
    each earlier network makes, those it classifies as labelled and those it does not: who uses an earlier network's
    features alone loses on the latter. Each round is a fit of its own, of a new module with a new optimizer and
    schedule; nothing but the files goes from one to the next. At the end of a fit the network sees each training
    sample once in evaluation mode, and ``record`` tells the next rounds what it made of it. :class:`FeatureSynthesis`
    then makes one network of all.

    Use it when methods for other domains (IRM, V-REx, Fishr) fail from random weights, and where a shortcut is
    suspected. Keep round 0 short: a network that fits all labels leaves no group of errors, and one that fits noise
    leaves a group of noise. Two rounds are the paper's choice on ColoredMNIST; a third was worse on Camelyon17. On
    coloured digits (``benchmarks/effects/rich_features.py``) V-REx on the frozen features of both rounds reached 38 %
    in the worst group, from random weights 0 %, fine-tuned 1 %; against a plain fit (18 %) no effect was shown, and
    :class:`GroupDRO`, which was told the colours, reached 54 %. Beside the six methods of :class:`InvariancePenalty`
    (``rich_penalties.py`` there) the frozen features made all but CLOvE better than from random weights: 10 to 57 %
    for 0 %. Much of that is the freezing: over frozen features of a plain fit (1 to 50 %) an effect of these was shown
    for IRMv1 alone, 10 % for 1 %, and over the plain fit for SD alone, 57 %.

    Source:
        Zhang et al., "Rich Feature Construction for the Optimization-Generalization Dilemma", ICML 2022, arXiv
        2203.15516, section 4 and algorithm 1; ``"online"``: Sagawa et al., ICLR 2020, arXiv 1911.08731, as in the
        paper's Camelyon17.

    Differs:
        The authors' ColoredMNIST takes the maximum over full batches: ``mode="max"`` and ``draws=None`` with a
        ``batch_size`` of the whole data. Classes are those of a cross-entropy, where theirs is a binary one of a single
        logit. An empty group is refused; there it makes no group.

    Memory: 2 R numbers per sample. The pass at the end costs that of an epoch without gradients.

    Args:
        rounds: Files of the earlier rounds, in any order. ``None``: round 0, your loss alone. Neutral: ``None``.
        record: File to write at the end of the fit. ``None``: none.
        mode: ``"online"``: the groups' weights move step by step. ``"max"``: the worst group of the batch alone counts,
            for full batches.
        eta: Step of the weights, at least 0. Authors' Camelyon17: 0.01.
        draws: ``"balanced"``: groups come alike in each epoch, drawn with replacement in place of your sampler's order,
            in later rounds. ``None``: those of your sampler.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        index_key: Batch entry with the positions of the samples in the dataset; ``None`` to follow them from the
            DataLoader.
        dataloader: Key of the training loader in a CombinedLoader.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range, or ``rounds`` is no list of files.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> first = RichFeatures(record="rich/0.pt")
        >>> second = RichFeatures(rounds=["rich/0.pt"], record="rich/1.pt")
        >>> trainers = [Trainer(callbacks=[one], logger=False, enable_checkpointing=False) for one in (first, second)]

    """

    def __init__(
        self,
        rounds: list[str] | None = None,
        record: str | None = None,
        mode: Literal["online", "max"] = "online",
        eta: float = 0.01,
        draws: Literal["balanced"] | None = "balanced",
        loss: int | str | None = None,
        index_key: str | None = None,
        dataloader: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, index_key=index_key, dataloader=dataloader, name=name, seed=seed)
        check_choice(self, "mode", mode, ("online", "max"))
        check_number(self, "eta", eta, low=0)
        check_choice(self, "draws", draws, ("balanced", None))
        self.rounds = None if rounds is None else check_paths(self, rounds)
        self.record, self.mode, self.eta, self.draws = record, mode, eta, draws
        self.num_groups = 2 * len(self.rounds or ())
        self._log_weights: Tensor | None = None
        self._table: Tensor | None = None

    @property
    @override
    def needs_indices(self) -> bool:  # type: ignore[override]  # of the class elsewhere; here an argument says it
        return bool(self.rounds)

    @property
    @override
    def draws_samples(self) -> bool:
        return bool(self.rounds) and self.draws == "balanced"

    @override
    def describe(self) -> str:
        records = "" if self.record is None else f"; records {self.record}"
        if not self.rounds:
            return f"round 0: your loss as it is{records}"
        how = "the worst alone" if self.mode == "max" else f"eta={self.eta:g}"
        drawn = ", drawn alike" if self.draws else ""
        return f"round {len(self.rounds)}: {self.num_groups} groups of earlier rounds, {how}{drawn}{records}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if not self.rounds:
            return
        correct, _ = read_rounds(self, self.rounds)
        for path, right in zip(self.rounds, correct, strict=True):
            if right.all() or not right.any():
                raise MisconfigurationException(
                    f"RichFeatures: the network of {path} got {'all' if right.all() else 'no'} training samples right,"
                    " so one of its groups is empty. Train it for a shorter time, or leave it out."
                )
        self._table = rich_groups(correct).float()

    @override
    def conflict_with(self, other: Member) -> str | None:
        return super().conflict_with(other) if self.rounds else None

    @override
    def is_active(self, step: "Step") -> bool:
        return bool(self.rounds)

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.record is None:
            return
        loader, _ = attached_engine(trainer).loader_for(self, "train")
        rows, size = record(trainer, self, Wanted(logits=True, labels=True)), len(loader.dataset)
        if len(rows.indices) != size or rows.logits is None or rows.labels is None:
            raise MisconfigurationException(
                f"RichFeatures(record=...): the training loader gives {len(rows.indices)} of the {size} samples of its"
                " dataset, and the next rounds need all of them. Leave the drawing of samples to the later rounds"
                ' (`draws="balanced"`), or give the loader the dataset of those samples.'
            )
        predictions = rows.logits.argmax(1)
        if distributed.rank() == 0:
            write_round(self.record, predictions == rows.labels, predictions)
        trainer.strategy.barrier()  # the next round may begin on another rank at once

    @override
    def _table_source(self) -> tuple[str, str]:
        return "`rounds` are records of", "Record all rounds on the dataset that is trained on."
