"""SaRA: the smallest weights trained sparsely, chosen again, with a nuclear norm; changes of a few bytes."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_reg import SaRA
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.finetuning.sara.importance import importance_curve
from lightning_reg.functional import (
    apply_delta_,
    delta_applied,
    load_delta,
    magnitude_threshold,
    merged_delta,
    nuclear_norm,
    pack_positions,
    sara_learning_rate,
    save_delta,
    small_masks,
    sparse_delta,
    unpack_positions,
)
from tests.conformance.by_hand import EPOCHS, LEARNING_RATE, MOMENTUM, Hand
from tests.conformance.case import Case
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.problems import BATCHES, seeded
from tests.toys import QUIET, Classifier, fit, make_trainer, same_weights, weights_of


class SaRAByHand(Hand):
    """A leaf of the weight's shape that counts where the mask is; momentum is forgotten by taking back what it adds."""

    def latent(self, name, weight):
        if not (name.startswith("net.body") and name.endswith("weight")):
            return None
        technique = self.technique
        self.name, self.count, self.ghost, self.buffer = name, 0, None, torch.zeros_like(weight)
        self.threshold = weight.abs().flatten().sort().values[round(technique.fraction * weight.numel())]
        self.mask, self.fixed = weight.abs() < self.threshold, weight.clone()
        return weight.clone(), lambda leaf: torch.where(self.mask, leaf, self.fixed)

    def penalty(self, weights):
        weight = weights[self.name]
        if weight.dim() != 2:
            return None
        return self.technique.rank_weight * torch.linalg.svdvals(weight * self.mask).sum()

    @torch.no_grad()
    def follow(self, loop):
        leaf = loop.leaves[self.name]
        self.count, self.buffer = self.count + 1, MOMENTUM * self.buffer + leaf.grad
        if self.ghost is not None:
            self.ghost *= MOMENTUM
            leaf += LEARNING_RATE * self.ghost
        if self.count == round(self.technique.readjust_at * EPOCHS * BATCHES):
            self.fixed = torch.where(self.mask, leaf, self.fixed)
            self.mask &= leaf.abs() < self.threshold
            self.ghost = self.buffer.clone()


def toy():
    with seeded(0):
        return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(6, 4))


def mean_output(module):
    dtype = next(module.parameters()).dtype
    x = torch.linspace(-1, 1, 12, dtype=dtype).reshape(2, 2, 3)
    return float(module(x).float().square().mean())


BESIDE = ["net.first", "net.head", "*.bias"]
CASE = (
    Case(
        make=partial(SaRA, 0.4, rank_weight=0.02, min_side=4, layers="net.body*", train=BESIDE),
        neutral=partial(SaRA, train="*"),
        by_hand=SaRAByHand,
        says=(
            "the smallest 40 %, chosen again at 0.5 of the training, nuclear norm by 0.02, layers net.body*",
            "the smallest 10 %, chosen again at 0.5 of the training, nuclear norm by 0.0005, layers auto",
            "the smallest below 0.2, layers auto",
            "the largest above 0.1, nuclear norm by 0.1, layers auto",
            "the random 50 %, layers auto",
        ),
        also=["images", "regression"],
        variants=[
            partial(SaRA, threshold=0.2, rank_weight=0.0, readjust_at=None, train="*.bias"),
            partial(SaRA, threshold=0.1, select="largest", rank_weight=0.1, rank_every_n_steps=2, min_side=4),
            partial(SaRA, 0.5, select="random", rank_weight=0.0),
        ],
        invalid=[
            ({"fraction": 0.0}, "fraction"),
            ({"fraction": 1.1}, "fraction"),
            ({"threshold": 0.0}, "threshold"),
            ({"threshold": 0.1, "select": "random"}, "threshold"),
            ({"rank_weight": -1.0}, "rank_weight"),
            ({"rank_every_n_steps": 0}, "rank_every_n_steps"),
            ({"min_side": 0}, "min_side"),
            ({"readjust_at": 0.0}, "readjust_at"),
            ({"readjust_at": 1.0}, "readjust_at"),
        ],
    ),
    ProcedureCase(
        subject=importance_curve,
        network=toy,
        inputs=(mean_output, torch.tensor([0.3, 0.7])),
        invalid=[({"select": "middle"}, "select")],
    ),
)

pytestmark = QUIET

