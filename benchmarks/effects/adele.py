"""ADELE on digits with wrong masks: what the masks, and a network trained on them, are worth.

100 canvases of 24 x 24 with a digit of 8 x 8, bright or dim, which is its class (mask: background and two classes),
noise of 0.2; 60 % of the masks are wrong: dilated by 2 pixels, eroded by 1, or shifted by 2. Small network with batch
norm, Adam 3e-3, batch 10, 20 epochs. Mean IoU of the three classes against true masks: of the masks that are trained on
at the end (those given have the last column's), and of the predictions for 100 further canvases at the end. "As
published" is the default for PASCAL VOC, predictions of a pass at scales 0.75, 1 and 1.5; "with consistency" has
MultiScaleConsistency beside it, as in the paper; "predicted while training" has the setting for organs (SegTHOR).
"""

import sys

import torch
import torch.nn.functional as F
from _digit_masks import Segmenter, canvases, mean_iou
from _shared import Arm, fit
from lightning.pytorch import seed_everything
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ADELE, MultiScaleConsistency

TRAIN, TEST, EPOCHS, NOISY = 100, 100, 20, 0.6
SEGTHOR = {
    "tau": 0.7,
    "correct_every": 10,
    "from_original": False,
    "rule": "both",
    "shrink_guard": False,
    "predict": "train",
    "flat_rise": 0.1,
}
ARMS = {
    "plain": (None, False),
    "consistency alone": (None, True),
    "as published": ({}, False),
    "as published, with consistency": ({}, True),
    "as published, scale 1": ({"scales": [1.0]}, False),
    "predicted while training": (SEGTHOR, False),
    "predicted while training, with consistency": (SEGTHOR, True),
}


def spoiled(y, generator):
    """Masks of which some are dilated, eroded or shifted."""
    y_float = y[:, None].float()
    wide = F.max_pool2d(y_float, 5, 1, 2)[:, 0].long()
    thin = torch.where(F.max_pool2d((y_float == 0).float(), (1, 3), 1, (0, 1))[:, 0] > 0, 0, y)
    shifted = y.roll((2, 2), (1, 2))
    kind = torch.randint(3, (len(y),), generator=generator)
    wrong = torch.stack([wide, thin, shifted])[kind, torch.arange(len(y))]
    return torch.where((torch.rand(len(y), generator=generator) < NOISY)[:, None, None], wrong, y)


def measured(arm, seed):
    arguments, consistent = arm
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    (x, y), (x_test, y_test) = canvases(digits, TRAIN, generator), canvases(digits, TEST, generator)
    given = spoiled(y, generator)
    seed_everything(seed, verbose=False)
    model = Segmenter()
    loader = DataLoader(TensorDataset(x, given), 10, shuffle=True, generator=torch.Generator().manual_seed(seed))
    adele = None if arguments is None else ADELE(**arguments)
    callbacks = [*([] if adele is None else [adele]), *([MultiScaleConsistency()] if consistent else [])]
    fit(model, callbacks, loader, max_epochs=EPOCHS)
    model.eval()
    masks = given if adele is None else torch.stack([adele.corrected_mask(i, mask) for i, mask in enumerate(given)])
    with torch.no_grad():
        result = {
            "IoU_of_masks": mean_iou(masks, y),
            "test_IoU": mean_iou(model(x_test).argmax(1), y_test),
            "IoU_of_given_masks": mean_iou(given, y),
        }
    print(f"seed {seed}: {arguments}, {consistent}: {result} {adele and adele.triggered}", file=sys.stderr, flush=True)
    return result


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            arm.add(**measured(ARMS[arm.name], seed))
    return arms
