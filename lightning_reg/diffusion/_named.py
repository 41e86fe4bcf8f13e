"""What callbacks on a training name in the user's module: its denoiser and its scheduler."""

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.diffusion.denoiser import Denoiser, NoiseSchedule, PredictionType
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["attribute_of", "denoiser_of"]


def denoiser_of(
    technique: Technique,
    module: "LightningModule",
    denoiser: str,
    scheduler: str,
    prediction: PredictionType,
    alphas_cumprod: Tensor | list[float] | None,
) -> Denoiser:
    """The denoiser that a module trains, with its scheduler.

    Args:
        technique: Who asks.
        module: The user's module.
        denoiser: Name of a :class:`Denoiser`, a network, or a method of x, t and condition.
        scheduler: Name of the scheduler.
        prediction: What the model predicts.
        alphas_cumprod: The noise levels where there is no scheduler.

    Returns:
        The denoiser.

    Raises:
        MisconfigurationException: If a name is that of nothing.

    """
    found = attribute_of(technique, module, "denoiser", denoiser)
    if isinstance(found, Denoiser):
        return found
    if alphas_cumprod is not None:
        schedule: Any = NoiseSchedule(torch.as_tensor(alphas_cumprod))
    else:
        schedule = attribute_of(technique, module, "scheduler", scheduler)
    return Denoiser(found, schedule, prediction).to(module.device)


def attribute_of(technique: Technique, module: "LightningModule", argument: str, name: str) -> Any:  # noqa: ANN401 # the user's own
    """What a name in the user's module stands for.

    Args:
        technique: Who asks.
        module: The user's module.
        argument: Which of its arguments.
        name: The name, dots between levels.

    Returns:
        What is there.

    Raises:
        MisconfigurationException: If there is nothing.

    """
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        hint = ", or give `alphas_cumprod`" if argument == "scheduler" else ""
        raise MisconfigurationException(
            f"{type(technique).__name__}: {argument}={name!r} names nothing in {type(module).__name__}. Write the name"
            f" of its attribute{hint}."
        ) from error
