"""Precision and recall of found label errors beside cleanlab's, from the same probabilities.

Digits of scikit-learn, 1,797, of which a share has its label redrawn from all ten classes; ELRCallback trains a small
network on all of them, and its ``label_errors()`` and cleanlab's ``find_label_issues`` judge the labels by the same
``pred_probs()``. cleanlab needs ``pip install cleanlab``.

With ``--masks`` the same of pixels: the canvases with wrong masks of ``benchmarks/effects/adele.py``, of which ADELE
replaces pixels, and cleanlab's filter for segmentation judges the masks by ADELE's ``pred_probs()``, which are written
to a file batch by batch.

    python benchmarks/label_errors.py --save benchmarks/results/label_errors_cleanlab.md
    python benchmarks/label_errors.py --masks --save benchmarks/results/mask_errors_cleanlab.md
"""

import argparse
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues
from cleanlab.segmentation.filter import find_label_issues as find_pixel_issues
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ADELE, ELRCallback

sys.path.insert(0, str(Path(__file__).parent / "effects"))
from _digit_masks import Segmenter, canvases
from adele import EPOCHS as EPOCHS_OF_MASKS
from adele import TRAIN, spoiled

FILTERS = ("prune_by_noise_rate", "both", "confident_learning", "predicted_neq_given")
REPLACED, PIXELS = "ADELE.mask_errors", "cleanlab.segmentation"
REDRAWN, SEEDS, EPOCHS = (0.1, 0.4), 3, 30
FITS = {"ADELE()": {}, "ADELE(scales=[1])": {"scales": [1.0]}, "no correction": {"scales": [1.0], "start": 1000}}


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def suspects(redrawn, seed):
    """Which labels are wrong, and which are suspected by whom, bool ``(N,)`` each."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16).float(), torch.tensor(y)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(y), generator=generator) < redrawn
    given = torch.where(drawn, torch.randint(10, y.shape, generator=generator), y)
    torch.manual_seed(seed)
    elr, off = ELRCallback(), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=[elr], enable_model_summary=False, **off)
    trainer.fit(Classifier(), DataLoader(TensorDataset(x, given), 64, shuffle=True))
    probabilities = elr.pred_probs().numpy()
    found = {"ELRCallback.label_errors": elr.suspected_label_errors()}
    for name in FILTERS:
        issues = find_label_issues(given.numpy(), probabilities, filter_by=name, n_jobs=1)
        found[f"cleanlab, {name}"] = torch.from_numpy(issues)
    return given != y, found


def suspected_pixels(arguments, seed):
    """Which pixels of masks are wrong, and which are suspected by whom, bool ``(N, H, W)`` each."""
    generator = torch.Generator().manual_seed(seed)
    x, y = canvases(torch.tensor(load_digits().images / 16, dtype=torch.float32), TRAIN, generator)
    given = spoiled(y, generator)
    torch.manual_seed(seed)
    adele, off = ADELE(**arguments), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS_OF_MASKS, callbacks=[adele], enable_model_summary=False, **off
    )
    trainer.fit(Segmenter(), DataLoader(TensorDataset(x, given), 10, shuffle=True))
    corrected = torch.stack([adele.corrected_mask(index, mask) for index, mask in enumerate(given)])
    with tempfile.TemporaryDirectory() as folder:
        file, shape = Path(folder) / "probabilities.npy", (len(given), 3, *given.shape[1:])
        probabilities = np.lib.format.open_memmap(file, "w+", "float32", shape)
        for indices, found in adele.pred_probs(trainer, DataLoader(TensorDataset(x, given), 10)):
            probabilities[indices.numpy()] = found.numpy()
        issues = find_pixel_issues(given.numpy(), probabilities, n_jobs=1, verbose=False)
        largest, predicted = torch.from_numpy(np.array(probabilities)).max(1)
    found = {} if "start" in arguments else {REPLACED: corrected != given}
    return given != y, found | {
        PIXELS: torch.from_numpy(issues),
        "predicted is not given": predicted != given,
        "predicted by more than 0.8, is not given": (predicted != given) & (largest > 0.8),
    }


def percent(wrong, found):
    """Precision (0 where none is found) and recall."""
    hit, suspected, errors = int((found & wrong).sum()), int(found.sum()), int(wrong.sum())
    return 100 * hit / max(suspected, 1), 100 * hit / errors


def with_interval(values):
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def table(runs_of):
    """Precision and recall of each way to find errors, for each setting's runs."""
    rows, heads = {}, []
    for setting, runs in runs_of.items():
        share = 100 * statistics.mean(float(wrong.float().mean()) for wrong, _ in runs)
        heads += [
            f"{f'{setting}, ' if isinstance(setting, str) else ''}{share:.1f} % wrong: {what}"
            for what in ("precision", "recall")
        ]
        for name in runs[0][1]:
            columns = zip(*(percent(wrong, found[name]) for wrong, found in runs), strict=True)
            rows.setdefault(name, []).extend(map(with_interval, columns))
    lines = [["%", *heads], ["---"] + ["---:"] * len(heads)]
    lines += [[name, *cells, *["-"] * (len(heads) - len(cells))] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


MEAN = f"mean ± half the 95 % interval (Student's t) of {SEEDS} seeds"
OF_LABELS = f"""- 1,797 digits, labels redrawn at random; {EPOCHS} epochs; {MEAN}.
  The probabilities are ELR's targets, averages of predictions of the fit itself, and not of networks that have not seen
  a sample.
"""
OF_MASKS = f"""- Pixels of {TRAIN} canvases, 60 % of the masks dilated, eroded or shifted (as in effects_adele.md).
- {EPOCHS_OF_MASKS} epochs; {MEAN}.
- The probabilities are those of the network that was trained on these masks, as ADELE corrected them; with "no
  correction" those of a plain fit.
"""


def each_seed(runs_of):
    """Precision and recall of each run, and what ADELE has more than cleanlab's filter, seed by seed."""
    lines, differences = [], []
    for setting, runs in runs_of.items():
        pairs = {name: [percent(wrong, found[name]) for wrong, found in runs] for name in runs[0][1]}
        lines += [
            f"- {setting}, {name}: " + "; ".join(f"{precision:.1f}, {recall:.1f}" for precision, recall in of_seeds)
            for name, of_seeds in pairs.items()
        ]
        if REPLACED in pairs:
            more = torch.tensor(pairs[REPLACED]) - torch.tensor(pairs[PIXELS])
            differences.append(f"- {setting}: precision {difference(more[:, 0])}; recall {difference(more[:, 1])}")
    head = f"Difference of {REPLACED} to {PIXELS}, seed by seed:"
    return "\n".join(["", head, "", *differences, "", "Precision and recall of each seed:", "", *lines, ""])


def difference(values):
    half = stats.t.ppf(0.975, len(values) - 1) * float(values.std()) / len(values) ** 0.5
    return f"{float(values.mean()):+.1f} ± {half:.1f}" + ("" if abs(values.mean()) > half else ": no difference shown")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--save", type=Path, help="write the table to this markdown file too")
    parser.add_argument("--masks", action="store_true", help="of masks, not of classes")
    arguments = parser.parse_args()
    if arguments.masks:
        runs = {name: [suspected_pixels(settings, seed) for seed in range(SEEDS)] for name, settings in FITS.items()}
        what, notes, command = "Found errors of masks", OF_MASKS, "--masks --save benchmarks/results/mask_errors"
        end = each_seed(runs)
    else:
        runs = {redrawn: [suspects(redrawn, seed) for seed in range(SEEDS)] for redrawn in REDRAWN}
        what, notes, command, end = "Found label errors", OF_LABELS, "--save benchmarks/results/label_errors", ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("cleanlab", "lightning", "torch"))
    text = f"""# {what} beside cleanlab's, from the same probabilities

{table(runs)}

- `python benchmarks/label_errors.py {command}_cleanlab.md`
{notes}- {packages}; CPU
{end}"""
    print(text)
    if arguments.save is not None:
        arguments.save.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
