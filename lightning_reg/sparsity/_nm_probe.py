"""Whether a network goes on computing the same on a training batch, however its steps are written."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map_only

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.lookup import ENGINES
from lightning_reg.engine.loss.result import loss_of
from lightning_reg.engine.networks.peer import check_runs_on_copy, copy_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["Probe"]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


class Probe:
    """Losses of ``training_step`` on the first batch, in train mode without dropout and in eval mode.

    In double precision, where the module's code lets it, so that rounding is none of the difference. Memory: a copy of
    the module in double precision.

    Args:
        trainer: The Trainer that starts to train.
        module: The user's module.
        owner: Whose it is; its class is named in messages.

    Raises:
        MisconfigurationException: If ``training_step`` cannot be run on a copy, or makes no loss.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", owner: object) -> None:
        check_runs_on_copy(module, owner)
        self._trainer, self._module = trainer, module
        with ENGINES[trainer].training_steps() as steps:
            step = next(steps, None)
        if step is None:
            raise MisconfigurationException(f"{type(owner).__name__}: there is no training batch to try it on.")
        self._step, self._dtype = step, torch.float64
        try:
            self._before = self._losses()
        except (RuntimeError, ValueError, TypeError):  # the user's code makes tensors of float32
            self._dtype = torch.float32
            self._before = self._losses()
        if not len(self._before):
            raise MisconfigurationException(
                f"{type(owner).__name__}: `training_step` makes no loss of the first batch, so that it cannot be tried."
            )

    def unchanged(self) -> bool:
        """Whether the module makes the same of the batch as in the beginning, on all ranks."""
        now, tolerance = self._losses(), _TOLERANCES[self._dtype]
        differs = ~torch.isclose(now, self._before, rtol=tolerance, atol=tolerance).all()
        group = host.data_parallel_group(self._trainer)
        return not bool(distributed.all_reduce_max(differs.float(), group)) if group else not bool(differs)

    def _losses(self) -> Tensor:
        losses = []
        for training in (True, False):
            twin = copy_of(self._module).to(self._dtype).train(training)
            for layer in twin.modules():
                if isinstance(layer, _DropoutNd):
                    layer.eval()
            with _running(twin, self._step, self._dtype) as batch:
                loss = loss_of(twin.training_step(batch, *self._step.arguments))
            losses += [] if loss is None else [loss.detach().double()]
        return torch.stack(losses) if losses else torch.zeros(0)


@contextmanager
def _running(twin: "LightningModule", step: "Step", dtype: torch.dtype) -> Iterator[Any]:
    def converted(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value.clone()

    with ExitStack() as undo:
        undo.enter_context(host.isolated_randomness())
        undo.enter_context(host.lent_trainer(twin, step.trainer))
        undo.enter_context(torch.no_grad())
        undo.enter_context(torch.autocast(twin.device.type, enabled=False))
        yield tree_map_only(Tensor, converted, step.batch)
