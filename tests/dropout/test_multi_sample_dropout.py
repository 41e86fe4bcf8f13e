"""Multi-sample dropout."""

import copy
import math
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric

from lightning_reg import LossMixin, MultiSampleDropout, MultiSampleDropoutLayer
from lightning_reg.dropout.multi_sample_dropout.core import kind_of, mask_shape
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.row_bits import keep_mask
from lightning_reg.functional import dropout_copies, fold, multi_sample_dropout, multi_sample_loss
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.problems import Problem
from tests.toys import (
    QUIET,
    TWO_RANKS,
    Callback,
    Classifier,
    StepLosses,
    Term,
    Watch,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
    same_weights,
    seed_everything,
    weights_of,
)


def net():
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 8, 3, padding=1),
            act=nn.Tanh(),
            body=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            act_body=nn.Tanh(),
            drop=nn.Dropout(0.5),
            head=nn.Linear(32, 4),
        )
    )


def data(size):
    x = torch.randn(size, 3, 8, 8)
    return x, (x.flatten(1)[:, :4] + torch.randn(size, 4)).argmax(1)


class CopiesByHand(Hand):
    """The network once for each mask; the masks are the technique's own draws."""

    copies = 4

    def edit(self, name, rows, moment, copy):
        if name != "net.drop":
            return rows
        step = SimpleNamespace(batches_so_far=moment.count, stream="")
        seed = self.technique._seed_of(SimpleNamespace(step=step, number=0))
        keep = keep_mask(seed, torch.arange(len(rows)), range(copy, copy + 1), rows.shape[1:], 0.5)
        return rows * keep[0] * 2


SAMPLED = partial(MultiSampleDropout, "net.drop", num_samples=4)
CASE = (
    Case(
        make=SAMPLED,
        neutral=partial(MultiSampleDropout, "net.drop", num_samples=1),
        by_hand=CopiesByHand,
        says=(
            "4 samples of net.drop; batched, first rows",
            "num_samples=1: inactive",
            "4 samples of net.drop, p=0.3; batched, first rows",
            "4 samples of net.drop; batched, all rows",
            "4 samples of net.drop; batched, first rows",
            "4 samples of net.drop; replay, net.body once",
        ),
        data=Problem(net, data, F.cross_entropy, serves=["images", "classification"]),
        variants=[
            partial(SAMPLED, p=0.3),
            partial(SAMPLED, outputs="all"),
            partial(SAMPLED, head="net.head"),
            partial(SAMPLED, mode="replay", backbone="net.body"),
        ],
        invalid=[
            ({"num_samples": 0}, "num_samples"),
            ({"num_samples": 2.0}, "num_samples"),
            ({"p": -0.1}, "p"),
            ({"p": 1.0}, "p"),
            ({"p": 0.5, "num_samples": 1}, "p"),
            ({"mode": "replay"}, "backbone"),
            ({"backbone": "net.body"}, "backbone"),
            ({"mode": "replay", "backbone": "net.body", "outputs": "all"}, "outputs"),
            ({"mode": "replay", "backbone": "net.body", "head": "net"}, "head"),
            ({"outputs": "all", "head": "net"}, "head"),
            ({"seed": -1}, "seed"),
        ],
        exempt={"recomputation": "what runs between the layer and the loss has other rows; refused by name, see below"},
    ),
    NetworkCase(
        make=partial(MultiSampleDropoutLayer, num_samples=3),
        inputs=(torch.linspace(-1.0, 1.0, 10).reshape(2, 5),),
        invalid=[({"p": 1.0}, "p"), ({"num_samples": 0}, "num_samples")],
    ),
)

pytestmark = QUIET

# -- the functional core ----------------------------------------------------------------------------------------------


def test_loss_is_the_mean_of_the_losses_and_not_that_of_the_mean_logits():
    # Two features of 1, a head that puts them on two classes, masks (1, 0) and (0, 1): logits (2, 0), (0, 2).
    keep = torch.tensor([[[True, False]], [[False, True]]])
    logits = dropout_copies(torch.ones(1, 2), keep, p=0.5)
    assert logits.tolist() == [[2.0, 0.0], [0.0, 2.0]]
    losses = [math.log(1 + math.exp(-2)), 2 + math.log(1 + math.exp(-2))]
    mean_of_losses = F.cross_entropy(logits, torch.zeros(2).long()).item()
    assert mean_of_losses == pytest.approx(sum(losses) / 2)  # 1.1269
    assert mean_of_losses > math.log(2) + 0.4  # the loss of the mean logits (1, 1)


def test_loss_against_loops_over_the_samples():
    h, y, head = torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0]), nn.Linear(6, 3)
    keep = torch.empty(4, 5, 6).bernoulli_(0.7, generator=torch.Generator().manual_seed(3))
    total, weight, bias = 0.0, head.weight.detach().double(), head.bias.detach().double()
    for j in range(4):
        for b in range(5):
            masked = [h[b, d].item() * keep[j, b, d].item() / 0.7 for d in range(6)]
            scores = [sum(w * v for w, v in zip(weight[c].tolist(), masked, strict=True)) + bias[c] for c in range(3)]
            total += math.log(sum(math.exp(s) for s in scores)) - scores[y[b]].item()
    loss = multi_sample_loss(head, h, y, F.cross_entropy, 0.3, 4, torch.Generator().manual_seed(3))
    assert loss.item() == pytest.approx(total / 20, rel=1e-5)  # float32
    per_row = partial(F.cross_entropy, reduction="none")
    assert loss.item() == pytest.approx(
        multi_sample_loss(head, h, y, per_row, 0.3, 4, torch.Generator().manual_seed(3)).item(), rel=1e-6
    )


