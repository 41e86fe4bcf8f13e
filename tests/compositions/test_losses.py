"""Techniques on losses, batches and features together, against loops written by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    ConR,
    CutMix,
    ELRCallback,
    LossReweighting,
    MultiSampleDropout,
    NMSparsity,
)
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import conr_loss, cutmix, elr_regularizer, elr_targets, nm_mask, reweight
from tests.compositions.shared import Net, data, train
from tests.toys import QUIET, TWO_RANKS, fit

pytestmark = QUIET


@pytest.mark.by_hand("LossReweighting", "NMSparsity")
@pytest.mark.parametrize("first", [True, False], ids=["reweighting first", "sparsity first"])
def test_reweighting_reads_the_losses_of_the_sparse_network(first):
    techniques = [LossReweighting(warmup_steps=0), NMSparsity(1, 4, recipe="ste", dense_fraction=0.0)]
    module = train(*(techniques if first else techniques[::-1]))
    reference = Net()
    optimizer = torch.optim.SGD(reference.parameters(), 0.2)
    for _ in range(2):
        for x, y in DataLoader(data(), 8):
            weight = reference.net[2].weight
            kept = weight.detach().clone()
            weight.data.mul_(nm_mask(kept, 1, 4))
            losses = F.cross_entropy(reference(x), y, reduction="none")
            optimizer.zero_grad()
            (reweight(losses) * losses).sum().backward()
            weight.data.copy_(kept)
            optimizer.step()
    reference.net[2].weight.data.mul_(nm_mask(reference.net[2].weight, 1, 4))
    for one, two in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


class Numbers(Net):
    """Regression of three numbers."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def augment(self, x):
        return 0.9 * x + 0.1 * x.roll(1, dims=1)


def skewed():
    x, _ = data().tensors
    return DataLoader(TensorDataset(x, (4 * x[:, :3]).round()), 8)


@pytest.mark.by_hand("ConR", "LossReweighting")
@pytest.mark.parametrize("first", [True, False], ids=["reweighting first", "ConR first"])
def test_reweighting_weights_the_batch_alone_and_conr_its_views(first):
    conr = ConR("net.3", window=1.0, beta=0.3, temperature=0.5, augment="augment")
    techniques = [LossReweighting(warmup_steps=0), conr]
    module = Numbers()
    fit(module, *(techniques if first else techniques[::-1]), loader=skewed(), max_epochs=2)
    reference = Numbers()
    optimizer = torch.optim.SGD(reference.parameters(), 0.2)
    for _ in range(2):
        for x, y in skewed():
            losses = F.mse_loss(reference(x), y, reduction="none").mean(1)
            views = torch.cat([reference.augment(x)] * 2)
            term = conr_loss(reference.net[:4](views), y.repeat(2, 1), reference(views), 1.0, temperature=0.5)
            optimizer.zero_grad()
            ((reweight(losses) * losses).sum() + 0.3 * term).backward()
            optimizer.step()
            assert term > 0.05


# -- mixed samples ----------------------------------------------------------------------------------------------------


class Flat(Net):
    """The same for signals of one channel."""

    def forward(self, x):
        return super().forward(x.flatten(1))


def signals():
    x, y = data().tensors
    return DataLoader(TensorDataset(x[:, None], y), 8)


def cut(technique, position, x):
    """What CutMix does to the ``position``-th batch, counted from 1; with a share of 1 nothing."""
    generator = technique.generator(SimpleNamespace(batches_so_far=position, stream=""))
    if float(torch.rand((), generator=generator)) >= technique.prob:
        return x, torch.arange(len(x)), 1.0
    return cutmix(x, None, technique.alpha, generator)


def by_hand(technique, loss_of, epochs):
    """Trains with ``loss_of(logits, losses, mixed?, own share, partners, rows in the data set)``."""
    reference, position, kinds = Flat(), 0, set()
    optimizer = torch.optim.SGD(reference.parameters(), 0.2)
    for _ in range(epochs):
        for batch, (x, y) in enumerate(signals()):
            position += 1
            mixed, permutation, lam = cut(technique, position, x)
            logits = reference(mixed)
            losses = lam * F.cross_entropy(logits, y, reduction="none")
            losses = losses + (1 - lam) * F.cross_entropy(logits, y[permutation], reduction="none")
            optimizer.zero_grad()
            loss_of(logits, losses, lam, permutation, slice(8 * batch, 8 * batch + 8)).backward()
            optimizer.step()
            kinds.add(lam < 1)
    assert kinds == {True, False}
    return reference


@pytest.mark.by_hand("CutMix", "ELRCallback")
@pytest.mark.parametrize("first", [True, False], ids=["ELR first", "CutMix first"])
def test_elr_mixes_its_targets_and_learns_them_from_unmixed_batches_only(first):
    elr, mix, table = ELRCallback(lam=3.0, beta=0.7), CutMix(prob=0.5), torch.zeros(24, 3)

    def loss_of(logits, losses, lam, permutation, rows):
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        if lam < 1:
            q = lam * table[rows] + (1 - lam) * table[rows][permutation]
        else:
            table[rows] = 0.7 * table[rows] + 0.3 * (p / p.sum(1, keepdim=True)).detach()
            q = table[rows].clone()
        return losses.mean() + 3.0 * (1 - (q * p).sum(1)).log().mean()

    reference, module = by_hand(mix, loss_of, epochs=5), Flat()
    fit(module, *([elr, mix] if first else [mix, elr]), loader=signals(), max_epochs=5)
    for one, two in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)  # float32, 15 steps
    torch.testing.assert_close(elr.state_dict()["targets"]["values"], table, atol=1e-5, rtol=1e-4)


