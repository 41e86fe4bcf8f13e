"""What a technique trains in place of weights: a latent of each, and parts of its map that are learned."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_reg.engine.weights.entries import entries_of, write_entries_

__all__ = ["Latents"]


class Latents:
    """What a technique trains in place of weights: plain data, which it keeps as ``latents`` and saves with its state.

    Args:
        lr_factor: Learning rate of the map's own parts, as a multiple of that of the weight; schedules included. By the
            name of the part where they differ; one that is not named has 1.
        frozen: Whether the latents stay as they are, so that the own parts alone are trained: the optimizer then gets
            no gradient of the weight, keeps no moments of it and lets it not decay.
        own_decay: Whether the own parts have the weight decay of the weight's group.
        has_second: Whether own parts have gradients of a second loss as well, see :meth:`add_second_gradients`.
        on_cpu: Whether frozen latents lie on the CPU and come to the weight's device when it is mapped.

    Attributes:
        values: Latent of each weight, by the weight's name.
        index: Positions in the flat weight of the entries that a latent has, where it has not all (:meth:`take`).
        own: Learned parts of the map of each weight, by the weight's name and the part's own; leaves of any shape that
            require a gradient, float32 at least. The technique puts them there when it begins.
        second: Gradients of a second loss, as ``own``: accumulated, and averaged over the ranks once those of the loss
            are; forgotten when the parts have been stepped.
        ways: How the gradient of each frozen weight comes to the own parts, for the report; the engine sets it.

    """

    def __init__(
        self,
        lr_factor: float | Mapping[str, float] = 1.0,
        *,
        frozen: bool = False,
        own_decay: bool = False,
        has_second: bool = False,
        on_cpu: bool = False,
    ) -> None:
        self.lr_factor, self.frozen, self.own_decay, self.has_second = lr_factor, frozen, own_decay, has_second
        self.on_cpu = on_cpu
        self.values: dict[str, Tensor] = {}
        self.index: dict[str, Tensor] = {}
        self._whole: dict[str, tuple[int, ...]] = {}
        self.own: dict[str, dict[str, Tensor]] = {}
        self.second: dict[str, dict[str, Tensor]] = {}
        self.ways: dict[str, str] = {}
        self._moments: dict[str, dict[str, dict[str, Any]]] = {}

    @property
    def size(self) -> int:
        """How many numbers of the map's own are trained."""
        return sum(tensor.numel() for _, _, tensor in self.parts())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights."""
        return {name: self._whole.get(name, tuple(value.shape)) for name, value in self.values.items()}

    def take(self, name: str, weight: Tensor, index: Tensor) -> Tensor:
        """The latent of a weight that changes in these entries alone, so that no copy of it is kept: their values.

        Args:
            name: Of the weight.
            weight: The weight.
            index: ``(K,)``, positions in the flat weight.

        Returns:
            ``(K,)``, for :attr:`values`; :meth:`WeightMapTechnique.map_weights` then leaves other entries alone.

        """
        self.index[name], self._whole[name] = index, tuple(weight.shape)
        return entries_of(weight, index)

    def room(self, name: str, weight: Tensor) -> Tensor:
        """Memory to map a weight into: new, or a copy of the weight where the latent has some of its entries alone."""
        if name in self.index:
            return weight.detach().clone()
        return torch.empty_like(self.values[name], device=weight.device)

    def whole(self, name: str, weight: Tensor) -> Tensor:
        """The latent as a whole weight."""
        if name not in self.index:
            return self.values[name]
        whole = weight.detach().clone()
        write_entries_(whole, self.index[name], self.values[name])
        return whole

    def parts(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Name of the weight, name of the part and the part, of these weights or of all."""
        for name in self.own if names is None else names:
            for part, tensor in self.own.get(name, {}).items():
                yield name, part, tensor

    def add_gradients(self, name: str, gradients: Mapping[str, Tensor]) -> None:
        """Adds to the gradients of a weight's own parts, by the parts' names."""
        for part, gradient in gradients.items():
            tensor = self.own[name][part]
            same = gradient.to(tensor.dtype)
            tensor.grad = same if tensor.grad is None else tensor.grad.add_(same)

    def add_second_gradients(self, name: str, gradients: Mapping[str, Tensor]) -> None:
        """Adds to the gradients of a second loss at a weight's own parts, by the parts' names."""
        held = self.second.setdefault(name, {})
        for part, gradient in gradients.items():
            same = gradient.to(self.own[name][part].dtype)
            held[part] = held[part].add_(same) if part in held else same

    def second_gradients(self, names: Iterable[str]) -> list[Tensor]:
        """Those of a second loss at the parts of these weights, zeros where there are none; for all ranks the same."""
        if not self.has_second:
            return []
        for name, part, tensor in self.parts(names):
            self.second.setdefault(name, {}).setdefault(part, torch.zeros_like(tensor, requires_grad=False))
        return [tensor for name in names for tensor in self.second.get(name, {}).values()]

    def clear(self) -> None:
        """Forgets everything."""
        self.values, self.own, self.second, self._moments = {}, {}, {}, {}
        self.index, self._whole = {}, {}

    def fit(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these are latents of weights of such names and shapes."""
        return self.shapes == {name: tuple(weight.shape) for name, weight in weights.items()}

    def to(self, devices: Mapping[str, torch.device]) -> None:
        """Moves everything that belongs to a weight to its device."""
        for name, device in devices.items():
            if name in self.values:
                self.values[name] = self.values[name].to("cpu" if self.on_cpu else device)
            if name in self.index:
                self.index[name] = self.index[name].to(device)
            for part, tensor in self.own.get(name, {}).items():
                if tensor.device != device:
                    self.own[name][part] = tensor.detach().to(device).requires_grad_()
                # torch leaves the count of steps on the CPU, unless it was put elsewhere on purpose.
                state = self._moments.get(name, {}).get(part, {})
                state.update({k: v.to(device) for k, v in state.items() if isinstance(v, Tensor) and k != "step"})

    def groups(self, group: Mapping[str, Any], names: Iterable[str]) -> list[dict[str, Any]]:
        """Groups of an optimizer for the own parts of these weights, one per learning rate.

        Args:
            group: The weights' own, whose settings of this moment they have, but for learning rate and weight decay.
            names: Names of the weights.

        Returns:
            The groups.

        """
        by_factor: dict[float, list[tuple[str, str, Tensor]]] = {}
        for found in self.parts(names):
            factor = self.lr_factor.get(found[1], 1.0) if isinstance(self.lr_factor, Mapping) else self.lr_factor
            by_factor.setdefault(factor, []).append(found)
        settings = {key: value for key, value in group.items() if key not in _OF_PARAMETERS}
        settings |= {"weight_decay": 0.0} if "weight_decay" in group and not self.own_decay else {}
        groups = []
        for factor, parts in by_factor.items():
            named = {"param_names": [f"{name} ({part})" for name, part, _ in parts]} if "param_names" in group else {}
            groups.append(settings | named | {"params": [t for _, _, t in parts], "lr": group["lr"] * factor})
        return groups

    def lend_moments(self, optimizer: Optimizer, name: str) -> None:
        """Gives the optimizer its state of a weight's own parts."""
        for part, state in self._moments.get(name, {}).items():
            if state:
                optimizer.state[self.own[name][part]] = state

    def take_moments(self, optimizer: Optimizer, name: str) -> None:
        """Takes the state back, so that the optimizer's own ``state_dict`` is that of the untouched model."""
        self._moments[name] = {part: optimizer.state.pop(tensor, {}) for _, part, tensor in self.parts([name])}
        self.second.pop(name, None)
        for _, _, tensor in self.parts([name]):
            tensor.grad = None

    def forget_moments(self, name: str) -> None:
        """Lets the optimizer begin anew with the own parts of a weight."""
        self._moments.pop(name, None)

    def cut(self, name: str, size: int) -> None:
        """Leaves the first entries of the last dimension of all own parts of a weight.

        What the optimizer keeps of them is cut likewise; where some of it has another shape, the part begins anew.

        Args:
            name: Of the weight.
            size: How many entries are left.

        """
        for part, tensor in self.own[name].items():
            self.own[name][part] = tensor.detach()[..., :size].clone().requires_grad_()
            state = self._moments.get(name, {}).get(part, {})
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
            if any(value.shape != tensor.shape for value in tensors.values()):
                state.clear()
            else:
                state.update({key: value[..., :size].clone() for key, value in tensors.items()})

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        index = (
            {"index": dict(self.index), "index_of": {n: list(s) for n, s in self._whole.items()}} if self.index else {}
        )
        return index | {
            "values": {name: value.detach() for name, value in self.values.items()},
            "own": {name: {part: t.detach() for part, t in parts.items()} for name, parts in self.own.items()},
            "moments": {
                name: {part: dict(state) for part, state in parts.items() if state}
                for name, parts in self._moments.items()
                if any(parts.values())
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.values, self.index = dict(state["values"]), dict(state.get("index", {}))
        self._whole = {name: tuple(shape) for name, shape in state.get("index_of", {}).items()}
        self.second = {}
        self.own = {
            name: {part: tensor.clone().requires_grad_() for part, tensor in parts.items()}
            for name, parts in state["own"].items()
        }
        self._moments = {
            name: {part: dict(moments) for part, moments in parts.items()} for name, parts in state["moments"].items()
        }


# What an optimizer's group holds of its parameters; all else is taken over from the group of the weights.
_OF_PARAMETERS = ("params", "param_names")
