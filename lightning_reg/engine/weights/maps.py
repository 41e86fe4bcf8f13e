"""Weights that are trained through a map: the optimizer steps latents v, everybody else sees the weights w = f(v).

The module's parameter holds w at all times but one: from the last hook before the optimizer's step (gradients are
reduced, unscaled and changed by techniques by then) until the step is over it holds v, and its gradient dL/dw is turned
into dL/dv once, by a vector-Jacobian product. That is linear, so it is exact for gradients accumulated over several
batches and averaged over ranks, whatever graph they came from. Learned parts of the map lie in groups of their own at
the end of the optimizer's groups for the time of the step, and their state with the technique: schedules and
checkpoints meet the optimizer that the user wrote. Cost: two copies and one map per step, one copy of the weights in
memory. Where latents are frozen the parts alone are trained, and the parameter holds w always (``routes.py``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import version_of
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_parameter
from lightning_reg.engine.host.modules import BatchNorm
from lightning_reg.engine.weights.deltas import frozen_names
from lightning_reg.engine.weights.guard import StepGuard
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.routes import Mapper, Routes, home_of
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.engine.weights.ways import Frozen

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["WeightMaps", "check_mappable"]

_SPLITTING = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")


class _Map:
    """A technique and the weights that it maps."""

    def __init__(self, technique: Mapper, weights: Mapping[str, nn.Parameter], routes: Routes | None) -> None:
        self.technique, self.weights, self.routes = technique, weights, routes
        self._begun_with: dict[str, Tensor] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether its latents are those that it began with, changed since, and not others that were loaded."""
        return self._begun_with is self.technique.latents.values

    def note_begin(self) -> None:
        self._begun_with = self.technique.latents.values

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {name: self.technique.latents.room(name, self.weights[name]) for name in latents}
        if weights:
            self.technique.map_weights(latents, weights)
        return weights

    def strangers(self, optimizer: Any = None) -> list[str]:
        """Names of the weights that are not what their latents are mapped to; one host sync.

        Args:
            optimizer: Whose weights are asked about: under manual optimization edits may be in others. ``None``: all.

        Returns:
            The names.

        """
        groups = () if optimizer is None else optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        asked = [name for name, p in self.weights.items() if optimizer is None or id(p) in held]
        mapped = self.weights_of({name: self.technique.latents.values[name] for name in asked})
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
        seen_by: Who else of the fit acts on weights or their gradients, a class's name; "" for nobody.

    Raises:
        MisconfigurationException: If a name matches no parameter, or two techniques map the same one.

    """

    def __init__(self, module: nn.Module, techniques: Sequence[Mapper], seen_by: str = "") -> None:
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
            weights = {name: parameters[name] for name in names}
            routes = Routes(technique, module, weights, seen_by) if technique.latents.frozen else None
            self._maps.append(_Map(technique, weights, routes))
        self._routed = [(one, one.routes) for one in self._maps if one.routes is not None]
        self._module, self._parameters = module, parameters
        self._frozen = Frozen(())
        self._optimizers: Sequence[Any] = ()
        self._stepped: list[tuple[_Map, list[str]]] = []
        self._versions: dict[nn.Parameter, int] = {}
        self._said = False
        self._inside: list[tuple[_Map, list[str]]] = []
        owner = ", ".join(type(one.technique).__name__ for one in self._maps)
        self._owner, what = owner, "the weights in place of what they are mapped from"
        self._guard = StepGuard(owner, what, lambda: True)

    # -- before and after the fit -------------------------------------------------------------------------------------

    def freeze(self, *, needs_one: bool) -> None:
        """Lets the parameters that are not trained need no gradient.

        Those are what all techniques with frozen latents leave out and none maps, and weights whose gradient is not
        kept.

        Args:
            needs_one: Whether the module must have a parameter that needs a gradient, as DDP wants.

        """
        if not self._routed:
            return
        mapped = {name for one in self._maps for name in one.weights}
        frozen = frozen_names(self._module, [one.technique for one, _ in self._routed], mapped)
        for one, _ in self._routed:
            frozen |= one.weights.keys()
        left = [p for name, p in self._parameters.items() if name not in frozen and p.requires_grad]
        self._frozen = Frozen([self._parameters[name] for name in self._parameters if name in frozen])
        with_weights = [(one, routes) for one, routes in self._routed if one.weights]
        if needs_one and not left and with_weights and not with_weights[0][1].kept:
            one, routes = with_weights[0]
            smallest = min(one.weights, key=lambda name: one.weights[name].numel())
            routes.keep(smallest, "DDP wants a parameter with a gradient")
        for one, routes in self._routed:
            for name in one.weights:
                one.weights[name].requires_grad_(name in routes.kept)

    def frozen_norms(self) -> list[BatchNorm]:
        """Layers of batch norm that have nothing to train meanwhile."""
        norms = [layer for layer in self._module.modules() if isinstance(layer, BatchNorm)]
        return [n for n in norms if all(id(p) in self._frozen.ids for p in n.parameters(recurse=False))]

    def unfrozen(self) -> AbstractContextManager[None]:
        """While parameters need gradients as they did: code that asks which do finds the user's own."""
        return self._frozen.lifted()

    def attach(self) -> None:
        """Puts hooks where frozen weights get their gradients."""
        for _, routes in self._routed:
            routes.attach()

    def show(self, *, shown: bool) -> None:
        """Lets what reads frozen weights outside of their layers have a gradient of them, for the time of a step."""
        for _, routes in self._routed:
            routes.show(shown=shown)

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
            if one.routes is not None:
                one.routes.refresh()
                one.routes.note_versions()
        self._optimizers = optimizers
        self._guard.watch(optimizers)

    def _begin(self, one: _Map, *, fresh: bool) -> None:
        latents, weights = one.technique.latents, {name: p.detach() for name, p in one.weights.items()}
        if latents.values and not fresh and not latents.fit(weights):
            raise MisconfigurationException(
                f"{type(one.technique).__name__}: the state that it goes on from is of other weights:"
                f" {_other_weights(latents.shapes, weights)}. Choose the layers that were chosen when it was written,"
                " or load the weights and train without `ckpt_path`."
            )
        if fresh or not latents.values:
            latents.clear()
            latents.values = dict(one.technique.begin_map(weights)) if weights else {}
            latents.to({name: weight.device for name, weight in weights.items()})
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

    def _check_data(self, optimizer: Any) -> None:
        for one in self._maps:
            names = one.strangers(None if len(self._optimizers) == 1 else optimizer)
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
            latents = one.technique.latents
            latents.values.update(one.technique.latents_of({name: one.weights[name].detach() for name in names}))
            latents.to({name: one.weights[name].device for name in names})

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
                own = {id(tensor) for latents, name in lent for _, _, tensor in latents.parts([name])}
                optimizer.param_groups[:] = [
                    g for g in optimizer.param_groups if not g["params"] or id(g["params"][0]) not in own
                ]
            self._map_stepped()

    def _map_stepped(self) -> None:
        stepped, self._stepped = self._stepped, []
        with torch.no_grad():
            for one, names in stepped:
                one.technique.follow_step(names)
                self._map_frozen(one, names, changed=False)

    def _map_frozen(self, one: _Map, names: Sequence[str], *, changed: bool) -> None:
        if one.routes is not None:
            self._note(one.routes.map_(names, changed=changed))
            one.routes.refresh()

    def _lend(self, optimizer: Optimizer) -> list[tuple[Latents, str]]:
        lent, groups = [], []
        for one in self._maps:
            latents = one.technique.latents
            by_group = self._groups_of(one, optimizer) if latents.own else []
            for group, names in by_group:
                groups += latents.groups(group, names)
                lent += [(latents, name) for name in names]
            if one.routes is not None and by_group:
                self._stepped.append((one, [name for _, names in by_group for name in names]))
        if lent and (isinstance(optimizer, LBFGS) or hasattr(optimizer, "consolidate_state_dict")):
            raise MisconfigurationException(
                f"{self._owner}: {type(optimizer).__name__} takes no further group of parameters, so the shape of the"
                " map cannot be learned with it. Choose another optimizer, or do not learn the shape."
            )
        for latents, name in lent:
            latents.lend_moments(optimizer, name)
        optimizer.param_groups.extend(groups)
        return lent

    def _groups_of(self, one: _Map, optimizer: Optimizer) -> list[tuple[dict[str, Any], list[str]]]:
        names, found = list(one.technique.latents.own), []
        for group in optimizer.param_groups:
            held = {id(p) for p in group["params"]}
            here = [name for name in names if id(one.weights[name]) in held]
            if here:
                found.append((group, here))
        if one.routes is None:
            return found
        # Frozen ones are trained whether an optimizer has them or not.
        of_none = [name for name in names if not any(name in here for _, here in found)]
        cls = type(one.technique).__name__
        homes = [(name, *home_of(self._optimizers, one.weights[name], cls)) for name in of_none]
        lodgers = [name for name, home, _ in homes if home is optimizer]
        return found + ([(optimizer.param_groups[0], lodgers)] if lodgers else [])

    def average_gradients(self) -> None:
        """Averages gradients over the ranks, while they are scaled: all ranks skip the same steps."""
        for one, names in self._stepped:
            if one.routes is not None:
                one.routes.average_gradients(names)

    @torch.no_grad()
    def open(self, optimizer: Any, *, check: bool) -> None:
        """Turns gradients at the weights into those of the latents, and puts the latents in.

        Args:
            optimizer: The one that is about to step, perhaps in Lightning's wrapping.
            check: Whether to look for weights that were written without leaving a version; costs a host sync.

        """
        self._follow_writes()
        if check:
            self._check_data(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for one, names in self._stepped:
            if one.routes is not None:
                one.routes.pull_back(names)
        for one in self._maps:
            names = [name for name, p in one.weights.items() if p.grad is not None and id(p) in held]
            if names and one.routes is None:
                latents = {name: one.technique.latents.values[name] for name in names}
                at_weights = {name: one.weights[name].detach() for name in names}
                gradients = {name: g for name in names if (g := one.weights[name].grad) is not None}
                one.technique.pull_back(latents, at_weights, gradients)
                torch._foreach_copy_(list(at_weights.values()), list(latents.values()))
                self._inside.append((one, names))

    def _part_gradients(self) -> list[Tensor]:
        """The gradients of the parts that the optimizer is about to step."""
        stepped = [(one.technique.latents, names) for one, names in self._stepped]
        parts = (tensor for latents, names in stepped for _, _, tensor in latents.parts(names))
        return [tensor.grad for tensor in parts if tensor.grad is not None]

    @torch.no_grad()
    def change_part_gradients(self, scale: Tensor | None) -> None:
        """Lets techniques change the gradients of parts that the optimizer is about to step.

        Args:
            scale: What they are still multiplied by, and are again at the end; ``None`` for 1.

        """
        if scale is not None and (before := self._part_gradients()):
            torch._foreach_div_(before, scale)
        for one, names in self._stepped:
            one.technique.change_part_gradients(names)
        if scale is not None and (after := self._part_gradients()):  # which may be other tensors
            torch._foreach_mul_(after, scale)

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

    @torch.no_grad()
    def before_evaluation(self) -> None:
        """Puts the weights in for an evaluation of the loss, those of parts that were changed since as well."""
        for one, names in self._stepped:
            self._map_frozen(one, names, changed=True)
        self.put_weights()

    def close(self) -> None:
        """Leaves the weights in the module, and the latents with their techniques, on the CPU."""
        self.put_weights()
        self._guard.close()
        for _, routes in self._routed:
            routes.close()
        self._frozen.undo()
        for one in self._maps:
            one.technique.latents.to(dict.fromkeys(one.weights, torch.device("cpu")))


def _other_weights(held: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> str:
    """The first difference between two sets of weights, in words."""
    for name in (*held, *weights):
        if name not in held:
            return f"{name!r} is trained here, and is not in it"
        if name not in weights:
            return f"{name!r} is in it, and is not trained here"
        if held[name] != weights[name].shape:
            return f"{name!r} has the shape {held[name]} in it, and {tuple(weights[name].shape)} here"
    return ""


def _differs(one: Tensor, two: Tensor) -> Tensor:
    """Whether two weights differ by more than another device's rounding, a boolean scalar; NaN differs."""
    return ~((one - two).abs().max() <= 8 * torch.finfo(one.dtype).eps * two.abs().max())
