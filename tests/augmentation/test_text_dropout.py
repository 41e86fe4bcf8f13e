"""Whole modalities left out of samples, and what is evaluated without them."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ModalityDropout, RetrievalScores
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    analogy_prompt,
    drop_rows,
    exclusive_keep_masks,
    retrieval_scores,
    symmetric_infonce,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.metric import MetricCase
from tests.toys import CLASSES, INPUTS, QUIET, Callback, Classifier, fit, make_loader, make_trainer, same_weights

# The fits here need no validation: the modules define one for evaluations afterwards.
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")]
WORD = 2**64


def splitmix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def kept_by_hand(technique, count, rows, p):
    """Which of the first rows of the ``count``-th batch are kept, with integers of Python."""
    base = technique.generator(SimpleNamespace(batches_so_far=count, stream=""), same_on_ranks=True).initial_seed()
    seed, golden = technique.derived_seed(f"{base}"), 0x9E3779B97F4A7C15
    words = [splitmix((splitmix((row * golden + seed) % WORD) + golden) % WORD) for row in range(rows)]
    return torch.tensor([(word >> 40) / 2**24 >= p for word in words])


class DroppedByHand(Hand):
    """Rows of the body's output become a number that is trained."""

    def begin(self, loop):
        generator = torch.Generator().manual_seed(self.technique.derived_seed("null net.body"))
        self.state = (0.02 * torch.randn(1, generator=generator)).requires_grad_()

    def own(self):
        return [self.state]

    def edit(self, name, rows, moment, copy):
        if name != "net.body":
            return rows
        keep = kept_by_hand(self.technique, moment.count, len(moment.x), 0.4).repeat(len(rows) // len(moment.x))
        # The state is in the graph where nothing is dropped as well: ranks have the same gradients, some of them 0.
        return torch.where(keep.reshape(-1, *(1 for _ in rows.shape[1:])), rows, self.state)


def embeddings(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(rows, 6, generator=generator)
    return {"queries": targets + 1.5 * torch.randn(rows, 6, generator=generator), "targets": targets}


def scores_by_loops(batches):
    """Ranks by sorting, one query after the other."""
    q, b = ([row for batch in batches for row in batch[name].double().tolist()] for name in ("queries", "targets"))

    def cosine(one, two):
        return sum(x * y for x, y in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)

    ranks = []
    for position, query in enumerate(q):
        own = cosine(query, b[position])
        ranks.append(1 + sum(cosine(query, other) >= own for k, other in enumerate(b) if k != position))
    ranks.sort()
    middle = ranks[(len(ranks) - 1) // 2], ranks[len(ranks) // 2]
    shares = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 3)}
    return shares | {"median_rank": sum(middle) / 2}


DROPS = partial(ModalityDropout, 0.4, layer="net.body", null_shape=[1])
CASE = (
    Case(
        make=DROPS,
        neutral=partial(ModalityDropout, 0.0, layer="net.body", null_shape=[1]),
        by_hand=DroppedByHand,
        says=(
            "drops net.body 0.4; learned state",
            "p=0: inactive",
            "drops net.first 0.4, net.body 0.4; zero state",
            "drops net.body 0.4, 0 0.5; zero state",
            "drops net.body 0.4; learned state; whole batches; from epoch 1, ramp of 1",
        ),
        also=("images", "regression", "tokens"),
        variants=[
            partial(ModalityDropout, 0.4, layer=["net.first", "net.body"], null="zero"),
            partial(ModalityDropout, {"net.body": 0.4, "0": 0.5}, layer="net.body", batch_key="0", null="zero"),
            partial(DROPS, per_sample=False, start_epoch=1, ramp_epochs=1),
        ],
        invalid=[
            ({"p": -0.1}, "p"),
            ({"p": 1.1}, "p"),
            ({"layer": ["net.body", "net.first"], "null": "zero", "p": 0.6}, "p"),
            ({"layer": "net.body", "null": "zero", "p": {"net.boy": 0.6}}, "p"),
            ({"layer": "net.body"}, "null_shape"),
            ({"layer": "net.body", "null_shape": [0]}, "null_shape"),
            ({}, "layer"),
            ({"layer": "a", "batch_key": "a", "null": "zero"}, "layer"),
            ({"layer": "a", "null": "zero", "fill": {"a": [1.0]}}, "fill"),
            ({"layer": "a", "null": "zero", "attention_masks": {"b": "mask"}}, "attention_masks"),
            ({"layer": "a", "null": "zero", "start_epoch": -1}, "start_epoch"),
            ({"layer": "a", "null": "zero", "ramp_epochs": -1}, "ramp_epochs"),
            ({"layer": "a", "null": "zero", "own_optimizer": -1}, "own_optimizer"),
        ],
    ),
    MetricCase(
        make=partial(RetrievalScores, ks=[1, 3]),
        batches=[embeddings(seed, rows) for seed, rows in enumerate((5, 4, 6, 3))],
        expected=scores_by_loops,
        invalid=[({"ks": [0]}, "ks"), ({"ks": []}, "ks")],
    ),
)


# -- the core ---------------------------------------------------------------------------------------------------------


def test_rows_are_replaced_whole_and_nothing_is_rescaled():
    x = torch.arange(1.0, 25.0).reshape(4, 3, 2)
    keep = torch.tensor([True, False, True, False])
    rows, given = drop_rows(x, 0.5, torch.tensor([7.0, 8.0]), keep=keep)
    assert given is keep
    assert torch.equal(rows[keep], x[keep])
    assert rows[~keep].tolist() == [[[7.0, 8.0]] * 3] * 2
    none, all_of_them = (drop_rows(x, p, 0.0, torch.Generator().manual_seed(0))[0] for p in (0.0, 1.0))
    assert torch.equal(none, x)
    assert not all_of_them.any()


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_the_share_of_dropped_rows(p):
    keep = drop_rows(torch.ones(20_000, 1), p, generator=torch.Generator().manual_seed(1))[1]
    assert 1 - keep.double().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 20_000) ** 0.5)  # 4 sigma


