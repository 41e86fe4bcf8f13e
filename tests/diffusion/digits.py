"""Four small diffusion models of diffusers on 8 x 8 digits, trained once and kept in half precision beside this file.

    python -m tests.diffusion.digits classes    # UNet2DModel, a label each; epsilon prediction
    python -m tests.diffusion.digits words      # UNet2DConditionModel and CLIPTextModel, prompts; v prediction
    python -m tests.diffusion.digits styles     # as words, with five styles of which each has a word
    python -m tests.diffusion.digits flow       # SD3Transformer2DModel, the prompts of the same CLIPTextModel; flow

Each takes 2 to 3 minutes on one quiet core. The last 200 digits are held out.
"""

import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

__all__ = [
    "CLASSES",
    "NULL",
    "class_model",
    "flow_condition",
    "flow_model",
    "flow_scheduler",
    "held_out",
    "prompt",
    "scheduler",
    "style_model",
    "styled_words",
    "training_digits",
    "word_model",
    "words",
]

HERE = Path(__file__).resolve().parent
CLASSES, NULL, LENGTH = 10, 10, 8
VOCABULARY = ["<end>", "<start>", "a", "photo", "of", "digit", "inverted", *(f"d{n}" for n in range(CLASSES))]
STYLES = ["plain", "inverted", "mirrored", "upside", "dim"]
STYLED_VOCABULARY = [*VOCABULARY[:6], *STYLES, *VOCABULARY[7:]]
SEED, BATCH, STEPS = 0, 128, 900


def _digits():
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)


def training_digits():
    """Images ``(1597, 1, 8, 8)`` in [-1, 1] and labels."""
    x, y = _digits()
    return x[:-200], y[:-200]


def held_out():
    """200 images and labels that no model has seen."""
    x, y = _digits()
    return x[-200:], y[-200:]


def scheduler(prediction_type="epsilon", kind="DDIMScheduler", **options):
    """One of diffusers' schedulers with the cosine schedule of the models."""
    import diffusers

    fixed = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    fixed |= {"clip_sample": False} if kind in ("DDIMScheduler", "DDPMScheduler") else {}
    return getattr(diffusers, kind)(**fixed | options)


def new_class_model():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=CLASSES + 1,  # the last one is no label
    )


def new_word_model(vocabulary=VOCABULARY):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), max_position_embeddings=LENGTH, projection_dim=64, **sizes, **ends
    )
    return network, CLIPTextModel(config)


def words(*texts, vocabulary=VOCABULARY):
    """Prompts as numbers ``(B, 8)``: start, words, end; the padding is the end again, as in CLIP."""
    rows = [[1, *(vocabulary.index(word) for word in text.split())] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def styled_words(*texts):
    """Prompts for the model of styles, such as ``"a photo of d3 plain"``."""
    return words(*texts, vocabulary=STYLED_VOCABULARY)


def prompt(digit, inverted=False):
    """``"a photo of d3 inverted"``; ``None``: any digit."""
    name = "digit" if digit is None else f"d{digit}"
    return f"a photo of {name}" + (" inverted" if inverted else "")


def _loaded(module, name):
    weights = {key: value.float() for key, value in load_file(HERE / f"{name}.safetensors").items()}
    # Before transformers 5 all of a CLIPTextModel lay in one module of it.
    older = {key.replace(".text_model", "", 1): key for key in module.state_dict()}
    module.load_state_dict({older.get(key, key): value for key, value in weights.items()})
    return module.eval()


@cache
def class_model():
    """The UNet2DModel; label 10 is no label."""
    return _loaded(new_class_model(), "digits_classes")


@cache
def word_model():
    """The UNet2DConditionModel and its CLIPTextModel."""
    both = _loaded(nn.ModuleList(new_word_model()), "digits_words")
    return both[0], both[1]


@cache
def style_model():
    """A UNet2DConditionModel and its CLIPTextModel, for prompts that end in one of five styles."""
    both = _loaded(nn.ModuleList(new_word_model(STYLED_VOCABULARY)), "digits_styles")
    return both[0], both[1]


def new_flow_model():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=4,
    )


def flow_scheduler(**options):
    """The flow-matching scheduler of the transformer."""
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def flow_condition(*texts):
    """The prompts as the transformer takes them: states of the words, and the pooled vector."""
    with torch.no_grad():
        made = word_model()[1](words(*texts))
    return {"encoder_hidden_states": made.last_hidden_state, "pooled_projections": made.pooler_output}


@cache
def flow_model():
    """The SD3Transformer2DModel."""
    return _loaded(new_flow_model(), "digits_flow")


# -- training ---------------------------------------------------------------------------------------------------------


