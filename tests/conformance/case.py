"""What a technique's test file says about it, for the laws to run on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lightning_reg.engine.technique import Technique
from tests.conformance.by_hand import Hand
from tests.conformance.problems import KINDS, Problem

__all__ = ["Case"]

DataKind = Literal["classification", "images", "maps", "regression", "tokens"]


@dataclass(frozen=True)
class Case:
    """A technique as the laws see it; ``CASE`` in ``tests/<folder>/test_<key>.py``, a tuple if the file has several.

    Args:
        make: Makes a small active instance, one that changes something from the first batches on; takes further
            constructor arguments (``name``): ``partial(TailTrimmer, fraction=0.25)``.
        neutral: Makes an instance at the neutral setting, in the same way; ``None`` if there is no such setting (the
            law ``neutral_is_nothing`` then needs an exemption).
        by_hand: Makes its part of a loop written in plain PyTorch from an instance: the class of a
            :class:`~tests.conformance.by_hand.Hand`. Fits with it, alone and in pairs, are compared with that loop.
        says: What ``describe()`` says of ``make()``, of ``neutral()`` where there is one, and of each of ``variants``.
        data: What it trains on: one of the harness's problems, or a :class:`Problem` of its own. The layers of the
            former are ``net.first``, ``net.body`` and ``net.head``; every batch is ``(x, y, index)``.
        also: Further kinds of problems it trains on, besides those that its own problem serves: for the pairs.
        variants: Further documented constructions; each must train, resume exactly and be plain data.
        invalid: Constructor arguments that must be refused, and the argument that the error must name. Wrong types and
            choices are tried by the law itself: what belongs here is every end of a range.
        state_dtype: The least precise type that ``make()`` may keep floating state in.
        trains_as_plain: Whether training is meant to be that without it: it watches, saves memory, or acts among ranks.
        compares_rows: Whether its loss is of rows that a batch compares with each other, each rank its own: two
            processes are then those of one that accumulates both batches.
        exempt: Laws that it cannot keep, each with the reason.

    """

    make: Callable[..., Technique]
    neutral: Callable[..., Technique] | None
    by_hand: Callable[[Any], Hand] | None = None
    says: Sequence[str] = ()
    data: DataKind | Problem = "classification"
    also: Sequence[DataKind] = ()
    variants: Sequence[Callable[..., Technique]] = ()
    invalid: Sequence[tuple[Mapping[str, Any], str]] = ()
    state_dtype: torch.dtype = torch.float32
    trains_as_plain: bool = False
    compares_rows: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)

    @property
    def cls(self) -> type[Technique]:
        """The technique's class."""
        return type(self.make())

    subject = cls  # as cases of other kinds call it

    @property
    def problem(self) -> Problem:
        """Network, data and loss to train on."""
        return self.data if isinstance(self.data, Problem) else KINDS[self.data]
