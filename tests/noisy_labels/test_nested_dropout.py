"""Nested dropout: features in the order of importance, and how many of them are kept."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import MultiSampleDropout, NestedDropout
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    best_prefix,
    keep_prefix,
    prefix_correct,
    prefix_logits,
    prefix_probabilities,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import (
    CLASSES,
    INPUTS,
    QUIET,
    TWO_RANKS,
    Callback,
    Classifier,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
)

pytestmark = QUIET
CORE = "lightning_reg.noisy_labels.nested_dropout.core"


class CutByHand(Hand):
    """The head's input is cut, by probabilities written anew."""

    def edit_input(self, name, rows, moment):
        if name != "net.head":
            return rows
        base = moment.draws(self.technique).initial_seed()
        generator = torch.Generator().manual_seed(self.technique.derived_seed(f"{base} {name}"))
        bell = torch.tensor([2.718281828459045 ** -((k / 4) ** 2) for k in range(1, rows.shape[-1] + 1)]).double()
        kept = int(torch.multinomial(bell / bell.sum(), 1, generator=generator)) + 1
        return rows * (torch.arange(rows.shape[-1]) < kept)

    def edit_evaluation(self, name, rows):
        return rows * (torch.arange(rows.shape[-1]) < 7) if name == "net.act_body" else rows


CUTS = partial(NestedDropout, "net.head", eta=4.0)
CASE = Case(
    make=partial(CUTS, k=7),
    neutral=partial(NestedDropout, "net.head", eta=0.0),
    by_hand=CutByHand,
    says=(
        "net.head: eta=4, mu=0; evaluates with k=7",
        "eta=0: inactive",
        "net.head: eta=4, mu=0; evaluates with k=chosen",
        "net.body, net.head, in turns: eta=3, mu=1; evaluates with k=all",
        "net.body, net.head: eta=3, mu=0; evaluates with k=all",
    ),
    also=("images", "regression", "tokens"),
    variants=[
        CUTS,
        partial(NestedDropout, ["net.body", "net.head"], eta=3.0, mu=1.0, k="all"),
        partial(NestedDropout, ["net.body", "net.head"], eta=3.0, k="all", in_turns=False),
    ],
    invalid=[
        ({"layer": "a", "eta": -1.0}, "eta"),
        ({"layer": "a", "mu": -1.0}, "mu"),
        ({"layer": "a", "k": 0}, "k"),
        ({"layer": "a", "k": "best"}, "k"),
        ({"layer": []}, "layer"),
        ({"layer": ["a", "a"]}, "layer"),
    ],
)


# -- the core ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "eta", "mean"), [(128, 10, 5.9692), (128, 100, 49.2834), (4096, 100, 56.7381)])
def test_the_mean_length_has_no_half_in_the_exponent(size, eta, mean):
    # Those of `GaussianDist(0, eta, size)`, yingyichen-cyy/Nested-Co-teaching 9a2fc40, co_teaching_resnet/train.py.
    probabilities = prefix_probabilities(size, eta)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    assert (probabilities.diff() <= 0).all()
    assert (probabilities * torch.arange(1, size + 1)).sum().item() == pytest.approx(mean, abs=1e-3)


def test_probabilities_by_hand_and_in_the_limits():
    # Of -1/9, 0 and -1/9.
    bell = torch.tensor([0.8948393168143698, 1.0, 0.8948393168143698], dtype=torch.float64)
    torch.testing.assert_close(prefix_probabilities(3, 3.0, 2.0), bell / bell.sum())
    torch.testing.assert_close(prefix_probabilities(5, 1e9), torch.full((5,), 0.2, dtype=torch.float64))
    assert prefix_probabilities(5, 1e-3)[0] == 1


def test_what_is_kept_is_as_it_was_and_what_is_cut_has_no_gradient():
    features = torch.tensor([[1.0, float("nan"), 3.0]], requires_grad=True)
    assert keep_prefix(features, 3) is features
    kept = keep_prefix(features, 1)
    assert kept.tolist() == [[1.0, 0.0, 0.0]]
    kept.sum().backward()
    assert features.grad.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("elements", [1 << 24, 1])
