"""VirtualOutliers and OnePrompt: the head knows what is outside the data; one prompt for all tasks."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CutMix, OnePrompt, PredictionDistillation, VirtualOutliers
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.functional import (
    boundary_points,
    energy,
    energy_hinge_loss,
    neighbour_distances,
    outlier_candidates,
    synthesize_outliers,
    train_head_on_outliers,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import BATCHES, KINDS, Problem, seeded
from tests.toys import (
    QUIET,
    Callback,
    Classifier,
    LightningModule,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET


class OutliersByHand(Hand):
    """In the second of two epochs the head alone, on features of the first one's network."""

    def rests(self, name, moment):
        return moment.count > BATCHES and not name.startswith("net.head")

    def freezes_own(self, moment):
        return moment.count > BATCHES

    def term(self, loop, moment):
        batch = moment.count - BATCHES - 1
        if batch < 0:
            return None
        if batch == 0:
            weights = {name: weight.detach() for name, weight in moment.weights.items()}
            features = loop.run(weights, loop.x)[1]["net.act_body"]
            noise = torch.randn(4, 4, 16, generator=moment.draws(self.technique))
            self.outliers = kept(features, boundary_points(features, 4, 3), noise, 16, 0.5, 3).float()
        rows = self.outliers[2 * batch : 2 * batch + 2]
        logits = rows @ moment.weights["net.head.weight"].T + moment.weights["net.head.bias"]
        inside = -moment.features["net.head"].exp().sum(1).log() + 3.0
        outside = -0.5 + logits.exp().sum(1).log()
        return 0.7 * sum(F.huber_loss(side.relu(), torch.zeros_like(side)) for side in (inside, outside))


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


SMALL = {"head": "net.head", "epochs": 1, "weight": 0.7, "threshold": -3.0, "outlier_threshold": -0.5, "sigma": 0.5}
SMALL |= {"k": 3, "select": 4, "sample_from": 4, "per_class": 4}
INVALID = [
    ({"head": "h", name: value}, name)
    for name, values in {
        **dict.fromkeys(("epochs", "k", "select", "sample_from", "per_class"), (0, 1.5)),
        "weight": (-0.1,),
        "sigma": (0.0,),
        "threshold": (float("nan"),),
        "outlier_threshold": (-15.0,),
        "candidates": ("ours",),
        "feature_noise": ("unit",),
    }.items()
    for value in values
]
OF_OUTLIERS = Case(
    make=partial(VirtualOutliers, **SMALL),
    neutral=partial(VirtualOutliers, "net.head", weight=0.0),
    by_hand=OutliersByHand,
    says=(
        "net.head alone in the last 1 epochs, weight=0.7, 4 outliers a class (paper, sigma=0.5); energies below -3, of"
        " outliers above -0.5; tasks before: 0",
        "weight=0: inactive",
        "net.head alone in the last 2 epochs, weight=0.1, 2 outliers a class (released, sigma=1 of the features');"
        " energies below the median, of outliers above that of the bias; your loss over the task's own classes;"
        " tasks before: 0",
    ),
    # A problem of its own: where there are several losses, the batch's entry is no class number.
    data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
    variants=[
        partial(
            VirtualOutliers,
            "net.head",
            2,
            threshold=None,
            outlier_threshold=None,
            sigma=1.0,
            k=4,
            select=3,
            sample_from=4,
            per_class=2,
            candidates="released",
            feature_noise="relative",
            new_classes=[4, 4],
        )
    ],
    invalid=[*INVALID, ({"head": "h", "new_classes": [2, -1]}, "new_classes")],
)


class Attention(nn.Module):
    """Two heads, as timm has it."""

    def __init__(self, width=16):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        size, count, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(size, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(size, count, width))


def tokens_network():
    layers = {"first": nn.Linear(8, 16), "act": nn.Tanh(), "body": nn.Linear(16, 16), "act_body": nn.Tanh()}
    layers |= {"tokens": nn.Unflatten(1, (2, 8)), "attend": Attention(8), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers, head=nn.Linear(16, 4)))


