"""Several copies of the rows of a batch, from the layer that makes them to the loss, of which the user's code sees one.

Copies lie one after the other: row ``j * B + b`` is copy j of row b. What runs between the layer and the loss sees
``M * B`` rows; the loss is the mean of the copies' losses; techniques on the loss see samples as ever.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_reg.dropout.multi_sample_dropout._plan import CopyPlan, LayerCopies
from lightning_reg.dropout.multi_sample_dropout._replays import Replays
from lightning_reg.dropout.multi_sample_dropout._rows import CopiedRows
from lightning_reg.dropout.multi_sample_dropout._watches import NormWatch, watch_order
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.autograd import is_checkpointed
from lightning_reg.engine.host.errors import MisconfigurationException, refuse_layer
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.layers.named import LayerHook, named_layers
from lightning_reg.engine.loss.call import LossCall
from lightning_reg.engine.loss.elements import has_gradient
from lightning_reg.engine.loss.result import loss_of, with_loss
from lightning_reg.engine.run.part import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule

    from lightning_reg.engine.host.owner import Owner
    from lightning_reg.engine.step import Step

__all__ = ["Copies"]


class Copies(Part):
    """Makes the copies in named layers, and follows them through a training step.

    Args:
        owner: The technique whose copies they are.
        plan: Its plan.
        module: The user's module.
        layers: Names of the layers whose outputs are sampled, of a configured module.
        sample: The output of a layer with its copies, ``None`` for its own output.

    """

    def __init__(
        self,
        owner: "Owner",
        plan: CopyPlan,
        module: "LightningModule",
        layers: "Callable[[nn.Module], Sequence[str]]",
        sample: Callable[[LayerCopies], Any],
    ) -> None:
        self.owner, self.plan, self.name = owner, plan, type(owner).__name__
        self._module, self._layers, self._sample = module, layers, sample
        self._named: dict[str, nn.Module] = {}
        self._norms = NormWatch({})
        self._checked: set[str] = set()
        self._ever_called = self._ever_active = self._ever_made = self._said_idle = False
        self._depends: dict[tuple[str, int, int], bool] = {}
        self._handles: list[RemovableHandle] = []
        self._step: Step | None = None
        self._begin(redirected=False, run=0)

    @override
    def prepare(self) -> None:
        """Puts hooks on the layers.

        Raises:
            MisconfigurationException: If a name of the plan matches no layer.

        """
        plan, named = self.plan, named_layers(self._module)
        for layer in (plan.layer, plan.head, plan.backbone):
            if layer is not None and layer not in named:
                refuse_layer(layer, named, self.name)
        self._named, self._norms = named, NormWatch(named)
        if plan.way == "rows":
            self._handles += watch_order(named, self._check_order)
        if plan.way == "rows" and plan.outputs == "first":
            self._watch_ends()
        for name in self._layers(self._module):
            # Inside of the hooks of all others, so that these see an output with all copies.
            self._handles.append(named[name].register_forward_pre_hook(_Before(self, name)))
            self._handles.append(named[name].register_forward_hook(_After(self, name), prepend=True))

    def _watch_ends(self) -> None:
        head, layer = self.plan.head, self.plan.layer
        if head is not None:
            self._handles.append(self._named[head].register_forward_hook(_End(self, head)))
            return
        around: dict[str, nn.Module] = {"": self._module}
        for name, module in self._module.named_modules():
            plain = plain_name(f"{name}.")[:-1]
            if plain and layer.startswith(f"{plain}."):
                around.setdefault(plain, module)  # of a compiled module the one outside of the graph
        for name, module in around.items():
            self._handles.append(module.register_forward_pre_hook(_Start(self)))
            self._handles.append(module.register_forward_hook(_End(self, name)))

    @override
    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._norms.stop()

    # -- a step, and one pass through training_step -------------------------------------------------------------------

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        if self.owner not in step.active:
            yield
            return
        self._step = step
        once = step.network
        step.feature_view = self._first
        if self.plan.way == "rows":
            step.call_changes[self.owner] = self._on_copies
            step.network = lambda batch: self._pass(once, batch, 0)
        else:
            step.network = lambda batch: self._replay(once, batch, step)
        try:
            yield
            self._end(made_loss=step.made_loss)
        except Exception as error:
            self._explain(error)
            raise
        finally:
            self._step = None
            self._begin(redirected=False, run=0)

    def _first(self, output: Any) -> Any:
        return self._rows.first(output)  # of the present pass

    def _pass(self, once: Callable[[Any], Any], batch: Any, run: int) -> Any:
        trainer = self._module.trainer
        self._begin(redirected=host.reaches_step_through_call(trainer, self._module), run=run)
        return once(batch)

    def _replay(self, once: Callable[[Any], Any], batch: Any, step: "Step") -> Any:
        backbone = self.plan.backbone or ""
        replays = Replays(self._module, (backbone, self._named[backbone]), self.plan.number, self.name)
        outputs = replays.run(lambda batch, run: self._pass(once, batch, run), batch)
        losses = [loss for output in outputs if (loss := loss_of(output)) is not None]
        if not losses:
            return outputs[0]
        values = torch.stack([loss.to(torch.promote_types(loss.dtype, torch.float32)) for loss in losses])
        if step.is_logging:
            step.log(self.owner, "spread", values.detach().std())
        return with_loss(outputs[0], values.mean())

    def _begin(self, *, redirected: bool, run: int) -> None:
        """A pass through ``training_step`` begins.

        Args:
            redirected: Whether the strategy reaches ``training_step`` through the module's ``__call__``, as DDP does.
            run: Number of the pass.

        """
        self._rows = CopiedRows(self.plan, self.name, self._depends)
        self._depth = -1 if redirected else 0
        self._made_now = False
        self._run, self._number = run, 0
        self._inputs: dict[str, tuple[Any, bool]] = {}

    # -- the layers that are sampled ----------------------------------------------------------------------------------

    def before(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keeps the input of a layer, and says what the layer gets in its place; ``None`` for the same."""
        if self._step is None or not args:
            return None
        works = layer.training and torch.is_grad_enabled()
        if name == self.plan.layer:
            self._ever_called = True
            self._ever_active |= works
        if not layer.training:
            return None
        given = args[0]
        after = self._comes_after(name, given)
        if name not in self._checked and (after or name == self.plan.layer):
            self._check_is_run_once(name, recorded=works)
        if not works:
            return None
        self._inputs[name] = given, after
        # The layer's own output is given up where the rows are copies. It runs on the first copy alone, so that what it
        # draws is what it would have drawn.
        first = self._rows.first(given) if after else given
        if getattr(layer, "inplace", False) and isinstance(first, Tensor):
            first = first.clone()
        return None if first is given else (first, *args[1:])

    def after(self, name: str, layer: nn.Module) -> Any:
        """The output with its copies; ``None`` for the layer's own."""
        if self._step is None or name not in self._inputs:
            return None
        given, after = self._inputs.pop(name)
        result = self._sample(LayerCopies(name, layer, given, self._step, self._number, after, self._run))
        if result is None:
            return None
        self._number += 1
        if not after and name == self.plan.layer:
            self._note_copies(given, result, self._step)
        return result

    def _comes_after(self, name: str, given: Any) -> bool:
        """Whether a layer comes after the copies were made, by its name and input."""
        if self.plan.way == "passes":
            return self._made_now
        # Without a graph the layer itself is in another pass: one behind its own copies would mostly have weights.
        return self._rows.holds_copies(given) and (name != self.plan.layer or given.requires_grad)

    def _note_copies(self, given: Any, output: Any, step: "Step") -> None:
        """The layer has made the copies."""
        self._made_now = True
        if self.plan.way == "rows":
            blocks = 1 if step.views is None else step.views.count
            sizes = {blocks * size for size in step.batch_sizes}
            if given.dim() == 3 and given.shape[1] in sizes and all(given.shape[0] % size for size in sizes):
                self._refuse_order(f"{self.plan.layer!r} gets", given)
            self._rows.begin(given.shape[0], sizes, output)
            if not self._ever_made:
                self._norms.start(self._refuse_norm)
        self._ever_made = True

    def enter(self) -> None:
        """A module around the layer begins to run."""
        self._depth += 1

    def leave(self, name: str, output: Any) -> Any:
        """A module around the layer, or the head that was named, has run; ``None`` for the output as it is."""
        if self.plan.head is None:
            self._depth -= 1
            if self._depth != 0:
                return None
        if self._rows.count is None:
            return None
        leaves, structure = tree_flatten(output)
        firsts = [self._rows.hand_out(leaf, (name, position, len(leaves))) for position, leaf in enumerate(leaves)]
        self._norms.check(self._refuse_norm)
        if self.plan.head is None:
            self._rows.leave()
        return tree_unflatten(firsts, structure)

    def _on_copies(self, call: LossCall) -> LossCall:
        """The call of a loss on all copies; the call itself if it has nothing to do with them."""
        evaluation = self._rows.evaluation_of(call)
        if evaluation is None:
            return call
        if call.step.is_logging and torch.is_grad_enabled() and has_gradient(call.arguments):
            call.step.log(self.owner, "spread", evaluation.spread())
        return replace(call, evaluation=evaluation, given_target=evaluation.target)

    # -- what is refused ----------------------------------------------------------------------------------------------

    def _end(self, *, made_loss: bool) -> None:
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
        if made_loss and self.plan.way == "rows" and self._made_now and not self._rows.are_used:
            raise MisconfigurationException(
                f"{self.name}: the step made a loss, but no loss function of torch got the output of the layers after"
                f" {self.plan.layer!r} as it is or as a view, so it has one mask. If layers of yours come behind the"
                f' module around it, name the last one before the loss, `{self.name}(head="...")`; if `training_step`'
                f' works on the output first (log_softmax, a cast), pass `{self.name}(outputs="all")` and get all'
                f" {self.plan.number} * B rows; if the loss is written by hand or compares samples, or if the output is"
                f' added to tensors of B rows (a residual connection), pass `{self.name}(mode="replay",'
                ' backbone="...")`, or name a dropout layer that nothing but layers follows.'
            )

    def _refuse_uncalled(self) -> None:
        layers = [name for name, layer in self._named.items() if "Dropout" in type(layer).__name__]
        raise MisconfigurationException(
            f"{self.name}: the layer {self.plan.layer!r} was not called in the first training step, so nothing can be"
            " attached to it. Its rate may be used by a function (nn.MultiheadAttention and fused layers call"
            " F.dropout), it may lie in a branch that did not run, or its network was compiled and run before."
            f" Dropout layers of the module: {', '.join(map(repr, layers)) or 'none'}."
        )

    def _explain(self, error: Exception) -> None:
        """Says that rows are copies where an error happened, by a sentence in its place if it comes from that."""
        rows, number = self._rows.count, self.plan.number
        if rows is None:
            return
        sizes = set(re.findall(r"\d+", str(error)))
        if isinstance(error, RuntimeError) and number > 1 and {str(rows), str(number * rows)} <= sizes:
            raise MisconfigurationException(
                f"{self.name}: what follows {self.plan.layer!r} runs on {number} copies of the {rows} rows, and is"
                f" joined there with a tensor of {rows} rows, by a connection across a UNet or a residual one; torch"
                f" says: {str(error).strip().splitlines()[0]} Name a dropout layer that nothing but layers follows, or"
                f' pass `{self.name}(mode="replay", backbone="...")`.'
            ) from error
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"lightning_reg: what follows {self.plan.layer!r} runs on {number} copies of the {rows} rows"
                f" ({self.name}). If it joins them with tensors of {rows} rows (a residual connection), name a dropout"
                ' layer nearer to the loss, or use `mode="replay"`.'
            )

    def _check_is_run_once(self, name: str, *, recorded: bool) -> None:
        if recorded:  # one without gradient may be a pass of the user's own
            self._checked.add(name)
        if is_checkpointed():
            raise MisconfigurationException(
                f"{self.name} puts copies in the place of what {name!r} returns, and that layer runs under an"
                " activation checkpoint, where it would run again without them in the backward pass. Checkpoint the"
                f" layers before {self.plan.layer!r} alone (those behind it may be under one of their own if they have"
                " no dropout)."
            )

    def _check_order(self, name: str, given: Any) -> None:
        if self._rows.count is None or not isinstance(given, Tensor) or given.dim() != 3:
            return
        if given.shape[1] % (self.plan.number * self._rows.count) and self._rows.holds_copies(given):
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


class _Hook(LayerHook):
    def __init__(self, copies: Copies, name: str = "") -> None:
        self.copies, self.name = copies, name


class _Start(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: Any) -> None:
        self.copies.enter()


class _End(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self.copies.leave(self.name, output)


class _Before(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        return self.copies.before(self.name, layer, args)


class _After(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self.copies.after(self.name, layer)