def test_all_lengths_at_once_are_those_of_one_at_a_time(elements, monkeypatch):
    monkeypatch.setattr(f"{CORE}._ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(rows, 5, generator=generator) for rows in (40, 3))
    bias, labels = torch.randn(3, generator=generator), torch.randint(3, (40,), generator=generator)
    labels[::7] = -100
    masked = [F.linear(features * (torch.arange(5) <= k), weight, bias) for k in range(5)]
    torch.testing.assert_close(prefix_logits(features, weight, bias), torch.stack(masked, 1))
    torch.testing.assert_close(prefix_logits(features, weight)[:, -1], features @ weight.T)
    assert prefix_correct(features, weight, labels, bias).tolist() == [
        int((logits.argmax(1) == labels).sum()) for logits in masked
    ]


def test_the_smallest_of_the_best_lengths():
    assert best_prefix(torch.tensor([0.9, 0.9, 0.9])) == 1  # stays one
    assert best_prefix(torch.tensor([0.1, 0.5, 0.5 + 5e-6])) == 2
    assert best_prefix(torch.tensor([0.1, 0.5, 0.5 + 5e-6]), penalty=0) == 3


# -- in training ------------------------------------------------------------------------------------------------------


class Gradients(Callback):
    """Which columns of linear layers have a gradient, in each step."""

    def __init__(self, *layers):
        self.layers, self.columns = layers, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = dict(pl_module.named_modules())
        self.columns.append([named[layer].weight.grad.abs().sum(0) > 0 for layer in self.layers])


def test_one_length_for_the_whole_batch_and_no_gradient_beyond():
    def step(module, batch):  # tanh: no unit is 0 for all samples
        return F.cross_entropy(module.net[3](module.net[0](batch[0]).tanh()), batch[1])

    seen = Gradients("net.3")
    fit(Classifier(step), NestedDropout("net.3", eta=4, k="all"), seen, max_epochs=10)
    lengths = [int(columns.sum()) for (columns,) in seen.columns]
    assert all(
        columns.tolist() == [True] * k + [False] * (8 - k) for (columns,), k in zip(seen.columns, lengths, strict=True)
    )
    mean = float((prefix_probabilities(8, 4) * torch.arange(1, 9)).sum())
    assert abs(sum(lengths) / len(lengths) - mean) < 0.9  # 40 draws of a standard deviation of 1.6: 3.5 of the mean's
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("in_turns", [True, False])
def test_of_several_layers_one_is_cut_in_its_turn_or_all(in_turns):
    seen = Gradients("net.0", "net.3")

    def step(module, batch):
        return F.cross_entropy(module.net[3](module.net[0](batch[0]).tanh()), batch[1])

    fit(Classifier(step), NestedDropout(["net.0", "net.3"], eta=2, k="all", in_turns=in_turns), seen, max_epochs=4)
    cut = [(not first.all(), not second.all()) for first, second in seen.columns]
    if in_turns:
        assert not any(first and second for first, second in cut)
        assert any(first for first, _ in cut)
        assert any(second for _, second in cut)
    else:
        assert any(first and second for first, second in cut)


def test_copies_of_the_rows_are_cut_alike():
    nested, copies = NestedDropout("net.3", eta=2, k="all"), MultiSampleDropout("net.2", 3)
    seen = Gradients("net.3")

    def step(module, batch):
        return F.cross_entropy(module.net[3](module.net[2](module.net[0](batch[0]).tanh())), batch[1])

    fit(Classifier(step, dropout=0.2), nested, copies, seen)
    assert all(columns.tolist() == sorted(columns.tolist(), reverse=True) for (columns,) in seen.columns)
    assert not all(columns.all() for (columns,) in seen.columns)


def test_random_and_ordered_dropout_at_one_layer_are_refused():
    nested, copies = NestedDropout("net.2", eta=2, k="all"), MultiSampleDropout("net.2", 3)
    for first, second in ((nested, copies), (copies, nested)):
        with pytest.raises(MisconfigurationException, match=r"NestedDropout.*classifier behind the dropout layer"):
            fit(Classifier(dropout=0.2), first, second)


# -- in evaluation ----------------------------------------------------------------------------------------------------


class Validated(Classifier):
    """Keeps the logits of its evaluations, and finds the best length by hand before the first hook of ours may."""

    def __init__(self):
        super().__init__()
        self.logits, self.by_hand = [], []

    def validation_step(self, batch, batch_idx):
        features = self.net[:3](batch[0])
        self.logits.append(self.net[3](features))
        head = self.net[3]
        self.by_hand.append(
            torch.stack(
                [
                    ((features[:, :k] @ head.weight[:, :k].T + head.bias).argmax(1) == batch[1]).sum()
                    for k in range(1, 9)
                ]
            )
        )

    test_step = validation_step


def test_the_length_is_chosen_by_the_validation_and_cuts_what_follows(tmp_path):
    nested, module = NestedDropout("net.3", eta=2), Validated()
    trainer = make_trainer(callbacks=[nested], max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, make_loader(), make_loader(batch_size=10))
    lengths = [best_prefix(torch.stack(module.by_hand[at : at + 4]).sum(0) / 32) for at in (0, 4, 8)]
    assert nested.chosen_k == lengths[-1] < 8
    right = torch.stack(module.by_hand[8:]).sum(0)[nested.chosen_k - 1]
    assert trainer.callback_metrics["reg/nested_dropout/k"] == nested.chosen_k
    assert trainer.callback_metrics["reg/nested_dropout/accuracy"] == pytest.approx(float(right) / 32)
    head, x = module.net[3], make_tensors()[0][:10]
    expected = F.linear(keep_prefix(module.net[:3](x), nested.chosen_k), head.weight, head.bias)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    for again, path in ((nested, None), (NestedDropout("net.3", eta=2), tmp_path / "some.ckpt")):
        module.logits.clear()
        make_trainer(callbacks=[again]).test(module, make_loader(batch_size=10), ckpt_path=path)
        torch.testing.assert_close(module.logits[0], expected.detach())


def test_validations_of_a_fit_see_all_features_and_a_sanity_check_chooses_nothing():
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            assert nested.chosen_k is None

    module, nested = Validated(), NestedDropout("net.3", eta=2)
    nested.chosen_k = 1  # of another network
    expected = module.net(make_tensors()[0][:10]).detach()
    trainer = make_trainer(callbacks=[nested, Start()], max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(module, make_loader(), make_loader(batch_size=10))
    torch.testing.assert_close(module.logits[0], expected)
    make_trainer(callbacks=[nested], num_sanity_val_steps=0).fit(module, make_loader(), make_loader(batch_size=10))
    expected = module.net(make_tensors()[0][:10]).detach()
    torch.testing.assert_close(module.logits[-4], expected)


@pytest.mark.parametrize(("k", "kept"), [("all", 8), (3, 3)])
def test_a_length_may_be_given(k, kept):
    module = Validated()
    make_trainer(callbacks=[NestedDropout("net.3", eta=2, k=k)]).test(module, make_loader(batch_size=10))
    features = module.net[:3](make_tensors()[0][:10])
    torch.testing.assert_close(module.logits[0], module.net[3](keep_prefix(features, kept)), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["mapping", "named"])
def test_labels_are_found_or_named(form):
    class Dicts(Validated):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["targets"]), batch_idx)

        def validation_step(self, batch, batch_idx):
            self.net(batch["x"])

    rows = [
        {"x": x, "targets": y, **({"y": y} if form == "named" else {})} for x, y in zip(*make_tensors(), strict=True)
    ]
    nested = NestedDropout("net.3", eta=2, target_key="targets" if form == "named" else None)
    make_trainer(callbacks=[nested]).fit(Dicts(), DataLoader(rows, 8), DataLoader(rows, 8))
    assert nested.chosen_k is not None
    if form == "named":
        with pytest.raises(MisconfigurationException, match="target_key"):
            make_trainer(callbacks=[NestedDropout("net.3", eta=2)], num_sanity_val_steps=0).fit(
                Dicts(), DataLoader(rows, 8), DataLoader(rows, 8)
            )


