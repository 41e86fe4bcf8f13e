"""A small CLIP of 8 x 8 digits and their names, trained once and kept in half precision beside this file.

    python -m tests.finetuning.digit_clip    # trains it, in two minutes on one quiet core

It is one set of weights for two libraries: :func:`hugging_face` is a ``transformers.CLIPModel`` and :func:`open_clip` an
``open_clip.CLIP``, with the same features. Images are ``(B, 3, 8, 8)`` in [-1, 1], texts ``(B, 10)`` numbers of words.
It has seen the first 1,397 digits; those after are held out, 200 for training further and 200 for tests.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

__all__ = ["DIGITS", "TEMPLATES", "few_shots", "hugging_face", "open_clip", "seen", "shifted", "tokens", "unseen"]

FILE = Path(__file__).resolve().parent / "digit_clip.safetensors"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = [
    "a photo of a {}",
    "a picture of the {}",
    "an image of a {}",
    "the digit {}",
    "a small drawing of a {}",
    "a photo of the number {}",
    "a handwritten {}",
    "this is the number {}",
]
STYLES = ["", "inverted", "shifted", "mirrored"]  # said before the name, in training
WORDS = sorted({word for text in [*TEMPLATES, *DIGITS, *STYLES] for word in text.split()} - {"{}"})
PAD, START, END, LENGTH, WIDTH, LAYERS = 0, 1, len(WORDS) + 2, 10, 64, 4  # the end is the highest, as in CLIP
PIXELS, PATCH, HEADS, FEATURES = 8, 2, 4, 32
TRAINED, SEED, BATCH, STEPS = 1397, 0, 160, 700


def tokens(*texts):
    """Texts as numbers ``(B, 10)``: start, words, end, padding."""
    rows = [[START, *(WORDS.index(word) + 2 for word in text.split()), END] for text in texts]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


def _digits():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(digits.target)


def seen():
    """Images ``(1397, 3, 8, 8)`` that it was trained on, and labels."""
    images, labels = _digits()
    return images[:TRAINED], labels[:TRAINED]


def unseen():
    """Images ``(400, 3, 8, 8)`` that it has not seen, and labels."""
    images, labels = _digits()
    return images[TRAINED:], labels[TRAINED:]


def shifted(images, strength=0.6, seed=7):
    """The same images from another domain: pixels mixed by a fixed matrix near the identity, with noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(64) + strength / 8 * torch.randn(64, 64, generator=generator)
    flat = images[:, 0].flatten(1) @ mixing
    flat = flat + 0.2 * torch.randn(flat.shape, generator=generator)
    return flat.reshape(-1, 1, PIXELS, PIXELS).expand(-1, 3, -1, -1).contiguous()


def few_shots(labels, shots, classes, seed):
    """Positions of so many images of each of the classes, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == c][:shots] for c in classes])


def _empty_hugging_face():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "hidden_act": "quick_gelu"}
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    text = {**sizes, **ends, "vocab_size": END + 1, "max_position_embeddings": LENGTH}
    vision = {**sizes, "image_size": PIXELS, "patch_size": PATCH, "num_channels": 3}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=FEATURES))


def _weights():
    return {key: value.float() for key, value in load_file(FILE).items()}


@cache
def _weights_of_open_clip():
    held, found = _weights(), {}
    for tower, theirs in (("vision_model", "visual."), ("text_model", "")):
        for i in range(LAYERS):
            ours, block = f"{tower}.encoder.layers.{i}", f"{theirs}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [held.pop(f"{ours}.self_attn.{part}_proj.{kind}") for part in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                for a, b in _NAMES_OF_BLOCKS.items():
                    found[f"{block}.{b}.{kind}"] = held.pop(f"{ours}.{a}.{kind}")
    for a, b in _NAMES.items():
        value = held.pop(a)
        found[b] = value.T.contiguous() if a.endswith("projection.weight") else value
    assert not held, f"not in open_clip: {sorted(held)}"
    return found


_NAMES_OF_BLOCKS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}


def hugging_face():
    """A new ``transformers.CLIPModel`` with the weights, in training mode (it has no dropout)."""
    model = _empty_hugging_face()
    model.load_state_dict(_weights())
    return model.train()


def open_clip(custom_text=False):
    """A new ``open_clip.CLIP`` with the weights; or a ``CustomTextCLIP``, whose text tower is the layer ``text``."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict

    shape = {"width": WIDTH, "layers": LAYERS, "mlp_ratio": 2.0}
    vision = CLIPVisionCfg(**shape, head_width=WIDTH // HEADS, image_size=PIXELS, patch_size=PATCH)
    text = CLIPTextCfg(**shape, heads=HEADS, context_length=LENGTH, vocab_size=END + 1)
    model = (CustomTextCLIP if custom_text else CLIP)(FEATURES, vision, text, quick_gelu=True)
    weights = _weights_of_open_clip()
    model.load_state_dict(convert_to_custom_text_state_dict(weights) if custom_text else weights)
    return model.train()


# -- training ---------------------------------------------------------------------------------------------------------


def _changed(images, style):
    if style == "inverted":
        return -images
    if style == "mirrored":
        return images.flip(-1)
    return images.roll(1, -1) if style == "shifted" else images


def train(steps=STEPS):
    """Trains it on images in four styles and texts of all templates; the classes of a step are the 40 names."""
    torch.manual_seed(SEED)
    model, (images, labels) = _empty_hugging_face(), seen()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    names = [f"{style} {name}".strip() for style in STYLES for name in DIGITS]
    total = 0.0
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH // len(STYLES),))
        x = torch.cat([_changed(images[rows], style) for style in STYLES])
        x = x + 0.15 * torch.randn_like(x[:, :1])
        y = torch.cat([labels[rows] + i * len(DIGITS) for i in range(len(STYLES))])
        drawn = [TEMPLATES[i] for i in torch.randint(len(TEMPLATES), (len(names),)).tolist()]
        texts = tokens(*(template.format(name) for template, name in zip(drawn, names, strict=True)))
        logits = model(texts, x).logits_per_image
        loss = F.cross_entropy(logits, y, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=3.4)
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}, loss {total / 100:.4f}", flush=True)  # noqa: T201 # a script
            total = 0.0
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, FILE)


if __name__ == "__main__":
    train()
