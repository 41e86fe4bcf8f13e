"""What fine-tuning trains as it is, and which weights it can write into."""

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from typing import Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.host.names import Patterns, matches
from lightning_reg.engine.technique import WeightMapTechnique
from lightning_reg.engine.weights.summed import all_names, summed_weights
from lightning_reg.engine.weights.swap import named_weights

__all__ = ["FineTuning", "check_plain", "trained_as_they_are"]


class FineTuning(WeightMapTechnique, ABC):
    """Trains through a map while all other weights are frozen, but for those that ``train`` names."""

    layers: Patterns
    train: Patterns
    exclude: Patterns
    save: Literal["full", "delta"]
    rest_norms: bool
    _left: dict[str, list[str]]  # names of weights that are left alone, by the reason
    _sizes: str  # of what was chosen, for the table

    @override
    @abstractmethod
    def weights_to_map(self, module: nn.Module) -> Sequence[str]: ...

    def choose_numbers(self, module: nn.Module, verb: str) -> list[str]:
        """Names of the weights that are mapped number by number; notes what is left alone, and how many there are.

        Args:
            module: The user's module.
            verb: What is done with them, for messages.

        Returns:
            As in ``named_parameters()``.

        Raises:
            MisconfigurationException: If a pattern matches nothing, or a weight is quantised.

        """
        trained, weights = trained_as_they_are(self, module, self.train), named_weights(module)
        names, self._left = summed_weights(self, module, self.layers, self.exclude, verb, any_matrix=True)
        chosen = [name for name in names if name not in trained]
        check_plain(self, module, chosen)
        size = sum(weights[name].numel() for name in chosen)
        frozen = len(weights.keys() - trained - set(chosen))
        self._sizes = (
            f"{len(chosen)} weights of {size:,} numbers; {len(trained)} parameters as they are, {frozen} frozen"
            f"{self.norms_said(module, trained)}"
        )
        return chosen

    def norms_said(self, module: nn.Module, trained: Set[str]) -> str:
        """How many layers of batch norm rest, for the table; nothing where none does.

        Args:
            module: The user's module.
            trained: Names of the parameters that are trained as they are.

        Returns:
            To follow the sizes.

        """
        beside = {id(p) for name, p in named_weights(module).items() if name in trained}
        norms = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
        resting = sum(not any(id(p) in beside for p in norm.parameters(recurse=False)) for norm in norms)
        return f", {resting} batch norms in evaluation mode" if resting and self.rest_norms else ""

    @property
    @override
    def norms_rest(self) -> bool:
        return self.rest_norms

    @property
    @override
    def saves_delta(self) -> bool:
        return self.save == "delta"

    @override
    def weights_to_freeze(self, module: nn.Module) -> Sequence[str]:
        trained = trained_as_they_are(self, module, self.train)
        return [name for name in named_weights(module) if name not in trained]


def trained_as_they_are(owner: object, module: nn.Module, patterns: Patterns) -> set[str]:
    """Names of the parameters that are trained as they are.

    Args:
        owner: Who asks, with the argument ``train``; its class is named in messages.
        module: The user's module.
        patterns: Patterns of names of parameters, and of layers that hold them.

    Returns:
        As in ``named_parameters()``.

    Raises:
        MisconfigurationException: If a pattern matches nothing.

    """
    names = all_names(module)
    check_patterns(owner, "train", patterns, sorted(set().union(*names.values())), "layer with parameters")
    return {name for name, also in names.items() if any(matches(one, patterns) for one in also)}


def check_plain(owner: object, module: nn.Module, names: Sequence[str]) -> None:
    """Refuses weights that are no plain tensors of floating point.

    Args:
        owner: Who asks; its class is named in messages.
        module: The user's module.
        names: Names of the weights.

    Raises:
        MisconfigurationException: If a weight is quantised.

    """
    weights, layers = named_weights(module), dict(module.named_modules())
    for name in names:
        weight = weights[name]
        if not weight.is_floating_point() or type(weight.data) is not Tensor:
            layer, kind = type(layers.get(name.rpartition(".")[0], module)).__name__, type(weight.data)
            said = "" if kind is Tensor else f" but {kind.__name__}"
            raise MisconfigurationException(
                f"{type(owner).__name__}: {name!r} of {layer} is quantised, or no plain tensor{said}, and what is added"
                " to it cannot be written into it. Exclude it, or train it with PEFT."
            )
