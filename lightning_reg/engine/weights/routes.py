"""The parts of maps whose latents are frozen: where their gradients come from, when weights are made of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.autograd import version_of
from lightning_reg.engine.host.distributed import average_
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.weights.factors import Factors
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.layer_products import LayerTap
from lightning_reg.engine.weights.ways import Way, ways_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Mapper", "Routes", "home_of"]


class Mapper(Protocol):
    """Who trains weights through a map; its class is named in messages."""

    is_product: ClassVar[bool]
    maps_steps: ClassVar[bool]
    latents: Latents

    def weights_to_map(self, module: nn.Module) -> Sequence[str]:
        """Names of the parameters that are mapped."""

    def weights_to_freeze(self, module: nn.Module) -> Sequence[str]:
        """Names of the parameters that are not trained meanwhile."""

    def begin_map(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New latents for the weights that a training begins with."""

    def latents_of(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New latents for weights that somebody else wrote, under the map as it is."""

    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Writes f(v) into the weights."""

    def factors_of(self, name: str) -> Factors:
        """The factors of a weight's product."""

    def pull_back(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        """Turns gradients dL/dw into dL/dv, in place, and adds to the gradients of own parts."""

    def change_part_gradients(self, names: Sequence[str]) -> None:
        """Changes the final gradients of the own parts of these weights."""

    def pull_back_step(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        """The same for gradients that come from the loss of a step, pulled back as soon as they are there."""

    def follow_step(self, names: Sequence[str]) -> None:
        """An optimizer has stepped the own parts of these weights."""


class Routes:
    """How the gradients of one technique's weights come to its own parts.

    Args:
        technique: Whose weights they are; its latents are frozen.
        module: The user's module.
        weights: By name.
        seen_by: Who else wants to see gradients of weights, a class's name; "" for nobody.

    """

    def __init__(self, technique: Mapper, module: nn.Module, weights: Mapping[str, nn.Parameter], seen_by: str) -> None:
        self._technique, self._module, self._weights = technique, module, weights
        # A step that has other values of the map pulls their gradient back itself: nobody else can do anything with it.
        seen_by = "" if technique.maps_steps else seen_by
        self.ways = ways_of(module, list(weights), seen_by, has_factors=technique.is_product)
        self._taps: dict[str, LayerTap] = {}
        self._handles: list[RemovableHandle] = []
        self._versions: dict[str, tuple[int, ...]] = {}
        self._unchecked = set(weights)

    @property
    def kept(self) -> set[str]:
        """Names of the weights whose gradient is kept until the optimizer's step."""
        return {name for name, way in self.ways.items() if way.kind == "kept"}

    def keep(self, name: str, why: str) -> None:
        """Keeps the gradient of a weight after all.

        Args:
            name: Of the weight.
            why: As a clause.

        Raises:
            MisconfigurationException: If it has to be pulled back at once.

        """
        if self._technique.maps_steps:
            raise MisconfigurationException(
                f"{type(self._technique).__name__} trains in place of all parameters that need a gradient, and {why}."
                f" Exclude the layer of {name!r}, or let another parameter be trained."
            )
        self.ways[name] = Way("kept", why)

    def attach(self) -> None:
        """Puts hooks on layers and weights; those whose gradient is needed get one from now on."""
        for name, way in self.ways.items():
            if way.place is not None and way.use is not None:
                tap = self._taps[name] = LayerTap(way.use, self._weights[name])
                self._handles += tap.attach(way.place.layer)
            weight = self._weights[name].requires_grad_()
            if way.kind != "kept":
                release = partial(self._release, name)
                self._handles.append(weight.register_post_accumulate_grad_hook(release))  # type: ignore[no-untyped-call]
        self.show(shown=False)
        self._tell()

    def _release(self, name: str, weight: Tensor) -> None:
        """A weight has got a gradient: what is read outside of its layer has one beside that of the layer."""
        gradient, weight.grad = weight.grad, None
        if gradient is None:  # compiled code comes by without one
            return
        if self.ways[name].kind == "at the layer":
            self.ways[name] = Way("released", "it is read outside of its layer")
            self._tell()
        _pull_back_of(self._technique, self._technique.pull_back_step, name, weight.detach(), gradient)

    def _tell(self) -> None:
        ways = {name: f"{way.kind}{f' ({way.why})' if way.why else ''}" for name, way in self.ways.items()}
        self._technique.latents.ways = ways

    def refresh(self) -> None:
        """The parts were made anew, moved, or stepped."""
        for name in self._weights if self._technique.is_product else ():
            factors = self._technique.factors_of(name)
            if name in self._taps:
                self._taps[name].factors = factors

    # -- one step -----------------------------------------------------------------------------------------------------

    def show(self, *, shown: bool) -> None:
        """Lets what reads weights outside of their layers have a gradient of them, for the time of a step."""
        for name in self._taps:
            self._weights[name].requires_grad_(shown)

    def average_gradients(self, names: Sequence[str]) -> None:
        """Averages gradients of the parts over the ranks, in one collective, and looks at them in the first step."""
        # A step without a loss has none to look at.
        if self._unchecked and any(p.grad is not None for p in self._module.parameters()):
            self._check_first([name for name in names if name in self._unchecked])
            self._unchecked -= set(names)
        kept = self.kept
        averaged = [name for name in names if name not in kept]
        parts = [tensor for _, _, tensor in self._technique.latents.parts(averaged)]
        for tensor in parts if torch.distributed.is_initialized() else ():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        # Those of a second loss were taken at the weight of this rank alone, whatever DDP does with the weight.
        second = self._technique.latents.second_gradients(names) if torch.distributed.is_initialized() else []
        average_([tensor.grad for tensor in parts if tensor.grad is not None] + second)

    def _check_first(self, names: Sequence[str]) -> None:
        tapped = [name for name in names if name in self._taps]
        dead = [n for n in tapped if all(t.grad is None for _, _, t in self._technique.latents.parts([n]))]
        unrecorded = [name for name in dead if self._taps[name].ran == {False}]
        cls = type(self._technique).__name__
        if unrecorded:
            raise MisconfigurationException(
                f"{cls}: the layer of {unrecorded[0]!r} ran without gradient in the first step, as checkpoints with"
                " use_reentrant=True do whose inputs need none. Write use_reentrant=False, or let the inputs need a"
                " gradient: `model.enable_input_require_grads()`."
            )
        if tapped and len(dead) == len(tapped):
            raise MisconfigurationException(
                f"{cls}: no gradient came to what is trained in place of {dead[0]!r}: its layer did not run in the"
                " first step, or as code that was compiled before the fit. Choose layers that run, and forget what was"
                " compiled: `torch.compiler.reset()`."
            )

    def pull_back(self, names: Sequence[str]) -> None:
        """What weights have of a gradient: that of those who are kept, and what others have added since."""
        left = {name: g for name in names if (g := self._weights[name].grad) is not None}
        for name, gradient in left.items():
            self._weights[name].grad = None
            _pull_back_of(self._technique, self._technique.pull_back, name, self._weights[name].detach(), gradient)

    def map_(self, names: Sequence[str], *, changed: bool = False) -> dict[str, nn.Parameter]:
        """Writes the weights anew.

        Args:
            names: Which ones.
            changed: Whether only those whose parts were written since.

        Returns:
            Those that were written.

        """
        latents = self._technique.latents
        now = {name: tuple(version_of(tensor) for _, _, tensor in latents.parts([name])) for name in names}
        which = [name for name in names if not changed or now[name] != self._versions.get(name)]
        self._versions.update({name: now[name] for name in which})
        if which:
            weights = {name: self._weights[name].detach() for name in which}
            self._technique.map_weights({name: latents.values[name] for name in which}, weights)
        return {name: self._weights[name] for name in which}

    def note_versions(self) -> None:
        """The weights are made of the parts as they are."""
        for name in self._weights:
            parts = self._technique.latents.parts([name])
            self._versions[name] = tuple(version_of(tensor) for _, _, tensor in parts)

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._taps = [], {}


@torch.no_grad()
def _pull_back_of(
    technique: Mapper, pull_back: Callable[..., None], name: str, weight: Tensor, gradient: Tensor
) -> None:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    pull_back({name: technique.latents.values[name]}, {name: weight}, {name: dense})


def home_of(optimizers: Sequence[Any], weight: nn.Parameter, owner: str) -> tuple[Any, dict[str, Any]]:
    """The optimizer and the group that train in a frozen weight's place: its own, or the first of the only optimizer.

    Args:
        optimizers: Those of the fit.
        weight: The weight.
        owner: Class to name in errors.

    Returns:
        Both.

    Raises:
        MisconfigurationException: If none of several optimizers has the weight.

    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(parameter is weight for parameter in group["params"]):
                return optimizer, group
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"{owner} trains with the optimizer of the weights, and none of the {len(optimizers)} optimizers has them."
            " Give them to one: `self.parameters()` has those as well that need no gradient."
        )
    return optimizers[0], optimizers[0].param_groups[0]