def test_one_sample_is_ordinary_dropout_with_the_same_draws():
    h = torch.randn(6, 10)
    torch.manual_seed(5)
    expected = nn.Dropout(0.5)(h)
    assert torch.equal(multi_sample_dropout(h, 0.5, 1, torch.Generator().manual_seed(5)), expected)
    torch.manual_seed(5)
    assert torch.equal(multi_sample_dropout(h, 0.5, 1), expected)


def test_copies_lie_one_after_the_other_each_under_masks_of_its_own():
    h = torch.arange(1.0, 7).reshape(3, 2).double()
    copies = multi_sample_dropout(h.repeat(1, 50), 0.25, 4, torch.Generator().manual_seed(1))
    assert (copies.shape, copies.dtype) == ((12, 100), torch.float64)
    folded = fold(copies, 4)
    for j in range(4):
        for b in range(3):
            kept = folded[j, b] != 0
            torch.testing.assert_close(folded[j, b], torch.where(kept, h[b].repeat(50) / 0.75, 0))
            assert torch.equal(folded[j, b], copies[3 * j + b])
    assert len({tuple(row) for row in (copies != 0).tolist()}) == 12
    assert fold(copies, 4).data_ptr() == copies.data_ptr()


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_without_dropout_loss_and_gradient_are_the_plain_ones(num_samples):
    h, y, head = torch.randn(4, 6).requires_grad_(), torch.tensor([0, 2, 1, 1]), nn.Linear(6, 3)
    plain = F.cross_entropy(head(h), y)
    loss = multi_sample_loss(head, h, y, F.cross_entropy, 0.0, num_samples)
    torch.testing.assert_close(loss, plain)
    for one, two in zip(*(torch.autograd.grad(v, [h, head.weight]) for v in (loss, plain)), strict=True):
        torch.testing.assert_close(one, two)


def test_variance_of_the_gradient_falls_as_one_over_the_samples():
    generator = torch.Generator().manual_seed(0)
    h, y = torch.randn(8, 16, generator=generator), torch.randint(3, (8,), generator=generator)
    weight = (0.3 * torch.randn(3, 16, generator=generator)).requires_grad_()

    def variance(num_samples):
        draws = []
        for _ in range(400):
            loss = multi_sample_loss(lambda rows: rows @ weight.T, h, y, F.cross_entropy, 0.5, num_samples, generator)
            draws.append(torch.autograd.grad(loss, weight)[0].flatten())
        return torch.stack(draws).var(0).sum().item()

    one = variance(1)
    for num_samples in (2, 4, 8):
        assert one / variance(num_samples) == pytest.approx(num_samples, rel=0.15)


def test_arguments_of_the_functions_are_checked():
    with pytest.raises(ValueError, match=r"fold: 5 rows are no multiple of `num_samples`=2"):
        fold(torch.zeros(5), 2)
    with pytest.raises(ValueError, match=r"multi_sample_dropout: `p` must be in \[0, 1\), got 1.0"):
        multi_sample_dropout(torch.zeros(2, 2), 1.0, 2)
    with pytest.raises(ValueError, match=r"multi_sample_dropout: `num_samples` must be at least 1, got 0"):
        multi_sample_dropout(torch.zeros(2, 2), 0.5, 0)
    with pytest.raises(ValueError, match=r"MultiSampleDropoutLayer: `p` must be a number in \[0, 1\), got 1"):
        MultiSampleDropoutLayer(p=1)
    assert multi_sample_dropout(torch.zeros(0, 3), 0.5, 4).shape == (0, 3)


def test_the_layer_samples_in_training_and_does_nothing_in_evaluation():
    layer, h = MultiSampleDropoutLayer(p=0.5, num_samples=3), torch.randn(2, 4)
    torch.manual_seed(1)
    rows = layer(h)
    torch.manual_seed(1)
    assert torch.equal(rows, multi_sample_dropout(h, 0.5, 3))
    assert layer.eval()(h) is h
    assert repr(layer) == "MultiSampleDropoutLayer(p=0.5, num_samples=3)"