# -- the functional core ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.37, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_threshold_is_that_of_a_sorted_list(share, dtype):
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn(3, 5, 7, generator=draw).to(dtype), 1e-4 * torch.randn(50, 20, generator=draw).to(dtype)]
    flat = torch.cat([p.flatten() for p in params]).float().abs().sort().values
    threshold = magnitude_threshold(params, share)
    assert threshold == float(flat[round(share * len(flat))])
    masks = small_masks(dict(enumerate(params)), threshold)
    assert [m.shape for m in masks.values()] == [p.shape for p in params]
    below = sum(int(m.sum()) for m in masks.values())
    assert below == sum(value < threshold for value in flat.tolist())
    if dtype != torch.bfloat16:  # which has ties
        assert below == round(share * len(flat))
    assert magnitude_threshold(params, 1.0) == math.inf


def test_the_nuclear_norm_and_its_gradient_by_hand():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    mask = torch.rand(5, 8, generator=draw) < 0.7
    leaf = matrix.clone().requires_grad_()
    norm = nuclear_norm(leaf * mask)
    norm.backward()
    u, s, vh = torch.linalg.svd(matrix * mask, full_matrices=False)
    torch.testing.assert_close(norm.detach(), s.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, (u @ vh) * mask, rtol=1e-10, atol=1e-12)
    # Of singular values that are zero there is none: u v' of the one that is not.
    u, v = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])
    leaf = torch.outer(u, v).requires_grad_()
    nuclear_norm(leaf).backward()
    torch.testing.assert_close(leaf.grad, torch.outer(u / 5, v / 3), rtol=1e-5, atol=1e-6)
    leaf = torch.zeros(3, 3, requires_grad=True)
    nuclear_norm(leaf).backward()
    assert not leaf.grad.any()
    assert nuclear_norm(torch.eye(2).bfloat16()).dtype == torch.float32


def test_positions_of_two_bytes():
    by_hand = {(0,): [0], (65534,): [-2], (65535,): [-1, 0], (3, 131075): [3, -1, -1, 1]}
    for places, codes in by_hand.items():
        packed = pack_positions(torch.tensor(places))
        assert packed.dtype == torch.int16
        assert packed.tolist() == codes
        assert unpack_positions(packed).tolist() == list(places)
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(10**7, (500,), generator=draw).unique()
    assert torch.equal(unpack_positions(pack_positions(places.int())), places)
    assert len(pack_positions(places)) <= len(places) + 10**7 // 65535
    assert pack_positions(torch.tensor([], dtype=torch.int32)).shape == (0,)


def test_the_learning_rate_of_the_code():
    assert sara_learning_rate(2e-3) == pytest.approx(1e-3 * math.e**-0.7)


# -- training ---------------------------------------------------------------------------------------------------------


class Wraps(LightningModule):
    """A network that gives its own loss, trained by AdamW with weight decay."""

    def __init__(self, model, lr=1e-2):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1])["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.1)


def bert():
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with seeded(0):
        return BertForSequenceClassification(config)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.one = nn.Embedding(40, 6), nn.Conv2d(6, 8, 3, padding=1)
        self.norm, self.classifier = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, input_ids, labels):
        rows = self.table(input_ids).transpose(1, 2).unflatten(2, (2, 4))
        logits = self.classifier(self.norm(self.one(rows)).relu().mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def convolutions():
    with seeded(0):
        return Convolutions().to(memory_format=torch.channels_last)


HOSTS = {"BERT": (bert, "model.classifier"), "convolutions": (convolutions, "model.classifier")}


def texts():
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randint(40, (40, 8), generator=draw), torch.randint(3, (40,), generator=draw))
    return DataLoader(data, batch_size=4)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("select", ["smallest", "largest", "random"])
def test_what_is_not_chosen_keeps_its_bits_under_decay_and_momentum(host, select):
    make, head = HOSTS[host]
    module = Wraps(make())
    start = weights_of(module)
    technique = SaRA(0.2, select=select, train=head, readjust_at=None, rank_weight=1e-3, min_side=8)
    fit(module, technique, loader=texts(), max_epochs=2)
    weights = {name: w for name, w in start.items() if name in technique.latents.own}
    assert len(weights) == (13 if host == "BERT" else 1)
    order = torch.cat([w.flatten().abs() for w in weights.values()]).sort().values
    k, chosen = round(0.2 * len(order)), 0
    for name, value in module.named_parameters():
        if name in weights:
            small, large = start[name].abs() < order[k], start[name].abs() >= order[-k]
            moved = value != start[name]
            chosen += int(moved.sum())
            if select != "random":
                assert torch.equal(moved, small if select == "smallest" else large)
        elif not name.startswith(head):
            assert torch.equal(value, start[name])
        else:
            assert not torch.equal(value, start[name])
    assert chosen == k if select != "random" else abs(chosen / len(order) - 0.2) < 0.05
    assert chosen == technique.latents.size


