"""Grokking on wrong labels: participation ratios, the closed form, the data whose truth is known, the networks."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_reg import CorruptedModularArithmetic, IPRMonitor, ModularTransformer, QuadraticMLP
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    discrete_logarithm_order,
    gain_correlation,
    inverse_participation_ratio,
    modular_table,
    neuron_participation_ratios,
    neurons_by_ratio,
    peak_frequencies,
    prune_memorising,
    training_phase,
    without_memorising,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.lightning_module import DataModuleCase
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.problems import KINDS, Problem, seeded
from tests.toys import QUIET, make_trainer

pytestmark = QUIET
PAIRS = torch.tensor([[2, 6], [0, 1], [4, 4]])


def made(cls, **options):
    with seeded(0):
        return cls(**{"p": 7, "width": 12, **options})


def two_kinds():
    """Half of the neurons add modulo 7, the others are single spikes."""
    network = QuadraticMLP.analytic(7, 12)
    network.hidden.weight.data[6:] = torch.eye(14)[:6]
    network.head.weight.data[:, 6:] = torch.eye(7)[:, :6]
    return network


def sizes(network):
    return {"hidden": float(network.hidden.weight[6:].float().norm()), "head": float(network(PAIRS).float().norm())}


PLAIN = KINDS["classification"]


def numbered(size):
    return PLAIN.data(size)


PROBLEM = Problem(PLAIN.net, numbered, F.cross_entropy, serves=["classification"])
watching = partial(IPRMonitor, "net.first", blocks=2)

CASE = (
    Case(
        make=watching,
        neutral=watching,  # at any setting it leaves training alone
        by_hand=Hand,
        says=["watches net.first: low below 0.2, high from 0.5"] * 2
        + ["watches net.first and net.head: low below 0.3, high from 0.3"],
        data=PROBLEM,
        variants=[partial(watching, output_layer="net.head", low=0.3, high=0.3)],
        trains_as_plain=True,  # it watches
        invalid=[
            ({"blocks": 0}, "blocks"),
            ({"low": 0.0}, "low"),
            ({"low": 0.6}, "low"),
            ({"high": 0.0}, "high"),
            ({"high": 1.0}, "high"),
        ],
    ),
    ProcedureCase(
        prune_memorising,
        two_kinds,
        (torch.tensor([0.0, 0.5]), sizes),
        invalid=[({"order": "first"}, "order")],
    ),
    NetworkCase(
        partial(made, QuadraticMLP),
        (PAIRS,),
        [({"p": 1}, "p"), ({"width": 0}, "width"), ({"dropout": 1.0}, "dropout"), ({"dropout": -0.1}, "dropout")],
    ),
    NetworkCase(
        partial(made, ModularTransformer),
        (PAIRS,),
        [
            ({"p": 1}, "p"),
            ({"heads": 0}, "heads"),
            ({"width": 0}, "width"),
            ({"width": 10}, "width"),
            ({"dropout": 1.0}, "dropout"),
            ({"dropout": -0.1}, "dropout"),
        ],
    ),
    DataModuleCase(
        CorruptedModularArithmetic,
        {"p": 7, "corruption": 0.25, "encoding": "onehot", "batch_size": 5, "seed": 3},
        [
            ({"p": 2}, "p"),
            ({"train_fraction": 0.0}, "train_fraction"),
            ({"train_fraction": 1.0}, "train_fraction"),
            ({"train_fraction": 0.001}, "train_fraction"),
            ({"corruption": 1.0}, "corruption"),
            ({"corruption": -0.1}, "corruption"),
            ({"batch_size": 0}, "batch_size"),
            ({"seed": -1}, "seed"),
        ],
    ),
)


def ratio_by_loops(values, power=2):
    p = len(values)
    amplitudes = []
    for j in range(p // 2 + 1):
        turns = [2 * math.pi * j * i / p for i in range(p)]
        cosine = sum(v * math.cos(t) for v, t in zip(values, turns, strict=True))
        sine = sum(v * math.sin(t) for v, t in zip(values, turns, strict=True))
        amplitudes.append(math.hypot(cosine, sine))
    size = math.sqrt(sum(a * a for a in amplitudes))
    return sum((a / size) ** (2 * power) for a in amplitudes)


def test_ratios_are_those_of_the_formula_and_of_known_sequences():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 11, generator=draw, dtype=torch.double)
    for power in (2, 3):
        wanted = [ratio_by_loops(row, power) for row in values.tolist()]
        assert inverse_participation_ratio(values, power).tolist() == pytest.approx(wanted, abs=1e-12)
    assert ratio_by_loops(torch.eye(97)[5].tolist()) == pytest.approx(1 / 49, abs=1e-9)
    angle = 2 * math.pi * torch.arange(97, dtype=torch.double) / 97
    known = torch.stack(
        [(5 * angle + 0.3).cos(), torch.eye(97, dtype=torch.double)[5], torch.ones(97), torch.zeros(97)]
    )
    assert inverse_participation_ratio(known).tolist() == pytest.approx([1, 1 / 49, 1, 0], abs=1e-9)
    gaussian = torch.randn(4000, 97, generator=draw)
    assert float(inverse_participation_ratio(gaussian).mean()) == pytest.approx(0.040, abs=5e-4)  # 4,000 draws


def test_scale_and_shift_do_not_matter_and_half_precision_is_read():
    values = torch.randn(5, 13, generator=torch.Generator().manual_seed(1))
    wanted = inverse_participation_ratio(values)
    for other in (values * 1e-30, values * 1e30, values.roll(4, -1)):  # squares would be out of range
        torch.testing.assert_close(inverse_participation_ratio(other), wanted, rtol=1e-4, atol=1e-5)  # float32
    half = inverse_participation_ratio(values.bfloat16())
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, inverse_participation_ratio(values.bfloat16().float()))
    with pytest.raises(ValueError, match="`power` must be at least 2, got 1"):
        inverse_participation_ratio(values, 1)


def test_a_neuron_has_the_mean_over_its_sequences_in_their_order():
    inputs, outputs = torch.randn(4, 14), torch.randn(7, 4)
    rows = [(inputs[k, :7], inputs[k, 7:], outputs[:, k]) for k in range(4)]
    wanted = [sum(ratio_by_loops(row.tolist()) for row in three) / 3 for three in rows]
    assert neuron_participation_ratios(inputs, outputs).tolist() == pytest.approx(wanted, abs=1e-5)
    assert neuron_participation_ratios(inputs).tolist() == pytest.approx(
        [sum(ratio_by_loops(row.tolist()) for row in three[:2]) / 2 for three in rows], abs=1e-5
    )
    order = discrete_logarithm_order(7)
    assert order.tolist() == [1, 3, 2, 6, 4, 5]
    periodic = torch.zeros(1, 14)
    for place, residue in enumerate(order.tolist()):
        periodic[0, residue] = periodic[0, 7 + residue] = math.cos(2 * math.pi * 2 * place / 6)
    assert neuron_participation_ratios(periodic, order=order).item() == pytest.approx(1, abs=1e-6)
    assert neuron_participation_ratios(periodic).item() < 0.9
    assert peak_frequencies(periodic, order=order).tolist() == [2]
    assert peak_frequencies(torch.ones(1, 14)).tolist() == [0]
    for composite in (4, 6, 9, 10, 15):
        with pytest.raises(ValueError, match=f"`p` must be a prime above 2, got {composite}"):
            discrete_logarithm_order(composite)


def test_the_closed_form_adds_without_training():
    network = QuadraticMLP.analytic(97, 388)
    pairs, sums = modular_table(97)
    outputs = network(pairs).detach()
    assert torch.equal(outputs.argmax(1), sums)
    assert float(outputs.gather(1, sums[:, None]).mean()) == pytest.approx(1.0, abs=0.1)
    ratios = neuron_participation_ratios(network.hidden.weight.detach(), network.head.weight.detach())
    torch.testing.assert_close(ratios, torch.ones(388))


def test_the_network_of_squares_is_its_formula_for_residues_and_one_hot_rows():
    network, data = made(QuadraticMLP), CorruptedModularArithmetic(7, encoding="onehot")
    first, second = network.hidden.weight.split(7, 1)
    wanted = torch.stack(
        [sum(network.head.weight[:, k] * (first[k, m] + second[k, n]) ** 2 for k in range(12)) for m, n in PAIRS]
    )
    torch.testing.assert_close(network(PAIRS), wanted)
    x = data.train_pairs.x
    pairs = torch.stack([x[:, :7].argmax(1), x[:, 7:].argmax(1)], 1)
    torch.testing.assert_close(network(x), network(pairs))
    assert float(QuadraticMLP(97, 500).head.weight.detach().std()) == pytest.approx(0.05, rel=0.05)  # drawn


def test_pairs_and_wrong_labels_are_counted_and_known():
    data = CorruptedModularArithmetic(11, train_fraction=0.6, corruption=0.35, seed=5)
    (x, y, index), (tested, right, _) = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert (len(y), int(data.is_corrupted.sum()), len(right)) == (72, 25, 49)
    assert torch.equal(index, torch.arange(72))
    assert torch.equal(data.y_clean, x.sum(1) % 11)
    assert torch.equal(right, tested.sum(1) % 11)
    assert torch.equal(y[~data.is_corrupted], data.y_clean[~data.is_corrupted])
    assert int((y != data.y_clean).sum()) > 15
    assert len({*map(tuple, torch.cat([x, tested]).tolist())}) == 121
    product = CorruptedModularArithmetic(11, "multiply", corruption=0.0)
    assert torch.equal(product.y_clean, product.train_pairs.x.prod(1) % 11)
    found = CorruptedModularArithmetic(11, corruption=0.35).accuracies(QuadraticMLP.analytic(11, 1100))
    assert (found.clean, found.test) == (1.0, 1.0)
    assert found.corrupted < 0.3 < found.train < 0.8


def test_each_epoch_is_another_order_of_the_same_pairs():
    loader = CorruptedModularArithmetic(7, batch_size=24).train_dataloader()
    (one,) = [batch[2] for batch in loader]
    loader.sampler.set_epoch(1)
    (two,) = [batch[2] for batch in loader]
    assert not torch.equal(one, two)
    assert torch.equal(one.sort().values, two.sort().values)


def test_phases_orders_and_gains():
    phases = [(0.9, 0.9), (0.89, 0.9), (0.851, 0.9), (0.849, 0.9), (0.9, 0.89), (0.89, 0.89)]
    assert [training_phase(train, test, 0.2) for train, test in phases] == [
        "coexistence", "partial inversion", "partial inversion", "full inversion", "memorisation", "confusion",
    ]  # fmt: skip
    ratios = torch.tensor([0.5, 0.1, 0.9])
    assert neurons_by_ratio(ratios, "highest").tolist() == [2, 0, 1]
    assert sorted(neurons_by_ratio(ratios, "random", torch.Generator()).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="`order` must be 'lowest', 'highest' or 'random', got 'first'"):
        neurons_by_ratio(ratios, "first")
    assert gain_correlation(torch.tensor([0.1, -0.3, 0.2]), torch.tensor([0.0, 1.0, 0.5])).item() == pytest.approx(1.0)
    assert gain_correlation(torch.ones(3), ratios).item() == 0.0


def test_pruning_takes_whole_neurons_in_order_and_leaves_the_network():
    network, fractions = two_kinds(), torch.tensor([0.0, 0.5, 1.0])
    table = prune_memorising(network, fractions, sizes)
    assert table.neurons.tolist() == [0, 6, 12]
    whole, half = network(PAIRS).detach(), without_memorising(network, 0.5)
    assert table.scores["hidden"].tolist() == pytest.approx([6**0.5, 0, 0])
    assert table.scores["head"].tolist() == pytest.approx([float(whole.norm()), float(half(PAIRS).detach().norm()), 0])
    assert torch.equal(half.hidden.weight[:6], network.hidden.weight[:6])
    assert not half.hidden.weight[6:].any()
    assert not half.head.weight[:, 6:].any()
    assert torch.equal(without_memorising(network, below=0.9).hidden.weight, half.hidden.weight)
    assert torch.equal(without_memorising(network, 0.0)(PAIRS), whole)
    other = prune_memorising(network, fractions, sizes, order="highest")
    assert other.scores["hidden"].tolist() == pytest.approx([6**0.5, 6**0.5, 0])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, "one of `fraction` and `below` must be in"),
        ({"fraction": 0.5, "below": 0.2}, ValueError, "got 0.5 and 0.2"),
        ({"below": 1.5}, ValueError, "got None and 1.5"),
        ({"below": 0.5, "blocks": 1}, ValueError, "do not fit"),
        (
            {"below": 0.5, "input_layer": "hiden"},
            ValueError,
            "there is no layer 'hiden'",
        ),
        ({"below": 0.5, "input_layer": "dropout"}, ValueError, "must be a Linear or an Embedding"),
    ],
)
def test_what_cannot_be_pruned_is_told(options, error, words):
    with pytest.raises(error, match=words):
        without_memorising(two_kinds(), **options)


def test_an_embedding_has_a_neuron_in_each_column():
    pruned = without_memorising(made(ModularTransformer), 0.25, input_layer="tokens", blocks=1)
    assert (pruned.tokens.weight == 0).all(0).tolist() == (pruned.head.weight == 0).all(0).tolist()
    assert int((pruned.tokens.weight == 0).all(0).sum()) == 3


def test_shares_outside_their_range_are_refused():
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"`fractions` must be in \[0, 1\], got"):
            prune_memorising(two_kinds(), torch.tensor([share]), sizes)


def filled(network):
    for place, weight in enumerate(network.double().parameters()):
        values = torch.sin(torch.arange(weight.numel(), dtype=torch.double) * (place + 1) * 0.7)
        weight.data = 0.1 * values.reshape(weight.shape)
    return network


def test_numbers_are_those_of_the_authors_code():
    """Of d-doshi/Grokking at 0b4335f: `calculate_ipr`, `fcn` and `EncoderOnlyTransformers` with the weights above."""
    place = torch.arange(97, dtype=torch.double)
    cubes = place**3 % 97 - 48
    assert inverse_participation_ratio(place**2 % 97).item() == pytest.approx(0.696121939930594, abs=1e-12)
    assert inverse_participation_ratio(cubes).item() == pytest.approx(0.03669421487603305, abs=1e-12)
    assert inverse_participation_ratio(cubes, 3).item() == pytest.approx(0.0015774271642040236, abs=1e-12)
    squares = [0.0008388882164038671, -0.001655571127224186, 0.0006864841200934974, 0.0010230740577741825,
               -0.0016291007435987315, 0.0004779096008495432, 0.0011887753039393474]  # fmt: skip
    attended = [-0.0023557201061999464, -0.005706394717118189, 0.0015585225917352143, 0.005924124193952534,
                -0.0007309077286006695, -0.006026233818930931, -0.00011097210274423107]  # fmt: skip
    assert filled(QuadraticMLP(7, 12))(PAIRS[:1])[0].tolist() == pytest.approx(squares, abs=1e-12)
    assert filled(ModularTransformer(7, 8, 2))(PAIRS[:1])[0].tolist() == pytest.approx(attended, abs=1e-12)


# -- the monitor -------------------------------------------------------------------------------------------------------


class Adding(LightningModule):
    """A user's module with a network in it, and no `forward`."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def watched(net, *monitors, data=None, **options):
    module, data = Adding(net), CorruptedModularArithmetic(7, corruption=0.25) if data is None else data
    trainer = make_trainer(callbacks=list(monitors), max_epochs=4, num_sanity_val_steps=0, **options)
    trainer.fit(module, datamodule=data)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return module, {name.removeprefix("reg/ipr_monitor/"): value for name, value in logged.items()}


