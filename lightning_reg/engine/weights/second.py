"""Gradients of a second loss at weights, beside those of the loss that is trained with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import hides_layers
from lightning_reg.engine.host.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["second_gradients"]


def second_gradients(
    loss: Tensor, weights: Mapping[str, nn.Parameter], trainer: "Trainer", owner: object
) -> dict[str, Tensor]:
    """Goes back through the network once more; to be asked while the graph of the step is there.

    Where batches are accumulated it is divided as Lightning divides the loss of the step. In half precision it goes
    back as large as that, and comes unscaled. Nothing is added to any ``.grad``, and DDP does not notice.

    Args:
        loss: The second loss, a scalar with gradient.
        weights: Where gradients are wanted, by name; those that need none are left out.
        trainer: The Trainer that fits.
        owner: Who asks; its class is named in messages.

    Returns:
        Float32 at least, by name; of weights that the loss goes by.

    Raises:
        MisconfigurationException: If there is no way back a second time.
        RuntimeError: If torch finds another reason not to go back.

    """
    wanted = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not wanted or not loss.requires_grad:
        return {}
    scaled, scale = host.scaled_as_loss(trainer, loss / trainer.accumulate_grad_batches)
    try:
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(scaled, list(wanted.values()), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise MisconfigurationException(
            f"{type(owner).__name__} goes back through the network twice in a step, and it was compiled for one way"
            " back. Forget what was compiled before the fit, `torch.compiler.reset()`, or write"
            " `torch._functorch.config.donated_buffer = False` before it is compiled."
        ) from error
    if any(gradient is None for gradient in found) and hides_layers(loss):
        raise MisconfigurationException(
            f"{type(owner).__name__} goes back through the network twice in a step, which checkpoints with"
            " use_reentrant=True do not allow. Write use_reentrant=False."
        )
    gradients = {name: g.to(torch.promote_types(g.dtype, torch.float32)) for name, g in _dense(wanted, found).items()}
    return gradients if scale is None else {name: gradient / scale for name, gradient in gradients.items()}


def _dense(weights: Mapping[str, nn.Parameter], found: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    pairs = [(name, g) for name, g in zip(weights, found, strict=True) if g is not None]
    return {name: g.to_dense() if g.is_sparse else g for name, g in pairs}
