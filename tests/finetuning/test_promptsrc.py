"""PromptSRC: a network held to what it said before, and prompts in both towers of a CLIP."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import BaseToNovelAccuracy, CutMix, DeepPrompts, DRTune, FrozenTwinAgreement, SoupAverager
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.functional import class_template_mean, feature_l1, harmonic_mean, logit_agreement
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.metric import MetricCase
from tests.conformance.problems import Problem
from tests.finetuning.digit_clip import DIGITS, TEMPLATES, hugging_face, open_clip, tokens, unseen
from tests.toys import (
    QUIET,
    Callback,
    Classifier,
    StepLosses,
    fit,
    make_loader,
    make_trainer,
    same_weights,
    seed_everything,
    weights_of,
)

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]


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


WORDS = [[0, 1, 2, 5, 8], [0, 1, 2, 6, 8], [0, 1, 2, 7, 8], [0, 1, 2, 4, 8]]


class Block(nn.Module):
    """A layer of a toy transformer."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x, attn_mask=None):
        y = self.ln_1(x)
        return x + torch.tanh(self.mix(y + y.mean(1, keepdim=True)))


class Blocks(nn.Module):
    batch_first = True

    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.ln_pre, self.transformer = nn.Linear(4, 8), nn.LayerNorm(8), Blocks()

    def forward(self, x):
        return self.transformer(self.ln_pre(self.conv1(x.unflatten(1, (4, 4)))))[:, 0]


class Words(nn.Module):
    """Vectors of nine words, which nobody trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(9, 8, generator=torch.Generator().manual_seed(5)), False)

    def forward(self, words):
        return self.weight[words]


class ToyClip(nn.Module):
    """With layers named as in open_clip; the last word of a text is its end."""

    def __init__(self):
        super().__init__()
        self.visual, self.token_embedding, self.transformer = Visual(), Words(), Blocks()
        self.register_buffer("texts", torch.tensor(WORDS), False)

    def forward(self, x):
        texts = self.transformer(self.token_embedding(self.texts))[:, -1]
        images = self.visual(x)
        return torch.cat([images, images @ texts.T / 8], 1)


def labelled(size):
    x = torch.randn(size, 8)
    return x, (x[:, :4] + torch.randn(size, 4)).argmax(1)


def toy():
    layers = {"first": nn.Linear(8, 16), "act": nn.Tanh(), "body": nn.Linear(16, 16), "act_body": nn.Tanh()}
    return nn.Sequential(OrderedDict(layers, clip=ToyClip(), head=nn.Linear(12, 4)))


class PromptsByHand(Hand):
    """The toy's towers written out, with prompts for images in three layers and for texts in two."""

    stands_inside = True

    def begin(self, loop):
        def drawn(kind, *shape):
            generator = torch.Generator().manual_seed(self.technique.derived_seed(f"{kind} prompts"))
            return (0.5 * torch.randn(*shape, generator=generator)).requires_grad_()

        self.visual, self.text = drawn("visual", 3, 2, 8), drawn("text", 2, 1, 8)

    def own(self):
        return [self.visual, self.text]

    def edit_input(self, name, rows, moment):
        if name == "net.clip":
            self.given = rows
        return rows

    def edit(self, name, rows, moment, copy):
        return self.clip(moment.weights, self.given) if name == "net.clip" else rows

    def begin_evaluation(self, weights):
        self.final = weights
        self.visual, self.text = (self.technique.own[kind].prompts for kind in ("visual", "text"))

    def edit_evaluation(self, name, rows):
        if name == "net.act_body":
            self.given = rows
        return self.clip(self.final, self.given) if name == "net.clip" else rows

    def clip(self, weights, x):
        w = {name[len("net.clip.") :]: value for name, value in weights.items() if name.startswith("net.clip.")}

        def norm(rows, name):
            return F.layer_norm(rows, (8,), w[f"{name}.weight"], w[f"{name}.bias"])

        def block(rows, name):
            y = norm(rows, f"{name}.ln_1")
            y = y + y.mean(1, keepdim=True)
            return rows + torch.tanh(y @ w[f"{name}.mix.weight"].T + w[f"{name}.mix.bias"])

        def many(prompts, rows):
            return prompts.to(rows).expand(len(rows), -1, -1)

        rows = x.reshape(-1, 4, 4) @ w["visual.conv1.weight"].T + w["visual.conv1.bias"]
        rows = norm(torch.cat([rows, many(self.visual[0], rows)], 1), "visual.ln_pre")
        for i in range(3):
            if i:
                rows = torch.cat([rows[:, :4], many(self.visual[i], rows)], 1)
            rows = block(rows, f"visual.transformer.resblocks.{i}")
        texts = Words()(torch.tensor(WORDS))
        for i in range(3):
            if i < 2:
                texts = torch.cat([texts[:, :1], many(self.text[i], texts), texts[:, 2:]], 1)
            texts = block(texts, f"transformer.resblocks.{i}")
        return torch.cat([rows[:, 0], rows[:, 0] @ texts[:, -1].T / 8], 1)