@pytest.mark.parametrize(
    ("layer", "shape", "draws"),
    [
        (nn.Dropout(0.4), (3, 5), (5,)),
        (nn.Dropout(0.4), (3, 5, 2), (5, 2)),
        (nn.Dropout1d(0.4), (3, 5, 7), (5, 1)),
        (nn.Dropout2d(0.4), (3, 5, 2, 2), (5, 1, 1)),
        (nn.Dropout3d(0.4), (3, 5, 2, 2, 2), (5, 1, 1, 1)),
        (nn.AlphaDropout(0.4), (3, 5), (5,)),
        (nn.FeatureAlphaDropout(0.4), (3, 5, 2, 2), (5, 1, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_kind_of_layer_does_with_its_mask_what_torch_does(layer, shape, draws):
    assert mask_shape(kind_of(layer), shape) == draws
    x = 1 + torch.rand(shape)
    torch.manual_seed(2)
    expected = layer(x)
    # The mask that torch drew, read off its output: what was dropped is 0, or one value that x cannot lead to.
    alpha = isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout)
    keep = expected > 0 if alpha else expected != 0
    if draws[1:] and set(draws[1:]) == {1}:
        assert torch.equal(keep.flatten(2).all(-1), keep.flatten(2).any(-1))
    own = dropout_copies(x, keep[None], 0.4, kind_of(layer))
    torch.testing.assert_close(own, expected)


def test_layers_that_are_no_dropout_of_torch_and_inputs_that_are_no_batch():
    class Own(nn.Dropout):
        def forward(self, x):
            return x

    class Renamed(nn.Dropout):
        pass

    assert (kind_of(Own()), kind_of(Renamed()), kind_of(nn.ReLU())) == (None, nn.Dropout, None)
    assert mask_shape(nn.Dropout1d, (5, 7)) is None
    assert mask_shape(nn.Dropout3d, (5, 2, 2, 2)) is None
    assert mask_shape(nn.Dropout, ()) is None


# -- the callback -----------------------------------------------------------------------------------------------------


class Spy(Callback):
    """Notes what goes into a layer while the module trains."""

    def __init__(self, layer):
        self.layer, self.inputs = layer, []

    def on_fit_start(self, trainer, pl_module):
        layer = pl_module.get_submodule(self.layer)
        self.handle = layer.register_forward_hook(lambda layer, args, output: self.inputs.append(args[0].detach()))

    def teardown(self, trainer, pl_module, stage):
        self.handle.remove()


def sampled(dropout="net.2", num_samples=4, **kwargs):
    return MultiSampleDropout(dropout, num_samples=num_samples, **kwargs)


def train(*callbacks, step=None, layers=None, **kwargs):
    module = Classifier(step=step, dropout=0.5, lr=0.2)
    if layers is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module.net = nn.Sequential(*layers())
    fit(module, *callbacks, max_epochs=1, **kwargs)
    return module


def by_hand(masks, p=0.5, reduce=torch.mean):
    """The toy classifier trained on given masks: for each step one for each copy."""
    module = Classifier(lr=0.2)
    optimizer = module.configure_optimizers()
    for (x, y), copies in zip(make_loader(), masks, strict=True):
        h = module.net[1](module.net[0](x))
        losses = [F.cross_entropy(module.net[3](h * mask / (1 - p)), y, reduction="none") for mask in copies]
        optimizer.zero_grad()
        reduce(sum(losses) / len(losses)).backward()
        optimizer.step()
    return module


def masks_seen(spy, num_samples=4):
    """Masks of each step. Features that relu made 0 do not count, so it does not matter what theirs was."""
    return [(rows != 0).float().reshape(num_samples, -1, *rows.shape[1:]) for rows in spy.inputs]


@pytest.mark.parametrize("p", [None, 0.25])
def test_trains_as_the_loop_by_hand_does(p):
    spy = Spy("net.3")
    module = train(sampled(p=p), spy)
    masks = masks_seen(spy)
    expected = by_hand(masks, p or 0.5)
    assert same_weights(module, expected, atol=1e-6)  # float32, 4 steps
    assert len({tuple(mask.flatten().tolist()) for step in masks for mask in step}) == 16
    assert torch.stack([m.mean() for m in masks]).mean() < 1 - (p or 0.5) + 0.1


def loss_of(reduction):
    def step(module, batch):
        value = F.cross_entropy(module(batch[0]), batch[1], reduction=reduction)
        return value if reduction == "mean" else value.sum() / len(batch[1])

    return step


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_are_those_of_one_copy(reduction):
    assert same_weights(train(sampled()), train(sampled(), step=loss_of(reduction)), atol=1e-6)  # float32


@pytest.mark.parametrize(
    "options",
    [{"outputs": "all"}, {"head": "net"}, {"head": "net.3"}, {"mode": "replay", "backbone": "net.1"}],
    ids=["all rows", "head around", "head behind", "replay"],
)
def test_every_way_gives_the_same(options):
    assert same_weights(train(sampled()), train(sampled(**options)), atol=1e-6)  # float32


def test_the_backbone_runs_once_and_the_head_on_all_copies():
    for options, head in (({}, [32] * 4), ({"mode": "replay", "backbone": "net.1"}, [8] * 16)):
        body, last = Spy("net.0"), Spy("net.3")
        train(sampled(**options), body, last)
        assert [len(rows) for rows in last.inputs] == head
        # In a replay the backbone that is named runs once; what comes before it runs for nothing.
        assert len(body.inputs) == (4 if not options else 16)


def test_an_inplace_layer_is_sampled_from_what_it_got():
    def layers(inplace):
        return lambda: [nn.Linear(6, 8), nn.Flatten(), nn.Dropout(0.5, inplace=inplace), nn.Linear(8, 3)]

    one, two = (train(sampled(), layers=layers(inplace)) for inplace in (False, True))
    assert same_weights(one, two)
    plain = train(layers=layers(True))
    assert not same_weights(plain, two)


def image_layers(dropout):
    return lambda: [nn.Linear(6, 24), nn.Unflatten(1, (6, 2, 2)), dropout, nn.Flatten(), nn.Linear(24, 3)]


def test_channels_are_dropped_as_wholes_by_a_layer_that_does_so():
    spy = Spy("net.3")
    train(sampled(), spy, layers=image_layers(nn.Dropout2d(0.5)))
    for rows in spy.inputs:
        kept = (rows != 0).flatten(2)
        assert rows.shape == (32, 6, 2, 2)
        assert torch.equal(kept.all(-1), kept.any(-1))
        assert 0.3 < kept.float().mean() < 0.7


def test_alpha_dropout_keeps_its_value_for_what_it_drops():
    spy = Spy("net.3")
    train(sampled(), spy, layers=lambda: [nn.Linear(6, 8), nn.SELU(), nn.AlphaDropout(0.5), nn.Linear(8, 3)])
    alpha = -1.7580993408473766
    a = (0.5 * (1 + 0.5 * alpha**2)) ** -0.5
    low = a * alpha - a * alpha * 0.5
    share = torch.stack([((rows - low).abs() < 1e-6).float().mean() for rows in spy.inputs]).mean().item()
    assert share == pytest.approx(0.5, abs=0.1)


def test_later_dropout_layers_have_a_mask_per_copy_and_the_global_state_is_the_plain_one():
    def layers():
        head = [nn.Linear(8, 50), nn.Dropout(0.5, inplace=True), nn.Linear(50, 3)]
        return [nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Dropout(0.5), *head]

    states = []

    class States(Callback):
        def on_train_batch_end(self, *args):
            states.append(torch.get_rng_state())

    spy = Spy("net.6")
    train(sampled("net.3"), spy, States(), layers=layers)
    train(States(), layers=layers)
    assert all(torch.equal(one, two) for one, two in zip(states[:4], states[4:], strict=True))
    masks = masks_seen(spy)
    assert all(len({tuple((copy != 0).flatten().tolist()) for copy in step}) == 4 for step in masks)
    assert torch.stack(masks).mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_layers_own_flag_counts():
    def frozen(module, batch):
        module.net[2].eval()
        return F.cross_entropy(module(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="MultiSampleDropout: the layer 'net.2' is not in training mode"):
        ours = train(sampled(), step=frozen)
    assert same_weights(ours, train(step=frozen))

    def awake(module, batch):
        module.eval()
        module.net[2].train()
        return F.cross_entropy(module(batch[0]), batch[1])

    assert same_weights(train(sampled(), step=awake), train(sampled()))


def test_a_pass_without_gradient_is_left_alone():
    shapes = []

    def step(module, batch):
        with torch.no_grad():
            shapes.append(module(batch[0]).shape[0])
        return F.cross_entropy(module(batch[0]), batch[1])

    spy = Spy("net.3")
    train(sampled(), spy, step=step)
    assert [len(rows) for rows in spy.inputs] == [8, 32] * 4
    assert shapes == [8] * 4


def test_validation_is_left_alone():
    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self.net[2].train()
            self.shape = self(batch[0]).shape

    module = Validated(dropout=0.5, lr=0.2)
    seed_everything(1, verbose=False)
    make_trainer(max_epochs=1, callbacks=[sampled()]).fit(module, make_loader(), make_loader())
    assert module.shape == (8, 3)


# -- what the user's code sees ----------------------------------------------------------------------------------------


def test_the_users_code_sees_the_rows_of_the_batch():
    seen = []

    def step(module, batch):
        x, y = batch
        logits = module(x)
        loss = F.cross_entropy(logits, y)
        seen.append((logits.argmax(1) == y).float().mean())
        with torch.no_grad():
            seen.append(F.cross_entropy(logits, y).item())
        return loss

    assert same_weights(train(sampled(), step=step), train(sampled()))
    assert len(seen) == 8


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("view", [lambda z: z[:, 0], lambda z: z.squeeze(-1), lambda z: z.flatten()])
def test_a_view_of_the_output_is_followed_to_the_loss(loss, view):
    def layers():
        return [nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)]

    def step(module, batch):
        return loss(view(module(batch[0])), (batch[1] > 0).float())

    one = train(sampled(), step=step, layers=layers)
    two = train(sampled(outputs="all"), step=step, layers=layers)
    assert same_weights(one, two, atol=1e-6)  # float32
    assert not same_weights(one, train(step=step, layers=layers), atol=1e-3)


def test_one_column_of_several_and_transposed_tokens_are_views_too():
    def column(module, batch):
        return F.mse_loss(module(batch[0])[:, 1], batch[1].float())

    assert same_weights(train(sampled(), step=column), train(sampled(outputs="all"), step=column), atol=1e-6)

    def tokens(module, batch):  # (B, T, C) to (B, C, T)
        return F.cross_entropy(module(batch[0].reshape(8, 2, 3)).transpose(1, 2), batch[1][:, None].repeat(1, 2))

    def flat(module, batch):
        return F.cross_entropy(module(batch[0].reshape(8, 2, 3)).view(-1, 3), batch[1].repeat_interleave(2))

    def layers():
        return [nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)]

    one, two = (train(sampled(), step=step, layers=layers) for step in (tokens, flat))
    assert same_weights(one, two, atol=1e-6)
    assert same_weights(one, train(sampled(outputs="all"), step=tokens, layers=layers), atol=1e-6)


def test_several_outputs_are_handed_out_each_by_itself():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)

        def forward(self, x):
            h = self.body(x)
            many = h.repeat(4, 1)  # as many rows as the copies have, but none of theirs
            return {"features": h, "many": many, "logits": self.head(self.drop(h))}

    def step(module, batch):
        found = module.net[0](batch[0])
        assert (len(found["features"]), len(found["many"]), len(found["logits"])) == (8, 32, 8)
        return F.cross_entropy(found["logits"], batch[1])

    train(sampled("net.0.drop"), step=step, layers=lambda: [Two()])


def test_layers_directly_on_the_module_and_a_head_behind_another_module():
    class Flat(Classifier):
        def __init__(self):
            super().__init__(lr=0.2)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.net[3](self.drop(self.net[1](self.net[0](x))))

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            assert len(logits) == len(batch[0])
            return F.cross_entropy(logits, batch[1])

    module = Flat()
    fit(module, sampled("drop"), max_epochs=1)
    assert same_weights(module.net, train(sampled()).net, atol=1e-6)

    def parts(module, batch):
        logits = module.net[3](module.net[2](module.net[1](module.net[0](batch[0]))))
        return F.cross_entropy(logits, batch[1])

    # Between modules called from training_step itself all rows travel, up to the head that is named.
    with pytest.raises(MisconfigurationException, match=r"MultiSampleDropout\(head=\"...\"\)"):
        train(sampled("net.0.1"), step=behind, layers=behind_layers)
    one = train(sampled("net.0.1", head="net.1"), step=behind, layers=behind_layers)
    assert same_weights(one, train(sampled("net.0.1", outputs="all"), step=behind, layers=behind_layers), atol=1e-6)
    assert same_weights(train(sampled(), step=parts), train(sampled()), atol=1e-6)


def test_layers_behind_the_one_around_are_in_the_head_if_one_module_calls_them_all():
    one, two = (train(sampled("net.0.1", **options), layers=behind_layers) for options in ({}, {"outputs": "all"}))
    assert same_weights(one, two, atol=1e-6)  # float32


def behind(module, batch):
    return F.cross_entropy(module.net[1](module.net[0](batch[0])), batch[1])


def behind_layers():
    return [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)), nn.Linear(8, 3)]


