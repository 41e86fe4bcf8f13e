"""What hooks and callbacks set on the user's network between steps, and further networks take over.

Read at each step's start on the host: one flag per layer and parameter, and the lengths of the optimizer's groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.weights.ways import needs_gradient

__all__ = ["Follower", "Source", "TakenOver", "regroup_"]


@dataclass(frozen=True)
class TakenOver:
    """The settings of a network at one step's start.

    Args:
        in_train_mode: Of each layer, the network itself first.
        tracks_statistics: Of each batch norm, whether it keeps running statistics.
        is_trained: Of each parameter, whether it gets a gradient.
        groups: Names of the parameters in each of the optimizer's groups; empty without an optimizer.
        options: What the groups have beside their parameters, of those that are not from ``configure_optimizers``.

    """

    in_train_mode: list[bool]
    tracks_statistics: list[bool]
    is_trained: list[bool]
    groups: list[list[str]]
    options: list[dict[str, Any]]

    def as_state(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Source:
    """The user's network, whose settings others take over.

    Args:
        module: The user's module.
        optimizer: Its optimizer; ``None`` if no other network is trained.
        configured: How many of the optimizer's groups ``configure_optimizers`` made.

    """

    def __init__(self, module: nn.Module, optimizer: Any = None, configured: int = 0) -> None:
        self._places, self._optimizer, self._configured = _Places(module), optimizer, configured
        self._sizes: list[int] = []
        self._now: TakenOver | None = None

    def now(self) -> TakenOver:
        """Its settings; the same object as the last time as long as nothing has changed."""
        flags = self._places.flags()
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        options = [_options(group) for group in groups[self._configured :]]
        last = self._now
        if last is not None and sizes == self._sizes and options == last.options and flags == _flags_of(last):
            return last
        if last is None or sizes != self._sizes:
            names = {id(p): name for name, p in self._places.named.items()}
            in_groups = [[names[id(p)] for p in group["params"] if id(p) in names] for group in groups]
        else:
            in_groups = last.groups
        self._sizes, self._now = sizes, TakenOver(*flags, in_groups, options)
        return self._now


class Follower:
    """Another network of the same layers, which takes settings over.

    Args:
        module: The network, a copy of the user's.

    """

    def __init__(self, module: nn.Module) -> None:
        self._places = _Places(module)
        self._last: TakenOver | None = None

    def take_over_modes(self, settings: TakenOver) -> None:
        """Puts each layer into the mode of the user's."""
        if settings is not self._last:
            self._last = settings
            for layer, mode in zip(self._places.layers, settings.in_train_mode, strict=True):
                layer.training = mode
            for norm, tracks in zip(self._places.norms, settings.tracks_statistics, strict=True):
                norm.track_running_stats = tracks

    def take_over(self, settings: TakenOver) -> None:
        """Modes, and which parameters get gradients."""
        if settings is not self._last:
            self.take_over_modes(settings)
            for p, is_trained in zip(self._places.params, settings.is_trained, strict=True):
                p.requires_grad_(is_trained)


def regroup_(optimizer: Any, module: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Gives an optimizer the groups of parameters of these names; what groups have beside them stays.

    Args:
        optimizer: Changed in place; a group more starts with the optimizer's defaults.
        module: Whose parameters they are.
        groups: Names by group.

    """
    params = {plain_name(name): p for name, p in module.named_parameters()}
    own = optimizer.param_groups
    own += [{**optimizer.defaults} for _ in groups[len(own) :]]
    del own[len(groups) :]
    for group, names in zip(own, groups, strict=True):
        group["params"] = [params[name] for name in names]
    used = {id(p) for group in own for p in group["params"]}
    for p in [p for p in optimizer.state if id(p) not in used]:
        del optimizer.state[p]


class _Places:
    """Where the settings of a network stand, in the order of names that a compiled network and its copy share."""

    def __init__(self, module: nn.Module) -> None:
        layers = {plain_name(f"{name}.")[:-1]: layer for name, layer in module.named_modules()}
        self.layers = list(layers.values())
        self.norms = [layer for layer in self.layers if isinstance(layer, BatchNorm)]
        self.named: Mapping[str, nn.Parameter] = {plain_name(name): p for name, p in module.named_parameters()}
        self.params = list(self.named.values())

    def flags(self) -> tuple[list[bool], list[bool], list[bool]]:
        return (
            [layer.training for layer in self.layers],
            [norm.track_running_stats for norm in self.norms],
            [needs_gradient(p) for p in self.params],
        )


def _flags_of(settings: TakenOver) -> tuple[list[bool], list[bool], list[bool]]:
    return settings.in_train_mode, settings.tracks_statistics, settings.is_trained


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params" and not isinstance(value, Tensor)}
