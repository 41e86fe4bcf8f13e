"""Which parameters a technique works on, and what is kept of them in a file."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.names import Patterns, is_selected, plain_name
from lightning_reg.engine.weights.swap import named_weights

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["chosen_weights", "saved_tensors"]


def chosen_weights(
    owner: object, module: nn.Module, params: Patterns, exclude: Patterns, *, frozen: bool = False
) -> dict[str, nn.Parameter]:
    """Parameters whose names match.

    Args:
        owner: Who asks; its class is named in messages.
        module: The user's module.
        params: Patterns of names as in ``named_parameters()``, one of which must match; ``None`` for all.
        exclude: Patterns, none of which may match.
        frozen: Whether parameters count that are not trained at present.

    Returns:
        Parameters by name.

    Raises:
        MisconfigurationException: If a pattern matches nothing, or no parameter is left.

    """
    weights = named_weights(module).items()
    named = {name: p for name, p in weights if p.requires_grad or (frozen and p.is_floating_point())}
    kind = "parameter" if frozen else "trainable parameter"
    check_patterns(owner, "params", params, named, kind)
    check_patterns(owner, "exclude", exclude, named, kind)
    chosen = {name: p for name, p in named.items() if is_selected(name, params, exclude)}
    if not chosen:
        raise MisconfigurationException(f"{type(owner).__name__}: `params` and `exclude` leave no {kind} to anchor.")
    return chosen


def saved_tensors(owner: object, argument: str, path: "str | Path") -> dict[str, Tensor]:
    """Tensors by name from a file: a checkpoint of Lightning, or a dictionary written with ``torch.save``.

    Args:
        owner: Who asks; its class is named in messages.
        argument: Of the owner's, which has the path.
        path: The file.

    Returns:
        The tensors on the CPU; of a checkpoint those of its ``state_dict``.

    Raises:
        MisconfigurationException: If there is no such file, or if it holds something else.

    """
    where = f"{type(owner).__name__}({argument}={str(path)!r})"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MisconfigurationException(f"{where}: there is no such file.") from error
    except Exception as error:  # torch.load raises whatever the unpickler does
        raise MisconfigurationException(
            f"{where}: the file cannot be read with `torch.load(path, weights_only=True)` ({type(error).__name__})."
            " Write it with `trainer.save_checkpoint`, or with `torch.save` of tensors by name."
        ) from error
    tensors = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise MisconfigurationException(f"{where}: the file must hold tensors by name, as a `state_dict` does.")
    return {plain_name(str(name)): value for name, value in tensors.items()}
