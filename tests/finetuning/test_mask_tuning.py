"""MaskTuning: binary masks on frozen weights, gradient dropout, the weights that matter, bits."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from lightning_reg import ALLoRA, MaskTuning, SaRA
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    apply_bits_,
    binary_mask,
    bits_applied,
    gradient_dropout,
    keep_probability,
    knowledge_loss,
    load_bits,
    mask_bits,
    most_important,
    norm_gradient,
    pack_bits,
    save_bits,
    unpack_bits,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import seeded
from tests.toys import QUIET, Classifier, fit, make_loader, make_trainer, same_weights, weights_of


class MaskTuningByHand(Hand):
    """A real mask as the leaf of the layer in the middle; its gradient is replaced by a hook."""

    def latent(self, name, weight):
        if not (name.startswith("net.body") and name.endswith("weight")):
            return None
        technique = self.technique
        self.name, self.fixed, self.second, self.count = name, weight.clone(), None, 0
        # A leaf that is multiplied by the root of the factor learns by that factor faster, under SGD.
        self.root = technique.lr_factor**0.5

        def mapped(leaf):
            mask = leaf * self.root
            return self.fixed * ((mask > technique.threshold).float() + mask - mask.detach())

        return torch.full_like(weight, technique.init / self.root), mapped

    def begin(self, loop):
        self.first = loop.constants()
        self.leaf = loop.leaves[self.name]
        self.leaf.register_hook(self.dropped)

    def term(self, loop, moment):
        with torch.no_grad():
            said = loop.run(self.first, moment.x)[0].softmax(1)
        second = [-(said * output.log_softmax(1)).sum(1).mean() for output in moment.outputs]
        loss = sum(second) / len(second)
        self.second = None
        self.second = torch.autograd.grad(loss, loop.leaves[self.name], retain_graph=True)[0] / self.root

    def dropped(self, gradient):
        if self.second is None:
            return gradient
        technique, mask = self.technique, self.leaf.detach() * self.root
        a, b = gradient / self.root + technique.norm_weight * mask / mask.norm(), self.second
        draw = torch.Generator().manual_seed(technique.derived_seed(f"step {self.count} of {self.name}"))
        chance = 0.5 * (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8))
        strength = technique.gradient_dropout
        return ((1 - strength) + strength * (chance > torch.rand(a.shape, generator=draw))) * a * self.root

    def follow(self, loop):
        self.count += 1


BESIDE = ["net.first", "net.head", "*.bias"]
CASE = Case(
    make=partial(MaskTuning, "net.body*", lr_factor=10.0, norm_weight=0.01, train=BESIDE),
    neutral=partial(MaskTuning, train="*"),
    by_hand=MaskTuningByHand,
    says=(
        "from 0.01, off at 0.005, gradient dropout 1, norm by 0.01, layers net.body*",
        "from 0.01, off at 0.005, gradient dropout 1, norm by 0.0001, layers auto",
        "from 0.02, off at 0, 40 % by gradient, gradient dropout 0.5, layers auto",
        "from 0.01, off at 0.005, layers auto",
        "uniform below 0.01, off at 0.005, gradient dropout 1, layers net.body*",
    ),
    also=["images"],
    variants=[
        partial(
            MaskTuning,
            select="gradient",
            fraction=0.4,
            select_batches=2,
            init=0.02,
            threshold=0.0,
            gradient_dropout=0.5,
            norm_weight=0.0,
            lr_factor=10.0,
            train="*.bias",
        ),
        partial(MaskTuning, gradient_dropout=0.0, norm_weight=0.0),
        partial(MaskTuning, "net.body*", spread="uniform", norm_weight=0.0, lr_factor=10.0),
    ],
    invalid=[
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.1}, "fraction"),
        ({"select_batches": 0}, "select_batches"),
        ({"threshold": -0.1}, "threshold"),
        ({"init": 0.005}, "init"),
        ({"gradient_dropout": -0.1}, "gradient_dropout"),
        ({"gradient_dropout": 1.1}, "gradient_dropout"),
        ({"norm_weight": -1.0}, "norm_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"lr_factor": -1.0}, "lr_factor"),
    ],
)

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")]

# -- the functional core ----------------------------------------------------------------------------------------------


def test_a_mask_is_off_at_the_threshold_and_its_gradient_passes():
    mask = torch.tensor([0.005, 0.00500001, -3.0, 0.01], dtype=torch.float64, requires_grad=True)
    binary = binary_mask(mask)
    assert binary.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert binary.dtype == torch.float64
    (binary * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
    assert mask.grad.tolist() == [1.0, -2.0, 3.0, 0.5]
    # Through a layer: dL/dm = v dL/dw.
    torch.manual_seed(0)
    v, x = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    real = torch.full((4, 3), 0.01).double()
    real[1, 2] = 0.0
    real.requires_grad_()
    w = (v * binary_mask(real)).detach().requires_grad_()
    (x @ (v * binary_mask(real)).T).tanh().square().sum().backward()
    (x @ w.T).tanh().square().sum().backward()
    torch.testing.assert_close(real.grad, v * w.grad, rtol=0, atol=0)
    assert real.grad[1, 2] != 0


def test_how_likely_an_entry_is_kept_by_hand():
    pairs = [(1.0, 1.0, 1.0), (1.0, -1.0, 0.5), (1.0, -3.0, 0.25), (-2.0, 0.0, 1.0), (-2.0, 6.0, 0.25), (0.0, 5.0, 0.5)]
    a, b, want = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    torch.testing.assert_close(keep_probability(a, b), want, rtol=1e-7, atol=0)
    torch.testing.assert_close(keep_probability(-a, -b), want, rtol=1e-7, atol=0)
    # What is no larger than epsilon is kept less often, even where both agree.
    assert keep_probability(torch.tensor(1e-8), torch.tensor(0.0)).item() == pytest.approx(0.75)
    assert keep_probability(torch.tensor(1e-8), torch.tensor(0.0), eps=0.0).item() == 1.0


def test_gradient_dropout_limits():
    torch.manual_seed(0)
    a, b = torch.randn(1000), torch.randn(1000)
    assert torch.equal(gradient_dropout(a, b, 0.0), a)
    assert torch.equal(gradient_dropout(a, 0.3 * a), a)
    assert not gradient_dropout(a, -1e12 * a).any()
    torch.testing.assert_close(gradient_dropout(a, -1e12 * a, 0.3), 0.7 * a)
    assert not gradient_dropout(torch.zeros(5), torch.randn(5)).any()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(gradient_dropout(torch.ones(3), odd), torch.ones(3))
    draws = [gradient_dropout(a, b, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_how_often_entries_are_kept():
    count = 100_000
    for against in (-0.25, -1.0, -4.0):
        a, b = torch.ones(count), torch.full((count,), against)
        kept = (gradient_dropout(a, b, 1.0, torch.Generator().manual_seed(0)) != 0).double().mean()
        chance = 1 / (1 - against)
        # Five standard deviations of a mean of 100,000 draws.
        assert abs(float(kept) - chance) < 5 * (chance * (1 - chance) / count) ** 0.5


def test_the_loss_of_what_was_known_by_hand():
    z, t = [0.3, -1.2, 2.0], [1.1, 0.2, -0.7]
    for temperature in (1.0, 2.0):
        own, other = ([math.exp(x / temperature) for x in xs] for xs in (z, t))
        want = -(temperature**2) * sum(q / sum(other) * math.log(p / sum(own)) for p, q in zip(own, other, strict=True))
        found = knowledge_loss(torch.tensor([z]), torch.tensor([t]), temperature)
        assert float(found) == pytest.approx(want, rel=1e-6)
    teacher = torch.tensor([t], requires_grad=True)
    student = torch.tensor([t], requires_grad=True)
    knowledge_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() < 1e-7  # it is least where both say the same
    maps = torch.randn(2, 3, 4, 5)
    each = knowledge_loss(maps, -maps, reduction="none")
    assert each.shape == (2, 4, 5)
    torch.testing.assert_close(each[1, 2, 3], knowledge_loss(maps[1:, :, 2, 3], -maps[1:, :, 2, 3]))


def test_the_gradient_of_the_norm():
    mask = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mask.norm().backward()
    torch.testing.assert_close(norm_gradient(mask.detach()), mask.grad)
    assert not norm_gradient(torch.zeros(3)).any()


def test_the_most_important_entries_over_all_tensors():
    draw = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(3, 4, 2, generator=draw), "b": 1e-3 * torch.rand(7, generator=draw), "c": torch.ones(2)}
    found = most_important(scores, 0.4)
    order = sorted(((float(s), n, i) for n, t in scores.items() for i, s in enumerate(t.flatten())), reverse=True)
    want = {name: sorted(i for _, n, i in order[: round(0.4 * 33)] if n == name) for name in scores}
    assert {name: at.tolist() for name, at in found.items()} == want
    assert found["b"].shape == (0,)
    assert sum(map(len, most_important(scores, 1.0).values())) == 33
    assert sum(map(len, most_important(scores, 1e-9).values())) == 1


def test_bits_by_hand():
    draw = torch.Generator().manual_seed(0)
    for shape in [(0,), (1,), (8,), (3, 5), (2, 3, 4, 1)]:
        mask = torch.rand(shape, generator=draw) < 0.5
        flat = "".join(str(int(bit)) for bit in mask.flatten())
        want = [int(flat[k : k + 8].ljust(8, "0"), 2) for k in range(0, len(flat), 8)]
        packed = pack_bits(mask)
        assert packed.tolist() == want
        assert torch.equal(unpack_bits(packed, shape), mask)


def test_what_the_code_of_the_authors_gives():
    """R-AMT, commit 07f8d2c36670e1fb9498aab169b9f3790ccda66b, code/trainers/masktuning.py, float32 on a CPU."""
    # KLLoss(T) of logits and teacher logits.
    z, t = torch.tensor([[0.3, -1.2, 2.0], [1.0, 0.5, -0.4]]), torch.tensor([[1.1, 0.2, -0.7], [0.0, 0.3, 2.2]])
    assert knowledge_loss(z, t).item() == pytest.approx(1.9489357471466064, rel=1e-6)
    assert knowledge_loss(z, t, 2.0).item() == pytest.approx(5.376971244812012, rel=1e-6)
    # graddrop_backward_and_update, whose draws follow torch.manual_seed(7).
    a = torch.tensor([0.5, -0.2, 0.1, -0.05, 0.3, 0.0, 2e-8, -1e-8])
    b = torch.tensor([-0.1, 0.6, 0.4, 0.15, -0.3, 0.7, 0.0, -3e-8])
    for strength, fourth in ((1.0, 0.0), (0.3, -0.03500000014901161)):
        found = gradient_dropout(a, b, strength, torch.Generator().manual_seed(7))
        assert found.tolist() == pytest.approx([*a[:3].tolist(), fourth, *a[4:].tolist()], rel=1e-6)
    # save_model's binarized_mask.
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1]).bool()
    assert pack_bits(mask).tolist() == [178, 224]


# -- training ---------------------------------------------------------------------------------------------------------


class Wraps(LightningModule):
    """A network that gives its own loss."""

    def __init__(self, model, lr=0.02, labels=True, optimizer=torch.optim.Adam):
        super().__init__()
        self.model, self.lr, self.labels, self.optimizer = model, lr, labels, optimizer

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1] if self.labels else batch[0])["loss"]

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), self.lr)


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
RATES = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    config = BertConfig(**SMALL, **RATES, intermediate_size=24, max_position_embeddings=12, num_labels=3)
    with seeded(0):
        return BertForSequenceClassification(config)


def gpt2():
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with seeded(0):
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=12, **rates))


def texts():
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randint(40, (24, 8), generator=draw), torch.randint(3, (24,), generator=draw))
    return DataLoader(data, batch_size=4)


class Clip(LightningModule):
    """A CLIP that tells classes by their texts, as the paper's does."""

    def __init__(self):
        super().__init__()
        text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 8}
        image = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
        small = {"num_attention_heads": 2, "num_hidden_layers": 1}
        config = CLIPConfig(text_config={**text, **small, "eos_token_id": 39}, vision_config={**image, **small})
        config.projection_dim = 8
        with seeded(0):
            self.model = CLIPModel(config)
        ids = torch.arange(15).reshape(3, 5)
        ids[:, -1] = 39
        self.register_buffer("classes", ids)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(input_ids=self.classes, pixel_values=x).logits_per_image, y)

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3)


