"""DRTune: the head is also trained on calibrated features of the first encoder."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from lightning_reg import DRTune
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import FeatureBank, calibrate, class_translate, dr_loss, kabsch
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import KINDS, Problem
from tests.toys import QUIET, Callback, Classifier, StepLosses, fit, make_loader, make_tensors, same_weights

pytestmark = QUIET


def moved(first, then, labels, prototypes, length, rotate):
    """The calibration class by class, as the paper has it."""
    p, d = (rows / rows.square().sum(1, keepdim=True).sqrt() for rows in (first, then))
    if rotate:
        u, _, vh = torch.linalg.svd((p - p.mean(0)).T @ (d - d.mean(0)))
        signs = torch.ones(len(u))
        signs[-1] = torch.det(vh.T @ u.T)
        p = p @ (vh.T @ torch.diag(signs.to(u)) @ u.T).T
    p = p.clone()
    for c in labels.unique().tolist():
        mine = labels == c
        confidence = (d[mine] @ (prototypes[c] / prototypes[c].square().sum().sqrt())).softmax(0)
        p[mine] += (confidence[:, None] * d[mine]).sum(0) - p[mine].mean(0)
    return length * p / p.square().sum(1, keepdim=True).sqrt()


class BankByHand(Hand):
    def begin(self, loop):
        self.first, self.bank = loop.constants(), []
        if self.technique.warm_up:
            rows = loop.run(self.first, loop.x)[1]["net.act_body"].detach()
            first_step = SimpleNamespace(batches_so_far=1, stream="")
            drawn = torch.randperm(len(rows), generator=self.technique.generator(first_step))
            self.bank += [(rows[i], rows[i], loop.y[i]) for i in drawn]

    def observe(self, loop, moment):
        self.seen = loop.run(self.first, moment.x)[1]["net.act_body"].detach()

    def term(self, loop, moment):
        now, bank = moment.features["net.act_body"].detach(), self.bank[-10:]
        self.bank += zip(self.seen, now, moment.y, strict=True)
        if not bank:
            return None
        first, then, labels = map(torch.stack, zip(*bank, strict=True))
        weight, bias = (moment.weights[f"net.head.{name}"] for name in ("weight", "bias"))
        rows = moved(first, then, labels, weight.detach(), now.square().sum(1).sqrt().mean(), rotate=False)
        return 2.0 * F.cross_entropy(rows @ weight.T + bias, labels)


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


LAYERS = {"layer": "net.act_body", "head": "net.head"}
CASE = Case(
    # Without the rotation: with few points it is no smooth function of them, and the loop rounds in another way.
    make=partial(DRTune, **LAYERS, weight=2.0, bank_size=10, rotate_every=0),
    neutral=partial(DRTune, **LAYERS, weight=0.0),
    by_hand=BankByHand,
    says=(
        "net.act_body to net.head, weight=2, 10 features, calibrated, no rotation; first weights, taken at the first"
        " batch",
        "weight=0: inactive",
        "net.act_body to net.head, weight=1, 2048 features, calibrated, rotated every 2 batches; first weights on the"
        " CPU, taken at the first batch",
        "net.act_body to net.head, weight=1, 3 features, not calibrated; first weights in bfloat16, taken at the first"
        " batch",
    ),
    # A problem of its own: where there are several losses, the batch's entry is no class number.
    data=Problem(KINDS["classification"].net, labelled, F.cross_entropy, serves=["classification"]),
    variants=[
        partial(DRTune, **LAYERS, rotate_every=2, warm_up=False, reference="cpu"),
        partial(DRTune, **LAYERS, bank_size=3, calibration=False, reference="bfloat16"),
    ],
    invalid=[
        ({**LAYERS, "weight": -0.1}, "weight"),
        ({**LAYERS, "bank_size": 0}, "bank_size"),
        ({**LAYERS, "bank_size": 1.5}, "bank_size"),
        ({**LAYERS, "rotate_every": -1}, "rotate_every"),
        ({**LAYERS, "rotate_every": 0.5}, "rotate_every"),
        ({**LAYERS, "warm_up": 1}, "warm_up"),
        ({**LAYERS, "pooling": "max"}, "pooling"),
        ({**LAYERS, "reference": "disk"}, "reference"),
    ],
)
TOY = {"layer": "net.2", "head": "net.3"}


# -- the formula ------------------------------------------------------------------------------------------------------


def points(rows, shift, scale):
    values = [[((7 * (i + 1) * (c + 2) + shift * c * c) % 11 - 5.0) / scale for c in range(4)] for i in range(rows)]
    return torch.tensor(values, dtype=torch.float64)


FIRST, THEN, HEAD, BATCH = points(12, 3, 3), points(12, 5, 4), points(3, 2, 2), points(5, 1, 1.5)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 1])
# weeknan/DR-Tune @ ef9a7b1 (weeknan), model.py, `base_model.semantic_calibration` on these tensors in float64, in a
# step with rotation and in one without: two rows, and the cross-entropy of all on `HEAD` without bias.
AUTHORS = {
    True: (
        [-2.3912355867346187, -3.3842114482426346, 0.021723028760564773, -1.5160499811342543],
        [-3.8350676114757483, 0.8823125469191797, -1.6742841743341839, -1.0864288662821255],
        2.8499790620929066,
    ),
    False: (
        [-2.4821584706158344, -3.428846832094881, -0.8116040734768344, 0.9449718247953456],
        [-2.699667896300111, -0.23729440524377146, -2.4494043147931177, 2.475010567766867],
        2.940362635549027,
    ),
}


@pytest.mark.parametrize("rotate", [True, False])
def test_equals_the_authors_and_the_formula_class_by_class(rotate):
    rotation = kabsch(F.normalize(FIRST), F.normalize(THEN)) if rotate else None
    length = BATCH.norm(dim=1).mean()
    rows = calibrate(FIRST, THEN, LABELS, HEAD, length, rotation)
    first, eighth, loss = AUTHORS[rotate]
    assert rows[0].tolist() == pytest.approx(first, abs=1e-12)
    assert rows[7].tolist() == pytest.approx(eighth, abs=1e-12)
    assert dr_loss(rows, LABELS, HEAD).item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(rows, moved(FIRST, THEN, LABELS, HEAD, length, rotate), atol=1e-12, rtol=0.0)


def test_the_rotation_is_found_again_and_is_no_reflection():
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(100, 8, generator=generator)
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    q[:, 0] *= torch.det(q).sign()
    torch.testing.assert_close(kabsch(cloud, cloud @ q.T + 3.0), q, atol=5e-6, rtol=0.0)  # float32, 8 dimensions
    mirror = q * torch.tensor([-1.0] + [1.0] * 7)
    assert torch.det(kabsch(cloud, cloud @ mirror.T)).item() == pytest.approx(1.0, abs=1e-5)


def test_after_the_translation_class_means_are_those_of_the_confident_points():
    rows = class_translate(FIRST, THEN, LABELS, HEAD)
    for c in range(3):
        mine = c == LABELS
        share = (THEN[mine] @ F.normalize(HEAD, dim=1)[c]).softmax(0)
        torch.testing.assert_close(rows[mine].mean(0), share @ THEN[mine])
    some = class_translate(FIRST[:1], THEN[:1], LABELS[:1], HEAD)  # a class with one point, two with none
    torch.testing.assert_close(some, THEN[:1])


def test_the_term_trains_the_head_alone():
    rows, head, bias = FIRST.clone().requires_grad_(), HEAD.clone().requires_grad_(), HEAD.new_zeros(3)
    dr_loss(rows, LABELS, head, bias.requires_grad_()).backward()
    assert rows.grad is None
    wanted = torch.autograd.grad(F.cross_entropy(FIRST @ head.T, LABELS), head)[0]
    torch.testing.assert_close(head.grad, wanted)
    assert not calibrate(rows, THEN, LABELS, head, 1.0).requires_grad


def test_the_bank_forgets_the_oldest_and_wraps_around():
    bank, seen = FeatureBank(5), []
    for start, count in ((0, 2), (2, 2), (4, 3), (7, 8)):
        numbers = torch.arange(start, start + count)
        rows = numbers[:, None].float().repeat(1, 2)
        bank.add(rows, -rows, numbers)
        first, then, labels = bank.entries()
        seen.append(sorted(labels.tolist()))
        assert torch.equal(first[:, 0].long(), labels)
        assert torch.equal(-then[:, 1].long(), labels)
    assert seen == [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5, 6], [10, 11, 12, 13, 14]]
    other = FeatureBank(4)
    with pytest.raises(ValueError, match="room for 5 entries, and there is for 4"):
        other.load_state_dict(bank.state_dict())


# -- in a fit ---------------------------------------------------------------------------------------------------------


def test_first_step_and_encoder_are_those_of_plain_fine_tuning():
    class OneStep(Classifier):
        def on_train_batch_end(self, *_):
            self.__dict__.setdefault("grads", []).append([p.grad.clone() for p in self.parameters()])

    plain, tuned = OneStep(lr=0.0), OneStep(lr=0.0)
    fit(plain, max_epochs=1)
    fit(tuned, DRTune(**TOY, weight=3.0, warm_up=False), max_epochs=1)
    for step, (without, with_it) in enumerate(zip(plain.grads, tuned.grads, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(without[:2], with_it[:2], strict=True))  # the encoder's
        assert torch.equal(without[2], with_it[2]) == (step == 0)  # the head's, once there are features


class Noisy(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


class Banks(Callback):
    """Keeps the bank of the first step, before the step adds to it."""

    def __init__(self, technique):
        self.technique, self.first = technique, None

    def on_before_backward(self, trainer, pl_module, loss):
        if self.first is None:
            self.first = self.technique.state_dict()["bank"]


@pytest.mark.parametrize("size", [5, 20])
def test_the_bank_is_full_before_the_first_step_with_what_the_first_encoder_makes_of_the_data(size):
    x, y = make_tensors()
    model, technique = Classifier(), DRTune(**TOY, bank_size=size, warm_up=True)
    first = model.net[:3](x).detach()
    seen = Banks(technique)
    fit(model, technique, seen, max_epochs=1)
    kept, then, labels = seen.first["kept"]
    assert seen.first["filled"] == size
    rows = make_loader().batch_size  # the batch of the first step has come in place of the oldest
    old = slice(rows, None) if size > rows else slice(0, 0)
    at = [(first == row).all(1).nonzero()[0].item() for row in kept[old]]
    assert len({*at}) == len(at) == max(size - rows, 0)
    assert torch.equal(kept[old], then[old])
    assert torch.equal(labels[old], y[at])
    assert at != sorted(at) or not at


def test_augmented_data_fill_the_bank_and_what_has_no_indices_is_refused():
    technique = DRTune(**TOY, bank_size=64)
    fit(Classifier(), technique, loader=make_loader(Noisy(*make_tensors())), max_epochs=1)
    assert technique.state_dict()["bank"]["filled"] == 64

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(*make_tensors()))

    with pytest.raises(MisconfigurationException, match=r"DRTune needs sample indices.*Or write DRTune\(warm_up=False"):
        fit(Classifier(), DRTune(**TOY), loader=make_loader(Stream()))


def test_a_head_that_does_not_fit_is_refused_in_words():
    with pytest.raises(MisconfigurationException, match="must name the linear layer that gets the 8 features"):
        fit(Classifier(), DRTune(layer="net.2", head="net.0"))


def test_a_hugging_face_vision_transformer():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)

    class Vision(Classifier):
        def __init__(self):
            super().__init__(lr=0.05)
            self.net = transformers.ViTForImageClassification(config)

        def training_step(self, batch, batch_idx):
            return self.net(pixel_values=batch[0], labels=batch[1]).loss

    x, y = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    torch.manual_seed(0)
    technique = DRTune(
        "net.vit.layernorm", "net.classifier", pooling="first", rotate_every=2, warm_up=False, reference="bfloat16"
    )
    model = Vision()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = StepLosses()
    fit(model, technique, losses, loader=loader, max_epochs=1)
    kept = technique.state_dict()
    assert all(torch.equal(kept["reference"][name], p.bfloat16()) for name, p in start.items())
    assert kept["bank"]["filled"] == 16
    assert not same_weights(model, {**model.state_dict(), **start})
    assert isinstance(model.net.classifier, nn.Linear)