def test_at_most_one_modality_of_a_sample_is_dropped():
    probs = {"text": 0.5, "video": 0.3, "audio": 0.2}
    masks = exclusive_keep_masks(20_000, probs, torch.Generator().manual_seed(2))
    dropped = torch.stack([~mask for mask in masks.values()])
    assert (dropped.sum(0) == 1).all()  # the probabilities add up to 1
    for name, p in probs.items():
        assert (~masks[name]).double().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 20_000) ** 0.5)
    edges = exclusive_keep_masks(4, {"a": 0.25, "b": 0.5}, draws=torch.tensor([0.0, 0.25, 0.74, 0.75]))
    assert edges["a"].tolist() == [False, True, True, True]
    assert edges["b"].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match=r"^exclusive_keep_masks: `probs` must be at least 0 and add up"):
        exclusive_keep_masks(2, {"a": 0.6, "b": 0.6})


def test_infonce_by_loops():
    q, b = embeddings(0, 5).values()
    rows = [[F.normalize(r.double(), dim=0) for r in one] for one in (q, b)]
    total = 0.0
    for one, two in (rows, rows[::-1]):
        for i in range(5):
            weights = [math.exp(float(one[i] @ other) / 0.2) for other in two]
            total -= math.log(weights[i] / sum(weights)) / 10
    assert symmetric_infonce(q, b, 0.2).item() == pytest.approx(total, rel=1e-6)
    assert symmetric_infonce(q.bfloat16(), b.bfloat16(), 0.2).dtype is torch.float32
    with pytest.raises(ValueError, match=r"^symmetric_infonce: `tau` must be above 0, got 0"):
        symmetric_infonce(q, b, 0.0)


def _pairs_of_rank(_):
    """The loss of uneven shares, their own gradient, from two ranks."""
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    pairs = embeddings(0, 5)
    share = slice(0, 3) if rank == 0 else slice(3, 5)
    q, b = (value[share].clone().requires_grad_() for value in pairs.values())
    loss = symmetric_infonce(q, b, 0.2, group)
    loss.backward()
    return loss.item(), q.grad


def test_infonce_of_two_ranks_is_that_of_all_pairs(two_processes):
    (one, first), (two, second) = two_processes.run(_pairs_of_rank, None)
    q, b = (value.clone().requires_grad_() for value in embeddings(0, 5).values())
    loss = symmetric_infonce(q, b, 0.2)
    loss.backward()
    assert (one + two) / 2 == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat([first, second]) / 2, q.grad, rtol=1e-5, atol=1e-7)  # sums in another order


def test_scores_by_hand_and_in_chunks(monkeypatch):
    batch = embeddings(3, 11)
    expected = scores_by_loops([batch])
    monkeypatch.setattr("lightning_reg.augmentation.text_dropout.core._CHUNK", 4)
    found = retrieval_scores(batch["queries"], batch["targets"], [1, 3])
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-6)
    collapsed = retrieval_scores(torch.ones(8, 2), torch.ones(8, 2), [1, 8])
    assert {name: value.item() for name, value in collapsed.items()} == {
        "recall@1": 0.0, "recall@8": 1.0, "median_rank": 8.0,
    }  # fmt: skip