def test_two_passes_in_one_step_are_sampled_each_by_itself():
    def twice(module, batch):
        x, y = batch
        return F.cross_entropy(module(x), y) + 0.5 * F.cross_entropy(module(x + 1), y)

    one, two = (train(sampled(**options), step=twice) for options in ({}, {"outputs": "all"}))
    assert same_weights(one, two, atol=1e-6)


class Around(Classifier):
    def __init__(self, net, **kwargs):
        super().__init__(**kwargs)
        self.net = net


class Parts(Classifier):
    """Layers that are called one by one; notes the rows that the last one and the step see."""

    def __init__(self, step, p=0.0, **kwargs):
        super().__init__(step=step, **kwargs)
        self.body, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(p), nn.Linear(8, 3)
        self.rows = []

    def logits(self, x):
        logits = self.last(self.drop(self.body(x)))
        self.rows.append(len(logits))
        return logits


@pytest.mark.parametrize("number", [3, 4])
def test_a_pass_with_m_times_the_rows_of_the_one_before_is_no_copy_of_it(number):
    def step(module, batch):
        few, all_ = module.logits(batch[0][:2]), module.logits(batch[0])
        return F.cross_entropy(few, batch[1][:2]) + F.cross_entropy(all_, batch[1])

    runs, widths = [], []
    for techniques in ([], [MultiSampleDropout("drop", num_samples=number, head="last")]):
        seed_everything(2)
        module, losses = Parts(step), StepLosses()
        module.last.register_forward_pre_hook(lambda layer, args: widths.append(len(args[0])))
        fit(module, *techniques, losses, max_epochs=1)
        assert module.rows == [2, 8] * 4
        runs.append(losses.losses)
    assert widths == [2, 8] * 4 + [2 * number, 8 * number] * 4
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.drop, self.gate, self.last = nn.Linear(6, 8), nn.Dropout(0.0), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x):
        h = self.drop(self.body(x))
        return self.last(h), self.gate(h).softmax(1).mean(0)


