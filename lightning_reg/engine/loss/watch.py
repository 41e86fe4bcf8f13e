"""Seeing the loss functions that an unmodified ``training_step`` calls.

Two ways, the same to everything above them:

* the *mode*, a ``TorchFunctionMode``: sees every call however it was reached, inside ``torch.compile`` too, for one
  Python call per torch operation;
* the *gate*: every loss function of ``torch.nn.functional`` begins by asking ``has_torch_function_variadic`` whether
  somebody overrides it. During a step the gate stands in for that question (and for ``handle_torch_function``, the
  answer). It sees the same calls as the mode in eager code, however the function was imported or bound, and costs
  nothing for the other operations of the network.

The first steps run under the mode, which learns whether the gate would have seen the call as well.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.loss.elements import LOSS_FUNCTIONS

__all__ = ["Interception", "call_site"]

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_LOSS_CODES = frozenset(id(function.__code__) for function in LOSS_FUNCTIONS)  # the code itself is costly to hash
functional: Any = F  # torch does not declare what its functions ask
_OUTSIDE = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


def call_site() -> str:
    """Where the user's code called, as ``file.py:line``: the innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OUTSIDE):
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class _LossMode(TorchFunctionMode):
    def __init__(self, interception: "Interception", handler: Handler) -> None:
        super().__init__()
        self.interception, self.handler = interception, handler

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in LOSS_FUNCTIONS:
            # Under torch.compile the loss is left to eager code: one graph break, and the engine sees real tensors.
            handle = (
                self.interception.handle_compiled
                if torch.compiler.is_dynamo_compiling()
                else self.interception.handle_in_mode
            )
            return handle(self.handler, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Gate:
    """Stands in for the override check of ``torch.nn.functional`` while it is entered, on the entering thread only."""

    def __init__(self) -> None:
        self._handler: Handler = _nobody
        self._open = False
        self.asked = False

    def _has_torch_function(self, *args: Any) -> bool:
        if id(sys._getframe(1).f_code) in _LOSS_CODES and threading.get_ident() == self._thread and _all_plain(args):
            self.asked = True
            if self._open:
                return True
        return bool(self._had(*args))

    def _handle(self, function: Callable[..., Any], relevant: Any, *args: Any, **kwargs: Any) -> Any:
        if self._open and function in LOSS_FUNCTIONS and threading.get_ident() == self._thread:
            self._open = False
            try:
                return self._handler(function, args, kwargs)
            finally:
                self._open = True
        return self._handled(function, relevant, *args, **kwargs)

    def intercept(self, handler: Handler, on: bool) -> "_Gate":
        """Whether calls go to the handler, or it is only noted (``asked``) that they would."""
        self._handler, self._open, self.asked = handler, on, False
        return self

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._had, self._handled = functional.has_torch_function_variadic, functional.handle_torch_function
        self._put(self._has_torch_function, self._handle)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._put(self._had, self._handled)
        self._handler = _nobody  # what a handler holds, a step with its graph, goes with the step

    @staticmethod
    def _put(*functions: Any) -> None:
        functional.has_torch_function_variadic, functional.handle_torch_function = functions


def _nobody(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _all_plain(args: tuple[Any, ...]) -> bool:
    # Fake and functional tensors are torch.compile's: the compiler, not the user, is calling.
    for arg in args:  # not a generator: it is asked by every function of torch
        kind = type(arg)
        if kind is not Tensor and kind is not nn.Parameter and isinstance(arg, Tensor):
            return False
    return True


def _ask(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Calls a loss function on tensors without numbers, so that it asks whether somebody overrides it."""
    if _all_plain((*args, *kwargs.values())):
        with suppress(Exception):  # it asks before anything else; not all know such tensors
            function(*tree_map_only(Tensor, _empty, args), **tree_map_only(Tensor, _empty, kwargs))


def _empty(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta")


class Interception:
    """Hands every loss call inside :meth:`watch` to a handler, by the cheapest way that sees it.

    Args:
        compiled: Whether parts of the module are compiled: then the mode stays, because a compiled graph would have to
            be compiled again without it, and because it costs nothing where the operations are inside a graph.

    """

    def __init__(self, *, compiled: bool) -> None:
        self._gate = _Gate()
        self._stay_in_mode = compiled
        self._learned = False
        self.handle_compiled: Callable[..., Any] = torch.compiler.disable(self._handle_compiled)  # type: ignore[no-untyped-call]  # torch's

    def watch(self, handler: Handler) -> AbstractContextManager[None]:
        """A context in which loss calls are seen.

        Args:
            handler: Called as ``handler(function, args, kwargs)``; what it returns is what the user's code gets.

        Returns:
            The context.

        """
        if self.by_gate:
            return self._gate.intercept(handler, True)
        return _LossMode(self, handler)

    @property
    def by_gate(self) -> bool:
        """Whether the gate alone watches."""
        return self._learned and not self._stay_in_mode

    def missed(self, global_step: int) -> bool:
        """To be told when a step made a loss and no call was seen; True if the mode must look before that is certain.

        Args:
            global_step: Optimizer steps so far, for the message.

        Returns:
            Whether the gate was watching, so that the next step runs under the mode again.

        """
        if not self.by_gate:
            return False
        self._stay_in_mode = True
        host.rank_zero_warn(
            f"lightning_reg: the loss call seen until now was not seen in the step after global step {global_step} (a"
            " part of the model compiled since?): that one step went without the"
            " techniques that need it. All calls are looked at from here on, which costs a little more per operation."
        )
        return True

    def handle_in_mode(
        self, handler: Handler, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Handles a call that the mode saw in eager code, and learns whether the gate would have seen it."""
        with nullcontext() if self._stay_in_mode else self._gate.intercept(handler, False):
            value = handler(function, args, kwargs)
            if not (self._stay_in_mode or self._gate.asked):  # whoever replaces all losses does not call the function
                _ask(function, args, kwargs)
        self._stay_in_mode |= not self._gate.asked
        self._learned = True
        return value

    def _handle_compiled(
        self, handler: Handler, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._stay_in_mode = self._learned = True
        return handler(function, args, kwargs)