def test_an_infinite_threshold_is_full_tuning_and_decays_as_it():
    modules = [Wraps(bert()) for _ in range(2)]
    # Whatever is no matrix is trained as it is; what is one by its entries.
    names = [n for n, p in modules[0].named_parameters() if p.dim() < 2]
    technique = SaRA(threshold=math.inf, rank_weight=0.0, train=names, layers="*", readjust_at=None)
    fit(modules[0], technique, loader=texts(), max_epochs=2)
    fit(modules[1], loader=texts(), max_epochs=2)
    assert technique.latents.size == sum(p.numel() for p in modules[1].parameters() if p.dim() > 1)
    assert same_weights(*modules)


class Looks(Callback):
    """What is trained, before and after each step."""

    def __init__(self, technique):
        self.technique, self.seen = technique, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        latents = self.technique.latents
        index = {n: i[: len(latents.own[n]["entries"])].clone() for n, i in latents.index.items()}
        entries = {n: own["entries"].detach().clone() for n, own in latents.own.items()}
        self.seen.append((index, entries, weights_of(pl_module), deepcopy(latents.state_dict()["moments"])))


def test_entries_are_chosen_again_among_themselves_with_fresh_moments():
    module, technique = Wraps(bert()), SaRA(0.3, rank_weight=0.0, readjust_at=0.25, train="*.classifier")
    looks = Looks(technique)
    start = weights_of(module)
    fit(module, technique, looks, loader=texts(), max_steps=20, max_epochs=-1)
    (before, _, _, old), (after, entries, weights, moments) = looks.seen[3:5]
    left = 0
    for name, index in before.items():
        # Those of the fifth step, which trained all: what is below the threshold then stays.
        chosen = torch.zeros(start[name].numel(), dtype=torch.bool)
        chosen[index.long()] = True
        still = chosen & (weights[name].flatten().abs() < technique.found_threshold)
        assert torch.equal(after[name].long(), still.nonzero()[:, 0])
        assert torch.equal(entries[name], weights[name].flatten()[after[name].long()])
        assert old[name]["entries"]["step"] == 4
        left += int(chosen.sum() - still.sum())
        # The others keep what they were by then.
        end = module.get_parameter(name).detach()
        moved = (end != weights[name]).flatten()
        assert torch.equal(moved, still)
    assert left > 100
    assert not moments
    assert all(m["entries"]["step"] == 15 for m in looks.seen[-1][3].values())
    assert torch.equal(looks.seen[-1][0][name], after[name])  # once


def test_no_copy_of_the_weights_is_kept():
    module, technique = Wraps(bert()), SaRA(0.1, layers="*.word_embeddings")
    fit(module, technique, loader=texts(), max_steps=3)
    size, entries = 40 * 16, 64
    tensors = [technique.latents.index, technique.latents.values]
    kept = [t for one in tensors for t in one.values()] + [t for _, _, t in technique.latents.parts()]
    assert [len(t) for t in kept[:2]] == [entries, entries] == [round(0.1 * size)] * 2
    assert sum(t.numel() * t.element_size() for t in kept) <= 12 * entries
    assert kept[0].dtype == torch.int32
    # Its penalty, which is on, is one of the entries: no gradient of the weights is kept for it.
    assert technique.rank_weight > 0
    ways = {way.split(" (")[0] for way in technique.latents.ways.values()}
    assert ways == {"released"}


def test_the_matrix_of_the_norm_is_drawn_for_each_step():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.small = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, input_ids, labels):
            x = input_ids.float()
            return {"loss": 0.0 * (self.one(x) + self.two(x)).sum() + 0.0 * self.small(x).sum()}

    with seeded(0):
        module = Wraps(Two())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    technique = SaRA(0.5, rank_weight=0.5, rank_every_n_steps=2, min_side=3, readjust_at=None)
    start = weights_of(module)
    looks = Looks(technique)
    fit(module, technique, looks, loader=texts(), max_steps=10)
    drawn = []
    for (index, *_), now, then in zip(
        looks.seen, [w for *_, w, _ in looks.seen], [start, *[w for *_, w, _ in looks.seen]], strict=False
    ):
        changed = [name for name in now if not torch.equal(now[name], then[name])]
        drawn.append(changed)
        for name in changed:
            mask = torch.zeros(64)
            mask[index[name].long()] = 1.0
            matrix = then[name].double() * mask.view(8, 8)
            u, s, vh = torch.linalg.svd(matrix)
            gradient = u[:, s > 1e-5] @ vh[s > 1e-5]
            want = then[name] - 0.1 * 0.5 * gradient * mask.view(8, 8)
            torch.testing.assert_close(now[name].double(), want, rtol=1e-4, atol=1e-5)
    assert all(not changed for changed in drawn[1::2])
    assert {name for changed in drawn[::2] for name in changed} == {"model.one.weight", "model.two.weight"}
    assert all(len(changed) == 1 for changed in drawn[::2])
    described = technique.describe()
    assert "nuclear norm of one in 2 matrices by 0.5" in described
    assert described.endswith("layers auto; 3 weights of 144 numbers; 0 parameters as they are, 3 frozen")


