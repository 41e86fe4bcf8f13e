"""Sums modulo p, some of which are wrong: data whose truth is known."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from lightning_reg.diagnostics.grokking_corrupted.core import modular_table
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.procedures import left_as_found

__all__ = ["Accuracies", "CorruptedModularArithmetic"]


class Accuracies(NamedTuple):
    """How often a network gives the label that it was given, in [0, 1].

    Args:
        train: On all training pairs, by their labels, wrong ones included.
        corrupted: On training pairs with redrawn labels, by these: what was memorised. NaN if there are none.
        clean: On the other training pairs. NaN if there are none.
        test: On the test pairs, whose labels are right.

    """

    train: float
    corrupted: float
    clean: float
    test: float


class CorruptedModularArithmetic(LightningDataModule):
    r"""Sums (or products) of two residues modulo p; of the training pairs a share has labels that were redrawn.

    A test bed for what is to withstand wrong labels: they are known, and 100 % of the right ones can be found. All
    :math:`p^2` pairs are shuffled; the first :math:`\lfloor \alpha p^2 \rfloor` train, the others are validated and
    tested on. Of the training pairs the first :math:`\lfloor \xi n \rfloor` get labels uniform over all residues, which
    is the right one with probability 1/p.

    A batch is ``(x, y, index)``, ``index`` being the position among the training (or test) pairs. ``is_corrupted``
    ``(n,)`` and ``y_clean`` ``(n,)`` are of the training pairs.

    Source:
        Doshi, Das, He and Gromov, "To Grok or not to Grok: Disentangling Generalization and Memorization on Corrupted
        Algorithmic Datasets", ICLR 2024, arXiv 2310.13061; ``noisy_dataset`` of d-doshi/Grokking.

    Differs:
        Draws are torch's, so pairs of one seed are others than in the released code. There, labels for transformers are
        drawn from 0 to p - 2; here always from all residues.

    Args:
        p: Modulus, at least 3. Paper: 97.
        operation: ``"add"`` or ``"multiply"``.
        train_fraction: Share of pairs to train on, the paper's alpha, in (0, 1). Paper: 0.5; small p need more.
        corruption: Share of training labels that are redrawn, the paper's xi, in [0, 1). Paper: 0.35. Neutral: 0.
        encoding: ``"index"``: x is ``(B, 2)``, residues; ``"onehot"``: ``(B, 2p)``, float32.
        batch_size: Training pairs of a batch, shuffled in each epoch; ``None``: all of them, in order. Paper: all.
        seed: Of the shuffle and the redrawn labels.

    Raises:
        ValueError: If an argument is outside its range, or no pair is left to train or to test on.

    Example:
        >>> data = CorruptedModularArithmetic(p=7, train_fraction=0.5, corruption=0.25)
        >>> len(data.y_clean), int(data.is_corrupted.sum())
        (24, 6)

    """

    def __init__(
        self,
        p: int = 97,
        operation: Literal["add", "multiply"] = "add",
        train_fraction: float = 0.5,
        corruption: float = 0.35,
        encoding: Literal["index", "onehot"] = "index",
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number(self, "p", p, low=3, integer=True)
        check_choice(self, "operation", operation, ("add", "multiply"))
        check_number(self, "train_fraction", train_fraction, low=0, low_open=True, high=1, high_open=True)
        check_number(self, "corruption", corruption, low=0, high=1, high_open=True)
        check_choice(self, "encoding", encoding, ("index", "onehot"))
        check_number(self, "batch_size", batch_size, low=1, integer=True, optional=True)
        check_number(self, "seed", seed, low=0, integer=True)
        self.p, self.operation, self.train_fraction = p, operation, train_fraction
        self.corruption, self.encoding, self.batch_size, self.seed = corruption, encoding, batch_size, seed
        self._draw()

    def _draw(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        pairs, results = modular_table(self.p, self.operation)
        order = torch.randperm(len(pairs), generator=draw)
        pairs, results = pairs[order], results[order]
        trained = int(self.train_fraction * len(pairs))
        if not trained:
            raise ValueError(
                f"CorruptedModularArithmetic: `train_fraction` must leave a pair of {len(pairs)} to train on,"
                f" got {self.train_fraction}."
            )
        corrupted = int(self.corruption * trained)
        self.y_clean = results[:trained]
        self.is_corrupted = torch.arange(trained) < corrupted
        given = self.y_clean.clone()
        given[:corrupted] = torch.randint(self.p, (corrupted,), generator=draw)
        x = pairs if self.encoding == "index" else F.one_hot(pairs, self.p).flatten(1).float()
        self.train_pairs, self.test_pairs = _Rows(x[:trained], given), _Rows(x[trained:], results[trained:])

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        if self.batch_size is None:
            return self._loader(self.train_pairs, batch_size=len(self.train_pairs))
        order = _Shuffled(len(self.train_pairs), self.seed)
        return self._loader(self.train_pairs, batch_size=self.batch_size, sampler=order)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test_pairs, batch_size=len(self.test_pairs))

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def _loader(self, rows: "_Rows", batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[Any]:
        return DataLoader(rows, batch_size, sampler=sampler, collate_fn=_as_it_is)

    def accuracies(self, module: nn.Module) -> Accuracies:
        """How often a network is right, by the labels that were given; it is left as it was found.

        Args:
            module: Gives ``(B, p)`` for a batch's x.

        Returns:
            The accuracies on each part.

        """
        like = next(module.parameters(), torch.empty(0))
        with left_as_found(module), torch.no_grad():
            module.eval()
            hits, test = (
                (module(_as_read(rows.x, like)).argmax(-1).cpu() == rows.y).double()
                for rows in (self.train_pairs, self.test_pairs)
            )
        parts = (hits, hits[self.is_corrupted], hits[~self.is_corrupted], test)
        return Accuracies(*(float(part.mean()) for part in parts))


def _as_read(x: Tensor, like: Tensor) -> Tensor:
    """On the parameters' device, one-hot rows in their type."""
    return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)


class _Rows(Dataset[Any]):
    """Reads a whole batch at once."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], index

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self.x[rows], self.y[rows], rows


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401 # what the data set gave
    return batch


class _Shuffled(Sampler[int]):
    """Another order in each epoch, of seed and epoch alone: a resumed fit goes on with that of its epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch  # Lightning calls it

    def __len__(self) -> int:
        return self.size

    @override
    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        yield from torch.randperm(self.size, generator=draw).tolist()
