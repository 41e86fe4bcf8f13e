"""SyntheticUnknowns and LocalMeanTeacher."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import DeepPrompts, LocalMeanTeacher, ModalityDropout, OnePrompt, SyntheticUnknowns
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.row_bits import keep_mask
from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.functional import FeatureGenerator, nearest_classes, synthesis_losses, window_shares, window_size
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.problems import KINDS, Problem
from tests.finetuning import digit_clip
from tests.toys import QUIET, Classifier, StepLosses, fit, same_weights

pytestmark = QUIET


# -- by hand ----------------------------------------------------------------------------------------------------------


def waves(*shape, step=1.0, start=0.0):
    """Numbers in [-1, 1], the same on every machine."""
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64) + start).reshape(shape)


def unit(rows):
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def made(p, query, keys, values, keep, heads, share):
    """A feature for one query, head after head; p has the generator's weights by name."""
    width, out = len(query), []
    size = width // heads
    given = [p["attention.in_proj_weight"][i * width :][:width] for i in range(3)]
    shifts = [p["attention.in_proj_bias"][i * width :][:width] for i in range(3)]
    q = given[0] @ query + shifts[0]
    k = [given[1] @ key + shifts[1] for key in keys]
    v = [given[2] @ value + shifts[2] for value in values]
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = torch.stack([(q[part] * key[part]).sum() / math.sqrt(size) for key in k])
        weights = scores.exp() / scores.exp().sum()
        if keep is not None:
            weights = weights * keep[h] / (1 - share)
        out.append(sum(w * value[part] for w, value in zip(weights, v, strict=True)))
    attended = p["attention.out_proj.weight"] @ torch.cat(out) + p["attention.out_proj.bias"]
    hidden = (p["ffn.0.weight"] @ query + p["ffn.0.bias"]).clamp(min=0)
    return unit(p["ffn.2.weight"] @ hidden + p["ffn.2.bias"] + attended)


def losses_of_row(p, v, y, known, unknown, near, values, scale, scheme="joint", keep=None, heads=4, share=0.0):
    """The four losses of one image."""
    constant = known.detach()
    make = partial(made, p, heads=heads, share=share)
    of = {name: [None if keep is None else keep[name][:, j, :1] for j in range(len(near))] for name in "bc"}
    if scheme == "joint":
        a = make(constant[y], constant[near], values, keep=None if keep is None else keep["a"][:, 0])
    else:
        alone = [
            make(constant[y], constant[n][None], value[None], keep=None if keep is None else keep["a"][:, 0, j : j + 1])
            for j, (n, value) in enumerate(zip(near, values, strict=True))
        ]
        a = unit(sum(alone) / len(alone))
    b = [make(constant[n], constant[y][None], v[None], keep=of["b"][j]) for j, n in enumerate(near)]
    order = sorted(range(len(unknown)), key=lambda c: -float(constant[y] @ unknown[c].detach()))[: len(near)]
    c = [make(unknown[t], constant[y][None], v[None], keep=of["c"][j]) for j, t in enumerate(order)]
    count = len(near)

    def entropy(feature, classes, target):
        logits = scale * classes @ feature
        return torch.logsumexp(logits, 0) - logits[target]

    regression = (a - v.detach()).square().sum() + sum(
        (x - t).square().sum() for x, t in zip(b, values, strict=True)
    ) / count
    return {
        "regression": regression,
        "a": entropy(a, known, y),
        "b": sum(entropy(x, known, n) for x, n in zip(b, near, strict=True)) / count,
        "c": sum(entropy(x, unknown, t) for x, t in zip(c, order, strict=True)) / count,
    }


UNKNOWN = waves(3, 16, step=1.7).tolist()


