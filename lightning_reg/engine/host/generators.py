"""Random generators: the global ones, and those that a training loader and its samplers draw from."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

__all__ = [
    "isolated_randomness",
    "kept_generators",
    "noted_generators",
    "own_generators",
    "own_randomness",
    "replayed_randomness",
]


@contextmanager
def isolated_randomness() -> Iterator[None]:
    """Puts the global random states of torch, numpy and Python back at the end, after an exception as well."""
    on_devices = torch.cuda.get_rng_state_all() if _uses_cuda() else []
    on_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 # users draw from it
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 # as above
        random.setstate(states[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch's


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """The global random states start from a seed, and are what they were at the end."""
    with isolated_randomness():
        # Not torch.manual_seed: it formats a traceback for each absent device, a millisecond in all, and leaves the
        # seed to devices that are used later, whose states nobody puts back.
        torch.default_generator.manual_seed(seed)
        if _uses_cuda():
            torch.cuda.manual_seed_all(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 # users draw from it
        random.seed(seed)
        yield


@contextmanager
def kept_generators(loader: Any, seed: int | None = None) -> Iterator[None]:
    """Generators of a loader and its samplers are at the end what they were.

    Args:
        loader: The loader; torch's generators, numpy's and Python's are found in it under any name.
        seed: What they start from meanwhile; ``None`` to go on from where they are.

    """
    with ExitStack() as undo:
        for generator in {id(g): g for g in _generators(loader, depth=4)}.values():
            _keep(generator, seed, undo)
        yield


def noted_generators(loader: Any) -> Callable[[], None]:
    """Notes the states of the generators of a loader and its samplers; the function returned puts them back."""
    undo = ExitStack()
    for generator in {id(g): g for g in _generators(loader, depth=4)}.values():
        _keep(generator, None, undo)
    return undo.close


def replayed_randomness() -> tuple["_Noted", "_Replayed"]:
    """Two contexts: in the second, numpy and Python draw from their global states what they drew in the first.

    torch's checkpoints replay torch's own states, and leave these two alone. The second may be entered several times,
    and puts back what was there.

    Returns:
        The first and the second.

    """
    noted = _Noted()
    return noted, _Replayed(noted)


def _global_states() -> tuple[Any, Any]:
    return np.random.get_state(), random.getstate()  # noqa: NPY002 # users draw from it


class _Noted:
    """Notes the global states of numpy and Python on entry, and whether anything was drawn from them until the exit."""

    def __init__(self) -> None:
        self.states: tuple[Any, Any] = ((), ())
        self.has_drawn = True

    def __enter__(self) -> None:
        self.states = _global_states()

    def __exit__(self, *error: object) -> None:
        (before, before_python), (after, after_python) = self.states, _global_states()
        self.has_drawn = (
            before[2:] != after[2:] or before_python != after_python or not np.array_equal(before[1], after[1])
        )


class _Replayed:
    """Draws once more what was drawn then; putting states back is dear, and mostly nothing was."""

    def __init__(self, noted: _Noted) -> None:
        self._noted = noted
        self._states: tuple[Any, Any] | None = None

    def __enter__(self) -> None:
        self._states = _global_states() if self._noted.has_drawn else None
        if self._states is not None:
            _put_back(self._noted.states)

    def __exit__(self, *error: object) -> None:
        if self._states is not None:
            _put_back(self._states)


def _put_back(states: tuple[Any, Any]) -> None:
    np.random.set_state(states[0])  # noqa: NPY002 # as above
    random.setstate(states[1])


def own_generators(owner: object) -> list[Any]:
    """The random generators among an object's attributes: torch's, numpy's and Python's."""
    return [*_generators(owner, depth=0)]


def _keep(generator: Any, seed: int | None, undo: ExitStack) -> None:
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        undo.callback(setattr, bits, "state", bits.state)
        if seed is not None:
            bits.state = type(bits)(seed).state
        return
    start: Callable[[int], Any]
    if isinstance(generator, torch.Generator):
        undo.callback(generator.set_state, generator.get_state())
        start = generator.manual_seed
    elif isinstance(generator, random.Random):
        undo.callback(generator.setstate, generator.getstate())
        start = generator.seed
    else:
        undo.callback(generator.set_state, generator.get_state())
        start = generator.seed
        seed = None if seed is None else seed % 2**32
    if seed is not None:
        start(seed)


def _generators(owner: Any, depth: int) -> Iterator[Any]:
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)  # users draw from it
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, kinds) and not isinstance(value, random.SystemRandom):  # which has no state
            yield value
    # Lightning's sampler for ranks keeps the user's as `dataset._sampler`.
    for name in ("sampler", "batch_sampler", "_sampler", "dataset") if depth else ():
        behind = getattr(owner, name, None)
        if behind is not None and (name != "dataset" or not isinstance(owner, DataLoader)):
            yield from _generators(behind, depth - 1)