def attended(tokens, weights, key, value):
    """Attention of two heads with keys and values in front, head by head."""
    q, k, v = (tokens @ weights["qkv.weight"].T + weights["qkv.bias"]).chunk(3, dim=2)
    k, v = (torch.cat([p.expand(len(tokens), -1, -1), rows], 1) for p, rows in ((key, k), (value, v)))
    heads, half = [], q.shape[2] // 2
    for part in (slice(0, half), slice(half, None)):
        scores = q[:, :, part] @ k[:, :, part].transpose(1, 2) / half**0.5
        heads.append(scores.softmax(2) @ v[:, :, part])
    return torch.cat(heads, 2) @ weights["proj.weight"].T + weights["proj.bias"]


class PromptedByHand(Hand):
    stands_inside = True

    def begin(self, loop):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.technique.derived_seed("own modules"))
            self.key, self.value = (torch.rand(3, 8).requires_grad_() for _ in range(2))

    def own(self):
        return [self.key, self.value]

    def rests(self, name, moment):
        return not name.startswith(("net.first", "net.head"))

    def edit_input(self, name, rows, moment):
        if name == "net.attend":
            self.tokens = rows
        return rows

    def edit(self, name, rows, moment, copy):
        return self.prompted(moment.weights) if name == "net.attend" else rows

    def begin_evaluation(self, weights):
        prefix = self.technique.own["net.attend"]
        self.key, self.value, self.weights = prefix.key.detach(), prefix.value.detach(), weights

    def edit_evaluation(self, name, rows):
        if name == "net.tokens":
            self.tokens = rows
        return self.prompted(self.weights) if name == "net.attend" else rows

    def prompted(self, weights):
        own = {key[len("net.attend.") :]: w for key, w in weights.items() if key.startswith("net.attend.")}
        return attended(self.tokens, own, self.key, self.value)


OF_PROMPTS = Case(
    make=partial(OnePrompt, ["net.first*", "net.head*"], [6]),
    neutral=partial(OnePrompt, ["net.first*", "net.head*"], []),
    by_hand=PromptedByHand,
    says=(
        "3 keys and values before those of the first 1 attention layers; trained beside them: net.first*, net.head*",
        "no prompts: inactive",
        "1 keys and values before those of the first 1 attention layers among *attend; trained beside them: what you"
        " have left trainable",
    ),
    data=Problem(tokens_network, labelled, F.cross_entropy, serves=["classification"]),
    variants=[partial(OnePrompt, lengths=[2], layers="*attend", lr_factor=2.0, weight_decay=0.1)],
    invalid=[
        ({"lengths": [3]}, "lengths"),
        ({"lengths": [-2]}, "lengths"),
        ({"lengths": [2.5]}, "lengths"),
        ({"lr_factor": -1.0}, "lr_factor"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"own_optimizer": -1}, "own_optimizer"),
    ],
)
CASE = (OF_OUTLIERS, OF_PROMPTS)


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_distances_to_neighbours_by_hand():
    data, rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert neighbour_distances(rows, data, 1).tolist() == [0.0, 0.0]
    assert neighbour_distances(rows, data, 2).tolist() == [25.0, 25.0]
    assert neighbour_distances(rows, data, 3).tolist() == [100.0, 25.0]
    assert neighbour_distances(rows, data, 9).tolist() == [100.0, 25.0]  # there are three
    many = torch.arange(2500.0)[:, None]
    assert torch.equal(neighbour_distances(many, many, 2), torch.ones(2500))  # in parts


def test_the_border_of_a_cluster_and_a_far_point_is_the_far_point():
    draw = torch.Generator().manual_seed(0)
    cluster = torch.tensor([5.0, 0.0, 0.0]) + 0.1 * torch.randn(30, 3, generator=draw)
    points = torch.cat([cluster[:12], torch.tensor([[0.0, 7.0, 0.0]]), cluster[12:]])
    assert boundary_points(points, 1, 5).tolist() == [12]
    assert boundary_points(points * torch.rand(31, 1, generator=draw).add(0.5), 1, 5).tolist() == [12]  # directions
    assert sorted(boundary_points(points, 99, 5).tolist()) == list(range(31))


