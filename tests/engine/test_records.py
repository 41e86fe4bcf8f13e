"""Records: a row for each sample, of which the fit notices nothing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, SubsetRandomSampler, TensorDataset

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.modules import checksum
from lightning_reg.engine.networks.records import Wanted, record, steps_in_order
from lightning_reg.engine.technique import Technique
from tests.toys import (
    BATCH,
    QUIET,
    SAMPLES,
    TWO_RANKS,
    Classifier,
    Halve,
    StepLosses,
    _Toy,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET
ALL = Wanted(layers=["net.2", "net.3"], entries=["1"], logits=True, losses=True)


class Records(_Toy, Technique):
    """Makes records at one moment."""

    def __init__(self, wanted=ALL, at="on_train_start", times=1, **how):
        super().__init__()
        self.wanted, self.at, self.times, self.how, self.found, self.weights = wanted, at, times, how, [], None

    def make(self, trainer, module):
        if len(self.found) < self.times:
            self.weights = weights_of(module)
            self.found.append(record(trainer, self, self.wanted, **self.how))

    def on_train_start(self, trainer, pl_module):
        if self.at == "on_train_start":
            self.make(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.at == "on_train_batch_end" and batch_idx == 1:
            self.make(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        if self.at == "on_validation_end" and not trainer.sanity_checking:
            self.make(trainer, pl_module)

    def on_fit_end(self, trainer, pl_module):
        if self.at == "on_fit_end":
            self.make(trainer, pl_module)


class Noisy(Classifier):
    """Normalises, drops out and draws in its step; validates."""

    def __init__(self, **kwargs):
        super().__init__(**{"dropout": 0.5, **kwargs})
        self.net[1] = nn.BatchNorm1d(8)
        self.metrics, self.modes = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x + 0.1 * torch.randn_like(x) if self.training else x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_epoch_end(self):
        self.metrics.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})
        self.modes.append([layer.training for layer in self.modules()])


def shuffled(**kwargs):
    return make_loader(shuffle=True, generator=torch.Generator().manual_seed(3), **kwargs)


def train(*techniques, **kwargs):
    model, losses = Noisy(), StepLosses()
    torch.manual_seed(1)
    trainer = make_trainer(callbacks=[*techniques, losses], **kwargs)
    trainer.fit(model, shuffled(), make_loader())
    return model, losses.losses, torch.rand(1)


def expected(module, weights, x, y):
    module = type(module)()
    module.load_state_dict(weights)
    module.eval()
    with torch.no_grad():
        features = module.net[:3](x)
        logits = module.net[3](features)
    return features, logits, F.cross_entropy(logits, y, reduction="none")


@pytest.mark.parametrize("at", ["on_train_start", "on_train_batch_end", "on_validation_end", "on_fit_end"])
@pytest.mark.parametrize("stage", ["train", "validate"])
def test_rows_are_those_of_the_network_by_hand_and_nothing_else_notices(at, stage):
    plain, losses, drawn = train()
    technique = Records(at=at, stage=stage)
    watched, its_losses, its_drawn = train(technique)
    assert same_weights(plain, watched)
    assert losses == its_losses
    assert torch.equal(drawn, its_drawn)
    assert plain.metrics == watched.metrics
    assert plain.modes == watched.modes
    x, y = make_tensors()
    features, logits, per_sample = expected(watched, technique.weights, x, y)
    [found] = technique.found
    assert found.indices.tolist() == list(range(SAMPLES))
    assert torch.equal(found.entries["1"], y)
    torch.testing.assert_close(found.features["net.2"], features)
    torch.testing.assert_close(found.features["net.3"], logits)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.losses, per_sample)
    assert found.weights == checksum(technique.weights)


def test_other_techniques_neither_act_nor_notice():
    technique, halve = Records(at="on_train_batch_end"), Halve()
    model = Classifier()
    fit(model, halve, technique)
    plain = Classifier()
    fit(plain, Halve())
    assert same_weights(plain, model)
    x, y = make_tensors()
    torch.testing.assert_close(technique.found[0].losses, expected(model, technique.weights, x, y)[2])


class Own(BatchSampler):
    """A batch sampler of another class, some samples twice, some never."""

    def __init__(self):
        self.batches = [[5, 3], [3, 9, 1], [0]]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


@pytest.mark.parametrize(
    ("how", "limit", "wanted"),
    [
        ({"drop_last": True, "shuffle": True, "batch_size": 7}, 1.0, range(SAMPLES)),
        ({"sampler": SubsetRandomSampler([30, 2, 17]), "batch_size": 2}, 1.0, [2, 17, 30]),
        ({"batch_sampler": Own()}, 1.0, [0, 1, 3, 5, 9]),
        ({"batch_size": 4}, 2, range(8)),
        ({"batch_sampler": Own()}, 2, [1, 3, 5, 9]),
        ({"batch_size": 5, "num_workers": 1}, 1.0, range(SAMPLES)),
    ],
    ids=["drop_last", "subset", "own", "limit", "own_limit", "worker"],
)
@pytest.mark.parametrize("among", [None, [9, 4, 2, 3, 77]], ids=["all", "some"])
def test_each_sample_that_is_drawn_has_one_row_in_the_order_of_the_indices(how, limit, wanted, among):
    x, y = make_tensors()
    technique = Records(among=among)
    wanted = [index for index in wanted if among is None or index in among]
    model = Classifier()
    loader = DataLoader(TensorDataset(x, y), **how)
    fit(model, technique, loader=loader, max_epochs=1, limit_train_batches=limit)
    found, rows = technique.found[0], list(wanted)
    assert found.indices.tolist() == rows
    torch.testing.assert_close(found.losses, expected(model, technique.weights, x, y)[2][rows])
    assert found.rows_of(torch.tensor(rows[::-1])).tolist() == list(range(len(rows)))[::-1]
    with pytest.raises(KeyError, match="no record of sample"):
        found.rows_of(torch.tensor([rows[0], 31 if 31 not in rows else 99]))


def test_a_pass_over_some_samples_fetches_no_others():
    fetched = []

    class Noting(TensorDataset):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    technique = Records(among=[30, 2, 17])
    fit(Classifier(), technique, loader=make_loader(Noting(*make_tensors()), batch_size=2), max_epochs=1)
    assert technique.found[0].indices.tolist() == [2, 17, 30]
    assert fetched[:7] == [2, 17, 2, 17, 2, 17, 30]  # the first batch twice before


class Turning(SequentialSampler):
    """Begins one sample later in each pass."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([(i + self.passes) % SAMPLES for i in range(SAMPLES)])


