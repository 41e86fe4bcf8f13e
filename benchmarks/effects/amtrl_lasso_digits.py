"""A target of corrupted digits when a budget goes to the sources alike, by squared relevance, or by SourceTasks.

The MNIST test set at 14 x 14 pixels, six corruptions (noise, blur, inverted, a stripe, moved, fog) times ten digits
against all others, half of each: 60 tasks. A target is one of them, the 59 others are its sources, of 200 images each;
a budget of 3000, of which 1200 are bought before the round at epoch 10. A perceptron 196-128-50 with a head for each
source, Adam 1e-3, batches of 64, 700 steps. Then ridge regression of 500 images of the target on its features; accuracy
on 1000 others in per cent, mean of three targets that the seed draws.
"""

import gzip
import sys

import numpy as np
import torch
import torch.nn.functional as F
from _shared import Arm, data_folder, fit
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import SourceTasks
from lightning_reg.functional import target_head

ORDERS = {"alike": "uniform", "by squares (L2)": "l2", "SourceTasks (L1)": "l1"}


def mnist():
    folder = data_folder("mnist10k")
    read = {}
    for kind, start in (("images", 16), ("labels", 8)):
        (path,) = (p for p in folder.iterdir() if kind in p.name)
        read[kind] = torch.from_numpy(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=start).copy())
    images = F.avg_pool2d(read["images"].view(-1, 1, 28, 28).float() / 255, 2)[:, 0]
    return images, read["labels"].long()


def corrupted(x, kind):
    if kind == 0:
        return x + 0.3 * torch.randn(x.shape)
    if kind == 1:
        return F.avg_pool2d(x[:, None], 5, 1, 2)[:, 0]
    if kind == 2:
        return 1 - x
    if kind == 3:
        x = x.clone()
        x[:, 6:8] = 1
        return x
    return x.roll((2, 2), (1, 2)) if kind == 4 else 0.4 * x + 0.5


def task_data(images, labels, task, count):
    """Images of a task, half of them of its digit."""
    kind, digit = divmod(task, 10)
    mine, others = (labels == digit).nonzero().flatten(), (labels != digit).nonzero().flatten()
    half = count // 2
    chosen = torch.cat([part[torch.randint(len(part), (half,))] for part in (mine, others)])
    return corrupted(images[chosen], kind).flatten(1), (labels[chosen] == digit).float()


class Tasks(LightningModule):
    def __init__(self, task, sources):
        super().__init__()
        self.task, self.encoder = task, nn.Sequential(nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 50))
        self.heads = nn.Linear(50, sources)

    def tasks_of_samples(self):
        return self.task

    def training_step(self, batch, batch_idx):
        x, y, task = batch
        return F.binary_cross_entropy_with_logits(self.heads(self.encoder(x)).gather(1, task[:, None])[:, 0], y)

    def validation_step(self, batch, batch_idx):
        self.encoder(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def accuracies(images, labels, target, seed):
    """Of all orders, on one target."""
    seed_everything(seed, verbose=False)
    shuffled = torch.randperm(len(images))
    parts = [(images[rows], labels[rows]) for rows in shuffled.split([6000, 1500, 2500])]
    sources = [task for task in range(60) if task != target]
    data = [task_data(*parts[0], task, 200) for task in sources]
    task = torch.arange(len(sources)).repeat_interleave(200)
    training = TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]), task)
    own, test = task_data(*parts[1], target, 500), task_data(*parts[2], target, 1000)
    found = {}
    for order in ("uniform", "l2", "l1"):
        seed_everything(seed, verbose=False)
        module = Tasks(task, len(sources))
        how = {} if order == "uniform" else {"rounds": [10], "layer": "encoder", "label_key": "1"}
        technique = SourceTasks(len(sources), "tasks_of_samples", order=order, budget=3000, floor=0.4, seed=seed, **how)
        loaders = [DataLoader(training, 64), DataLoader(TensorDataset(*own), 500)]
        fit(module, [technique], *loaders, max_steps=700, max_epochs=-1, check_val_every_n_epoch=1000)
        with torch.no_grad():
            seen, unseen = module.encoder(own[0]).double(), module.encoder(test[0]).double()
        head = target_head(seen, own[1], 1e-3, bias=True)
        guess = (unseen - seen.mean(0)) @ head + own[1].mean() > 0.5
        found[order] = 100 * float((guess == (test[1] > 0)).double().mean())
    return found


def run(seeds):
    images, labels = mnist()
    arms = {order: Arm(name) for name, order in ORDERS.items()}
    for seed in seeds:
        targets = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:3].tolist()
        found = [accuracies(images, labels, target, seed) for target in targets]
        for order, arm in arms.items():
            arm.add(accuracy=sum(one[order] for one in found) / len(found))
        print(f"seed {seed}", file=sys.stderr, flush=True)
    return list(arms.values())