def images():
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(24, 3, 8, 8, generator=draw), torch.randint(3, (24,), generator=draw))
    return DataLoader(data, batch_size=4)


HOSTS = {
    "BERT": (lambda: Wraps(bert(), 1e-3), texts, ["*.query", "*.value"], "model.classifier"),
    "GPT-2": (lambda: Wraps(gpt2(), 1e-3, labels=False), texts, ["*.c_attn"], None),
    "CLIP": (Clip, images, ["*vision_model*_proj", "*patch_embedding"], None),
}


@pytest.mark.parametrize("host", HOSTS)
def test_weights_of_a_host_are_as_they_were_or_off(host, tmp_path):
    make, loader, layers, head = HOSTS[host]
    module, keys = make(), make().state_dict().keys()
    start = weights_of(module)
    # Without the norm, which under an Adam takes weights away that have hardly a gradient of the task.
    technique = MaskTuning(layers=layers, train=head, norm_weight=0.0)
    trainer = fit(module, technique, loader=loader(), max_epochs=3)
    off = total = 0
    for name, parameter in module.named_parameters():
        if name in technique.latents.own:
            mask = technique.latents.own[name]["mask"]
            assert torch.equal(parameter, torch.where(mask > 0.005, start[name], 0))
            off, total = off + int((mask <= 0.005).sum()), total + mask.numel()
        else:
            trained = head is not None and name.startswith(head)
            assert torch.equal(parameter, start[name]) is not trained
    assert len(technique.latents.own) == {"BERT": 4, "GPT-2": 2, "CLIP": 5}[host]
    assert 0 < off < total / 2
    assert float(trainer.callback_metrics["reg/mask_tuning/off"]) == pytest.approx(off / total)
    assert module.state_dict().keys() == keys
    # One bit for each weight, on a network as it was.
    bits = mask_bits(technique, prefix="model")
    save_bits(bits, tmp_path / "bits.safetensors")
    header = int.from_bytes((tmp_path / "bits.safetensors").read_bytes()[:8], "little") + 8
    size = (tmp_path / "bits.safetensors").stat().st_size - header
    assert size == sum(-(-mask.numel() // 8) for mask in bits.values())
    base = make()
    with bits_applied(base.model, load_bits(tmp_path / "bits.safetensors")):
        assert all(torch.equal(base.get_parameter(f"model.{n}"), module.get_parameter(f"model.{n}")) for n in bits)
        with bits_applied(base.model, {n: ~mask for n, mask in bits.items()}):
            assert not any(base.get_parameter(f"model.{n}").any() for n in bits)
    assert same_weights(base, start)
    apply_bits_(base.model, bits)
    assert all(torch.equal(base.get_parameter(f"model.{n}"), module.get_parameter(f"model.{n}")) for n in bits)


class Losses(Classifier):
    """Notes its losses."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__(**options)
        self.losses, self.optimizer = [], optimizer

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), self.lr)


def test_the_network_starts_as_it_was_to_the_last_bit():
    plain, masked = Losses(lr=0.0), Losses(lr=0.0)
    fit(plain)
    fit(masked, MaskTuning())
    assert all(torch.equal(*pair) for pair in zip(plain.losses, masked.losses, strict=True))
    assert same_weights(plain, masked)


def by_hand(module, loader, steps, norm, knowledge=None, accumulate=1, draws=None, lr=0.5):
    """Masks of ``net.0.weight`` trained by SGD in plain PyTorch, float32; their values after the steps."""
    net, start = deepcopy(module.net), deepcopy(module.net)
    v = net[0].weight.detach().clone()
    m = torch.full_like(v, 0.01)
    batches = iter(list(loader) * 10)
    for step in range(steps):
        a = b = torch.zeros_like(v)
        for _ in range(accumulate):
            x, y = next(batches)[:2]
            w = torch.where(m > 0.005, v, 0).requires_grad_()
            z = functional_call(net, {"0.weight": w}, x)
            said = start(x).softmax(1).detach()
            lost = -(said * z.log_softmax(1)).sum(1).mean()
            b = b + v * torch.autograd.grad(lost, w, retain_graph=True)[0] / accumulate
            a = a + v * torch.autograd.grad(F.cross_entropy(z, y), w)[0] / accumulate
        a = a + norm * m / m.norm()
        if knowledge is not None:
            chance = (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8)) / 2
            a = ((1 - knowledge) + knowledge * (chance > draws(step, v.shape))) * a
        m = m - lr * a
    return m


def test_three_steps_by_hand_over_accumulated_batches():
    loader = make_loader(shuffle=False)
    for strength, accumulate in ((0.0, 1), (0.7, 1), (1.0, 2)):
        module = Losses(lr=0.5)
        technique = MaskTuning("net.0", gradient_dropout=strength, norm_weight=0.02)
        start = deepcopy(module)
        fit(module, technique, loader=loader, max_steps=4, max_epochs=-1, accumulate_grad_batches=accumulate)

        def draws(step, shape, technique=technique):
            seed = technique.derived_seed(f"step {step} of net.0.weight")
            return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

        want = by_hand(start, loader, 4, 0.02, strength or None, accumulate, draws)
        found = technique.latents.own["net.0.weight"]["mask"].detach()
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)
        assert 0 < int((want <= 0.005).sum()) < want.numel()


def test_gradient_dropout_keeps_more_of_what_was_known():
    """Labels turned by one class: a network that is asked to say something else than it does."""
    said = {}
    for strength in (0.0, 1.0):
        module = Losses(torch.optim.Adam, lr=3e-3)
        start, technique = deepcopy(module.net), MaskTuning(gradient_dropout=strength, norm_weight=0.0)
        fit(module, technique, max_epochs=6)
        x = torch.cat([batch[0] for batch in make_loader()])
        with torch.no_grad():
            said[strength] = float(knowledge_loss(module.net(x), start(x)))
            least = float(knowledge_loss(start(x), start(x)))
    assert least < said[1.0] < said[0.0]


def test_an_own_learning_rate_and_no_decay():
    module = Losses(partial(torch.optim.SGD, weight_decay=0.5), lr=0.1)
    other = Losses(partial(torch.optim.SGD, weight_decay=0.0), lr=0.01)
    one, two = (MaskTuning(lr_factor=factor, norm_weight=0.0) for factor in (1.0, 10.0))
    fit(module, one)
    fit(other, two)
    for name, own in one.latents.own.items():
        torch.testing.assert_close(own["mask"], two.latents.own[name]["mask"])


def test_an_adam_that_cannot_reach_the_threshold_is_told_of():
    with pytest.warns(UserWarning, match=r"^MaskTuning: an Adam moves a mask by .*, 0\.0012 in this training"):
        fit(Losses(torch.optim.Adam, lr=1e-4), MaskTuning(), max_epochs=3)
    fit(Losses(torch.optim.Adam, lr=1e-4), MaskTuning(lr_factor=10.0), max_epochs=3)


def test_spread_masks_begin_with_a_share_of_the_weights_off():
    module = Losses(lr=0.0)
    module.net[0], module.net[3] = nn.Linear(6, 400), nn.Linear(400, 3)
    start = deepcopy(module.net)
    technique = MaskTuning(spread="uniform", init=0.02, norm_weight=0.0)
    fit(module, technique, max_epochs=1)
    for name, parts in technique.latents.own.items():
        mask = parts["mask"].detach()
        assert 0 <= mask.min() < 0.002 < 0.018 < mask.max() < 0.02
        assert float((mask <= 0.005).float().mean()) == pytest.approx(0.25, abs=0.04)
        want = torch.where(mask > 0.005, start.get_parameter(name[4:]), 0)
        assert torch.equal(module.get_parameter(name), want)
    first, second = (parts["mask"].detach().flatten() for parts in technique.latents.own.values())
    assert not torch.equal(first[:1000], second[:1000])
    fit(Losses(torch.optim.Adam, lr=1e-4), MaskTuning(spread="uniform"), max_epochs=3)  # reaches the threshold at once


# -- the weights that matter ------------------------------------------------------------------------------------------


def test_masks_for_the_entries_that_matter_to_the_task():
    module = Losses(lr=0.1)
    start = deepcopy(module)
    technique = MaskTuning(select="gradient", fraction=0.25, select_batches=3, lr_factor=10.0, train="*.bias")
    loader = make_loader(shuffle=False)
    fit(module, technique, loader=loader, max_epochs=3)
    scores = {}
    for x, y in (batch[:2] for batch in list(loader)[:3]):
        start.zero_grad()
        F.cross_entropy(start.net(x), y).backward()
        for name in ("net.0.weight", "net.3.weight"):
            p = start.get_parameter(name)
            scores[name] = scores.get(name, 0.0) + (p * p.grad).abs().detach() / 3
    order = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    least = order[round(0.25 * len(order)) - 1]
    off = 0
    for name, score in scores.items():
        chosen = (score >= least).flatten().nonzero()[:, 0]
        assert torch.equal(technique.latents.index[name].long(), chosen)
        differs = module.get_parameter(name) != start.get_parameter(name)
        assert not differs[score < least].any()
        off += int(differs.sum())
        bits = mask_bits(technique)[name]
        assert torch.equal(bits, ~differs)
    assert off > 0
    assert technique.latents.size == round(0.25 * len(order))


# -- beside others ----------------------------------------------------------------------------------------------------


def test_on_top_of_allora_on_other_weights():
    module = Wraps(bert(), 1e-3)
    start = weights_of(module)
    masks = MaskTuning(layers=["*.query", "*.value"], train="*.classifier")
    factors = ALLoRA(layers=["*.intermediate.dense", "*.output.dense"], rank=2, scale="fixed", train="*.classifier")
    fit(module, factors, masks, loader=texts(), max_epochs=3)
    off = 0
    for name, parameter in module.named_parameters():
        if name in masks.latents.own:
            on = masks.latents.own[name]["mask"] > 0.005
            assert torch.equal(parameter, torch.where(on, start[name], 0))
            off += int((~on).sum())
        elif name in factors.latents.own:
            change = parameter.detach() - start[name]
            assert change.abs().max() > 1e-4
            assert torch.linalg.matrix_rank(change, atol=1e-5) == 2
        else:
            assert torch.equal(parameter, start[name]) is not name.startswith("model.classifier")
    assert off > 0
    # What the network said before is kept of the weights that others train, too.
    assert masks.state_dict()["first"].keys() >= set(factors.latents.own) | {"model.classifier.weight"}
    for name, value in masks.state_dict()["first"].items():
        if name in start:
            assert torch.equal(value, start[name])
    assert "model.bert.embeddings.word_embeddings.weight" not in masks.state_dict()["first"]


def test_two_maps_on_one_weight_are_refused_by_name():
    for other in (ALLoRA(rank=2), SaRA(), MaskTuning(name="second")):
        with pytest.raises(MisconfigurationException, match=r"stand together on 'net\.0\.weight': a weight is trained"):
            fit(Classifier(), MaskTuning(layers="net.0"), other)


class Normed(LightningModule):
    """A network with batch norm; one of its layers runs in two places."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        x = self.net[3](self.net[:3](batch[0]))
        return F.cross_entropy(self.net[4](self.net[3](x)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.3)


@pytest.mark.parametrize("rests", [True, False])
def test_batch_norm_rests_unless_it_is_trained(rests):
    module = Normed()
    start, modes = deepcopy(module.net[1].running_mean), []
    module.net[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    fit(module, MaskTuning(rest_norms=rests, gradient_dropout=0.0), max_epochs=2)
    assert set(modes) == {not rests}
    assert torch.equal(module.net[1].running_mean, start) is rests
    assert module.net[1].training
    trained = Normed()
    fit(trained, MaskTuning(rest_norms=rests, train="net.1"), max_epochs=2)
    assert not torch.equal(trained.net[1].running_mean, start)


def test_writes_of_others_are_read_as_masks():
    module, technique = Classifier(), MaskTuning("net.0", gradient_dropout=0.0, norm_weight=0.0)

    class Writes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                with torch.no_grad():
                    weight = pl_module.net[0].weight
                    weight[0] = 0.0
                    weight[1] = 2.0

    module.lr = 1e-9
    start = module.net[0].weight.detach().clone()
    fit(module, technique, Writes(), max_epochs=1)
    start[0], start[1] = 0.0, 2.0
    assert torch.equal(module.net[0].weight, start)
    assert torch.equal(mask_bits(technique)["net.0.weight"], start != 0)


# -- setups -----------------------------------------------------------------------------------------------------------


def test_a_delta_goes_on_with_the_same_bits(tmp_path):
    def run(epochs, save, ckpt=None):
        module = Normed()
        technique = MaskTuning(select="gradient", fraction=0.5, train="net.4", save=save, lr_factor=5.0)
        trainer = make_trainer(callbacks=[technique], max_epochs=epochs)
        trainer.fit(module, make_loader(shuffle=False), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, technique

    whole, kept = run(4, "full")
    run(2, "delta")
    file = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert "net.0.weight" not in file["state_dict"]
    assert not file["callbacks"]["MaskTuning"]["values"]
    resumed, technique = run(4, "delta", tmp_path / "2.ckpt")
    assert same_weights(whole, resumed)
    one, two = kept.state_dict(), technique.state_dict()
    assert one["steps"] == two["steps"]
    for name, parts in one["own"].items():
        assert torch.equal(parts["mask"], two["own"][name]["mask"])
    assert one["first"].keys() == two["first"].keys()
    assert all(torch.equal(value, two["first"][name]) for name, value in one["first"].items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile asks for it
def test_compiled_networks_and_checkpoints_that_run_again():
    plain = Losses(lr=0.5)
    fit(plain, MaskTuning(norm_weight=0.0), max_epochs=1)
    torch.compiler.reset()
    compiled = Losses(lr=0.5)
    compiled.net.compile(backend="aot_eager")
    fit(compiled, MaskTuning(norm_weight=0.0), max_epochs=1)
    assert same_weights(plain, compiled, atol=1e-6)
    torch.compiler.reset()
    for reentrant in (False, True):
        module = Wraps(bert(), 1e-3)
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        module.model.enable_input_require_grads()
        if reentrant:
            with pytest.raises(MisconfigurationException, match=r"MaskTuning goes back .* Write use_reentrant=False"):
                fit(module, MaskTuning("*.query"), loader=texts(), max_epochs=1)
        else:
            fit(module, MaskTuning("*.query"), loader=texts(), max_epochs=1)
            other = Wraps(bert(), 1e-3)
            fit(other, MaskTuning("*.query"), loader=texts(), max_epochs=1)
            assert same_weights(module, other, atol=1e-6)


class Fails(torch.autograd.Function):
    """As compiled code does that must not go back twice."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")


def test_code_that_was_compiled_for_one_way_back_is_refused():
    def step(module, batch):
        return F.cross_entropy(Fails.apply(module.net(batch[0])), batch[1])

    with pytest.raises(MisconfigurationException, match=r"MaskTuning goes back .* `torch\.compiler\.reset\(\)`"):
        fit(Classifier(step), MaskTuning(), max_epochs=1)


def test_half_precision_keeps_masks_in_float32():
    module, technique = Wraps(bert(), 1e-3), MaskTuning("*.query")
    start = weights_of(module)
    fit(module, technique, loader=texts(), max_epochs=3, precision="bf16-true")
    name, own = next(iter(technique.latents.own.items()))
    assert own["mask"].dtype == torch.float32
    assert torch.equal(module.get_parameter(name), torch.where(own["mask"] > 0.005, start[name].bfloat16(), 0))
    assert (own["mask"] <= 0.005).any()


def test_a_module_that_the_user_has_frozen():
    module = Clip()
    module.requires_grad_(False)
    module.model.visual_projection.requires_grad_()
    technique = MaskTuning(["*vision_model*_proj"])
    fit(module, technique, loader=images(), max_epochs=2)
    assert all((own["mask"] != 0.01).any() for own in technique.latents.own.values())


def test_setups_that_are_refused():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0])[:, 0], batch[1].float())

    with pytest.raises(MisconfigurationException, match=r"has no class logits"):
        fit(Regression(), MaskTuning())
    fit(Regression(), MaskTuning(gradient_dropout=0.0))
    with pytest.raises(MisconfigurationException, match=r"MaskTuning: there is no weight to mask"):
        fit(Classifier(), MaskTuning(exclude="*"))
    with pytest.raises(ValueError, match="mask_bits: nothing was trained yet"):
        mask_bits(MaskTuning())
    with pytest.raises(ValueError, match=r"The mask is of 'weight' \(2, 3\), and the network has no such weight"):
        apply_bits_(nn.Linear(2, 2), {"weight": torch.ones(2, 3, dtype=torch.bool)})