def kept(features, boundary, noise, count, sigma, k):
    """The paper's outliers, one by one in float64."""
    unit = [row / row.norm() for row in features.double()]
    found = []
    for position, draws in zip(boundary.tolist(), noise.double(), strict=True):
        for draw in draws:
            row = features[position].double() + sigma * draw
            distance = sorted(float((row / row.norm() - other).square().sum()) for other in unit)[k - 1]
            found.append((distance, row))
    return torch.stack([row for _, row in sorted(found, key=lambda pair: -pair[0])[:count]])


def test_outliers_are_the_candidates_farthest_from_the_data_and_all_distinct():
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(20, 5, generator=draw) + 2.0
    boundary, noise = boundary_points(features, 4, 3), torch.randn(4, 6, 5, generator=draw)
    made = synthesize_outliers(features, boundary, noise, 10, sigma=0.7, k=3)
    torch.testing.assert_close(made.double(), kept(features, boundary, noise, 10, 0.7, 3), atol=1e-6, rtol=1e-6)
    assert len(made.unique(dim=0)) == 10
    still = synthesize_outliers(features, boundary, noise, 99, sigma=1e-12, k=3)
    assert still.shape == (24, 5)
    wanted = {tuple(row) for row in features[boundary].tolist()}
    assert {tuple(row) for row in still.tolist()} == wanted  # without noise: the points of the border
    scaled = synthesize_outliers(features, boundary, noise, 99, sigma=2.0, k=3, feature_noise="relative")
    by_hand = outlier_candidates(features[boundary], noise, 2.0 * features.std(0, correction=0))
    assert {tuple(row) for row in scaled.tolist()} == {tuple(row) for row in by_hand.tolist()}