def scored(seed, rows):
    labels = torch.arange(rows) % 5
    noise = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
    return {"logits": noise + F.one_hot(labels, 5), "labels": labels}


def base_to_novel_by_loops(batches):
    """Each sample among the classes of its own side."""
    sides, hits = ([0, 2], [1, 3, 4]), ([], [])
    for batch in batches:
        for row, label in zip(batch["logits"].tolist(), batch["labels"].tolist(), strict=True):
            side = 0 if label in sides[0] else 1
            hits[side].append(max(sides[side], key=lambda c, row=row: row[c]) == label)
    base, novel = (sum(side) / len(side) for side in hits)
    return {"base": base, "novel": novel, "harmonic_mean": 2 / (1 / base + 1 / novel) if base and novel else 0.0}


LAYER = {"features": {"net.act_body": 3.0}}
PROMPTS = partial(DeepPrompts, clip="net.clip", visual=2, text=1, visual_depth=3, text_depth=2, init_std=0.5)
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
        variants=[
            partial(
                FrozenTwinAgreement,
                {"net.body": 1.0, "net.first": 2.0},
                logit_weight=0.0,
                normalize=False,
                reference="cpu",
            ),
            partial(FrozenTwinAgreement, {}, logit_weight=2.0, logit_reduction="batchmean", reference="bfloat16"),
        ],
        invalid=[
            ({"features": {"net.body": -0.1}}, "features"),
            ({**LAYER, "logit_weight": -0.1}, "logit_weight"),
            ({**LAYER, "logit_reduction": "sum"}, "logit_reduction"),
            ({**LAYER, "reference": "disk"}, "reference"),
            ({**LAYER, "templates": {"net.body": "phrasings"}}, "templates"),
        ],
    ),
    Case(
        make=PROMPTS,
        neutral=partial(PROMPTS, visual=0, text=0),
        by_hand=PromptsByHand,
        says=(
            "prompts in net.clip: 2 for images in 3 layers, 1 for texts in 2 layers",
            "no prompts: inactive",
            "prompts in net.clip: 2 for texts in 1 layers; 2 texts at a time",
            "prompts in net.clip: 3 for images in 1 layers",
        ),
        data=Problem(toy, labelled, F.cross_entropy, serves=["classification"]),
        variants=[
            partial(DeepPrompts, "net.clip", 0, 2, text_depth=1, text_init=[1, 2], class_chunk=2),
            partial(DeepPrompts, "net.clip", 3, 0, visual_depth=1, lr_factor=2.0, weight_decay=0.1),
        ],
        invalid=[
            ({"visual": -1}, "visual"),
            ({"text": -1}, "text"),
            ({"visual_depth": 0}, "visual_depth"),
            ({"text_depth": 0}, "text_depth"),
            ({"text_init": [3]}, "text_init"),
            ({"text": 1, "text_init": [-1]}, "text_init"),
            ({"init_std": -0.1}, "init_std"),
            ({"class_chunk": 0}, "class_chunk"),
            ({"lr_factor": -0.1}, "lr_factor"),
            ({"weight_decay": -0.1}, "weight_decay"),
            ({"own_optimizer": -1}, "own_optimizer"),
        ],
    ),
    MetricCase(
        make=partial(BaseToNovelAccuracy, base=[0, 2]),
        batches=[scored(seed, rows) for seed, rows in enumerate((6, 5, 9, 4))],
        expected=base_to_novel_by_loops,
        invalid=[({"base": []}, "base"), ({"base": [-1]}, "base"), ({"base": [0.5]}, "base")],
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


class Moves(Callback):
    """Moves the weights once the twin has its own: at the twin, the sign of a difference is that of a rounding."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            moved_away(pl_module)


def moved_away(module):
    generator = torch.Generator().manual_seed(5)
    twin = Names(hugging_face()).state_dict()
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(twin[name] + 0.1 * torch.randn(value.shape, generator=generator))


def test_the_loss_of_a_clip_is_that_of_the_paper():
    losses = StepLosses()
    model = Names(hugging_face(), lr=0.01)
    first = weights_of(model)
    agreement = FrozenTwinAgreement(TOWERS, templates={"net.text_projection": "phrasings"})
    fit(model, agreement, losses, Moves(), loader=digits(12), max_epochs=1, log_every_n_steps=50)

    plain, twin = Names(hugging_face(), lr=0.01), Names(hugging_face()).eval()
    assert same_weights(plain, first)
    optimizer = plain.configure_optimizers()
    with torch.no_grad():
        names = class_template_mean(torch.stack(list(twin.phrasings())))
    for step, ((images, labels), seen) in enumerate(zip(digits(12), losses.losses, strict=True)):
        with torch.no_grad():
            there = pooled(twin.net.get_image_features(images))
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
        if step == 0:
            moved_away(plain)
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


def test_all_that_ask_for_the_first_network_share_its_pass():
    passes = []

    def step(module, batch):
        passes.append(module.training)
        return F.cross_entropy(module(batch[0]), batch[1])

    asking = [FrozenTwinAgreement({"net.0": 1.0, "net.2": 1.0}), DRTune("net.2", "net.3", bank_size=4, warm_up=False)]
    fit(Classifier(step), *asking, max_epochs=1)
    assert passes == [False, True] * 4  # the twin's and the user's, in each step
    one, other = (technique.state_dict()["reference"] for technique in asking)
    assert all(one[name].data_ptr() == other[name].data_ptr() for name in one)


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


# -- prompts ----------------------------------------------------------------------------------------------------------


def drawn_prompts(visual=(3, 2), text=(3, 4), width=64):
    generator = torch.Generator().manual_seed(5)
    made = {"visual": torch.randn(*visual, width, generator=generator), "text": torch.randn(*text, width)}
    made["text"] = torch.randn(*text, width, generator=generator)
    return {kind: 0.3 * rows for kind, rows in made.items()}


def trained(prompts, **options):
    """As it is after a fit that has led to such prompts."""
    shapes = {f"{kind}_depth": len(rows) for kind, rows in prompts.items()}
    technique = DeepPrompts("", prompts["visual"].shape[1], prompts["text"].shape[1], **shapes, **options)
    technique.load_state_dict({"modules": {kind: {"prompts": rows} for kind, rows in prompts.items()}, "moments": {}})
    return technique


def pooled(output):
    """The features themselves; before transformers 5 they are all that is returned."""
    return getattr(output, "pooler_output", output)


def features(clip, images, texts):
    """Of images and texts, as they come out of the towers."""
    if hasattr(clip, "encode_text"):
        return clip.encode_image(images), clip.encode_text(texts)
    return pooled(clip.get_image_features(images)), pooled(clip.get_text_features(texts))


def written_out(clip, images, texts, prompts):
    """The two towers of open_clip with prompts, as in `VisionTransformer`, `TextEncoder` and
    `ResidualAttentionBlock_IVLP` of the authors' clip/model.py."""
    visual, text = prompts["visual"], prompts["text"]
    x = clip.visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([clip.visual.class_embedding.expand(len(x), 1, -1), x], 1) + clip.visual.positional_embedding
    x = clip.visual.ln_pre(torch.cat([x, visual[0].expand(len(x), -1, -1)], 1))
    for i, block in enumerate(clip.visual.transformer.resblocks):
        if 0 < i < len(visual):
            x = torch.cat([x[:, : -visual.shape[1]], visual[i].expand(len(x), -1, -1)], 1)
        x = block(x)
    t, n = clip.token_embedding(texts), text.shape[1]
    t = torch.cat([t[:, :1], text[0].expand(len(t), -1, -1), t[:, 1 + n :]], 1) + clip.positional_embedding
    for i, block in enumerate(clip.transformer.resblocks):
        if 0 < i < len(text):
            t = torch.cat([t[:, :1], text[i].expand(len(t), -1, -1), t[:, 1 + n :]], 1)
        t = block(t, attn_mask=clip.attn_mask)
    t = clip.ln_final(t)[torch.arange(len(t)), texts.argmax(1)] @ clip.text_projection
    return clip.visual.ln_post(x[:, 0]) @ clip.visual.proj, t


def names(*words):
    return tokens(*(f"a photo of a {name}" for name in words or DIGITS))


@torch.no_grad()
def test_both_libraries_have_the_prompts_where_the_authors_have_them():
    images, prompts = unseen()[0][:5], drawn_prompts()
    wanted = written_out(open_clip(), images, names(), prompts)
    plain = features(open_clip(), images, names())
    for clip in (open_clip(), open_clip(custom_text=True), hugging_face(), hugging_face().eval()):
        with trained(prompts).used_in(clip):
            found = features(clip, images, names())
        for one, other, before in zip(found, wanted, plain, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0)  # features of size 5, other kernels
            assert (one - before).abs().max() > 0.1
        for one, before in zip(features(clip, images, names()), plain, strict=True):
            torch.testing.assert_close(one, before, atol=2e-5, rtol=0)  # and it is as it was


def test_the_order_of_dimensions_is_the_librarys():
    clip, images, prompts = open_clip(), unseen()[0][:3], drawn_prompts()
    wanted = written_out(clip, images, names(), prompts)
    for tower in (clip.visual.transformer, clip.transformer):
        tower.batch_first = False
        for block in tower.resblocks:
            block.attn.batch_first = False
    with trained(prompts, class_chunk=4).used_in(clip):
        found = features(clip, images, names())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


class Start(Callback):
    """The prompts that a fit begins with."""

    def __init__(self, technique):
        self.technique = technique

    def on_train_start(self, trainer, pl_module):
        self.prompts = {kind: self.technique.own[kind].prompts.detach().clone() for kind in ("visual", "text")}


def test_a_fit_trains_prompts_alone_and_they_serve_other_names():
    class Frozen(Names):
        def __init__(self, clip):
            super().__init__(clip, trained="")
            self.net.eval()  # as `from_pretrained` gives it

        def validation_step(self, batch, batch_idx):
            self.seen = self.logits(batch[0])

    for clip in (open_clip(), hugging_face()):
        model, before = Frozen(clip), weights_of(clip)
        words = tokens("a photo of a")[0, 1:5].tolist()
        technique = DeepPrompts("net", 2, 4, 3, 3, text_init=words, seed=3)
        start = Start(technique)
        trainer = fit(model, technique, start, loader=digits(40, 8), max_epochs=2)
        assert same_weights(clip, before)
        table = clip.token_embedding if hasattr(clip, "token_embedding") else clip.text_model.embeddings.token_embedding
        assert torch.equal(start.prompts["text"][0], table.weight[words])
        assert start.prompts["visual"].std().item() == pytest.approx(0.02, rel=0.2)
        prompts = {kind: technique.own[kind].prompts.detach() for kind in ("visual", "text")}
        assert prompts["text"].shape == (3, 4, 64)
        assert all((rows - start.prompts[kind]).abs().max() > 1e-3 for kind, rows in prompts.items())
        images, others = unseen()[0][:4], names("nine", "eight", "inverted seven")
        with technique.used_in(clip), torch.no_grad():
            found = features(clip, images, others)
        with torch.no_grad():
            for one, other in zip(found, written_out(open_clip(), images, others, prompts), strict=True):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
        model.names = DIGITS[5:]  # a validation with names that had no part in the fit
        trainer.validate(model, digits(4), verbose=False)
        with technique.used_in(clip), torch.no_grad():
            torch.testing.assert_close(model.seen, model.logits(next(iter(digits(4)))[0]), atol=1e-5, rtol=0)


def combined(count):
    """Names of so many classes, up to 1,000."""
    every = [f"{a} {b} {c}" for a in DIGITS for b in DIGITS for c in DIGITS]
    return names(*every[:count])


def kept_by(clip, technique, texts):
    """Features and gradients of prompts, and the bytes that the forward pass keeps for the backward pass."""
    held = {}

    def note(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with technique.used_in(clip):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            rows = features(clip, unseen()[0][:1].double(), texts)[1]
        (rows * torch.linspace(-1, 1, rows.numel()).reshape(rows.shape)).sum().backward()
    return rows.detach(), technique.own["text"].prompts.grad, sum(held.values()) / 2**20


@pytest.mark.parametrize(("host", "count"), [(open_clip, 1000), (hugging_face, 100)])
def test_a_thousand_classes_need_the_memory_of_a_few(host, count, request):
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.float64)  # transformers 4.46 makes its mask in it
    clip, prompts, texts = host().requires_grad_(False).double(), drawn_prompts(), combined(count)
    rows, gradient, whole = kept_by(clip, trained(prompts), texts)
    of_chunks, same, few = kept_by(clip, trained(prompts, class_chunk=count // 20), texts)
    torch.testing.assert_close(of_chunks, rows, atol=1e-12, rtol=1e-12)
    assert (same - gradient).norm() < 1e-6 * gradient.norm()  # float32, as prompts are
    assert few < 0.3 * whole
    with trained(prompts, class_chunk=30).used_in(clip), torch.no_grad():
        found = features(clip, unseen()[0][:1].double(), texts[:70])[1]
        torch.testing.assert_close(found, rows[:70], atol=1e-12, rtol=1e-12)


def test_prompts_are_float32_beside_weights_of_less():
    prompts, clip = drawn_prompts(), hugging_face().bfloat16().requires_grad_(False)
    technique = trained(prompts)
    with technique.used_in(clip):
        image, text = features(clip, unseen()[0][:3].bfloat16(), names())
    (image.sum() + text.sum()).backward()
    assert text.dtype == torch.bfloat16
    for kind in ("visual", "text"):
        assert technique.own[kind].prompts.dtype == technique.own[kind].prompts.grad.dtype == torch.float32
        assert technique.own[kind].prompts.grad.abs().max() > 0


def test_prompts_beside_the_frozen_twin_and_the_average_resume_exactly(tmp_path):
    def callbacks():
        agreement = FrozenTwinAgreement(TOWERS, templates={"net.text_projection": "phrasings"})
        soup = SoupAverager(method="gaussian", mean_epoch=3, std_epochs=1.0, exclude="net.*", include="*prompts*")
        return [DeepPrompts("net", 2, 4, 3, 3), agreement, soup]

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(*more, **options):
        model, own = Names(hugging_face(), trained="logit_scale"), callbacks()
        seed_everything(1, verbose=False)
        trainer = make_trainer(callbacks=[*own, *more], max_epochs=3)
        trainer.fit(model, digits(8), **options)
        return own[0], model

    whole, model = run()
    run(Stop())
    resumed, other = run(ckpt_path=tmp_path / "1.ckpt", weights_only=False)
    assert same_weights(model, other)
    for kind in ("visual", "text"):
        assert torch.equal(whole.own[kind].prompts, resumed.own[kind].prompts)
    alone = callbacks()[0]
    make_trainer(callbacks=[alone]).test(
        Graded(hugging_face()), digits(4), ckpt_path=tmp_path / "1.ckpt", verbose=False
    )
    assert alone.own["text"].prompts.shape == (3, 4, 64)


class Graded(Names):
    def test_step(self, batch, batch_idx):
        self.logits(batch[0])


def test_the_twin_has_no_prompts():
    """Its features are those of the CLIP: with prompts that do something the first step has a distance already."""
    losses = []
    for words in (tokens("a photo of a")[0, 1:5].tolist(), None):
        prompts, seen = DeepPrompts("net", 0, 4, text_depth=1, text_init=words, init_std=0.5), StepLosses()
        agreement = FrozenTwinAgreement({"net.text_projection": 100.0})
        fit(Names(hugging_face(), trained=""), prompts, agreement, seen, loader=digits(4), max_epochs=1)
        losses.append(seen.losses[0])
    model = Names(hugging_face())
    images, labels = next(iter(digits(4)))
    assert losses[0] == pytest.approx(F.cross_entropy(model.logits(images), labels).item(), rel=1e-5)
    assert losses[1] > losses[0] + 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": "ney"}, r"clip='ney'\) must name a CLIP of open_clip or transformers .* found no such layer"),
        ({"visual_depth": 5}, r"visual_depth=5\): the tower 'net.vision_model.encoder' has 4 layers"),
        ({"text_depth": 5}, r"text_depth=5\): the tower 'net.text_model.encoder' has 4 layers"),
        ({"text": 6}, r"6 prompts take the place of the 6 words .* the shortest one ends at position 6"),
    ],
)
def test_what_is_no_place_for_prompts_is_refused_in_words(options, words):
    technique = DeepPrompts(**{"clip": "net", "visual_depth": 2, "text_depth": 2, **options})
    with pytest.raises(MisconfigurationException, match=words):
        fit(Names(hugging_face(), trained="logit_scale"), technique, loader=digits(4), max_epochs=1)