def rows_of(net):
    first, second = net.hidden.weight.detach().split(7, 1)
    return [(a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(first, second, net.head.weight.T, strict=True)]


def test_what_is_logged_is_of_the_weights_behind_the_step():
    net = made(QuadraticMLP, norm="batch")
    monitor = IPRMonitor("net.hidden", "net.head", low=0.4, high=0.45, norm_layer="net.norm", network="net")
    assert monitor.describe() == "watches net.hidden and net.head: low below 0.4, high from 0.45"
    _, logged = watched(net, monitor, log_every_n_steps=2)
    ratios = [sum(map(ratio_by_loops, three)) / 3 for three in rows_of(net)]
    gains, mean = net.norm.weight.detach().abs().tolist(), sum(ratios) / 12
    off = [(gain - sum(gains) / 12, ratio - mean) for gain, ratio in zip(gains, ratios, strict=True)]
    sizes = [math.sqrt(sum(one[side] ** 2 for one in off)) for side in (0, 1)]
    right = CorruptedModularArithmetic(7, corruption=0.25).accuracies(net)
    assert logged == pytest.approx({
        "mean_ratio": mean,
        "share_low": sum(ratio < 0.4 for ratio in ratios) / 12,
        "share_high": sum(ratio >= 0.45 for ratio in ratios) / 12,
        "share_constant": int((peak_frequencies(net.hidden.weight, net.head.weight) == 0).sum()) / 12,
        "gain_correlation": sum(a * b for a, b in off) / (sizes[0] * sizes[1]),
        **{f"{name}_accuracy": value for name, value in right._asdict().items()},
    }, abs=1e-5)  # fmt: skip  # float32
    assert 0 < logged["share_low"] < 1 > logged["share_high"] > 0


class Counted(CorruptedModularArithmetic):
    """Gives numbers of its own, and notes how often it was asked."""

    asked = 0

    def accuracies(self, module):
        self.asked += 1
        return {"even": 0.5, "odd": float("nan")}


def test_it_measures_on_logging_steps_once_however_many_batches_are_accumulated():
    data = Counted(7, corruption=0.25, batch_size=6)  # 4 batches an epoch
    _, logged = watched(
        made(QuadraticMLP), IPRMonitor("net.hidden", network="net"), data=data, accumulate_grad_batches=2,
        log_every_n_steps=2,
    )  # fmt: skip
    assert data.asked == 4  # 8 steps
    assert logged["even_accuracy"] == 0.5
    assert "odd_accuracy" not in logged


def test_weights_of_half_precision_one_hot_inputs_and_no_datamodule():
    data = CorruptedModularArithmetic(7, corruption=0.25, encoding="onehot")
    monitor = IPRMonitor("net.hidden", "net.head", network="net")
    module, logged = watched(made(QuadraticMLP), monitor, data=data, precision="bf16-true")
    assert module.net.hidden.weight.dtype is torch.bfloat16
    assert logged["train_accuracy"] == pytest.approx(data.accuracies(module.net).train)
    trainer = make_trainer(callbacks=[IPRMonitor("net.hidden", "net.head")], max_epochs=1)
    trainer.fit(Adding(made(QuadraticMLP)), data.train_dataloader(), data.val_dataloader())
    assert sorted(trainer.callback_metrics) == [
        f"reg/ipr_monitor/{name}" for name in ("mean_ratio", "share_constant", "share_high", "share_low")
    ]


def test_training_with_dropout_and_statistics_of_batches_is_left_alone():
    weights = []
    for monitors in ([], [IPRMonitor("net.hidden", "net.head", norm_layer="net.norm", network="net")]):
        with seeded(3):
            data = CorruptedModularArithmetic(7, corruption=0.25, batch_size=6)
            module, logged = watched(QuadraticMLP(7, 12, norm="batch", dropout=0.3), *monitors, data=data)
        weights.append(module.state_dict())
    assert "test_accuracy" in logged
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_layers_of_a_compiled_network_have_their_own_names():
    compiled = nn.ModuleDict({"_orig_mod": two_kinds()})  # names as `torch.compile` makes them, without its seconds
    left = prune_memorising(compiled, torch.tensor([0.5]), lambda net: sizes(net["_orig_mod"])).scores["hidden"]
    assert left.tolist() == [0.0]


def test_products_are_read_by_discrete_logarithm():
    net = made(QuadraticMLP)
    monitor = IPRMonitor("net.hidden", "net.head", operation="multiply", network="net")
    _, logged = watched(net, monitor)
    places = [1, 3, 2, 6, 4, 5]
    ratios = [sum(ratio_by_loops([row[i] for i in places]) for row in three) / 3 for three in rows_of(net)]
    assert logged["mean_ratio"] == pytest.approx(sum(ratios) / 12, abs=1e-6)
    plain = sum(sum(map(ratio_by_loops, three)) / 3 for three in rows_of(net)) / 12
    assert logged["mean_ratio"] != pytest.approx(plain, abs=1e-3)


def test_a_language_model_of_transformers_has_its_neurons_in_the_embedding():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 7, "n_positions": 4, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, x):
            return self.model(x).logits[:, -1]

    monitor = IPRMonitor("net.model.transformer.wte", "net.model.lm_head", blocks=1, network="net")
    module, logged = watched(Last(), monitor)
    tokens, head = module.net.model.transformer.wte.weight.detach(), module.net.model.lm_head.weight.detach()
    ratios = [
        (ratio_by_loops(a.tolist()) + ratio_by_loops(b.tolist())) / 2 for a, b in zip(tokens.T, head.T, strict=True)
    ]
    assert logged["mean_ratio"] == pytest.approx(sum(ratios) / 8, abs=1e-5)
    assert 0 <= logged["test_accuracy"] <= 1


