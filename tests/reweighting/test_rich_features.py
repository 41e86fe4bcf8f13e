"""Rich features: rounds against each other's errors, and one network that is distilled from all."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset, WeightedRandomSampler

from lightning_reg import ELRCallback, FeatureSynthesis, GroupDRO, Mixup, RichFeatures
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import group_draws, mean_head_, rich_groups, round_losses, synthesis_draws
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.laws import LAWS
from tests.conformance.problems import SIZE
from tests.toys import QUIET, SAMPLES, TWO_RANKS, Classifier, IndexRecorder, fit, make_loader, make_tensors

pytestmark = QUIET

FOLDER = Path(tempfile.gettempdir()) / "lightning_reg_rich_features"  # the same in the processes of the laws
RIGHT = {"first": lambda i: i % 3 > 0, "second": lambda i: i % 5 > 1}


def write(name, size, correct=None, classes=3):
    FOLDER.mkdir(exist_ok=True)
    index, path = torch.arange(size), FOLDER / f"{name}_{size}.pt"
    beside = Path(tempfile.mkstemp(dir=FOLDER)[1])
    torch.save({"correct": RIGHT[name](index) if correct is None else correct, "predictions": index % classes}, beside)
    beside.replace(path)
    return str(path)


ROUNDS = [write(name, SIZE) for name in RIGHT]
MORE = [write(name, 40) for name in RIGHT]  # the law of two processes has more samples
TOYS = [write(name, SAMPLES) for name in RIGHT]


class RoundsByHand(Hand):
    """Groups as lists of samples; the worst mean of the batch counts."""

    def draw(self, epoch):
        if self.technique.draws is None:
            return None
        draw = torch.Generator().manual_seed(self.technique.derived_seed(f"draws {epoch}"))
        groups = [[i for i in range(SIZE) if of(i) is side] for of in RIGHT.values() for side in (True, False)]
        drawn = torch.randint(4, (SIZE,), generator=draw).tolist()
        places = torch.rand(SIZE, generator=draw, dtype=torch.float64).tolist()
        return torch.tensor([groups[g][int(u * len(groups[g]))] for g, u in zip(drawn, places, strict=True)])

    def observe(self, loop, moment):
        index = moment.index.tolist()
        sides = [(of, side) for of in RIGHT.values() for side in (True, False)]
        self.groups = [[row for row, i in enumerate(index) if of(i) is side] for of, side in sides]

    def weights(self, losses):
        means = [sum(losses[row].item() for row in group) / len(group) if group else -1.0 for group in self.groups]
        worst = self.groups[means.index(max(means))]
        return torch.tensor([len(losses) / len(worst) if row in worst else 0.0 for row in range(len(losses))])


class SynthesizedByHand(Hand):
    """Two heads on the features before the head, which is their mean."""

    def begin(self, loop):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.technique.derived_seed("own modules"))
            self.heads = [nn.Linear(loop.net.head.in_features, loop.net.head.out_features) for _ in range(2)]

    def own(self):
        return [p for head in self.heads for p in head.parameters()]

    def draw(self, epoch):
        if self.technique.balance is None:
            return None
        draw = torch.Generator().manual_seed(self.technique.derived_seed(f"draws {epoch}"))
        alike = [RIGHT["first"](i) == RIGHT["second"](i) for i in range(SIZE)]
        drawn = []
        for side in (True, False):
            half = [i for i in range(SIZE) if alike[i] is side]
            drawn += [half[k] for k in torch.randint(len(half), (SIZE // 2,), generator=draw).tolist()]
        return torch.tensor(drawn)[torch.randperm(SIZE, generator=draw)]

    def losses(self, output, moment):
        features, guess = moment.features["net.act_body"], moment.index % 3
        return 0.5 * sum(-head(features).log_softmax(1)[torch.arange(len(guess)), guess] for head in self.heads)

    def after_step(self, loop, moment):
        with torch.no_grad():
            for name in ("weight", "bias"):
                one, two = (getattr(head, name) for head in self.heads)
                loop.leaves[f"net.head.{name}"].copy_((one + two) / 2)


SYNTHESIS = {"layer": "net.act_body", "head": "net.head", "index_key": "2"}
OLDER = partial(RichFeatures, mode="max", index_key="2")
CASE = (
    Case(
        make=partial(OLDER, rounds=MORE, draws=None),
        neutral=RichFeatures,
        by_hand=RoundsByHand,
        says=(
            "round 2: 4 groups of earlier rounds, the worst alone",
            "round 0: your loss as it is",
            f"round 0: your loss as it is; records {FOLDER}/made/0.pt",
            f"round 1: 2 groups of earlier rounds, eta=0.1, drawn alike; records {FOLDER}/made/1.pt",
        ),
        also=["images"],
        variants=[
            partial(RichFeatures, record=f"{FOLDER}/made/0.pt"),
            partial(RichFeatures, ROUNDS[:1], f"{FOLDER}/made/1.pt", eta=0.1),
        ],
        invalid=[
            ({"rounds": "file"}, "rounds"),
            ({"rounds": [1]}, "rounds"),
            ({"eta": -0.1}, "eta"),
            ({"mode": "min"}, "mode"),
            ({"draws": "all"}, "draws"),
        ],
    ),
    Case(
        make=partial(FeatureSynthesis, **SYNTHESIS, rounds=MORE, balance=None),
        neutral=None,
        by_hand=SynthesizedByHand,
        says=(
            "2 rounds on net.act_body, mean head in net.head, your own draws",
            "2 rounds on net.act_body, mean head in net.head, half where all are right",
            "2 rounds on net.act_body, mean head in net.head, half where all agree",
        ),
        variants=[
            partial(FeatureSynthesis, **SYNTHESIS, rounds=ROUNDS, balance="all_right", weight_decay=0.1, lr_factor=2.0),
            partial(FeatureSynthesis, "net.act_body", "net.head", ROUNDS, loss="last"),
        ],
        invalid=[
            (SYNTHESIS | {"rounds": []}, "rounds"),
            (SYNTHESIS | {"rounds": "file"}, "rounds"),
            (SYNTHESIS | {"rounds": ROUNDS, "balance": "even"}, "balance"),
            (SYNTHESIS | {"rounds": ROUNDS, "lr_factor": -1.0}, "lr_factor"),
            (SYNTHESIS | {"rounds": ROUNDS, "weight_decay": -1.0}, "weight_decay"),
            (SYNTHESIS | {"rounds": ROUNDS, "own_optimizer": -1}, "own_optimizer"),
        ],
        exempt={"neutral_is_nothing": "it trains on the predictions of other networks, at every setting"},
    ),
)


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_groups_of_a_network_share_the_samples():
    correct = torch.tensor([[True, False, True], [False, False, True]])
    assert rich_groups(correct).int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0]]


def test_half_of_the_draws_are_where_networks_differ():
    correct = torch.tensor([[True] * 8 + [False] * 2, [True] * 7 + [False] * 3])
    for balance, differing in ("agree", {7}), ("all_right", {7, 8, 9}):
        drawn = synthesis_draws(correct.repeat(1, 3)[:, :25], torch.Generator().manual_seed(0), balance)
        assert drawn.shape == (24,)
        assert sum(i % 10 in differing for i in drawn.tolist()) == 12
        assert drawn.tolist() != sorted(drawn.tolist())
    with pytest.raises(ValueError, match="the networks agree on all samples"):
        synthesis_draws(correct[:1], torch.Generator())
    with pytest.raises(ValueError, match="the networks agree on no sample"):
        synthesis_draws(torch.stack([correct[0], ~correct[0]]), torch.Generator())


def test_the_loss_of_one_round_is_that_of_its_predictions():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    guess = torch.tensor([0, 2, 1, 0, 2])
    one = round_losses([logits], guess[:, None])
    torch.testing.assert_close(one, F.cross_entropy(logits, guess, reduction="none"))
    both = round_losses([logits, logits.flip(1)], torch.stack([guess, 2 - guess], 1))
    torch.testing.assert_close(both, one)


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_of_equal_heads_is_that_head(bias):
    head, heads = nn.Linear(3, 2, bias), [nn.Linear(3, 2, bias)] * 3
    mean_head_(head, heads)
    torch.testing.assert_close(head.weight, heads[0].weight)
    other = nn.Linear(3, 2, bias)
    mean_head_(head, [heads[0], other])
    torch.testing.assert_close(head.weight, (heads[0].weight + other.weight) / 2)
    assert (head.bias is None) is not bias


@pytest.mark.parametrize(
    ("case", "make"),
    [
        (CASE[0], partial(OLDER, rounds=ROUNDS)),
        (CASE[1], partial(FeatureSynthesis, **SYNTHESIS, rounds=ROUNDS)),
    ],
    ids=["round", "synthesis"],
)
def test_drawn_epochs_keep_the_laws(case, make):
    for law in ("as_by_hand", "resume_is_exact"):
        LAWS[law](replace(case, make=make, variants=[], says=[]))


# What TjuJianyu/RFC at de4a5a4 has after 21 steps of Adam 0.05 with l2 0.0011, in float64: coloredmnist/train.py,
# `dro_train` (head, its bias, sum of the first layer, of its biases) and `syn_train` (the same, of the mean head).
ROUND = [
    -1.082415,
    -0.423729,
    0.663468,
    1.040765,
    1.149333,
    1.140024,
    0.939865,
    -0.677784,
    -0.644839,
    1.751383,
    3.569199,
]
MEAN = [
    -0.314766,
    -0.381368,
    -0.42367,
    -0.170118,
    0.436199,
    0.150753,
    0.242531,
    0.052308,
    0.313176,
    -0.407338,
    0.235743,
]


class Binary(Classifier):
    """The network of one logit that made the figures; as classes the logit is beside a 0."""

    def __init__(self, heads=1):
        super().__init__()
        one = (torch.linspace(-1, 1, 48).sin().view(8, 6) * 0.4).double()
        two = torch.linspace(-2, 2, 8).cos().view(1, 8) * 0.4
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, heads)).double()
        for p, value in zip(
            self.parameters(), (one, 0.0, [two * (r + 1) * (-1) ** r for r in range(heads)], 0.0), strict=True
        ):
            p.data.copy_(torch.cat(value) if isinstance(value, list) else torch.as_tensor(value))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.pad(self.net(batch[0]), (1, 0)), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05, weight_decay=0.0022)  # half of it is the factor of the squares

    def figures(self):
        first, _, head = self.net
        sums = first.weight.sum(), first.bias.sum()
        return [*head.weight.mean(0).tolist(), head.bias.mean().item(), *(one.item() for one in sums)]


def authors_data():
    x = (1.7 * torch.arange(192.0, dtype=torch.float64)).sin().view(32, 6)
    return x, (x[:, 0] + 0.5 * (2.3 * torch.arange(32.0, dtype=torch.float64)).cos() > 0).long()


def test_a_round_as_the_authors_have_it():
    model = Binary()
    loader = make_loader(TensorDataset(*authors_data()), batch_size=32)
    fit(model, RichFeatures(TOYS, mode="max", draws=None), loader=loader, max_epochs=21)
    assert model.figures() == pytest.approx(ROUND, abs=2e-6)  # figures of six places


def test_the_synthesis_as_the_authors_have_it():
    model, (x, y) = Binary(2), authors_data()
    right = torch.stack([of(torch.arange(32)) for of in RIGHT.values()], 1)
    guesses, optimizer = torch.where(right, y[:, None], 1 - y[:, None]), model.configure_optimizers()
    for _ in range(21):
        optimizer.zero_grad()
        logits = [F.pad(one, (1, 0)) for one in model.net(x).split(1, 1)]
        round_losses(logits, guesses).mean().backward()
        optimizer.step()
    head = nn.Linear(8, 1).double()
    heads = [nn.Linear(8, 1).double() for _ in range(2)]
    for r, one in enumerate(heads):
        one.weight.data, one.bias.data = model.net[2].weight[r : r + 1].detach(), model.net[2].bias[r : r + 1].detach()
    mean_head_(head, heads)
    assert [*head.weight[0].tolist(), head.bias.item(), *model.figures()[-2:]] == pytest.approx(MEAN, abs=2e-6)


# -- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "sentence"),
    [
        (RichFeatures(ROUNDS), r"RichFeatures: `rounds` are records of 22 samples, the training dataset has 32"),
        (RichFeatures(ROUNDS, draws=None), "`rounds` are records of 22 samples"),
        (FeatureSynthesis("net.2", "net.3", ROUNDS), "the rounds are records of 22 samples, and the training dataset"),
        (FeatureSynthesis("net.2", "net.3", ROUNDS, None), "records of 22 samples, and the training dataset has 32"),
        (RichFeatures(["none.pt"]), r"RichFeatures\(rounds=...\): There is no file none.pt"),
        (RichFeatures([ROUNDS[0], TOYS[1]]), "the files are records of 22, 32 samples"),
        (RichFeatures([str(FOLDER / "odd.pt")]), "odd.pt is no record of a round"),
        (RichFeatures([write("all", SAMPLES, torch.ones(32).bool())]), "got all training samples right, so one of its"),
        (
            RichFeatures([write("no", SAMPLES, torch.zeros(32).bool())]),
            "got no training samples right, so one of its g",
        ),
        (FeatureSynthesis("net.2", "net.3", TOYS[:1] * 2), "the networks agree on all samples, so half of the draws"),
        (FeatureSynthesis("net.2", "net.1", TOYS), r"head='net.1'\) must name a linear layer, found ReLU"),
        (FeatureSynthesis("net.3", "net.3", TOYS), r"layer='net.3'\) puts out \(8, 3\), and 'net.3' gets \(B, 8\)"),
        (
            FeatureSynthesis("net.2", "net.3", [write("many", SAMPLES, RIGHT["first"](torch.arange(32)), 5)]),
            "predict 5 c",
        ),
    ],
)
def test_misuse_is_told(technique, sentence):
    torch.save({"weights": torch.ones(1)}, FOLDER / "odd.pt")
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Classifier(), technique)


def test_who_cannot_stand_beside_it():
    for one, two in [
        (RichFeatures(TOYS), GroupDRO(3, group_key="1")),
        (RichFeatures(TOYS), Mixup()),
        (FeatureSynthesis("net.2", "net.3", TOYS, None), Mixup()),
        (FeatureSynthesis("net.2", "net.3", TOYS, None), FeatureSynthesis("net.2", "net.3", TOYS, None, name="b")),
        (FeatureSynthesis("net.2", "net.3", TOYS), RichFeatures(TOYS)),
    ]:
        with pytest.raises(MisconfigurationException, match="stand together"):
            fit(Classifier(), one, two)


def test_all_samples_are_recorded_or_it_is_told(tmp_path):
    sampler = WeightedRandomSampler(torch.ones(SAMPLES), 8)
    with pytest.raises(MisconfigurationException, match=r"gives \d of the 32 samples of its dataset"):
        fit(Classifier(), RichFeatures(record=str(tmp_path / "0.pt")), loader=make_loader(sampler=sampler))
    assert not list(tmp_path.iterdir())


def record_on_ranks(path):
    fit(Classifier(), RichFeatures(record=path), **TWO_RANKS)
    return torch.load(path, weights_only=True)["correct"].shape


def test_ranks_record_the_samples_of_all(two_processes, tmp_path):
    assert two_processes.run(record_on_ranks, str(tmp_path / "0.pt")) == [(SAMPLES,)] * 2


def test_indices_of_others_are_those_drawn():
    elr, recorder = ELRCallback(num_classes=3), IndexRecorder()
    rich = RichFeatures(TOYS, seed=2)
    fit(Classifier(), rich, elr, recorder)
    drawn = torch.tensor([index for batch in recorder.indices for index in batch])
    membership = rich_groups(torch.stack([of(torch.arange(SAMPLES)) for of in RIGHT.values()]))
    wanted = [group_draws(membership, SAMPLES, rich.draw_generator(epoch)) for epoch in range(2)]
    assert drawn.tolist() == torch.cat(wanted).tolist()
    seen = torch.zeros(SAMPLES, dtype=torch.bool)
    seen[drawn] = True
    assert not seen.all()
    assert torch.equal(elr._targets_and_labels(None)[0].sum(1) > 0, seen)


def test_three_fits(tmp_path):
    files = [str(tmp_path / "rounds" / f"{r}.pt") for r in range(2)]
    network = Classifier()
    fit(network, RichFeatures(record=files[0]))
    content = torch.load(files[0], weights_only=True)
    (x, y), network = make_tensors(), network.eval()
    assert torch.equal(content["predictions"], network(x).argmax(1))
    assert torch.equal(content["correct"], network(x).argmax(1) == y)
    plain = Classifier()
    fit(plain)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(), strict=True))
    dro = RichFeatures(files[:1], files[1], eta=0.5)
    fit(Classifier(seed=1), dro, max_epochs=3)
    synthesis, last = FeatureSynthesis("net.2", "net.3", files, balance=None), Classifier(seed=2)
    fit(last, synthesis, max_epochs=25)
    features = last.net[:3](x)
    guesses = [torch.load(file, weights_only=True)["predictions"] for file in files]
    heads = [synthesis.own[f"head_{r}"] for r in range(2)]
    for head, guess in zip(heads, guesses, strict=True):
        assert (head(features).argmax(1) == guess).float().mean() > 0.7
    torch.testing.assert_close(last.net[3].weight, (heads[0].weight + heads[1].weight) / 2)


class Texts(Classifier):
    """A small Bert with its own loss."""

    def __init__(self):
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes))

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch[0], labels=batch[1]).loss


def test_all_rounds_of_a_model_of_transformers(tmp_path):
    data = TensorDataset(torch.randint(20, (SAMPLES, 5), generator=torch.Generator().manual_seed(0)), make_tensors()[1])
    files = [str(tmp_path / f"{r}.pt") for r in range(2)]
    fit(Texts(), RichFeatures(record=files[0]), loader=make_loader(data))
    fit(Texts(), RichFeatures(files[:1], files[1]), loader=make_loader(data))
    last, synthesis = Texts(), FeatureSynthesis("net.dropout", "net.classifier", files, balance=None)
    fit(last, synthesis, loader=make_loader(data))
    heads = [synthesis.own[f"head_{r}"].weight for r in range(2)]
    torch.testing.assert_close(last.net.classifier.weight, torch.stack(heads).mean(0))
