"""Tiny problems to train on, and a loader that can resume in the middle of an epoch."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset
from typing_extensions import override

__all__ = ["BATCH", "BATCHES", "KINDS", "SIZE", "Loader", "Part", "Problem", "Resumable", "make_loader", "seeded"]

BATCH, SIZE = 4, 22  # the last batch of an epoch has 2 samples
BATCHES = -(-SIZE // BATCH)
CLASSES = 4


@dataclass(frozen=True)
class Part:
    """One of the losses of a problem with several.

    Args:
        loss: The function of ``torch.nn.functional``.
        outputs: Columns of the network's output that it gets.
        targets: Its targets, from ``y``.
        each: Losses of the rows ``(B,)``, where a row's is not ``loss`` of that row alone.

    """

    loss: Callable[[Tensor, Tensor], Tensor]
    outputs: slice
    targets: Callable[[Tensor], Tensor]
    each: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Problem:
    """What is trained on what; of functions of their module, where the technique runs on two processes.

    Args:
        net: Makes the network; random draws in here are seeded. No dropout and no batch statistics, so that one
            process of a joined batch and two processes agree.
        data: Makes ``(x, y)`` with as many samples as asked for; random draws in here are seeded.
        loss: Value from the network's output and ``y``.
        serves: Names of the problems whose techniques train on this one too, besides its own.
        parts: If ``loss`` is the sum of several, these by the name of the problem that each one is.
        each: Losses of the rows, where a row's is not ``loss`` of that row alone: it compares rows.

    """

    net: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    serves: Sequence[str] = ()
    parts: Mapping[str, Part] = field(default_factory=dict)
    each: Callable[[Tensor, Tensor], Tensor] | None = None


def _layers(first: nn.Module, body: nn.Module, head: nn.Module) -> nn.Module:
    # tanh: unlike relu it has no kink where a rounding error could flip a unit.
    return nn.Sequential(OrderedDict(first=first, act=nn.Tanh(), body=body, act_body=nn.Tanh(), head=head))


def _vectors() -> nn.Module:
    return _layers(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES))


def _images() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return _layers(nn.Conv2d(3, 8, 3, padding=1), body, nn.Linear(32, CLASSES))


def _pixels() -> nn.Module:
    body = nn.Conv2d(6, 6, 3, padding=1)
    return _layers(nn.Conv2d(2, 6, 3, padding=1), body, nn.Conv2d(6, 3, 1))


def _tokens() -> nn.Module:
    return _layers(nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11))


def _labelled(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def data(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, *shape)
        return x, (x.flatten(1)[:, :CLASSES] + torch.randn(size, CLASSES)).argmax(1)

    return data


def _masks(size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 2, 6, 6)
    return x, (x[:, 0] > 0.3).long() + (x[:, 1] > 1).long()


def _sequences(size: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(11, (size, 7))
    return text[:, :-1], text[:, 1:]


def _numbers(size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 8)
    return x, (x[:, :2] + x[:, 2:4]).tanh() + 0.1 * torch.randn(size, 2)


def _labels_and_numbers(size: int) -> tuple[Tensor, Tensor]:
    x, y = _numbers(size)
    return x, torch.cat([(x[:, :CLASSES] + torch.randn(size, CLASSES)).argmax(1, keepdim=True), y], 1)


_BOTH = {
    "classification": Part(F.cross_entropy, slice(CLASSES), lambda y: y[:, 0].long()),
    "regression": Part(F.mse_loss, slice(CLASSES, None), lambda y: y[:, 1:]),
}


def _sum_of_both(outputs: Tensor, y: Tensor) -> Tensor:
    classes, numbers = _BOTH.values()
    loss = F.cross_entropy(outputs[:, classes.outputs], classes.targets(y))
    return loss + F.mse_loss(outputs[:, numbers.outputs], numbers.targets(y))


def _token_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


KINDS = {
    "classification": Problem(_vectors, _labelled(8), F.cross_entropy),
    "images": Problem(_images, _labelled(3, 8, 8), F.cross_entropy, serves=["classification"]),
    "maps": Problem(_pixels, _masks, F.cross_entropy),
    "regression": Problem(lambda: _layers(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)), _numbers, F.mse_loss),
    "both": Problem(
        lambda: _layers(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES + 2)),
        _labels_and_numbers,
        _sum_of_both,
        parts=_BOTH,
    ),
    "tokens": Problem(_tokens, _sequences, _token_loss),
}


# -- data -------------------------------------------------------------------------------------------------------------


class Resumable(Sampler[int]):
    """Shuffles by epoch and knows its position."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch, self.position, self.start = size, 0, 0, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.position, self.start = self.start, 0
        for index in order[self.position :]:
            self.position += 1
            yield index


class Loader(DataLoader):
    """A DataLoader that goes on in the middle of an epoch; it iterates as every DataLoader does."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.sampler.position % len(self.sampler)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.start = state["position"]


class _RankAfterRank(DistributedSampler):
    """For one process that accumulates: the k-th batch of rank 0, then that of rank 1."""

    @override
    def __iter__(self) -> Iterator[int]:
        order = [*super().__iter__()]
        for start in range(0, len(order), 2 * BATCH):
            both = order[start : start + 2 * BATCH]
            yield from both[::2] + both[1::2]


def make_loader(problem: Problem, batch: int, size: int, ranks: tuple[int, int] | None) -> DataLoader:
    """Batches ``(x, y, index)``, shuffled anew in each epoch.

    Args:
        problem: Where the samples come from.
        batch: Batch size.
        size: Number of samples.
        ranks: This process and the number of processes: all ranks' k-th batches together are the k-th batch of one
            process with the joined batch size. ``None``: a loader that can resume in the middle of an epoch.

    Returns:
        The loader.

    """
    with seeded(1):
        dataset = TensorDataset(*problem.data(size), torch.arange(size))
    if ranks is None:
        return Loader(dataset, batch, sampler=Resumable(size))
    sampler = _RankAfterRank if ranks[1] == 1 and batch == BATCH else DistributedSampler
    return DataLoader(dataset, batch, sampler=sampler(dataset, ranks[1], ranks[0], seed=0))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global random states at a known value, and back at their own afterwards."""
    with isolate_rng():
        torch.default_generator.manual_seed(seed)  # `manual_seed` of torch notes a traceback for each absent device
        np.random.seed(seed)  # noqa: NPY002 # the global state is what techniques could disturb
        random.seed(seed)
        yield
