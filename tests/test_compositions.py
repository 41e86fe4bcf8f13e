"""Techniques together, against loops written by hand; the conformance suite trains every pair, and checks less."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    EWC,
    ConR,
    CutMix,
    ELRCallback,
    LossReweighting,
    MultiSampleDropout,
    NMSparsity,
    PredictionDistillation,
    SoupAverager,
    WeightCompander,
)
from lightning_reg.engine.errors import MisconfigurationException
from lightning_reg.functional import conr_loss, cutmix, elr_regularizer, elr_targets, nm_mask, reweight
from tests.conformance.problems import Loader, Resumable
from tests.toys import QUIET, TWO_RANKS, Callback, Classifier, fit, make_trainer, same_weights

pytestmark = QUIET


class Net(Classifier):
    """Three layers; the one in the middle can become sparse."""

    def __init__(self):
        super().__init__(lr=0.2)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


class Dense(Callback):
    """Weights after every step, as the optimizer has them."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.net[2].weight.detach().clone())


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(24, 6, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.2 * torch.rand(24, 3, generator=generator)).argmax(1))


def train(*callbacks, module=None):
    module = module or Net()
    fit(module, *callbacks, loader=DataLoader(data(), 8), max_epochs=2)
    return module


@pytest.mark.by_hand("NMSparsity", "SoupAverager")
@pytest.mark.parametrize("first", [True, False], ids=["average first", "sparsity first"])
def test_an_average_of_different_masks_is_masked_anew(first):
    dense, sparse = Dense(), NMSparsity(1, 4, recipe="srste", dense_fraction=0.0)
    soup = SoupAverager(method="ema", decay=0.5)
    module = train(*([soup, dense, sparse] if first else [sparse, dense, soup]))
    masks = {tuple(nm_mask(weight, 1, 4).flatten().tolist()) for weight in dense.weights}
    assert len(masks) > 1
    # The average starts as the weights after the first step.
    mean = dense.weights[0]
    for weight in dense.weights[1:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(module.net[2].weight, mean * nm_mask(mean, 1, 4))
    assert sparse.verify(module) == {"net.2.weight": (0.25, 0)}


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


@pytest.mark.by_hand("LossReweighting", "SoupAverager")
def test_a_soup_of_reweighted_training_is_the_mean_of_its_snapshots():
    dense = Dense()
    module = train(LossReweighting(warmup_steps=0), dense, SoupAverager(method="uniform"))
    torch.testing.assert_close(module.net[2].weight, (dense.weights[2] + dense.weights[5]) / 2)
    plain = Dense()
    train(plain)
    assert not torch.equal(plain.weights[-1], dense.weights[-1])


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


class Stops(Callback):
    """Saves after so many batches and stops there, in the middle of an epoch."""

    def __init__(self, path, batches):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches -= 1
        if self.batches == 0:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.by_hand("ELRCallback", "SoupAverager")
@pytest.mark.parametrize("first", [True, False], ids=["ELR first", "average first"])
def test_an_average_of_early_learning_survives_a_stop_in_mid_epoch(first, tmp_path):
    def techniques(*more):
        elr, soup = ELRCallback(lam=3.0, beta=0.7), SoupAverager(method="ema", decay=0.5)
        return [elr, soup, *more] if first else [soup, elr, *more]

    def loader():
        return Loader(data(), 8, sampler=Resumable(24))

    trainer = make_trainer(callbacks=techniques(Stops(tmp_path / "stop.ckpt", 4)), max_epochs=3, min_epochs=0)
    trainer.fit(Net(), loader())
    assert trainer.global_step == 4  # of 9
    module, resumed = Net(), techniques()
    trainer = make_trainer(callbacks=resumed, max_epochs=3)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "stop.ckpt", weights_only=True)

    (inputs, labels), reference = data().tensors, Net()
    table, mean = torch.zeros(24, 3), None
    optimizer = torch.optim.SGD(reference.parameters(), 0.2)
    for epoch in range(3):
        for rows in torch.randperm(24, generator=torch.Generator().manual_seed(epoch)).split(8):
            logits, y = reference(inputs[rows]), labels[rows]
            p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
            table[rows] = 0.7 * table[rows] + 0.3 * (p / p.sum(1, keepdim=True)).detach()
            term = (1 - (table[rows] * p).sum(1)).log().mean()
            optimizer.zero_grad()
            (F.cross_entropy(logits, y) + 3.0 * term).backward()
            optimizer.step()
            now = [parameter.detach().clone() for parameter in reference.parameters()]
            mean = now if mean is None else [0.5 * one + 0.5 * two for one, two in zip(mean, now, strict=True)]
    for one, two in zip(module.parameters(), mean, strict=True):
        torch.testing.assert_close(one.detach(), two, atol=1e-5, rtol=1e-4)  # float32, 9 steps
    elr = resumed[0 if first else 1]
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


