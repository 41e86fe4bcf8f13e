"""ALLoRA: low-rank fine-tuning with a row-wise adaptive gradient."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_reg import ALLoRA, SaRA
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    allora_linear,
    allora_row_scale,
    applied,
    export_peft,
    from_peft,
    low_rank_factor,
    low_rank_norm,
    new_low_rank,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET, Classifier, fit, make_trainer, same_weights, weights_of


class ALLoRAByHand(Hand):
    """The factors of the layer in the middle as one leaf; all else trains as it is."""

    def latent(self, name, weight):
        if not (name.startswith("net.body") and name.endswith("weight")):
            return None
        technique, rank = self.technique, min(self.technique.rank, *weight.flatten(1).shape)
        draw = torch.Generator().manual_seed(technique.derived_seed(f"factors of {name}"))
        rows, columns = weight.flatten(1).shape
        right = (2 * torch.rand(rank, columns, generator=draw) - 1) / columns**0.5
        leaf = torch.cat([torch.zeros(rows * rank), right.flatten()])
        eta = technique.eta

        def mapped(leaf):
            left, right = leaf[: rows * rank].reshape(rows, rank), leaf[rows * rank :].reshape(rank, columns)
            delta = left @ right
            scaled = delta / (delta.detach().norm(dim=1, keepdim=True) + 1 / eta**2).sqrt()
            return weight + (delta.detach() + scaled - scaled.detach()).reshape(weight.shape)

        return leaf, mapped


SCALED = "rank 3, row scale, eta=2, in the gradient, layers net.body*"
CASE = Case(
    make=partial(ALLoRA, layers="net.body*", rank=3, train=["net.first", "net.head", "*.bias"]),
    neutral=partial(ALLoRA, train="*"),
    by_hand=ALLoRAByHand,
    says=(
        SCALED,
        "rank 8, row scale, eta=2, in the gradient, layers auto",
        "rank 3, row scale, eta=1.5, in the update, layers net.body*",
        "rank 2, LoRA, alpha=4, B at 8 of the learning rate, layers auto",
        "rank 2, rsLoRA, alpha=2, layers auto",
    ),
    also=["images", "regression"],
    variants=[
        partial(ALLoRA, layers="net.body*", rank=3, eta=1.5, mode="update", train=["net.first", "net.head", "*.bias"]),
        partial(ALLoRA, rank=2, scale="fixed", alpha=4.0, b_lr_factor=8.0),
        partial(ALLoRA, rank=2, scale="rank", exclude="net.body*", train="*.bias"),
    ],
    invalid=[
        ({"rank": 0}, "rank"),
        ({"eta": 0.0}, "eta"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"b_lr_factor": -1.0}, "b_lr_factor"),
        ({"keep_on": "disk"}, "keep_on"),
    ],
)

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")]

# -- the functional core ----------------------------------------------------------------------------------------------


def test_the_scale_of_a_row_by_hand():
    torch.manual_seed(0)
    left, right, eta = torch.randn(7, 3).double(), torch.randn(3, 11).double(), 1.7
    want = [1 / (float((left[i] @ right).norm()) + 1 / eta**2) ** 0.5 for i in range(7)]
    assert allora_row_scale(left, right, eta).tolist() == pytest.approx(want, rel=1e-12)
    left[2] = 0.0
    assert float(allora_row_scale(left, right, eta)[2]) == pytest.approx(eta, rel=1e-12)
    # The norm stands under the root, not its square: 1/sqrt(2) for a row of length 1.
    assert float(allora_row_scale(torch.ones(1, 1), torch.ones(1, 1), 1.0)) == pytest.approx(0.5**0.5)
    assert float(allora_row_scale(torch.full((1, 1), 9.0), torch.ones(1, 1), 1e6)) == pytest.approx(1 / 3, rel=1e-6)
    assert allora_row_scale(left.half(), right.half(), eta).dtype == torch.float32
    stacked = allora_row_scale(torch.stack([left, -2 * left]), torch.stack([right, right]), eta)
    torch.testing.assert_close(stacked[0], allora_row_scale(left, right, eta))
    torch.testing.assert_close(stacked[1], allora_row_scale(2 * left, right, eta))


def test_the_weight_and_the_branch_give_the_same_gradients():
    torch.manual_seed(0)
    n1, n2, r, eta = 7, 11, 3, 2.0
    w0, head = torch.randn(n1, n2).double(), torch.randn(n1).double()
    right, left = torch.randn(r, n2).double(), 0.3 * torch.randn(n1, r).double()
    x = torch.randn(5, 4, n2).double()

    def loss(y):
        return ((y * head).sum(-1).tanh() ** 2).sum()

    branch = [tensor.clone().requires_grad_() for tensor in (x, left, right)]
    loss(branch[0] @ w0.T + allora_linear(*branch, eta)).backward()
    at_x, w = x.clone().requires_grad_(), (w0 + left @ right).requires_grad_()
    loss(at_x @ w.T).backward()
    s = torch.diag(1 / ((left @ right).norm(dim=1) + 1 / eta**2).sqrt())
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(branch[0].grad, at_x.grad)
    close(branch[1].grad, s @ w.grad @ right.T)
    close(branch[2].grad, left.T @ s @ w.grad)
    # It is no derivative of the forward pass: a row's gradient is s times that.
    plain = [tensor.clone().requires_grad_() for tensor in (left, right)]
    loss(x @ w0.T + x @ plain[1].T @ plain[0].T).backward()
    close(branch[1].grad, s @ plain[0].grad)
    assert not torch.allclose(branch[1].grad, plain[0].grad, rtol=0.1)


def test_the_norm_of_a_product_and_what_is_logged():
    torch.manual_seed(0)
    left, right = torch.randn(5, 7, 3).double(), torch.randn(5, 3, 4).double()
    torch.testing.assert_close(low_rank_norm(left, right), (left @ right).norm(), rtol=1e-12, atol=0)
    module, technique = Classifier(lr=0.1), ALLoRA(rank=2, scale="fixed", alpha=6.0)
    start = weights_of(module)
    trainer = fit(module, technique)
    moved = [module.get_parameter(n).detach() - start[n] for n in ("net.0.weight", "net.3.weight")]
    want = sum(d.square().sum() for d in moved).sqrt()
    torch.testing.assert_close(trainer.callback_metrics["reg/allora/norm"], want, rtol=1e-4, atol=0)
    technique = ALLoRA(rank=2, eta=3.0)
    trainer = fit(Classifier(lr=0.0), technique)
    assert float(trainer.callback_metrics["reg/allora/scale"]) == pytest.approx(3.0)


def test_factors_to_begin_with():
    draw = torch.Generator().manual_seed(0)
    left, right = new_low_rank((3, 6, 400), 4, draw)
    assert not left.any()
    assert (left.shape, right.shape) == ((3, 6, 4), (3, 4, 400))
    assert 0.049 < right.abs().max() <= 400**-0.5
    assert abs(float(right.std()) - 400**-0.5 / 3**0.5) < 1e-3
    left, right = new_low_rank((50, 400), 4, draw, table=True)
    assert not right.any()
    assert 0.8 < float(left.std()) < 1.2
    factors = [low_rank_factor("row", 4), low_rank_factor("fixed", 4, 8.0), low_rank_factor("rank", 4, 8.0)]
    assert factors == [1.0, 2.0, 4.0]
    assert [low_rank_factor("fixed", 4), low_rank_factor("rank", 4)] == [1.0, 2.0]


# -- training ---------------------------------------------------------------------------------------------------------


class Map(LightningModule):
    """A linear map of 30 numbers to 20, which is to become another one."""

    def __init__(self, optimizer, lr, dtype=torch.float32):
        super().__init__()
        self.optimizer, self.lr, self.losses = optimizer, lr, []
        draw = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(30, 20, bias=False, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(20, 30, generator=draw) / 30**0.5)
        self.target = self.layer.weight.detach() + torch.randn(20, 30, generator=draw).to(dtype) / 30**0.5

    def training_step(self, batch, batch_idx):
        x = batch[0].to(self.target.dtype)
        loss = (self.layer(x) - x @ self.target.T).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), self.lr)


def last_loss(optimizer, lr, **options):
    x = torch.randn(64, 30, generator=torch.Generator().manual_seed(1))
    module = Map(optimizer, lr)
    fit(module, ALLoRA(rank=4, **options), loader=DataLoader(TensorDataset(x), batch_size=64), max_epochs=60)
    return module.losses[-1]


def test_eta_speeds_sgd_up():
    losses = [last_loss(torch.optim.SGD, 0.3, eta=eta) for eta in (4.0, 2.0, 1.0)]
    assert losses == sorted(losses)
    assert losses[0] < 0.95 * losses[2]


@pytest.mark.filterwarnings("ignore:ALLoRA")
def test_adam_cancels_the_scale_of_the_gradient_and_not_that_of_the_update():
    plain = last_loss(torch.optim.Adam, 1e-3, scale="fixed")
    in_gradient = [last_loss(torch.optim.Adam, 1e-3, eta=eta) for eta in (1.0, 4.0)]
    assert all(abs(loss - plain) < 0.02 for loss in in_gradient)
    assert last_loss(torch.optim.Adam, 1e-3, eta=4.0, mode="update") < plain - 0.05


def test_adam_in_gradient_mode_is_warned_of():
    with pytest.warns(UserWarning, match=r"^ALLoRA\(mode='grad'\) scales gradients by rows, and AdamW divides"):
        last_loss(torch.optim.AdamW, 1e-3)
    last_loss(torch.optim.AdamW, 1e-3, mode="update")
    last_loss(torch.optim.AdamW, 1e-3, scale="fixed")


def test_the_update_of_b_is_scaled_by_the_rows_as_they_were():
    """Two steps of SGD by hand in float64."""
    x = torch.randn(64, 30, generator=torch.Generator().manual_seed(1))
    module, technique = Map(torch.optim.SGD, 0.5, torch.double), ALLoRA(rank=4, eta=3.0, mode="update")
    v = module.layer.weight.detach().clone()
    draw = torch.Generator().manual_seed(technique.derived_seed("factors of layer.weight"))
    left, right = (t.double().requires_grad_() for t in new_low_rank((20, 30), 4, draw))
    loader = DataLoader(TensorDataset(x), batch_size=64)
    fit(module, technique, loader=loader, max_epochs=3)
    for _ in range(3):
        rows = x.double()
        loss = (rows @ (v + left @ right).T - rows @ module.target.T).square().mean()
        at_left, at_right = torch.autograd.grad(loss, (left, right))
        scale = 1 / ((left @ right).detach().norm(dim=1, keepdim=True) + 1 / 9).sqrt()
        with torch.no_grad():
            left -= 0.5 * scale * at_left
            right -= 0.5 * at_right
    torch.testing.assert_close(technique.latents.own["layer.weight"]["B"], left, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(technique.latents.own["layer.weight"]["A"], right, rtol=1e-10, atol=1e-10)


def test_what_is_chosen_and_what_is_said():
    technique, module = ALLoRA(rank=2, train="net.3", layers="net.0"), Classifier()
    start = weights_of(module)
    fit(module, technique, max_epochs=1)
    changed = [name for name, value in weights_of(module).items() if not torch.equal(value, start[name])]
    assert changed == ["net.0.weight", "net.3.weight", "net.3.bias"]
    assert technique.describe().endswith("layers net.0; 1 weights by 28 numbers; 2 parameters as they are, 1 frozen")
    for options, words in (
        (
            {"layers": "net.7"},
            "ALLoRA(layers=['net.7']): no weight of two dimensions or layer with one has such",
        ),
        ({"train": "head"}, "ALLoRA(train=['head']): no layer with parameters has such a name"),
        ({"exclude": "*"}, "ALLoRA: there is no weight to adapt; `layers` 'auto' and `exclude` ['*'] leave none."),
    ):
        with pytest.raises(MisconfigurationException) as raised:
            fit(Classifier(), ALLoRA(**options))
        assert str(raised.value).startswith(words)
    module = Classifier()
    module.net.register_parameter("codes", nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(MisconfigurationException, match=r"ALLoRA: 'net\.codes' of Sequential is quantised, or no"):
        fit(module, ALLoRA(layers="net.codes"))


def test_the_copy_of_the_weights_on_the_cpu():
    """A device without memory stands for another one: what is moved there and what is not can be seen."""
    module, technique = Classifier(), ALLoRA(rank=2, keep_on="cpu")
    fit(module, technique)
    plain = Classifier()
    fit(plain, ALLoRA(rank=2))
    assert same_weights(module, plain)
    technique.latents.to(dict.fromkeys(technique.latents.values, torch.device("meta")))
    for name, value in technique.latents.values.items():
        weight = torch.empty_like(value, device="meta")
        assert value.device.type == "cpu"
        assert {part.device.type for part in technique.latents.own[name].values()} == {"meta"}
        assert technique.latents.room(name, weight).device.type == "meta"
        with torch.no_grad():
            technique.map_weights({name: value}, {name: weight})
    other = ALLoRA(rank=2)
    fit(Classifier(), other)
    other.latents.to(dict.fromkeys(other.latents.values, torch.device("meta")))
    assert {value.device.type for value in other.latents.values.values()} == {"meta"}


def test_weights_in_eight_and_four_bits_are_refused_by_name():
    """As bitsandbytes and torchao keep them: bytes, and a tensor of a class of its own."""

    class Linear4bit(nn.Linear):
        def __init__(self):
            super().__init__(4, 4, bias=False)
            self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    class Packed(torch.Tensor):
        pass

    module = Classifier()
    module.net.append(Linear4bit())
    for technique in (ALLoRA(layers="net.4.weight"), SaRA(layers="net.4.weight")):
        with pytest.raises(MisconfigurationException) as raised:
            fit(module, technique)
        assert str(raised.value) == (
            f"{type(technique).__name__}: 'net.4.weight' of Linear4bit is quantised, or no plain tensor, and what is"
            " added to it cannot be written into it. Exclude it, or train it with PEFT."
        )
    module = Classifier()
    module.net[3].weight = nn.Parameter(torch.randn(3, 8).as_subclass(Packed))
    for technique in (ALLoRA(layers="net.3"), SaRA(layers="net.3")):
        with pytest.raises(
            MisconfigurationException, match=r"'net\.3\.weight' of Linear is quantised, or no plain tensor"
        ):
            fit(module, technique)


def test_another_rank_is_refused_on_resume(tmp_path):
    trainer = fit(Classifier(), ALLoRA(rank=2), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]["ALLoRA"]
    with pytest.raises(MisconfigurationException, match=r"^ALLoRA\(rank=3\): the checkpoint is of a training with"):
        ALLoRA(rank=3).load_state_dict(state)


# -- transformers, and PEFT beside it ---------------------------------------------------------------------------------

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def bert():
    options = {"intermediate_size": 24, "max_position_embeddings": 12, "num_labels": 3}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SMALL, **options, **rates))


def gpt2():
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=12, **rates))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, max_position_embeddings=12))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.one = nn.Embedding(40, 6, padding_idx=0), nn.Conv1d(6, 8, 3, padding=1)
        self.norm, self.classifier = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, input_ids, labels):
        rows = self.norm(self.one(self.table(input_ids).transpose(1, 2))).relu().mean(2)
        logits = self.classifier(rows)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


HOSTS = {
    "BERT": (bert, ["query", "value", "output.dense", "word_embeddings"], ["classifier"]),
    "GPT-2": (gpt2, ["c_attn", "c_fc"], []),
    "Llama": (llama, ["q_proj", "v_proj", "down_proj"], []),
    "convolutions": (Convolutions, ["one", "table"], ["classifier"]),
}


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Wraps(LightningModule):
    def __init__(self, model, labels):
        super().__init__()
        self.model, self.labels = model, labels

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1] if self.labels else batch[0])["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2)


def texts():
    draw = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randint(40, (40, 8), generator=draw), torch.randint(3, (40,), generator=draw))
    return DataLoader(data, batch_size=4)


def logits_of(model):
    ids, labels = next(iter(texts()))
    model.eval()
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels if getattr(model, "config", None) is None else None)
    model.train()
    return output["logits"]


def trained(name, tmp_path, **options):
    make, layers, heads = HOSTS[name]
    module = Wraps(made(make), labels=bool(heads))
    technique = ALLoRA(
        layers=[f"*.{layer}" for layer in layers], rank=3, train=[f"*.{h}" for h in heads] or None, **options
    )
    fit(module, technique, loader=texts(), max_epochs=5)
    return module, technique


@pytest.mark.parametrize("name", HOSTS)
def test_the_same_as_peft_and_its_files_load_there(name, tmp_path):
    make, layers, heads = HOSTS[name]
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=layers, modules_to_save=heads or None, fan_in_fan_out=name == "GPT-2"
    )
    peft = get_peft_model(made(make), config)
    peft.save_pretrained(tmp_path / "start")
    # Ours begins with PEFT's first factors, and trains as long.
    module = Wraps(made(make), labels=bool(heads))
    technique = from_peft(tmp_path / "start", module.model, prefix="model")
    fit(module, technique, loader=texts(), max_epochs=5)
    theirs = Wraps(peft, labels=bool(heads))
    theirs.model.train()
    fit(theirs, loader=texts(), max_epochs=5)
    torch.testing.assert_close(logits_of(module.model), logits_of(peft), rtol=0, atol=1e-5)
    merged = peft.merge_and_unload()
    for key, value in module.model.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[key], rtol=0, atol=1e-6)
    # And back: every tensor of the file is used.
    written = export_peft(technique, module.model, tmp_path / "end")
    base = made(make)
    if name == "convolutions":
        base.norm.load_state_dict(module.model.norm.state_dict())  # PEFT's files have no statistics
    loaded = PeftModel.from_pretrained(base, tmp_path / "end")
    result = set_peft_model_state_dict(loaded, load_file(tmp_path / "end" / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert len(written) == len(load_file(tmp_path / "start" / "adapter_model.safetensors"))
    torch.testing.assert_close(logits_of(loaded), logits_of(module.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"scale": "row"}, {"scale": "rank", "alpha": 5.0}], ids=str)
def test_the_file_of_other_scales(options, tmp_path):
    module, technique = trained("Llama", tmp_path, **options)
    export_peft(technique, module.model, tmp_path)
    loaded = PeftModel.from_pretrained(made(llama), tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(module.model), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(technique.product_factor)


def test_a_rank_beyond_a_small_side(tmp_path):
    module = Wraps(made(Convolutions), labels=True)
    technique = ALLoRA(layers=["model.one", "model.classifier"], rank=5, scale="fixed", alpha=10.0)
    fit(module, technique, loader=texts(), max_epochs=1)
    assert {n: len(parts["A"]) for n, parts in technique.latents.own.items()} == {
        "model.one.weight": 5,
        "model.classifier.weight": 3,
    }
    export_peft(technique, module.model, tmp_path)
    base = made(Convolutions)
    base.norm.load_state_dict(module.model.norm.state_dict())
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(base, tmp_path)), logits_of(module.model), rtol=0, atol=1e-5
    )


class Odd(nn.Module):
    """What PEFT's files have no place for."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv1d(6, 6, 3, groups=2, padding=1)
        self.table, self.attention = nn.Embedding(40, 6), nn.MultiheadAttention(6, 2, kdim=4, batch_first=True)
        self.experts, self.classifier = nn.Parameter(torch.randn(3, 5, 6)), nn.Linear(5, 3)

    def forward(self, input_ids, labels):
        x = self.grouped(self.table(input_ids).transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x[..., :4], x)[0].mean(1)
        logits = self.classifier(torch.einsum("eoi,bi->bo", self.experts, x).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_weights_of_any_layer_are_trained_and_not_all_exported(tmp_path):
    odd = ["model.grouped.weight", "model.attention.k_proj_weight", "model.attention.out_proj.weight", "model.experts"]
    module = Wraps(made(Odd), labels=True)
    start = weights_of(module)
    technique = ALLoRA(layers=odd, rank=2)
    fit(module, technique, loader=texts(), max_epochs=1)
    changed = [name for name, value in weights_of(module).items() if not torch.equal(value, start[name])]
    assert sorted(changed) == sorted(odd)
    delta = module.model.experts - start["model.experts"]
    assert torch.linalg.matrix_rank(delta, atol=1e-5).tolist() == [2, 2, 2]
    assert {name: way.split(" (")[0] for name, way in technique.latents.ways.items()} == {
        odd[0]: "at the layer", odd[1]: "released", odd[2]: "released", odd[3]: "released",
    }  # fmt: skip
    first = {}  # at zero a row learns eta times faster, whichever way its gradient comes
    for eta in (1.0, 3.0):
        technique = ALLoRA(layers=odd, rank=2, eta=eta)
        fit(Wraps(made(Odd), labels=True), technique, loader=texts(), max_steps=1)
        first[eta] = {name: technique.latents.own[name]["B"].detach() for name in odd}
    for name in odd:
        assert first[1.0][name].abs().max() > 1e-6
        torch.testing.assert_close(first[3.0][name], 3 * first[1.0][name])
        technique = ALLoRA(layers=name, rank=2)
        fit(module, technique, loader=texts(), max_epochs=1)
        with pytest.raises(ValueError, match=f"export_peft: '{name}' of .* has no place in an adapter of PEFT"):
            export_peft(technique, module.model, tmp_path)


def test_files_and_models_that_do_not_fit(tmp_path):
    module, technique = trained("BERT", tmp_path)
    with pytest.raises(ValueError, match="and is not in the given 2 parameters"):
        export_peft(technique, module.model.classifier, tmp_path)
    with pytest.raises(ValueError, match="nothing was trained yet"):
        export_peft(ALLoRA(), module.model, tmp_path)
    export_peft(technique, module.model, tmp_path)
    with pytest.raises(ValueError, match=r"from_peft: the adapter has 'classifier\.bias'"):
        from_peft(tmp_path, made(llama))
    again = replace_start(from_peft(tmp_path, made(bert), prefix="model"), layers="*.query")
    with pytest.raises(MisconfigurationException, match="no weight of such a name is trained here"):
        fit(Wraps(made(bert), labels=True), again, loader=texts(), max_epochs=1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="is no plain LoRA"):
        from_peft(tmp_path, made(bert))


def replace_start(technique, layers):
    return ALLoRA(layers=layers, rank=technique.rank, start=technique.start)


def test_a_checkpoint_of_a_host_is_that_of_the_plain_model(tmp_path):
    module, _ = trained("GPT-2", tmp_path)
    assert module.state_dict().keys() == Wraps(made(gpt2), labels=False).state_dict().keys()
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    module.model.save_pretrained(tmp_path / "plain")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "plain")
    assert same_weights(again, module.model)
    torch.testing.assert_close(logits_of(again), logits_of(module.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant, tmp_path):
    layers = ["*.query", "*.value"]
    plain = Wraps(made(bert), labels=True)
    fit(plain, ALLoRA(layers=layers, rank=3), loader=texts(), max_epochs=1)
    module = Wraps(made(bert), labels=True)
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    module.model.enable_input_require_grads()
    fit(module, ALLoRA(layers=layers, rank=3), loader=texts(), max_epochs=1)
    assert same_weights(module, plain, atol=1e-6)


def test_adapters_applied_for_a_time_and_in_sums(tmp_path):
    module, technique = trained("BERT", tmp_path, scale="fixed", alpha=6.0)
    export_peft(technique, module.model, tmp_path / "one")
    other, second = trained("BERT", tmp_path, scale="row", seed=5)
    export_peft(second, other.model, tmp_path / "two")
    base = made(bert)
    before = weights_of(base)
    with applied(base, tmp_path / "one") as model:
        torch.testing.assert_close(logits_of(model), logits_of(module.model), rtol=0, atol=1e-6)
    assert same_weights(base, before)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    with applied(base, tmp_path / "one", 0.25), applied(base, tmp_path / "two", -1.0):
        one, two = (m.model.get_parameter(name).detach() - before[name] for m in (module, other))
        torch.testing.assert_close(base.get_parameter(name).detach(), before[name] + 0.25 * one - two)
        head = base.classifier.weight.detach()
        own = [m.model.classifier.weight.detach() for m in (module, other)]
        first = before["classifier.weight"].lerp(own[0], 0.25)
        torch.testing.assert_close(head, first.lerp(own[1], -1.0))
    assert same_weights(base, before)
    with pytest.raises(ValueError, match="applied: the adapter in"), applied(made(llama), tmp_path / "one"):
        pass


# -- files that hold what was trained alone ---------------------------------------------------------------------------


def delta_run(folder, epochs, ckpt=None, seed=0, save="delta"):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Wraps(Convolutions(), labels=True)
    technique = ALLoRA(layers=["model.one", "model.table"], rank=2, train="model.classifier", save=save)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.2, momentum=0.9)
    trainer = make_trainer(callbacks=[technique], max_epochs=epochs)
    trainer.fit(module, texts(), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, technique, trainer


def test_a_delta_goes_on_with_the_same_bits_and_on_no_other_base(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, kept, _ = delta_run(tmp_path / "whole", 4, save="full")
    delta_run(tmp_path, 2)
    half = tmp_path / "last.ckpt"
    file = torch.load(half, weights_only=True)
    statistics = {"model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"}
    assert file["state_dict"].keys() == {"model.classifier.weight", "model.classifier.bias"} | statistics
    assert not file["callbacks"]["ALLoRA"]["values"]
    resumed, technique, trainer = delta_run(tmp_path, 4, ckpt=half)
    assert same_weights(whole, resumed)
    one, two = (t.state_dict() for t in (kept, technique))
    for name, parts in one["own"].items():
        for part in parts:
            assert torch.equal(parts[part], two["own"][name][part])
            moments = [state["moments"][name][part]["momentum_buffer"] for state in (one, two)]
            assert torch.equal(*moments)
    # In a stage without a fit, and from a file that a callback with another argument reads.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = Wraps(Convolutions(), labels=True)
    seen.test_step = lambda batch, batch_idx: None
    reader = ALLoRA(layers=["model.one", "model.table"], rank=2, train="model.classifier")
    make_trainer(callbacks=[reader]).test(seen, texts(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert same_weights(seen, whole)
    assert "load_model_state_dict" not in vars(trainer.strategy)
    with pytest.raises(MisconfigurationException) as raised:
        delta_run(tmp_path, 4, ckpt=half, seed=1)
    assert str(raised.value) == (
        "ALLoRA: the checkpoint holds what was trained on top of other weights than the module's: its weights differ."
        " Make the module as it was when that training began, pre-trained weights included."
    )


def test_a_delta_of_bits_in_half_precision_and_of_shared_weights(tmp_path):
    module = Wraps(made(gpt2), labels=False)
    technique = ALLoRA(layers=["*.c_attn", "*.wte"], rank=2, save="delta")
    options = {"loader": texts(), "precision": "bf16-true"}
    trainer = fit(module, technique, max_epochs=2, **options)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert list(torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]) == []
    fit_on = make_trainer(callbacks=[ALLoRA(layers=["*.c_attn", "*.wte"], rank=2)], max_epochs=3, precision="bf16-true")
    resumed = Wraps(made(gpt2), labels=False)
    fit_on.fit(resumed, texts(), ckpt_path=tmp_path / "two.ckpt")
    whole = Wraps(made(gpt2), labels=False)
    fit(whole, ALLoRA(layers=["*.c_attn", "*.wte"], rank=2), max_epochs=3, **options)
    assert same_weights(whole, resumed)