def _train(module, loss, name, steps):
    generator = torch.Generator().manual_seed(SEED)
    images, labels = training_digits()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    average = {key: value.clone().double() for key, value in module.state_dict().items() if value.is_floating_point()}
    total = 0.0
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        value = loss(images[rows], labels[rows], generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            state = module.state_dict()
            for key, mean in average.items():
                mean.lerp_(state[key].double(), 0.01 if step > 100 else 0.5)
        total += value.item()
        if (step + 1) % 100 == 0:
            print(f"{name}: step {step + 1}, loss {total / 100:.4f}", flush=True)  # noqa: T201 # a script as well
            total = 0.0
    kept = {key: average.get(key, value).half().contiguous() for key, value in module.state_dict().items()}
    save_file(kept, HERE / f"{name}.safetensors")


def _noised(levels, images, generator):
    times = torch.randint(1000, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    abar = levels[times][:, None, None, None]
    return times, noise, abar.sqrt() * images + (1 - abar).sqrt() * noise, abar


def train_classes(steps=STEPS):
    torch.manual_seed(SEED)
    model, levels = new_class_model(), scheduler().alphas_cumprod

    def loss(images, labels, generator):
        times, noise, noisy, _ = _noised(levels, images, generator)
        dropped = torch.rand(len(labels), generator=generator) < 0.1
        return F.mse_loss(model(noisy, times, class_labels=labels.masked_fill(dropped, NULL)).sample, noise)

    _train(model, loss, "digits_classes", steps)


def train_words(steps=STEPS):
    torch.manual_seed(SEED)
    both, levels = nn.ModuleList(new_word_model()), scheduler().alphas_cumprod

    def loss(images, labels, generator):
        inverted, generic, dropped = torch.rand(3, len(labels), generator=generator)
        texts = [
            "" if d < 0.1 else prompt(None if g < 0.2 else n, i < 0.5)
            for n, i, g, d in zip(labels.tolist(), inverted.tolist(), generic.tolist(), dropped.tolist(), strict=True)
        ]
        images = torch.where((inverted < 0.5)[:, None, None, None], -images, images)
        times, noise, noisy, abar = _noised(levels, images, generator)
        states = both[1](words(*texts)).last_hidden_state
        predicted = both[0](noisy, times, encoder_hidden_states=states).sample
        return F.mse_loss(predicted, abar.sqrt() * noise - (1 - abar).sqrt() * images)

    _train(both, loss, "digits_words", steps)


def styled(images, styles):
    """Images in the styles of these numbers."""
    changes = [images, -images, images.flip(3), images.flip(2), (images + 1) * 0.4 - 1]
    return torch.stack(changes)[styles, torch.arange(len(images))]


def train_styles(steps=1200):
    torch.manual_seed(SEED)
    both, levels = nn.ModuleList(new_word_model(STYLED_VOCABULARY)), scheduler().alphas_cumprod

    def loss(images, labels, generator):
        style, generic, dropped = torch.rand(3, len(labels), generator=generator)
        styles = (style * len(STYLES)).long()
        texts = [
            "" if d < 0.1 else f"{prompt(None if g < 0.2 else n)} {STYLES[s]}"
            for n, s, g, d in zip(labels.tolist(), styles.tolist(), generic.tolist(), dropped.tolist(), strict=True)
        ]
        images = styled(images, styles)
        times, noise, noisy, abar = _noised(levels, images, generator)
        states = both[1](styled_words(*texts)).last_hidden_state
        predicted = both[0](noisy, times, encoder_hidden_states=states).sample
        return F.mse_loss(predicted, abar.sqrt() * noise - (1 - abar).sqrt() * images)

    _train(both, loss, "digits_styles", steps)


def train_flow(steps=2 * STEPS):
    torch.manual_seed(SEED)
    model = new_flow_model()
    texts = ["", *(prompt(n, i) for n in (None, *range(CLASSES)) for i in (False, True))]
    known = flow_condition(*texts)

    def loss(images, labels, generator):
        inverted, generic, dropped = torch.rand(3, len(labels), generator=generator)
        digit = torch.where(generic < 0.2, -1, labels) + 1
        rows = torch.where(dropped < 0.1, 0, 1 + 2 * digit + (inverted < 0.5))
        images = torch.where((inverted < 0.5)[:, None, None, None], -images, images)
        sigma = torch.rand(len(images), generator=generator)
        noise, s = torch.randn(images.shape, generator=generator), sigma[:, None, None, None]
        noisy, condition = (1 - s) * images + s * noise, {name: value[rows] for name, value in known.items()}
        return F.mse_loss(model(noisy, timestep=1000 * sigma, **condition).sample, noise - images)

    _train(model, loss, "digits_flow", steps)


if __name__ == "__main__":
    trainers = {"classes": train_classes, "words": train_words, "styles": train_styles, "flow": train_flow}
    trainers[sys.argv[1]](*map(int, sys.argv[2:]))
