"""Retrieval of the lower halves of digits by upper half and class, where one of the two may be missing.

"Video" is the upper half of an image, "text" its class (one of ten), "music" the lower half, which is to be found among
those of the 597 test images. 1,200 training images; encoders and fusion with one hidden layer of 64, embeddings of 32,
symmetric InfoNCE with temperature 0.1, Adam 1e-3, batch 128, 700 steps; the text encoder's output is dropped with
probability p, and a learned state stands for it. Recall at 10 by both, by video alone and by text alone. For text alone
nothing was trained: zeros stand for the output of the video encoder.
"""

import sys

import torch
from _shared import Arm, fit
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ModalityDropout
from lightning_reg.functional import retrieval_scores, symmetric_infonce

TRAINED, STEPS, BATCH = 1200, 700, 128
ARMS = {"p = 0": 0.0, "p = 0.5": 0.5, "p = 0.8": 0.8}


def layers(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


class Retrieval(LightningModule):
    def __init__(self):
        super().__init__()
        self.video, self.text, self.music, self.fuse = layers(32, 32), layers(10, 32), layers(32, 32), layers(64, 32)

    def forward(self, video, text):
        return self.fuse(torch.cat([self.video(video), self.text(text)], 1))

    def training_step(self, batch, batch_idx):
        video, text, music = batch
        return symmetric_infonce(self(video, text), self.music(music), 0.1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def data(seed):
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    classes = nn.functional.one_hot(torch.tensor(digits.target)[order], 10).float()
    return pixels[:, :32], classes, pixels[:, 32:]


def recalls(p, seed):
    parts = data(seed)
    seed_everything(seed, verbose=False)
    model, drop = Retrieval(), ModalityDropout(p, layer="text", null_shape=[32], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    train = TensorDataset(*(part[:TRAINED] for part in parts))
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True, generator=generator)
    fit(model, [drop], loader, max_steps=STEPS, max_epochs=-1)
    with torch.no_grad():
        video, text, music = (part[TRAINED:] for part in parts)
        targets, encoded = model.music(music), (model.video(video), model.text(text))
        state = drop.own["text"].state.expand_as(encoded[1])
        queries = {
            "both": encoded,
            "video_alone": (encoded[0], state),
            "text_alone": (torch.zeros_like(encoded[0]), encoded[1]),
        }
        found = {name: model.fuse(torch.cat(inputs, 1)) for name, inputs in queries.items()}
    return {name: retrieval_scores(rows, targets, [10])["recall@10"] for name, rows in found.items()}


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arm.add(**recalls(ARMS[arm.name], seed))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
