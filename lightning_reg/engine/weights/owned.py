"""Small modules that a technique trains beside the user's: a projection, a token, a gate.

They are float32 whatever the module's precision is. For the time of a step the user's optimizer holds their parameters
in a group of its own, at the end of its groups, with the settings of its first group at that moment (schedules are
followed), and gives group and moments back: nothing of them is in the module's keys, and the optimizer's ``state_dict``
is that of the user's model. Gradients are those of the loss, averaged over the ranks in one collective.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.distributed import all_reduce_max, average_
from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = ["OwnModules"]


class OwnModules:
    """What a technique trains of its own; plain data, which it keeps and saves with its state.

    Args:
        lr_factor: Learning rate, as a multiple of that of the optimizer's first group, at least 0; schedules included.
        weight_decay: Weight decay, at least 0, where the optimizer has one.

    Attributes:
        modules: By name; the technique makes them when a training begins. After the fit they are on the CPU.

    """

    def __init__(self, lr_factor: float = 1.0, weight_decay: float = 0.0) -> None:
        check_number(self, "lr_factor", lr_factor, low=0)
        check_number(self, "weight_decay", weight_decay, low=0)
        self.lr_factor, self.weight_decay = lr_factor, weight_decay
        self.modules: dict[str, nn.Module] = {}
        self._moments: dict[str, dict[str, Any]] = {}
        self._loaded: dict[str, dict[str, Any]] | None = None

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[name]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, by name."""
        named = (
            (f"{name}.{inner}", parameter)
            for name, module in self.modules.items()
            for inner, parameter in module.named_parameters()
        )
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def is_loaded(self) -> bool:
        """Whether a state was loaded that :meth:`begin` is to take over."""
        return self._loaded is not None

    def begin(self, modules: Mapping[str, nn.Module], device: torch.device, owner: str, *, fresh: bool = True) -> None:
        """Takes new modules, with the state that was loaded if there is one.

        Args:
            modules: By name.
            device: Where they are trained.
            owner: Class to name in errors.
            fresh: Whether they are new, so that what the optimizer knew of others is forgotten.

        Raises:
            MisconfigurationException: If a state of other modules was loaded.

        """
        self.modules = {name: module.to(device, torch.float32).train() for name, module in modules.items()}
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self._moments = {} if fresh else self._moments
            return
        held = {name: {key: value.shape for key, value in state.items()} for name, state in loaded["modules"].items()}
        mine = {n: {key: value.shape for key, value in m.state_dict().items()} for n, m in self.modules.items()}
        if held != mine:
            raise MisconfigurationException(
                f"{owner}: the checkpoint holds the state of other modules than those that it trains: {held} for"
                f" {mine}. Give it the arguments that the run had."
            )
        for name, module in self.modules.items():
            module.load_state_dict(loaded["modules"][name])
        self._moments = {name: dict(state) for name, state in loaded["moments"].items()}

    def trained(
        self, name: str, new: Callable[[], Mapping[str, nn.Module]], device: torch.device, owner: str, missing: str
    ) -> nn.Module:
        """A module as it was left by a fit or by a loaded state: for layers that run outside training too.

        Args:
            name: Of the module.
            new: Makes the modules that a loaded state is read into, in a test from a checkpoint without a fit.
            device: Where the module is to be; after a fit it is on the CPU.
            owner: Class to name in errors.
            missing: What to say where there is none, a clause.

        Returns:
            The module.

        Raises:
            MisconfigurationException: If nothing was trained or loaded.

        """
        if self.is_loaded:
            with torch.inference_mode(mode=False):  # a fit may go on with them
                self.begin(new(), device, owner)
        if name not in self.modules:
            raise MisconfigurationException(
                f"{owner}: {missing}. Fit with {owner} first, or pass `ckpt_path` of such a fit."
            )
        module = self.modules[name]
        if next(module.parameters()).device != device:
            with torch.inference_mode(mode=False):
                module.to(device)
        return module

    def end(self) -> None:
        """Leaves the modules on the CPU, without gradients."""
        for module in self.modules.values():
            module.cpu().zero_grad()
        self._moments = {name: _moved(state, torch.device("cpu")) for name, state in self._moments.items()}

    def average_gradients(self) -> None:
        """Averages gradients over the ranks; a rank that has none counts as 0. One collective."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        average_([parameter.grad for parameter in self.parameters.values() if parameter.grad is not None])

    def drop_gradients(self) -> None:
        """Leaves no gradients, so that an optimizer passes them by."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def without_gradient(self) -> list[str]:
        """Names of the parameters that have no gradient on any rank; one collective and a host sync."""
        named = self.parameters
        if not named:
            return []
        has = [parameter.grad is not None for parameter in named.values()]
        anywhere = all_reduce_max(torch.tensor(has, dtype=torch.float32, device=next(iter(named.values())).device))
        return [name for name, one in zip(named, anywhere.tolist(), strict=True) if not one]

    @contextmanager
    def lent(self, optimizer: Optimizer, owner: str) -> Iterator[None]:
        """While an optimizer steps it has a group for them, and its state of them.

        Args:
            optimizer: Which one.
            owner: Class to name in errors.

        Raises:
            MisconfigurationException: If it takes no further group.

        """
        parameters = self.parameters
        if not parameters:
            yield
            return
        if isinstance(optimizer, LBFGS) or hasattr(optimizer, "consolidate_state_dict"):
            raise MisconfigurationException(
                f"{owner}: {type(optimizer).__name__} takes no further group of parameters, so what {owner} trains"
                " cannot be trained with it. Choose another optimizer."
            )
        group = self._group(optimizer.param_groups[0], parameters)
        for name, parameter in parameters.items():
            if self._moments.get(name):
                optimizer.state[parameter] = _moved(self._moments[name], parameter.device)
        optimizer.param_groups.append(group)
        try:
            yield
        finally:
            optimizer.param_groups[:] = [other for other in optimizer.param_groups if other is not group]
            for name, parameter in parameters.items():
                self._moments[name] = optimizer.state.pop(parameter, {})
                parameter.grad = None

    def _group(self, first: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        settings = {key: value for key, value in first.items() if key not in ("params", "param_names")}
        settings |= {"weight_decay": self.weight_decay} if "weight_decay" in first else {}
        settings |= {"param_names": list(parameters)} if "param_names" in first else {}
        return settings | {"params": list(parameters.values()), "lr": first["lr"] * self.lr_factor}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        if self._loaded is not None:
            return self._loaded
        return {
            "modules": {
                name: {key: value.detach().clone() for key, value in module.state_dict().items()}
                for name, module in self.modules.items()
            },
            "moments": {name: dict(state) for name, state in self._moments.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, when the next fit begins."""
        self._loaded = {"modules": dict(state["modules"]), "moments": dict(state["moments"])}


def _moved(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    # torch leaves the count of steps on the CPU, unless it was put elsewhere on purpose.
    return {k: v.to(device) if isinstance(v, Tensor) and k != "step" else v for k, v in state.items()}
