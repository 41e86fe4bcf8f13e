"""The training IoU of each class over time, and which classes have come to the end of early learning."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.noisy_labels.adele.core import fit_early_learning, flat_start, iou_of_counts, trigger_epoch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


__all__ = ["Curves"]


class Curves:
    """Counts of the present window, points of the curves, and the epochs in which classes were triggered.

    Args:
        r: Share by which the slope has to fall.
        start: Epoch after which all classes are triggered, whatever their curves; ``None`` for the curves.
        min_points: Points of a curve before it is fitted.
        flat_rise: By how much a curve has to rise to begin; 0: it begins at once.
        background: Class that is never triggered, ``None`` for none.

    """

    def __init__(self, r: float, start: int | None, min_points: int, flat_rise: float, background: int | None) -> None:
        self._r, self._start, self._min_points, self._flat_rise = r, start, min_points, flat_rise
        self._background = background
        self.times: list[float] = []
        self.iou = torch.empty(0, 0, dtype=torch.float64)
        self.triggered: dict[int, int] = {}
        self._window: Tensor | None = None
        self._new: list[Tensor] = []  # counts of points that were not yet summed over the ranks
        self._waiting: set[int] = set()

    def count(self, counts: Tensor) -> None:
        """Adds the counts of a batch to the present window."""
        self._window = counts if self._window is None else self._window.to(counts.device) + counts

    def add_point(self, time: float) -> None:
        """Ends the window."""
        if self._window is not None:
            self.times.append(time)
            self._new.append(self._window)
            self._window = None

    def reduce(self, group: "ProcessGroup | None") -> None:
        """Sums the new points over the ranks; to be called on all of them."""
        if self._new:
            counts = torch.stack([one.to(self._new[-1].device) for one in self._new])
            iou = iou_of_counts(distributed.all_reduce_sum(counts, group).cpu())
            self.iou = torch.cat([self.iou, iou]) if len(self.iou) else iou
            self._new = []

    def trigger(self, epoch: int) -> Tensor:
        """Looks which classes have come to their end by now.

        Args:
            epoch: Epochs finished.

        Returns:
            bool ``(C,)``, those that have come to it now.

        """
        new = torch.zeros(self.iou.shape[1], dtype=torch.bool)
        for c in range(len(new)):
            if c != self._background and c not in self.triggered and self._is_over(c, epoch):
                self.triggered[c], new[c] = epoch, True
        return new

    def _is_over(self, c: int, epoch: int) -> bool:
        if self._start is not None:
            return epoch >= self._start
        values = self.iou[:, c].tolist()
        cut = flat_start(values, self._flat_rise) if self._flat_rise else 0
        shift = self.times[cut - 1] if cut else 0.0
        times, values = [time - shift for time in self.times[cut:]], values[cut:]
        if len(values) < self._min_points or not any(values):
            return False
        try:
            found = trigger_epoch(fit_early_learning(times, values), int(epoch - shift), self._r)
        except ImportError as error:
            raise MisconfigurationException(
                "ADELE fits curves with SciPy: pip install scipy (the extra `analysis`), or say when to correct:"
                " `ADELE(start=10)`."
            ) from error
        except (RuntimeError, ValueError) as error:
            if c not in self._waiting:
                host.rank_zero_warn(
                    f"ADELE: no curve could be fitted to the training IoU of class {c} ({error}), so its masks are not"
                    " corrected yet. This is said once."
                )
            self._waiting.add(c)
            return False
        return found is not None

    def triggered_classes(self, num_classes: int) -> Tensor:
        """Which classes are corrected, bool ``(C,)``."""
        found = torch.zeros(num_classes, dtype=torch.bool)
        found[list(self.triggered)] = True
        return found

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain values."""
        return {
            "times": list(self.times),
            "iou": self.iou.clone(),
            "triggered": dict(self.triggered),
            "window": None if self._window is None else self._window.cpu(),
            "new": [counts.cpu() for counts in self._new],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.times, self.iou = list(state["times"]), state["iou"].clone()
        self.triggered, self._window, self._new = dict(state["triggered"]), state["window"], list(state["new"])
