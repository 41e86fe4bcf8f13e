"""Batch statistics of averaged weights, estimated anew: running means and variances are not linear in the weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_reg.engine.host.distributed import all_reduce_mean

__all__ = ["reestimate_batchnorm", "tracking_layers"]


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    n: int | None = None,
    forward: Callable[[Any], Any] | None = None,
) -> int:
    r"""Sets the running statistics of batch-norm layers to their cumulative average over batches, in place.

    .. math:: \mu = \frac1n \sum_{b=1}^n \mu_b, \qquad \sigma^2 = \frac1n \sum_{b=1}^n \sigma_b^2

    The model runs in train mode without gradient; modes, momenta and everything else are put back, after an exception
    as well. Under a process group each rank uses its own batches, and the means over the ranks are kept.

    Args:
        model: Changed in place.
        loader: Training batches.
        n: Number of batches; ``None`` for all.
        forward: Runs the model on one batch; ``None`` for ``model(batch)``, or ``model(batch[0])`` if the batch is a
            tuple or list.

    Returns:
        Number of batches used; 0 without a layer that tracks statistics (then nothing is read).

    Raises:
        ValueError: If ``n`` is below 1, or the loader is empty.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> reestimate_batchnorm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        2
        >>> model.running_mean, model.running_var
        (tensor([4.]), tensor([2.]))

    """
    if n is not None and n < 1:
        raise ValueError(f"reestimate_batchnorm: `n` must be at least 1, got {n!r}.")
    layers = tracking_layers(model)
    if not layers:
        return 0
    run = forward or (lambda batch: model(batch[0] if isinstance(batch, tuple | list) else batch))
    count = 0
    with _cumulative(model, layers):
        for batch in islice(loader, n):
            run(batch)
            count += 1
    if count == 0:
        raise ValueError("reestimate_batchnorm: `loader` gave no batch, so the statistics are reset and nothing else.")
    for layer in layers:
        for name in ("running_mean", "running_var"):
            statistic = getattr(layer, name)
            statistic.copy_(all_reduce_mean(statistic))
    return count


def tracking_layers(model: nn.Module) -> list[_BatchNorm]:
    """Batch-norm layers with running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _cumulative(model: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the cumulative average
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