def test_a_prompt_by_analogy():
    examples = [(["piano", "slow"], " A calm piece. "), (["rock"], "Loud guitars.")]
    prompt = analogy_prompt(examples, ["drums", "fast"])
    assert prompt == (
        "Tags: piano, slow\nDescription: A calm piece.\n\nTags: rock\nDescription: Loud guitars.\n\n"
        "Tags: drums, fast\nDescription:"
    )
    asked = []
    assert analogy_prompt(examples, ["drums", "fast"], lambda text: asked.append(text) or " Drums. ") == "Drums."
    assert asked == [prompt]
    for arguments, name in ((([], ["a"]), "examples"), ((examples, []), "tags"), ((examples, "abc"), "tags")):
        with pytest.raises(ValueError, match=f"^analogy_prompt: `{name}` must be a list"):
            analogy_prompt(*arguments)


# -- training ---------------------------------------------------------------------------------------------------------


class TwoInputs(Classifier):
    """A fused classifier of two encoders: of the first inputs of the toy data, and of all of them."""

    around = staticmethod(lambda layer, x: layer(x))

    def __init__(self, lr=0.1):
        super().__init__(lr=lr)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.text, self.video = nn.Linear(INPUTS, 6), nn.Linear(INPUTS, 6)
            self.fuse = nn.Linear(12, CLASSES)
        self.seen, self.outputs = [], []

    def fused(self, batch):
        text, video = self.around(self.text, batch[0]), self.video(batch[0])
        self.seen.append(torch.stack([text, video]).detach())
        self.outputs.append(self.fuse(torch.cat([text, video], 1)))
        return self.outputs[-1]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.fused(batch), batch[1])

    def validation_step(self, batch, batch_idx):
        self.fused(batch)

    test_step = validation_step


ZERO = partial(ModalityDropout, layer="text", null="zero")


def test_one_draw_in_each_step_for_the_whole_output():
    model, technique = TwoInputs(), ZERO(0.5)
    fit(model, technique, max_epochs=1)
    for count, (text, video) in enumerate(model.seen, 1):
        keep = kept_by_hand(technique, count, len(text), 0.5)
        assert torch.equal(text.abs().sum(1) > 0, keep)
        assert (video != 0).any(1).all()


def test_without_the_modality_the_network_depends_on_the_others_alone():
    model = TwoInputs()
    first = copy.deepcopy(model.text.state_dict())
    technique = ModalityDropout(1.0, layer="text", null_shape=[6])
    fit(model, technique, max_epochs=1)
    assert same_weights(model.text.state_dict(), first)  # its gradient is exactly 0
    assert all((text == text[0]).all() for text, _ in model.seen)
    assert not torch.equal(model.seen[0][0], model.seen[-1][0])  # the state is learned


def test_the_learned_state_has_a_gradient_where_a_row_was_dropped():
    class Gradients(Callback):
        def __init__(self):
            self.values = []

        def on_after_backward(self, trainer, pl_module):
            (parameter,) = technique.own.parameters.values()
            self.values.append(bool(parameter.grad is not None and parameter.grad.any()))

    technique, gradients = ModalityDropout(0.05, layer="text", null_shape=[6]), Gradients()
    fit(TwoInputs(), technique, gradients, max_epochs=2)
    dropped = [not kept_by_hand(technique, count, 8, 0.05).all() for count in range(1, len(gradients.values) + 1)]
    assert gradients.values == dropped
    assert {True, False} == set(dropped)


@pytest.mark.parametrize("exclusive", [True, False])
def test_two_modalities(exclusive):
    model = TwoInputs()
    fit(model, ModalityDropout(0.5, layer=["text", "video"], null="zero", exclusive=exclusive), max_epochs=4)
    absent = (torch.cat(model.seen, 1) == 0).all(2)
    both = (absent[0] & absent[1]).double().mean().item()
    assert both == 0 if exclusive else both == pytest.approx(0.25, abs=0.15)


def test_the_start_and_the_ramp():
    model, technique = TwoInputs(), ZERO(1.0, start_epoch=1, ramp_epochs=1)
    fit(model, technique, max_epochs=3)
    absent = torch.cat(model.seen, 1)[0].eq(0).all(1)
    first, second, third = absent.chunk(3)
    assert not first.any()
    assert 0 < second.double().mean() < 1
    assert third.all()