@pytest.mark.parametrize("number", [3, 4])
def test_a_value_over_all_rows_is_not_cut(number):
    def step(module, batch):
        logits, load = module.net(batch[0])
        assert load.shape == (4,)
        return F.cross_entropy(logits, batch[1]) + 4 * load.square().sum()

    runs = []
    for techniques in ([], [MultiSampleDropout("net.drop", num_samples=number)]):
        losses = StepLosses()
        seed_everything(2)
        fit(Around(Experts(), step=step), *techniques, losses)
        runs.append(losses.losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


class Sequences(nn.Module):
    """Tokens through dropout and a recurrent layer that takes the samples as second dimension."""

    def __init__(self, layer, samples_first):
        super().__init__()
        self.samples_first = samples_first
        self.body, self.drop, self.layer, self.last = nn.Linear(6, 8), nn.Dropout(0.0), layer, nn.Linear(8, 3)

    def forward(self, x):
        h = self.drop(self.body(x if self.samples_first else x.transpose(0, 1)))
        h = self.layer(h.transpose(0, 1) if self.samples_first else h)
        h = h[0] if isinstance(h, tuple) else h
        return self.last(h.transpose(0, 1) if self.samples_first else h)


@pytest.mark.parametrize("samples_first", [True, False])
@pytest.mark.parametrize("steps", [3, 8, 16])
@pytest.mark.parametrize("make", [lambda: nn.GRU(8, 8), lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)])
def test_copies_never_lie_along_time(make, steps, samples_first):
    x, y = torch.randn(16, steps, 6), torch.randint(0, 3, (16, steps))

    def step(module, batch):
        labels = batch[1] if samples_first else batch[1].t()
        return F.cross_entropy(module.net(batch[0]).flatten(0, 1), labels.reshape(-1))

    def run(*techniques):
        losses = StepLosses()
        seed_everything(2)
        net = Sequences(make(), samples_first)
        fit(Around(net, step=step), *techniques, losses, loader=DataLoader(TensorDataset(x, y), 8))
        return losses.losses

    if samples_first:
        assert run(MultiSampleDropout("net.drop", num_samples=4)) == pytest.approx(run(), rel=1e-5)
        return
    who = "'net.drop' gets" if steps == 3 else "'net.layer(.self_attn)?', which runs after 'net.drop', takes"
    with pytest.raises(MisconfigurationException, match=f"{who} the samples as second dimension"):
        run(MultiSampleDropout("net.drop", num_samples=4))


def test_a_part_of_the_batch_is_logged_too():
    def step(module, batch):
        return F.cross_entropy(module.net(batch[0][:3]), batch[1][:3])

    seed_everything(2)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    trainer = fit(Around(net, step=step), MultiSampleDropout("net.1", num_samples=4))
    assert trainer.logged_metrics["reg/multi_sample_dropout/spread"] > 0


