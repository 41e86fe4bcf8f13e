"""Several copies of the rows of a batch, from the layer that makes them to the loss, of which the user's code sees one.

Copies lie one after the other: row ``j * B + b`` is copy j of row b. What runs between the layer and the loss sees
``M * B`` rows; the loss is the mean of the copies' losses; techniques on the loss see samples as ever.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_reg.engine.copy_watches import NormWatch, watch_order
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import descends
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_layer
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.loss import elements as losses
from lightning_reg.engine.loss.call import LossCall

if TYPE_CHECKING:
    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step

__all__ = ["Copies", "CopiesCall", "CopyPlan"]


class CopyPlan(NamedTuple):
    """How a technique lets what follows a layer run on several copies of the rows, see :meth:`Technique.copy_plan`.

    Attributes:
        number: Copies M of each row.
        layer: The layer whose edited output holds them.
        way: ``"rows"``: the output has ``M * B`` rows, copy after copy. ``"passes"``: ``training_step`` runs M times.
        outputs: With ``"rows"``, what the user's code gets of the output of ``head``: the rows of the ``"first"`` copy,
            or of ``"all"``.
        head: With ``"rows"``, the layer at whose output that is; ``None`` for the outermost module that is running.
        backbone: With ``"passes"``, the layer that runs in the first pass only.

    """

    number: int
    layer: str
    way: Literal["rows", "passes"] = "rows"
    outputs: Literal["first", "all"] = "first"
    head: str | None = None
    backbone: str | None = None


class Copies:
    """Follows the copies through a training step.

    Args:
        owner: The technique whose copies they are.
        plan: Its plan.
        module: The user's module.

    Raises:
        MisconfigurationException: If a name of the plan matches no layer.

    """

    def __init__(self, owner: "Owner", plan: CopyPlan, module: nn.Module) -> None:
        self.owner, self.plan, self.name = owner, plan, type(owner).__name__
        self._named = named_layers(module)
        for layer in (plan.layer, plan.head, plan.backbone):
            if layer is not None and layer not in self._named:
                refuse_layer(layer, self._named, self.name)
        self._module = module
        self._norms = NormWatch(self._named)
        self._ever_called = self._ever_active = self._ever_made = self._said_idle = False
        self._depends: dict[tuple[str, int, int], bool] = {}
        self._handles: list[RemovableHandle] = []
        if plan.way == "rows":
            self._handles += watch_order(self._named, self._check_order)
        if plan.way == "rows" and plan.outputs == "first":
            self._watch_ends()
        self.begin(redirected=False)

    def _watch_ends(self) -> None:
        head, layer = self.plan.head, self.plan.layer
        if head is not None:
            self._handles.append(self._named[head].register_forward_hook(_End(self, head)))
            return
        around: dict[str, nn.Module] = {"": self._module}
        for name, module in self._module.named_modules():
            plain = f"{name}.".replace("_orig_mod.", "")[:-1]
            if plain and layer.startswith(f"{plain}."):
                around.setdefault(plain, module)  # of a compiled module the one outside of the graph
        for name, module in around.items():
            self._handles.append(module.register_forward_pre_hook(_Start(self)))
            self._handles.append(module.register_forward_hook(_End(self, name)))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._norms.stop()

    def shut(self) -> None:
        """The step is over; nothing of it is kept."""
        self.begin(redirected=False)

    # -- one pass through training_step -------------------------------------------------------------------------------

    def begin(self, *, redirected: bool) -> None:
        """A pass through ``training_step`` begins.

        Args:
            redirected: Whether the strategy reaches ``training_step`` through the module's ``__call__``, as DDP does.

        """
        self._rows: int | None = None
        self._sizes: set[int] = set()
        self._made: Tensor | None = None
        self._handed: list[tuple[Tensor, Tensor, int]] = []
        self._depth = -1 if redirected else 0
        self._used = self._made_now = False

    def called(self, *, active: bool) -> None:
        """The layer is called; ``active`` in training mode and with gradients recorded."""
        self._ever_called = True
        self._ever_active |= active

    def reached(self, name: str, given: Any) -> bool:
        """Whether a layer comes after the copies were made, by its name and input."""
        if self.plan.way == "passes":
            return self._made_now
        # Without a graph the layer itself is in another pass: one behind its own copies would mostly have weights.
        return self._holds_copies(given) and (name != self.plan.layer or given.requires_grad)

    def made(self, given: Any, output: Any, step: "Step") -> None:
        """The layer has made the copies."""
        self._made_now = True
        if self.plan.way == "rows":
            blocks = 1 if step.views is None else step.views.count
            sizes = {blocks * size for size in step.batch_sizes}
            if given.dim() == 3 and given.shape[1] in sizes and all(given.shape[0] % size for size in sizes):
                self._refuse_order(f"{self.plan.layer!r} gets", given)
            self._rows, self._made, self._sizes = given.shape[0], output, {given.shape[0], *sizes}
            if not self._ever_made:
                self._norms.start(self._refuse_norm)
        self._ever_made = True

    def first(self, value: Any) -> Any:
        """The rows of the first copy, of a tensor that holds all copies; anything else as it is."""
        return value[: value.shape[0] // self.plan.number] if self._holds_copies(value) else value

    def _holds_copies(self, value: Any) -> bool:
        if self._rows is None or self._made is None or not isinstance(value, Tensor) or not value.dim():
            return False
        if value.shape[0] == 0 or value.shape[0] % (self.plan.number * self._rows):
            return False
        if self._made.grad_fn is None or not value.requires_grad:  # a frozen backbone: the graph begins behind it
            return True
        return descends(value, self._made.grad_fn)

    def enter(self) -> None:
        """A module around the layer begins to run."""
        self._depth += 1

    def leave(self, name: str, output: Any) -> Any:
        """A module around the layer, or the head that was named, has run; ``None`` for the output as it is."""
        if self.plan.head is None:
            self._depth -= 1
            if self._depth != 0:
                return None
        if self._rows is None:
            return None
        leaves, structure = tree_flatten(output)
        firsts = [self._hand_out(leaf, (name, position, len(leaves))) for position, leaf in enumerate(leaves)]
        self._norms.check(self._refuse_norm)
        if self.plan.head is None:
            self._rows = self._made = None
        return tree_unflatten(firsts, structure)

    def _hand_out(self, value: Any, place: tuple[str, int, int]) -> Any:
        number = self.plan.number
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] == 0:
            return value
        if not self._fits(value):
            return value
        if place not in self._depends:
            self._depends[place] = self._comes_from_copies(value)
        if not self._depends[place]:
            return value
        first = value[: value.shape[0] // number]
        self._handed.append((first, value, first._version))
        return first

    def _fits(self, value: Tensor) -> bool:
        """Whether there can be a row for each copy of each sample: a value over all rows may have any length."""
        return any(value.shape[0] % (self.plan.number * size) == 0 for size in self._sizes)

    def _comes_from_copies(self, value: Tensor) -> bool:
        made = self._made
        if made is None or self._rows is None or not value.requires_grad:
            return False
        if made.grad_fn is None:  # a frozen backbone: the graph begins behind it
            return value.shape[0] % (self.plan.number * self._rows) == 0
        return descends(value, made.grad_fn)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def loss_call(
        self, function: Callable[..., Any], arguments: dict[str, Any], step: "Step", site: str
    ) -> "CopiesCall | None":
        """The call of a loss on all copies, ``None`` for one that has nothing to do with them."""
        if self.plan.way == "passes" or (self._rows is None and not self._handed):
            return None
        names = losses.LOSS_FUNCTIONS[function]
        all_rows = {n: w for n in names if (w := self._all_rows(arguments.get(n))) is not None}
        if names[0] not in all_rows and not self._is_of_copies(function, arguments):
            return None
        number = self.plan.number
        rows = len(all_rows.get(names[0], arguments[names[0]]))
        for name in names:
            value: Any = arguments.get(name)
            if _goes_by_rows(function, name, value, arguments[names[0]]) and len(value) == rows:
                all_rows[name] = value
        self._used = True
        firsts = {name: value[: value.shape[0] // number] for name, value in all_rows.items()}
        return CopiesCall(function, {**arguments, **firsts}, all_rows, number, step, site)

    def _all_rows(self, value: Any) -> Tensor | None:
        """All copies of what the user's code got of the first, or of a view of that."""
        if not isinstance(value, Tensor) or not value.dim():
            return None
        for first, full, version in self._handed:
            if value is not first and (value._base is None or value._base is not first._base):
                continue
            offset = value.storage_offset() - full.storage_offset()
            tiles = value.shape[0] * value.stride(0) == first.shape[0] * first.stride(0)
            if not tiles or not value.requires_grad or not 0 <= offset < max(full.stride(0), 1):
                continue
            if value._version != version:
                raise MisconfigurationException(
                    f"{self.name}: the output of the layers after {self.plan.layer!r} is changed in place before the"
                    f' loss, in one of its copies only. Write it out of place, or pass `{self.name}(outputs="all")`.'
                )
            if value is first:
                return full
            shape = (self.plan.number * value.shape[0], *value.shape[1:])
            return full.as_strided(shape, value.stride(), value.storage_offset())
        return None

    def _is_of_copies(self, function: Callable[..., Any], arguments: dict[str, Any]) -> bool:
        value, number = arguments[losses.LOSS_FUNCTIONS[function][0]], self.plan.number
        if self._rows is None or not isinstance(value, Tensor) or not value.dim() or value.shape[0] % number:
            return False
        name = losses.target_name(function)
        target = None if name is None else arguments[name]
        if target is not None and target.dim() and target.shape[0] * number == value.shape[0]:
            return True
        same = target is None or (target.dim() > 0 and target.shape[0] == value.shape[0])
        return same and self._fits(value) and self._comes_from_copies(value)

    # -- what is refused ----------------------------------------------------------------------------------------------

    def end(self, *, made_loss: bool) -> None:
        """A pass through ``training_step`` has ended.

        Raises:
            MisconfigurationException: If the layer was never called, or no loss was computed from its copies.

        """
        self._norms.check(self._refuse_norm)
        if not self._ever_called:
            self._refuse_uncalled()
        if not self._ever_active and not self._said_idle:
            self._said_idle = True
            host.rank_zero_warn(
                f"{self.name}: the layer {self.plan.layer!r} is not in training mode or runs without gradient, so"
                " nothing is changed as long as it is. This is said once."
            )
        if made_loss and self.plan.way == "rows" and self._made_now and not self._used:
            raise MisconfigurationException(
                f"{self.name}: the step made a loss, but no loss function of torch got the output of the layers after"
                f" {self.plan.layer!r} as it is or as a view. If layers of yours come behind the module around it, name"
                f' the last one, `{self.name}(head="...")`; if `training_step` works on the output first (log_softmax,'
                f' a cast), pass `{self.name}(outputs="all")` and get all {self.plan.number} * B rows; if the loss is'
                f' written by hand or compares samples, pass `{self.name}(mode="replay", backbone="...")`.'
            )

    def _refuse_uncalled(self) -> None:
        layers = [name for name, layer in self._named.items() if "Dropout" in type(layer).__name__]
        raise MisconfigurationException(
            f"{self.name}: the layer {self.plan.layer!r} was not called in the first training step, so nothing can be"
            " attached to it. Its rate may be used by a function (nn.MultiheadAttention and fused layers call"
            " F.dropout), it may lie in a branch that did not run, or its network was compiled and run before."
            f" Dropout layers of the module: {', '.join(map(repr, layers)) or 'none'}."
        )

    def explain(self, error: BaseException) -> None:
        """Says with the user's error that rows are copies, if they are where it happened."""
        if self._rows is not None and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"lightning_reg: what follows {self.plan.layer!r} runs on {self.plan.number} copies of the"
                f" {self._rows} rows ({self.name}). If it joins them with tensors of {self._rows} rows (a residual"
                ' connection), name a dropout layer nearer to the loss, or use `mode="replay"`.'
            )

    def _check_order(self, name: str, given: Any) -> None:
        if self._rows is None or not isinstance(given, Tensor) or given.dim() != 3:
            return
        if given.shape[1] % (self.plan.number * self._rows) and self._holds_copies(given):
            self._refuse_order(f"{name!r}, which runs after {self.plan.layer!r}, takes", given)

    def _refuse_order(self, what: str, given: Tensor) -> None:
        raise MisconfigurationException(
            f"{self.name}: {what} the samples as second dimension (found {tuple(given.shape)}), so copies of the rows"
            " would follow one another in time. Use the layers with the samples first (`batch_first=True`), or pass"
            f' `{self.name}(mode="replay", backbone="...")`.'
        )

    def _refuse_norm(self, name: str) -> None:
        raise MisconfigurationException(
            f"{self.name}: the batch normalization {name!r} runs after {self.plan.layer!r}, so it would take its"
            f" statistics over {self.plan.number} copies of each row. Name a dropout layer behind it, use a"
            f' normalization per sample, or pass `{self.name}(mode="replay", backbone="...")`.'
        )


