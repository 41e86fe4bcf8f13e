"""Weights that are trained through a map: the optimizer steps latents v, everybody else sees the weights w = f(v).

The module's parameter holds w at all times but one: from the last hook before the optimizer's step (gradients are
reduced, unscaled and changed by techniques by then) until the step is over it holds v, and its gradient dL/dw is turned
into dL/dv once, by a vector-Jacobian product. That is linear, so it is exact for gradients accumulated over several
batches and averaged over ranks, whatever graph they came from. Learned parameters of the map lie in a group of their
own at the end of the optimizer's groups for the time of the step, and their state with the technique: schedules and
checkpoints meet the optimizer that the user wrote. Cost: two copies and one map per step, one copy of the weights in
memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import version_of
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_parameter
from lightning_reg.engine.weights.guard import StepGuard
from lightning_reg.engine.weights.swap import named_weights

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Latents", "Mapper", "WeightMaps", "check_mappable"]

_SPLITTING = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")

# What an optimizer's group holds of its parameters; all else is taken over from the group of the weights.
_OF_PARAMETERS = ("params", "param_names")


class Latents:
    """What a technique trains in place of weights: plain data, which it keeps as ``latents`` and saves with its state.

    Args:
        lr_factor: Learning rate of the map's own parameters, as a multiple of that of the weight; schedules included.

    Attributes:
        values: Latent of each weight, by the weight's name.
        own: Learned parameter of the map of a weight, by the weight's name; a leaf that requires a gradient. The
            technique puts it there when it begins, and its gradient when it pulls back.

    """

    def __init__(self, lr_factor: float = 1.0) -> None:
        self.lr_factor = lr_factor
        self.values: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}
        self._moments: dict[str, dict[str, Any]] = {}

    def clear(self) -> None:
        """Forgets everything."""
        self.values, self.own, self._moments = {}, {}, {}

    def fit(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these are latents of weights of such names and shapes."""
        return {n: v.shape for n, v in self.values.items()} == {n: w.shape for n, w in weights.items()}

    def to(self, devices: Mapping[str, torch.device]) -> None:
        """Moves everything that belongs to a weight to its device."""
        for name, device in devices.items():
            if name in self.values:
                self.values[name] = self.values[name].to(device)
            if name in self.own:
                self.own[name] = self.own[name].detach().to(device).requires_grad_()
            # torch leaves the count of steps on the CPU, unless it was put elsewhere on purpose.
            self._moments[name] = {
                key: value.to(device) if isinstance(value, Tensor) and key != "step" else value
                for key, value in self._moments.get(name, {}).items()
            }

    def lend_moments(self, optimizer: Optimizer, name: str) -> None:
        """Gives the optimizer its state of a weight's own parameter."""
        if self._moments.get(name):
            optimizer.state[self.own[name]] = self._moments[name]

    def take_moments(self, optimizer: Optimizer, name: str) -> None:
        """Takes the state back, so that the optimizer's own ``state_dict`` is that of the untouched model."""
        self._moments[name] = optimizer.state.pop(self.own[name], {})
        self.own[name].grad = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "values": {name: value.detach() for name, value in self.values.items()},
            "own": {name: value.detach() for name, value in self.own.items()},
            "moments": {name: dict(state) for name, state in self._moments.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.values = dict(state["values"])
        self.own = {name: value.clone().requires_grad_() for name, value in state["own"].items()}
        self._moments = {name: dict(moments) for name, moments in state["moments"].items()}


class Mapper(Protocol):
    """Who trains weights through a map; its class is named in messages."""

    latents: Latents

    def weights_to_map(self, module: nn.Module) -> Sequence[str]:
        """Names of the parameters that are mapped."""

    def begin_map(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New latents for the weights that a training begins with."""

    def latents_of(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New latents for weights that somebody else wrote, under the map as it is."""

    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Writes f(v) into the weights."""

    def pull_back(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        """Turns gradients dL/dw into dL/dv, in place."""


class _Map:
    """A technique and the weights that it maps."""

    def __init__(self, technique: Mapper, weights: Mapping[str, nn.Parameter]) -> None:
        self.technique, self.weights = technique, weights
        self._begun_with: dict[str, Tensor] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether its latents are those that it began with, changed since, and not others that were loaded."""
        return self._begun_with is self.technique.latents.values

    def note_begin(self) -> None:
        self._begun_with = self.technique.latents.values

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {name: torch.empty_like(value) for name, value in latents.items()}
        if weights:
            self.technique.map_weights(latents, weights)
        return weights

    def strangers(self) -> list[str]:
        """Names of the weights that are not what their latents are mapped to; one host sync."""
        mapped = self.weights_of(self.technique.latents.values)
        if not mapped:
            return []
        differ = torch.stack([_differs(value, self.weights[name]).cpu() for name, value in mapped.items()])
        return [name for name, differs in zip(mapped, differ.tolist(), strict=True) if differs]


def check_mappable(technique: object, trainer: "Trainer") -> None:
    """Refuses strategies under which neither the weight nor the optimizer is whole.

    Args:
        technique: Who maps weights.
        trainer: The Trainer that starts to fit.

    Raises:
        MisconfigurationException: Under FSDP, DeepSpeed and tensor parallelism.

    """
    strategy = type(trainer.strategy).__name__
    if strategy.startswith(_SPLITTING):
        raise MisconfigurationException(
            f"{type(technique).__name__} trains whole weights through a map, and {strategy} splits them over the"
            " processes. Use DDP."
        )


class WeightMaps:
    """All maps of a fit.

    Args:
        module: The user's module.
        techniques: Those that map weights.

    Raises:
        MisconfigurationException: If a name matches no parameter, or two techniques map the same one.

    """

    def __init__(self, module: nn.Module, techniques: Sequence[Mapper]) -> None:
        parameters = named_weights(module)
        owners: dict[str, str] = {}
        self._maps = []
        for technique in techniques:
            names, cls = technique.weights_to_map(module), type(technique).__name__
            for name in names:
                if name not in parameters:
                    refuse_parameter(name, parameters, cls)
                if name in owners:
                    raise MisconfigurationException(
                        f"{owners[name]} and {cls} cannot stand together on {name!r}: a weight is trained through one"
                        " map only. Choose other layers for one of them."
                    )
                owners[name] = cls
            self._maps.append(_Map(technique, {name: parameters[name] for name in names}))
        self._versions: dict[nn.Parameter, int] = {}
        self._said = False
        self._inside: list[tuple[_Map, list[str]]] = []
        owner = ", ".join(type(one.technique).__name__ for one in self._maps)
        self._owner, what = owner, "the weights in place of what they are mapped from"
        self._guard = StepGuard(owner, what, lambda: True)

    # -- between optimizer steps --------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, optimizers: Sequence[Any], *, fresh: bool) -> None:
        """Before each training step, and each step of an optimizer (which may contain it): once, takes the weights.

        Once more, if a state was loaded since: Lightning's learning-rate finder puts weights and latents back.

        Args:
            optimizers: Those of the fit.
            fresh: Whether this is the first batch of a training, so that nothing is left of an earlier one.

        """
        if all(one.is_begun for one in self._maps):
            return
        for one in self._maps:
            self._begin(one, fresh=fresh)
        self._guard.watch(optimizers)

    def _begin(self, one: _Map, *, fresh: bool) -> None:
        latents, weights = one.technique.latents, {name: p.detach() for name, p in one.weights.items()}
        if latents.values and not fresh and not latents.fit(weights):
            raise MisconfigurationException(
                f"{type(one.technique).__name__}: the state that it goes on from is of other weights:"
                f" {_other_weights(latents.values, weights)}. Choose the layers that were chosen when it was written,"
                " or load the weights and train without `ckpt_path`."
            )
        if fresh or not latents.values:
            latents.clear()
            latents.values = dict(one.technique.begin_map(weights)) if weights else {}
            for name, mapped in one.weights_of(latents.values).items():
                if _differs(mapped, weights[name]):  # the technique does not begin with the weights as they are
                    weights[name].copy_(mapped)
        else:
            latents.to({name: weight.device for name, weight in weights.items()})
            # A kept latent is exact; another device rounds its weight in another way.
            self._follow(one, one.strangers())
        self._note(one.weights)
        one.note_begin()

    def _follow_writes(self) -> None:
        """Takes over what somebody else wrote into weights, an average that was loaded say."""
        for one in self._maps:
            written = [name for name, p in one.weights.items() if version_of(p) != self._versions[p]]
            if written:
                present = one.weights_of({name: one.technique.latents.values[name] for name in written})
                self._follow(one, [name for name in written if not torch.equal(present[name], one.weights[name])])
                self._note({name: one.weights[name] for name in written})

    def _check_data(self) -> None:
        for one in self._maps:
            names = one.strangers()
            if names and not self._said:
                host.rank_zero_warn(
                    f"{type(one.technique).__name__}: {names[0]!r} was written through `.data`, which is noticed now"
                    " but not in every step, and is lost otherwise. Write in place under `torch.no_grad()`:"
                    " `weight.clamp_(...)`."
                )
                self._said = True
            self._follow(one, names)

    def _follow(self, one: _Map, names: list[str]) -> None:
        if names:
            found = one.technique.latents_of({name: one.weights[name].detach() for name in names})
            one.technique.latents.values.update(found)

    @contextmanager
    def own_writes(self) -> Iterator[None]:
        """What is written meanwhile is no news: edits of weights that come and go, in every step."""
        before = {p: version_of(p) for p in self._versions}
        yield
        for p, version in before.items():
            self._versions[p] += version_of(p) - version

    def _note(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._versions.update({p: version_of(p) for p in weights.values()})

    # -- around an optimizer step -------------------------------------------------------------------------------------

    @contextmanager
    def stepping(self, optimizer: Optimizer) -> Iterator[None]:
        """While an optimizer steps; it has the groups of own parameters, and ends with the weights in.

        Args:
            optimizer: Which one; :meth:`open` is called once its gradients are final.

        """
        lent = self._lend(optimizer)
        try:
            with self._guard.stepping(optimizer):
                yield
        finally:
            self.put_weights()
            for latents, name in lent:
                latents.take_moments(optimizer, name)
            if lent:
                own = {id(latents.own[name]) for latents, name in lent}
                optimizer.param_groups[:] = [
                    g for g in optimizer.param_groups if not g["params"] or id(g["params"][0]) not in own
                ]

    def _lend(self, optimizer: Optimizer) -> list[tuple[Latents, str]]:
        lent, groups = [], []
        for one in self._maps:
            latents = one.technique.latents
            for group in optimizer.param_groups if latents.own else ():
                held = {id(p) for p in group["params"]}
                names = [name for name in latents.own if id(one.weights[name]) in held]
                if names:
                    groups.append(_own_group(group, latents, names))
                    lent += [(latents, name) for name in names]
        if lent and (isinstance(optimizer, LBFGS) or hasattr(optimizer, "consolidate_state_dict")):
            raise MisconfigurationException(
                f"{self._owner}: {type(optimizer).__name__} takes no further group of parameters, so the shape of the"
                " map cannot be learned with it. Choose another optimizer, or do not learn the shape."
            )
        for latents, name in lent:
            latents.lend_moments(optimizer, name)
        optimizer.param_groups.extend(groups)
        return lent

    @torch.no_grad()
    def open(self, optimizer: Any, *, check: bool) -> None:
        """Turns gradients at the weights into those of the latents, and puts the latents in.

        Args:
            optimizer: The one that is about to step, perhaps in Lightning's wrapping.
            check: Whether to look for weights that were written without leaving a version; costs a host sync.

        """
        self._follow_writes()
        if check:
            self._check_data()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for one in self._maps:
            names = [name for name, p in one.weights.items() if p.grad is not None and id(p) in held]
            if names:
                latents = {name: one.technique.latents.values[name] for name in names}
                at_weights = {name: one.weights[name].detach() for name in names}
                gradients = {name: g for name in names if (g := one.weights[name].grad) is not None}
                one.technique.pull_back(latents, at_weights, gradients)
                torch._foreach_copy_(list(at_weights.values()), list(latents.values()))
                self._inside.append((one, names))

    @torch.no_grad()
    def put_weights(self) -> None:
        """Puts the weights in, if latents are: those that the optimizer has made of them."""
        for one, names in self._inside:
            weights = {name: one.weights[name].detach() for name in names}
            latents = {name: one.technique.latents.values[name] for name in names}
            torch._foreach_copy_(list(latents.values()), list(weights.values()))
            one.technique.map_weights(latents, weights)
            self._note({name: one.weights[name] for name in names})
        self._inside = []

    def close(self) -> None:
        """Leaves the weights in the module, and the latents with their techniques, on the CPU."""
        self.put_weights()
        self._guard.close()
        for one in self._maps:
            one.technique.latents.to(dict.fromkeys(one.weights, torch.device("cpu")))


def _other_weights(held: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """The first difference between two sets of weights, in words."""
    for name in (*held, *weights):
        if name not in held:
            return f"{name!r} is trained here, and is not in it"
        if name not in weights:
            return f"{name!r} is in it, and is not trained here"
        if held[name].shape != weights[name].shape:
            return f"{name!r} has the shape {tuple(held[name].shape)} in it, and {tuple(weights[name].shape)} here"
    return ""


def _own_group(group: Mapping[str, Any], latents: Latents, names: Sequence[str]) -> dict[str, Any]:
    """A group with the settings of the weights' own at this moment, but for learning rate and weight decay."""
    settings = {key: value for key, value in group.items() if key not in _OF_PARAMETERS}
    settings |= {"weight_decay": 0.0} if "weight_decay" in group else {}
    settings |= {"param_names": [f"{name} (map)" for name in names]} if "param_names" in group else {}
    return settings | {"params": [latents.own[name] for name in names], "lr": group["lr"] * latents.lr_factor}


def _differs(one: Tensor, two: Tensor) -> Tensor:
    """Whether two weights differ by more than another device's rounding, a boolean scalar; NaN differs."""
    return ~((one - two).abs().max() <= 8 * torch.finfo(one.dtype).eps * two.abs().max())
