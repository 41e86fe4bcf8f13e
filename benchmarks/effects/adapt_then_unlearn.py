"""A GAN on 8x8 digits is to forget the sevens: what repulsion adds to training on wanted samples alone.

sklearn's digits; an MLP generator (16 numbers of noise, 128, 128) and an MLP discriminator, non-saturating loss, Adam
5e-4 with betas (0, 0.99), R1 of 1 in every 16th step, batches of 64, 3,000 steps. A convolutional classifier, trained
on the digits, sorts what the GAN makes: 500 sevens, 5,000 others. Stage 1: a copy is adapted to the sevens in 500
steps, tied to its start by the generator's Fisher information. Stage 2: the original goes on with the others for 150
steps, alone or away from the adapted weights; the terms are of d / d0. Extrapolation takes no step: it moves from the
original by 1.25 times its difference from the adapted weights, as far as EL2 goes. Share of sevens among 5,000 samples
(per cent); PUL, by how much it has fallen; Fréchet distance of 1,500 samples to the real digits without sevens, in 32
features of the classifier and in pixels; d / d0.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_reg import L2ToStart, WeightRepulsion
from lightning_reg.functional import (
    frechet_distance,
    generator_fisher,
    split_pool,
    unlearned_percentage,
    weight_distance,
)

UNWANTED, NOISE, BATCH = 7, 16, 64
FISHER_WEIGHT, BEYOND = 2.0, 1.25
ARMS: dict[str, dict[str, Any] | None] = {
    "wanted samples alone": None,
    "EL2, weight 20": {"kind": "el2", "weight": 20.0},
    "IL2, weight 10": {"kind": "il2", "weight": 10.0},
    "NL2, weight 1": {"kind": "nl2", "weight": 1.0},
}
OTHERS = ("the original", "the adapted copy", "extrapolation")


class GAN(LightningModule):
    """An ordinary GAN with manual optimization: nothing in it knows about unlearning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = _layers(NOISE, 64)
        self.discriminator = _layers(64, 1)

    def sample(self, count: int) -> Tensor:
        with torch.no_grad():
            images: Tensor = self.generator(torch.randn(count, NOISE)).sigmoid()
        return images

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generating, judging = self.optimizers()  # type: ignore[attr-defined]  # of two optimizers
        real, noise = batch[0], torch.randn(len(batch[0]), NOISE)
        fake = self.generator(noise).sigmoid()
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        if batch_idx % 16 == 0:
            real.requires_grad_()
            (slope,) = torch.autograd.grad(self.discriminator(real).sum(), real, create_graph=True)
            loss = loss + 16 * 0.5 * slope.square().sum(1).mean()
        _step(self, judging, loss)
        _step(self, generating, F.softplus(-self.discriminator(fake)).mean())

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(layers.parameters(), lr=5e-4, betas=(0.0, 0.99))
            for layers in (self.generator, self.discriminator)
        ]


def _layers(inputs: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(inputs, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(128, outputs))


def _step(module: LightningModule, optimizer: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    module.manual_backward(loss)
    optimizer.step()


class Classifier(LightningModule):
    """A small convolutional classifier; ``features`` are what its last layer sees."""

    def __init__(self) -> None:
        super().__init__()
        conv = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        conv += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.Tanh()]
        self.features, self.head = nn.Sequential(*conv), nn.Linear(32, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.features(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    @torch.no_grad()
    def is_unwanted(self, images: Tensor) -> Tensor:
        mask: Tensor = self.head(self.features(images)).argmax(1) == UNWANTED
        return mask


def train(module: LightningModule, images: Tensor, steps: int, seed: int, *callbacks: Any) -> None:
    torch.manual_seed(seed)
    data = TensorDataset(images)
    loader = DataLoader(data, BATCH, sampler=RandomSampler(data, replacement=True, num_samples=steps * BATCH))
    fit(module, callbacks, loader, max_epochs=1)


def figures(gan: GAN, classifier: Classifier, reals: Tensor, before: float, ratio: float) -> dict[str, float]:
    torch.manual_seed(0)  # the same noise for all arms
    images = gan.sample(5_000)
    share = float(classifier.is_unwanted(images).float().mean())
    some = images[:1_500]
    with torch.no_grad():
        distance = frechet_distance(classifier.features(some), classifier.features(reals))
    return {
        "share_(%)": 100 * share,
        "PUL_(%)": unlearned_percentage(before or share, share),
        "Fréchet,_features": float(distance),
        "Fréchet,_pixels": float(frechet_distance(some, reals)),
        "d_/_d0": ratio,
    }


def run(seeds: Sequence[int]) -> list[Arm]:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    results = {name: Arm(name) for name in (*ARMS, *OTHERS)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            _run(seed, x, y, results, Path(folder))
    return list(results.values())


def _run(seed: int, x: Tensor, y: Tensor, results: dict[str, Arm], folder: Path) -> None:
    torch.manual_seed(seed)
    classifier, original = Classifier(), GAN()
    fit(classifier, [], DataLoader(TensorDataset(x, y), BATCH, shuffle=True), max_epochs=25)
    classifier.eval()
    train(original, x, 3_000, seed)
    pool = split_pool(original.sample, classifier.is_unwanted, wanted=5_000, unwanted=500)
    reals = x[y != UNWANTED]

    fisher, adapted = folder / "fisher.pt", copy.deepcopy(original)
    torch.save(generator_fisher(original, torch.randn(32, NOISE)), fisher)
    tie = L2ToStart(FISHER_WEIGHT, params="generator.*", importance=str(fisher))
    train(adapted, pool.unwanted, 500, seed, tie)
    torch.save(adapted.state_dict(), folder / "adapted.pt")

    def ratio(gan: GAN) -> float:
        there, here, start = (list(one.generator.parameters()) for one in (adapted, gan, original))
        with torch.no_grad():
            return float(weight_distance(here, there) / weight_distance(start, there))

    beyond = copy.deepcopy(original)
    with torch.no_grad():
        for p, there in zip(beyond.generator.parameters(), adapted.generator.parameters(), strict=True):
            p.add_(p - there, alpha=BEYOND)
    before = figures(original, classifier, reals, 0.0, 1.0)["share_(%)"] / 100
    for name, gan in zip(OTHERS, (original, adapted, beyond), strict=True):
        results[name].add(**figures(gan, classifier, reals, before, ratio(gan)))
    for name, options in ARMS.items():
        gan = copy.deepcopy(original)
        away = [] if options is None else [WeightRepulsion(str(folder / "adapted.pt"), params="generator.*", **options)]
        train(gan, pool.wanted, 150, seed, *away)
        results[name].add(**figures(gan, classifier, reals, before, ratio(gan)))
