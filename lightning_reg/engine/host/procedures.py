"""Procedures: what is done with a trained network that is left as it was found."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_reg.engine.host.generators import isolated_randomness

__all__ = ["is_procedure", "left_as_found", "out_of_inference", "procedure"]

Arguments = ParamSpec("Arguments")
Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")


def procedure(
    function: Callable[Concatenate[Module, Arguments], Result],
) -> Callable[Concatenate[Module, Arguments], Result]:
    """Declares a function of a network and inputs a procedure: it reads, explains, samples or searches.

    However it ends, the network has the modes, the gradients, the buffers and the ``requires_grad`` that it had before,
    and the global random states are what they were, see :func:`left_as_found`. It works where autograd is off as well,
    as in Lightning's validation: gradients are recorded inside, and inputs that were made in inference mode are copied
    out of it. The weights are its own to leave alone.

    Args:
        function: Its first argument is the network.

    Returns:
        The procedure.

    """

    @wraps(function)
    def run(module: Module, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{function.__name__}: the first argument must be a torch.nn.Module, got {module!r:.80}.")
        with left_as_found(module):
            inputs = out_of_inference((args, kwargs))
            return function(module, *inputs[0], **inputs[1])

    vars(run)["is_procedure"] = True
    return run


def is_procedure(value: Any) -> bool:
    """Whether something public was declared a procedure."""
    return inspect.isfunction(value) and vars(value).get("is_procedure", False)


@contextmanager
def left_as_found(module: nn.Module) -> Iterator[None]:
    """Gradients can be taken inside, of a network that keeps its state over it.

    Modes (of every layer), ``requires_grad``, ``grad``, buffers and the global random states are at the end what they
    were. Inside, ``grad`` is ``None`` everywhere; nothing is accumulated into what the user's training has gathered.

    Args:
        module: The network.

    """
    modes = [(layer, layer.training) for layer in module.modules()]
    params = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with torch.inference_mode(mode=False), torch.enable_grad(), isolated_randomness():
        for param, _, _ in params:
            param.grad = None
        try:
            yield
        finally:
            for layer, training in modes:
                layer.training = training
            for param, requires_grad, gradient in params:
                param.requires_grad_(requires_grad)
                param.grad = gradient
            for buffer, value in buffers:
                # One that was made in inference mode, as in Lightning's validation, is written to there alone.
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


def out_of_inference(values: Any) -> Any:  # of any structure
    """The same with copies of tensors that were made in inference mode; to be called outside of it.

    Args:
        values: Tensors in any structure.

    Returns:
        The structure, with tensors that autograd may save.

    """
    return tree_map_only(Tensor, lambda value: value.clone() if value.is_inference() else value, values)
