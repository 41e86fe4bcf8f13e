"""Techniques on weights together, with others, and in two layers, against loops written by hand."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg import (
    ELRCallback,
    LossReweighting,
    NMSparsity,
    SoupAverager,
    WeightCompander,
)
from lightning_reg.functional import nm_mask
from tests.compositions.shared import Dense, Net, data, train
from tests.conformance.by_hand import train_by_hand
from tests.conformance.harness import difference
from tests.conformance.harness import fit as fit_tiny
from tests.conformance.problems import KINDS, Loader, Resumable
from tests.regularization.test_weight_compander import CompandedByHand
from tests.sparsity.test_nm_sparsity import SparsityByHand
from tests.toys import QUIET, Callback, fit, make_trainer, same_weights

pytestmark = QUIET


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


@pytest.mark.by_hand("LossReweighting", "SoupAverager")
def test_a_soup_of_reweighted_training_is_the_mean_of_its_snapshots():
    dense = Dense()
    module = train(LossReweighting(warmup_steps=0), dense, SoupAverager(method="uniform"))
    torch.testing.assert_close(module.net[2].weight, (dense.weights[2] + dense.weights[5]) / 2)
    plain = Dense()
    train(plain)
    assert not torch.equal(plain.weights[-1], dense.weights[-1])


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
    compander = WeightCompander(layers="net.2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
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
    torch.testing.assert_close(compander.latents.own["net.2.weight"]["shape"].detach(), shape)
    assert not torch.allclose(shape, torch.tensor([0.4, 0.3]).log(), rtol=0, atol=1e-4)


@pytest.mark.by_hand("SoupAverager", "WeightCompander")
@pytest.mark.parametrize("first", [True, False], ids=["average first", "compander first"])
@pytest.mark.parametrize("arguments", [{"method": "uniform"}, {"method": "ema", "decay": 0.5}], ids=["uniform", "ema"])
def test_an_average_of_companded_weights_is_one_of_the_weights(first, arguments):
    dense, compander = Dense(), WeightCompander(layers="net.2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
    soup = SoupAverager(**arguments)
    module = train(*([soup, dense, compander] if first else [compander, dense, soup]))
    weights = dense.weights
    mean = (weights[2] + weights[5]) / 2
    if arguments["method"] == "ema":
        mean = weights[0]
        for weight in weights[1:]:
            mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(module.net[2].weight.detach(), mean)
    a, b = compander.latents.own["net.2.weight"]["shape"].exp()
    last = a * (compander.latents.values["net.2.weight"] / b).atan()
    torch.testing.assert_close(weights[-1], last.detach())
    assert not torch.allclose(mean, weights[-1], atol=1e-4)


def test_resuming_companded_weights_beside_an_average_that_is_validated_is_exact(tmp_path):
    def run(epochs, ckpt=None):
        # The file's weights are the average; those of the training lie with the average's callback.
        soup = SoupAverager(method="ema", decay=0.5, swap_for_validation=True)
        compander = WeightCompander(layers="net.2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
        module, trainer = Net(), make_trainer(callbacks=[soup, compander], max_epochs=epochs)
        trainer.fit(module, DataLoader(data(), 8), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return module, compander

    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    soup = SoupAverager(method="ema", decay=0.5, swap_for_validation=True)
    compander = WeightCompander(layers="net.2", a=0.4, b=0.3, learn=True, shape_lr_factor=0.5)
    whole = Net()
    fit(whole, soup, compander, Saves(), loader=DataLoader(data(), 8), max_epochs=3)
    resumed, again = run(3, tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    name = "net.2.weight"
    assert not torch.equal(saved["state_dict"][name], saved["callbacks"]["SoupAverager"]["raw"][name])
    assert same_weights(resumed, whole)
    assert same_weights(again.latents.values, compander.latents.values)


# -- two of a class ---------------------------------------------------------------------------------------------------


def on_the_head(hand, **settings):
    return type("OnTheHead", (hand,), {"layer": "net.head.", **settings})


PATTERNS = {
    "body": partial(NMSparsity, 1, 4, recipe="srste", lambda_w=0.1, dense_fraction=0.0, layers=["net.body"]),
    "head": partial(NMSparsity, 2, 4, recipe="ste", dense_fraction=0.0, layers=["net.head"]),
}
COMPANDERS = {
    "body": partial(WeightCompander, a=0.5, b=0.3, layers=["net.body"]),
    "head": partial(WeightCompander, a=0.4, b=0.6, layers=["net.head"]),
}
TWO = {
    "NMSparsity": (PATTERNS, SparsityByHand, on_the_head(SparsityByHand, pattern=(2, 4), pull=0.0)),
    "WeightCompander": (
        COMPANDERS,
        type("OnTheBody", (CompandedByHand,), {"layer": "net.body."}),
        on_the_head(CompandedByHand, a=0.4, b=0.6),
    ),
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("first", [True, False], ids=["body first", "head first"])
def test_two_of_a_class_on_two_layers(name, first):
    make, on_body, on_head = TWO[name]
    techniques = [make["body"](name="one"), make["head"](name="two")]
    problem = KINDS["classification"]
    run = fit_tiny(techniques if first else techniques[::-1], problem)
    hand = train_by_hand(problem, [on_body(None), on_head(None)])
    assert not difference(run.weights, hand, rtol=1e-4, atol=1e-5)  # float32, 16 steps
    for one in (on_body, on_head):
        assert difference(hand, train_by_hand(problem, [one(None)]), rtol=1e-3, atol=1e-3)