@pytest.mark.parametrize(
    ("layer", "labels", "message"),
    [
        ("net", torch.zeros(32, dtype=torch.long), "is a Sequential"),
        ("net.3", torch.zeros(32), "class indices"),
        ("net.3", torch.zeros(32, CLASSES, dtype=torch.long), "class indices"),
    ],
)
def test_what_no_length_can_be_chosen_for_is_refused(layer, labels, message):
    module = Validated()
    module.validation_step = lambda batch, batch_idx: module.net(batch[0])
    loader = make_loader(TensorDataset(torch.rand(32, INPUTS), labels))
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callbacks=[NestedDropout(layer, eta=2)], num_sanity_val_steps=0).fit(module, make_loader(), loader)


def test_positions_of_a_text_choose_no_length():
    module = Classifier()
    module.validation_step = lambda batch, batch_idx: module.net(batch[0])
    texts = make_loader(TensorDataset(torch.rand(32, 4, INPUTS), torch.zeros(32, 4, dtype=torch.long)))
    with pytest.raises(MisconfigurationException, match=r"rows \(8, 4, 8\)"):
        make_trainer(callbacks=[NestedDropout("net.3", eta=2)], num_sanity_val_steps=0).fit(
            module, make_loader(), texts
        )


def test_a_fit_without_validation_says_that_nothing_was_chosen():
    with pytest.warns(UserWarning, match="no validation ran in this fit"):
        fit(Classifier(), NestedDropout("net.3", eta=2))


