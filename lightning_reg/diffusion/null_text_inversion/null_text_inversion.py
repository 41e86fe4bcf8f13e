"""NullTextInversion: what null-text inversion finds, kept in a file and gone on with."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_reg.diffusion._service import Condition

__all__ = ["NullTextInversion"]


class NullTextInversion(NamedTuple):
    """The way of samples from noise under guidance, on the CPU, a row for each sample.

    Of an inversion that was stopped (``stop_after``) it holds the steps that are done; hand it over again as
    ``resume``.

    Source:
        Mokady et al., "Null-text Inversion for Editing Real Images using Guided Diffusion Models", CVPR 2023, arXiv
        2211.09794, algorithm 1.

    Args:
        pivots: The samples on their way without guidance, noise first: ``(B, S + 1, ...)``.
        null: What stands for no condition at each step that is done, ``(B, S, L, d)``, or such by name.
        current: Where sampling stands after these steps, ``(B, ...)``; at the end the reconstruction.
        losses: Mean squared distance to the pivot at the end of each step, ``(B, S)``.
        updates: Updates of the embedding at each step, ``(B, S)``.
        guidance: The scale that it was made for.
        fixed_point_iterations: Further passes at each step that the pivots were made with.

    """

    pivots: Tensor
    null: Condition
    current: Tensor
    losses: Tensor
    updates: Tensor
    guidance: float
    fixed_point_iterations: int = 0

    @property
    def steps(self) -> int:
        """S, of the sampler."""
        return self.pivots.shape[1] - 1

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self.losses.shape[1]

    @property
    def is_finished(self) -> bool:
        """Whether all are done."""
        return self.done == self.steps

    @property
    def noise(self) -> Tensor:
        """Where sampling starts, ``(B, ...)``."""
        return self.pivots[:, 0]

    def null_at(self, step: int) -> Condition:
        """What stands for no condition at a step, from 0: a row for each sample."""
        if isinstance(self.null, Mapping):
            return {name: value[:, step] for name, value in self.null.items()}
        return None if self.null is None else self.null[:, step]

    def save(self, path: str | Path) -> None:
        """Writes it to a safetensors file."""
        null = self.null if isinstance(self.null, Mapping) else {} if self.null is None else {"": self.null}
        rows = {f"null.{name}": value for name, value in null.items()}
        rows |= {"pivots": self.pivots, "current": self.current, "losses": self.losses, "updates": self.updates}
        rows["guidance"] = torch.tensor(self.guidance, dtype=torch.float64)
        rows["fixed_point_iterations"] = torch.tensor(self.fixed_point_iterations)
        save_file({name: value.contiguous().clone() for name, value in rows.items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "NullTextInversion":
        """Reads what :meth:`save` has written."""
        rows = load_file(path)
        null: Condition = {name[5:]: rows.pop(name) for name in sorted(rows) if name.startswith("null.")}
        if isinstance(null, dict) and "" in null:
            null = null[""]
        guidance = float(rows.pop("guidance"))
        iterations = int(rows.pop("fixed_point_iterations", 0))
        return cls(null=null, guidance=guidance, fixed_point_iterations=iterations, **rows)
