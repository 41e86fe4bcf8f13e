"""MetricLoss: losses of other libraries, with parameters of their own."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import TCM, MetricLoss
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import supervised_contrastive_loss
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import KINDS, Problem
from tests.toys import CLASSES, QUIET, TWO_RANKS, Classifier, fit, make_loader, make_tensors, make_trainer, same_weights

pytestmark = QUIET
HERE = "tests.metric_learning.test_metric_loss"


class Centres(nn.Module):
    """Cosines with a centre for each class, over a temperature."""

    def __init__(self, size, classes=CLASSES, temperature=0.5):
        super().__init__()
        self.centres, self.temperature = nn.Parameter(torch.randn(classes, size)), temperature

    def forward(self, embeddings, labels):
        return F.cross_entropy(F.normalize(embeddings) @ F.normalize(self.centres).T / self.temperature, labels)


class OnOneRank(Centres):
    """Does not come to its parameters on the second rank."""

    def forward(self, embeddings, labels):
        return super().forward(embeddings, labels) if torch.distributed.get_rank() == 0 else embeddings.mean()


class NoModule:
    pass


def per_row(embeddings, labels):
    return embeddings.square().sum(1)


def spread(embeddings, labels, target):
    """Of all pairs of two classes, so that ranks by themselves have another one."""
    z = F.normalize(embeddings)
    apart = labels[:, None] != labels
    return ((z @ z.T - target).square() * apart).sum() / apart.sum().clamp(min=1)


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


class CentresByHand(Hand):
    def begin(self, loop):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.technique.derived_seed("own modules"))
            self.centres = torch.randn(4, 16).requires_grad_()

    def own(self):
        return [self.centres]

    def term(self, loop, moment):
        z = moment.features["net.body"]
        cosines = (z @ self.centres.T) / z.norm(dim=1)[:, None] / self.centres.norm(dim=1)
        return -0.3 * (2 * cosines).log_softmax(1)[torch.arange(len(z)), moment.y].mean()


SMALL = partial(MetricLoss, "net.body", f"{HERE}.Centres", {"size": 16, "classes": 4})
CASE = Case(
    make=partial(SMALL, 0.3),
    neutral=partial(SMALL, 0.0),
    by_hand=CentresByHand,
    says=(
        "Centres on net.body, weight=0.3",
        "weight=0: inactive",
        "Centres on net.body, weight=0.5",
        "supervised_contrastive_loss on net.head, weight=1",
    ),
    # A problem of its own: where there are several losses, the batch's entry is no class number.
    data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
    variants=[
        partial(SMALL, 0.5, gather=False, lr_factor=2.0, weight_decay=0.1),
        partial(MetricLoss, "net.head", "lightning_reg.functional.supervised_contrastive_loss", {"temperature": 0.5}),
    ],
    invalid=[
        ({"layer": "net.body", "criterion": "a.B", "weight": -0.1}, "weight"),
        ({"layer": "net.body", "criterion": "a.B", "pooling": "max"}, "pooling"),
        ({"layer": "net.body", "criterion": "a.B", "lr_factor": -1.0}, "lr_factor"),
        ({"layer": "net.body", "criterion": "a.B", "weight_decay": -1.0}, "weight_decay"),
        ({"layer": "net.body", "criterion": "a.B", "own_optimizer": -1}, "own_optimizer"),
        ({"layer": "net.body", "criterion": "a.B", "loss": -1}, "loss"),
        ({"layer": "net.body", "criterion": "ArcFaceLoss"}, "criterion"),
    ],
)


# -- the core ---------------------------------------------------------------------------------------------------------


def test_the_supervised_contrastive_loss_of_three_rows():
    embeddings = torch.tensor([[0.0, 2.0], [0.6, 0.8], [1.0, 0.0]], dtype=torch.float64)
    value = supervised_contrastive_loss(embeddings, torch.tensor([0, 0, 1]), 1.0)
    # Cosines .8, 0 and .6; the third row is alone.
    expected = (math.log(math.exp(0.8) + 1) + math.log(math.exp(0.8) + math.exp(0.6))) / 2 - 0.8
    assert value.item() == pytest.approx(expected, rel=1e-12)  # float64
    assert supervised_contrastive_loss(embeddings.half(), torch.tensor([0, 0, 1]), 0.01).dtype is torch.float32
    with pytest.raises(ValueError, match=r"^supervised_contrastive_loss: `temperature` must be above 0, got 0"):
        supervised_contrastive_loss(embeddings, torch.tensor([0, 0, 1]), 0)


def test_it_is_that_of_the_library():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(20) % 4
    ours, theirs = supervised_contrastive_loss(embeddings, labels, 0.2), losses.SupConLoss(0.2)(embeddings, labels)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)  # float32
    (one,), (two,) = (torch.autograd.grad(value, embeddings) for value in (ours, theirs))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0.0)


# -- the technique ----------------------------------------------------------------------------------------------------


class Adam(Classifier):
    """With a schedule, weight decay, and the criterion in the user's own code if it has one."""

    def __init__(self, criterion=None, weight=1.0, lr_factor=1.0, seed=0):
        super().__init__(seed=seed)
        self.criterion, self.weight, self.factor = criterion, weight, lr_factor

    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        loss = F.cross_entropy(self.net[1:](hidden), batch[1])
        return loss if self.criterion is None else loss + self.weight * self.criterion(hidden, batch[1])

    def configure_optimizers(self):
        groups = [{"params": self.net.parameters()}]
        if self.criterion is not None and list(self.criterion.parameters()):
            own = {"params": self.criterion.parameters(), "lr": 0.05 * self.factor, "weight_decay": 0.0}
            groups.append(own)
        optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