def test_energies_by_hand():
    logits = torch.tensor([[1.0, 2.0, 700.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert energy(logits, slice(0, 2)).tolist() == pytest.approx([-2.3132616875182228, -0.6931471805599453])
    assert energy(logits).tolist() == pytest.approx([-700.0, -1.0986122886681098])
    mask, positions = torch.tensor([True, False, True]), torch.tensor([2, 0])
    assert torch.equal(energy(logits, mask), energy(logits, positions))
    assert energy(torch.full((1, 2), 6e4).half()).item() == pytest.approx(-60000.6931)  # float16 would overflow


def test_the_hinge_is_zero_with_zero_gradient_between_the_thresholds():
    inside, outside = torch.tensor([-16.0, -20.0]).requires_grad_(), torch.tensor([-2.0, 0.0]).requires_grad_()
    loss = energy_hinge_loss(inside, outside, -15.0, -3.0)
    loss.backward()
    assert loss.item() == 0.0
    assert inside.grad.tolist() == outside.grad.tolist() == [0.0, 0.0]
    inside, outside = torch.tensor([-14.5, -9.0]), torch.tensor([-3.2, -7.0, 1.0])
    by_hand = (0.125 + 5.5) / 2 + (0.02 + 3.5 + 0.0) / 3
    assert energy_hinge_loss(inside, outside, -15.0, -3.0).item() == pytest.approx(by_hand, rel=1e-6)
    assert energy_hinge_loss(inside, outside[:0], -15.0, -3.0).item() == pytest.approx(5.625 / 2)


# jpmorganchase/ovor @ 4f59b75, learners/ood.py, `NPOS` on these tensors in float32, with an exact index in place of
# faiss (its distances are squared L2) and these draws: `_boundary`, the distances behind it, `_generate`, `loss`.
FEATURES = torch.sin(torch.arange(48.0) ** 1.5).reshape(12, 4) + 1.5
NOISE = torch.cos(torch.arange(20.0) ** 1.3).reshape(5, 4)
OF_DATA, OUTSIDE = 6 * torch.sin(torch.arange(15.0)).reshape(5, 3), 4 * torch.cos(torch.arange(12.0)).reshape(4, 3)


def test_what_the_code_of_the_authors_gives():
    unit = FEATURES / FEATURES.norm(dim=1, keepdim=True)
    distances = [0.050398360937833786, 0.04016567021608353, 0.08422603458166122, 0.0892988070845604]
    assert neighbour_distances(unit, unit, 3)[:4].tolist() == pytest.approx(distances, abs=1e-6)
    boundary = boundary_points(FEATURES, 4, 3)
    assert boundary.tolist() in ([11, 8, 4, 7], [11, 8, 4, 3])  # the authors' is the former; 3 and 7 are equally far
    made = synthesize_outliers(FEATURES, boundary, NOISE, 6, sigma=0.5, k=3, candidates="released")
    first = [-0.3556552231311798, 0.05979562923312187, 0.22543013095855713, -0.4145353436470032]
    fifth = [0.5, 0.27015116810798645, -0.3890051543712616, -0.25759169459342957]
    wanted = torch.tensor([first] * 4 + [fifth] * 2)  # each of the draws once for each point of the border
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0.0)


def test_what_the_loss_of_the_authors_gives():
    data, outliers = OF_DATA.clone().requires_grad_(), OUTSIDE.clone().requires_grad_()
    energies = energy(data), energy(outliers)
    loss = 0.1 * energy_hinge_loss(*energies, -4.0, -3.5)
    loss.backward()
    assert [e.mean().item() for e in energies] == pytest.approx([-4.267480373382568, -2.400681257247925], abs=1e-6)
    assert loss.item() == pytest.approx(0.08505839854478836, abs=1e-6)
    second = [-0.01988203637301922, -9.092516847886145e-05, -2.7039695851271972e-05]
    assert data.grad[1].tolist() == pytest.approx(second, abs=1e-6)
    first = [0.013990660198032856, 0.002224649302661419, 4.849970355280675e-05]
    assert outliers.grad[0].tolist() == pytest.approx(first, abs=1e-6)


# -- virtual outliers in a fit ----------------------------------------------------------------------------------------


def test_a_head_alone_after_a_fit_by_hand():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head, features, labels = nn.Linear(3, 5), torch.randn(40, 3), torch.arange(40) % 2 + 1
    ours, hand = (torch.Generator().manual_seed(1) for _ in range(2))
    copied = nn.Linear(3, 5)
    copied.load_state_dict(head.state_dict())
    before = {name: weight.clone() for name, weight in head.named_parameters()}
    few = {"sigma": 0.5, "k": 3, "select": 4}
    losses = train_head_on_outliers(
        head, features, labels, epochs=1, batch_size=40, lr=0.1, weight=2.0, threshold=-2.0, outlier_threshold=-1.0,
        sample_from=6, per_class=5, generator=ours, **few,
    )  # fmt: skip
    noise = torch.randn(4, 6, 3, generator=hand)
    outliers = synthesize_outliers(features, boundary_points(features, 4, 3), noise, 10, 0.5, 3)
    logits = copied(features)[:, 1:3]
    inside = (2 - logits.logsumexp(1)).clamp(min=0)
    outside = (copied(outliers)[:, 1:3].logsumexp(1) - 1).clamp(min=0)
    hinges = sum(F.huber_loss(one, torch.zeros_like(one)) for one in (inside, outside))
    loss = F.cross_entropy(logits, labels - 1) + 2 * hinges
    loss.backward()
    torch.optim.Adam(copied.parameters(), 0.1).step()
    assert torch.allclose(losses, loss.detach()[None])
    assert torch.allclose(head.weight, copied.weight, atol=1e-6)
    assert torch.equal(head.weight[3:], before["weight"][3:]), "a class of another task"
    more = train_head_on_outliers(head, features, labels, epochs=20, batch_size=16, lr=0.1, per_class=5, **few)
    assert more[-1] < more[0]


class Task(Classifier):
    """Labels of some classes of six, and a plain training step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[3] = nn.Linear(8, 6)


def task(number, size=24):
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(number)) + number
    return TensorDataset(x, 2 * number + (x[:, 0] > x[:, 1]).long())


FITTED = partial(VirtualOutliers, "net.3", 1, k=4, select=4, sample_from=8, per_class=6, sigma=1.0)


class Tells(Callback):
    """What was trained in each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights.append(weights_of(pl_module))

    on_train_end = on_train_epoch_start


def test_the_head_alone_is_trained_in_the_last_epochs_and_rows_of_other_classes_keep_their_bits():
    module, technique, tells = Task(), FITTED(new_classes=[2, 2, 2]), Tells()
    adam = lambda: torch.optim.Adam(module.parameters(), 0.1)  # noqa: E731 # moves whatever has a gradient
    module.configure_optimizers = adam
    for number in range(3):
        tells.weights.clear()
        fit(module, technique, tells, loader=make_loader(task(number)), max_epochs=3)
        first, *_, third, end = tells.weights
        others = [row for row in range(6) if row // 2 != number]
        for name in ("net.0.weight", "net.0.bias"):
            assert not torch.equal(first[name], third[name])
            assert torch.equal(third[name], end[name])
        for name in ("net.3.weight", "net.3.bias"):
            assert torch.equal(first[name][others], end[name][others])
            assert not torch.equal(third[name], end[name])
    assert technique.tasks == 3
    assert technique.state_dict().keys() == {"tasks"}  # what was made is let go of when the task is over


def test_outliers_are_of_the_features_in_evaluation_mode_and_of_all_batches_once():
    seen = []

    class Remembers(VirtualOutliers):
        def _synthesize(self, step, features, classes, batches):
            seen.append((features, classes, batches, weights_of(step.module), step.module.training))
            super()._synthesize(step, features, classes, batches)

    module = Classifier(dropout=0.5)
    fit(module, Remembers("net.3", 2, k=4, select=4, sample_from=8, per_class=6), max_epochs=3)
    ((features, classes, batches, weights, training),) = seen
    x, y = make_tensors()
    wanted = F.relu(x @ weights["net.0.weight"].T + weights["net.0.bias"])  # nothing is dropped
    torch.testing.assert_close(features, wanted)
    assert (classes, batches, training) == (y.unique().tolist(), 4, True)


def test_thresholds_of_the_trained_head():
    technique, module = FITTED(threshold=None, outlier_threshold=None), Classifier(lr=0.0)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, *_):
            seen.append(technique.state_dict())

    fit(module, technique, Look(), max_epochs=1)
    x, _ = make_tensors()
    with torch.no_grad():
        energies = -module(x).logsumexp(1)
        above = -module.net[3].bias.logsumexp(0)
    below = energies.sort().values[15]  # the lower of the two in the middle
    wanted = torch.stack([below, torch.maximum(below, above)])
    torch.testing.assert_close(seen[0]["thresholds"], wanted)
    assert seen[0]["outliers"].shape == (1, 18, 8)


def refused(match, module, technique, **options):
    with pytest.raises(MisconfigurationException, match=match):
        fit(module, technique, **{"max_epochs": 2, **options})


def test_what_cannot_be_is_told_before_the_head_is_alone():
    refused("in the last epochs of a fit, and the Trainer trains 2 epochs", Classifier(), VirtualOutliers("net.3", 3))
    refused(
        "the Trainer has no number of epochs", Classifier(), VirtualOutliers("net.3", 3), max_epochs=-1, max_steps=3
    )
    refused("net.4", Classifier(), VirtualOutliers("net.4", 1))
    tokens = Classifier(lambda m, b: F.cross_entropy(m(b[0][:, None])[:, 0], b[1]))
    refused(r"must be the logits \(B, C\) of the 8 samples of the loss, got a tensor \(8, 1, 3\)", tokens, FITTED())
    refused("there are numbers for 0", Classifier(), FITTED(new_classes=[]))
    refused("there are 9 classes by task 1, and 'net.3' has 3 outputs", Classifier(), FITTED(new_classes=[9]))
    refused("has the classes 0 to 1, and a label is 2", Classifier(), FITTED(new_classes=[2]))
    smooth = Classifier(lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1))
    refused("gives weight to classes of other tasks", smooth, FITTED(new_classes=[3]))
    for other, said in ((CutMix(), "lies between classes"), (PredictionDistillation(), "replaces it. Leave out `new")):
        technique = FITTED(new_classes=[3])
        assert said in conflict_between(technique, other)
    assert conflict_between(FITTED(), PredictionDistillation()) is None


def test_a_fit_that_ends_before_the_head_is_alone_is_told():
    with pytest.warns(UserWarning, match=r"ended before its last 1 epochs, those from 2 on"):
        fit(Classifier(), FITTED(), max_epochs=3, max_steps=3)


# -- prompts in a fit -------------------------------------------------------------------------------------------------


class Sees(LightningModule):
    """A vision transformer of a library, with its head as a layer of its own, and nothing of prompts."""

    def __init__(self, net, head="head"):
        super().__init__()
        self.net, self.head = net, head

    def scores(self, images):
        output = self.net(images)
        return getattr(output, "logits", output)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.scores(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.last = self.scores(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


def vit(**options):
    timm = pytest.importorskip("timm")
    small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 3}
    with seeded(0):
        return Sees(timm.models.VisionTransformer(**small, num_heads=2, **options))


def hf():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with seeded(0):
        return Sees(transformers.ViTForImageClassification(config), "classifier")


def images(count=16):
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 1, 8, 8, generator=draw), torch.arange(count) % 3)


