"""Weights whose factors get their gradients at the layer, read by something else as well: in any step, in any way."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tests.engine.test_frozen_maps import FIRST, HEAD, ByHand, FreezesAll, KeepsCount
from tests.toys import (
    QUIET,
    TWO_RANKS,
    Callback,
    Classifier,
    LowRank,
    fit,
    make_loader,
    same_weights,
    weights_of,
)

pytestmark = QUIET


def penalty(weight):
    return weight.square().sum() + (weight @ weight.T).square().mean()


class Late(Classifier):
    """Begins to read weights in the third step, and in the fourth reads one of them no more."""

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if batch_idx >= 2:
            loss = loss + 0.5 * penalty(self.weight_of(FIRST))
        if batch_idx == 2:
            loss = loss + 0.5 * penalty(self.weight_of(HEAD))
        return loss

    def weight_of(self, name):
        return self.get_parameter(name)


class LateByHand(ByHand, Late):
    def weight_of(self, name):
        return self.made()[name]

    def configure_optimizers(self):
        own = [tensor for factors in self.factors for tensor in factors.values()]
        return torch.optim.SGD([*own, self.net[0].bias, self.net[3].bias], self.lr)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str)
def test_a_term_that_begins_to_read_weights_after_the_first_step(options):
    module, technique, count = Late(lr=0.1), LowRank([FIRST, HEAD]), KeepsCount()
    fit(module, technique, count, **options)
    hand = LateByHand(LowRank([FIRST, HEAD]), [FIRST, HEAD], lr=0.1)
    fit(hand, **options)
    for name, made in hand.made().items():
        torch.testing.assert_close(module.get_parameter(name).detach(), made.detach(), rtol=0, atol=1e-6)
    assert count.most == 0
    assert set(technique.latents.ways.values()) == {"released (it is read outside of its layer)"}
    assert all(p.requires_grad for p in module.parameters())


def both(make, names=(FIRST, HEAD), **options):
    """Trained with gradients at the layer, which are the same through the weights' own."""
    modules, ways = [], []
    for dense in (False, True):
        modules.append(make())
        technique = FreezesAll(list(names), dense=dense)
        fit(modules[-1], technique, **options)
        ways.append(technique.latents.ways[HEAD])
    assert same_weights(*modules, atol=1e-6)
    assert not same_weights(modules[0], make(), atol=1e-3)
    return ways[0]


def test_a_network_that_runs_on_other_weights_than_its_own():
    kept = {name: torch.full_like(p, 0.1) for name, p in Classifier().net.named_parameters()}

    def teacher(module, batch):
        x, y = batch
        wanted = torch.func.functional_call(module.net, kept, x)  # of constants: nothing is learned here
        return F.cross_entropy(module(x), y) + 0.0 * wanted.sum() + (module(x) * wanted).mean()

    assert both(lambda: Classifier(teacher, lr=0.1)) == "at the layer"

    def doubled(module, batch):
        twice = {name: 2 * p for name, p in module.net.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(module.net, twice, batch[0]), batch[1])

    assert both(lambda: Classifier(doubled, lr=0.1)) == "released (it is read outside of its layer)"


class Filters(Classifier):
    """Convolutions, and a layer of transformers."""

    def __init__(self, training_step, one_image, **options):
        super().__init__(training_step, **options)
        self.one_image = one_image
        self.net[0] = nn.Conv1d(2, 8, 3, stride=2, padding=1, groups=2)
        self.net[3] = Conv1D(3, 16)
        with torch.no_grad():
            for number, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).roll(number))

    def forward(self, x):
        first, *_, last = self.net
        rows = x.reshape(-1, 2, 3)
        filtered = torch.stack([first(row) for row in rows]) if self.one_image else first(rows)
        return last(filtered.tanh().flatten(1))