class SynthesizedByHand(Hand):
    """Neighbours, statistics and losses image by image."""

    def begin(self, loop):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.technique.derived_seed("own modules"))
            self.net = FeatureGenerator(16, 4, 0.25)
        self.seen = [[] for _ in range(4)]

    def own(self):
        return list(self.net.parameters())

    def term(self, loop, moment):
        technique, p = self.technique, dict(self.net.named_parameters())
        w, u = unit(moment.weights["net.head.weight"]), unit(torch.tensor(UNKNOWN))
        rows = unit(moment.features["net.act_body"])
        for v, y in zip(rows.detach(), moment.y.tolist(), strict=True):
            self.seen[y].append(v)
        means = [torch.stack(held).mean(0) if held else torch.zeros(16) for held in self.seen]
        spread = [torch.stack(held).std(0, correction=0) if held else torch.zeros(16) for held in self.seen]
        draws = torch.rand(16, generator=moment.draws(technique))
        base = moment.draws(technique).initial_seed()
        places = torch.arange(len(rows))
        shapes = {"a": (4, 1, 2), "b": (4, 2, 1), "c": (4, 2, 1)}
        keep = {
            name: keep_mask(technique.derived_seed(f"{base} {name}"), places, range(1), shape, 0.25)[0]
            for name, shape in shapes.items()
        }
        total = 0.0
        for i, (v, y) in enumerate(zip(rows, moment.y.tolist(), strict=True)):
            others = [c for c in range(4) if c != y and self.seen[c]]
            if len(others) < 2:
                continue
            near = sorted(others, key=lambda c: -float(means[y] @ means[c]))[:2]
            values = torch.stack([means[n] + 0.5 * draws * spread[n] for n in near])
            found = losses_of_row(
                p, v, y, w, u, near, values, 2.0, technique.scheme, {k: m[i] for k, m in keep.items()}, share=0.25
            )
            total = total + 0.1 * found["regression"] + 0.2 * found["a"] + (0.2 * found["b"] + 0.4 * found["c"]) / 2
        return total / len(rows) if torch.is_tensor(total) else rows.sum() * 0.0


class TaughtByHand(Hand):
    """Snapshots when an epoch begins, of which there are two."""

    def begin(self, loop):
        self.held = []

    def observe(self, loop, moment):
        if (moment.count - 1) % 6 == 0:
            self.held.append(loop.constants())
        mean = self.held[0]
        for newer in self.held[1:]:
            mean = {name: 0.4 * value + 0.6 * newer[name] for name, value in mean.items()}
        self.seen = loop.run(mean, moment.x)[1]["net.act_body"].detach()

    def term(self, loop, moment):
        return 3.0 * (moment.features["net.act_body"] - self.seen).square().mean()


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


