"""Fits of a network that ``fully_shard`` (FSDP2) splits over two processes, and the same under DDP."""

import warnings
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from tests.conformance.harness import Model, fit
from tests.conformance.problems import KINDS
from tests.conformance.references import REFERENCES

__all__ = ["on_ranks"]


class Sharded(Model):
    """The user's module, whose network is split over the processes."""

    @override
    def configure_model(self) -> None:
        if not any(isinstance(p, DTensor) for p in self.parameters()):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def on_ranks(name: str, *, sharded: bool) -> dict[str, Tensor] | str:
    """What this rank has after a fit beside a reference technique.

    Args:
        name: Of the reference; another name for none.
        sharded: Whether ``fully_shard`` splits the network, or DDP copies it.

    Returns:
        The whole weights by name, or the sentence of a refusal.

    """
    model, problem = None, KINDS["classification"]
    options: dict[str, Any] = {"strategy": "ddp"}
    if sharded:
        options = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
        model = Sharded(problem, 0.05, manual=False, fail=None)
    options |= {"devices": 2, "size": 32, "max_epochs": 2, "use_distributed_sampler": False, "limit_val_batches": 0}
    techniques = [case.make() for case in REFERENCES if case.cls.__name__ == name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # in a worker process pytest does not see to it
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            run = fit(techniques, problem, ranks=(dist.get_rank(), 2), model=model, **options)
    except MisconfigurationException as error:
        return str(error)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in run.model.named_parameters()}
    return {name: value.detach().clone() for name, value in whole.items()}
