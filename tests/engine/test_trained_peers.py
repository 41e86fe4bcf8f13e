"""A second network that trains: its weights, order of the data and optimizer steps; networks that answer together."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg.engine.data.order import Reordered
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.distributed import average_, broadcast_
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.edits_beside import EditsBeside
from lightning_reg.engine.networks.ensemble import JointForward, MeanOfTwo
from lightning_reg.engine.networks.first_weights import reset_parameters_
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import copy_of
from lightning_reg.engine.networks.trained import PeerStep, TrainedPeer, check_trainable
from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.technique import BatchTechnique, LayerTechnique, LossTechnique
from tests.toys import BATCH, CLASSES, INPUTS, QUIET, SAMPLES, Classifier, _Toy, fit, make_tensors

pytestmark = QUIET
BATCHES = SAMPLES // BATCH
ELSEWHERE = Classifier()


class Second(_Toy, LossTechnique):
    """Trains a second network after each epoch; its own loss term is ``factor`` times the mean square of the logits."""

    needs_indices = True

    def __init__(self, factor=0.0, init="reset", **kwargs):
        super().__init__(**kwargs)
        self.factor, self.init, self.peer, self.steps, self.seen = factor, init, None, [], []

    def on_train_start(self, trainer, pl_module):
        self.peer = TrainedPeer(trainer, pl_module, self, self.init)

    def loss_term(self, call):
        if isinstance(call.step, PeerStep):
            self.seen.append((call.samples(self).indices.tolist(), call.step.batches_so_far, call.step.global_step))
            return self.factor * call.logits.square().mean(1)
        return None

    def on_train_epoch_end(self, trainer, pl_module):
        self.peer.train(
            attached_engine(trainer), host.batches_of_epoch(trainer), lambda: self.steps.append(self.peer.steps)
        )
        self.peer.end_epoch()


class Scheduled(Classifier):
    def __init__(self, interval="epoch", frequency=1, **kwargs):
        super().__init__(**kwargs)
        self.interval, self.frequency = interval, frequency

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        config = {"scheduler": scheduler, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


def shuffled(dataset=None, **kwargs):
    dataset = dataset or TensorDataset(*make_tensors())
    return DataLoader(dataset, BATCH, shuffle=True, generator=torch.Generator().manual_seed(5), **kwargs)


def by_hand(second, module, *, accumulate=1, clip=0.0, epochs=2):
    """The second network in plain PyTorch, in the order that the technique's seed gives."""
    x, y = make_tensors()
    reset_parameters_(module, second.derived_seed("weights"))
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for epoch in range(epochs):
        for position, index in enumerate(Reordered(shuffled(), second).draws(epoch), 1):
            logits = module(x[index])
            loss = F.cross_entropy(logits, y[index]) + second.factor * logits.square().mean(1).mean()
            (loss / accumulate).backward()
            if position % accumulate == 0 or position == BATCHES:
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                if module.interval == "step" and position % module.frequency == 0:
                    scheduler.step()
        if module.interval == "epoch" and (epoch + 1) % module.frequency == 0:
            scheduler.step()
    return module


