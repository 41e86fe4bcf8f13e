"""How the network would do if its final mask came now: validation with hardened weights, in the middle of training."""

from typing import TYPE_CHECKING

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.run import passes as extra_passes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.sparsity._nm_network import SparseNetwork

__all__ = ["validate_hardened"]


def validate_hardened(trainer: "Trainer", module: "LightningModule", network: "SparseNetwork", log_key: str) -> None:
    """Runs the user's validation once more with hardened weights, and logs what it logs under another key.

    Args:
        trainer: A Trainer that fits, at the end of a validation.
        module: The module, with its dense weights.
        network: Its sparse weights.
        log_key: Key of the technique.

    """
    with network.hardened(module):
        metrics = extra_passes.validation_metrics(trainer)
    host.log_beside(trainer, {f"{log_key}/hard/{name}": value for name, value in metrics.items()})