class Named(nn.Linear):
    def forward(self, x):
        return {"h": super().forward(x)}


class Shifting(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.drop, self.last = kind(6, 8), nn.Dropout(0.0), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, x):
        h = self.body(x)
        if isinstance(h, dict):
            h["h"] = h["h"] + self.shift
            h = h["h"]
        else:
            h += self.shift
        return self.last(self.drop(h))


@pytest.mark.parametrize("kind", [nn.Linear, Named])
def test_a_replay_gives_each_pass_the_backbones_own_output(kind):
    runs = []
    for techniques in ([], [MultiSampleDropout("net.drop", num_samples=4, mode="replay", backbone="net.body")]):
        losses = StepLosses()
        seed_everything(2)
        fit(Around(Shifting(kind)), *techniques, losses)
        runs.append(losses.losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)


def test_features_that_other_techniques_read_are_those_of_the_first_copy():
    watch = Watch("net.3")
    module = train(sampled(), watch)
    hand = train(sampled(), step=first_copy)
    assert same_weights(module, hand, atol=1e-6)


def first_copy(module, batch):
    logits = module(batch[0])
    return F.cross_entropy(logits, batch[1]) + 0.1 * logits.square().mean()


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(*words, **kwargs):
    with pytest.raises(MisconfigurationException) as raised:
        train(kwargs.pop("technique", sampled()), **kwargs)
    for word in ("MultiSampleDropout", *words):
        assert word in str(raised.value)


def test_a_layer_that_is_not_called_or_is_used_as_a_function():
    def functional(module, batch):
        h = F.dropout(module.net[1](module.net[0](batch[0])), module.net[2].p, module.net[2].training)
        return F.cross_entropy(module.net[3](h), batch[1])

    refused("'net.2' was not called in the first training step", "F.dropout", "'net.2'.", step=functional)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.attention.drop = nn.Dropout(0.5)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            x = x[:, None]
            return self.out(self.attention(x, x, x)[0][:, 0])

    technique = sampled("net.0.attention.drop")
    refused("was not called in the first training step", technique=technique, layers=lambda: [Attention()])
    technique = sampled("net.0.attention")
    refused("is a MultiheadAttention", "none of torch's", technique=technique, layers=lambda: [Attention()])


def test_names_that_match_nothing():
    refused("no layer is named 'net.7'", "'net.2'", technique=sampled("net.7"))
    refused("no layer is named 'hed'", technique=sampled(head="hed"))
    refused("no layer is named 'bone'", technique=sampled(mode="replay", backbone="bone"))
    refused("no layer is named 'net.7'", technique=sampled("net.7", num_samples=1))


def with_norm(norm, position):
    def layers():
        made = [nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3)]
        return [*made[:position], norm(), *made[position:]]

    return layers


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(8), lambda: nn.BatchNorm1d(8, track_running_stats=False)])
def test_batch_normalization_after_the_layer_is_refused(norm):
    refused("the batch normalization 'net.4' runs after 'net.2'", "4 copies", layers=with_norm(norm, 4))
    refused("'net.4'", technique=sampled(outputs="all"), layers=with_norm(norm, 4))


def test_batch_normalization_elsewhere_is_not():
    train(sampled("net.3"), layers=with_norm(lambda: nn.BatchNorm1d(8), 1))
    train(sampled(), layers=with_norm(lambda: nn.LayerNorm(8), 4))

    def step(module, batch):
        module.net[4].eval()
        return F.cross_entropy(module(batch[0]), batch[1])

    train(sampled(), step=step, layers=with_norm(lambda: nn.BatchNorm1d(8), 4))


def test_a_replay_takes_batch_normalization_in_the_head():
    replay = sampled(mode="replay", backbone="net.1")
    module = train(replay, layers=with_norm(lambda: nn.BatchNorm1d(8), 4))
    assert module.net[4].num_batches_tracked.item() == 4 * 4