def test_a_sampler_with_a_state_of_its_own_does_not_notice():
    def end(*techniques):
        data = TensorDataset(*make_tensors())
        model, loader = Classifier(), make_loader(data, sampler=Turning(data))
        fit(model, *techniques, loader=loader)
        return model, loader.sampler.passes

    (plain, passes), (watched, its_passes) = end(), end(Records())
    assert passes == its_passes == 2
    assert same_weights(plain, watched)


SEEN = []


def noting(module, batch):
    if not module.training:
        SEEN.append(batch[0])
    return F.cross_entropy(module(batch[0]), batch[1])


def test_samples_come_in_the_order_of_their_indices_whatever_the_order_of_the_fit():
    SEEN.clear()
    technique = Records(augmented=True)
    fit(Classifier(step=noting), technique, loader=shuffled(drop_last=True, batch_size=5), max_epochs=1)
    assert [len(x) for x in SEEN] == [5, 5, 5, 5, 5, 5, 2]
    assert torch.equal(torch.cat(SEEN), make_tensors()[0])


def test_weights_of_another_time_and_a_view_of_the_features():
    x, _ = make_tensors()
    start = Classifier(seed=4)

    class Sees(Records):
        def on_train_start(self, trainer, pl_module):
            self.how["weights"] = dict(start.state_dict())
            super().on_train_start(trainer, pl_module)

    technique = Sees(Wanted(["net.0"], view=lambda output: output.relu().sum(1, keepdim=True)))
    fit(Classifier(), technique, max_epochs=1)
    found = technique.found[0]
    torch.testing.assert_close(found.features["net.0"], start.net[0](x).detach().relu().sum(1, keepdim=True))
    assert found.logits is found.losses is None
    assert found.weights == checksum(start.state_dict())


class Augmented(Dataset):
    def __init__(self, generator=None):
        self.x, self.y = make_tensors()
        self.generator = generator

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + torch.rand(1, generator=self.generator), self.y[index]


