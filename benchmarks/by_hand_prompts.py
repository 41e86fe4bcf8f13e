"""Training steps of fine-tuning with prompts, made-up features and a head alone, written out as a user would."""

from types import MethodType

import torch
import torch.nn.functional as F
from by_hand import Plain
from timm.models import VisionTransformer
from torch import nn
from transformers import CLIPConfig, CLIPModel

from lightning_reg.functional import (
    FeatureGenerator,
    energy,
    energy_hinge_loss,
    nearest_classes,
    synthesis_losses,
)

SIDE, PATCH, WIDTH, NEIGHBOURS, NOISE, SCALE, DROPOUT = 112, 8, 64, 3, 1.0, 20.0, 0.1  # 197 tokens, as of ViT-B/16
LENGTHS, PROMPTS, DEPTH = (10, 10, 40, 40, 40), 4, 3
UNKNOWN = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


class Vit(VisionTransformer):
    """ViT-Ti: twelve layers of width 192 over 197 tokens."""

    def __init__(self):
        super().__init__(SIDE, PATCH, num_classes=10, embed_dim=192, depth=12, num_heads=3)


class Clip(nn.Module):
    """Logits of the ten classes that it has names of: of 14 tokens each, the first words to be replaced."""

    def __init__(self):
        super().__init__()
        both = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
        text = both | {"vocab_size": 99, "max_position_embeddings": 14, "eos_token_id": 98}
        vision = both | {"image_size": SIDE, "patch_size": PATCH}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
        self.clip.requires_grad_(False).logit_scale.requires_grad_(True)
        names = torch.cat([torch.randint(1, 98, (10, 13)), torch.full((10, 1), 98)], dim=1)
        self.register_buffer("names", names)

    def forward(self, x):
        return self.clip(input_ids=self.names, pixel_values=x).logits_per_image


class Prompted(Plain):
    """A CLIP's towers with tokens of their own in the first layers, layer by layer."""

    def __init__(self, net):
        super().__init__(net)
        self.of_images, self.of_texts = (nn.Parameter(0.02 * torch.randn(DEPTH, PROMPTS, WIDTH)) for _ in range(2))

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        clip, names = self.net.clip, self.net.names
        images, texts = self.images(clip.vision_model, x), self.texts(clip.text_model, names)
        images, texts = F.normalize(clip.visual_projection(images)), F.normalize(clip.text_projection(texts))
        return self.loss(clip.logit_scale.exp() * images @ texts.T, y)

    def images(self, tower, x):
        h = tower.pre_layrnorm(tower.embeddings(x))
        tokens = h.shape[1]
        for number, layer in enumerate(tower.encoder.layers):
            if number < DEPTH:
                h = torch.cat([h[:, :tokens], self.of_images[number].expand(len(h), -1, -1)], dim=1)
            h = layer(h, None)
        return tower.post_layernorm(h[:, 0])

    def texts(self, tower, names):
        h = tower.embeddings(names)
        mask = torch.full((h.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for number, layer in enumerate(tower.encoder.layers):
            if number < DEPTH:
                h = torch.cat([h[:, :1], self.of_texts[number].expand(len(h), -1, -1), h[:, 1 + PROMPTS :]], dim=1)
            h = layer(h, mask)
        return tower.final_layer_norm(h)[torch.arange(len(h)), (names == 98).int().argmax(1)]


class Prefixed(Plain):
    """Learned keys and values before those of the tokens in the first layers of a frozen vision transformer."""

    def __init__(self, net):
        super().__init__(net.requires_grad_(False))
        net.head.requires_grad_(True)
        self.prefixes = nn.ParameterList(torch.rand(2, length // 2, net.embed_dim) for length in LENGTHS)
        for block, prefix in zip(net.blocks, self.prefixes, strict=False):
            block.attn.prefix = prefix
            block.attn.forward = MethodType(attend, block.attn)


def attend(attention, x, **_):
    """The attention of timm with a prefix."""
    q, k, v = attention.qkv(x).chunk(3, dim=2)
    key, value = attention.prefix.expand(len(x), -1, -1, -1).unbind(1)
    rows = q, torch.cat([key, k], dim=1), torch.cat([value, v], dim=1)
    q, k, v = (one.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for one in rows)
    return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HeadOnly(Plain):
    """The head of a frozen network, on its features and on outliers that are there already."""

    def __init__(self, net, outliers=8):
        super().__init__(net.requires_grad_(False))
        net.head.requires_grad_(True)
        self.register_buffer("outliers", torch.randn(outliers, WIDTH), persistent=False)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        logits = self.net(x)
        hinges = energy_hinge_loss(energy(logits), energy(self.net.head(self.outliers)), -15.0, -3.0)
        return self.loss(logits, y) + 0.1 * hinges


class Imagined(Plain):
    """Features of classes made out of those of their neighbours, by OGEN's generator and losses."""

    def __init__(self, net):
        super().__init__(net)
        self.made_by = FeatureGenerator(WIDTH, dropout=DROPOUT)
        self.count, self.sums, self.squares = torch.zeros(10, 1), torch.zeros(10, WIDTH), torch.zeros(10, WIDTH)

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        features = self.net.body(x)
        v, w, u = (F.normalize(rows, dim=1) for rows in (features, self.net.head.weight, UNKNOWN))
        with torch.no_grad():
            chosen = F.one_hot(y, 10).float().T
            self.count += chosen.sum(1, keepdim=True)
            self.sums += chosen @ v
            self.squares += chosen @ v.square()
            means = self.sums / self.count.clamp(min=1)
            deviations = (self.squares / self.count.clamp(min=1) - means.square()).clamp(min=0).sqrt()
            seen = self.count[:, 0] > 0
            near = nearest_classes(means, NEIGHBOURS, seen, y)
            values = means[near] + NOISE * torch.rand(WIDTH) * deviations[near]
            shapes = {"a": (1, NEIGHBOURS), "b": (NEIGHBOURS, 1), "c": (NEIGHBOURS, 1)}
            keep = {name: torch.rand(len(x), 4, *shape) >= DROPOUT for name, shape in shapes.items()}
        rows = synthesis_losses(self.made_by, v, y, w, u, near, values, SCALE, keep=keep)
        counted = seen[near].all(1).float()
        loss = {name: (value * counted).mean() for name, value in rows.items()}
        made = 4 * loss["regression"] + loss["a"] + (loss["b"] + 2 * loss["c"]) / NEIGHBOURS
        return self.loss(self.net.top(features), y) + made