@pytest.mark.parametrize(
    ("scheduled", "options", "given"),
    [
        ({}, {}, {}),
        ({"interval": "step", "frequency": 2}, {"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"frequency": 2}, {"accumulate_grad_batches": 3}, {"accumulate": 3}),
    ],
)
def test_trains_as_a_loop_by_hand_and_leaves_the_users_network_alone(scheduled, options, given):
    second, module, plain = Second(factor=0.2), Scheduled(**scheduled), Scheduled(**scheduled)
    fit(module, second, loader=shuffled(), **options)
    fit(plain, loader=shuffled(), **options)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    expected = by_hand(second, Scheduled(**scheduled), **given)
    for name, value in expected.named_parameters():  # float32, 8 steps of Adam
        torch.testing.assert_close(weights_of(second.peer.module)[name], value.detach(), atol=1e-5, rtol=1e-4)
    steps = 2 * -(-BATCHES // given.get("accumulate", 1))
    assert second.steps == list(range(1, steps + 1))
    assert [begun for _, begun, _ in second.seen] == list(range(1, 2 * BATCHES + 1))
    orders = [[index for indices, *_ in part for index in indices] for part in (second.seen[:4], second.seen[4:])]
    assert [sorted(order) for order in orders] == [list(range(SAMPLES))] * 2
    assert orders[0] != orders[1]


def test_half_precision_has_a_scaler_of_its_own():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    second, module = Second(), Scheduled()
    fit(module, second, loader=shuffled(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert second.peer.state_dict()["scaler"]["scale"] == 2.0**12  # grown twice in 8 steps
    assert second.peer._scaler is not scaler
    expected = by_hand(second, Scheduled())
    for name, value in expected.named_parameters():  # half precision; Adam's first steps have the gradient's sign
        torch.testing.assert_close(weights_of(second.peer.module)[name], value.detach(), atol=0.05, rtol=0.05)


def test_random_numbers_depend_on_nothing_but_the_seed_and_disturb_nobody():
    class Noisy(Dataset):
        def __len__(self):
            return SAMPLES

        def __getitem__(self, index):
            x, y = make_tensors()
            return x[index] + random.random() + np.random.rand() + torch.rand(()), y[index]  # noqa: NPY002 # a user may

    runs = []
    for seed, techniques in ((1, []), (1, [Second()]), (2, [Second()]), (1, [Second(seed=1)])):
        module = Classifier(dropout=0.5)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 # as above
        fit(module, *techniques, loader=shuffled(Noisy()), seed=seed)
        state = (torch.rand(()).item(), random.random(), np.random.rand())  # noqa: NPY002 # as above
        runs.append((weights_of(module), state, weights_of(techniques[0].peer.module) if techniques else None))
    same = [all(torch.equal(a, b) for a, b in zip(runs[0][0].values(), r[0].values(), strict=True)) for r in runs]
    assert same == [True, True, False, True]
    assert runs[0][1] == runs[1][1] == runs[3][1]
    peers = [torch.cat([w.flatten() for w in r[2].values()]) for r in runs[1:]]
    assert torch.equal(peers[0], peers[1])
    assert not torch.equal(peers[0], peers[2])


# -- weights ----------------------------------------------------------------------------------------------------------


def test_first_weights_are_drawn_anew_by_the_layers_themselves():
    module, before = Classifier(), torch.get_rng_state()
    old = {name: p.clone() for name, p in weights_of(module).items()}
    assert reset_parameters_(module, 3) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not torch.equal(p, old[name]) for name, p in weights_of(module).items())
    other = Classifier()
    reset_parameters_(other, 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    module.reset_parameters = lambda: nn.init.zeros_(module.net[3].weight)
    module.scale = nn.Parameter(torch.ones(2))
    module.free = nn.Module()
    module.free.scale = nn.Parameter(torch.ones(3))
    assert reset_parameters_(module, 3) == ["free.scale"]
    assert torch.equal(module.net[3].weight, torch.zeros(CLASSES, 8))  # the module has the last word
    attention = nn.MultiheadAttention(4, 2)
    old = attention.in_proj_weight.clone()
    assert reset_parameters_(attention, 3) == []
    assert not torch.equal(attention.in_proj_weight, old)


def test_frozen_layers_keep_their_first_weights():
    body = nn.Sequential(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False))
    body.register_parameter("scale", nn.Parameter(torch.ones(8)))
    head = nn.Sequential(nn.Linear(8, CLASSES), nn.BatchNorm1d(CLASSES), nn.BatchNorm1d(CLASSES, affine=False))
    net = nn.Sequential(body.requires_grad_(requires_grad=False), head)
    net[1][0].weight.requires_grad_(requires_grad=False)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(2)
    old = {name: value.clone() for name, value in weights_of(net).items()}
    assert reset_parameters_(net, 3) == []
    new = weights_of(net)
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        "1.0.bias",
        *(f"1.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        *(f"1.2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    }


def test_parameters_that_keep_their_start_are_named_and_a_copy_keeps_all():
    class Scaled(Classifier):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * super().forward(x)

    with pytest.warns(UserWarning, match=r"Second: the second network starts with the first one's values for scale:"):
        fit(Scaled(), Second(), max_epochs=1)
    second, module = Second(init="copy"), Classifier(lr=0.0)
    fit(module, second)
    assert all(torch.equal(a, b) for a, b in zip(second.peer.module.parameters(), module.parameters(), strict=True))


def test_its_metrics_keep_nothing_from_part_to_part():
    class Measured(Classifier):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(CLASSES)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            self.accuracy(logits.detach(), batch[1])
            return F.cross_entropy(logits, batch[1])

    second, module = Second(), Measured()
    fit(module, second)
    assert second.peer.module.accuracy._update_count == 0
    assert module.accuracy._update_count == 2 * BATCHES


# -- order ------------------------------------------------------------------------------------------------------------


def flat(draws):
    return [index for draw in draws for index in draw]


def test_the_second_order_is_another_one_and_the_users_goes_on():
    loader, second = shuffled(), Second()
    state = loader.generator.get_state()
    reordered = Reordered(loader, second)
    one, two = reordered.draws(0), reordered.draws(1)
    assert torch.equal(loader.generator.get_state(), state)
    assert one == reordered.draws(0)
    users = [x[:, 0].tolist() for x, _ in loader]
    orders = [tuple(flat(one)), tuple(flat(two)), tuple(flat(Reordered(loader, Second(seed=1)).draws(0)))]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(SAMPLES)) for order in orders)
    x, _ = make_tensors()
    assert flat(users) != x[list(orders[0]), 0].tolist()
    parts = [*reordered.batches(one[:2], 0, 0), *reordered.batches(one, 0, 2)]
    assert [(at, indices.list) for at, indices, _ in parts] == list(enumerate(one))
    assert all(torch.equal(batch[0], x[draw]) for (_, _, batch), draw in zip(parts, one, strict=True))


def test_the_users_samplers_make_the_order():
    data, second = TensorDataset(*make_tensors()), Second()
    weights = [1.0] * 4 + [0.0] * (SAMPLES - 4)
    weighted = DataLoader(data, BATCH, sampler=WeightedRandomSampler(weights, 16))
    before = torch.get_rng_state()
    draws = Reordered(weighted, second).draws(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(draw) for draw in draws] == [BATCH, BATCH]
    assert set(flat(draws)) <= {0, 1, 2, 3}
    shards = [DistributedSampler(data, 2, rank, seed=0) for rank in range(2)]
    halves = [Reordered(DataLoader(data, 4, sampler=shard), second).draws(1) for shard in shards]
    whole = Reordered(DataLoader(data, 8, sampler=DistributedSampler(data, 1, 0, seed=0)), second).draws(1)
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(draw) for draw in whole]
    assert [shard.epoch for shard in shards] == [0, 0]
    batched = DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 5, drop_last=False))
    reordered = Reordered(batched, second)
    draws = reordered.draws(0)
    assert sorted(flat(draws)) == list(range(SAMPLES))
    assert [len(batch[1]) for *_, batch in reordered.batches(draws, 0, 0)] == [5] * 6 + [2]


