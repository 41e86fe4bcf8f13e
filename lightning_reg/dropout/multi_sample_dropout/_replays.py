"""Several passes through one training step; what a backbone made in the first serves the others."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import version_of
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import isolated_randomness

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = ["Replays"]


class Replays:
    """Runs ``training_step`` several times; only the first pass logs, updates metrics and moves the global generators.

    Args:
        module: The user's module.
        backbone: The layer that runs in the first pass only, and its name.
        number: Number of passes.
        name: Who asks for it, for messages.

    """

    def __init__(self, module: "LightningModule", backbone: tuple[str, nn.Module], number: int, name: str) -> None:
        self._module, self._number, self._name = module, number, name
        self._backbone_name, self._backbone = backbone

    def run(self, once: Callable[[Any, int], Any], batch: Any) -> list[Any]:
        """All passes.

        Args:
            once: Runs ``training_step`` on a batch; its second argument is the number of the pass.
            batch: The batch; each pass gets a shallow copy, because it may be taken apart.

        Returns:
            What each pass returned.

        Raises:
            MisconfigurationException: If the backbone is not called.

        """
        outputs: list[Any] = []
        handed: list[Tensor] = []

        def keep(layer: Any, args: Any, output: Any) -> Any:  # what follows may change in place what it is given
            outputs.append(output)
            fresh = tree_map_only(Tensor, Tensor.clone, output)
            handed.extend(leaf for leaf in tree_leaves(fresh) if isinstance(leaf, Tensor))
            return fresh

        handle = self._backbone.register_forward_hook(keep)
        try:
            first = once(copy.copy(batch), 0)
        finally:
            handle.remove()
        if not outputs:
            raise MisconfigurationException(
                f"{self._name}: the backbone {self._backbone_name!r} was not called in the training step, so nothing"
                " could be kept for the other passes. Name the layer that your step calls."
            )
        passes = [first]
        changes = any(version_of(tensor) for tensor in handed)
        handed.clear()
        with self._again(outputs, Tensor.clone if changes else _same):
            passes += [once(copy.copy(batch), number) for number in range(1, self._number)]
        return passes

    @contextmanager
    def _again(self, outputs: list[Any], given: Callable[[Tensor], Tensor]) -> Iterator[None]:
        calls = 0

        def kept(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return tree_map_only(Tensor, given, outputs[(calls - 1) % len(outputs)])

        with ExitStack() as undo:
            undo.enter_context(isolated_randomness())
            undo.enter_context(host.metrics_kept(self._module))
            undo.callback(host.Replacement(self._backbone, "forward", kept).undo)
            for name in ("log", "log_dict"):
                undo.callback(host.Replacement(self._module, name, _ignore).undo)
            yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
