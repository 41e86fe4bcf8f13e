"""Precision and recall of found label errors beside cleanlab's, from the same probabilities.

Digits of scikit-learn, 1,797, of which a share has its label redrawn from all ten classes; ELRCallback trains a small
network on all of them, and its ``label_errors()`` and cleanlab's ``find_label_issues`` judge the labels by the same
``pred_probs()``. cleanlab needs ``pip install cleanlab``.

    python benchmarks/label_errors.py --save benchmarks/results/label_errors_cleanlab.md
"""

import argparse
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from cleanlab.filter import find_label_issues
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ELRCallback

FILTERS = ("prune_by_noise_rate", "both", "confident_learning", "predicted_neq_given")
REDRAWN, SEEDS, EPOCHS = (0.1, 0.4), 3, 30


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


def with_interval(values):
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--save", type=Path, help="write the table to this markdown file too")
    save = parser.parse_args().save
    rows, shares = {}, []
    for redrawn in REDRAWN:
        runs = [suspects(redrawn, seed) for seed in range(SEEDS)]
        shares.append(100 * statistics.mean(float(wrong.float().mean()) for wrong, _ in runs))
        for name in runs[0][1]:
            hits = [
                (int((found[name] & wrong).sum()), int(found[name].sum()), int(wrong.sum())) for wrong, found in runs
            ]
            precision = with_interval([100 * hit / max(suspected, 1) for hit, suspected, _ in hits])
            rows.setdefault(name, []).extend([precision, with_interval([100 * hit / wrong for hit, _, wrong in hits])])
    heads = [f"{share:.1f} % wrong: {what}" for share in shares for what in ("precision", "recall")]
    lines = [["%", *heads], ["---"] + ["---:"] * len(heads), *([name, *cells] for name, cells in rows.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    packages = ", ".join(f"{name} {version(name)}" for name in ("cleanlab", "lightning", "torch"))
    text = f"""# Found label errors beside cleanlab's, from the same probabilities

{table}

- `python benchmarks/label_errors.py --save benchmarks/results/label_errors_cleanlab.md`
- 1,797 digits, labels redrawn at random; {EPOCHS} epochs; mean ± half the 95 % interval (Student's t) of {SEEDS} seeds.
  The probabilities are ELR's targets, averages of predictions of the fit itself, and not of networks that have not seen
  a sample.
- {packages}; CPU
"""
    print(text)
    if save is not None:
        save.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
