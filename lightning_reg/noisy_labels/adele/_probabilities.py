"""The class probabilities of training images once a fit is over, batch by batch."""

from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.networks.records import check_fetched_twice
from lightning_reg.engine.run.passes import ordered_batches
from lightning_reg.engine.step import Step
from lightning_reg.noisy_labels.adele._predictions import MOVING, seen
from lightning_reg.noisy_labels.adele._settings import Settings
from lightning_reg.noisy_labels.adele._store import store_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["probabilities_of"]


def probabilities_of(
    trainer: "Trainer", owner: Settings, loader: DataLoader[Any], num_samples: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and probabilities of each batch; refuses what has none.

    Args:
        trainer: The one that has fitted.
        owner: For its arguments.
        loader: Of the training dataset.
        num_samples: How many samples masks are kept for, ``None`` where there are none.

    Returns:
        What :meth:`ADELE.pred_probs` gives.

    Raises:
        RuntimeError: If nothing was trained yet.
        TypeError: If the loader is no DataLoader that draws batches by index.
        ValueError: If its dataset has another number of samples.
        MisconfigurationException: If what masks are judged by is not kept.

    """
    if num_samples is None or trainer.lightning_module is None:
        raise RuntimeError("ADELE: there are no probabilities yet; fit first, with the Trainer that is given.")
    if owner.predict == "train":
        raise MisconfigurationException(
            'ADELE: with predict="train" masks are judged by what the steps predict while they train, which is not'
            ' kept. Write predict="eval" to have probabilities.'
        )
    given: object = loader
    if not isinstance(given, DataLoader) or isinstance(given.dataset, IterableDataset) or given.batch_sampler is None:
        raise TypeError(
            f"ADELE: `loader` must be a DataLoader that draws batches by index, got {type(given).__name__}."
        )
    found = len(given.dataset) if isinstance(given.dataset, Sized) else num_samples
    if owner.num_samples is None and found != num_samples:
        raise ValueError(
            f"ADELE: `loader` must be one of the training dataset with its {num_samples} samples, got {found}."
        )
    return _pass(trainer, owner, loader)


def _pass(trainer: "Trainer", owner: Settings, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    module, store = trainer.lightning_module, store_of(owner, loader)
    peer = Peer(module, layers=[owner.layer] if owner.layer else [], owner=owner)
    peer.module.to(trainer.strategy.root_device)  # where batches go; the module itself is on the CPU after a fit
    whole, one_by_one = (None, False) if store is None else (store.dataset, store.size is not None)
    arguments = (0,)[: host.arguments_of_training_step(module) - 1]
    passes = ordered_batches(trainer, loader, len(loader), "train", whole, one_by_one=one_by_one)
    with passes as (drawn, twice, batches):
        one, two = (Step(trainer, module, batch, {}, False, arguments) for batch in twice())
        check_fetched_twice(one, two, MOVING)
        for indices, batch in zip(drawn, batches, strict=True):
            step = Step(trainer, module, batch, {}, False, arguments)
            step.batch_sizes = (len(indices),)
            yield torch.tensor(indices), seen(step, owner, peer)[1].cpu()
