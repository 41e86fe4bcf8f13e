"""ELR+: two networks, averaged teachers, mixup."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRPlusCallback
from lightning_reg.engine.mixing import draw_lam, draw_permutation
from lightning_reg.engine.reordering import Reordered
from lightning_reg.engine.trained_peers import reset_parameters_
from tests.conformance.case import Case

CASE = Case(
    make=partial(ELRPlusCallback, mixup_alpha=0.0, decay=0.9, decay_rampup_steps=10),
    neutral=partial(ELRPlusCallback, lam=0.0, mixup_alpha=0.0),
    variants=[
        partial(ELRPlusCallback, mixup_alpha=1.0, lam_rampup_steps=8, decay_rampup_steps=0),
        partial(ELRPlusCallback, refine=True, teacher="eval", validation="ensemble", logits_layer="net"),
        partial(ELRPlusCallback, networks=1, averaging=False, table_dtype="bfloat16", table_device="cpu"),
        partial(ELRPlusCallback, index_key="2", num_samples=30, num_classes=4, peer_init="copy", seed=3),
    ],
    invalid=[
        ({"lam": -0.1}, "lam"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.0}, "beta"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": 0.5}, "clamp"),
        ({"mixup_alpha": -1.0}, "mixup_alpha"),
        ({"decay": -0.1}, "decay"),
        ({"decay": 1.0}, "decay"),
        ({"lam_rampup_steps": -1}, "lam_rampup_steps"),
        ({"decay_rampup_steps": -1}, "decay_rampup_steps"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_classes": 0}, "num_classes"),
        ({"networks": 3}, "networks"),
        ({"index_key": "index"}, "num_samples"),
    ],
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SIZE, BATCH, CLASSES = 22, 6, 3

# -- the loop by hand -------------------------------------------------------------------------------------------------


class Classifier(LightningModule):
    """What a user has; nothing in it knows of ELR+."""

    def __init__(self, **optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.optimizer = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, **optimizer}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), **self.optimizer)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def blobs(size=SIZE):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))


def make_loader(data=None, batch_size=BATCH):
    return DataLoader(data or blobs(), batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))


def make_model(**optimizer):
    seed_everything(7, verbose=False)
    return Classifier(**optimizer)


def fit(elr_plus, model=None, loader=None, epochs=2, validate=False, ckpt_path=None, callbacks=(), **options):
    model = model or make_model()
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "max_epochs": epochs}
    trainer = Trainer(callbacks=[elr_plus, *callbacks], **(defaults | options))
    val = DataLoader(blobs(), BATCH) if validate else None
    trainer.fit(model, loader or make_loader(), val, ckpt_path=ckpt_path)
    return trainer, model


def order_of_the_first(epochs):
    """Dataset indices of each batch of network 1, by epoch."""
    loader = make_loader(TensorDataset(torch.arange(SIZE)))
    return [[batch[0] for batch in loader] for _ in range(epochs)]


def hand_step(net, teacher, optimizer, table, index, generator, step, given):
    """One step of one network; ``step`` counts from 1."""
    x_all, y_all = blobs().tensors
    x, y = x_all[index], F.one_hot(y_all[index], CLASSES).float()
    share, partner = 1.0, torch.arange(len(x))
    if given["alpha"]:
        share = draw_lam(given["alpha"], generator)
        share, partner = max(share, 1 - share), draw_permutation(x, generator)
    with torch.no_grad():
        seen = teacher(x).softmax(1)
    t = table[index] = given["beta"] * table[index] + (1 - given["beta"]) * seen
    q = share * t + (1 - share) * t[partner]
    z = net(share * x + (1 - share) * x[partner])
    y = share * y + (1 - share) * y[partner]
    if given["refine"]:
        y = y * q / (y * q).sum(1, keepdim=True)
    p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
    coef = given["coef"]
    strength = math.exp(-5 * (1 - min(step, coef) / coef) ** 2) if coef else 1.0
    regularizer = (1 - (q * p).sum(1)).log().mean()
    loss = -(y * z.log_softmax(1)).sum(1).mean() + strength * given["lam"] * regularizer
    optimizer.zero_grad()
    loss.backward()
    if given["clip"]:
        nn.utils.clip_grad_norm_(net.parameters(), given["clip"])
    optimizer.step()


def hand_average(average, net, step, gamma, ramp):
    a = gamma * math.exp(-5 * (1 - min(step + 1, ramp) / ramp) ** 2) if ramp else min(1 - 1 / (step + 1), gamma)
    with torch.no_grad():
        for old, new in zip(average.parameters(), net.parameters(), strict=True):
            old.copy_(a * old + (1 - a) * new)


def by_hand(elr_plus, *, gamma, ramp, two=True, epochs=2, **given):
    """Both networks in plain PyTorch; only random draws are the technique's own."""
    given = {"coef": 0, "refine": False, "clip": 0.0, **given}
    nets = [make_model(), make_model()][: 2 if two else 1]
    if two:
        reset_parameters_(nets[1], elr_plus.derived_seed("weights"))
    averages = [copy.deepcopy(net) for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-2) for net in nets]
    tables, steps = [torch.zeros(SIZE, CLASSES) for _ in nets], [0, 0]
    second = Reordered(make_loader(), elr_plus)
    orders = [order_of_the_first(epochs), [[torch.tensor(d) for d in second.draws(e)] for e in range(epochs)]]
    for epoch in range(epochs):
        for k, net in enumerate(nets):
            for index in orders[k][epoch]:
                steps[k] += 1
                draws = elr_plus.generator(SimpleNamespace(batches_so_far=steps[k], stream=" peer" if k else ""))
                teacher = averages[(1 - k) % len(nets)]
                hand_step(net, teacher, optimizers[k], tables[k], index, draws, steps[k], given)
                hand_average(averages[k], net, steps[k], gamma, ramp)
            for group in optimizers[k].param_groups:
                group["lr"] *= 0.5
    return nets, averages, tables


