"""Scenes of two digits segmented by names: which prototypes, and whether the background has its own?

A UNet2DConditionModel of 1.0 million parameters on 8 x 8 digits with prompts (``tests/diffusion/digits.py``). For each
of the ten digits and each seed 8 samples are drawn under guidance 2; 20 scenes of 16 x 16 hold two held-out digits in
two of four corners. Features are outputs of all blocks at t = 100 with an empty prompt; the classes that are in a scene
are known. Mean intersection over union of 11 classes, x 100. Masks are those of the drawn pixels (above 0 the digit,
below -0.4 the background), or of the attention to the digit's word alone. Without prototypes of the background nothing
but a threshold of 0 on the cosine is left.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _shared import Arm
from torch import Tensor
from torchmetrics import JaccardIndex

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_reg import Denoiser, DenoiserFeatures, PrototypeSegmenter
from lightning_reg.functional import attention_masks, sample_support
from tests.diffusion.digits import held_out, prompt, scheduler, word_model, words

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
ALL = ["class", "instance", "part"]


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


def run(seeds: Sequence[int]) -> list[Arm]:
    denoiser = Denoiser(word_model()[0], scheduler("v_prediction"))
    is_digit = torch.tensor([[False] * 4 + [True] + [False] * 3])
    kinds = {
        "class, instance, part": (ALL, BLOCKS, 0.85, "pixels"),
        "class alone": (["class"], BLOCKS, 0.85, "pixels"),
        "no background prototypes": (ALL, BLOCKS, -1.0, "pixels"),
        "middle block alone": (ALL, ["mid_block"], 0.85, "pixels"),
        "masks of attention": (ALL, BLOCKS, 0.85, "attention"),
    }
    arms = {name: Arm(name) for name in kinds}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        images, truth, present = scenes(generator)
        noise = torch.randn(10, 8, 1, 8, 8, generator=generator)
        drawn = {
            str(digit): sample_support(denoiser, noise[digit], text(prompt(digit)), text(""), is_digit, 2.0, 8)
            for digit in range(10)
        }
        support = {name: one.images for name, one in drawn.items()}
        by_attention = {name: attention_masks(one.maps) for name, one in drawn.items()}
        front = {"pixels": {name: one[:, 0] > 0 for name, one in support.items()}}
        back = {"pixels": {name: one[:, 0] < -0.4 for name, one in support.items()}}
        front["attention"] = {name: one.foreground for name, one in by_attention.items()}
        back["attention"] = {name: one.background for name, one in by_attention.items()}
        overlap = [
            float((front["attention"][name] & front["pixels"][name]).sum())
            / float((front["attention"][name] | front["pixels"][name]).sum())
            for name in support
        ]
        for name, (which, layers, limit, masks) in kinds.items():
            extract = DenoiserFeatures(denoiser, layers, 100, text(""))
            segmenter = PrototypeSegmenter([extract], which, parts=8, background_filter=limit)
            segmenter.fit(support, front[masks], back[masks])
            with torch.no_grad():
                scores = segmenter(images, present)
            if limit == -1:
                scores[:, 0] = 0.0
            index = JaccardIndex("multiclass", num_classes=11)
            index.update(scores.argmax(1), truth)
            quality = 100.0 if masks == "pixels" else 100 * sum(overlap) / len(overlap)
            arms[name].add(mIoU=100 * float(index.compute()), masks_overlap=quality)
    return list(arms.values())
