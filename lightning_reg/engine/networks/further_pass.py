"""The user's ``training_step`` once more in a step, on another batch and with gradient: other views, other scales."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import version_of
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.result import loss_of
from lightning_reg.engine.loss.watch import Interception
from lightning_reg.engine.networks.peer import check_runs_on_copy
from lightning_reg.engine.networks.sight import SeenCall, Sight, beside_the_step
from lightning_reg.engine.run.step_parts import observed_as_before
from lightning_reg.engine.step import Step
from lightning_reg.engine.weights.strategies import check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.technique import Technique

__all__ = ["check_runs_again", "run_step"]

# From one step to the next, as long as the Trainer lives: what watches learns which way is the cheapest.
_INTERCEPTIONS: "WeakKeyDictionary[Trainer, Interception]" = WeakKeyDictionary()


def check_runs_again(technique: "Technique", trainer: "Trainer", module: "LightningModule") -> None:
    """Refuses a setup in which :func:`run_step` could not run; to be asked in :meth:`Technique.check`.

    Args:
        technique: Who wants to run it.
        trainer: The Trainer.
        module: The user's module.

    Raises:
        MisconfigurationException: If ``training_step`` fetches batches or trains by itself, or the strategy splits
            parameters.

    """
    check_runs_on_copy(module, technique, "once more in each step")
    check_whole(technique, trainer, "runs the network once more in each step, with")


def run_step(
    step: "Step", technique: "Technique", batch: Any, *, layers: Sequence[str] = (), norms_follow: bool = False
) -> Sight:
    """Runs the user's ``training_step`` once more, on another batch and with gradient.

    For techniques that say so by ``runs_again``. To be called in a phase on the loss, while the user's own step is
    under way: edited weights and edited layers are those of the step, and under DDP the pass belongs to the same
    forward. Else nobody notices: nothing is logged, metrics, random states and what is observed of layers are put back,
    other techniques do not act on its loss. What ``training_step`` keeps on the module (``self.last_logits``) is that
    of the last pass.

    Args:
        step: The present step.
        technique: Whose ``loss`` chooses the call, and whose seed the pass draws from.
        batch: A batch of the structure of ``step.batch`` with as many samples, on its device.
        layers: Names of layers whose outputs are wanted, of the technique's ``feature_layers``.
        norms_follow: Whether the running statistics of batch norm count the pass too; other buffers are put back.

    Returns:
        The loss call of the pass and the outputs of the layers, with gradient.

    Raises:
        MisconfigurationException: If the loss call of the pass is not certain, there is none, a layer has not run, or
            ``training_step`` changes its batch in place.

    """
    name, trainer, module = type(technique).__name__, step.trainer, step.module
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    versions = [version_of(tensor) for tensor in tensors]
    again = Step(trainer, module, batch, {}, step.several, step.arguments)
    again.batch_sizes = step.batch_sizes
    seen = SeenCall(module, _interception(trainer, module))
    with ExitStack() as undo:
        undo.enter_context(beside_the_step(technique, step, "pass", norms_follow=norms_follow))
        undo.enter_context(observed_as_before(step))
        undo.enter_context(seen.watch(again, technique, gradient=True))
        step.passes.clear()
        loss = loss_of(module.training_step(batch, *step.arguments))
        features = {layer: step.passes[layer][-1] for layer in layers if layer in step.passes}
    if versions != [version_of(tensor) for tensor in tensors]:
        raise MisconfigurationException(
            f"{name}: {type(module).__name__}.training_step changes its batch in place, and runs once more on what may"
            " be the same tensors. Write `x = x + noise` for `x += noise`."
        )
    call = seen.chosen()
    _check_found(name, call, [layer for layer in layers if layer not in features])
    return Sight(call, features, made_loss=loss is not None and loss.requires_grad)


def _interception(trainer: "Trainer", module: "LightningModule") -> Interception:
    if trainer not in _INTERCEPTIONS:
        _INTERCEPTIONS[trainer] = Interception(compiled=host.is_compiled(module))
    return _INTERCEPTIONS[trainer]


def _check_found(name: str, call: "LossCall | None", missing: list[str]) -> None:
    if call is None:
        raise MisconfigurationException(
            f"{name} ran `training_step` once more on another version of the batch, and saw no loss call there, unlike"
            " in the step itself. It must not depend on anything but the batch whether a loss is computed."
        )
    if missing:
        raise MisconfigurationException(
            f"{name} ran `training_step` once more on another version of the batch, and the layer {missing[0]!r} did"
            " not run there. Name a layer that runs in every step."
        )