class Latent(nn.Module):
    """The middle layer's weight as a function of what is trained: w = a arctan(v / b)."""

    def __init__(self, weight, a, b):
        super().__init__()
        self.log_a, self.log_b = (nn.Parameter(torch.tensor(x).log()) for x in (a, b))
        self.v = nn.Parameter(b * (weight / a).tan())

    def forward(self):
        return self.log_a.exp() * (self.v / self.log_b.exp()).atan()


@pytest.mark.by_hand("NMSparsity", "WeightCompander")
@pytest.mark.parametrize("recipe", ["ste", "srste"])
@pytest.mark.parametrize("first", [True, False], ids=["compander first", "sparsity first"])
def test_sparsity_prunes_companded_weights_and_the_gradient_goes_on_through_the_map(first, recipe):
    compander = WeightCompander(layers="2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
    sparse = NMSparsity(1, 4, recipe=recipe, lambda_w=0.05, dense_fraction=0.0)
    module = train(*([compander, sparse] if first else [sparse, compander]))
    reference = Net()
    layer = reference.net[2]
    latent = Latent(layer.weight.detach(), 0.4, 0.3)
    del layer.weight
    others = list(reference.parameters())
    optimizer = torch.optim.SGD(
        [{"params": [*others, latent.v]}, {"params": [latent.log_a, latent.log_b], "lr": 0.1}], 0.2
    )
    for _ in range(2):
        for x, y in DataLoader(data(), 8):
            w = latent()
            mask = nm_mask(w.detach(), 1, 4)
            pruned = (w * mask).detach().requires_grad_()
            layer.weight = pruned
            optimizer.zero_grad()
            F.cross_entropy(reference(x), y).backward()
            # Straight through the mask, SR-STE's pull on w, then through the map.
            w.backward(pruned.grad + (0.05 * w.detach() * ~mask if recipe == "srste" else 0.0))
            optimizer.step()
    w = latent().detach()
    torch.testing.assert_close(module.net[2].weight.detach(), w * nm_mask(w, 1, 4), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(module.net[0].weight, reference.net[0].weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(compander.latents.values["net.2.weight"], latent.v.detach(), atol=1e-6, rtol=1e-5)
    shape = torch.stack([latent.log_a, latent.log_b]).detach()
    torch.testing.assert_close(compander.latents.own["net.2.weight"].detach(), shape)
    assert not torch.allclose(shape, torch.tensor([0.4, 0.3]).log(), rtol=0, atol=1e-4)


@pytest.mark.by_hand("SoupAverager", "WeightCompander")
@pytest.mark.parametrize("first", [True, False], ids=["average first", "compander first"])
@pytest.mark.parametrize("arguments", [{"method": "uniform"}, {"method": "ema", "decay": 0.5}], ids=["uniform", "ema"])
def test_an_average_of_companded_weights_is_one_of_the_weights(first, arguments):
    dense, compander = Dense(), WeightCompander(layers="2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
    soup = SoupAverager(**arguments)
    module = train(*([soup, dense, compander] if first else [compander, dense, soup]))
    weights = dense.weights
    mean = (weights[2] + weights[5]) / 2
    if arguments["method"] == "ema":
        mean = weights[0]
        for weight in weights[1:]:
            mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(module.net[2].weight.detach(), mean)
    a, b = compander.latents.own["net.2.weight"].exp()
    last = a * (compander.latents.values["net.2.weight"] / b).atan()
    torch.testing.assert_close(weights[-1], last.detach())
    assert not torch.allclose(mean, weights[-1], atol=1e-4)


def test_resuming_companded_weights_beside_an_average_that_is_validated_is_exact(tmp_path):
    def run(epochs, ckpt=None):
        # The file's weights are the average; those of the training lie with the average's callback.
        soup = SoupAverager(method="ema", decay=0.5, swap_for_validation=True)
        compander = WeightCompander(layers="2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
        module, trainer = Net(), make_trainer(callbacks=[soup, compander], max_epochs=epochs)
        trainer.fit(module, DataLoader(data(), 8), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return module, compander

    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    soup = SoupAverager(method="ema", decay=0.5, swap_for_validation=True)
    compander = WeightCompander(layers="2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
    whole = Net()
    fit(whole, soup, compander, Saves(), loader=DataLoader(data(), 8), max_epochs=3)
    resumed, again = run(3, tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    name = "net.2.weight"
    assert not torch.equal(saved["state_dict"][name], saved["callbacks"]["SoupAverager"]["raw"][name])
    assert same_weights(resumed, whole)
    assert same_weights(again.latents.values, compander.latents.values)


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


# -- two tasks --------------------------------------------------------------------------------------------------------


def fisher_by_hand(net):
    """In float64, from batches of one, at the label that is most probable."""
    net = copy.deepcopy(net).double()
    fisher = [torch.zeros_like(p) for p in net.parameters()]
    for x, _ in data():
        z = net(x[None].double())
        gradients = torch.autograd.grad(F.cross_entropy(z, z.argmax(1)), list(net.parameters()))
        fisher = [f + g**2 / len(data()) for f, g in zip(fisher, gradients, strict=True)]
    return [f.float() for f in fisher]


def train_by_hand(net, loss, gradients=lambda net: [0.0] * 6, sparse=False):
    """A task: the weight in the middle is masked in forward and backward if ``sparse``, and for good at the end."""
    middle = net.net[2].weight
    for _ in range(2):
        for start in range(0, 24, 8):
            x, y = (t[start : start + 8] for t in data().tensors)
            dense = middle.detach().clone()
            if sparse:
                middle.data.mul_(nm_mask(dense, 1, 4))
            found = torch.autograd.grad(loss(net, x, y, start), list(net.parameters()))
            middle.data.copy_(dense)
            with torch.no_grad():
                for p, g, more in zip(net.parameters(), found, gradients(net), strict=True):
                    p.sub_(0.2 * (g + more))
    if sparse:
        middle.data.mul_(nm_mask(middle.detach(), 1, 4))


def cross_entropy(net, x, y, start):
    return F.cross_entropy(net(x), y)


@pytest.mark.by_hand("EWC", "NMSparsity")
@pytest.mark.parametrize("first", [True, False], ids=["EWC first", "sparsity first"])
def test_ewc_ties_dense_weights_to_dense_anchors(first):
    techniques = [EWC(300.0), NMSparsity(1, 4, recipe="ste", dense_fraction=0.0)]
    module, hand = Net(), Net()
    for _ in range(2):
        train(*(techniques if first else techniques[::-1]), module=module)
    train_by_hand(hand, cross_entropy, sparse=True)
    anchors, fisher = [p.detach().clone() for p in hand.parameters()], fisher_by_hand(hand)

    def pull(net):
        return [600.0 * f * (p - a) for p, a, f in zip(net.parameters(), anchors, fisher, strict=True)]

    plain = copy.deepcopy(hand)
    train_by_hand(hand, cross_entropy, pull, sparse=True)
    train_by_hand(plain, cross_entropy, sparse=True)
    for one, two in zip(module.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)  # float32, 12 steps
    assert not torch.allclose(plain.net[2].weight, hand.net[2].weight, atol=1e-3)


@pytest.mark.by_hand("EWC", "SoupAverager")
@pytest.mark.parametrize("first", [True, False], ids=["EWC first", "average first"])
def test_ewc_ties_to_the_average_that_the_fit_ends_with(first):
    techniques = [EWC(3.0), SoupAverager(method="uniform")]
    module = train(*(techniques if first else techniques[::-1]))
    (slot,) = techniques[0].state_dict()["slots"]
    for (name, p), fisher in zip(module.named_parameters(), fisher_by_hand(module), strict=True):
        assert torch.equal(slot["anchors"][name], p)
        torch.testing.assert_close(slot["weights"][name], fisher, rtol=1e-4, atol=1e-9)  # float32


def one_vs_all(net, teacher, x):
    """Losses of a task without new classes: the teacher's word alone."""
    with torch.no_grad():
        t = teacher(x).sigmoid()
    return F.binary_cross_entropy_with_logits(net(x), t, reduction="none").sum(1)


@pytest.mark.by_hand("LossReweighting", "PredictionDistillation")
@pytest.mark.parametrize("first", [True, False], ids=["reweighting first", "distillation first"])
def test_reweighting_reads_the_losses_that_distillation_has_put_in(first):
    techniques = [LossReweighting(warmup_steps=0), PredictionDistillation(new_classes=[3, 0])]
    module = train(*(techniques if first else techniques[::-1]))
    teacher, hand = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        for net in (module, hand):
            for p in net.parameters():
                p.mul_(0.5)
    train(*(techniques if first else techniques[::-1]), module=module)

    def loss(net, x, y, start):
        losses = one_vs_all(net, teacher, x)
        return (reweight(losses.detach()) * losses).sum()

    train_by_hand(hand, loss)
    for one, two in zip(module.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # float32, 6 steps


@pytest.mark.by_hand("ELRCallback", "PredictionDistillation")
@pytest.mark.parametrize("first", [True, False], ids=["early learning first", "distillation first"])
def test_early_learning_regularization_joins_distillation(first):
    techniques = [ELRCallback(lam=2.0, beta=0.6), PredictionDistillation(new_classes=[3, 0])]
    module = train(*(techniques if first else techniques[::-1]))
    teacher, hand = copy.deepcopy(module), copy.deepcopy(module)
    with torch.no_grad():
        for net in (module, hand):
            for p in net.parameters():
                p.mul_(0.5)
    train(*(techniques if first else techniques[::-1]), module=module)
    targets = torch.zeros(24, 3)

    def loss(net, x, y, start):
        z = net(x)
        rows = elr_targets(targets[start : start + 8], z.softmax(1).clamp(1e-4, 1 - 1e-4), 0.6)
        targets[start : start + 8] = rows
        return one_vs_all(net, teacher, x).mean() + 2.0 * elr_regularizer(z, rows)

    train_by_hand(hand, loss)
    for one, two in zip(module.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)  # float32, 6 steps
