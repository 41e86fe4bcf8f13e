"""The heads of the sources and of the target on the features of one state of the network."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import matches
from lightning_reg.engine.networks.records import Wanted, record
from lightning_reg.engine.technique import DrawTechnique
from lightning_reg.reweighting.amtrl_lasso.core import head_noise, target_head

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.engine.step import Stage

__all__ = ["OnHeads", "Snapshot", "snapshot"]


class OnHeads(DrawTechnique, ABC):
    """A technique whose arguments say where the heads of tasks come from."""

    num_tasks: int
    layer: str | None
    label_key: str | None
    target: str
    num_classes: int | None
    heads: str | None
    ridge: float

    @override
    @abstractmethod
    def describe(self) -> str:
        """What is made of the heads."""


@dataclass(frozen=True)
class Snapshot:
    """What the relevance is computed of.

    Args:
        heads: W, ``(k, M)`` float64; with several outputs per head ``(c k, M)``.
        target: Head of the target, ``(k,)`` or ``(c k,)``.
        noise: Expected squared error of the target's head.

    """

    heads: Tensor
    target: Tensor
    noise: float


def snapshot(owner: OnHeads, trainer: "Trainer", tasks: Tensor, usable: Tensor) -> Snapshot:
    """Goes over the data in eval mode and fits the heads.

    Args:
        owner: Whose arguments say how.
        trainer: A Trainer that fits.
        tasks: Task of each training sample, ``(N,)``.
        usable: Training samples whose labels may be used, bool ``(N,)``.

    Returns:
        The heads, on the CPU.

    Raises:
        MisconfigurationException: If features or labels have another form, or a task has no sample in the pass.

    """
    needs_training = owner.heads is None or owner.target == "train"
    seen = _rows(owner, trainer, "train" if needs_training else "validate")
    task = tasks[seen.indices] if needs_training else None
    if task is None:
        target = seen
    elif owner.target == "train":
        target = _of_task(owner, seen, task, owner.num_tasks)
    else:
        target = _rows(owner, trainer, "validate")
    head = target_head(target.features, target.labels, owner.ridge, bias=True)
    if owner.heads is None and task is not None:
        task = task.where(usable[seen.indices], -1)
        sources = [_of_task(owner, seen, task, m) for m in range(owner.num_tasks)]
        fitted = [target_head(of.features, of.labels, owner.ridge, bias=True) for of in sources]
        heads = torch.stack([one.T.flatten() for one in fitted], 1)
    else:
        heads = _trained(owner, trainer, head)
    noise = head_noise(target.features, target.labels, owner.ridge, bias=True)
    return Snapshot(heads, head.T.flatten(), noise)


class _Rows(NamedTuple):
    """Features ``(n, k)``, targets ``(n, c)`` and sample indices ``(n,)``."""

    features: Tensor
    labels: Tensor
    indices: Tensor


def _rows(owner: OnHeads, trainer: "Trainer", stage: "Stage") -> _Rows:
    name, layer, key = type(owner).__name__, owner.layer or "", owner.label_key or ""
    found = record(trainer, owner, Wanted([layer], [key]), stage)
    features, labels = found.features[layer], found.entries[key]
    if features.dim() != 2:
        raise MisconfigurationException(
            f"{name}(layer={layer!r}) puts out {('B', *features.shape[1:])}, and heads on it need (B, k). Name the"
            " layer whose output the heads get."
        )
    if owner.num_classes is not None:
        classes = labels.flatten()
        fine = not labels.is_floating_point() and len(classes) == len(labels)
        if not fine or not 0 <= int(classes.min()) <= int(classes.max()) < owner.num_classes:
            raise MisconfigurationException(
                f"{name}: the entry {key!r} must be classes (B,) from 0 to {owner.num_classes - 1} with"
                f" num_classes={owner.num_classes}, got {labels.dtype} {('B', *labels.shape[1:])} up to"
                f" {classes.max().item()}."
            )
        labels = F.one_hot(classes.long(), owner.num_classes)
    return _Rows(features.double(), labels.double().view(len(labels), -1), found.indices)


def _of_task(owner: OnHeads, seen: _Rows, tasks: Tensor, task: int) -> _Rows:
    rows = (tasks == task).nonzero().flatten()
    if not len(rows):
        whose = "the target" if task == owner.num_tasks else f"task {task}"
        raise MisconfigurationException(
            f"{type(owner).__name__}: a pass over the training data has no sample of {whose}, so it has no head. Give"
            " the training loader a sampler that draws all samples, or no limit of batches."
        )
    return _Rows(*(values[rows] for values in seen))


def _trained(owner: OnHeads, trainer: "Trainer", head: Tensor) -> Tensor:
    module, name = trainer.lightning_module, type(owner).__name__
    params = dict(module.named_parameters())
    rows = [p.detach().double().cpu() for key, p in params.items() if matches(key, owner.heads)]
    (k, c), count = head.shape, sum(len(p) for p in rows)
    wanted = owner.num_tasks * c
    beside = c if owner.target == "train" else 0  # a last head, the target's own
    if any(p.dim() != 2 or p.shape[1] != k for p in rows) or count not in (wanted, wanted + beside):
        shapes = ", ".join(str(tuple(p.shape)) for p in rows)
        raise MisconfigurationException(
            f"{name}(heads={owner.heads!r}) are weights of shapes {shapes}, and {owner.num_tasks} sources have"
            f" {wanted} rows of {k} numbers. Name the weights of the heads alone, without biases."
        )
    return torch.cat(rows)[:wanted].view(owner.num_tasks, c * k).T
