"""One training step as the techniques see it: the batch, its samples, its features, where training stands."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_reg.engine.data.batches import samples_of, tensors_of
from lightning_reg.engine.data.indices import IndexSource, entry_of_batch
from lightning_reg.engine.data.loaders import find_source
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.data.indices import BatchIndices
    from lightning_reg.engine.data.mixing import Mixing
    from lightning_reg.engine.data.views import Views
    from lightning_reg.engine.host.owner import Owner

__all__ = ["EvaluationStep", "Samples", "Stage", "Step"]

Stage = Literal["train", "validate", "test", "predict"]


class Samples(NamedTuple):
    """Dataset indices of a batch.

    Attributes:
        indices: ``(B,)`` int64.
        distinct: Whether they are known to be distinct (known on the host, so asking costs no sync).
        capacity: Nominal batch size of the loader, the same on all ranks; ``None`` if not known.
        size: Length of the dataset; ``None`` if not known.

    """

    indices: Tensor
    distinct: bool
    capacity: int | None
    size: int | None

    def total(self, owner: str, num_samples: int | None) -> int:
        """How many training samples a table has a row for.

        Args:
            owner: Name of the technique, for the error.
            num_samples: What its argument of this name says; ``None`` for the length of the dataset.

        Returns:
            The number.

        Raises:
            MisconfigurationException: If neither says it.

        """
        total = num_samples or self.size
        if total is None:
            raise MisconfigurationException(
                f"{owner}: the indices come from `reduce_loss`, so the number of training samples is not known. Write"
                f" `{owner}(num_samples=...)`."
            )
        return total


class Step:
    """One call of the user's ``training_step``; of another step for those that act in evaluation.

    Args:
        trainer: The Trainer.
        module: The user's module.
        batch: What ``training_step`` gets (after the techniques' batch transforms), without further views.
        followed: Indices of the batch from each followed loader, by the loader's key; the only one's key is "".
        several: Whether the batch is a mapping or sequence of batches from several loaders.
        arguments: What ``training_step`` gets besides the batch.

    Attributes:
        stage: What the step is for.
        features: Outputs of the observed layers, by name; filled while the forward pass runs.
        passes: The same for layers that are passed several times: all outputs in order.
        views: The batch joined with its further views, which is what ``training_step`` gets; ``None`` without views.
        mixing: How the samples of the batch were mixed, ``None`` if they were not. A batch is mixed once: a technique
            that mixes leaves a batch alone that another one has mixed already.
        several: Whether the batch is a mapping or sequence of batches from several loaders.
        notes: What techniques keep for the later phases of this step, by technique.
        active: The techniques that take part in it.
        network: Runs the user's ``training_step`` on a batch.
        call_changes: What parts make of each loss call, with gradient or without, before techniques work on it; by the
            technique whose part it is.
        add_terms: Joins terms of the step with a loss that the user's code hands over, under manual optimization.
        alone: Whether the loss of the step is one technique's own term, and the user's has no effect.
        resting: The techniques whose work on the loss rests, and what they train of their own.
        frozen_own: The techniques of which that alone rests, what they train of their own.
        feature_view: What is kept of the output of an observed layer.
        output: What ``training_step`` has returned.
        made_loss: Whether it made a loss, as far as that is known when it has returned.

    """

    stage: Stage = "train"

    def __init__(
        self,
        trainer: "Trainer",
        module: "LightningModule",
        batch: Any,
        followed: "Mapping[str, tuple[IndexSource, BatchIndices | None]]",
        several: bool,
        arguments: "Sequence[Any]" = (),
    ) -> None:
        self.trainer, self.module, self.batch = trainer, module, batch
        self.arguments = arguments
        self.features: dict[str, Any] = {}
        self.passes: dict[str, list[Any]] = {}
        self.views: Views | None = None
        self.mixing: Mixing | None = None
        self.several = several
        self.notes: dict[Owner, Any] = {}
        self.scalars: dict[str, Tensor] = {}
        self.active: Sequence[Owner] = ()
        self.alone = False
        self.resting: Sequence[Owner] = ()
        self.frozen_own: Sequence[Owner] = ()
        self.network: Callable[[Any], Any] = _no_network
        self.call_changes: dict[Owner, Callable[[Any], Any]] = {}
        self.add_terms: Callable[[Tensor], Tensor] = _no_terms
        self.feature_view: Callable[[Any], Any] | None = None
        self.output: Any = None
        self.made_loss = False
        self._followed = followed

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.trainer.current_epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps finished."""
        return self.trainer.global_step

    @property
    def batches_so_far(self) -> int:
        """Batches begun since the start of training, over resumes, this one included."""
        return host.batches_so_far(self.trainer)

    @property
    def stream(self) -> str:
        """Tells the random draws of other networks' steps from those of the user's, which have none."""
        return ""

    @property
    def mixer(self) -> "Owner | None":
        """The technique whose mixing has to be followed by the loss; ``None`` if there is nothing to follow."""
        return None if self.mixing is None or self.mixing.in_targets else self.mixing.by

    @cached_property
    def is_logging(self) -> bool:
        """Whether scalars are wanted from this step; compute what is only for the log if so."""
        return host.is_logging_step(self.trainer)

    def log(self, technique: "Owner", name: str, value: Tensor) -> None:
        """Logs a scalar under the technique's key.

        Args:
            technique: Whose it is.
            name: Its name, behind ``reg/<key>/``.
            value: A scalar on any device; not read before Lightning does.

        """
        self.scalars[f"{technique.log_key}/{name}"] = value.detach()

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Number of samples of the batch: one number, or one for each of several loaders; empty if it is not known."""
        if self.several:
            batches = self.batch.values() if isinstance(self.batch, Mapping) else self.batch
            sizes = [_agreed_size(batch) for batch in batches]
            return tuple(dict.fromkeys(size for size in sizes if size is not None))
        drawn = [indices for _, indices in self._followed.values() if indices is not None]
        size = len(drawn[0].list) if drawn else _agreed_size(self.batch)
        return () if size is None else (size,)

    def may_have(self, rows: int) -> bool:
        """Whether a batch of so many samples is possible: its size is a guess, and a tensor of it has as many rows.

        Queries and their documents, more of these, are such a batch.

        Args:
            rows: The number.

        Returns:
            Whether it is possible.

        """
        if self.several or any(indices is not None for _, indices in self._followed.values()):
            return False
        return any(leaf.shape[:1] == (rows,) for leaf in tensors_of(self.batch))

    @property
    def has_samples_second(self) -> bool:
        """Whether all tensors of the batch seem to come with time first; ``False`` if its indices say its size.

        To be asked in the first step, whose batch is full: it is the loader's batch size that is found in second place.
        """
        capacity, size = self.capacity, self.batch_sizes[0]
        drawn = any(indices is not None for _, indices in self._followed.values())
        if drawn or capacity is None or size == capacity:
            return False
        return all(one.shape[:2] == (size, capacity) for one in tensors_of(self.batch) if one.shape[:1] == (size,))

    @property
    def given_batch(self) -> Any:
        """What ``training_step`` gets: the batch, joined with its views if there are any."""
        return self.batch if self.views is None else self.views.batch

    @property
    def capacity(self) -> int | None:
        """Most samples of a batch, the same on all ranks; ``None`` if it is not known or there are several loaders."""
        return None if self.several else host.nominal_batch_size(self.trainer)

    def parts(self, size: int) -> "Iterator[Step]":
        """Steps with a few samples of the batch each; the step itself if its samples cannot be told apart.

        Args:
            size: Most samples of a part. Parts are as equal as they can be: from 3 on none is of one sample, unless the
                batch is.

        Returns:
            Steps for a :class:`Peer` to see, without indices.

        """
        whole = 0 if self.several or len(self.batch_sizes) != 1 else self.batch_sizes[0]
        count = -(-whole // size)
        ends = [whole * part // max(count, 1) for part in range(count + 1)]
        cuts = [slice(start, end) for start, end in pairwise(ends)]
        batches = [samples_of(self.batch, whole, cut) for cut in cuts]
        if not batches or batches[0] is None:
            return iter([self])
        steps = [Step(self.trainer, self.module, batch, {}, False, self.arguments) for batch in batches]
        for step, cut in zip(steps, cuts, strict=True):
            step.batch_sizes = (cut.stop - cut.start,)
        return iter(steps)

    def samples(self, technique: "Owner", device: torch.device, given: Tensor | None = None) -> Samples:
        """Dataset indices of the batch, where the technique's arguments say they are.

        Args:
            technique: Who asks.
            device: Where to.
            given: Indices that the user's code gave, which count if there are any.

        Returns:
            Indices ``(B,)``, and what is known about them on the host.

        """
        if given is not None:
            return Samples(given.to(device).long(), False, None, None)
        if technique.index_key is not None:
            return Samples(entry_of_batch(self.batch, technique.index_key).to(device), False, None, None)
        source, drawn = find_source(technique, self._followed)
        drawn = drawn or source.missing()
        return Samples(drawn.host.to(device, non_blocking=True), drawn.distinct, source.capacity, source.size)


class EvaluationStep(Step):
    """One call of the user's ``validation_step``, ``test_step`` or ``predict_step``.

    Args:
        trainer: The Trainer.
        module: The user's module.
        arguments: What the step gets: the batch, its position, the loader's position.
        stage: What the step is for.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", arguments: "Sequence[Any]", stage: Stage) -> None:
        super().__init__(trainer, module, arguments[0] if arguments else None, {}, False, arguments[1:])
        self.stage = stage

    @cached_property
    @override
    def is_logging(self) -> bool:
        """Whether Lightning takes scalars there: in validation and test, of every batch."""
        return self.stage != "predict"

    @override
    def log(self, technique: "Owner", name: str, value: Tensor) -> None:
        """Logs a scalar, whose mean over the samples stands behind ``reg/<key>/<stage>_``."""
        if self.is_logging:
            super().log(technique, f"{self.stage}_{name}", value)

    @property
    @override
    def stream(self) -> str:
        return f" {self.stage} {' '.join(map(str, self.arguments))}"


def _agreed_size(batch: Any) -> int | None:
    """The first dimension that most tensors of a batch share."""
    sizes = Counter(leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    common = sizes.most_common(2)
    if not common or (len(common) == 2 and common[0][1] == common[1][1]):
        return None
    return common[0][0]


def _no_terms(loss: Tensor) -> Tensor:
    return loss


def _no_network(batch: Any) -> Any:
    raise NotImplementedError
