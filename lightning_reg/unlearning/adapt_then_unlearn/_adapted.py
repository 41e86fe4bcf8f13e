"""Adapted weights: from a file, and whether those of a state are of the same module."""

from collections.abc import Mapping

from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.weights.chosen import saved_tensors

__all__ = ["adapted_weights", "check_same_weights"]


def adapted_weights(owner: object, file: str, chosen: Mapping[str, Tensor]) -> list[Tensor]:
    """The weights of a file, for each that was chosen; others in it are left alone.

    Args:
        owner: Whose ``away_from`` it is.
        file: A checkpoint, or a ``state_dict``.
        chosen: Parameters by name.

    Returns:
        Tensors on the devices and in the types of the parameters.

    Raises:
        MisconfigurationException: If the file cannot be read, or has not all weights in the same shapes.

    """
    found = saved_tensors(owner, "away_from", file)
    for name, p in chosen.items():
        if name not in found or found[name].shape != p.shape:
            has = f"has shape {tuple(found[name].shape)}" if name in found else "is not there"
            raise MisconfigurationException(
                f"{type(owner).__name__}(away_from={file!r}): {name!r} {has}, and is of shape {tuple(p.shape)} in the"
                f" module. The file has {', '.join(map(repr, list(found)[:3]))}. It must hold the weights of this"
                " module under its own names; leave others out by `params` and `exclude`."
            )
    return [found[name].to(p.device, p.dtype) for name, p in chosen.items()]


def check_same_weights(owner: object, kept: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> None:
    """Refuses a state that is gone on with if it is of other weights.

    Args:
        owner: Whose state it is.
        kept: Tensors of the state, by name.
        chosen: Parameters by name.

    Raises:
        MisconfigurationException: If names or shapes are not the same.

    """
    ours, theirs = ({name: tuple(t.shape) for name, t in named.items()} for named in (chosen, kept))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise MisconfigurationException(
                f"{type(owner).__name__}: the state that is gone on with was of other weights: {name!r} is of shape"
                f" {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here. Write `params` and `exclude` as"
                " they were."
            )
