"""What smaller target stores cost ELR in accuracy: digits, 40 % of the labels redrawn, the network of the demo.

    python benchmarks/elr_stores.py --seeds 3 --epochs 120 --save benchmarks/results/elr_stores.txt

Ten classes are few: what top-k saves grows with the number of classes, what it loses does not.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lightning_reg import ELRCallback

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from noisy_labels import detection, noisy_digits, one_thread, quiet_lightning, train  # beside, no package

STORES = {
    "float32": {},
    "float16": {"table_dtype": "float16"},
    "bfloat16": {"table_dtype": "bfloat16"},
    "top 1": {"top_k": 1},
    "top 2": {"top_k": 2},
    "top 3": {"top_k": 3},
    "top 3, float16": {"top_k": 3, "table_dtype": "float16"},
}


def run(store, epochs, seed):
    """Final test accuracy, precision and recall of the suspects, bytes of the targets."""
    train_set, test_set, wrong = noisy_digits(0.4, seed)
    elr = ELRCallback(lam=7.0, beta=0.9, **STORES[store])
    model = train(train_set, test_set, [elr], epochs, seed)
    images, labels = test_set.tensors
    with torch.inference_mode():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    found = detection(elr.suspected_label_errors(), wrong)
    return accuracy, found["precision"], found["recall"], elr.targets_nbytes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args(argv)
    title = f"ELR(7, 0.9), {options.epochs} epochs, {options.seeds} seeds, torch {torch.__version__}"
    table = Table("targets", "bytes per sample", "final test accuracy", "precision", "recall", title=title)
    with quiet_lightning(), one_thread():
        for store in STORES:
            runs = [run(store, options.epochs, seed) for seed in range(options.seeds)]
            columns = list(zip(*runs, strict=True))
            spread = [f"{statistics.mean(c):.3f} ± {statistics.pstdev(c):.3f}" for c in columns[:3]]
            table.add_row(store, f"{columns[3][0] / 1201:.0f}", *spread)
    Console().print(table)
    if options.save:
        options.save.parent.mkdir(exist_ok=True)
        with options.save.open("w") as file:
            Console(file=file, width=100).print(table)


if __name__ == "__main__":
    main()