def test_what_is_logged():
    module, technique = Wraps(bert()), SaRA(0.3, readjust_at=0.5)
    trainer = fit(module, technique, loader=texts(), max_steps=10, max_epochs=-1)
    metrics = trainer.callback_metrics
    entries = torch.cat([t.detach() for _, _, t in technique.latents.parts()])
    assert float(metrics["reg/sara/trained"]) == len(entries)
    assert float(metrics["reg/sara/below"]) == pytest.approx(
        float((entries.abs() < technique.found_threshold).float().mean())
    )


def test_setups_that_are_refused():
    zeros = Classifier()
    with torch.no_grad():
        zeros.net[0].weight.zero_()
    with pytest.raises(MisconfigurationException) as raised:
        fit(zeros, SaRA(0.3))
    assert str(raised.value).startswith("SaRA: no entry of the 2 chosen weights is to be trained: none is below 0. W")
    with pytest.raises(MisconfigurationException, match="SaRA chooses its entries again at a share of the training"):
        fit(Classifier(), SaRA(), max_epochs=-1, max_steps=-1, max_time={"seconds": 5})
    module = Classifier()
    module.net.register_parameter("codes", nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(MisconfigurationException, match=r"SaRA: 'net\.codes' of Sequential is quantised, or no"):
        fit(module, SaRA(layers="net.codes"))


# -- sparse changes ---------------------------------------------------------------------------------------------------


def trained(host="BERT", **options):
    make, _head = HOSTS[host]
    module = Wraps(make())
    technique = SaRA(0.1, readjust_at=0.5, rank_weight=0.0, **options)
    fit(module, technique, loader=texts(), max_steps=8, max_epochs=-1)
    return module, technique


@pytest.mark.parametrize("host", HOSTS)
def test_a_change_in_six_bytes_an_entry(host, tmp_path):
    module, technique = trained(host)
    delta = sparse_delta(technique, module, prefix="model")
    base = HOSTS[host][0]()
    start = weights_of(base)
    entries = sum(change._nnz() for change in delta.values())
    size = sum(start[name].numel() for name in delta)
    assert entries == round(0.1 * size)  # those also that were trained for half of the time
    for name, change in delta.items():
        want = module.model.get_parameter(name).detach() - start[name]
        torch.testing.assert_close(change.to_dense(), want, rtol=0, atol=0)
    save_delta(delta, tmp_path / "delta.safetensors")
    header = int.from_bytes((tmp_path / "delta.safetensors").read_bytes()[:8], "little") + 8
    assert (tmp_path / "delta.safetensors").stat().st_size - header == 6 * entries
    loaded = load_delta(tmp_path / "delta.safetensors")
    apply_delta_(base, loaded)
    for name in delta:
        assert torch.equal(loaded[name].to_dense(), delta[name].to_dense())
        torch.testing.assert_close(base.get_parameter(name), module.model.get_parameter(name), rtol=1e-6, atol=1e-8)


def test_multiples_and_sums_of_changes():
    module, technique = trained()
    other, second = trained(select="random", seed=4)
    one, two = sparse_delta(technique, module, "model"), sparse_delta(second, other, "model")
    two.pop("classifier.weight")
    base, untouched = bert(), weights_of(bert())
    dense = [{name: change.to_dense() for name, change in delta.items()} for delta in (one, two)]
    with delta_applied(base, one, 0.0):
        assert same_weights(base, untouched)
    wanted = {n: w + 0.6 * dense[0][n] + 1.5 * dense[1].get(n, 0.0) for n, w in untouched.items() if n in one}
    with delta_applied(base, one, 0.6), delta_applied(base, two, 1.5) as model:
        for name, want in wanted.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), want)
    assert same_weights(base, untouched)
    apply_delta_(base, merged_delta([one, two], [0.6, 1.5]))
    for name, want in wanted.items():
        torch.testing.assert_close(base.get_parameter(name).detach(), want)
    with pytest.raises(ValueError, match=r"The change is of 'bert\..*, and the network has no such weight"):
        apply_delta_(nn.Linear(2, 2), one)
    with pytest.raises(ValueError, match=r"sparse_delta: 'model\..* was trained, and is not in the given network"):
        sparse_delta(technique, module.model)
    with pytest.raises(ValueError, match="sparse_delta: nothing was trained yet"):
        sparse_delta(SaRA(), module)