def test_workers_give_the_same_batches_and_skipped_ones_are_left_out():
    second = Second()
    here, there = (Reordered(shuffled(num_workers=workers), second) for workers in (0, 2))
    batches = [[(at, i.list, batch[0]) for at, i, batch in r.batches(r.draws(2), 2, 1)] for r in (here, there)]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(*batches, strict=True))
    skipping = Reordered(DataLoader(range(8), 2, collate_fn=lambda items: None if 3 in items else items), second)
    draws = skipping.draws(0)
    assert [at for at, *_ in skipping.batches(draws, 0, 0)] == [0, 2, 3]


def test_loaders_that_cannot_be_read_again_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(MisconfigurationException, match="Second reads the training data in a second order, and a Str"):
        Reordered(DataLoader(Stream()), Second())
    with pytest.raises(MisconfigurationException, match="and a list has only the one"):
        Reordered([1], Second())
    with pytest.raises(MisconfigurationException, match=r"there are 2 training loaders. Give the Trainer one"):
        fit(
            Classifier(step=lambda module, batch: F.cross_entropy(module(batch["a"][0]), batch["a"][1])),
            Second(dataloader="a"),
            loader={"a": shuffled(), "b": shuffled()},
        )


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_setups_that_train_in_another_way_are_refused():
    class Manual(Classifier):
        automatic_optimization = False

    class OwnStep(Classifier):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)

    class FSDPStrategy:
        pass

    class SingleDeviceStrategy:
        pass

    for module, strategy, sentence in (
        (Manual(), SingleDeviceStrategy(), "with automatic_optimization=False only"),
        (OwnStep(), SingleDeviceStrategy(), "OwnStep overrides `optimizer_step`"),
        (Classifier(), FSDPStrategy(), "which FSDPStrategy does not do. Use DDP"),
    ):
        with pytest.raises(MisconfigurationException, match=f"Second .*{sentence}"):
            check_trainable(Second(), SimpleNamespace(strategy=strategy), module)
    check_trainable(Second(), SimpleNamespace(strategy=SingleDeviceStrategy()), Classifier())


