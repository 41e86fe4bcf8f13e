"""What the head gets of the training data: one pass in evaluation mode, with what others change of layers there."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.procedures import left_as_found
from lightning_reg.engine.layers.edits import InputCall, LayerEdit, LayerEdits
from lightning_reg.engine.layers.embeddings import class_numbers
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.layer_parts import edits_of
from lightning_reg.engine.run.part import Part
from lightning_reg.engine.run.passes import replay_step
from lightning_reg.engine.run.phases import OnBatch, OnLayers, taking_part
from lightning_reg.engine.run.watching import counted, progress
from lightning_reg.engine.step import EvaluationStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.distributed import ProcessGroup

    from lightning_reg.engine.run.phases import Member
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["HeadInputs"]


class HeadInputs(Part):
    """Looks at the training data when its owner asks for it, before the step that it is asked in.

    Weights are those that the step runs with, sparse ones for example. The hooks are on the layers from the start of
    the fit, so that compiled networks know them.

    Args:
        trainer: The Trainer.
        module: The user's module.
        owner: Whose part it is.
        head: Name of the layer whose input is wanted.
        label_key: Entry of the batch with class numbers; ``None`` if they are not wanted.
        is_due: Whether the pass is to be done in this step.
        give: Takes, in that step, the inputs ``(N, D)`` of all ranks, on the CPU, which classes occur, and how many
            batches this rank has.

    """

    def __init__(
        self,
        trainer: "Trainer",
        module: "LightningModule",
        owner: "Technique",
        head: str,
        label_key: str | None,
        is_due: "Callable[[Step], bool]",
        give: "Callable[[Step, Tensor, list[int], int], None]",
    ) -> None:
        self._trainer, self._module, self._owner = trainer, module, owner
        self._head, self._label_key, self._is_due, self._give = head, label_key, is_due, give
        self._edits = LayerEdits(module, ())
        self._acting: Sequence[Member] = ()
        self._on_batch: Sequence[OnBatch] = ()
        self._rows: list[Tensor] = []

    @override
    def prepare(self) -> None:
        self._acting = acting = [t for t in attached_engine(self._trainer).techniques if "validate" in t.stages]
        self._on_batch = taking_part(acting, OnBatch, "transform_batch")
        look = LayerEdit(self._owner, [self._head], self._keep, of_inputs=True)
        edits = [*edits_of(taking_part(acting, OnLayers), self._module), look]
        self._edits = LayerEdits(self._module, edits, training=False)

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        if self._owner in step.active and self._is_due(step):
            self._give(step, *self._looked())
        yield

    @override
    def close(self) -> None:
        self._edits.close()
        self._rows = []

    def _keep(self, call: InputCall) -> None:
        rows = call.input
        if not isinstance(rows, Tensor) or rows.dim() != 2:
            found = f"a tensor {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise MisconfigurationException(
                f"{type(self._owner).__name__}(head={self._head!r}) must name a layer that gets a row of features for"
                f" each sample, (B, D), found {found}. Name the classifier itself."
            )
        self._rows.append(rows.detach().float().cpu())

    def _looked(self) -> tuple[Tensor, list[int], int]:
        trainer, total = self._trainer, self._trainer.num_training_batches
        what = f"{type(self._owner).__name__}: features"
        seen: set[int] = set()
        number = 0
        with (
            left_as_found(self._module),
            attached_engine(trainer).training_batches() as batches,
            progress(trainer, what, None if total == math.inf else total) as advance,
        ):
            self._module.eval()
            for batch in counted(batches, advance):
                seen |= self._look_at(batch, number)
                number += 1
        rows, self._rows = self._rows, []
        if not rows:
            raise MisconfigurationException(
                f"{type(self._owner).__name__}: the training data give no batch when they are read once more. Let them"
                " start anew with each `iter` of the DataLoader."
            )
        group = host.data_parallel_group(trainer)
        device = self._module.device
        every = _of_all_ranks(torch.cat(rows).to(device), group).cpu()
        classes, there = distributed.all_gather_padded(torch.tensor(sorted(seen), device=device).long(), group)
        return every, sorted(set(classes[there].tolist())), number

    def _look_at(self, batch: Any, number: int) -> set[int]:
        """Runs the step on a batch, and returns the classes that occur in it."""
        step = EvaluationStep(self._trainer, self._module, (batch, number), "validate")
        step.active = [*(t for t in self._acting if t.is_active(step)), self._owner]
        for technique in [technique for technique in self._on_batch if technique in step.active]:
            step.batch = technique.transform_batch(step.batch, step)
        self._edits.open(step)
        try:
            replay_step(self._trainer, self._module, step.batch, number)
        finally:
            self._edits.shut()
            self._edits.rest()
        self._edits.check(step)
        if self._label_key is None:
            return set()
        return set(class_numbers(self._owner, step, self._label_key).tolist())


def _of_all_ranks(rows: Tensor, group: "ProcessGroup | None") -> Tensor:
    """In turn from each rank, as torch's sampler has dealt them."""
    if group is None:
        return rows
    gathered, there, _ = distributed.all_gather_rows(rows, group)
    turns = torch.arange(len(gathered), device=rows.device).view(distributed.world_size(group), -1).T.flatten()
    return gathered[turns][there[turns]]
