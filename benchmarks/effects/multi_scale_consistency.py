"""Digits on canvases with dilated masks: what a network predicts with and without consistency over scales.

100 canvases of 24 x 24 with a digit of 8 x 8, bright or dim, which is its class (mask: background and two classes),
noise of 0.2; 40 % of the masks are dilated by 2 pixels. Small network with batch norm, Adam 3e-3, batch 10, 15 epochs.
Mean IoU of the three classes at the end: on 100 further canvases against their true masks, and of the predictions for
the training canvases as labels, against the true masks too (those given have the last column's). Disagreement: mean
divergence of the predictions at scales 0.7, 1 and 1.5 on the test canvases, times 100.
"""

import sys

import torch
import torch.nn.functional as F
from _digit_masks import SIDE, Segmenter, canvases, mean_iou
from _shared import Arm, fit
from lightning.pytorch import seed_everything
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import MultiScaleConsistency
from lightning_reg.functional import multiscale_consistency, resized, scaled_size

TRAIN, TEST, EPOCHS, NOISY = 100, 100, 15, 0.4
ARMS = {
    "plain": None,
    "three scales, lam 0": {"lam": 0.0},
    "three scales, lam 1": {"lam": 1.0},
    "lam 1, other scales without labels": {"lam": 1.0, "supervised": 0.0},
}


def dilated(y, generator):
    wide = F.max_pool2d(y[:, None].float(), 5, 1, 2)[:, 0].long()
    return torch.where((torch.rand(len(y), generator=generator) < NOISY)[:, None, None], wide, y)


def measured(arguments, seed):
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    (x, y), (x_test, y_test) = canvases(digits, TRAIN, generator), canvases(digits, TEST, generator)
    given = dilated(y, generator)
    seed_everything(seed, verbose=False)
    model = Segmenter()
    loader = DataLoader(TensorDataset(x, given), 10, shuffle=True, generator=torch.Generator().manual_seed(seed))
    fit(model, [] if arguments is None else [MultiScaleConsistency(**arguments)], loader, max_epochs=EPOCHS)
    model.eval()
    with torch.no_grad():
        scores = model(x_test)
        others = [
            resized(model(resized(x_test, scaled_size((SIDE, SIDE), scale))), (SIDE, SIDE)) for scale in (0.7, 1.5)
        ]
        return {
            "test_IoU": mean_iou(scores.argmax(1), y_test),
            "IoU_of_predicted_labels": mean_iou(model(x).argmax(1), y),
            "disagreement": 100 * multiscale_consistency([scores, *others], rho=0.0).mean().item(),
            "IoU_of_given_labels": mean_iou(given, y),
        }


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arm.add(**measured(ARMS[arm.name], seed))
            print(f"seed {seed}, {arm.name}", file=sys.stderr, flush=True)
    return arms