@pytest.mark.parametrize("make", [Classifier, partial(Filters, one_image=False), partial(Filters, one_image=True)])
def test_gradients_of_gradients(make):
    def penalized(module, batch):
        x, y = batch[0].requires_grad_(), batch[1]
        loss = F.cross_entropy(module(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 5 * slope.square().sum()

    assert both(lambda: make(penalized, lr=0.1)) == "released (it is read outside of its layer)"


class Hooked(Classifier):
    """Hooks of the user's on a layer: one that reads its weight before, and one that changes its output."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[3].register_forward_pre_hook(lambda layer, args: (args[0] + 0.1 * layer.weight.square().mean(),))
        self.net[3].register_forward_hook(lambda layer, args, output: 3.0 * output * layer.weight.mean(1))


def test_hooks_on_the_layer_that_read_its_weight_and_change_its_output():
    assert both(lambda: Hooked(lr=0.1)) == "released (it is read outside of its layer)"


class Adds(Callback):
    """A hook that comes after the training has begun."""

    def on_train_start(self, trainer, pl_module):
        self.handle = pl_module.net[3].register_forward_hook(lambda layer, args, output: 3.0 * output)

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()


def test_a_hook_that_comes_later_and_changes_the_output():
    modules = [Classifier(lr=0.1), Classifier(lr=0.1)]
    for module, dense in zip(modules, (False, True), strict=True):
        fit(module, FreezesAll([HEAD], dense=dense), Adds())
    assert same_weights(*modules, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_beside_a_reading(reentrant):
    def run(module, batch):
        x = batch[0].requires_grad_()
        # The second pass ends where the last tensor is there that is needed, in the middle of the last layer.
        logits = checkpoint(module.net, x, use_reentrant=reentrant)
        return F.cross_entropy(logits, batch[1]) + 0.1 * penalty(module.net[3].weight)

    assert both(lambda: Classifier(run, lr=0.1)) == "released (it is read outside of its layer)"


def test_a_layer_that_fails_and_is_tried_again():
    def tries(module, batch):
        x, y = batch
        with pytest.raises(RuntimeError):
            module.net[0](x[:, :1])
        assert module.net[0].weight.requires_grad
        return F.cross_entropy(module(x), y) + 0.1 * penalty(module.net[0].weight)

    both(lambda: Classifier(tries, lr=0.1))


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_code_beside_a_reading_and_with_one_in_it(inside):
    torch.compiler.reset()

    class Reads(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 0.1 * self[3].weight.square().sum(1)

    def run(module, batch):
        beside = 0.0 if inside else 0.1 * penalty(module.net[3].weight)
        return F.cross_entropy(module.run(batch[0]), batch[1]) + beside

    modules, net = [Classifier(run, lr=0.1), Classifier(run, lr=0.1)], None
    for module, compiled in zip(modules, (True, False), strict=True):
        net = Reads(*module.net) if inside else module.net
        # Not a module within the module: its keys are to be those of the other.
        run_net = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        object.__setattr__(module, "run", run_net)
        technique = FreezesAll([FIRST, HEAD])
        fit(module, technique)
        assert technique.latents.ways[HEAD] == "released (it is read outside of its layer)"
        assert technique.latents.ways[FIRST] == "at the layer"
        assert all(isinstance(layer.weight, nn.Parameter) for layer in (module.net[0], module.net[3]))
    assert same_weights(*modules, atol=1e-6)
    assert not same_weights(modules[0], Classifier(), atol=1e-3)
    torch.compiler.reset()


def _on_ranks(ranks):
    module, technique = Late(lr=0.1), LowRank([FIRST, HEAD])
    x, y = torch.utils.data.default_collate(list(make_loader().dataset))
    rank = torch.distributed.get_rank() if ranks == 2 else 0
    rows = torch.arange(32).reshape(4, 2, 4)
    mine = (rows[:, rank] if ranks == 2 else rows).flatten()
    loader = make_loader(torch.utils.data.TensorDataset(x[mine], y[mine]), batch_size=8 // ranks)
    more = {**TWO_RANKS, "use_distributed_sampler": False} if ranks == 2 else {}
    fit(module, technique, loader=loader, **more)
    return weights_of(module)


def test_two_ranks_that_begin_to_read_weights(two_processes):
    first, second = two_processes.run(_on_ranks, 2)
    assert same_weights(first, second)
    assert same_weights(first, _on_ranks(1), atol=1e-6)