VARIANTS = {
    "paper": ({}, {}, {}),
    "no ramp of the decay": ({"decay_rampup_steps": 0}, {"ramp": 0}, {}),
    "ramp of lambda": ({"lam_rampup_steps": 6}, {"coef": 6}, {}),
    "refined labels": ({"refine": True}, {"refine": True}, {}),
    "no averages": ({"averaging": False}, {"gamma": 0.0}, {}),
    "no mixup": ({"mixup_alpha": 0.0}, {"alpha": 0.0}, {}),
    "one network": ({"networks": 1}, {"two": False}, {}),
    "clipped": ({}, {"clip": 0.05}, {"gradient_clip_val": 0.05}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_networks_train_as_the_loop_by_hand_does(variant):
    arguments, settings, options = VARIANTS[variant]
    given = {"lam": 2.0, "beta": 0.6, "mixup_alpha": 2.0, "decay": 0.9, "decay_rampup_steps": 6, **arguments}
    elr_plus = ELRPlusCallback(**given)
    _, model = fit(elr_plus, **options)
    settings = {"lam": 2.0, "beta": 0.6, "alpha": 2.0, "gamma": 0.9, "ramp": 6, **settings}
    nets, averages, tables = by_hand(elr_plus, **settings)
    state = elr_plus.state_dict()["networks"]
    ours = [dict(model.named_parameters()), *([state["second"]["weights"]] if len(nets) == 2 else [])]
    for one, two in ((ours, nets), (state["averages"], averages)):
        assert len(one) == len(two) == len(nets)
        for weights, net in zip(one, two, strict=True):
            for name, p in net.named_parameters():  # float32, sums in another order, 8 steps
                torch.testing.assert_close(weights[name].detach(), p.detach(), atol=1e-5, rtol=1e-4)
    for table, expected in zip(elr_plus._tables, tables, strict=True):
        torch.testing.assert_close(table.all()[0], expected, atol=1e-5, rtol=1e-4)
