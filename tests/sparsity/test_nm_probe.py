"""Permuted channels: networks whose steps do more than their layers say are left as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import NMSparsity
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import QUIET, TWO_RANKS, Callback, Classifier, make_trainer, same_weights, weights_of

pytestmark = QUIET


def loader():
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 8)


class Residual(nn.Module):
    """The Sequential's own forward is never called."""

    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)]), nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.out(x)


class Auxiliary(nn.Module):
    """In training another head reads what is permuted."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 4), nn.Linear(16, 4)

    def forward(self, x):
        h = self.a(x).relu()
        y = self.out(self.b(h).relu())
        return y + 0.3 * self.aux(h) if self.training else y


class Reads(nn.Module):
    """A weight that is permuted is read past its layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.b(self.a(x).relu()).relu() + F.linear(x, self.a.weight))


class Gated(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(16, 2, 32, dropout=0.0, batch_first=True)
        self.gate = nn.Linear(32, 32)

    def _ff_block(self, x):
        h = self.activation(self.linear1(x))
        return self.linear2(h * self.gate(h).sigmoid())


class Encoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.out = nn.Linear(16, 16), layer, nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.layer(self.first(x)[:, None])[:, 0])


class Chain(nn.Sequential):
    """With nothing odd about it."""

    def __init__(self):
        layers = (nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        super().__init__(*layers)


class Both(nn.Module):
    """One that can be permuted beside one that cannot."""

    def __init__(self):
        super().__init__()
        self.chain, self.odd = Chain(), Reads()

    def forward(self, x):
        return self.chain(x) + self.odd(x)


class Module(Classifier):
    def __init__(self, net, step=None):
        super().__init__(step=step)
        self.net = net


class Start(Callback):
    """What the network computes before the first step, in both modes."""

    def outputs(self, module):
        x, found = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), []
        for training in (True, False):
            module.train(training)
            for layer in module.modules():
                layer.training &= not isinstance(layer, nn.Dropout)
            found.append(module(x).detach())
        module.train()
        return torch.stack(found)

    def on_fit_start(self, trainer, pl_module):
        self.before = self.outputs(pl_module)

    def on_train_start(self, trainer, pl_module):
        self.after = self.outputs(pl_module)


def make(net):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net()


def fit(module, layers):
    start, sparse = Start(), NMSparsity(2, 4, recipe="ste", layers=layers, permute=True)
    make_trainer(callbacks=[sparse, start], max_epochs=1).fit(module, loader())
    return start


ODD = {
    "a Sequential that is not called": (Residual, "net.layers.[12]"),
    "another head in training": (Auxiliary, "net.b"),
    "a weight read past its layer": (Reads, "net.b"),
    "a layer with another feed-forward": (lambda: Encoder(Gated()), "*.linear2"),
}


@pytest.mark.parametrize("which", ODD)
def test_what_the_step_would_notice_is_undone_and_said(which):
    net, layers = ODD[which]
    module = Module(make(net))
    before = weights_of(module)
    with pytest.raises(MisconfigurationException, match="the training step would compute something else with it"):
        fit(module, layers)
    assert same_weights(module, before)


def test_the_rest_is_permuted_all_the_same():
    module = Module(make(Both))
    start = fit(module, ["*.chain.3", "*.odd.b"])
    torch.testing.assert_close(start.after, start.before, atol=1e-5, rtol=1e-5)
    chain = make(Both).chain
    assert not torch.equal(module.net.chain[0].bias.sort().values, chain[0].bias)  # trained and in another order


def test_dropout_and_plain_chains_are_no_hindrance():
    start = fit(Module(make(Chain)), "net.3")
    torch.testing.assert_close(start.after, start.before, atol=1e-5, rtol=1e-5)


def test_code_that_makes_single_precision_is_tried_in_it():
    def step(module, batch):
        return F.cross_entropy(module.net(batch[0] + torch.zeros(16)).float() + torch.ones(4), batch[1])

    def strict(module, batch):
        x = torch.empty(len(batch[0]), 16, dtype=torch.float32).copy_(batch[0])
        return F.cross_entropy(module.net(x), batch[1])  # fails in double precision

    for one in (step, strict):
        start = fit(Module(make(Chain), step=one), "net.3")
        torch.testing.assert_close(start.after, start.before, atol=1e-5, rtol=1e-5)


def test_a_feed_forward_with_parametrized_weights_is_refused_by_name():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    torch.nn.utils.parametrizations.weight_norm(layer.linear1)
    with pytest.raises(MisconfigurationException, match="it is no plain linear layer or convolution"):
        fit(Module(Encoder(layer)), "*.linear2")


def test_manual_optimization_cannot_be_tried():
    module = Module(make(Chain))
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="NMSparsity runs `training_step` on a copy of the module"):
        make_trainer(callbacks=[NMSparsity(2, 4, layers="net.3", permute=True)]).fit(module, loader())


def permuted_on_rank(layers):
    module = Module(make(Both))
    sparse = NMSparsity(2, 4, recipe="ste", layers=layers, permute=True)
    make_trainer(callbacks=[sparse], max_epochs=1, **TWO_RANKS).fit(module, loader())
    return weights_of(module)


def test_ranks_permute_alike(two_processes):
    one, two = two_processes.run(permuted_on_rank, ["*.chain.3", "*.odd.b"])
    assert same_weights(one, two)