LIBRARY = {
    "ArcFaceLoss": {"num_classes": CLASSES, "embedding_size": 8},
    "ProxyNCALoss": {"num_classes": CLASSES, "embedding_size": 8},
    "MultiSimilarityLoss": {},
}


@pytest.mark.parametrize("kind", LIBRARY)
def test_a_loss_of_the_library_trains_as_in_the_users_own_code(kind):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    technique = MetricLoss("net.0", f"pytorch_metric_learning.losses.{kind}", LIBRARY[kind], 0.2, lr_factor=3.0)
    model = Adam()
    trainer = fit(model, technique)
    with torch.random.fork_rng():
        torch.manual_seed(technique.derived_seed("own modules"))
        criterion = getattr(losses, kind)(**LIBRARY[kind])
    hand = Adam(criterion, 0.2, 3.0)
    fit(hand)
    assert same_weights(model.net, hand.net, atol=2e-6)
    assert same_weights(technique.own["criterion"], criterion, atol=2e-6)
    assert len(trainer.optimizers[0].param_groups) == 1
    assert not any("criterion" in name for name in model.state_dict())
    plain = Adam()
    fit(plain)
    assert not same_weights(plain, model, atol=1e-3)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def technique(seed=0):
        return MetricLoss("net.0", f"{HERE}.Centres", {"size": 8}, lr_factor=2.0, seed=seed)

    whole, kept = Adam(), technique()
    fit(whole, kept, max_epochs=4)
    fit(Adam(), technique(), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed, other = Adam(seed=3), technique()
    make_trainer(callbacks=[other], max_epochs=4).fit(resumed, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(whole, resumed)
    assert same_weights(kept.own["criterion"], other.own["criterion"])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_criterion_is_float32_in_half_precision(precision):
    pytest.importorskip("pytorch_metric_learning")
    path = "pytorch_metric_learning.losses.ArcFaceLoss"
    technique = MetricLoss("net.0", path, LIBRARY["ArcFaceLoss"])
    fit(Classifier(lr=0.01), technique, max_epochs=1, precision=precision)
    assert technique.own["criterion"].W.dtype is torch.float32


def _partly_called(_):
    model = Adam()
    technique = MetricLoss("net.0", f"{HERE}.OnOneRank", {"size": 8}, gather=False)
    fit(model, technique, loader=make_loader(batch_size=4), max_epochs=1, **TWO_RANKS)
    return model.state_dict(), technique.own["criterion"].state_dict(), technique.state_dict()["moments"]


def test_a_rank_that_does_not_come_to_the_parameters_counts_as_zero(two_processes):
    one, two = two_processes.run(_partly_called, None)
    assert all(same_weights(one[part], two[part]) for part in (0, 1))
    assert set(one[2]) == {"criterion.centres"}
    assert all(
        torch.equal(one[2]["criterion.centres"][key], value) for key, value in two[2]["criterion.centres"].items()
    )


def _train_on_rank(gather):
    import torch.distributed as dist

    # 6 and 5 samples in batches of 4: the last batches have 2 and 1.
    part = slice(0, 6) if dist.get_rank() == 0 else slice(6, 11)
    data = TensorDataset(*(tensor[part] for tensor in make_tensors()))
    model = Classifier(lr=0.1)
    technique = MetricLoss("net.0", f"{HERE}.spread", {"target": -0.2}, 2.0, gather=gather)
    fit(model, technique, loader=DataLoader(data, 4), use_distributed_sampler=False, **TWO_RANKS)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("gather", [True, False])
def test_ranks_with_unequal_batches_train_as_one_process(two_processes, gather):
    one, two = two_processes.run(_train_on_rank, gather)
    model, (x, y) = Classifier(lr=0.1), make_tensors()
    optimizer = model.configure_optimizers()
    for _ in range(2):
        for batches in ((slice(0, 4), slice(6, 10)), (slice(4, 6), slice(10, 11))):
            hidden, labels = [model.net[0](x[part]) for part in batches], [y[part] for part in batches]
            joined = [(torch.cat(hidden), torch.cat(labels))] if gather else list(zip(hidden, labels, strict=True))
            terms = [spread(z, t, -0.2) for z, t in joined]
            losses = [F.cross_entropy(model.net(x[part]), y[part]) for part in batches]
            optimizer.zero_grad()
            (sum(losses) / 2 + 2.0 * sum(terms) / len(terms)).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name], value, atol=1e-6, rtol=1e-5)  # float32, sums in another order
        assert torch.equal(one[name], two[name])