def test_what_has_no_features_is_refused():
    module = Classifier(lambda module, batch: module.net(batch[0]).sum() + module.table(batch[1]).sum())
    module.table = nn.Embedding(CLASSES, 2)
    with pytest.raises(MisconfigurationException, match=r"must be given features \(B, D\), got \(8,\)"):
        fit(module, NestedDropout("table", eta=2))


def chosen_on_two_ranks():
    torch.manual_seed(0)
    module, nested = Validated(), NestedDropout("net.3", eta=2)
    make_trainer(callbacks=[nested], num_sanity_val_steps=0, **TWO_RANKS).fit(
        module, make_loader(batch_size=4), make_loader(batch_size=4)
    )
    return nested.chosen_k, torch.stack(module.by_hand[-4:]).sum(0)


def test_ranks_choose_together(two_processes):
    (one, counts), (two, more) = two_processes.run(chosen_on_two_ranks)
    assert one == two == best_prefix((counts + more) / 32)


def test_the_classifier_of_a_vision_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.ViTForImageClassification(config)
    module = Classifier(lambda module, batch: module.vit(batch[0], labels=batch[1]).loss)
    module.vit = network
    module.validation_step = lambda batch, batch_idx: module.vit(batch[0])
    images = make_loader(TensorDataset(torch.rand(32, 1, 8, 8), make_tensors()[1]))
    nested, seen = NestedDropout("vit.classifier", eta=4), Gradients("vit.classifier")
    for parameter in module.net.parameters():
        parameter.requires_grad = False
    make_trainer(callbacks=[nested, seen], max_epochs=1).fit(module, images, images)
    assert 1 <= nested.chosen_k <= 16
    assert not all(columns.all() for (columns,) in seen.columns)


def test_the_draw_does_not_depend_on_what_ran_before():
    nested, again = NestedDropout("a", eta=5), NestedDropout("a", eta=5)
    steps = [SimpleNamespace(batches_so_far=count, stream="", notes={}, is_logging=False) for count in range(4)]
    drawn = [nested._draw(step, "a", 20) for step in steps]
    assert drawn[2] == again._draw(SimpleNamespace(batches_so_far=2, stream="", notes={}, is_logging=False), "a", 20)
    assert nested._draw(steps[1], "a", 20) == drawn[1]