def test_a_loss_that_the_copies_do_not_reach():
    def written(module, batch):
        return -module(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    refused("no loss function of torch got the output", "'net.2'", 'mode="replay"', step=written)
    replay = train(sampled(mode="replay", backbone="net.1"), step=written)
    assert same_weights(replay, train(sampled()), atol=1e-6)

    def soft(module, batch):
        return F.nll_loss(module(batch[0]).log_softmax(1), batch[1])

    refused('outputs="all"', step=soft)
    assert same_weights(train(sampled(outputs="all"), step=soft), train(sampled()), atol=1e-6)

    def in_place(module, batch):
        logits = module(batch[0])
        logits *= 2
        return F.cross_entropy(logits, batch[1])

    refused("is changed in place before the loss", step=in_place)


def test_inputs_that_cannot_be_sampled():
    def step(module, batch):
        return F.cross_entropy(module.net[2](module.net[1](module.net[0](batch[0]))), batch[1])

    refused("cannot be sampled on an input of shape (8, 3)", "Dropout1d", step=step, layers=one_dimensional)
    refused("its rate below 1", layers=lambda: [nn.Linear(6, 3), nn.ReLU(), nn.Dropout(1.0)])


def one_dimensional():
    return [nn.Linear(6, 3), nn.ReLU(), nn.Dropout1d(0.5)]


class Joined(nn.Module):
    """Joins what it got with what a dropout layer makes of it."""

    def __init__(self, join):
        super().__init__()
        self.drop, self.join = nn.Dropout(0.5), join

    def forward(self, x):
        return self.join(x, self.drop(x))


@pytest.mark.parametrize(
    "join", [torch.add, lambda x, h: torch.cat([x, h], 1)[:, :3]], ids=["residual", "across a UNet"]
)
def test_a_connection_past_the_copies_is_refused_in_one_sentence(join):
    with pytest.raises(MisconfigurationException) as raised:
        train(sampled("net.1.drop"), layers=lambda: [nn.Linear(6, 3), Joined(join)])
    said = str(raised.value)
    assert said.startswith(
        "MultiSampleDropout: what follows 'net.1.drop' runs on 4 copies of the 8 rows, and is joined there with a"
        " tensor of 8 rows, by a connection across a UNet or a residual one; torch says: "
    )
    assert said.endswith(
        "Name a dropout layer that nothing but layers follows, or pass"
        ' `MultiSampleDropout(mode="replay", backbone="...")`.'
    )
    cause = raised.value.__cause__
    assert isinstance(cause, RuntimeError)
    assert f"torch says: {cause} Name" in said


def test_an_error_of_another_kind_says_what_rows_there_are_besides():
    def breaks(x, h):
        raise RuntimeError("of 32 and 7")

    with pytest.raises(RuntimeError, match="of 32 and 7") as raised:
        train(sampled("net.1.drop"), layers=lambda: [nn.Linear(6, 3), Joined(breaks)])
    if hasattr(raised.value, "__notes__"):  # Python 3.11
        assert "runs on 4 copies of the 8 rows (MultiSampleDropout)" in raised.value.__notes__[0]


def test_setups_that_are_refused_by_name():
    class Mixed(LossMixin, Classifier):
        def training_step(self, batch, batch_idx):
            return self.reduce_loss(F.cross_entropy(self(batch[0]), batch[1], reduction="none"))

    with pytest.raises(MisconfigurationException, match="MultiSampleDropout: the module computes its losses itself"):
        fit(Mixed(dropout=0.5), sampled())
    module = Mixed(dropout=0.5, lr=0.2)
    fit(module, sampled(mode="replay", backbone="net.1"), max_epochs=1)
    assert same_weights(module, train(sampled()), atol=1e-6)
    replay = sampled(mode="replay", backbone="net.1")
    with pytest.raises(MisconfigurationException, match="MultiSampleDropout runs the training step 4 times"):
        fit(Classifier(dropout=0.5), replay, Term())
    with pytest.raises(MisconfigurationException, match="each lets a part of the network run on several copies"):
        fit(Classifier(dropout=0.5), sampled(), sampled(name="two"))
    module = Classifier(dropout=0.5)
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="MultiSampleDropout runs `training_step` 4 times for one opti"):
        fit(module, replay)
    with pytest.raises(MisconfigurationException, match=r"the backbone 'net\.2' was not called in the training step"):
        train(sampled(mode="replay", backbone="net.2"), step=around)


DEEP = [nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)]


def checkpointed(reentrant, begin, end):
    """Layers from one to another are run once more in the backward pass."""

    class Kept(nn.Sequential):
        def forward(self, x):
            run = partial(nn.Sequential.forward, self)
            return run(x) if reentrant is None else checkpoint(run, x.requires_grad_(), use_reentrant=reentrant)

    layers = copy.deepcopy(DEEP)
    return [*layers[:begin], Kept(*layers[begin:end]), *layers[end:]]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("begin", "end", "dropout"), [(0, 2, "net.1"), (3, 4, "net.2")], ids=["before the layer", "behind it"]
)
def test_checkpoints_around_other_layers_change_nothing(reentrant, begin, end, dropout):
    plain, again = (
        train(sampled(dropout), layers=partial(checkpointed, kind, begin, end)) for kind in (None, reentrant)
    )
    assert same_weights(plain, again)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("begin", "end", "dropout", "name", "options"),
    [
        (0, 4, "net.0.2", r"net\.0\.2", {}),
        (0, 4, "net.0.2", r"net\.0\.2", {"outputs": "all"}),
        (0, 4, "net.0.2", r"net\.0\.2", {"mode": "replay", "backbone": "net.0.1"}),
        (3, 5, "net.2", r"net\.3\.1", {}),
    ],
)
def test_checkpoints_around_what_is_sampled_are_refused(reentrant, begin, end, dropout, name, options):
    losses = StepLosses()
    sentence = rf"^MultiSampleDropout puts copies in the place of what '{name}' returns, .* Checkpoint the layers"
    with pytest.raises(MisconfigurationException, match=sentence):
        train(sampled(dropout, **options), losses, layers=partial(checkpointed, reentrant, begin, end))
    assert not losses.losses


def around(module, batch):
    return F.cross_entropy(module.net[3](module.net[1](module.net[0](batch[0]))), batch[1])


# -- replays ----------------------------------------------------------------------------------------------------------


