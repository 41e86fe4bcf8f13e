"""How weights are companded: the function of a name."""

from lightning_reg.engine.host.user_functions import imported
from lightning_reg.regularization.weight_compander.core import COMPANDINGS, Companding, companding_refusal

__all__ = ["companding"]


def companding(owner: object, fn: object, *, tried: bool = False) -> Companding:
    """The function of a name.

    Args:
        owner: Who asks; its class is named in messages.
        fn: One of ours, or the import path of a :class:`Companding`.
        tried: Whether it was asked for before, and is fine.

    Returns:
        The function.

    Raises:
        ValueError: If there is none of this name, or it is no companding.

    """
    if isinstance(fn, str) and fn in COMPANDINGS:
        return COMPANDINGS[fn]
    name = type(owner).__name__
    allowed = ", ".join(repr(choice) for choice in COMPANDINGS)
    wanted = f'must be one of {allowed}, or the import path of a Companding of your own ("my_project.functions.psi")'
    if not (isinstance(fn, str) and "." in fn):
        raise ValueError(f"{name}: `fn` {wanted}, got {fn!r}.")
    try:
        function = imported(fn)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: `fn` {wanted}, got {fn!r}: {error}.") from error
    if not isinstance(function, Companding):
        raise ValueError(f"{name}: `fn` {wanted}, got {fn!r}, which is a {type(function).__name__}.")
    wrong = "" if tried else companding_refusal(function)
    if wrong:
        raise ValueError(f"{name}: `fn`, {fn!r}, cannot compand: {wrong}.")
    return function
