"""Scenes of two digits segmented by names: which prototypes, and whether the background has its own?

A UNet2DConditionModel of 1.0 million parameters on 8 x 8 digits with prompts (``tests/diffusion/digits.py``). For each
of the ten digits and each seed 8 samples are drawn under guidance 2; 20 scenes of 16 x 16 hold two held-out digits in
two of four corners. Features are outputs of all blocks at t = 100 with an empty prompt; the classes that are in a scene
are known. Mean intersection over union of 11 classes, x 100. Masks are those of the drawn pixels (above 0 the digit,
below -0.4 the background), or of the attention to the digit's word. Without prototypes of the background nothing but a
threshold of 0 on the cosine is left.

Attention is known for 4 x 4 places. "Pixels at 4 x 4" are the drawn masks, brought to as many places and back, with the
thresholds of attention: what maps of that size can reach. "First layer" takes the maps of one of four layers with
attention to the prompt (the one that met the drawn digits best in samples of another seed, 100). "And regions" is the
method's own recipe: attention chooses among regions that were proposed without classes, here the two that the values of
each image's pixels fall into, in the place of CutLER's; "not eroded" leaves the background as large as it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _shared import Arm
from torch import Tensor
from torchmetrics import JaccardIndex

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_reg import Denoiser, DenoiserFeatures, PrototypeSegmenter
from lightning_reg.diffusion.ovdiff.core import Masks
from lightning_reg.functional import attention_masks, sample_support
from tests.diffusion.digits import held_out, prompt, scheduler, word_model, words

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
ALL = ["class", "instance", "part"]
FIRST = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
KINDS = {
    "class, instance, part": (ALL, BLOCKS, 0.85, "pixels"),
    "class alone": (["class"], BLOCKS, 0.85, "pixels"),
    "no background prototypes": (ALL, BLOCKS, -1.0, "pixels"),
    "middle block alone": (ALL, ["mid_block"], 0.85, "pixels"),
    "masks of attention": (ALL, BLOCKS, 0.85, "attention"),
    "masks of attention, first layer": (ALL, BLOCKS, 0.85, "first layer"),
    "masks of attention, no filter": (ALL, BLOCKS, 1.0, "attention"),
    "masks of attention and regions": (ALL, BLOCKS, 0.85, "regions"),
    "masks of attention and regions, not eroded": (ALL, BLOCKS, 0.85, "not eroded"),
    "masks of pixels at 4 x 4": (ALL, BLOCKS, 0.85, "4 x 4"),
}


@torch.no_grad()
def text(*prompts: str) -> Tensor:
    states: Tensor = word_model()[1](words(*prompts)).last_hidden_state
    return states


def scenes(generator: torch.Generator, count: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels of their pixels, and which classes they have."""
    images, labels = held_out()
    canvas, truth = torch.full((count, 1, 16, 16), -1.0), torch.zeros(count, 16, 16, dtype=torch.long)
    present = torch.zeros(count, 10, dtype=torch.bool)
    for scene in range(count):
        corners = torch.randperm(4, generator=generator)[:2].tolist()
        for corner, row in zip(corners, torch.randint(len(images), (2,), generator=generator).tolist(), strict=True):
            rows, columns = (slice(8 * place, 8 * place + 8) for place in divmod(corner, 2))
            canvas[scene, 0, rows, columns] = images[row, 0]
            truth[scene, rows, columns] = torch.where(images[row, 0] > 0, labels[row] + 1, 0)
            present[scene, labels[row]] = True
    return canvas, truth, present


def regions(images: Tensor) -> Tensor:
    """The two groups that the values of each image's pixels fall into (K-means), ``(N, 2, H, W)``."""
    values = images[:, 0]
    middle = values.mean((1, 2), keepdim=True)
    for _ in range(20):
        is_up = values > middle
        sides = [(values * one).sum((1, 2)) / one.sum((1, 2)).clamp(min=1) for one in (is_up, ~is_up)]
        middle = ((sides[0] + sides[1]) / 2)[:, None, None]
    return torch.stack([values > middle, values <= middle], 1)


def masks_of(images: Tensor, maps: Tensor, first: Tensor) -> dict[str, Masks]:
    """Foreground and background of samples, by what they are made of."""
    drawn = Masks(images[:, 0] > 0, images[:, 0] < -0.4)
    coarse = F.interpolate(F.avg_pool2d(drawn.foreground[:, None].float(), 2), (8, 8), mode="bilinear")[:, 0]
    return {
        "pixels": drawn,
        "attention": attention_masks(maps),
        "first layer": attention_masks(first),
        "regions": attention_masks(maps, proposals=regions(images)),
        "not eroded": attention_masks(maps, proposals=regions(images), erosion=0),
        "4 x 4": attention_masks(coarse),
    }


def run(seeds: Sequence[int]) -> list[Arm]:
    denoiser = Denoiser(word_model()[0], scheduler("v_prediction"))
    is_digit = torch.tensor([[False] * 4 + [True] + [False] * 3])
    arms = {name: Arm(name) for name in KINDS}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        images, truth, present = scenes(generator)
        noise = torch.randn(10, 8, 1, 8, 8, generator=generator)
        support, masks = {}, {}
        for digit in range(10):
            fixed = (noise[digit], text(prompt(digit)), text(""), is_digit, 2.0, 8)
            drawn, first = (sample_support(denoiser, *fixed, layers) for layers in (None, FIRST))
            support[str(digit)], masks[str(digit)] = drawn.images, masks_of(*drawn, first.maps)
        for name, (which, layers, limit, kind) in KINDS.items():
            extract = DenoiserFeatures(denoiser, layers, 100, text(""))
            segmenter = PrototypeSegmenter([extract], which, parts=8, background_filter=limit)
            front, back = ({name: one[kind][side] for name, one in masks.items()} for side in (0, 1))
            segmenter.fit(support, front, back)
            with torch.no_grad():
                scores = segmenter(images, present)
            if limit == -1:
                scores[:, 0] = 0.0
            index = JaccardIndex("multiclass", num_classes=11)
            index.update(scores.argmax(1), truth)
            overlap = [
                float((one[kind].foreground & one["pixels"].foreground).sum())
                / float((one[kind].foreground | one["pixels"].foreground).sum())
                for one in masks.values()
            ]
            arms[name].add(mIoU=100 * float(index.compute()), masks_overlap=100 * sum(overlap) / len(overlap))
    return list(arms.values())