def test_elr_is_refused_beside_a_technique_that_leaves_no_batch_unmixed():
    for order in ([ELRCallback(), CutMix(prob=1.0)], [CutMix(prob=1.0), ELRCallback()]):
        with pytest.raises(MisconfigurationException, match="ELRCallback learns about single samples from the batches"):
            fit(Flat(), *order, loader=signals())


@pytest.mark.by_hand("CutMix", "LossReweighting")
@pytest.mark.parametrize("first", [True, False], ids=["reweighting first", "CutMix first"])
def test_reweighting_reads_the_mixed_losses(first):
    techniques = [LossReweighting(warmup_steps=0), CutMix(prob=0.5)]
    mix, module = techniques[1], Flat()
    reference = by_hand(mix, lambda logits, losses, *_: (reweight(losses.detach()) * losses).sum(), epochs=2)
    fit(module, *(techniques if first else techniques[::-1]), loader=signals(), max_epochs=2)
    for one, two in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def elr_and_cutmix_on_rank():
    elr, mix, module = ELRCallback(), CutMix(prob=0.5), Flat()
    fit(module, elr, mix, loader=DataLoader(signals().dataset, 3, shuffle=True), max_epochs=3, **TWO_RANKS)
    steps = [SimpleNamespace(batches_so_far=position, stream="") for position in range(12)]
    coins = [float(torch.rand((), generator=mix.generator(step))) < 0.5 for step in steps]
    return coins, elr.state_dict()["targets"]["values"], [p.detach() for p in module.parameters()]


def test_ranks_that_mix_other_batches_hold_the_same_targets(two_processes):
    one, two = two_processes.run(elr_and_cutmix_on_rank)
    assert one[0] != two[0]  # in some steps one rank has rows to send and the other has none
    assert torch.equal(one[1], two[1])
    assert (one[1].sum(1) > 0).any()
    assert all(torch.equal(a, b) for a, b in zip(one[2], two[2], strict=True))


class Dropped(Net):
    """Two layers with dropout between them, which notes the masks it was trained with."""

    def __init__(self):
        super().__init__()
        self.net[2], self.masks = nn.Dropout(0.5), []
        self.net = self.net[:3].append(self.net[4])
        self.net[3].register_forward_hook(lambda layer, args, output: self.masks.append((args[0] != 0).float()))


def by_hand_on_copies(masks, loss):
    """Trains on given masks; ``loss`` takes the copies' logits ``(M, B, C)``, labels and places."""
    reference = Dropped()
    optimizer = torch.optim.SGD(reference.parameters(), 0.2)
    batches = [(x, y, range(8 * i, 8 * i + 8)) for i, (x, y) in enumerate(DataLoader(data(), 8))]
    for (x, y, places), rows in zip(batches * 2, masks, strict=True):
        h = reference.net[1](reference.net[0](x))
        logits = torch.stack([reference.net[3](h * 2 * mask) for mask in rows.split(8)])
        optimizer.zero_grad()
        loss(logits, y, list(places)).backward()
        optimizer.step()
    return reference


@pytest.mark.by_hand("LossReweighting", "MultiSampleDropout")
@pytest.mark.parametrize("first", [True, False], ids=["reweighting first", "dropout first"])
def test_reweighting_weighs_samples_by_the_mean_loss_over_their_copies(first):
    techniques = [LossReweighting(warmup_steps=0), MultiSampleDropout("net.2", num_samples=3)]
    module = train(*(techniques if first else techniques[::-1]), module=Dropped())

    def loss(logits, y, places):
        losses = sum(F.cross_entropy(copy, y, reduction="none") for copy in logits) / 3
        return (reweight(losses) * losses).sum()

    reference = by_hand_on_copies(module.masks, loss)
    for one, two in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.by_hand("ELRCallback", "MultiSampleDropout")
def test_elr_remembers_the_mean_prediction_over_the_copies():
    elr = ELRCallback(lam=2.0, beta=0.6)
    module = train(elr, MultiSampleDropout("net.2", num_samples=3), module=Dropped())
    targets = torch.zeros(24, 3)

    def loss(logits, y, places):
        mean = logits.softmax(2).mean(0)
        rows = targets[places] = elr_targets(targets[places], mean.clamp(1e-4, 1 - 1e-4), 0.6)
        losses = sum(F.cross_entropy(copy, y) for copy in logits) / 3
        return losses + 2.0 * elr_regularizer(mean.log(), rows)

    reference = by_hand_on_copies(module.masks, loss)
    for one, two in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(elr._table.targets.all(), targets, atol=1e-6, rtol=1e-5)
