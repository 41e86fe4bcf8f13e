"""As little of a graph as tells loss calls with a gradient from those without: a pass whose gradient nobody wants."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_reg.engine.host.autograd import nearest_leaf

if TYPE_CHECKING:
    from lightning_reg.engine.networks.sight import SeenCall

__all__ = ["LeastGraph"]


class LeastGraph:
    """From which parameters a network's graph has to begin, learned from passes with all of it.

    For each call with a gradient the parameter next before it is enough, mostly the bias of a head: the network up to
    there runs without a graph, and torch's transformer layers have their faster way. A pass is right if each of its
    calls has a gradient, for a part of the graph shows none that the whole one would not. Else it is made once more
    with the whole graph, which also tells where to begin from then on. In a ``training_step`` that calls a loss
    function without a gradient the whole graph stays: nothing less would tell whether one has come.
    """

    def __init__(self) -> None:
        self._begins: dict[str, frozenset[str] | None] = {}

    def of(self, method: str) -> frozenset[str] | None:
        """Names of parameters with which a pass may be tried.

        Args:
            method: Of the module, which runs.

        Returns:
            The names; ``None`` for all parameters.

        """
        return self._begins.get(method)

    def is_enough(self, seen: "SeenCall", loss: Tensor | None) -> bool:
        """Whether a pass with less than the whole graph has told everything.

        Args:
            seen: The calls of the pass.
            loss: What it returned.

        Returns:
            Whether each call, and the loss, has a gradient.

        """
        return not seen.without_gradient and (loss is None or loss.requires_grad)

    def learn(self, method: str, seen: "SeenCall", loss: Tensor | None, parameters: Mapping[str, Tensor]) -> None:
        """Takes from a pass with the whole graph where the next one can begin.

        Args:
            method: Which ran.
            seen: The calls of the pass, being watched still.
            loss: What it returned.
            parameters: Those it ran with, by name.

        """
        if method in self._begins and self._begins[method] is None:
            return
        known = self._begins.get(method) or frozenset()
        names = known | _before(seen.with_gradient or ([] if loss is None else [loss]), parameters)
        failed = method in self._begins and names == known
        self._begins[method] = None if failed or not self.is_enough(seen, loss) else names


def _before(values: Iterable[Tensor], parameters: Mapping[str, Tensor]) -> set[str]:
    leaves = {id(leaf) for value in values if (leaf := nearest_leaf(value)) is not None}
    return {name for name, parameter in parameters.items() if id(parameter) in leaves}
