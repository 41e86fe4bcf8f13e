"""A layer, a method or a function of the user's, called by its name with other inputs and with gradient."""

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.networks.sight import beside_the_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["call_named", "check_named"]


def call_named(technique: "Technique", step: "Step", name: str, argument: str, *inputs: Any) -> Tensor:
    """Calls what the user named, beside the step, with gradient.

    Nothing is logged; buffers (statistics of batch norm), metrics and random states are put back, and what is drawn
    (dropout) depends on the technique's seed, the rank and the count of batches. Effective weights and edited layers
    are those of the step.

    Args:
        technique: Who calls.
        step: The present step.
        name: A layer or method of the module (``"item_tower"``, ``"model.encode"``), called with ``inputs``; or where a
            function can be imported from (``"my_project.encode"``), called with the module and ``inputs``.
        argument: The technique's argument that names it, for the error.
        inputs: On the module's device.

    Returns:
        Its tensor.

    Raises:
        MisconfigurationException: If there is none, or it returns something else.

    """
    function, takes_module = _found(technique, step.trainer, step.module, name, argument)
    with beside_the_step(technique, step, f"call {name}"):
        output = function(step.module, *inputs) if takes_module else function(*inputs)
    if not isinstance(output, Tensor):
        raise MisconfigurationException(
            f"{type(technique).__name__}({argument}={name!r}) returned {type(output).__name__}, where a tensor is"
            " needed. Write a method of the module that returns one."
        )
    return output


def check_named(
    technique: "Technique", trainer: "Trainer", module: "LightningModule", name: str, argument: str
) -> None:
    """Tells when the fit starts that there is nothing of the name."""
    _found(technique, trainer, module, name, argument)


def _found(
    technique: "Technique", trainer: "Trainer", module: "LightningModule", name: str, argument: str
) -> tuple[Any, bool]:
    """What is called, and whether it takes the module first."""
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        return user_function(name, trainer, module, f"{type(technique).__name__}({argument}=...)"), "." in name
    if not callable(found):
        raise MisconfigurationException(
            f"{type(technique).__name__}({argument}={name!r}) names a {type(found).__name__} of"
            f" {type(module).__name__}, where a layer or a method is needed."
        )
    return found, False