def test_two_instances_in_one_tower_are_refused():
    one = DeepPrompts("net", 2, 4, name="one")
    assert "more prompts does what two would do" in conflict_between(one, DeepPrompts("net", 2, 0))
    assert "more prompts does what two would do" in conflict_between(DeepPrompts("net", 0, 4), one)
    assert conflict_between(one, DeepPrompts("clip", 2, 4)) is None
    assert conflict_between(DeepPrompts("net", 2, 0), DeepPrompts("net", 0, 4, name="texts")) is None


def test_a_test_without_trained_prompts_and_pooled_images_are_refused():
    with pytest.raises(MisconfigurationException, match=r"there are no trained prompts\. Fit with DeepPrompts first"):
        make_trainer(callbacks=[DeepPrompts("net", 2, 4, 2, 2)]).test(Graded(hugging_face()), digits(4))
    clip = open_clip()
    clip.visual.pool_type = "avg"
    with (
        pytest.raises(MisconfigurationException, match="prompts would be among them"),
        trained(drawn_prompts()).used_in(clip),
    ):
        pass


# -- base to novel ----------------------------------------------------------------------------------------------------


def test_the_harmonic_mean_is_that_of_the_paper():
    assert harmonic_mean(torch.tensor(84.26), torch.tensor(76.10)).item() == pytest.approx(79.97, abs=0.005)
    assert harmonic_mean(torch.tensor(0.0), torch.tensor(0.0)).item() == 0
