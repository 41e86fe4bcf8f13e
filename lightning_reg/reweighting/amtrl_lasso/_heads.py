"""The heads of the sources and of the target on the features of one state of the network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.owner import Owner
from lightning_reg.engine.networks.records import Wanted, record
from lightning_reg.reweighting.amtrl_lasso.core import head_noise, target_head

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.engine.step import Stage

__all__ = ["AsksHeads", "heads_of"]


class AsksHeads(Owner, Protocol):
    """Whose arguments say what the heads are fitted on."""

    num_tasks: int
    layer: str | None
    label_key: str | None
    num_classes: int | None
    ridge: float


def heads_of(owner: AsksHeads, trainer: "Trainer", tasks: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, float]:
    """Goes over the data in eval mode and fits the heads.

    Args:
        owner: Whose arguments say how.
        trainer: A Trainer that fits; its validation data are the target's.
        tasks: Task of each training sample, ``(N,)``.
        chosen: Training samples that the pass goes over, bool ``(N,)``.

    Returns:
        W, ``(k, M)`` float64, or ``(c k, M)`` with c outputs for each head; the target's head, ``(k,)`` or ``(c k,)``;
        the expected squared error of the latter.

    Raises:
        MisconfigurationException: If features or labels have another form, or a task has no sample in the pass.

    """
    features, labels, indices = _rows(owner, trainer, "train", chosen.nonzero().flatten().tolist())
    columns = []
    for task in range(owner.num_tasks):
        own = tasks[indices] == task
        if not own.any():
            raise MisconfigurationException(
                f"{type(owner).__name__}: a pass over the training data has no sample of task {task}, so it has no"
                " head. Give the training loader a sampler that draws all samples, or no limit of batches."
            )
        columns.append(target_head(features[own], labels[own], owner.ridge, bias=True).T.flatten())
    features, labels, _ = _rows(owner, trainer, "validate", None)
    head = target_head(features, labels, owner.ridge, bias=True).T.flatten()
    return torch.stack(columns, 1), head, head_noise(features, labels, owner.ridge, bias=True)


def _rows(
    owner: AsksHeads, trainer: "Trainer", stage: "Stage", among: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``(n, k)``, targets ``(n, c)`` and sample indices ``(n,)``."""
    name, layer, key, classes = type(owner).__name__, owner.layer or "", owner.label_key or "", owner.num_classes
    found = record(trainer, owner, Wanted([layer], [key]), stage, among=among)
    features, labels = found.features[layer].double(), found.entries[key]
    if features.dim() != 2:
        raise MisconfigurationException(
            f"{name}(layer={layer!r}) puts out {('B', *features.shape[1:])}, and heads on it need (B, k). Name the"
            " layer whose output the heads get."
        )
    if classes is not None:
        fine = not labels.is_floating_point() and labels.numel() == len(labels)
        if not fine or not bool(((labels >= 0) & (labels < classes)).all()):
            raise MisconfigurationException(
                f"{name}: the entry {key!r} must be classes (B,) from 0 to {classes - 1} with num_classes={classes},"
                f" got {labels.dtype} {('B', *labels.shape[1:])} up to {labels.max().item()}."
            )
        labels = F.one_hot(labels.flatten().long(), classes)
    return features, labels.double().view(len(labels), -1), found.indices