class CopiesCall(LossCall):
    """A loss call on several copies of the rows: one loss per sample, the mean over its copies.

    Techniques see the samples: B targets, B losses; :attr:`input` is the mean over the copies.

    Args:
        function: The function of ``torch.nn.functional`` that was called.
        arguments: Its arguments by name, of the first copy.
        all_rows: Those of them that were given for all copies, ``(M * B, ...)``.
        number: Number of copies M.
        step: The training step that it happened in.
        site: Where the user's code called it, as ``file.py:line``, or "".

    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: dict[str, Any],
        all_rows: dict[str, Tensor],
        number: int,
        step: "Step",
        site: str = "",
    ) -> None:
        super().__init__(function, arguments, step, site)
        self._given_rows, self._number = all_rows, number

    @cached_property
    @override
    def input(self) -> Tensor:
        """The first argument, mean over the copies."""
        value = self._given_rows[losses.LOSS_FUNCTIONS[self.function][0]]
        return self._copies_of(value).mean(0)

    @override
    def replace_target(self, target: Tensor) -> None:
        """Puts other targets ``(B, ...)`` into the call, for all copies; see the base class."""
        super().replace_target(target)
        self._given_rows = {name: value for name, value in self._given_rows.items() if name != self.target_name}

    @override
    def with_arguments(self, arguments: dict[str, Any]) -> "CopiesCall":
        """The same call with other arguments; those that were given for all copies and are changed count for all."""
        kept = {n: v for n, v in self._given_rows.items() if arguments[n] is self.arguments[n]}
        return CopiesCall(self.function, arguments, kept, self._number, self.step, self.site)

    @override
    def copies(self) -> Sequence[LossCall]:
        """The call for the rows of each copy."""
        rows = {name: self._copies_of(value) for name, value in self._given_rows.items()}
        calls = []
        for number in range(self._number):
            own = {name: value[number] for name, value in rows.items()}
            call = LossCall(self.function, {**self.arguments, **own}, self.step, self.site)
            call.given_target = self.given_target
            calls.append(call)
        return calls

    @property
    @override
    def logits(self) -> Tensor:
        r"""Logarithm of the mean over the copies of the class probabilities, ``(B, C)``: its softmax is that mean.

        Raises:
            MisconfigurationException: If the call is no single-label classification of samples.

        """
        _ = super().logits
        rows = self._given_rows[losses.LOSS_FUNCTIONS[self.function][0]]
        log_probs = F.log_softmax(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
        return self._copies_of(log_probs).logsumexp(0) - math.log(self._number)

    @cached_property
    @override
    def decomposition(self) -> losses.Decomposition:
        """Elements of the loss of each sample, mean over its copies, with gradient."""
        elements, plain, reduction = losses.decompose(self.function, self.all_arguments())
        return losses.Decomposition(self._mean(elements), self._per_copy(plain, reduction), reduction)

    @cached_property
    @override
    def plain(self) -> Tensor:
        """Mean over the copies of the values that the user's own call would return for each."""
        if "decomposition" in self.__dict__:
            return self.decomposition.plain
        return self._per_copy(self.function(**self.all_arguments()), self.reduction)

    def spread(self) -> Tensor:
        """Standard deviation over the copies of the loss, ``()``, without gradient."""
        elements = losses.decompose(self.function, self.all_arguments()).elements.detach().float()
        per_copy = self._copies_of(elements).flatten(1)
        mass = per_copy.shape[1] if self.mass is None else self.mass.sum()
        return (per_copy.sum(1) / mass).std()

    def all_arguments(self) -> dict[str, Any]:
        """The arguments for all copies: what was given for each row is repeated."""
        first = losses.LOSS_FUNCTIONS[self.function][0]
        one, rows = self.arguments[first], self.arguments[first].shape[0]
        arguments = {**self.arguments, **self._given_rows}
        for name, value in arguments.items():
            repeated = name not in self._given_rows and _goes_by_rows(self.function, name, value, one)
            if repeated and value.shape[0] == rows:
                arguments[name] = value.repeat(self._number, *(1 for _ in value.shape[1:]))
        return arguments

    def _per_copy(self, value: Tensor, reduction: str) -> Tensor:
        if reduction == "sum":
            return value / self._number
        return self._mean(value).to(value.dtype) if reduction == "none" else value

    def _mean(self, value: Tensor) -> Tensor:
        return self._copies_of(value.to(torch.promote_types(value.dtype, torch.float32))).mean(0)

    def _copies_of(self, value: Tensor) -> Tensor:
        return value.reshape(self._number, len(value) // self._number, *value.shape[1:])


# Where `weight` weights elements and not classes.
_WEIGHTS_OF_ELEMENTS = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.mse_loss,
    F.l1_loss,
    F.huber_loss,
)


def _goes_by_rows(function: Callable[..., Any], name: str, value: Any, first: Tensor) -> bool:
    """Whether an argument has a row for each row of the first one, if it has as many."""
    if not isinstance(value, Tensor) or not value.dim() or name in ("pos_weight", "linear_weight", "linear_bias"):
        return False
    return name != "weight" or (function in _WEIGHTS_OF_ELEMENTS and value.dim() == first.dim())


class _Start:
    def __init__(self, copies: Copies) -> None:
        self.copies = copies

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: Any) -> None:
        self.copies.enter()


class _End:
    def __init__(self, copies: Copies, name: str) -> None:
        self.copies, self.name = copies, name

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self.copies.leave(self.name, output)