def test_a_replay_logs_counts_and_draws_once():
    class Logging(Classifier):
        def __init__(self):
            super().__init__(dropout=0.5, lr=0.2)
            self.metric, self.logged = SumMetric(), []

        def log(self, name, value, **kwargs):
            self.logged += [name] * (not name.startswith("reg/"))

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.metric(len(x))
            loss = F.cross_entropy(self(x), y)
            self.log("loss", loss)
            return {"loss": loss, "first": loss.detach()}

    module = Logging()
    outputs = StepLosses()
    fit(module, sampled(mode="replay", backbone="net.1"), outputs, max_epochs=1)
    assert module.logged == ["loss"] * 4
    assert module.metric.compute().item() == 32
    assert same_weights(module.net, train(sampled()).net, atol=1e-6)
    state = torch.get_rng_state()
    fit(Classifier(dropout=0.5, lr=0.2), max_epochs=1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_replay_keeps_its_backbone_whatever_it_returns():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(6, 8), 0

        def forward(self, x):
            self.calls += 1
            return {"h": self.layer(x).relu()}

    def step(module, batch):
        h = module.net[0](batch[0])["h"]
        return F.cross_entropy(module.net[2](module.net[1](h)), batch[1])

    def layers():
        return [Body(), nn.Dropout(0.5), nn.Linear(8, 3)]

    module = train(sampled("net.1", mode="replay", backbone="net.0"), step=step, layers=layers)
    assert module.net[0].calls == 4
    assert same_weights(module, train(sampled("net.1", outputs="all"), step=step, layers=layers), atol=1e-6)
    assert "forward" not in vars(module.net[0])


# -- machinery around it ----------------------------------------------------------------------------------------------


def on_a_rank(options):
    shapes, spy = [], Spy("net.3")

    def step(module, batch):
        logits = module(batch[0])
        shapes.append(len(logits))
        return F.cross_entropy(logits, batch[1])

    module = Classifier(step=step, dropout=0.5, lr=0.2)
    fit(module, sampled(**options), spy, max_epochs=1, **TWO_RANKS)
    return shapes, [(rows != 0).tolist() for rows in spy.inputs], weights_of(module)


@pytest.mark.parametrize("options", [{}, {"mode": "replay", "backbone": "net.1"}], ids=["batched", "replay"])
def test_ranks_have_other_masks_and_see_their_own_rows(two_processes, options):
    (shapes, masks, weights), (_, others, other_weights) = two_processes.run(on_a_rank, options)
    assert shapes == [8] * (2 if not options else 8)
    assert all(one != two for one, two in zip(masks, others, strict=True))
    assert same_weights(weights, other_weights)


# Dynamo hides this warning in a way that "error" prevents.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("where", ["net", "module"])
def test_compiled_as_in_eager_code(where):
    torch.compiler.reset()
    eager, module = train(sampled()), Classifier(dropout=0.5, lr=0.2)
    if where == "net":
        module.net = torch.compile(module.net, backend="eager")
    fit(module if where == "net" else torch.compile(module, backend="eager"), sampled(), max_epochs=1)
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights_of(module).items()}
    assert same_weights(weights, weights_of(eager), atol=1e-6)
    torch.compiler.reset()


def test_masks_are_in_the_type_of_the_activation():
    spy = Spy("net.3")
    train(sampled(), spy, precision="bf16-mixed")
    assert {rows.dtype for rows in spy.inputs} == {torch.bfloat16}


def test_a_loss_inside_the_network_of_transformers():
    transformers = pytest.importorskip("transformers")
    tiny = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.BertConfig(
        **tiny, num_attention_heads=2, num_labels=3, hidden_dropout_prob=0.0, classifier_dropout=0.5
    )
    seen = []

    def step(module, batch):
        output = module.net[0](input_ids=(20 * batch[0]).long(), labels=batch[1])
        seen.append((output.logits.shape, output.loss.item()))
        return output.loss

    spy = Spy("net.0.classifier")
    module = Classifier(step=step, lr=0.0)
    module.net = nn.Sequential(transformers.BertForSequenceClassification(config))
    fit(module, sampled("net.0.dropout"), spy, max_epochs=1)
    for (shape, loss), rows, y in zip(seen, spy.inputs, make_tensors()[1].split(8), strict=True):
        assert (shape, rows.shape) == ((8, 3), (32, 16))
        own = [F.cross_entropy(module.net[0].classifier(copy), y).item() for copy in rows.split(8)]
        assert len(set(own)) == 4
        assert loss == pytest.approx(sum(own) / 4, rel=1e-5)  # float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI, of jsonargparse
def test_yaml_reaches_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_reg.MultiSampleDropout\n"
        "      init_args: {dropout: head.0, num_samples: 16, p: 0.3, mode: replay, backbone: body}\n"
    )
    options = {"run": False, "save_config_callback": None, "seed_everything_default": 1}
    technique = LightningCLI(BoringModel, args=["--config", str(config)], **options).trainer.callbacks[0]
    assert (technique.dropout, technique.num_samples, technique.p, technique.backbone) == ("head.0", 16, 0.3, "body")
    assert technique.describe() == "16 samples of head.0, p=0.3; replay, body once"


def test_logs_how_far_the_copies_losses_lie_apart():
    spy = Spy("net.3")
    module = Classifier(dropout=0.5, lr=0.0)
    trainer = fit(module, sampled(), spy, max_epochs=1)
    losses = [F.cross_entropy(module.net[3](rows), make_tensors()[1][-8:]) for rows in spy.inputs[-1].split(8)]
    spread = trainer.callback_metrics["reg/multi_sample_dropout/spread"].item()
    assert spread == pytest.approx(torch.stack(losses).std().item(), rel=1e-4)


def test_digits_are_learned_faster_with_more_samples():
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train_set = order[:600]
    loss = {}
    for num_samples in (1, 8):
        losses = []
        for seed in range(2):
            torch.manual_seed(seed)
            module = Classifier(lr=0.3)
            module.net = nn.Sequential(
                nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.7), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
            )
            loader = DataLoader(TensorDataset(x[train_set], y[train_set]), 32, shuffle=True)
            fit(
                module, sampled(num_samples=num_samples), loader=loader, seed=seed, max_epochs=25, log_every_n_steps=100
            )
            losses.append(F.cross_entropy(module.eval()(x[train_set]), y[train_set]).item())
        loss[num_samples] = sum(losses) / 2
    assert loss[8] < 0.7 * loss[1]  # 0.070 against 0.169
