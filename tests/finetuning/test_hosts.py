"""Networks of other libraries, small and with random weights: all of fine-tuning in each."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from lightning_reg import ALLoRA, MaestroLowRank, MaskTuning, SaRA
from lightning_reg.functional import export_low_rank
from tests.toys import QUIET, fit, same_weights, weights_of

pytestmark = QUIET
SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROP = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 3}


class Reads(nn.Module):
    """A network of transformers, and which of its outputs is the answer."""

    def __init__(self, net, key="last_hidden_state"):
        super().__init__()
        self.net, self.key = net, key

    def forward(self, ids, images):
        given = {"pixel_values": images} if self.net.main_input_name == "pixel_values" else {"input_ids": ids}
        if isinstance(self.net, CLIPModel):
            given |= {"pixel_values": images}
        return self.net(**given)[self.key]


def clip():
    text = {**SIZES, "max_position_embeddings": 6, "eos_token_id": 19, "bos_token_id": 0, "attention_dropout": 0.0}
    vision = {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **IMAGES}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def mixture():
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
    config = transformers.Qwen3MoeConfig(**SIZES, **experts, num_key_value_heads=2)
    net = transformers.Qwen3MoeModel(config)
    net.set_experts_implementation("eager")  # the grouped product is not made for float64
    return net


def residual():
    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1]}
    return ResNetModel(ResNetConfig(**sizes, layer_type="bottleneck"))


class Denoises(nn.Module):
    """A small network of diffusers."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DConditionModel  # some seconds, which no other test waits for

        self.table = nn.Embedding(20, 8)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        )

    def forward(self, ids, images):
        return self.unet(images, torch.arange(len(images)), self.table(ids)).sample


class Grouped(nn.Module):
    """Grouped, depthwise and pointwise convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 9, 3, stride=2, groups=3)
        self.depthwise, self.pointwise = nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.Conv2d(9, 4, 1)

    def forward(self, ids, images):
        return self.pointwise(self.depthwise(self.grouped(self.first(images).tanh()).tanh()))


class Attention(nn.Module):
    """Attention whose projections are joined, and one whose keys have a width of their own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.joined = nn.MultiheadAttention(8, 2, batch_first=True)
        self.split = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)

    def forward(self, ids, images):
        x = self.table(ids)
        x = self.joined(x, x, x)[0]
        return self.split(x, x[..., :5], x[..., :3])[0]


AT_LAYER, RELEASED = {"at the layer"}, {"released"}
# How it is made; which layers; where their gradients come from.
HOSTS = {
    "BERT": (lambda: Reads(BertModel(BertConfig(**SIZES, **NO_DROPOUT))), "auto", AT_LAYER),
    "GPT-2": (
        lambda: Reads(GPT2Model(GPT2Config(vocab_size=20, n_positions=6, n_embd=8, n_layer=1, n_head=2, **NO_DROP))),
        "auto",
        AT_LAYER,
    ),
    "Llama": (lambda: Reads(LlamaModel(LlamaConfig(**SIZES))), "auto", AT_LAYER),
    "CLIP": (lambda: Reads(clip(), "logits_per_image"), "auto", AT_LAYER),
    "ViT": (lambda: Reads(ViTModel(ViTConfig(**SIZES, **IMAGES, **NO_DROPOUT))), "auto", AT_LAYER),
    "ResNet": (lambda: Reads(residual(), "pooler_output"), "auto", AT_LAYER),
    "UNet": (Denoises, "auto", AT_LAYER),
    "convolutions": (Grouped, "auto", AT_LAYER),
    "attention": (Attention, "auto", RELEASED),
}
if hasattr(transformers.PreTrainedModel, "set_experts_implementation"):  # experts as one parameter, transformers 5
    HOSTS["mixture of experts"] = (lambda: Reads(mixture()), ["*.q_proj", "*.experts.*"], AT_LAYER | RELEASED)


class Trains(LightningModule):
    """Pulls what a network puts out to a wave."""

    def __init__(self, name):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = HOSTS[name][0]().train()

    def training_step(self, batch, batch_idx):
        output = self.net(*batch).flatten(1)
        return F.mse_loss(output, torch.arange(output.shape[1]).cos().expand_as(output))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def batches():
    draw = torch.Generator().manual_seed(0)
    ids, images = torch.randint(19, (6, 6), generator=draw), torch.randn(6, 3, 8, 8, generator=draw)
    return DataLoader(list(zip(ids, images, strict=True)), 3)