@pytest.mark.parametrize("own", [False, True])
def test_augmented_samples_are_refused_unless_one_draw_is_enough(own):
    def loader():
        return make_loader(Augmented(torch.Generator().manual_seed(3) if own else None))

    with pytest.raises(MisconfigurationException, match="fetched twice was another one the second time"):
        fit(Classifier(), Records(), loader=loader())
    plain, watched, technique = Classifier(), Classifier(), Records(augmented=True)
    fit(plain, loader=loader())
    fit(watched, technique, loader=loader())
    assert same_weights(plain, watched)
    assert len(technique.found[0].indices) == SAMPLES


def test_a_transform_on_the_device_is_seen_and_knows_what_the_batch_is_for():
    class Transforms(Noisy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x + torch.rand(1) if self.trainer.training else x), y

    def train_one(technique):
        make_trainer(callbacks=[technique], max_epochs=1).fit(Transforms(), make_loader(), make_loader())

    with pytest.raises(MisconfigurationException, match="fetched twice"):
        train_one(Records())
    technique = Records(stage="validate")
    train_one(technique)
    assert len(technique.found[0].indices) == SAMPLES


def test_draws_of_the_step_in_eval_mode_are_refused():
    step = lambda module, batch: F.cross_entropy(module(batch[0] + torch.rand(1)), batch[1])  # noqa: E731
    with pytest.raises(MisconfigurationException, match="its step draws random numbers"):
        fit(Classifier(step=step), Records())


class Iterable(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*make_tensors()))


@pytest.mark.parametrize(
    ("loader", "how", "says"),
    [
        (make_loader(Iterable()), {}, "Records needs sample indices, but Iterable is an IterableDataset"),
        ([make_loader(), make_loader()], {}, "there are 2 training loaders"),
        (make_loader(), {"stage": "validate"}, "there are 0 validation loaders"),
        (make_loader(), {"wanted": Wanted(["net"], view=lambda output: output[0])}, "layer net needs a row for each"),
        (make_loader(), {"wanted": Wanted(entries=["2"])}, "Records: record"),
    ],
    ids=["iterable", "several", "no_validation", "rows", "entry"],
)
def test_what_has_no_row_for_each_sample_is_refused_in_words(loader, how, says):
    step = lambda module, batch: F.cross_entropy(module(first(batch)[0]), first(batch)[1])  # noqa: E731
    with pytest.raises(MisconfigurationException, match=says):
        fit(Classifier(step=step), Records(**how), loader=loader)


def first(batch):
    return batch if isinstance(batch[0], torch.Tensor) else batch[0]


def record_on_two(count):
    technique, model = Records(), Classifier()
    loader = make_loader(TensorDataset(*make_tensors(count)), shuffle=True)
    fit(model, technique, loader=loader, max_epochs=1, **TWO_RANKS)
    return technique.found[0], technique.weights


def test_ranks_share_the_samples_and_have_all_rows(two_processes):
    x, y = make_tensors(21)
    for found, weights in two_processes.run(record_on_two, 21):
        features, logits, losses = expected(Classifier(), weights, x, y)
        assert found.indices.tolist() == list(range(21))
        assert torch.equal(found.entries["1"], y)
        torch.testing.assert_close(found.losses, losses)
        torch.testing.assert_close(found.logits, logits)
        torch.testing.assert_close(found.features["net.2"], features)


def test_there_is_a_progress_bar(monkeypatch):
    seen = []

    class Bar:
        def __enter__(self):
            return lambda: seen.append(1)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(
        "lightning_reg.engine.networks.records.progress", lambda t, what, total: (seen.append((what, total)), Bar())[1]
    )
    fit(Classifier(), Records(), max_epochs=1)
    assert seen == [("Records: training data", SAMPLES // BATCH), *itertools.repeat(1, SAMPLES // BATCH)]


def test_a_given_loader_is_gone_through_after_the_fit():
    x, y = make_tensors()
    module, technique = Classifier(), Records()
    trainer = fit(module, technique, max_epochs=1)
    loader, shown = DataLoader(TensorDataset(x[:7], y[:7]), 3, shuffle=True), []
    state = torch.get_rng_state()
    with steps_in_order(
        trainer, technique, check_same=lambda one, two: shown.append((one, two)), loader=loader
    ) as all_:
        seen = [(step.batch[0], list(indices), step.arguments) for step, indices in all_]
    assert [indices for _, indices, _ in seen] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [arguments for *_, arguments in seen] == [(0,), (1,), (2,)]
    assert torch.equal(torch.cat([batch for batch, *_ in seen]), x[:7])
    assert all(torch.equal(step.batch[0], x[:3]) for step in shown[0])
    assert torch.equal(state, torch.get_rng_state())