def test_half_precision_keeps_entries_in_float32():
    module, technique = Wraps(bert(), lr=1e-4), SaRA(0.3, rank_weight=0.0)
    fit(module, technique, loader=texts(), max_steps=6, precision="bf16-true")
    name, own = next(iter(technique.latents.own.items()))
    assert own["entries"].dtype == torch.float32
    weight = module.get_parameter(name).detach()
    assert weight.dtype == torch.bfloat16
    index = technique.latents.index[name].long()[: len(own["entries"])]
    assert torch.equal(weight.flatten()[index], own["entries"].detach().bfloat16())
    assert not torch.equal(own["entries"].detach(), own["entries"].detach().bfloat16().float())


# -- checkpoints ------------------------------------------------------------------------------------------------------


def run(folder, epochs, save, ckpt=None, start=None, limit=4):
    module = Wraps(convolutions() if start is None else start)
    technique = SaRA(0.3, rank_weight=1e-3, min_side=2, readjust_at=0.5, layers=["model.one", "model.table"], save=save)
    trainer = make_trainer(callbacks=[technique], max_epochs=limit)
    trainer.fit_loop.max_epochs = limit
    if epochs < limit:

        class Stops(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trainer.should_stop = trainer.current_epoch + 1 >= epochs

        trainer.callbacks.append(Stops())
    trainer.fit(module, texts(), ckpt_path=ckpt)
    folder.mkdir(exist_ok=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, technique


@pytest.mark.parametrize("save", ["full", "delta"])
@pytest.mark.parametrize("stop", [1, 2, 3], ids=["before", "at", "after"])
def test_a_resumed_run_has_the_same_bits_whether_the_choice_lies_before_or_behind(save, stop, tmp_path):
    whole, kept = run(tmp_path / "whole", 4, "full")
    run(tmp_path / "part", stop, save)
    file = torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)
    assert bool(file["callbacks"]["SaRA"]["chosen_again"]) == (stop > 1)
    assert ("model.one.weight" in file["state_dict"]) == (save == "full")
    resumed, technique = run(tmp_path / "rest", 4, save, tmp_path / "part" / "last.ckpt")
    assert same_weights(whole, resumed)
    one, two = kept.state_dict(), technique.state_dict()
    for name, parts in one["own"].items():
        assert torch.equal(parts["entries"], two["own"][name]["entries"])
        assert torch.equal(one["index"][name], two["index"][name])
        assert torch.equal(one["values"][name], two["values"][name])
        assert 0 < len(parts["entries"]) < len(one["index"][name])
    if save == "delta":
        with seeded(1), pytest.raises(MisconfigurationException, match="trained on top of other weights than the mod"):
            run(tmp_path / "other", 4, save, tmp_path / "part" / "last.ckpt", start=Convolutions())
    weights = {name: module_weight for name, module_weight in weights_of(resumed).items() if name in one["own"]}
    assert technique.latents.fit(weights)
    assert not technique.latents.fit(weights | {"model.one.weight": torch.zeros(6, 8, 3, 3)})


# -- what the smallest weights matter ---------------------------------------------------------------------------------


def test_the_curve_by_hand():
    layer = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, 6.0]]))
    other = nn.Sequential(layer, nn.LayerNorm(3))
    shares, total = torch.tensor([0.0, 1 / 3, 0.5, 1.0]), lambda module: module[0].weight.sum()
    assert importance_curve(other, total, shares).tolist() == [9.0, 10.0, 7.0, 0.0]
    assert importance_curve(other, total, shares, select="largest").tolist() == [9.0, -2.0, 2.0, 0.0]
    drawn = importance_curve(other, lambda module: (module[0].weight == 0).sum(), shares, select="random", seed=3)
    assert drawn.tolist() == [0.0, 2.0, 3.0, 6.0]
    with pytest.raises(ValueError, match=r"`shares` must be in \[0, 1\]"):
        importance_curve(other, total, torch.tensor([1.5]))
    with pytest.raises(ValueError, match="has no linear, convolution or attention layer"):
        importance_curve(nn.LayerNorm(3), total, shares)

    def fails(module):
        raise KeyError

    with pytest.raises(KeyError):
        importance_curve(other, fails, shares[2:])
    assert total(other).item() == 9.0
