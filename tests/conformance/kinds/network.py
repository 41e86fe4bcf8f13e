"""Laws of network parts and loss modules: they are copied, saved, moved, compiled and trained as torch's own are."""

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from tests.conformance.harness import difference
from tests.conformance.problems import seeded

__all__ = ["LAWS", "LOSS_LAWS", "NetworkCase"]


@dataclass(frozen=True)
class NetworkCase:
    """A network part or a loss module as its laws see it.

    Args:
        make: Makes one, the same weights at each call.
        inputs: Arguments of its forward pass, in float32 where they are floating; rows of a batch in dimension 0.
        invalid: Constructor arguments that are refused, and the argument that the error names.
        half_tolerance: Of what it returns in bfloat16, of the largest number.

    """

    make: Callable[..., nn.Module]
    inputs: tuple[Any, ...]
    invalid: Sequence[tuple[Mapping[str, Any], str]] = ()
    half_tolerance: float = 3e-2

    @property
    def subject(self) -> type[nn.Module]:
        """The class."""
        return type(self.make())


def copies(case: NetworkCase) -> None:
    """Copied, pickled and loaded from its ``state_dict`` it gives the same numbers, and shares no weight."""
    network = case.make().eval()
    with torch.no_grad():
        for param in network.parameters():
            param.add_(0.01 * torch.arange(param.numel()).reshape(param.shape).to(param.dtype))
    loaded = case.make().eval()
    loaded.load_state_dict(network.state_dict())
    made = {"copied": copy.deepcopy(network), "pickled": pickle.loads(pickle.dumps(network)), "loaded": loaded}
    for how, other in made.items():
        _same(case, f"it and one {how}", network(*case.inputs), other(*case.inputs))
        shared = {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in other.parameters()}
        assert not shared, f"{case.subject.__name__}: the one {how} holds the same weights"


def precise(case: NetworkCase) -> None:
    """In float64 it returns float64, and its gradients are those of finite differences."""
    network = case.make().double().eval()
    inputs = [_to(value, torch.float64) for value in case.inputs]
    for leaf in _floating(network(*inputs)):
        assert leaf.dtype is torch.float64, f"{case.subject.__name__}: moved to float64 it returns {leaf.dtype}"
    params = [p for p in network.parameters() if p.requires_grad]
    moving = [value.requires_grad_() for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in _floating(network(*inputs)) if leaf.requires_grad)

    assert gradcheck(function, (*params, *moving), raise_exception=False), (
        f"{case.subject.__name__}: gradients are not those of finite differences"
    )


def half_precision(case: NetworkCase) -> None:
    """In bfloat16, by weights and by autocast, it gives what it gives in float32, to rounding."""
    wanted = _floating(case.make().eval()(*case.inputs))
    moved = case.make().to(torch.bfloat16).eval()(*(_to(value, torch.bfloat16) for value in case.inputs))
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.make().eval()(*case.inputs)
    for how, got in (("moved", moved), ("autocast", cast)):
        for one, two in zip(_floating(got), wanted, strict=True):
            error = (one.float() - two).abs().max() / two.abs().max().clamp(min=1e-6)
            assert error <= case.half_tolerance, f"{case.subject.__name__}, {how} to bfloat16: off by {error:.1e}"


def compiles(case: NetworkCase) -> None:
    """``torch.compile`` gives the same numbers, in one graph."""
    network = case.make().eval()
    try:
        compiled = torch.compile(network, backend="eager", fullgraph=True)(*case.inputs)
    except Exception as error:
        raise AssertionError(f"{case.subject.__name__} is not compiled in one graph: {error}") from error
    _same(case, "it and one compiled", network(*case.inputs), compiled)


def quiet_in_evaluation(case: NetworkCase) -> None:
    """In evaluation it draws nothing, and gives the same twice."""
    network = case.make().eval()
    with seeded(0):
        before = torch.get_rng_state()
        one, two = network(*case.inputs), network(*case.inputs)
        assert torch.equal(before, torch.get_rng_state()), f"{case.subject.__name__} draws numbers in evaluation"
    _same(case, "two passes in evaluation", one, two)


def trains(case: NetworkCase) -> None:
    """In training every parameter gets a gradient that is finite and not zero everywhere."""
    network = case.make().train()
    inputs = [_to(value, torch.float32) for value in case.inputs]
    for value in inputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    with seeded(0):
        sum(leaf.square().sum() for leaf in _floating(network(*inputs))).backward()
    moving = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    moving |= {f"input {n}": v.grad for n, v in enumerate(inputs) if isinstance(v, Tensor) and v.requires_grad}
    for name, gradient in moving.items():
        good = gradient is not None and gradient.isfinite().all() and gradient.any()
        assert good, f"{case.subject.__name__}: {name} gets no gradient"


def in_any_order(case: NetworkCase) -> None:
    """A loss is one number, whatever order the rows of the batch come in."""
    loss = case.make().eval()
    value = loss(*case.inputs)
    assert isinstance(value, Tensor), f"{case.subject.__name__} returns a {type(value).__name__}"
    assert value.dim() == 0, f"{case.subject.__name__} returns a tensor of shape {tuple(value.shape)}"
    rows = next(len(one) for one in case.inputs if isinstance(one, Tensor) and one.dim())
    turned = [one.flip(0) if isinstance(one, Tensor) and one.shape[:1] == (rows,) else one for one in case.inputs]
    _same(case, "a batch and its rows in reverse", value, loss(*turned), 1e-5)  # float32, sums in another order


def _same(case: NetworkCase, what: str, one: Any, two: Any, tolerance: float = 0.0) -> None:
    found = difference(_detached(one), _detached(two), rtol=tolerance, atol=tolerance)
    assert not found, f"{case.subject.__name__}: not the same: {what}: {found}"


def _detached(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _floating(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _to(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().to(dtype) if floating else value


LAWS: dict[str, Callable[..., None]] = {
    law.__name__: law for law in (copies, precise, half_precision, compiles, quiet_in_evaluation, trains)
}
LOSS_LAWS = LAWS | {"in_any_order": in_any_order}