@pytest.mark.parametrize(
    ("criterion", "arguments", "message"),
    [
        ("nowhere.Loss", {}, r"^MetricLoss\(criterion=\.\.\.\): 'nowhere\.Loss' names no function: No module"),
        (f"{HERE}.Centres", {"width": 8}, r"^MetricLoss: .*Centres cannot be made with criterion_args=\{'width': 8\}"),
        (f"{HERE}.NoModule", {}, r"^MetricLoss\(criterion='.*NoModule'\) must name a class of torch modules"),
        (f"{HERE}.per_row", {}, r"^MetricLoss: .*per_row must return one number .*returned \(8,\)"),
    ],
)
def test_what_is_no_loss_of_embeddings_is_refused(criterion, arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(Classifier(), MetricLoss("net.0", criterion, arguments), max_epochs=1)


def test_it_is_made_from_yaml():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(MetricLoss, "callback")
    arguments = {"layer": "net.0", "criterion": f"{HERE}.Centres", "criterion_args": {"size": 8, "temperature": 0.25}}
    given = {"callback": {"class_path": "lightning_reg.MetricLoss", "init_args": arguments}}
    technique = parser.instantiate(parser.parse_object(given)).callback
    fit(Classifier(), technique, max_epochs=1)
    assert technique.own["criterion"].temperature == 0.25


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_with_its_own_loss_takes_terms_of_several_techniques():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": value for name, value in size.items()}
    config = transformers.ViTMAEConfig(**size, **decoder, image_size=8, patch_size=4, mask_ratio=0.5)

    class Masked(Classifier):
        def __init__(self, own=False):
            super().__init__(lr=0.1)
            self.own = own
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = transformers.ViTMAEForPreTraining(config)

        def training_step(self, batch, batch_idx):
            seen = []
            handle = self.net.vit.layernorm.register_forward_hook(lambda layer, args, output: seen.append(output))
            loss = self.net(batch["pixel_values"], noise=batch["noise"]).loss
            handle.remove()
            if self.own:
                z, y = seen[0][:, 0], batch["labels"]
                cosines = F.normalize(z) @ F.normalize(z).T
                later = torch.ones_like(cosines).triu(1).bool()
                pulled = (0.9 - cosines)[later & (y[:, None] == y) & (cosines <= 0.9)]
                pushed = (cosines + 0.5)[later & (y[:, None] != y) & (cosines >= -0.5)]
                loss = loss + sum(part.mean() for part in (pulled, pushed) if len(part)) + 0.5 * spread(z, y, -0.2)
            return loss

    generator = torch.Generator().manual_seed(0)
    images, noise = torch.rand(16, 3, 8, 8, generator=generator).double(), torch.rand(16, 4, generator=generator)

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return {"pixel_values": images[index], "noise": noise[index], "labels": make_tensors()[1][index]}

    where = {"label_key": "labels", "pooling": "first"}
    tcm = TCM("net.vit.layernorm", 0.9, -0.5, **where)
    other = MetricLoss("net.vit.layernorm", f"{HERE}.spread", {"target": -0.2}, 0.5, **where)
    technique, hand, plain = Masked(), Masked(own=True), Masked()
    for model, callbacks in ((technique, [tcm, other]), (hand, []), (plain, [])):
        model.double()
        fit(model, *callbacks, loader=make_loader(Images()))
    for one, two in zip(technique.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-7)
    assert not same_weights(hand, plain, atol=1e-3)


def test_a_loss_of_the_library_in_the_step_takes_terms_of_several_techniques():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    contrast = losses.MultiSimilarityLoss()

    class Metric(Classifier):
        def __init__(self, own=False):
            super().__init__(lr=0.05)
            self.own = own

        def training_step(self, batch, batch_idx):
            z = self.net[0](batch[0])
            loss = contrast(self.net[1:](z), batch[1])
            return loss + 0.5 * spread(z, batch[1], -0.2) + 0.1 * spread(z, batch[1], 0.1) if self.own else loss

    technique, hand = Metric(), Metric(own=True)
    one = MetricLoss("net.0", f"{HERE}.spread", {"target": -0.2}, 0.5, name="one")
    two = MetricLoss("net.0", f"{HERE}.spread", {"target": 0.1}, 0.1, name="two")
    fit(technique, one, two)
    fit(hand)
    assert same_weights(technique, hand, atol=2e-6)
