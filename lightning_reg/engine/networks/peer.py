"""Second networks beside the user's: a frozen teacher, a moving average, and what they make of a batch."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only
from torchmetrics import Metric

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import version_of
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.modules import forget_compiled_call, own_hooks, own_parameters, uncompiled
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.host.quiet import lent_trainer
from lightning_reg.engine.layers.named import FeatureTap, LayerHook
from lightning_reg.engine.layers.outputs import given_outputs
from lightning_reg.engine.loss.result import loss_of
from lightning_reg.engine.loss.watch import Interception
from lightning_reg.engine.networks.least_graph import LeastGraph
from lightning_reg.engine.networks.places import Places
from lightning_reg.engine.networks.sight import SeenCall, Sight, kept_buffers
from lightning_reg.engine.weights.finite import all_finite, chosen_if
from lightning_reg.engine.weights.ways import needs_gradient

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step

__all__ = ["Peer", "Sight", "check_runs_on_copy", "copy_of", "update_average_"]


# -- copies -----------------------------------------------------------------------------------------------------------

_EMPTY = CellType()  # of a name that has no value yet


def copy_of(module: "LightningModule") -> "LightningModule":
    """A copy of the user's module: the same weights on the same device, and nothing of the Trainer or the engine.

    Compiled parts are copied as they were before ``torch.compile``; gradients are not copied, and what is frozen for
    the time of the fit is not so in the copy.

    Args:
        module: The user's module, with dense weights in.

    Returns:
        The copy, in the module's present mode, attached to no Trainer.

    Raises:
        MisconfigurationException: If the module holds something that cannot be copied, or a function that would go on
            with the layers of the module itself.

    """
    with host.Replacement.aside(module):  # what stands in for a method has the layers of the module itself
        return _copied(module)


def _copied(module: "LightningModule") -> "LightningModule":
    with host.without_compiled_steps(module):
        _check_functions(module)
    memo: dict[int, Any] = {
        id(hook): hook for layer in module.modules() for hooks in own_hooks(layer) for hook in hooks.values()
    }
    memo = {key: hook for key, hook in memo.items() if isinstance(hook, LayerHook)}
    # Such as `self.last_logits`: torch refuses to copy a tensor with a history.
    kept = (leaf for layer in module.modules() for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor))
    memo |= {id(leaf): leaf.detach().clone() for leaf in kept if not leaf.is_leaf}
    try:
        # The innermost first, so that a compiled network inside another one is found in the memo.
        for layer in reversed(list(module.modules())):
            if (inner := uncompiled(layer)) is not None:
                memo[id(layer)] = copy.deepcopy(inner, memo)
        with host.without_compiled_steps(module):
            twin = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise MisconfigurationException(
            f"{type(module).__name__} cannot be copied: {error}. What cannot be pickled (files, locks, generators) does"
            " not belong into the module."
        ) from error
    for layer in twin.modules():
        forget_compiled_call(layer)
    for hooks in (hooks for layer in twin.modules() for hooks in own_hooks(layer)):
        for key in [key for key, hook in hooks.items() if isinstance(hook, LayerHook)]:
            del hooks[key]
    for parameter, copied in zip(module.parameters(), twin.parameters(), strict=True):
        copied.requires_grad_(needs_gradient(parameter))
    return twin


def _check_functions(module: nn.Module) -> None:
    """Refuses hooks and replaced methods that hold a layer; copies share plain functions, so they would use it too."""
    names = {id(layer): f"the layer {name!r}" if name else "the module" for name, layer in module.named_modules()}
    for layer in module.modules():
        functions = [hook for hooks in own_hooks(layer) for hook in hooks.values()]
        # A metric wraps its methods in functions that hold it, and wraps them anew when it is copied; what is compiled
        # is left out of copies.
        if not isinstance(layer, Metric) and uncompiled(layer) is None:
            functions += [value for name, value in vars(layer).items() if name != "_compiled_call_impl"]
        for function in functions:
            held = next((names[id(x)] for x in _held(function) if id(x) in names), None)
            if held is not None:
                raise MisconfigurationException(
                    f"{type(module).__name__} cannot be copied: {names[id(layer)]} has a function of its own that holds"
                    f" {held}, and a copy would have the same function. Write a method of the module in its place:"
                    " `layer.register_forward_hook(self.keep)`."
                )


def _held(function: Any) -> Iterator[Any]:
    """What a plain function has in its closure and its defaults, and what the functions in there have."""
    stack, seen = [function], set()
    while stack:
        current = stack.pop()
        if isinstance(current, partial):  # copied with its arguments, but for functions
            stack += [current.func, *current.args, *current.keywords.values()]
        if not isinstance(current, FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        cells = [c.cell_contents for c in current.__closure__ or () if c != _EMPTY]
        for value in tree_leaves([cells, current.__defaults__ or (), current.__kwdefaults__ or {}]):
            yield value.__self__ if isinstance(value, MethodType) else value
            stack.append(value)


def check_runs_on_copy(module: "LightningModule", owner: object, where: str = "on a copy of the module") -> None:
    """Refuses a module whose ``training_step`` does more than to compute a loss from its batch.

    Args:
        module: The user's module.
        owner: Who wants to run it; its class is named in the message.
        where: Where it is to run, for the message.

    Raises:
        MisconfigurationException: If it fetches batches or trains by itself.

    """
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"{type(owner).__name__} runs `training_step` {where}; one that takes `dataloader_iter`"
            " would fetch another batch there. Write `training_step(batch, batch_idx)`."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(owner).__name__} runs `training_step` {where}, which would train there under"
            " automatic_optimization=False. Leave optimization to Lightning, or use the functional core."
        )


@torch.no_grad()
def update_average_(average: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> Tensor:
    r"""One step of a moving average of parameters, in place; values that are not all finite leave it as it is.

    .. math:: \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta

    Args:
        average: Changed in place.
        params: The present values, in the same order.
        decay: d, in [0, 1].

    Returns:
        Whether the present values are finite, a boolean scalar.

    """
    finite = all_finite(params)
    torch._foreach_lerp_(list(average), chosen_if(finite, params, average), 1.0 - decay)
    return finite


# -- what a copy makes of a batch -------------------------------------------------------------------------------------


class Peer:
    """A second network: a copy of the user's module that runs the module's own ``training_step``.

    Made for one fit; what has to outlive it are its weights (:func:`weights_of`, :func:`load_weights_`). Memory: the
    module's parameters and buffers once more.

    Args:
        module: The user's module; the copy starts with its weights.
        layers: Layers whose outputs :meth:`see` returns, named as in ``named_modules()``.
        training: Whether it runs in train mode (dropout, statistics of the batch) or in eval mode.
        owner: Whose it is; its class is named in messages.

    Raises:
        MisconfigurationException: If the module cannot be copied, a layer is not there, or ``training_step`` fetches
            batches or trains itself.

    """

    def __init__(
        self, module: "LightningModule", *, layers: Sequence[str] = (), training: bool = False, owner: object
    ) -> None:
        check_runs_on_copy(module, owner)
        self._owner = type(owner).__name__
        self.module = copy_of(module).train(training)
        self._tap = FeatureTap(self.module, layers)
        self._metrics = [layer for layer in self.module.modules() if isinstance(layer, Metric)]
        self._pairs = list(self.module.parameters()), list(module.parameters())
        self._seen = SeenCall(self.module, Interception(compiled=False))
        self._graph = LeastGraph()
        self._places: Places | None = None

    def update_average_(self, decay: float) -> Tensor:
        """Moves its parameters to those of the module it was copied from: :func:`update_average_`."""
        return update_average_(*self._pairs, decay)

    def share_memory_with(self, module: "LightningModule") -> None:
        """Gives up its own weights: from now on :meth:`see` needs weights to see through.

        Args:
            module: The module that it was copied from, whose parameters' memory becomes its own.

        """
        theirs = {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
        for path, layer in self.module.named_modules():
            for key, p in own_parameters(layer).items():
                name = plain_name(f"{path}.{key}" if path else key)
                if p is not None and p.is_floating_point():
                    p.data = theirs[name].data
                elif p is not None:  # codes of a quantised layer, a tensor that carries more than its numbers
                    own_parameters(layer)[key] = theirs[name]

    def see(
        self,
        step: "Step",
        technique: "Owner | None" = None,
        *,
        gradient: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> Sight:
        """Runs its ``training_step`` on the step's batch; its ``validation_step`` on one of the validation.

        Nobody notices: random states are put back (so it draws what the user's module draws, if it is asked in
        :meth:`BatchTechnique.observe_batch`), nothing is logged, its buffers and metrics stay what they were. No
        activation is kept. A copy's own lists, if ``training_step`` appends to any, grow.

        Args:
            step: The step, with its final batch.
            technique: Whose ``loss`` chooses the loss call to return; ``None`` if only features are wanted.
            gradient: Whether to keep the graph, for gradients with respect to its parameters, in full precision.
            weights: Parameters and buffers to run with in place of its own, by name as :func:`weights_of` gives them,
                on any device and in any precision; never written to. ``None``: its own.
            outputs: What layers put out in place of their own, by name; they do not run.

        Returns:
            The loss call and the features.

        Raises:
            MisconfigurationException: If the loss call is not certain, ``training_step`` changes its batch in place, or
                it fails in eval mode.
            RuntimeError: If ``training_step`` asks for gradients itself.

        """
        method = "training_step" if step.stage == "train" else "validation_step"
        begins = None if gradient or technique is None else self._graph.of(method)
        look = partial(self._look, step, technique, method, gradient, weights, outputs or {})
        found = None if begins is None else look(begins)
        return found or look(None)  # type: ignore[return-value]  # the whole graph is always enough

    def _look(
        self,
        step: "Step",
        technique: "Owner | None",
        method: str,
        gradient: bool,
        weights: Mapping[str, Tensor] | None,
        outputs: Mapping[str, Tensor],
        begins: Set[str] | None,
    ) -> Sight | None:
        """A pass with a graph from some parameters on, or all; ``None`` if that was too little."""
        tensors = [leaf for leaf in tree_leaves(step.batch) if isinstance(leaf, Tensor)]
        versions = [version_of(tensor) for tensor in tensors]
        try:
            with ExitStack() as undo:
                self._enter(undo, step, technique, gradient)
                undo.enter_context(self._seen.watch(step, technique, gradient=gradient))
                undo.enter_context(given_outputs(self.module, outputs, self._owner))
                parameters = self._parameters(undo, weights, begins)
                self._tap.open = True
                loss = loss_of(getattr(self.module, method)(step.batch, *step.arguments))
                if technique is not None and not gradient and begins is None:
                    self._graph.learn(method, self._seen, loss, parameters)
            seen = dict(self._tap.outputs)
            features = seen if gradient else tree_map_only(Tensor, Tensor.detach, seen)
        except Exception as error:
            if begins is not None:  # a hook on what has no gradient now, say; the whole graph will tell
                return None
            explained = self._explained(error, asks=technique is not None)
            if explained is None:
                raise
            raise explained from error
        finally:
            self._tap.open = False
            self._tap.outputs.clear()
            for metric in self._metrics:
                metric.reset()
        if versions != [version_of(tensor) for tensor in tensors]:
            raise MisconfigurationException(
                f"{type(self.module).__name__}.training_step changes its batch in place, so a second network sees"
                " another batch than the module. Write `x = x + noise` for `x += noise`."
            )
        if begins is not None and not self._graph.is_enough(self._seen, loss):
            return None
        return Sight(self._seen.chosen(), features, made_loss=loss is not None and loss.requires_grad)

    def _enter(self, undo: ExitStack, step: "Step", technique: "Owner | None", gradient: bool) -> None:
        """What surrounds a pass, so that nobody notices."""
        undo.enter_context(isolated_randomness())
        undo.enter_context(lent_trainer(self.module, step.trainer))
        undo.enter_context(kept_buffers(self.module))
        # With a graph, so that calls with a gradient are told apart as they are in the user's own step (a metric's have
        # none); the graph keeps nothing. Without one, where no call is asked for.
        undo.enter_context(torch.set_grad_enabled(gradient or technique is not None))
        undo.enter_context(step.trainer.precision_plugin.train_step_context())
        if gradient:
            undo.enter_context(torch.autocast(self.module.device.type, enabled=False))
        else:
            undo.enter_context(saved_tensors_hooks(_forget, _forgotten))

    def _explained(self, error: Exception, *, asks: bool) -> Exception | None:
        """The error to raise in place of one of ``training_step``'s own; ``None`` for none."""
        if not asks and isinstance(error, RuntimeError) and "does not require grad" in str(error):
            return RuntimeError(_ASKS_FOR_GRADIENTS)
        if self.module.training or not isinstance(error, _OF_ANOTHER_MODE):
            return None
        return MisconfigurationException(
            f"{self._owner} runs `training_step` on a copy of the module in eval mode, where it raises"
            f" {type(error).__name__}: {error}. If it computes a loss in train mode only (a detector returns its"
            " losses in train mode, and boxes in eval mode), let it compute one in eval mode too, or leave"
            f" {self._owner} out."
        )

    def _parameters(
        self, undo: ExitStack, weights: Mapping[str, Tensor] | None, begins: Set[str] | None
    ) -> dict[str, Tensor]:
        """What the pass runs with, by name: its own parameters, or others as leaves of their own and buffers."""
        if weights is None:
            own: dict[str, Tensor] = dict(self.module.named_parameters())
            for name, parameter in own.items():
                if begins is not None and parameter.requires_grad and name not in begins:
                    undo.callback(parameter.requires_grad_)
                    parameter.requires_grad_(False)
            return own
        self._places = places = self._places or Places(self.module)
        others: dict[str, Tensor] = {}
        # Of a network in which nothing is trained (techniques train what is beside it) all calls have a gradient.
        all_frozen = not any(p.requires_grad for _, p in places)
        for name, place in places:
            is_parameter = isinstance(place, nn.Parameter)
            if is_parameter and not place.is_floating_point():  # nobody trains codes of a quantised layer
                continue
            other = weights[plain_name(name)].to(place.device, place.dtype).detach()
            # A leaf of its own, so that calls with a gradient are told apart; a buffer that the step may write to.
            leaf = place.requires_grad or (all_frozen and other.is_floating_point())
            leaf &= begins is None or name in begins
            others[name] = other.requires_grad_(leaf) if is_parameter else other.clone()
        # Not by exchanging `.data`: inside one autocast region torch goes on with the old weights.
        undo.enter_context(places.taken_by(others))
        return others


# What a step raises that gets from its network something else than in train mode.
_OF_ANOTHER_MODE = AttributeError, TypeError, KeyError, IndexError, ValueError, AssertionError
_ASKS_FOR_GRADIENTS = "`training_step` asks for gradients itself; a second network, which gets none, cannot run it."


def _forget(tensor: Tensor) -> None:
    return None


def _forgotten(nothing: None) -> Tensor:
    raise RuntimeError(_ASKS_FOR_GRADIENTS)
