"""Records: what the network makes of each sample of the training or validation data, in one pass beside the fit."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import own_randomness
from lightning_reg.engine.host.modules import checksum
from lightning_reg.engine.loss.choice import no_loss_seen
from lightning_reg.engine.loss.mixin import LossMixin
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import Peer, Sight
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.passes import ordered_batches
from lightning_reg.engine.run.watching import counted, progress
from lightning_reg.engine.step import EvaluationStep, Stage, Step
from lightning_reg.engine.weights.strategies import check_whole

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.engine.host.owner import Owner

__all__ = ["Records", "Wanted", "check_fetched_twice", "record", "steps_in_order"]


@dataclass(frozen=True)
class Wanted:
    """What is kept of each sample.

    Args:
        layers: Layers whose outputs are kept, named as in ``named_modules()``.
        entries: Entries of the batch that are kept: keys and positions, separated by dots.
        logits: Whether the class scores of the loss call are kept, the one that the owner's ``loss`` chooses.
        losses: Whether its losses are kept.
        labels: Whether the given class of the same call is kept.
        view: What is kept of a layer's output ``(B, ...)``, such as its pooled features.

    """

    layers: Sequence[str] = ()
    entries: Sequence[str] = ()
    logits: bool = False
    losses: bool = False
    labels: bool = False
    view: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Records:
    """A row for each of N samples, in the order of their indices; on the CPU.

    Args:
        indices: Which samples, ``(N,)`` int64, each once.
        features: Outputs of the layers, ``(N, ...)``, by name.
        entries: Entries of the batches, ``(N, ...)``, by key.
        logits: ``(N, C)``, or ``None``.
        losses: ``(N,)`` float32, or ``None``.
        labels: ``(N,)`` int64, or ``None``.
        weights: Hash of the weights that the network had.
        pipeline: Hash of the first batch as it came to the network: another one came by another way.

    """

    indices: Tensor
    features: Mapping[str, Tensor]
    entries: Mapping[str, Tensor]
    logits: Tensor | None
    losses: Tensor | None
    labels: Tensor | None
    weights: str
    pipeline: str

    def rows_of(self, indices: Tensor) -> Tensor:
        """Where samples stand in the records.

        Args:
            indices: ``(B,)``.

        Returns:
            Positions ``(B,)``.

        Raises:
            KeyError: If one of them was not recorded.

        """
        indices = indices.to(self.indices)
        rows = torch.searchsorted(self.indices, indices).clamp(max=len(self.indices) - 1)
        missing = indices[self.indices[rows] != indices]
        if len(missing):
            raise KeyError(f"There is no record of sample {int(missing[0])}.")
        return rows


def record(
    trainer: "Trainer",
    owner: "Owner",
    wanted: Wanted,
    stage: Stage = "train",
    *,
    augmented: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    among: Iterable[int] | None = None,
) -> Records:
    """Goes once over the training or validation data in eval mode, and keeps a row for each sample.

    A copy of the module, with its present weights and without any technique, runs ``training_step`` (for the
    validation: ``validation_step``) without gradient. Each sample that the loader's sampler draws is seen once, in the
    order of the indices. Nothing else notices: random states, modes, metrics, loggers, samplers and workers of the fit
    stay as they are. Ranks share the samples and have all rows afterwards.

    Args:
        trainer: A Trainer that fits, from ``on_train_start`` on: earlier there are no loaders.
        owner: Whose records they are; its ``loss`` chooses the loss call, its class is named in the progress bar.
        wanted: What is kept.
        stage: ``"train"`` or ``"validate"``.
        augmented: Whether it is enough that a row stands for one draw of an augmented sample. Else the first batch is
            fetched twice and has to be the same, as has what the network makes of it.
        weights: Seen through these in place of the module's, as :meth:`Peer.see` takes them.
        among: Indices of the samples that are asked for; the pass leaves out the others. ``None`` for all.

    Returns:
        The rows.

    Raises:
        MisconfigurationException: If there is not just one DataLoader with sample indices, samples are augmented, a
            layer or a loss has no row per sample, or the module's step cannot run on a copy.

    """
    module = attached_engine(trainer).module
    check_whole(owner, trainer, "records")
    peer = Peer(module, layers=wanted.layers, owner=owner)
    peer.share_memory_with(module)
    recorder = _Recorder(owner, wanted, peer, weights)
    rows: dict[str, list[Tensor]] = {}
    with steps_in_order(trainer, owner, stage, None if augmented else recorder.check_same, among=among) as steps:
        for step, indices in steps:
            for name, value in {_INDICES: torch.tensor(indices), **recorder.rows(step, len(indices))}.items():
                rows.setdefault(name, []).append(value.cpu())
    whole = _of_all_ranks(trainer, owner, rows, module.device)
    return recorder.records(whole, checksum(weights_of(module) if weights is None else weights))


@contextmanager
def steps_in_order(
    trainer: "Trainer",
    owner: "Owner",
    stage: Stage = "train",
    check_same: Callable[[Step, Step], None] | None = None,
    dataset: Any = None,
    *,
    one_by_one: bool = False,
    loader: Any = None,
    among: Iterable[int] | None = None,
) -> Iterator[Iterator[tuple[Step, Sequence[int]]]]:
    """One pass over the training or validation data for a :class:`Peer`, of which the fit notices nothing.

    Each sample that the loader's sampler draws on this rank comes once, in the order of the indices.

    Args:
        trainer: A Trainer that fits, from ``on_train_start`` on; with ``loader`` one that has fitted will do.
        owner: Whose pass it is; its class is named in the progress bar and in errors.
        stage: ``"train"`` or ``"validate"``.
        check_same: Gets two steps with the first batch, fetched twice, and refuses data that change; see
            :func:`check_fetched_twice`.
        dataset: Gives the samples in place of the loader's own, which it is behind; ``None`` for that.
        one_by_one: Whether each sample is a batch of its own.
        loader: A DataLoader with indices in place of the Trainer's, all of it; no progress is shown.
        among: Indices of the samples that are asked for, the others being left out; ``None`` for all.

    Yields:
        Steps with their batches, and the indices of the samples.

    Raises:
        MisconfigurationException: If there is not just one DataLoader with sample indices.

    """
    given = None if loader is None else (loader, len(loader))
    mine, limit = given or attached_engine(trainer).loader_for(owner, stage)
    with ExitStack() as undo:
        passes = ordered_batches(trainer, mine, limit, stage, dataset, one_by_one=one_by_one, among=among)
        drawn, twice, batches = undo.enter_context(passes)
        if check_same is not None and drawn:
            check_same(*_steps(trainer, stage, iter(twice()), [drawn[0]] * 2))
        what = f"{type(owner).__name__}: {'training' if stage == 'train' else 'validation'} data"
        advance = undo.enter_context(progress(trainer, what, 0 if given else len(drawn)))
        yield zip(counted(_steps(trainer, stage, batches, drawn), advance), drawn, strict=True)


def check_fetched_twice(one: Step, two: Step, problem: str) -> None:
    """Refuses samples that are another time others than they were.

    Args:
        one: A step.
        two: A step with the same samples, fetched once more.
        problem: The sentence to refuse them with.

    Raises:
        MisconfigurationException: If a tensor of the batches differs.

    """
    for a, b in zip(_tensors(one.batch), _tensors(two.batch), strict=True):
        if a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise MisconfigurationException(problem)


_INDICES, _LOGITS, _LOSSES, _LABELS = "indices", "logits", "losses", "labels"


def _steps(trainer: "Trainer", stage: Stage, batches: Iterator[Any], drawn: Sequence[Sequence[int]]) -> Iterator[Step]:
    module = trainer.lightning_module
    for position, (batch, indices) in enumerate(zip(batches, drawn, strict=True)):
        if stage == "train":
            arguments = (position,)[: host.arguments_of_training_step(module) - 1]
            step = Step(trainer, module, batch, {}, False, arguments)
        else:
            step = EvaluationStep(trainer, module, (batch, position), stage)
        step.batch_sizes = (len(indices),)
        yield step


class _Recorder:
    """Takes the wanted rows out of what a network makes of a batch."""

    def __init__(self, owner: "Owner", wanted: Wanted, peer: Peer, weights: Mapping[str, Tensor] | None) -> None:
        self._owner, self._wanted, self._peer, self._weights = owner, wanted, peer, weights
        self._pipeline = ""

    def check_same(self, one: Step, two: Step) -> None:
        """Refuses data whose first batch differs from fetch to fetch, and a network that draws random numbers."""
        name, first = type(self._owner).__name__, self.rows(one, one.batch_sizes[0], seed=0)
        check_fetched_twice(
            one,
            two,
            f"{name} keeps a record of each sample, and a batch that was fetched twice was another one the second time:"
            " samples are augmented, so no record stands for what the network will see. Give the loader data without"
            " random transforms, or do them in `training_step` in train mode only.",
        )
        second = self.rows(two, two.batch_sizes[0], seed=1)
        for key, value in first.items():
            largest = value.float().abs().max() if value.numel() else 0.0  # kernels of a GPU may round in another order
            if not torch.allclose(value.float(), second[key].float(), 1e-3, 1e-3 * float(largest), equal_nan=True):
                raise MisconfigurationException(
                    f"{name} keeps a record of each sample, and the module makes something else of a batch ({key}) when"
                    " it is run twice in eval mode: its step draws random numbers. Draw them in train mode only (`if"
                    " self.training:`)."
                )

    def rows(self, step: Step, size: int, seed: int | None = None) -> dict[str, Tensor]:
        """By name, each with a row per sample."""
        wanted = self._wanted
        if not self._pipeline:
            batch = _tensors(step.batch)
            self._pipeline = checksum({str(position): value for position, value in enumerate(batch)})
        asks = self._owner if wanted.logits or wanted.losses or wanted.labels else None
        with ExitStack() as undo:
            if seed is not None:
                undo.enter_context(own_randomness(seed))
            sight = self._peer.see(step, asks, weights=self._weights)
        found = {f"layer {layer}": _one_tensor(sight.features.get(layer)) for layer in wanted.layers}
        if wanted.view is not None:
            found = {key: value if value is None else wanted.view(value) for key, value in found.items()}
        name = f"{type(self._owner).__name__}: record"
        found |= {f"entry {key}": _one_tensor(find_entry(step.batch, key, name)) for key in wanted.entries}
        if asks is not None:
            found |= self._of_call(step, sight)
        rows: dict[str, Tensor] = {}
        for what, value in found.items():
            if value is None or not value.dim() or len(value) != size:
                shape = "no tensor" if value is None else f"a tensor {tuple(value.shape)}"
                raise MisconfigurationException(
                    f"{name} of {what} needs a row for each of the {size} samples of a batch, and there is {shape}."
                    " Name a layer that puts out one tensor with a row per sample."
                )
            rows[what] = value.detach()
        return rows

    def _of_call(self, step: Step, sight: Sight) -> dict[str, Tensor | None]:
        call = sight.call
        if call is None:
            raise no_loss_seen([self._owner], step.module, by_mixin=isinstance(step.module, LossMixin))
        found: dict[str, Tensor | None] = {}
        if self._wanted.logits:
            found[_LOGITS] = call.logits
        if self._wanted.losses:
            found[_LOSSES] = call.losses
        if self._wanted.labels:
            found[_LABELS] = call.labels
        return found

    def records(self, rows: Mapping[str, Tensor], weights: str) -> Records:
        """The rows of all batches, in the order of the indices, each once."""
        order = rows[_INDICES].argsort(stable=True)
        indices = rows[_INDICES][order]
        first = torch.ones_like(indices, dtype=torch.bool)
        first[1:] = indices[1:] != indices[:-1]
        rows = {name: value[order[first]] for name, value in rows.items()}
        return Records(
            rows[_INDICES],
            {layer: rows[f"layer {layer}"] for layer in self._wanted.layers},
            {key: rows[f"entry {key}"] for key in self._wanted.entries},
            rows.get(_LOGITS),
            rows.get(_LOSSES),
            rows.get(_LABELS),
            weights,
            self._pipeline,
        )


def _of_all_ranks(
    trainer: "Trainer", owner: "Owner", rows: Mapping[str, list[Tensor]], device: torch.device
) -> dict[str, Tensor]:
    group = host.data_parallel_group(trainer)
    fewest = -distributed.all_reduce_max(torch.tensor(-len(rows.get(_INDICES, ())), device=device), group)
    if not int(fewest):
        raise MisconfigurationException(
            f"{type(owner).__name__} keeps a record of each sample, and there is no batch"
            f"{'' if group is None else ' on one of the ranks'}. Give the Trainer data, and each rank a part of it."
        )
    whole = {}
    for name, parts in rows.items():
        own = torch.cat(parts)
        if group is not None:
            flat, there, _ = distributed.all_gather_rows(own.reshape(len(own), -1).to(device), group)
            own = flat[there].reshape(-1, *own.shape[1:]).cpu()
        whole[name] = own
    return whole


def _one_tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
