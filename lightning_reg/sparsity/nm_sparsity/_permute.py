"""Channel permutations: groups that keep more magnitude, in a network that goes on computing the same."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.modules import Dropout, own_buffers, own_parameters
from lightning_reg.engine.host.quiet import lent_trainer
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.loss.result import loss_of
from lightning_reg.engine.networks.peer import check_runs_on_copy, copy_of
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.watching import counted, progress
from lightning_reg.sparsity.nm_sparsity._graph import Chain, find_chain
from lightning_reg.sparsity.nm_sparsity._layers import Weight
from lightning_reg.sparsity.nm_sparsity.core import best_channel_permutation, nm_mask

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["Permutation", "Probe", "permute_network_", "weights_in_bar"]

_TOLERANCE = 1e-5  # of layers tried alone
_STEP_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of losses of a whole training step


@dataclass(frozen=True)
class Permutation:
    """What became of the input channels of one weight.

    Args:
        before: Share of the magnitude that the mask kept before.
        after: The same afterwards.
        why_not: Why they were not permuted; "" if they were.
        undo: Puts them back.

    """

    before: float = 1.0
    after: float = 1.0
    why_not: str = ""
    undo: Callable[[], None] = lambda: None

    @override
    def __str__(self) -> str:
        if self.why_not:
            return f"not permuted: {self.why_not}"
        return f"permuted: keeps {100 * self.after:.1f} % of the magnitude, before {100 * self.before:.1f} %"


def permute_network_(
    module: nn.Module,
    weights: Sequence[Weight],
    owner: str,
    unchanged: Callable[[], bool] = lambda: True,
    shown: Callable[[Sequence[Weight], str], Iterable[Weight]] = lambda weights, what: weights,
) -> dict[str, Permutation]:
    """Permutes the input channels of sparse weights, and with them whatever makes these channels; in place.

    Where that would change what the layers compute, by more than 1e-5 of it on random input, it is undone; and where
    the whole network does not compute the same any more (a layer that is called in another way than its holder's
    ``forward`` says, or has its weights read elsewhere).

    Args:
        module: The module; its function stays the same up to rounding.
        weights: Sparse weights, grouped along their input channels.
        owner: Class to name in errors.
        unchanged: Whether the whole network computes what it did before.
        shown: Goes through the weights and shows how far it is, under the words given.

    Returns:
        What became of each weight, by name.

    Raises:
        MisconfigurationException: If there is no weight that can be permuted.

    """
    layers = named_layers(module) | {"": module}
    counts = Counter(id(p) for layer in layers.values() for p in own_parameters(layer).values() if p is not None)
    found = {weight.name: _permuted_(layers, counts, weight) for weight in shown(weights, "channel orders")}
    if not unchanged():
        for permutation in reversed(found.values()):
            permutation.undo()
        again = shown(weights, "channel orders, one layer at a time")
        found = {weight.name: _tried_alone_(layers, counts, weight, unchanged) for weight in again}
    if all(permutation.why_not for permutation in found.values()):
        reasons = "".join(f"\n  {name}: {permutation.why_not}" for name, permutation in found.items())
        raise MisconfigurationException(
            f"{owner}(permute=True): of {', '.join(found)} none can be permuted.{reasons}\nA layer can be where its"
            " input comes from another linear layer or convolution in the `forward` of a module that torch.fx can"
            " trace, through activations, dropout, pooling and norms alone. Write permute=False."
        )
    return found


def _tried_alone_(
    layers: Mapping[str, nn.Module], counts: Mapping[int, int], weight: Weight, unchanged: Callable[[], bool]
) -> Permutation:
    permutation = _permuted_(layers, counts, weight)
    if permutation.why_not or unchanged():
        return permutation
    permutation.undo()
    return Permutation(why_not="the training step would compute something else with it")


@torch.no_grad()
def _permuted_(layers: Mapping[str, nn.Module], counts: Mapping[int, int], weight: Weight) -> Permutation:
    layer, _, parameter = weight.name.rpartition(".")
    if parameter != "weight":
        return Permutation(why_not="it is a projection of an attention")
    chain = find_chain(layers, layer)
    if isinstance(chain, str):
        return Permutation(why_not=chain)
    producer, consumer = chain.modules[0], chain.modules[-1]
    # A weight that is used elsewhere too would change there.
    if any(counts[id(own_parameters(end)["weight"])] != 1 for end in (producer, consumer)):
        return Permutation(why_not="it, or the layer before it, shares its weight")
    x, computed = _tried(chain)
    if computed is None:
        return Permutation(why_not="it could not be tried on random input")
    value: Tensor = own_parameters(consumer)["weight"]  # type: ignore[assignment]  # `find_chain` saw it
    order, before = best_channel_permutation(value, weight.n, weight.m), _kept(value, weight)
    _permute_(chain, order)
    difference = (chain.run(x, _twins(chain)) - computed).abs().max()
    if not difference <= _TOLERANCE * computed.abs().max():
        _permute_(chain, order.argsort())
        return Permutation(why_not=f"it would compute something else, by {float(difference):.2g}")
    return Permutation(before, _kept(value, weight), undo=lambda: _permute_(chain, order.argsort()))


@torch.no_grad()
def _tried(chain: Chain) -> tuple[Tensor, Tensor | None]:
    """Random input of the producer, and what the consumer makes of it; in double precision."""
    producer = chain.modules[0]
    weight: Tensor = own_parameters(producer)["weight"]  # type: ignore[assignment]  # as above
    generator, twins = torch.Generator().manual_seed(0), _twins(chain)
    sizes = (1,) if weight.dim() == 2 else (max(weight.shape[2:]), 8, 16, 32, 64)
    x = torch.empty(0)
    for size in sizes:  # pools may need a larger image
        shape = (6, weight.shape[1], *(size for _ in weight.shape[2:]))
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
        try:
            return x, chain.run(x, twins)
        except (RuntimeError, ValueError):
            continue
    return x, None


def _twins(chain: Chain) -> dict[nn.Module, nn.Module]:
    """Copies in double precision, in evaluation mode: rounding is none of the difference then."""
    return {module: copy.deepcopy(module).double().eval() for module in chain.modules}


@torch.no_grad()
def _permute_(chain: Chain, order: Tensor) -> None:
    for owner in (chain.modules[0], *chain.norms):
        for value in (*own_parameters(owner).values(), *own_buffers(owner).values()):
            if value is not None and value.dim():
                value.copy_(value[order])
    consumer: Tensor = own_parameters(chain.modules[-1])["weight"]  # type: ignore[assignment]  # `find_chain` saw it
    consumer.copy_(consumer[:, order])


def _kept(value: Tensor, weight: Weight) -> float:
    magnitudes = value.detach().abs().double()
    return float((magnitudes * nm_mask(value, weight.n, weight.m)).sum() / magnitudes.sum())


def weights_in_bar(trainer: "Trainer", weights: Sequence[Weight], what: str) -> Iterator[Weight]:
    """Goes through weights and shows in Lightning's bar how far it is, with the time left.

    Args:
        trainer: The Trainer.
        weights: The weights.
        what: What is done with them.

    Yields:
        The weights.

    """
    with progress(trainer, f"NMSparsity: {what}", len(weights)) as advance:
        yield from counted(weights, advance)


class Probe:
    """Losses of ``training_step`` on the first batch, in train mode without dropout and in eval mode.

    In double precision, where the module's code lets it, so that rounding is none of the difference. Memory: a copy of
    the module in double precision.

    Args:
        trainer: The Trainer that starts to train.
        module: The user's module.
        owner: Whose it is; its class is named in messages.

    Raises:
        MisconfigurationException: If ``training_step`` cannot be run on a copy, or makes no loss.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", owner: object) -> None:
        check_runs_on_copy(module, owner)
        self._trainer, self._module = trainer, module
        with attached_engine(trainer).training_steps() as steps:
            step = next(steps, None)
        if step is None:
            raise MisconfigurationException(f"{type(owner).__name__}: there is no training batch to try it on.")
        self._step, self._dtype = step, torch.float64
        try:
            self._before = self._losses()
        except (RuntimeError, ValueError, TypeError):  # the user's code makes tensors of float32
            self._dtype = torch.float32
            self._before = self._losses()
        if not len(self._before):
            raise MisconfigurationException(
                f"{type(owner).__name__}: `training_step` makes no loss of the first batch, so that it cannot be tried."
            )

    def unchanged(self) -> bool:
        """Whether the module makes the same of the batch as in the beginning, on all ranks."""
        now, tolerance = self._losses(), _STEP_TOLERANCES[self._dtype]
        differs = ~torch.isclose(now, self._before, rtol=tolerance, atol=tolerance).all()
        group = host.data_parallel_group(self._trainer)
        return not bool(distributed.all_reduce_max(differs.float(), group)) if group else not bool(differs)

    def _losses(self) -> Tensor:
        losses = []
        for training in (True, False):
            twin = copy_of(self._module).to(self._dtype).train(training)
            for layer in twin.modules():
                if isinstance(layer, Dropout):
                    layer.eval()
            with _running(twin, self._step, self._dtype) as batch:
                loss = loss_of(twin.training_step(batch, *self._step.arguments))
            losses += [] if loss is None else [loss.detach().double()]
        return torch.stack(losses) if losses else torch.zeros(0)


@contextmanager
def _running(twin: "LightningModule", step: "Step", dtype: torch.dtype) -> Iterator[Any]:
    def converted(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value.clone()

    with ExitStack() as undo:
        undo.enter_context(isolated_randomness())
        undo.enter_context(lent_trainer(twin, step.trainer))
        undo.enter_context(torch.no_grad())
        undo.enter_context(torch.autocast(twin.device.type, enabled=False))
        yield tree_map_only(Tensor, converted, step.batch)
