"""Laplace numbers with Gaussian noise: does proximal matching learn the soft threshold, and its prior |x|?

Clean numbers of Laplace(0, 1), noise of standard deviation 1, drawn anew for each batch of 500. The proximal operator
of the prior is the soft threshold at 1, the MAP estimate; the mean is another function. A LPN of 2 x 32 units, Adam,
2,100 steps at 1e-2, 3e-3 and 1e-3: on the mean absolute error, on the mean squared one, or 800 on the mean absolute
one and then proximal matching in two stages of widths 0.4 and 0.2. Weights are kept at zero or above by
NonNegative, in the last arm by nobody. Root mean squared distance to the soft threshold on [-3, 3]; f(1), which is 0
for the threshold; and how far the learned regularizer, zero at 0, is from |x| on [-2, 2], root mean square.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg import LPN, NonNegative, ProximalMatchingLoss
from lightning_reg.functional import learned_regularizer

FIRST, SECOND, BATCH = 800, 1_300, 500
PROJECTION = ["net.inner.*", "net.last.*"]
MATCHING = {"gamma_min": 0.2, "stages": 2, "steps": FIRST + SECOND, "pretrain_steps": FIRST, "elementwise": True}


class Denoiser(LightningModule):
    """An ordinary denoiser: the loss gets predictions, targets and the step."""

    def __init__(self, loss: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = LPN([1], hidden=32, layers=1), loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        clean, noisy = batch
        return self.loss(self.net(noisy), clean, self.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [FIRST, FIRST + SECOND // 2], gamma=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Pairs(IterableDataset):  # type: ignore[type-arg]  # torch's
    """Batches of clean and noisy numbers."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(FIRST + SECOND):
            uniform = torch.rand(BATCH, 1, generator=generator) - 0.5
            clean = -uniform.sign() * torch.log1p(-2 * uniform.abs())
            yield clean, clean + torch.randn(BATCH, 1, generator=generator)


def squares(predictions: Tensor, targets: Tensor, step: int) -> Tensor:
    return F.mse_loss(predictions, targets)


def magnitudes(predictions: Tensor, targets: Tensor, step: int) -> Tensor:
    return F.l1_loss(predictions, targets)


def figures(network: LPN) -> dict[str, float]:
    y, x = torch.linspace(-3, 3, 241)[:, None], torch.linspace(-2, 2, 81)[:, None]
    with torch.no_grad():
        missed = (network(y) - F.softshrink(y, 1.0)).square().mean().sqrt()
        at_one = network(torch.ones(1, 1))
    prior = learned_regularizer(network, x, tolerance=1e-3)
    off = (prior - prior[40] - x[:, 0].abs()).square().nanmean().sqrt()
    return {"RMSE_to_the_threshold": float(missed), "f_of_1": float(at_one), "R_off_by": float(off)}


def run(seeds: Sequence[int]) -> list[Arm]:
    arms: dict[str, tuple[Any, bool]] = {
        "mean absolute error": (magnitudes, True),
        "mean squared error": (squares, True),
        "proximal matching": (ProximalMatchingLoss(**MATCHING), True),
        "matching, no projection": (ProximalMatchingLoss(**MATCHING), False),
    }
    results = [Arm(name) for name in arms]
    for seed in seeds:
        for arm in results:
            loss, projected = arms[arm.name]
            torch.manual_seed(seed)
            module = Denoiser(loss)
            loader = DataLoader(Pairs(seed), batch_size=None)
            fit(module, [NonNegative(PROJECTION)] if projected else [], loader, max_epochs=1)
            arm.add(**figures(module.net))
    return results