def test_one_draw_for_a_whole_batch():
    model = TwoInputs()
    fit(model, ZERO(0.5, per_sample=False), max_epochs=2)
    absent = [(text == 0).all(1) for text, _ in model.seen]
    assert all(rows.all() or not rows.any() for rows in absent)
    assert len({bool(rows.all()) for rows in absent}) == 2


class Twice(TwoInputs):
    """Query and target share an encoder; the target comes with views of its rows."""

    def training_step(self, batch, batch_idx):
        one = self.text(batch[0])
        two = self.text(torch.cat([batch[0], -batch[0]]))
        self.seen.append((one.detach(), two.detach()))
        return one.square().mean() + two.square().mean()


def test_a_layer_that_runs_twice_drops_the_same_samples():
    model = Twice()
    fit(model, ZERO(0.5), max_epochs=1)
    for one, two in model.seen:
        absent = (one == 0).all(1)
        assert torch.equal((two == 0).all(1), absent.repeat(2))


@pytest.mark.parametrize("null", ["zero", "learned"])
def test_a_checkpointed_encoder_has_the_same_masks_when_it_runs_again(null):
    class Checkpointed(TwoInputs):
        around = staticmethod(partial(checkpoint, use_reentrant=False))

    class Reentrant(TwoInputs):
        around = staticmethod(lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True))

    drop = partial(ModalityDropout, 0.5, layer="text", null=null, null_shape=[6])
    plain, again = TwoInputs(), Checkpointed()
    fit(plain, drop())
    fit(again, drop())
    assert same_weights(plain, again)
    with pytest.raises(MisconfigurationException, match=r"^ModalityDropout changes what 'text' returns.*use_reentrant"):
        fit(Reentrant(), drop())


# -- entries of the batch ---------------------------------------------------------------------------------------------