class Wordy(CorruptedModularArithmetic):
    """Its accuracies have no names."""

    def accuracies(self, module):
        return 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_layer": "net.hiden"}, "there is no layer 'net.hiden'"),
        ({"input_layer": "net.norm"}, "layer 'net.norm' must be a Linear or an Embedding"),
        ({"blocks": 1}, r"'net.hidden' with 12 neurons of 14 inputs and 'net.head' of weight \(7, 12\) do not fit"),
        ({"blocks": 4, "output_layer": None}, "'net.hidden' with 12 neurons of 14 inputs does not fit: N neurons of"),
        ({"operation": "multiply", "output_layer": None, "blocks": 1}, "`p` must be a prime above 2, got 14"),
        ({"norm_layer": "net.nrom"}, "norm_layer='net.nrom' must name .* of 12 neurons, there is no such layer"),
        ({"norm_layer": "net.dropout"}, "norm_layer='net.dropout' must name .*, found none"),
        ({"norm_layer": "net.head"}, r"norm_layer='net.head' must name .*, found a weight \(7, 12\)"),
        ({"network": "nett"}, "there is no network 'nett'; there are net, net.hidden"),
        ({"network": None}, "the module has no `forward`. Name the network in it: network='net'"),
    ],
)
def test_what_cannot_be_watched_is_told_before_the_first_step(options, words):
    chosen = {"input_layer": "net.hidden", "output_layer": "net.head", "network": "net", **options}
    with pytest.raises(MisconfigurationException, match=words):
        watched(made(QuadraticMLP), IPRMonitor(**chosen))