@pytest.mark.parametrize(
    ("configure", "sentence"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS, which evaluates the loss several times"),
        (lambda m: torch.optim.SGD(ELSEWHERE.parameters(), 0.1), "parameters that are not the copy's"),
        (
            lambda m: {
                "optimizer": (optimizer := torch.optim.SGD(m.parameters(), 0.1)),
                "lr_scheduler": {
                    "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
                    "monitor": "loss",
                },
            },
            "a scheduler that waits for a metric",
        ),
    ],
)
def test_optimizers_that_cannot_be_stepped_alone_are_refused(configure, sentence):
    class Configured(Classifier):
        def configure_optimizers(self):
            return configure(self)

    with pytest.raises(MisconfigurationException, match=f"Second trains a second network with what.*({sentence})"):
        fit(Configured(), Second())


# -- state ------------------------------------------------------------------------------------------------------------


def test_goes_on_from_its_state_to_the_last_bit():
    class Resumed(Second):
        def __init__(self, state=None):
            super().__init__()
            self.state, self.states = state, []

        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            if self.state is not None:
                self.peer.load_state_dict(self.state)

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            self.states.append(self.peer.state_dict())

    whole = Resumed()
    fit(Scheduled(), whole, loader=shuffled(), max_epochs=2)
    before = whole.states[0]["weights"]["net.0.weight"].clone()
    first = Resumed()
    trainer = fit(Scheduled(), first, loader=shuffled(), max_epochs=1)
    assert torch.equal(before, first.states[0]["weights"]["net.0.weight"])
    rest = Resumed(first.states[0])
    trainer.callbacks[:] = [rest]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Scheduled(), shuffled())
    one, two = whole.states[1], rest.states[0]
    assert one.keys() == two.keys() == {*two, "optimizer", "schedulers", "scaler", "loss", "weights"}
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    assert all(
        torch.equal(one["optimizer"]["state"][p][name], two["optimizer"]["state"][p][name])
        for p in one["optimizer"]["state"]
        for name in one["optimizer"]["state"][p]
    )
    assert one["schedulers"] == two["schedulers"]
    assert (one["steps"], one["_batches"], one["_epoch"]) == (two["steps"], two["_batches"], two["_epoch"]) == (8, 8, 1)
    assert torch.equal(one["loss"], two["loss"])


# -- what hooks and callbacks set on the user's network ---------------------------------------------------------------


class Follows(Second, BatchTechnique):
    def transform_batch(self, batch, step):
        if not isinstance(step, PeerStep):
            self.peer.note()
        return batch

    def loss_term(self, call):
        rates = [group["lr"] for group in self.peer._optimizer.param_groups]
        sizes = [len(group["params"]) for group in self.peer._optimizer.param_groups]
        call.step.module.noted[-1] += [rates, sizes] if isinstance(call.step, PeerStep) else []