class Tokens(Classifier):
    """Notes the token numbers and the attention mask that it gets."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append({name: value.clone() for name, value in batch.items()})
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.batches.append({name: value.clone() for name, value in batch.items()})


def tokens():
    x, y = make_loader().dataset.tensors
    ids = torch.arange(len(x) * 5).reshape(-1, 5) + 10
    rows = [{"x": x[k], "y": y[k], "ids": ids[k], "mask": torch.ones(5, dtype=torch.long)} for k in range(len(x))]
    return DataLoader(rows, 8)


@pytest.mark.parametrize("fill", [[3.0], [1.0, 2.0, 0.0, 0.0, 0.0]])
def test_token_numbers_become_those_of_the_empty_prompt(fill):
    model = Tokens()
    drop = ModalityDropout(0.5, batch_key="ids", fill={"ids": fill}, attention_masks={"ids": "mask"})
    trainer = fit(model, drop, loader=tokens(), max_epochs=1)
    empty = torch.tensor(fill).long().expand(5)
    for count, batch in enumerate(model.batches, 1):
        keep = kept_by_hand(drop, count, 8, 0.5)
        assert batch["ids"].dtype is torch.long
        assert (batch["ids"][~keep] == empty).all()
        assert (batch["ids"][keep] >= 10).all()
        assert batch["mask"].tolist() == [[1] * 5 if kept else [1, 0, 0, 0, 0] for kept in keep]
    assert drop.own.modules == {}
    model.batches.clear()
    with drop.absent():
        trainer.validate(model, tokens(), verbose=False)
    assert all((batch["ids"] == empty).all() and batch["mask"].sum() == 8 for batch in model.batches)


def test_a_modality_without_a_state_needs_no_group_of_an_optimizer():
    class Quasi(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=1)

    fit(Quasi(), ModalityDropout(0.5, batch_key="0"), max_epochs=1)


def test_wrong_entries_are_told_in_the_first_step():
    for options, words in (
        ({"batch_key": "idz"}, r"batch_key='idz' names nothing in the batch"),
        ({"batch_key": "ids", "fill": {"ids": [1.0, 2.0]}}, r"`fill` has 2 numbers for the entry 'ids'"),
        ({"batch_key": "ids", "attention_masks": {"ids": "y"}}, r"the entry 'y' of the batch must be a tensor"),
    ):
        with pytest.raises(MisconfigurationException, match=rf"^ModalityDropout: {words}"):
            fit(Tokens(), ModalityDropout(0.5, **options), loader=tokens(), max_epochs=1)


# -- without the modality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("null", ["zero", "learned"])
def test_evaluation_with_and_without(null, tmp_path):
    model, drop = TwoInputs(), ModalityDropout(0.5, layer=["text", "video"], null=null, null_shape=[6], exclusive=False)
    trainer = fit(model, drop, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.zeros(6) if null == "zero" else drop.own["text"].state.detach()
    x = make_loader().dataset.tensors[0]
    given = torch.stack([model.text(x), model.video(x)]).detach()

    def seen(names, entry=trainer.validate, of=drop, **options):
        model.seen.clear()
        with of.absent(*names) if names else torch.no_grad():
            entry(model, make_loader(), verbose=False, **options)
        return torch.cat(model.seen, 1)

    torch.testing.assert_close(seen([]), given)
    without = seen(["text"])
    assert torch.equal(without[0], state.expand(len(x), 6))
    torch.testing.assert_close(without[1], given[1])
    assert torch.equal(seen(["text"], trainer.test), without)
    torch.testing.assert_close(seen([]), given)
    fresh = ModalityDropout(0.5, layer=["text", "video"], null=null, null_shape=[6], exclusive=False)
    other = make_trainer(callbacks=[fresh])
    assert torch.equal(seen(["text"], other.test, fresh, ckpt_path=tmp_path / "end.ckpt"), without)
    assert not any(parameter.is_inference() for parameter in fresh.own.parameters.values())  # a fit may go on
    with pytest.raises(ValueError, match=r"^ModalityDropout\.absent: `names` must be among \['text', 'video'\]"):
        seen(["audio"])
    with pytest.raises(ValueError, match=r"`names` must be among"), drop.absent():
        pass


def test_a_state_that_nobody_trained_is_refused():
    drop = ModalityDropout(0.5, layer="text", null_shape=[6])
    with drop.absent(), pytest.raises(MisconfigurationException, match=r"^ModalityDropout: the state .*'text' was not"):
        make_trainer(callbacks=[drop]).validate(TwoInputs(), make_loader(), verbose=False)


def test_outputs_that_have_no_row_for_each_sample_and_wrong_shapes_are_refused():
    class Recurrent(TwoInputs):
        def __init__(self):
            super().__init__()
            self.text = nn.GRU(INPUTS, 6, batch_first=True)

        def fused(self, batch):
            return self.fuse(torch.cat([self.text(batch[0][:, None])[0][:, 0], self.video(batch[0])], 1))

    with pytest.raises(MisconfigurationException, match=r"^ModalityDropout: 'text' returns a tuple with tensors"):
        fit(Recurrent(), ZERO(0.5))
    with pytest.raises(MisconfigurationException, match=r"^ModalityDropout: `null_shape` is \[5\] .* \[6\] for one"):
        fit(TwoInputs(), ModalityDropout(0.5, layer="text", null_shape=[5]))


# -- a model of others ------------------------------------------------------------------------------------------------


def clip():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39},
        vision_config={**shape, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config)


class Clip(Classifier):
    def __init__(self):
        super().__init__(lr=0.01)
        self.clip, self.pooled = clip(), []

    def training_step(self, batch, batch_idx):
        outputs = self.clip(input_ids=batch[0], pixel_values=batch[1], return_loss=True)
        self.pooled.append(outputs.text_model_output.pooler_output.detach())
        return outputs.loss

    def validation_step(self, batch, batch_idx):
        text = self.clip.text_model(input_ids=batch[0])
        self.pooled.append(text.pooler_output)
        assert torch.equal(text.last_hidden_state[:, 0], text.pooler_output)


def test_the_text_model_of_clip():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 39, (12, 6), generator=generator)
    ids[:, -1] = 39
    loader = DataLoader(TensorDataset(ids, torch.randn(12, 3, 8, 8, generator=generator)), 6)
    model, drop = Clip(), ModalityDropout(0.5, layer="clip.text_model", null_shape=[16])
    trainer = fit(model, drop, loader=loader, max_epochs=1)
    for count, rows in enumerate(model.pooled, 1):
        keep = kept_by_hand(drop, count, 6, 0.5)
        assert (rows[~keep] == rows[~keep][:1]).all()
        assert len(rows[keep].unique(dim=0)) == keep.sum()
    assert not any("state" in name for name in model.state_dict())
    model.pooled.clear()
    with drop.absent():
        trainer.validate(model, loader, verbose=False)
    assert torch.equal(torch.cat(model.pooled), drop.own["clip.text_model"].state.detach().expand(12, 16))