def prefixed_scores(module, prompts, pictures):
    """timm's network block by block, with :func:`attended` where there is a prompt."""
    net = module.net
    x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(pictures))))
    for number, block in enumerate(net.blocks):
        own = dict(block.attn.named_parameters())
        key, value = prompts.get(number, (torch.zeros(0, 16),) * 2)
        x = x + attended(block.norm1(x), own, key, value)
        x = x + block.mlp(block.norm2(x))
    return net.head(net.norm(x)[:, 0])


@pytest.mark.parametrize("fused", [True, False])
def test_a_vision_transformer_of_timm(fused):
    module, prompt = vit(), OnePrompt("net.head*", [4, 0, 6])
    for block in module.net.blocks:
        block.attn.fused_attn = fused
    before, keys = weights_of(module), module.state_dict().keys()
    trainer = fit(module, prompt, loader=DataLoader(images(), 8), max_epochs=3)
    assert module.state_dict().keys() == keys
    assert all(p.requires_grad for p in module.parameters())
    moved = {name for name, value in weights_of(module).items() if not torch.equal(value, before[name])}
    assert moved == {"net.head.weight", "net.head.bias"}
    assert prompt.own.size == (2 + 2 + 3 + 3) * 16
    prompts = {
        number: (prompt.own[f"net.blocks.{number}.attn"].key, prompt.own[f"net.blocks.{number}.attn"].value)
        for number in (0, 2)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(prompt.derived_seed("own modules"))
        assert (torch.rand(2, 16) - prompts[0][0]).abs().min() > 0  # they have moved from the uniform draws
    trainer.test(module, DataLoader(images(), 16), verbose=False)
    with torch.no_grad():
        wanted = prefixed_scores(module, prompts, images().tensors[0])
    torch.testing.assert_close(module.last, wanted, atol=1e-5, rtol=1e-5)  # float32, another order of sums
    with torch.no_grad():
        plain = module.scores(images().tensors[0])
    assert (plain - wanted).abs().max() > 0.01


def test_prompts_go_from_task_to_task_and_with_a_checkpoint_into_a_test_alone(tmp_path):
    module, prompt = vit(), OnePrompt("net.head*", [4])
    loader = DataLoader(images(), 8)
    fit(module, prompt, loader=loader)
    first = weights_of(prompt.own["net.blocks.0.attn"])

    class Starts(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 0:
                self.weights, self.state = weights_of(prompt.own["net.blocks.0.attn"]), prompt.state_dict()["moments"]

    starts = Starts()
    trainer = fit(module, prompt, starts, loader=loader)
    assert same_weights(starts.weights, first)  # the second task goes on with them
    assert starts.state == {}  # and with a new optimizer
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.test(module, loader, verbose=False)
    again = vit()
    alone = make_trainer(callbacks=[OnePrompt("net.head*", [4])])
    alone.test(again, loader, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    torch.testing.assert_close(again.last, module.last, atol=0.0, rtol=0.0)
    with pytest.raises(MisconfigurationException, match="there is no prompt for 'net"):
        make_trainer(callbacks=[OnePrompt("net.head*", [4])]).test(again, loader, verbose=False)


def test_a_vision_transformer_of_transformers():
    module, prompt = hf(), OnePrompt("net.classifier*", [4, 6])
    trainer = fit(module, prompt, loader=DataLoader(images(), 8), max_epochs=3)
    assert [len(prefix.key) for prefix in prompt.own.modules.values()] == [2, 3]
    trainer.test(module, DataLoader(images(), 16), verbose=False)
    named = dict(module.named_modules())
    with torch.no_grad():
        plain = module.scores(images().tensors[0])
        for name, prefix in prompt.own.modules.items():

            def attend(layer, args, named, output, prefix=prefix):
                x = args[0] if args else named["hidden_states"]
                new = hasattr(layer, "q_proj")  # transformers 5; before it another layer has the projection behind
                parts = [layer.get_submodule(n) for n in ("q_proj k_proj v_proj" if new else "query key value").split()]
                weights = {f"qkv.{kind}": torch.cat([getattr(p, kind) for p in parts]) for kind in ("weight", "bias")}
                weights["proj.weight"] = layer.o_proj.weight if new else torch.eye(len(parts[0].bias))
                weights["proj.bias"] = layer.o_proj.bias if new else torch.zeros(len(parts[0].bias))
                return attended(x, weights, prefix.key, prefix.value), None

            named[name].register_forward_hook(attend, with_kwargs=True)
        wanted = module.scores(images().tensors[0])
    torch.testing.assert_close(module.last, wanted, atol=1e-5, rtol=1e-5)  # float32, another order of sums
    assert (plain - wanted).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_frozen_network_in_evaluation_mode_has_the_same_prompts():
    """It has no dropout and no batch norm, so its mode makes no difference."""
    ends = []
    for training in (True, False):
        for module, head in ((vit(), "net.head*"), (hf(), "net.classifier*")):
            module.net.train(training)
            prompt = OnePrompt(head, [4])
            fit(module, prompt, loader=DataLoader(images(), 8))
            ends.append([*weights_of(module).values(), *weights_of(next(iter(prompt.own.modules.values()))).values()])
    for one, other in zip(ends[:2], ends[2:], strict=True):
        assert all(map(torch.equal, one, other))


def test_what_has_no_attention_that_can_be_told_is_refused():
    refused("has 0 whose keys and values can be told", Classifier(), OnePrompt(lengths=[2]))
    refused("no attention layer has such a name", vit(), OnePrompt(lengths=[2], layers="encoder*"))
    refused("no parameter has such a name", vit(), OnePrompt("classifier*", [2]))
    assert "longer `lengths`" in conflict_between(OnePrompt(), OnePrompt(name="two"))


def test_the_head_learns_from_features_with_prompts_which_rest_then():
    """What the paper is: both together."""
    seen, module = [], vit()

    class Remembers(VirtualOutliers):
        def _synthesize(self, step, features, classes, batches):
            prefix = prompt.own["net.blocks.0.attn"]
            seen.append((features, {0: (prefix.key.detach().clone(), prefix.value.detach().clone())}))
            super()._synthesize(step, features, classes, batches)

    prompt = OnePrompt("net.head*", [4])
    outliers = Remembers("net.head", 1, k=4, select=4, sample_from=8, per_class=6, new_classes=[3])
    fit(module, prompt, outliers, loader=DataLoader(images(), 8), max_epochs=3)
    ((features, prompts),) = seen
    module.net.head = nn.Identity()
    with torch.no_grad():
        wanted = prefixed_scores(module, prompts, images().tensors[0])
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-5)  # float32, another order of sums
    assert torch.equal(prompt.own["net.blocks.0.attn"].key, prompts[0][0])  # in the last epoch they have not moved