class Hooked(Classifier):
    """Its hooks freeze batch norm in batches 1 and 2 of each epoch, and unfreeze a layer in batch 2."""

    def __init__(self, lr=0.05):
        super().__init__(lr=lr)
        self.norm = nn.BatchNorm1d(INPUTS)
        self.extra = nn.Linear(INPUTS, CLASSES)
        self.extra.requires_grad_(requires_grad=False)
        self.noted = []

    def on_train_batch_start(self, batch, batch_idx):
        self.norm.train(batch_idx not in (1, 2))
        self.norm.track_running_stats = batch_idx != 3
        if batch_idx == 2 and self.current_epoch == 0:
            self.extra.requires_grad_(requires_grad=True)
            self.trainer.optimizers[0].add_param_group({"params": list(self.extra.parameters()), "lr": 0.02})
        if len(self.trainer.optimizers[0].param_groups) > 1:
            self.trainer.optimizers[0].param_groups[1]["lr"] = 0.01 * (1 + batch_idx)

    def training_step(self, batch, batch_idx):
        flags = [layer.training for layer in self.modules()], [p.requires_grad for p in self.parameters()]
        self.noted.append([batch_idx, *flags, self.norm.track_running_stats])
        x = self.norm(batch[0])
        return F.cross_entropy(self(x) + self.extra(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def test_hooks_of_the_users_network_reach_the_second_one_in_the_same_steps():
    second, module = Follows(init="copy"), Hooked()
    extra = module.extra.weight.detach().clone()
    fit(module, second)
    peer = second.peer.module
    assert len(module.noted) == len(peer.noted) == 2 * BATCHES
    assert [noted[:4] for noted in peer.noted] == module.noted
    assert [noted[4] for noted in peer.noted] == [[0.05]] * 2 + [[0.05, 0.01 * (1 + k)] for k in (2, 3, 0, 1, 2, 3)]
    assert [noted[5] for noted in peer.noted] == [[6]] * 2 + [[6, 2]] * 6
    assert peer.norm.num_batches_tracked == module.norm.num_batches_tracked == 2  # batch 0 of each epoch
    assert not torch.equal(peer.extra.weight, extra)


def test_a_second_network_goes_on_in_the_middle_of_what_hooks_set():
    second = Follows(init="copy")
    trainer = fit(Hooked(), second, max_steps=3, max_epochs=1)
    state = second.peer.state_dict()
    assert state["groups"][1] == ["extra.weight", "extra.bias"]
    other = TrainedPeer(trainer, second.peer.module, second, "copy")
    other.load_state_dict(state)
    assert other.state_dict()["groups"] == state["groups"]
    assert other.state_dict()["settings"] == state["settings"]
    assert [group["lr"] for group in other._optimizer.param_groups] == [0.05, 0.03]


def test_learning_rates_that_hooks_set_are_said_once():
    class Warmed(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.25

    sentence = r"Second: the learning rate of the module's optimizer is 0.25, that of the second network's 0.05: a hook"
    with pytest.warns(UserWarning, match=sentence) as said:
        fit(Warmed(lr=0.05), Second(), max_epochs=3)
    assert sum("learning rate of the module" in str(one.message) for one in said) == 1


# -- two processes ----------------------------------------------------------------------------------------------------


class Halves(Classifier):
    """One rank leaves a layer out, or all do so in their first batch."""

    def __init__(self, late):
        super().__init__()
        self.extra, self.late = nn.Linear(INPUTS, CLASSES), late

    def training_step(self, batch, batch_idx):
        x, y = batch
        uses = batch_idx > 0 if self.late else torch.distributed.get_rank() == 1
        return F.cross_entropy(self(x) + self.extra(x) if uses else self(x), y)


def on_rank(late):
    second = Second()
    fit(Halves(late), second, loader=shuffled(), strategy="ddp_find_unused_parameters_true", devices=2)
    values = [torch.full((2,), float(torch.distributed.get_rank())), torch.arange(3)]
    average_(values[:1])
    broadcast_(values[:1])
    return {name: w.clone() for name, w in weights_of(second.peer.module).items()}, values[0], second.peer.loss


def test_ranks_train_one_second_network(two_processes):
    ranks = two_processes.run(on_rank, False)
    assert all(torch.equal(ranks[0][0][name], ranks[1][0][name]) for name in ranks[0][0])
    assert ranks[0][1].tolist() == ranks[1][1].tolist() == [0.5, 0.5]
    assert torch.equal(ranks[0][2], ranks[1][2])
    with pytest.raises(MisconfigurationException, match="parameters of the second network have gradients that had non"):
        two_processes.run(on_rank, True)


class Normed(Classifier):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUTS)

    def forward(self, x):
        return super().forward(self.norm(x))


def statistics_on_rank():
    second = Second()
    fit(Normed(), second, loader=shuffled(), strategy="ddp", devices=2)
    return second.peer.module.norm.running_mean.clone(), torch.distributed.get_rank()


def test_batch_statistics_of_the_second_network_are_those_of_the_first_rank(two_processes):
    (one, _), (two, rank) = two_processes.run(statistics_on_rank)
    assert rank == 1
    assert torch.equal(one, two)
    assert one.abs().min() > 0


# -- networks that answer together ------------------------------------------------------------------------------------


def test_a_layer_answers_for_two_until_it_is_put_back():
    one, other, x = Classifier(dropout=0.5), Classifier(dropout=0.5, seed=1), torch.rand(4, INPUTS)
    one.eval()
    expected = 0.5 * (one(x) + copy_of(other).eval()(x))
    joint = JointForward(one, other)
    assert torch.equal(one(x), expected)
    assert torch.equal(MeanOfTwo(copy_of(other), copy_of(other)).eval()(x), copy_of(other).eval()(x))
    assert joint.calls == 1
    joint.undo()
    assert "forward" not in vars(one)
    assert other.net[2].training
    other.forward = lambda x: {"logits": x}
    joint = JointForward(one, other)
    with pytest.raises(MisconfigurationException, match=r"`forward` returns a Tensor|Name a layer"):
        one(x)
    joint.undo()


# -- beside other techniques ------------------------------------------------------------------------------------------


class Scales(_Toy, LayerTechnique):
    """Doubles what the head is given, in the networks that it is of the method of."""

    edits_second = True
    stages = frozenset({"train", "predict"})

    def __init__(self, active=True, **kwargs):
        super().__init__(**kwargs)
        self.active, self.stages_seen = active, []

    def is_active(self, step):
        return self.active

    def inputs_to_edit(self, module):
        return ["net.3"]

    def edit_inputs(self, call):
        self.stages_seen.append((call.step.stage, isinstance(call.step, PeerStep)))
        return call.with_input(2 * call.input)


class Beside(Second):
    """Trains its network with layers edited by others."""

    trains_second = True

    def __init__(self, *beside, start=None, **kwargs):
        super().__init__(**kwargs)
        self.beside, self.start = beside, start

    def on_train_start(self, trainer, pl_module):
        self.peer = TrainedPeer(trainer, pl_module, self, "reset", self.beside, self.start)


@pytest.mark.parametrize("active", [True, False])
def test_edits_of_others_act_on_the_second_network_where_they_are_handed_over(active):
    scales = Scales(active)
    beside, without = Beside(scales), Beside()
    fit(Scheduled(), beside, scales, loader=shuffled())
    fit(Scheduled(), without, scales, loader=shuffled())
    assert scales.stages_seen.count(("train", True)) == (2 * BATCHES if active else 0)

    class Doubling(Scheduled):
        def forward(self, x):
            return self.net[3](2 * self.net[:3](x))

    expected = by_hand(beside, Doubling() if active else Scheduled())
    for name, value in expected.named_parameters():  # float32, 8 steps of Adam
        torch.testing.assert_close(weights_of(beside.peer.module)[name], value.detach(), atol=1e-5, rtol=1e-4)
    same = all(
        torch.equal(a, b)
        for a, b in zip(beside.peer.module.parameters(), without.peer.module.parameters(), strict=True)
    )
    assert same is not active


def test_edits_act_on_a_network_that_is_asked_at_their_stages_alone():
    scales, module, x = Scales(), Classifier().eval(), make_tensors()[0]
    edits = EditsBeside(module, [scales], training=False)
    plain, doubled = module.net(x), module.net[3](2 * module.net[:3](x))
    for stage, expected in (("predict", doubled), ("validate", plain), ("train", doubled)):
        step = SimpleNamespace(stage=stage, active=[])
        with edits.around(step):
            assert torch.equal(module.net(x), expected)
        assert step.active == ([] if stage == "validate" else [scales])
    edits.rest()
    assert torch.equal(module.net(x), plain)


def test_first_weights_may_be_given():
    start = {name: torch.full_like(value, 0.25) for name, value in weights_of(Classifier()).items()}
    second = Beside(start=start)
    fit(Classifier(lr=0.0), second)
    assert all((value == 0.25).all() for value in weights_of(second.peer.module).values())


def test_two_that_each_train_a_second_network_are_refused():
    assert "each trains a second network beside the module's" in conflict_between(Beside(), Beside(name="two"))
    assert conflict_between(Beside(), Second()) is None