def test_accuracies_without_names_are_refused():
    with pytest.raises(MisconfigurationException, match=r"must return numbers by name, .* got float"):
        watched(made(QuadraticMLP), IPRMonitor("net.hidden", network="net"), data=Wordy(7))


class Split(Adding):
    """Its network is split by ``fully_shard``."""

    def configure_model(self):
        if not any(isinstance(p, DTensor) for p in self.parameters()):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def on_shards():
    module, data = Split(made(QuadraticMLP)), CorruptedModularArithmetic(7, corruption=0.25)
    trainer = make_trainer(
        callbacks=[IPRMonitor("net.hidden", "net.head", network="net")],
        max_epochs=3,
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    )
    trainer.fit(module, datamodule=data)
    whole = {name: p.full_tensor().detach() for name, p in module.named_parameters()}
    return whole, {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_weights_that_are_split_over_processes_are_gathered(two_processes):
    (weights, logged), (_, other) = two_processes.run(on_shards)
    assert logged == other
    net = made(QuadraticMLP)
    net.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
    ratios = [sum(map(ratio_by_loops, three)) / 3 for three in rows_of(net)]
    assert logged["reg/ipr_monitor/mean_ratio"] == pytest.approx(sum(ratios) / 12, abs=1e-5)
    right = CorruptedModularArithmetic(7, corruption=0.25).accuracies(net)
    assert logged["reg/ipr_monitor/train_accuracy"] == pytest.approx(right.train)