def small_generator(width=8, heads=2, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return FeatureGenerator(width, heads, **options)


MAKES = {"layer": "net.act_body", "known": "net.head.weight", "unknown": UNKNOWN, "neighbours": 2, "scale": 2.0}
WEIGHTS = [f"{of}_weight" for of in ("regression", "known", "neighbour", "unknown")]
MAKES |= {
    "regression_weight": 0.1,
    "known_weight": 0.2,
    "neighbour_weight": 0.2,
    "unknown_weight": 0.4,
    "noise": 0.5,
    "dropout": 0.25,
    "warmup": 0.0,
}
TOKENS = waves(3, 16).tolist()
TEACHES = {"layer": "net.act_body", "weight": 3.0, "decay": 0.4, "window_min": 1}
CASE = (
    Case(
        make=partial(SyntheticUnknowns, **MAKES),
        neutral=partial(SyntheticUnknowns, **(MAKES | dict.fromkeys(WEIGHTS, 0.0) | {"warmup": 0.2})),
        by_hand=SynthesizedByHand,
        says=(
            "net.act_body, 3 unknown classes, 2 neighbours, joint, weights 0.1, 0.2, 0.2, 0.4",
            "all weights 0: inactive",
            "net.act_body, 3 unknown classes, 2 neighbours, each, weights 0.1, 0.2, 0.2, 0.4; generator alone for 40%",
            "net.act_body, 3 unknown classes, 1 neighbours, joint, weights 4, 1, 1, 2; generator alone for 20%",
        ),
        # Of its own: the head's rows are the embeddings of the classes, and the batch's entry their numbers.
        data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
        variants=[
            partial(SyntheticUnknowns, **(MAKES | {"scheme": "each", "warmup": 0.4})),
            partial(
                SyntheticUnknowns,
                "net.act_body",
                "net.head.weight",
                encoder="net.body",
                unknown_tokens=TOKENS,
                neighbours=1,
            ),
        ],
        invalid=[
            ({**MAKES, "neighbours": 0}, "neighbours"),
            ({**MAKES, "neighbours": 1.5}, "neighbours"),
            ({**MAKES, "noise": -0.1}, "noise"),
            ({**MAKES, "noise": 1.1}, "noise"),
            *(({**MAKES, name: -0.1}, name) for name in WEIGHTS),
            ({**MAKES, "warmup": -0.1}, "warmup"),
            ({**MAKES, "warmup": 1.0}, "warmup"),
            ({**MAKES, "scale": 0.0}, "scale"),
            ({**MAKES, "scheme": "all"}, "scheme"),
            ({**MAKES, "heads": 0}, "heads"),
            ({**MAKES, "dropout": -0.1}, "dropout"),
            ({**MAKES, "dropout": 1.0}, "dropout"),
            ({**MAKES, "lr_factor": -1.0}, "lr_factor"),
            ({**MAKES, "pooling": "max"}, "pooling"),
            ({**MAKES, "own_optimizer": -1}, "own_optimizer"),
            ({**MAKES, "known": None}, "known"),
            ({**MAKES, "unknown": None}, "unknown"),
            ({**MAKES, "unknown_tokens": TOKENS, "encoder": "net.body"}, "unknown"),
            ({**MAKES, "encoder": "net.body"}, "encoder"),
            ({**MAKES, "unknown": None, "unknown_tokens": TOKENS}, "encoder"),
        ],
    ),
    Case(
        make=partial(LocalMeanTeacher, **TEACHES),
        neutral=partial(LocalMeanTeacher, **(TEACHES | {"weight": 0.0})),
        by_hand=TaughtByHand,
        says=(
            "net.act_body, weight=3; up to 10 snapshots, one per epoch, 1 to 9 beside the newest, decay=0.4",
            "weight=0: inactive",
            "net.act_body, weight=1; up to 3 snapshots, one per 2 steps, 0 to 2 beside the newest, decay=0.9",
        ),
        data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
        also=["images", "regression", "tokens"],
        variants=[
            partial(
                LocalMeanTeacher,
                "net.act_body",
                window_min=0,
                window_max=2,
                every_n_steps=2,
                snapshots=4,
                reference="cpu_bfloat16",
            )
        ],
        invalid=[
            ({**TEACHES, "weight": -1.0}, "weight"),
            ({**TEACHES, "window_min": -1}, "window_min"),
            ({**TEACHES, "window_min": 10}, "window_max"),
            ({**TEACHES, "window_max": 2.5}, "window_max"),
            ({**TEACHES, "decay": -0.1}, "decay"),
            ({**TEACHES, "decay": 1.1}, "decay"),
            ({**TEACHES, "every_n_steps": 0}, "every_n_steps"),
            ({**TEACHES, "snapshots": 0}, "snapshots"),
            ({**TEACHES, "reference": "disk"}, "reference"),
        ],
    ),
    NetworkCase(
        make=small_generator,
        inputs=(waves(2, 3, 8).float(), waves(2, 2, 8, step=1.3).float(), waves(2, 2, 8, step=0.7).float()),
        invalid=[
            ({"width": 8, "heads": 0}, "heads"),
            ({"width": 9, "heads": 4}, "width"),
            ({"width": 8, "dropout": 1.0}, "dropout"),
        ],
    ),
)


# -- the formulas -----------------------------------------------------------------------------------------------------

# apple/ml-ogen @ ccfa0df (apple), trainers/ogen.py: `CustomCLIP.forward` on the tensors below in float64, evaluation
# mode, and the losses of `OGEN.forward_backward`, each a mean over its rows, without their weights.
AUTHORS = {
    "regression": 3.401997538432367, "a": 2.3342623748816873, "b": 2.1186691564030817, "c": 1.9089248820233238,
}  # fmt: skip
NEIGHBOURS = [[3, 5, 2], [4, 3, 0], [5, 4, 0], [0, 1, 5], [1, 2, 3], [2, 0, 3]]


def of_waves(width=512):
    """A generator, image features, labels, embeddings of 6 and 5 classes, neighbours and their noisy means."""
    generator = FeatureGenerator(width).double()
    weights = [generator.attention.in_proj_weight, generator.attention.in_proj_bias]
    weights += [*generator.attention.out_proj.parameters(), *generator.ffn.parameters()]
    with torch.no_grad():
        for i, p in enumerate(weights):
            p.copy_(0.08 * waves(*p.shape, step=1.1 + 0.1 * i))
    means, deviations = 0.04 * waves(6, width, step=0.9), 0.02 * waves(6, width, step=0.7).abs()
    labels = torch.tensor([0, 3, 5, 3])
    near = nearest_classes(means, 3)
    values = means[near[labels]] + waves(1, width, step=0.6).abs() * deviations[near[labels]]
    known, unknown = unit(waves(6, width, step=1.7)), unit(waves(5, width, step=2.3))
    return generator, unit(waves(4, width, step=1.3)), labels, known, unknown, near[labels], values


def test_losses_are_those_of_the_authors():
    generator, *given = of_waves()
    assert nearest_classes(0.04 * waves(6, 512, step=0.9), 3).tolist() == NEIGHBOURS
    losses = synthesis_losses(generator, *given, scale=100.0)
    for name, wanted in AUTHORS.items():
        assert losses[name].mean().item() == pytest.approx(wanted, abs=1e-6), name


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("scheme", ["joint", "each"])
def test_losses_image_by_image(scheme, with_dropout):
    generator, v, labels, known, unknown, near, values = of_waves(16)
    rows, keep = torch.arange(4), None
    if with_dropout:
        shapes = {"a": (4, 1, 3), "b": (4, 3, 1), "c": (4, 3, 1)}
        keep = {name: keep_mask(i, rows, range(1), s, 0.1)[0] for i, (name, s) in enumerate(shapes.items())}
    leaves = [v.requires_grad_(), known.requires_grad_(), unknown.requires_grad_()]
    losses = synthesis_losses(generator, v, labels, known, unknown, near, values, 7.0, scheme=scheme, keep=keep)
    gradients = torch.autograd.grad(sum(losses.values()).sum(), leaves, retain_graph=True)
    p, total = dict(generator.named_parameters()), 0.0
    for i, y in enumerate(labels.tolist()):
        of_row = None if keep is None else {name: mask[i] for name, mask in keep.items()}
        wanted = losses_of_row(p, v[i], y, known, unknown, near[i].tolist(), values[i], 7.0, scheme, of_row, share=0.1)
        for name, value in wanted.items():
            assert losses[name][i].item() == pytest.approx(value.item(), abs=1e-10), name
        total = total + sum(wanted.values())
    for own, by_hand in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(own, by_hand)


def test_a_feature_has_length_one_and_without_the_feed_forward_is_that_of_its_key():
    generator, *_ = of_waves(16)
    with torch.no_grad():
        for p in generator.ffn.parameters():
            p.zero_()
    value = waves(1, 1, 16, step=0.4)
    made = generator(waves(1, 5, 16), waves(1, 1, 16, step=0.2), value)
    of = generator.attention
    projected = of.in_proj_weight[32:] @ value[0, 0] + of.in_proj_bias[32:]
    wanted = unit(of.out_proj.weight @ projected + of.out_proj.bias)
    torch.testing.assert_close(made[0], wanted.expand(5, -1))
    torch.testing.assert_close(of_waves(16)[0](waves(2, 3, 16), value, value).norm(dim=-1)[0], torch.ones(3).double())


def test_embeddings_are_constants_for_the_generator_but_those_of_unknown_classes():
    generator, v, labels, known, unknown, near, values = of_waves(16)
    known, unknown = known.requires_grad_(), unknown.requires_grad_()
    losses = synthesis_losses(generator, v, labels, known, unknown, near, values)
    regression = losses["regression"].sum()
    found = torch.autograd.grad(regression, [known, unknown], allow_unused=True, retain_graph=True)
    assert found == (None, None)
    (through_queries,) = torch.autograd.grad(losses["c"].sum(), unknown, retain_graph=True)
    with torch.no_grad():  # as if the queries were constants too
        targets = (known[labels] @ unknown.T).topk(3).indices
    fixed = generator(unknown.detach()[targets], known.detach()[labels][:, None], v[:, None])
    logits = 100.0 * fixed @ unknown.T
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 3
    (without,) = torch.autograd.grad(entropy, unknown)
    assert (through_queries - without).abs().max() > 1e-3


def test_classes_without_features_are_no_neighbours():
    means = waves(4, 8)
    near = nearest_classes(means, 2, seen=torch.tensor([True, True, False, True]))
    assert near.tolist()[0] in ([1, 3], [3, 1])
    assert all(c not in row for c, row in enumerate(near.tolist()))
    alike = nearest_classes(torch.ones(4, 8), 3, classes=torch.tensor([2, 0]))
    assert alike.tolist() == [[0, 1, 3], [1, 2, 3]]


def test_the_window_grows_by_half_a_cosine():
    assert [window_size(t, 10) for t in range(11)] == [2, 2, 2, 3, 4, 5, 6, 7, 8, 8, 9]
    assert [window_size(t, 3, 0, 4) for t in range(6)] == [0, 1, 3, 4, 4, 4]
    for size, decay in ((0, 0.5), (4, 0.9), (3, 0.0), (3, 1.0)):
        shares = window_shares(size, decay)
        wanted = [decay**size] + [(1 - decay) * decay ** (size - i) for i in range(1, size + 1)]
        assert shares.tolist() == pytest.approx(wanted, abs=1e-15)
        assert shares.sum().item() == pytest.approx(1.0, abs=1e-15)


# -- in a fit ---------------------------------------------------------------------------------------------------------


class Cosine(Classifier):
    """Products of unit vectors with a table of classes, five times."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = nn.Parameter(waves(3, 8, step=1.9).float())

    def training_step(self, batch, batch_idx):
        hidden = F.normalize(self.net[1](self.net[0](batch[0])), dim=1)
        return F.cross_entropy(5 * hidden @ F.normalize(self.table, dim=1).T, batch[1])


TOY = {"layer": "net.1", "known": "table", "unknown": waves(2, 8, step=1.4).float(), "neighbours": 2, "scale": 2.0}


def test_the_generator_is_alone_at_first():
    class Noted(Cosine):
        def on_train_batch_end(self, *_):
            self.__dict__.setdefault("moved", []).append({n: p.detach().clone() for n, p in self.named_parameters()})

    technique, model = SyntheticUnknowns(**TOY, warmup=0.5), Noted()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name in ("table", "net.0.weight")}
    fit(model, technique)
    for name, first in start.items():  # embeddings, and what makes the features
        assert [torch.equal(moved[name], first) for moved in model.moved] == [True] * 4 + [False] * 4
    plain = Noted()
    fit(plain)
    assert not same_weights(plain, model)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"neighbours": 3}, "below the number of known classes and at most that of unknown ones, found 3 and 2"),
        ({"unknown": waves(2, 12).tolist()}, "must have as many numbers"),
        ({"heads": 3}, "embeddings have 8 numbers, which `heads`=3 does not divide"),
        ({"known": "net.0.bias"}, "must be a matrix"),
        ({"known": "tables"}, "tables"),
        ({"known": "net.2"}, "must be a matrix|gave"),
        ({"layer": "net"}, "where a feature for each|gave NoneType"),
        ({"unknown": None, "unknown_tokens": [[0.0] * 6], "encoder": "encode"}, "is no layer or method of Cosine"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(arguments, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Cosine(), SyntheticUnknowns(**{**TOY, **arguments}))


def test_a_class_without_an_embedding_is_refused():
    class Two(Cosine):
        def __init__(self):
            super().__init__()
            self.two = nn.Parameter(waves(2, 8).float())

    with pytest.raises(MisconfigurationException, match="the batch has class 2, and there are embeddings of 2"):
        fit(Two(), SyntheticUnknowns(**{**TOY, "known": "two", "neighbours": 1}))


def test_a_window_as_long_as_the_training_needs_an_end():
    with pytest.raises(MisconfigurationException, match="whose length is not known"):
        fit(Classifier(), LocalMeanTeacher("net.3"), max_epochs=-1, max_steps=-1, max_time="00:00:00:01")


def test_the_teacher_of_a_new_training_begins_anew_and_one_that_is_alone_agrees():
    technique, model = LocalMeanTeacher("net.3", weight=2.0), Classifier(lr=0.0)
    fit(model, technique)
    plain = Classifier()
    fit(plain, max_epochs=1)
    again = Classifier()
    fit(again, technique, max_epochs=1)
    fresh = Classifier()
    fit(fresh, LocalMeanTeacher("net.3", weight=2.0), max_epochs=1)
    assert same_weights(again, fresh)
    assert not same_weights(again, plain)


def test_what_is_trained_beside_the_module_is_in_no_snapshot_and_refused():
    teacher = LocalMeanTeacher("net.3")
    for other in (DeepPrompts("net"), OnePrompt()):
        assert "that would be the network without it" in conflict_between(other, teacher)
        assert conflict_between(other, LocalMeanTeacher("net.3", weight=0.0)) is None
    for other in (SyntheticUnknowns(**TOY), ModalityDropout(layer="net.0", null_shape=[8])):  # in evaluation as it was
        assert conflict_between(other, teacher) is None


def test_a_layer_that_gives_no_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Wrapped(Classifier):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.net(self.pair(x)[0])

    with pytest.raises(MisconfigurationException, match="gives tuple in this step, and tuple in the teacher"):
        fit(Wrapped(), LocalMeanTeacher("pair"))


class Names(Classifier):
    """The digit CLIP of two libraries, tuned on the names of the digits 0 to 4."""

    def __init__(self, library):
        super().__init__(lr=0.01)
        self.net, self.library = nn.Identity(), library
        self.clip = digit_clip.hugging_face() if library == "transformers" else digit_clip.open_clip()

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.library == "transformers":
            return F.cross_entropy(self.clip(input_ids=TEXTS[:5], pixel_values=x).logits_per_image, y)
        image, text, scale = self.clip(x, TEXTS[:5])
        return F.cross_entropy(scale * image @ text.T, y)


TEXTS = digit_clip.tokens(*(digit_clip.TEMPLATES[0].format(name) for name in digit_clip.DIGITS))
HOSTS = {
    "layer": ("transformers", "clip.visual_projection", {"known": "clip.text_projection"}, "clip.get_text_features"),
    "tokens": ("transformers", "clip.visual_projection", {"known_tokens": TEXTS[:5]}, "clip.get_text_features"),
    "open_clip": ("open_clip", "clip.visual", {"known_tokens": TEXTS[:5].tolist()}, "clip.encode_text"),
}


def test_the_digit_clip_of_two_libraries_by_layer_and_by_tokens():
    images, labels = digit_clip.unseen()
    chosen = torch.stack([(labels == c).nonzero()[:3, 0] for c in range(5)], 1).flatten()  # all classes in a batch
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images[chosen], labels[chosen]), 8)
    losses = {}
    for name, (library, layer, known, encoder) in HOSTS.items():
        technique = SyntheticUnknowns(layer, **known, unknown_tokens=TEXTS[5:], encoder=encoder, scale=13.9, warmup=0.0)
        seen = losses[name] = StepLosses()
        fit(Names(library), technique, seen, loader=loader, max_epochs=1)
    plain = StepLosses()
    fit(Names("open_clip"), plain, loader=loader, max_epochs=1)
    assert losses["layer"].losses == pytest.approx(losses["tokens"].losses, abs=1e-4)  # one pass more, in another batch
    assert losses["layer"].losses == pytest.approx(losses["open_clip"].losses, abs=1e-3)  # another library
    assert losses["layer"].losses[0] - plain.losses[0] > 1.0
