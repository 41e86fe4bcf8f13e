"""A text drowned in near-duplicate boilerplate, windows of it, and the tokens that a run needs to another's loss."""

import ast
import itertools
import math
import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import Callback


def boilerplate(generator, size):
    """Licence and docstrings of the running Python, over and over, one byte in two hundred changed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    pieces = [(library / "LICENSE.txt").read_text()] if (library / "LICENSE.txt").exists() else []
    pieces += [str(license)]
    for name in ("argparse", "collections/__init__", "dataclasses", "pathlib", "subprocess", "threading", "typing"):
        tree = ast.parse((library / f"{name}.py").read_text())
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.Module))
        pieces += [docstring for n in nodes if (docstring := ast.get_docstring(n))]
    once = torch.frombuffer(bytearray("\n\n".join(pieces).encode()), dtype=torch.uint8)
    text = once.repeat(math.ceil(size / len(once)))[:size]
    changed = torch.rand(size, generator=generator) < 0.005
    return torch.where(changed, torch.randint(32, 127, (size,), generator=generator).to(torch.uint8), text)


def window_places(text, redundant, seed, count, length, thin):
    """Training text, places in it (of the text alone, or four in five from boilerplate), places in the last tenth."""
    generator = torch.Generator().manual_seed(seed)
    cut = len(text) * 9 // 10
    starts = torch.randint(cut - length - 1, (count,), generator=generator)
    held_out = torch.arange(cut, len(text) - length - 1, length)[::thin]
    if not redundant:
        return text, starts, held_out
    more = boilerplate(generator, 1_000_000)
    elsewhere = len(text) + torch.randint(len(more) - length - 1, (count,), generator=generator)
    starts = torch.where(torch.rand(count, generator=generator) < 0.8, elsewhere, starts)
    return torch.cat([text, more]), starts, held_out


class Validation(Callback):
    """Validation losses by step."""

    def __init__(self):
        self.curve = []

    def on_validation_end(self, trainer, pl_module):
        self.curve.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


def share_of_tokens(curve, target):
    """Share of the run after which a curve is at ``target``, between two validations by a straight line."""
    for (step, loss), (next_step, next_loss) in itertools.pairwise(curve):
        if next_loss <= target:
            return (step + (loss - target) / (loss - next_loss) * (next_step - step)) / curve[-1][0]
    return math.inf
