"""First weights of a second network: drawn anew, as the layers draw theirs."""

import torch
from torch import nn

from lightning_reg.engine.host.generators import own_randomness
from lightning_reg.engine.host.modules import reset_of
from lightning_reg.engine.networks.named_weights import weights_of

__all__ = ["reset_parameters_"]


def reset_parameters_(module: nn.Module, seed: int) -> list[str]:
    """New initial weights from the layers' own ``reset_parameters``, in place; what is frozen stays as it is.

    Args:
        module: What gets them. Inner layers come first, so that a network which defines ``reset_parameters`` itself
            has the last word.
        seed: Seed of the draws; the global random states stay as they are.

    Returns:
        Names of the trained parameters that no layer could draw anew.

    """
    kept = []
    frozen = {name: value.clone() for name, value in weights_of(module).items() if name in _frozen_names(module)}
    with own_randomness(seed), torch.no_grad():
        for name, layer in reversed(list(module.named_modules())):
            reset = reset_of(layer)
            if callable(reset):
                reset()
            else:
                own = layer.named_parameters(recurse=False)
                kept += [f"{name}.{key}".lstrip(".") for key, p in own if p.requires_grad]
        now = weights_of(module)
        for name, value in frozen.items():
            now[name].copy_(value)
    return kept[::-1]


def _frozen_names(module: nn.Module) -> set[str]:
    """Names of parameters that are not trained, and of buffers of layers that have parameters, none of them trained."""
    names = {name for name, p in module.named_parameters() if not p.requires_grad}
    for prefix, layer in module.named_modules():
        trained = [p.requires_grad for p in layer.parameters()]
        if trained and not any(trained):
            names |= {name for name, _ in layer.named_buffers(prefix)}
    return names
