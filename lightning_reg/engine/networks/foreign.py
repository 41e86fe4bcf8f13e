"""A foreign frozen network: a teacher that is no copy of the user's module, made by what an import path names."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import isolated_randomness, own_randomness
from lightning_reg.engine.host.modules import checksum
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.layers.named import FeatureTap
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import Sight

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step

__all__ = ["ForeignNetwork", "MadeNetwork", "stored_at"]


def stored_at(place: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of weights as they lie at a place.

    Args:
        place: One of ``PLACES``.
        weights: By name.

    Returns:
        By name.

    """
    stored = {}
    for name, value in weights.items():
        device = "cpu" if "cpu" in place else value.device
        rounds = "bfloat16" in place and value.is_floating_point()
        stored[name] = value.detach().to(device, torch.bfloat16 if rounds else value.dtype, copy=True)
    return stored


class ForeignNetwork:
    """A network that another library or the user's own code makes, in eval mode and without gradient.

    It is made when it is first asked in a fit, under a random state of its own; then it is in no key of the module, no
    optimizer, no average and not under DDP, and what it makes of a batch no random state notices. Its hash is saved: a
    resumed fit for which another network is made is refused. Those with the same path, arguments and place are one.

    Args:
        path: Import path of a class of modules or of a function that makes one (``"my_project.teachers.resnet"``).
        arguments: What that gets, by name; plain data.
        layers: Layers whose outputs are wanted, named as in its ``named_modules()``.
        entry: Entry of the batch that it gets: keys and positions, separated by dots.
        place: Where its weights lie, as of a ``Reference``.

    Attributes:
        hash: That of its weights as they were made; "" before.
        bytes: Memory of its weights; 0 before.

    """

    def __init__(
        self,
        path: str,
        arguments: Mapping[str, Any] | None = None,
        layers: Sequence[str] = (),
        entry: str = "0",
        place: str = "device",
    ) -> None:
        self.path, self.arguments, self.layers = path, dict(arguments or {}), tuple(layers)
        self.entry, self.place = entry, place
        self.hash, self.bytes = "", 0

    @property
    def key(self) -> str:
        """The same for all that mean the same network."""
        return f"{self.path} {sorted(self.arguments.items())!r} {self.place}"

    def describe(self) -> str:
        """For the table at the start of a fit."""
        where = (" on the CPU" if "cpu" in self.place else "") + (" in bfloat16" if "bfloat16" in self.place else "")
        size = f"{self.bytes / 2**20:.1f} MiB" if self.bytes else "made at the first batch"
        return f"{self.path.rpartition('.')[2]}{where}, {size}"

    def state_dict(self) -> dict[str, Any]:
        """The hash; weights come from where they came from before."""
        return {"hash": self.hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the network of that hash, and no other."""
        self.hash = state["hash"]


class MadeNetwork:
    """What a path has made, for one fit.

    Args:
        asked: What is asked for; several may ask for the same.
        step: The first step.
        owner: Who asks first; its class is named in errors.

    Raises:
        MisconfigurationException: If the path makes no module.

    """

    def __init__(self, asked: ForeignNetwork, step: "Step", owner: object) -> None:
        name = f"{type(owner).__name__}: network {asked.path!r}"
        make = user_function(asked.path, step.trainer, step.module, name)
        with own_randomness(0):
            made: Any = make(**asked.arguments)
        if not isinstance(made, nn.Module):
            raise MisconfigurationException(
                f"{name} must make a torch module, and made a {type(made).__name__}. Write the import path of a class"
                " of modules, or of a function that returns one."
            )
        made = made.eval().requires_grad_(requires_grad=False).to(step.module.device)
        self._name, self._module = name, made
        self._types = {key: value.dtype for key, value in weights_of(made).items()}
        self.hash = checksum(weights_of(made))
        self._weights = None if asked.place == "device" else stored_at(asked.place, weights_of(made))
        if self._weights is not None:
            made.to("meta")
        self.bytes = sum(value.nbytes for value in (self._weights or weights_of(made)).values())
        self._taps: dict[tuple[str, ...], FeatureTap] = {}

    def check(self, asked: ForeignNetwork) -> None:
        """Tells who asks what it has; refuses another network than that of a fit that goes on."""
        if asked.hash and asked.hash != self.hash:
            raise MisconfigurationException(
                f"{self._name} is another one than in the fit that goes on: its weights have another hash. Make the"
                " same network, its pretrained weights included, or begin anew without `ckpt_path`."
            )
        asked.hash, asked.bytes = self.hash, self.bytes

    def see(self, asked: ForeignNetwork, step: "Step") -> Sight:
        """What it makes of the step's batch: outputs of its layers, its own output under ""."""
        if asked.layers not in self._taps:
            self._taps[asked.layers] = FeatureTap(self._module, asked.layers)
        tap = self._taps[asked.layers]
        given = find_entry(step.batch, asked.entry, self._name)
        with ExitStack() as undo:
            undo.enter_context(isolated_randomness())
            undo.enter_context(torch.no_grad())
            undo.enter_context(step.trainer.precision_plugin.train_step_context())
            tap.open = True
            undo.callback(tap.shut)
            output = self._run(given, step.module.device)
            features = {"": output, **tap.outputs}
        return Sight(None, tree_map_only(Tensor, Tensor.detach, features))

    def _run(self, given: Any, device: torch.device) -> Any:
        if self._weights is None:
            return self._module(given)
        weights = {name: value.to(device, self._types[name]) for name, value in self._weights.items()}
        return functional_call(self._module, weights, (given,))
