"""Outputs put in place of what layers would make, without their pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.layers.named import find_layer, named_layers

__all__ = ["given_outputs"]


@contextmanager
def given_outputs(module: nn.Module, outputs: Mapping[str, Tensor], owner: str) -> Iterator[None]:
    """Layers put out these, and do not run; what observes them sees them.

    Args:
        module: What the layers are in.
        outputs: By layer, on any device.
        owner: Class to name in errors.

    Raises:
        MisconfigurationException: If a name matches no layer.

    """
    layers, replaced = (named_layers(module) if outputs else {}), []
    try:
        for name, rows in outputs.items():
            replaced.append(host.Replacement(find_layer(layers, name, owner), "forward", partial(_given, rows)))
        yield
    finally:
        for each in replaced:
            each.undo()


def _given(rows: Tensor, *args: Any, **named: Any) -> Tensor:
    # A leaf of its own, so that calls with a gradient are told apart.
    device = next((value.device for value in (*args, *named.values()) if isinstance(value, Tensor)), rows.device)
    return rows.to(device).detach().requires_grad_(torch.is_grad_enabled())
