"""GradCache: encoders in chunks, with the gradient of the whole batch."""

import random
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ALLoRA, FocalContrastive, GradCache, HardNegativeMixing, IDFFlops, NestedDropout
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import StepTechnique
from lightning_reg.functional import matryoshka_loss, mean_pooled, recomputed, row_chunks
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET, Classifier, _Toy, fit, make_tensors, make_trainer, same_weights

pytestmark = QUIET

CASE = Case(
    make=partial(GradCache, "net.body", 2),
    neutral=partial(GradCache, "net.body", None),
    by_hand=Hand,  # nothing: the loss and its gradient are those of the batch
    also=("regression",),
    says=("net.body in chunks of 2 rows", "chunk_size=None: inactive", "net.first, net.body in chunks of 1 rows"),
    variants=[partial(GradCache, ["net.first", "net.body"], 1)],
    invalid=[({"chunk_size": 0}, "chunk_size"), ({"calls": []}, "calls"), ({"calls": ""}, "calls")],
    trains_as_plain=True,  # it saves memory
)


# -- the mathematics --------------------------------------------------------------------------------------------------


def test_chunks_are_few_and_equal():
    for rows in range(1, 20):
        for size in range(1, 8):
            sizes = [chunk.stop - chunk.start for chunk in row_chunks(rows, size)]
            assert sum(sizes) == rows
            assert len(sizes) == -(-rows // size)
            assert max(sizes) - min(sizes) <= 1
    assert row_chunks(0, 3) == [slice(0, 0)]


def test_gradients_are_those_of_the_authors_code():
    """luyug/GradCache, 906f03835fbc183132a9db32612a9e8f180ca3b4, ``GradCache.cache_step`` with chunks of 4."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters(), 1):
            p.copy_((torch.arange(p.numel()).double() * k).sin().reshape(p.shape) / 2)
    x = torch.linspace(-1, 1, 48).double().reshape(8, 6).sin() * 3
    with torch.random.fork_rng():
        torch.manual_seed(3)
        q, d = (torch.cat([recomputed(net, rows[c]) for c in row_chunks(8, 4)]) for rows in (x, (x * 1.5).cos()))
        loss = F.cross_entropy(F.normalize(q) @ F.normalize(d).T / 0.1, torch.arange(8))
        torch.rand(7)  # what is drawn later has no say
        loss.backward()
    sums = -0.6123207548949294, 1.8371126892786445, -0.23620334116145025, -4.9124731175511265
    norms = 6.921216969311163, 2.0547381437189842, 3.372345379780772, 3.427889929765059
    assert loss.item() == pytest.approx(2.908451782813007, abs=1e-12)
    assert [p.grad.sum().item() for p in net.parameters()] == pytest.approx(sums, abs=1e-12)
    assert [p.grad.norm().item() for p in net.parameters()] == pytest.approx(norms, abs=1e-12)


# -- attached ---------------------------------------------------------------------------------------------------------


class Search(Classifier):
    """One encoder with dropout for queries and documents; ``chunk`` writes the chunks by hand, all graphs kept."""

    def __init__(self, chunk=None, dropout=0.5, manual=False):
        super().__init__(dropout=dropout)
        self.chunk, self.automatic_optimization, self.grads = chunk, not manual, []

    def encode(self, x):
        return self.net(x)

    def embedded(self, x):
        if self.chunk is None:
            return self.encode(x)
        return torch.cat([self.encode(x[rows]) for rows in row_chunks(len(x), self.chunk)])

    def training_step(self, batch, batch_idx):
        q, d = F.normalize(self.embedded(batch[0])), F.normalize(self.embedded(batch[0] + 0.1))
        loss = self.contrast(q, d)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            self.on_before_optimizer_step(None)
            return None
        return loss

    def contrast(self, q, d):
        return F.cross_entropy(q @ d.T / 0.1, torch.arange(len(q)))

    def on_before_optimizer_step(self, optimizer):
        self.grads.append([p.grad.clone() for p in self.parameters() if p.grad is not None])


def same_gradients(one, two, **tolerance):
    assert len(one.grads) == len(two.grads) > 0
    for first, second in zip(one.grads, two.grads, strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, **tolerance or {"rtol": 1e-5, "atol": 2e-6})
    assert max(g.abs().max() for g in one.grads[0]) > 1e-3


SETTINGS = {
    "float32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "double": {"precision": "64-true"},
}


@pytest.mark.parametrize("setting", [*SETTINGS, "16-mixed"])
def test_with_dropout_the_gradient_is_that_of_chunks_whose_graphs_are_kept(setting):
    found = []
    for module, techniques in ((Search(), [GradCache("net", 3)]), (Search(chunk=3), [])):
        options = dict(SETTINGS.get(setting, {}))
        if setting == "16-mixed":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        fit(module, *techniques, max_epochs=1, **options)
        found.append(module)
    # In 16 bits the hand-written chunks share one cast of the weights, where gradients of chunks are added up.
    mixed = {"rtol": 0, "atol": 0.02 if setting == "bf16-mixed" else 2e-3} if "mixed" in setting else {}
    same_gradients(*found, **mixed)


def test_without_dropout_it_is_the_whole_batch():
    ours, plain = Search(dropout=0.0), Search(dropout=0.0)
    fit(ours, GradCache("net", 3), precision="64-true")
    fit(plain, precision="64-true")
    same_gradients(ours, plain)
    assert same_weights(ours, plain, atol=1e-12)


def test_gradients_of_chunks_are_added_up_in_the_precision_of_the_weights():
    """256 chunks in bfloat16 under an autocast that keeps its casts: summed in float32, not in bfloat16."""
    rows = torch.rand(256, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    net = nn.Linear(6, 3, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        sum(recomputed(net, row[None]).sum() for row in rows).backward()
    exact = rows.float().sum(0).expand(3, 6)
    torch.testing.assert_close(net.weight.grad, exact, rtol=1e-5, atol=0)


def test_manual_optimization_and_calls_without_gradient():
    class Looks(Search):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                rows = self.net(batch[0])
            assert not rows.requires_grad
            return super().training_step(batch, batch_idx)

    ours, hand = Looks(manual=True), Looks(chunk=3, manual=True)
    fit(ours, GradCache("net", 3))
    fit(hand)
    same_gradients(ours, hand)


class Live(TorchDispatchMode):
    """The most bytes that tensors made meanwhile have held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and (storage := one.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return result

    def free(self, size):
        self.now -= size


class Wide(Search):
    """Activations far larger than what comes in and goes out."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(2, 500), nn.Tanh(), nn.Dropout(), nn.Linear(500, 500), nn.Tanh())
        self.net.append(nn.Linear(500, 2))


def peak(rows, *techniques):
    data = TensorDataset(torch.zeros(rows, 2), torch.zeros(rows))
    with Live() as live:
        fit(Wide(), *techniques, loader=DataLoader(data, rows), max_steps=1)
    return live.most


def test_memory_is_flat_in_the_batch():
    small, large, plain = peak(64, GradCache("net", 8)), peak(512, GradCache("net", 8)), peak(512)
    logits = 6 * 4 * 512**2  # the loss of the whole batch, and its gradient
    activations = 2 * 512 * 500 * 4 * 4
    assert large - small < logits
    assert plain - large > 0.5 * activations


# -- what comes in and goes out ---------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Takes a mapping, keywords and what is no row; returns a row for each sample in several ways."""

    def __init__(self):
        super().__init__()
        self.layer, self.sizes = nn.Linear(6, 3), []

    def forward(self, batch, names, *, scale, more, table):
        assert len(names) == len(batch["x"]) == len(more[0])
        self.sizes.append(len(names))
        rows = self.layer(batch["x"] + more[0]) * scale + table.sum()
        return {"rows": rows, "pair": (rows * 2, None), "names": names, "scale": scale}


def test_what_is_nested_goes_by_rows_and_the_rest_as_it_is():
    class Nests(Search):
        def __init__(self, **options):
            super().__init__(**options)
            self.text = Nested()

        def training_step(self, batch, batch_idx):
            x, names = batch[0], [str(i) for i in range(len(batch[0]))]
            out = self.text({"x": x}, names, scale=2.0, more=[x], table=torch.ones(5))
            assert out["names"] == names
            assert out["scale"] == 2.0
            assert out["pair"][1] is None
            return self.contrast(F.normalize(out["rows"]), F.normalize(out["pair"][0] + batch[0][:, :3]))

    ours, plain = Nests(), Nests()
    plain.load_state_dict(ours.state_dict())
    fit(ours, GradCache("text", 3), max_steps=1)
    fit(plain, max_steps=1)
    same_gradients(ours, plain)
    assert ours.text.sizes == [2, 3, 3, 2, 2, 5, 3, 3, 2]  # three for the look at single rows, then backwards
    assert plain.text.sizes == [8]


class Text(nn.Module):
    """A small BERT; ``pool`` is a layer."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.pool = nn.Linear(16, 8)

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        return self.pool(mean_pooled(hidden.last_hidden_state, attention_mask))


class Texts(Search):
    """Matryoshka over a BERT with dropout, given by keywords; all of what it returns with ``whole``."""

    def __init__(self, chunk=None, whole=False):
        super().__init__(chunk)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.text = Text()
        self.whole = whole

    def encode(self, tokens):
        given = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
        if not self.whole:
            return self.text(**given)
        return self.text.pool(mean_pooled(self.text.bert(**given)[0], given["attention_mask"]))

    def training_step(self, batch, batch_idx):
        q, d = self.embedded(batch[0]), self.embedded(batch[1])
        return matryoshka_loss(self.contrast, [q, d], [8, 4])


def tokens():
    drawn = torch.randint(1, 50, (12, 9), generator=torch.Generator().manual_seed(0))
    drawn[::3, 5:] = 0
    return DataLoader(TensorDataset(drawn[:, :4], drawn), 6)


@pytest.mark.parametrize("whole", [False, True])
def test_an_encoder_of_transformers_with_its_dropout(whole):
    ours, hand = Texts(whole=whole), Texts(None if whole else 2, whole)
    if whole:  # chunks of the BERT alone, whose output is a ModelOutput
        bert = hand.text.bert.forward
        hand.text.bert.forward = lambda **given: [
            torch.cat([bert(**{k: v[c] for k, v in given.items()})[0] for c in row_chunks(6, 2)])
        ]
    fit(ours, GradCache("text.bert" if whole else "text", 2), loader=tokens())
    fit(hand, loader=tokens())
    same_gradients(ours, hand)


def test_beside_others_on_the_loss_and_on_a_layer_in_the_encoder():
    def techniques():
        mixing = HardNegativeMixing("text.pool", 0.1, num_pairs=2, loss=0)
        return [FocalContrastive(loss=0), mixing, IDFFlops("text.pool", weight=0.1, ramp_steps=1, position=1)]

    class Whole(Texts):
        """Dropout of whole batches would be another one."""

        def __init__(self):
            super().__init__()
            for layer in self.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
            self.text.bert.encoder.layer[0].attention.self.dropout.p = 0.0

    ours, plain, alone = Whole(), Whole(), Whole()
    fit(ours, GradCache("text", 2), *techniques(), loader=tokens())
    fit(plain, *techniques(), loader=tokens())
    fit(alone, loader=tokens())
    same_gradients(ours, plain)
    assert not same_weights(ours, alone, atol=1e-3)


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x * (1 + random.random()) + float(np.random.rand()))  # noqa: NPY002 # as users write it


def test_numpy_and_python_draw_again_what_they_drew():
    class Drawing(Search):
        def __init__(self, chunk=None):
            super().__init__(chunk)
            self.net = Draws()

    ours, hand = Drawing(), Drawing(chunk=3)
    hand.net.load_state_dict(ours.net.state_dict())
    ends = []
    for module, techniques in ((ours, [GradCache("net", 3)]), (hand, [])):
        fit(module, *techniques)
        ends.append((random.random(), np.random.rand(), torch.rand(())))  # noqa: NPY002 # as above
    same_gradients(ours, hand)
    assert ends[0] == ends[1]


def test_methods_and_several_names():
    for names in ("encode", ["encode", "net"], ["net", "net"]):
        ours, hand = Search(), Search(chunk=3)
        fit(ours, GradCache(names, 3))
        fit(hand)
        same_gradients(ours, hand)
        assert "encode" not in vars(ours)
        assert "forward" not in vars(ours.net)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's look at what passes a graph break
@pytest.mark.parametrize(("way", "backend"), [("wrapped", "aot_eager"), ("in place", "eager"), ("module", "aot_eager")])
def test_compiled_encoders(way, backend):
    found = []
    for chunk, techniques in ((None, [GradCache("net", 4)]), (4, []), (None, [])):
        torch.compiler.reset()
        module = Search(chunk, dropout=0.0)
        if techniques and way == "wrapped":
            module.net = torch.compile(module.net, backend=backend)
        elif techniques and way == "in place":
            module.net.compile(backend=backend)
        whole = techniques and way == "module"
        fit(torch.compile(module, backend=backend) if whole else module, *techniques, max_steps=2)
        found.append(module)
    torch.compiler.reset()
    same_gradients(*found[:2])
    same_gradients(*found[::2])


@pytest.mark.parametrize("inside", [False, True])
def test_beside_checkpoints_of_the_users_own(inside):
    class Checkpointed(Search):
        def encode(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    ours, hand = Checkpointed(), Search(chunk=3)
    fit(ours, GradCache("encode" if inside else "net", 3))
    fit(hand)
    same_gradients(ours, hand)


# -- two ranks --------------------------------------------------------------------------------------------------------


class Counted(Search):
    """Notes when gradients are reduced over the ranks."""

    def __init__(self, chunk=None):
        super().__init__(chunk)
        self.reduced = []

    def on_train_start(self):
        self.trainer.strategy.model.register_comm_hook(self.reduced, _noted)


def _noted(reduced, bucket):
    reduced.append(bucket.index())
    work = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def on_rank(static):
    found = []
    for module, techniques in ((Counted(), [GradCache("net", 3)]), (Counted(chunk=3), [])):
        loader = DataLoader(TensorDataset(*make_tensors()), 8)
        torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
        strategy = DDPStrategy(process_group_backend="gloo", static_graph=static)
        make_trainer(callbacks=techniques, devices=2, strategy=strategy).fit(module, loader)
        found.append(module)
    same_gradients(*found)
    return [module.reduced for module in found], [p.detach() for p in found[0].parameters()]


@pytest.mark.parametrize("static", [False, True])
def test_two_ranks_reduce_once_in_a_step(two_processes, static):
    ((ours, by_hand), weights), (_, others) = two_processes.run(on_rank, static)
    assert len(ours) == len(by_hand) == 4  # two epochs of two steps, one bucket
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


# -- what is told -----------------------------------------------------------------------------------------------------


class Runs(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 3), function
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, *more):
        return self.function(self, x, *more)


def counts_up(net, x):
    net.count.add_(1)
    return net.layer(x)


class Odd(Search):
    def __init__(self, net, more=()):
        super().__init__()
        self.net, self.more = net, more

    def encode(self, x):
        out = self.net(x, *self.more)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            partial(Odd, nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))),
            "buffer '1.* of 'net' changes .* of single c",
        ),
        (partial(Odd, Runs(counts_up)), "buffer 'count' of 'net' changes .* once more for each"),
        (
            partial(Odd, Runs(lambda net, x: net.layer(x - x.mean(0)))),
            "what 'net' returns for a row depends on the oth",
        ),
        (partial(Odd, Runs(lambda net, x: (net.layer(x), x.sum()))), r"'net' returns for chunks .* a tensor \(\)"),
        (partial(Odd, Runs(lambda net, x: (net.layer(x), object()))), "'net' returns for chunks .* a object"),
        (partial(Odd, Runs(lambda net, x: net.layer(x)[:1])), r"'net' returns .* a tensor \(1, 3\)"),
        (partial(Odd, Runs(lambda net, x, f: net.layer(x)), (print,)), "cannot cut .* Tensor, builtin_function"),
        (partial(Classifier, lambda module, batch: module.net[0](batch[0]).sum()), "'net' was not called with grad"),
    ],
)
def test_what_cannot_be_in_chunks_is_told(module, said):
    with pytest.raises(MisconfigurationException, match=f"GradCache.*{said}"):
        fit(module(), GradCache("net", 3))


def test_batch_norm_in_evaluation_mode_is_fine():
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))

    class Frozen(Odd):
        def on_train_epoch_start(self):
            self.net[1].eval()

    fit(Frozen(net), GradCache("net", 3), max_epochs=1)


class Generated(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        self.draws = torch.Generator()


@pytest.mark.parametrize(
    ("module", "techniques", "said"),
    [
        (Search, [GradCache("nets", 3)], "'nets'.*net"),
        (Search, [GradCache("chunk", 3)], "'chunk'"),
        (Search, [GradCache("net", 3), NestedDropout("net.1", 2.0)], "NestedDropout changes the layer 'net.1' in it"),
        (Search, [GradCache("net", 3), GradCache("net.0", 3, name="two")], "both run 'net.0' in chunks"),
        (partial(Odd, nn.Sequential(Generated())), [GradCache("net", 3)], "the layer '0' in 'net' draws from a gen"),
    ],
)
def test_who_cannot_stand_beside_it(module, techniques, said):
    with pytest.raises(MisconfigurationException, match=f"GradCache.*{said}"):
        fit(module(), *techniques)


def test_reentrant_checkpoints_and_split_parameters_are_refused():
    class Reentrant(Search):
        def encode(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=True)

    with pytest.raises(
        MisconfigurationException, match=r"GradCache: 'net' runs without gradient .*use_reentrant=False"
    ):
        fit(Reentrant(), GradCache("net", 3))
    fsdp = SimpleNamespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(
        MisconfigurationException, match=r"GradCache runs layers once more .* whole parameters, which FS"
    ):
        GradCache("net", 3).check(fsdp, Search())


class Reads(_Toy, StepTechnique):
    feature_layers = ("net.0",)

    def __init__(self):
        super().__init__()
        self.seen = []

    def step_term(self, step):
        self.seen.append(([tuple(one.shape) for one in step.passes["net.0"]], tuple(step.features["net.0"].shape)))
        return sum(rows.square().mean() for rows in step.passes["net.0"])


def test_layers_in_the_encoder_are_read_as_of_whole_batches_and_train_what_is_before_them():
    ours, plain, reads = Search(dropout=0.0), Search(dropout=0.0), Reads()
    fit(ours, GradCache("net", 3), reads, precision="64-true")
    fit(plain, Reads(), precision="64-true")
    assert reads.seen == [([(8, 8)] * 2, (8, 8))] * 8
    same_gradients(ours, plain)


def test_a_call_may_write_into_the_dictionary_it_is_given():
    """As modules of sentence-transformers do: what it wrote is not there when a chunk runs once more."""

    class Writing(nn.Linear):
        def forward(self, features):
            if "embedding" not in features:
                features["embedding"] = super().forward(features["x"]).tanh()
            return features["embedding"]

    class Search(LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = Writing(4, 3)
            nn.init.eye_(self.encoder.weight)

        def training_step(self, batch, batch_idx):
            rows = self.encoder({"x": batch})
            return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    found = []
    for callbacks in ([], [GradCache("encoder", 2)]):
        module = Search()
        nn.init.zeros_(module.encoder.bias)
        data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        make_trainer(callbacks=callbacks, max_epochs=1).fit(module, DataLoader(data, 6))
        found.append(module.encoder.weight.detach())
    torch.testing.assert_close(*found)


def test_factors_train_in_layers_of_the_encoder_and_a_layer_of_theirs_alone_is_told():
    found = []
    for callbacks in ([], [GradCache("net", 3)]):
        module = Search(dropout=0.0)
        fit(module, ALLoRA("net.0", rank=2), *callbacks, precision="64-true")
        found.append(module)
    assert same_weights(*found, atol=1e-12)
    with pytest.raises(MisconfigurationException, match=r"the layer 'net.0' .* past what ALLoRA has put"):
        fit(Search(), ALLoRA("net.0", rank=2), GradCache("net.0", 3))
