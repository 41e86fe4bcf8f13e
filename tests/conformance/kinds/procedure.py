"""Laws of procedures: the network is left as it was found, and each input is treated as if it were alone.

What is one mean over all inputs, not a row for each, is the mean of what each gives alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.conformance.harness import difference
from tests.conformance.problems import seeded

__all__ = ["LAWS", "ProcedureCase"]


@dataclass(frozen=True)
class ProcedureCase:
    """A procedure as its laws see it.

    Args:
        subject: The procedure; its first argument is the network.
        network: Makes the network, the same at each call.
        inputs: The arguments after it, two rows in dimension 0 of each tensor.
        options: Further arguments by name, which are not rows.
        invalid: Arguments by name that are refused, and the argument that the error names.
        tolerance: Of what two rows give together and each alone.
        half_tolerance: Of what it gives in bfloat16, of the largest number.
        is_mean: Whether it gives means over the rows.

    """

    subject: Callable[..., Any]
    network: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    invalid: Sequence[tuple[Mapping[str, Any], str]] = ()
    tolerance: float = 1e-5
    half_tolerance: float = 5e-2
    is_mean: bool = False

    def make(self, **options: Any) -> Any:
        """Runs it with other options, for those that are refused."""
        return self.subject(self.network(), *self.inputs, **{**self.options, **options})


def leaves_as_found(case: ProcedureCase) -> None:
    """Weights, buffers, modes, gradients, hooks and random states are what they were, in either mode."""
    for training in (True, False):
        network = case.network().train(training)
        layers = list(network.modules())
        layers[-1].train(not training)
        for number, param in enumerate(network.parameters()):
            param.grad = torch.full_like(param, float(number))
            param.requires_grad_(number % 2 == 0)
        with seeded(0):
            before, random = _found(network), torch.get_rng_state()
            case.subject(network, *case.inputs, **case.options)
            found = difference(before, _found(network))
            assert not found, f"{case.subject.__name__} does not leave the network as it was: {found}"
            assert torch.equal(random, torch.get_rng_state()), f"{case.subject.__name__} draws from the global state"


def _found(network: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in network.state_dict().items()},
        "modes": [layer.training for layer in network.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "hooks": [len(h) for layer in network.modules() for name, h in vars(layer).items() if name.endswith("_hooks")],
    }


def row_by_row(case: ProcedureCase) -> None:
    """Two rows together give what each gives alone, or the mean of that."""
    network = case.network()
    both = case.subject(network, *case.inputs, **case.options)
    if case.is_mean:
        _check_mean(case, network, both)
        return
    assert _rows(both, 2), f"{case.subject.__name__} returns nothing with a row for each input"
    for row in range(2):
        alone = _alone(case, network, row)
        kept = [value[row : row + 1] for value in _rows(both, 2)]
        found = difference(kept, _rows(alone, 1), rtol=case.tolerance, atol=case.tolerance)
        assert not found, f"{case.subject.__name__}: row {row} alone gives something else: {found}"


def _check_mean(case: ProcedureCase, network: nn.Module, both: Any) -> None:
    one, two = (_tensors(_alone(case, network, row)) for row in range(2))
    means = [(a + b) / 2 for a, b in zip(one, two, strict=True)]
    found = difference(_tensors(both), means, rtol=case.tolerance, atol=case.tolerance)
    assert not found, f"{case.subject.__name__}: the mean of both rows alone is something else: {found}"


def _alone(case: ProcedureCase, network: nn.Module, row: int) -> Any:
    one = tree_map_only(Tensor, lambda value: value[row : row + 1], case.inputs)
    return case.subject(network, *one, **case.options)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _rows(value: Any, count: int) -> list[Tensor]:
    return [leaf for leaf in _tensors(value) if leaf.shape[:1] == (count,)]


def _given(case: ProcedureCase, value: Any) -> list[Tensor]:
    return _tensors(value) if case.is_mean else _rows(value, 2)


def where_autograd_is_off(case: ProcedureCase) -> None:
    """In inference mode, as in Lightning's validation, it gives the same."""
    network = case.network()
    wanted = case.subject(network, *case.inputs, **case.options)
    for off in (torch.inference_mode, torch.no_grad):
        with off():
            inputs = tree_map_only(Tensor, torch.clone, case.inputs)
            got = case.subject(network, *inputs, **case.options)
        found = difference(_given(case, got), _given(case, wanted))
        assert not found, f"{case.subject.__name__} gives something else under {off.__name__}: {found}"


def half_precision(case: ProcedureCase) -> None:
    """A network and inputs in bfloat16 give the same, to rounding."""
    wanted = _given(case, case.subject(case.network(), *case.inputs, **case.options))
    inputs = tree_map_only(Tensor, _half, case.inputs)
    got = _given(case, case.subject(case.network().to(torch.bfloat16), *inputs, **case.options))
    for one, two in zip(got, wanted, strict=True):
        error = (one.float() - two.float()).abs().max() / two.float().abs().max().clamp(min=1e-6)
        assert error <= case.half_tolerance, f"{case.subject.__name__} in bfloat16: off by {error:.1e}"


def _half(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value


LAWS: dict[str, Callable[..., None]] = {
    law.__name__: law for law in (leaves_as_found, row_by_row, where_autograd_is_off, half_precision)
}