@pytest.mark.parametrize("name", HOSTS)
def test_factors_in_other_networks(name):
    _, layers, ways = HOSTS[name]
    modules, ours, dense = (
        [Trains(name), Trains(name)],
        *(ALLoRA(layers, rank=2, scale="fixed", alpha=6.0) for _ in range(2)),
    )
    dense.is_product = False  # the same map through the gradient of the weight
    for module, technique in zip(modules, (ours, dense), strict=True):
        fit(module, technique, loader=batches(), max_epochs=2, precision="64-true")
    assert {way.split(" (")[0] for way in ours.latents.ways.values()} == ways
    assert same_weights(*modules, atol=1e-9)  # float64's rounding, which layers and steps let grow
    plain, after = weights_of(Trains(name).double()), weights_of(modules[0])
    assert plain.keys() == after.keys()
    changed = {name for name in after if after[name].is_floating_point() and not torch.equal(plain[name], after[name])}
    statistics = {name for name, _ in modules[0].named_buffers()}
    assert changed - statistics <= ours.latents.own.keys()
    moved = [n for n, parts in ours.latents.own.items() if parts["B"].detach().abs().max() > 0]
    assert len(moved) >= 0.7 * len(ours.latents.own)  # some lie behind an answer that nobody asks for (a pooler)
    for weight in moved:
        difference = after[weight] - plain[weight]
        matrix = difference if difference.dim() == 3 and name == "mixture of experts" else difference.flatten(1)
        assert int(torch.linalg.matrix_rank(matrix, atol=1e-9).max()) <= 2


@pytest.mark.parametrize("name", HOSTS)
def test_entries_in_other_networks(name):
    _, layers, _ = HOSTS[name]
    module, technique = Trains(name), SaRA(0.2, layers=layers, rank_weight=0.0, readjust_at=None)
    start = weights_of(module)
    fit(module, technique, loader=batches(), max_epochs=2)
    moved = 0
    for weight, index in technique.latents.index.items():
        different = (module.get_parameter(weight).detach() != start[weight]).flatten()
        assert set(different.nonzero().flatten().tolist()) <= set(index.tolist())
        moved += int(different.sum())
    assert moved > 0.5 * technique.latents.size
    trained = set(technique.latents.index)
    assert all(torch.equal(p, start[n]) for n, p in module.named_parameters() if n not in trained)


@pytest.mark.parametrize("name", HOSTS)
def test_masks_in_other_networks(name):
    _, layers, _ = HOSTS[name]
    module, technique = Trains(name), MaskTuning(layers, gradient_dropout=0.0, norm_weight=0.0, lr_factor=1e3)
    start = weights_of(module)
    fit(module, technique, loader=batches(), max_epochs=2)
    masks = {weight: parts["mask"].detach() for weight, parts in technique.latents.own.items()}
    for weight, parameter in module.named_parameters():
        wanted = torch.where(masks[weight] > 0.005, start[weight], 0) if weight in masks else start[weight]
        assert torch.equal(parameter, wanted)
    off = sum(int((mask <= 0.005).sum()) for mask in masks.values())
    assert 0 < off < technique.latents.size
    assert sum(bool((mask != technique.init).any()) for mask in masks.values()) >= 0.7 * len(masks)


@pytest.mark.parametrize("name", HOSTS)
def test_columns_in_other_networks_and_their_export(name):
    _, layers, _ = HOSTS[name]
    module, technique = Trains(name), MaestroLowRank(layers, lasso_weight=0.0, threshold=1e9)  # one column is left
    start = weights_of(module)
    fit(module, technique, loader=batches(), max_epochs=2)
    parameters = dict(module.named_parameters())
    moved = [weight for weight in technique.ranks if not torch.equal(parameters[weight], start[weight])]
    assert len(moved) >= 0.7 * len(technique.ranks)
    assert set(technique.ranks.values()) == {1}
    small, layers = export_low_rank(technique, module)
    ids, images = next(iter(batches()))
    with torch.no_grad():
        before, after = (m.eval().net(ids, images) for m in (module, small))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert bool(layers) is (name != "attention")  # whose layers stay, of fewer columns
