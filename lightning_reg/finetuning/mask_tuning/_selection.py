"""How much single weights matter to the task."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.host.distributed import average_
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.watching import counted, progress

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.technique import Technique

__all__ = ["importance"]


def importance(
    owner: "Technique", trainer: "Trainer", module: "LightningModule", names: Sequence[str], batches: int
) -> dict[str, Tensor]:
    r"""The mean of :math:`|w\,\partial L/\partial w|` over training batches, of each entry.

    Args:
        owner: Who asks; its ``loss`` chooses the loss call.
        trainer: The Trainer, whose fit begins.
        module: The user's module.
        names: Names of the weights.
        batches: How many batches are read at most.

    Returns:
        By name, float32, the same on all ranks.

    Raises:
        MisconfigurationException: If there is no batch with a loss.

    """
    if not names:
        return {}
    peer = Peer(module, owner=owner)
    named = dict(peer.module.named_parameters())
    weights = [named[name].requires_grad_() for name in names]
    sums, read = [torch.zeros_like(w, dtype=torch.float32, requires_grad=False) for w in weights], 0
    title = f"{type(owner).__name__}: weights that matter"
    with attached_engine(trainer).training_steps() as steps, progress(trainer, title, batches) as advance:
        for step in counted(islice(steps, batches), advance):
            call = peer.see(step, owner, gradient=True).call
            if call is not None:
                found = torch.autograd.grad(call.plain.sum(), weights, allow_unused=True)
                for total, weight, gradient in zip(sums, weights, found, strict=True):
                    if gradient is not None:
                        total.add_((weight.detach().float() * gradient.float()).abs())
                read += 1
    if not read:
        raise MisconfigurationException(
            f"{type(owner).__name__}(select='gradient'): no training batch gives a loss to find weights by."
        )
    average_(sums)
    return {name: total / read for name, total in zip(names, sums, strict=True)}
