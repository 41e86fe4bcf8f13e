"""PromptSRC: a network held to what it said before, and prompts in both towers of a CLIP."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CutMix, FrozenTwinAgreement
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import class_template_mean, feature_l1, logit_agreement
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.finetuning.digit_clip import DIGITS, TEMPLATES, hugging_face, open_clip, tokens, unseen
from tests.toys import QUIET, Classifier, StepLosses, fit, make_loader, make_trainer, same_weights, weights_of

pytestmark = QUIET


class AgreementByHand(Hand):
    def begin(self, loop):
        self.first = loop.constants()

    def observe(self, loop, moment):
        outputs, features = loop.run(self.first, moment.x)
        self.logits, self.features = loop.read(outputs).detach(), features["net.act_body"].detach()

    def term(self, loop, moment):
        now = moment.features["net.act_body"]
        now, then = (f / f.square().sum(1, keepdim=True).sqrt() for f in (now, self.features))
        there = self.logits.softmax(1)
        divergences = [
            (there * (there.log() - output.log_softmax(1))).sum() / output.numel() for output in moment.outputs
        ]
        return 3.0 * (now - then).abs().sum() / now.numel() + 0.5 * sum(divergences) / len(divergences)


LAYER = {"features": {"net.act_body": 3.0}}
CASE = (
    Case(
        make=partial(FrozenTwinAgreement, **LAYER, logit_weight=0.5),
        neutral=partial(FrozenTwinAgreement, {"net.act_body": 0.0}, logit_weight=0.0),
        by_hand=AgreementByHand,
        says=(
            "net.act_body 3, logits 0.5; first weights, taken at the first batch",
            "all weights 0: inactive",
            "net.body 1, net.first 2; first weights on the CPU, taken at the first batch",
            "logits 2; first weights in bfloat16, taken at the first batch",
        ),
        exempt={"instances": "equal first weights of two instances are one memory, which nobody writes to"},
        variants=[
            partial(
                FrozenTwinAgreement,
                {"net.body": 1.0, "net.first": 2.0},
                logit_weight=0.0,
                normalize=False,
                reference="cpu",
            ),
            partial(FrozenTwinAgreement, {}, logit_weight=2.0, reduction="batchmean", reference="bfloat16"),
        ],
        invalid=[
            ({"features": {"net.body": -0.1}}, "features"),
            ({**LAYER, "logit_weight": -0.1}, "logit_weight"),
            ({**LAYER, "reduction": "sum"}, "reduction"),
            ({**LAYER, "reference": "disk"}, "reference"),
            ({**LAYER, "templates": {"net.body": "phrasings"}}, "templates"),
        ],
    ),
)


# -- the formulas -----------------------------------------------------------------------------------------------------


def points(rows, columns, shift):
    values = [[((7 * (i + 1) * (c + 2) + shift * c * c) % 11 - 5.0) / 3 for c in range(columns)] for i in range(rows)]
    return torch.tensor(values, dtype=torch.float64)


IMAGES, FROZEN_IMAGES, TEXTS, PHRASINGS = points(4, 6, 3), points(4, 6, 5), points(3, 6, 2), points(15, 6, 8)
# muzairkhattak/PromptSRC @ bb95c77, trainers/promptsrc.py: the lines of `VLPromptLearner.__init__` that make
# `fixed_embeddings`, of `CustomCLIP.forward` and of `PromptSRC.forward_backward` ("fp32"), on these tensors in float64
# with logit scale 20 and 5 phrasings: weight 25 times the loss of texts, 10 times that of images, that of logits.
AUTHORS = (8.255408673401716, 4.667261944929681, 4.024275933879774)


def test_equals_the_authors_lines():
    frozen_texts = class_template_mean(PHRASINGS.reshape(5, 3, 6))
    text, image, logits = AUTHORS
    assert 25 * feature_l1(TEXTS, frozen_texts).item() == pytest.approx(text, abs=1e-12)
    assert 10 * feature_l1(IMAGES, FROZEN_IMAGES).item() == pytest.approx(image, abs=1e-12)
    tuned, frozen = (
        20 * F.normalize(one) @ F.normalize(other).T for one, other in ((IMAGES, TEXTS), (FROZEN_IMAGES, frozen_texts))
    )
    assert logit_agreement(tuned, frozen).item() == pytest.approx(logits, abs=1e-12)
    assert logit_agreement(tuned, frozen, "batchmean").item() == pytest.approx(3 * logits, abs=1e-12)


def test_of_equal_networks_nothing_is_asked():
    logits = points(4, 3, 1).requires_grad_()
    value = logit_agreement(logits, logits)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-15, rtol=0.0)
    assert feature_l1(IMAGES, IMAGES).item() == 0
    assert torch.autograd.gradcheck(lambda one: logit_agreement(one, points(4, 3, 6)), points(4, 3, 2).requires_grad_())


def test_no_gradient_reaches_the_frozen_side_and_a_batch_twice_is_the_batch():
    frozen = FROZEN_IMAGES.clone().requires_grad_()
    one, twice = IMAGES.clone().requires_grad_(), IMAGES.repeat(2, 1)
    value = feature_l1(one, frozen) + logit_agreement(one, frozen)
    value.backward()
    assert frozen.grad is None
    torch.testing.assert_close(
        feature_l1(twice, FROZEN_IMAGES.repeat(2, 1)) + logit_agreement(twice, FROZEN_IMAGES.repeat(2, 1)), value
    )
    half = feature_l1(IMAGES.half(), FROZEN_IMAGES.half())
    assert half.dtype == torch.float32
    assert feature_l1(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), normalize=False).item() == 3.5


def test_phrasings_are_averaged_before_they_have_length_one():
    rows = class_template_mean(torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]))
    torch.testing.assert_close(rows, torch.tensor([[3.0, 1.0]]) / 10**0.5)
    torch.testing.assert_close(class_template_mean(TEXTS.expand(4, -1, -1)), F.normalize(TEXTS))


# -- a network and its twin -------------------------------------------------------------------------------------------


class Names(Classifier):
    """A CLIP that is trained on images and the names of some digits."""

    def __init__(self, clip, trained="*", lr=0.05):
        super().__init__(lr=lr)
        self.net, self.names = clip, DIGITS[:5]
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(trained in (name, "*"))

    def texts(self, template=TEMPLATES[0]):
        return tokens(*(template.format(name) for name in self.names))

    def logits(self, images, texts=None):
        texts = self.texts() if texts is None else texts
        if hasattr(self.net, "encode_text"):
            found, names, scale = self.net(images, texts)
            return scale * found @ names.T
        return self.net(texts, images).logits_per_image

    def phrasings(self):
        for template in TEMPLATES:
            found = self.net.text_projection(self.net.text_model(self.texts(template)).pooler_output)
            assert not self.net.training
            yield found

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch[0]), batch[1])


def digits(count=8, size=4, classes=5):
    images, labels = unseen()
    rows = torch.nonzero(labels < classes)[:count, 0]
    return DataLoader(TensorDataset(images[rows], labels[rows]), size)


TOWERS = {"net.visual_projection": 10.0, "net.text_projection": 25.0}


def test_the_loss_of_a_clip_is_that_of_the_paper():
    losses = StepLosses()
    model = Names(hugging_face(), lr=0.01)
    first = weights_of(model)
    agreement = FrozenTwinAgreement(TOWERS, templates={"net.text_projection": "phrasings"})
    fit(model, agreement, losses, loader=digits(8), max_epochs=1, log_every_n_steps=50)

    plain, twin = Names(hugging_face(), lr=0.01), Names(hugging_face()).eval()
    assert same_weights(plain, first)
    optimizer = plain.configure_optimizers()
    with torch.no_grad():
        names = class_template_mean(torch.stack(list(twin.phrasings())))
    for (images, labels), seen in zip(digits(8), losses.losses, strict=True):
        with torch.no_grad():
            there = twin.net.get_image_features(images).pooler_output
            there = there / there.norm(dim=1, keepdim=True)
            logits_there = twin.net.logit_scale.exp() * there @ names.T
        out = plain.net(plain.texts(), images)
        logits = out.logits_per_image
        loss = F.cross_entropy(logits, labels)
        loss = loss + 10 * (out.image_embeds - there).abs().mean() + 25 * (out.text_embeds - names).abs().mean()
        loss = loss + (logits_there.softmax(1) * (logits_there.log_softmax(1) - logits.log_softmax(1))).sum() / 20
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert seen == pytest.approx(loss.item(), rel=1e-5)
    assert same_weights(model, plain, atol=1e-5)
    kept = agreement.state_dict()
    assert all(torch.equal(kept["reference"][name], value) for name, value in first.items())
    torch.testing.assert_close(kept["templates"]["net.text_projection"], names)


def test_a_text_tower_whose_features_are_given_has_no_pass_of_its_own():
    class Counted(Names):
        passes = 0

        def __init__(self):
            super().__init__(open_clip(custom_text=True), trained="logit_scale")
            self.net.text.ln_final.register_forward_hook(Counted.count)

        @staticmethod
        def count(layer, args, output):
            Counted.passes += 1

        def phrasings(self):
            return torch.stack([self.net.encode_text(self.texts(template)) for template in TEMPLATES[:3]])

    layers = {"net.text": 1.0, "net.visual": 1.0}
    fit(Counted(), FrozenTwinAgreement(layers, templates={"net.text": "phrasings"}), loader=digits(8), max_epochs=1)
    assert Counted.passes == 3 + 2  # the phrasings, and the user's two steps
    fit(Counted(), FrozenTwinAgreement(layers), loader=digits(8), max_epochs=1)
    assert Counted.passes == 5 + 4  # and once more for the twin


def test_a_later_fit_and_a_resumed_one_keep_the_first_twin(tmp_path):
    model, agreement = Classifier(lr=0.1), FrozenTwinAgreement({"net.2": 1.0})
    first = weights_of(model)
    trainer = fit(model, agreement)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not same_weights(model, first)
    fit(model, agreement)
    resumed = FrozenTwinAgreement({"net.2": 1.0})
    other = Classifier(seed=3)
    make_trainer(callbacks=[resumed], max_epochs=3).fit(other, make_loader(), ckpt_path=tmp_path / "last.ckpt")
    for technique in (agreement, resumed):
        kept = technique.state_dict()["reference"]
        assert all(torch.equal(kept[name], value) for name, value in first.items())


def test_features_of_mixed_samples_are_compared_and_logits_are_refused():
    with pytest.raises(MisconfigurationException, match="Write `logit_weight=0`: features of mixed samples"):
        fit(Images(), CutMix(), FrozenTwinAgreement({"net": 1.0}), loader=images_of())
    losses, term = StepLosses(), StepLosses()
    fit(Images(), CutMix(), losses, loader=images_of(), max_epochs=1)
    fit(Images(), CutMix(), FrozenTwinAgreement({"net": 1e3}, logit_weight=0.0), term, loader=images_of(), max_epochs=1)
    assert losses.losses[0] == pytest.approx(term.losses[0])  # the twin is the network
    assert term.losses[2] > losses.losses[2] + 1


class Images(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        nn.init.constant_(self.net[1].weight, 0.01)
        nn.init.constant_(self.net[1].bias, 0.0)


def images_of():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(12, 3, 8, 8, generator=generator), torch.arange(12) % 3), 4)


def test_a_loss_that_cannot_be_seen_has_features_alone():
    def step(module, batch):
        return (module(batch[0]).logsumexp(1) - module(batch[0]).gather(1, batch[1][:, None])[:, 0]).mean()

    with pytest.raises(MisconfigurationException, match="compares the logits of a loss call"):
        fit(Classifier(step), FrozenTwinAgreement({"net.2": 1.0}))
    plain, held = Classifier(step), Classifier(step)
    fit(plain)
    fit(held, FrozenTwinAgreement({"net.2": 1.0}, logit_weight=0.0))
    assert not same_weights(plain, held)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("flat", r"must give features \(N, C, D\) of N phrasings, found \(5, 32\)"),
        ("of_few", r"puts out \(5, 32\), and \(6, 32\) for the mean over phrasings"),
        ("nothing", "neither Wrong nor the datamodule has such a method"),
    ],
)
def test_phrasings_of_another_shape_are_refused(given, words):
    class Wrong(Names):
        def flat(self):
            return torch.zeros(5, 32)

        def of_few(self):
            return torch.ones(3, 6, 32)

    technique = FrozenTwinAgreement(TOWERS, logit_weight=0.0, templates={"net.text_projection": given})
    model = Wrong(hugging_face(), trained="logit_scale")
    with pytest.raises(MisconfigurationException, match=words):
        fit(model, technique, loader=digits(4), max_epochs=1)
