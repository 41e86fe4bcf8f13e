"""What a step costs with each technique: plain, written by hand in ``training_step``, and attached by the engine.

Arms take turns step by step in one process (see overhead.py); figures are medians over rounds of the ratio within a
round, with a 95 % bootstrap interval. Small transformer, batch 64; CutMix: ResNet-18, batch 8. ``elr_plus`` is one
network with an averaged teacher and no mixup: a second network costs what training it costs.

    python benchmarks/step_costs.py --steps 200 --save benchmarks/results/step_costs.txt
    python benchmarks/step_costs.py fisher --steps 5 --save benchmarks/results/step_costs.txt

The bar: engine / by hand <= 1.02. ``fisher``: EWC's squared gradients of one batch, from four samples at a time as it
takes them and from the whole batch at once, against the gradient of a training step.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from overhead import CLASSES, Plain, ResNet18, SmallTransformer, data, in_turns, quiet, show

from lightning_reg import EWC, ConR, CutMix, ELRPlusCallback, FeatureDistillation, L2ToStart, PredictionDistillation
from lightning_reg.functional import conr_loss, fisher_diagonal, fisher_losses

LAM, RANDOM = 0.1, np.random.default_rng(0)


class WithTeacher(Plain):
    """Has a frozen copy of its network."""

    def __init__(self, net):
        super().__init__(net)
        self.teacher = copy.deepcopy(net).eval().requires_grad_(False)


class Outputs(WithTeacher):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            old = self.teacher(x).sigmoid()
        wanted = F.one_hot(y, CLASSES).float()
        wanted[:, :5] = old[:, :5]
        return F.binary_cross_entropy_with_logits(self.net(x), wanted, reduction="none").sum(1).mean()


class Features(WithTeacher):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        with torch.no_grad():
            old = self.teacher.layers(self.teacher.embedding(x))
        features = self.net.layers(self.net.embedding(x))
        loss = F.cross_entropy(self.net.head(features.mean(1)), y)
        return loss + LAM * (features - old).square().flatten(1).sum(1).mean()


class Tied(Plain):
    """One term per parameter, as users write it."""

    def __init__(self, net):
        super().__init__(net)
        self.anchors = [p.detach().clone() for p in net.parameters()]

    def training_step(self, batch, batch_idx):
        pairs = zip(self.net.parameters(), self.anchors, strict=True)
        return super().training_step(batch, batch_idx) + LAM * sum((p - a).square().sum() for p, a in pairs)


class FirmlyTied(Tied):
    def training_step(self, batch, batch_idx):
        pairs = zip(self.net.parameters(), self.anchors, strict=True)
        term = sum((a.abs() * (p - a).square()).sum() for p, a in pairs)
        return Plain.training_step(self, batch, batch_idx) + LAM * term


class Cut(Plain):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        lam, permutation = RANDOM.beta(1.0, 1.0), torch.randperm(len(x))
        half, (cy, cx) = int(32 * (1 - lam) ** 0.5) // 2, RANDOM.integers(32, size=2)
        y1, y2, x1, x2 = (int(np.clip(value, 0, 32)) for value in (cy - half, cy + half, cx - half, cx + half))
        mixed = x.clone()
        mixed[:, :, y1:y2, x1:x2] = x[permutation][:, :, y1:y2, x1:x2]
        lam, logits = 1 - (y2 - y1) * (x2 - x1) / 32**2, self.net(mixed)
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[permutation])


class Numbers(Plain):
    """Regression, with an augmentation for the views."""

    def augment(self, x):
        return x.roll(1, dims=1)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return F.mse_loss(self.net(x)[:, 0], y / CLASSES)


class Contrasted(Numbers):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        features = self.net.layers(self.net.embedding(torch.cat([x, self.augment(x), self.augment(x)])))
        features = features.mean(1)
        predictions, views = self.net.head(features)[:, 0], slice(len(x), None)
        y = y / CLASSES
        term = conr_loss(features[views], y.repeat(2), predictions[views], 0.1)
        return F.mse_loss(predictions[: len(x)], y) + term


class Pooled(SmallTransformer):
    """The mean over the tokens as a layer."""

    def __init__(self):
        super().__init__()
        self.pool = torch.nn.Identity()

    def forward(self, x):
        return self.head(self.pool(self.layers(self.embedding(x)).mean(1)))


class Averaged(WithTeacher):
    """ELR with the average of its own weights as the teacher."""

    def __init__(self, net, samples):
        super().__init__(net)
        self.teacher.train()
        self.targets = torch.zeros(samples, CLASSES)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        with torch.no_grad():
            seen = self.teacher(x).softmax(1)
        self.targets[index] = q = 0.7 * self.targets[index] + 0.3 * seen
        logits = self.net(x)
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        return F.cross_entropy(logits, y) + 3.0 * (1 - (q * p).sum(1)).log().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 1 - 0.997)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 1e-3)


def after_one_task(technique, **state):
    """As it is when one task is over."""
    technique.load_state_dict({"finished": 1, "in_task": False, **state})
    return technique


def ewc(net):
    anchors = {f"net.{name}": p.detach().clone() for name, p in net.named_parameters()}
    fisher = {name: anchor.abs() for name, anchor in anchors.items()}
    return after_one_task(EWC(LAM, fisher_batches=1), slots=[{"anchors": anchors, "weights": fisher}])


def arms(key, samples):
    """Plain, by hand, by the engine: each a module and its callbacks."""
    net = {"cutmix": ResNet18, "conr": Pooled}.get(key, SmallTransformer)()
    hand = {
        "l2_to_start": Tied,
        "ewc": FirmlyTied,
        "prediction_distillation": Outputs,
        "feature_distillation": Features,
        "conr": Contrasted,
        "cutmix": Cut,
    }.get(key)
    technique = {
        "l2_to_start": lambda: L2ToStart(LAM),
        "ewc": lambda: ewc(net),
        "prediction_distillation": lambda: after_one_task(PredictionDistillation(new_classes=[5, 5]), teacher={}),
        "feature_distillation": lambda: FeatureDistillation("net.layers", LAM, anchor="start_of_fit"),
        "conr": lambda: ConR("net.pool", window=0.1, augment="augment"),
        "cutmix": lambda: CutMix(prob=1.0),
        "elr_plus": lambda: ELRPlusCallback(networks=1, mixup_alpha=0.0, decay_rampup_steps=0),
    }[key]()
    plain = Numbers if key == "conr" else Plain
    by_hand = Averaged(copy.deepcopy(net), samples) if key == "elr_plus" else hand(copy.deepcopy(net))
    return {"plain": (plain(copy.deepcopy(net)), []), "by hand": (by_hand, []), "engine": (plain(net), [technique])}


KEYS = ("l2_to_start", "ewc", "prediction_distillation", "feature_distillation", "conr", "cutmix", "elr_plus")


def fisher_times(rounds, batch=64):
    """Seconds of a gradient, and of squared gradients of the samples of the same batch, in turns."""
    net, x = SmallTransformer().eval(), torch.randint(0, 256, (batch, 32))
    params = list(net.parameters())

    def squares(at_once):
        fisher_diagonal(params, (fisher_losses(net(part), None) for part in x.split(at_once)))

    work = {
        "gradient": lambda: torch.autograd.grad(fisher_losses(net(x), None).mean(), params),
        "four at a time": lambda: squares(4),
        "all at once": lambda: squares(batch),
    }
    times = {arm: [] for arm in work}
    for _ in range(rounds):
        for arm, run in work.items():
            start = time.perf_counter()
            run()
            times[arm].append(time.perf_counter() - start)
    return times


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help=f"techniques of {', '.join(KEYS)} (all by default), or fisher"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", type=Path, help="append the tables to this file")
    options = parser.parse_args(argv)
    quiet()
    if options.keys == ["fisher"]:
        pairs = [("four at a time", "gradient"), ("all at once", "gradient"), ("all at once", "four at a time")]
        show(fisher_times(options.steps), pairs, "fisher: transformer, batch 64", options.save, skip=0)
        return
    for key in options.keys or KEYS:
        model, batch = ("resnet18", 8) if key == "cutmix" else ("transformer", 64)
        dataset = data(model, batch, options.steps)
        times = in_turns(arms(key, len(dataset)), dataset, batch, options.steps)
        pairs = [("engine", "by hand"), ("engine", "plain"), ("by hand", "plain")]
        show(times, pairs, f"{key}: {model}, batch {batch}, {options.steps} rounds", options.save)


if __name__ == "__main__":
    main()
