"""The score of adapting to some classes without losing others: base, novel and their harmonic mean."""

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.finetuning.promptsrc.core import harmonic_mean

__all__ = ["BaseToNovelAccuracy"]


class BaseToNovelAccuracy(Metric):
    r"""Accuracy on the classes that were trained on, on those that were not, and the harmonic mean of both.

    As in the field's protocol a sample of a base class is told from the other base classes alone, and one of a novel
    class from the other novel ones. The harmonic mean is small as soon as one of the two is.

    Source:
        Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022, arXiv 2203.05557; used by
        Khattak, Wasim et al., "Self-regulating Prompts", ICCV 2023, arXiv 2307.06948.

    Differs:
        Nothing.

    Args:
        base: Numbers of the classes that were trained on, at least one; all others are novel.

    Raises:
        ValueError: If there is no class, or one is below 0 or no whole number.

    Example:
        >>> score = BaseToNovelAccuracy(base=[0, 1])
        >>> score.update(torch.tensor([[2.0, 1.0, 3.0, 0.0], [0.0, 9.0, 1.0, 2.0]]), torch.tensor([0, 2]))
        >>> score.compute()
        {'base': tensor(1.), 'novel': tensor(0.), 'harmonic_mean': tensor(0.)}

    """

    full_state_update = False

    def __init__(self, base: list[int]) -> None:
        super().__init__()
        if not base:
            raise ValueError(f"BaseToNovelAccuracy: `base` must name at least one class, got {base!r}.")
        for number in base:
            check_number(self, "base", number, low=0, integer=True)
        self.base = sorted(set(base))
        self.add_state("hits", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2), dist_reduce_fx="sum")
        self.hits: Tensor
        self.counts: Tensor

    @override
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Takes a batch.

        Args:
            logits: Of all classes, ``(B, C)``.
            labels: Class numbers, ``(B,)``.

        """
        known = torch.tensor(self.base, device=logits.device)
        is_base = (torch.arange(logits.shape[1], device=logits.device)[:, None] == known).any(1)
        of_base = is_base[labels]
        allowed = is_base == of_base[:, None]
        hit = (logits.masked_fill(~allowed, -torch.inf).argmax(1) == labels).float()
        sides = torch.stack([of_base, ~of_base]).float()
        self.hits += sides @ hit
        self.counts += sides.sum(1)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The scores; NaN of a side without samples."""
        base, novel = self.hits / self.counts
        return {"base": base, "novel": novel, "harmonic_mean": harmonic_mean(base, novel)}
