"""What each technique does to a small training run: a table with mean, 95 % interval and the value of each seed.

One file per technique lies beside this one, named by the technique's key. Its docstring says what is trained on what,
and ``run(seeds)`` returns the arms, the one to compare with first. The table goes to
``benchmarks/results/effects_<key>.md``.

    python benchmarks/effects cutmix --seeds 3 --data PATH
    python benchmarks/effects --list
"""

import argparse
import ast
import importlib
import inspect
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _shared import Arm, set_data, versions
from scipy import stats

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"


def experiments() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t; nan for one value)."""
    n = len(values)
    if n == 1:
        return values[0], float("nan")
    return statistics.mean(values), float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5


def cell(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if half != half else f"{mean:.3f} ± {half:.3f}"


def verdict(first: Sequence[float], other: Sequence[float]) -> str:
    """The difference seed by seed (arms of one seed share data and initial weights), and whether it is one."""
    mean, half = interval([b - a for a, b in zip(first, other, strict=True)])
    if half != half:
        return f"{mean:+.3f} (one seed)"
    shown = "" if abs(mean) > half else ": no effect shown"
    return f"{mean:+.3f} ± {half:.3f}{shown}"


def markdown(key: str, text: str, arms: Sequence[Arm], facts: Sequence[str]) -> str:
    metrics = list(arms[0].values)
    lines = [
        f"# {key}: effect",
        "",
        text,
        "",
        f"| arm | {' | '.join(metrics)} |",
        "|---" + "|---:" * len(metrics) + "|",
    ]
    lines += [f"| {arm.name} | {' | '.join(cell(arm.values[m]) for m in metrics)} |" for arm in arms]
    lines += ["", f"Difference to {arms[0].name!r}, seed by seed:", ""]
    lines += [f"| arm | {' | '.join(metrics)} |", "|---" + "|---:" * len(metrics) + "|"]
    lines += [
        f"| {arm.name} | {' | '.join(verdict(arms[0].values[m], arm.values[m]) for m in metrics)} |" for arm in arms[1:]
    ]
    lines += ["", "Each seed:", ""]
    lines += [
        f"- {arm.name}: " + "; ".join(f"{m} {', '.join(f'{v:.3f}' for v in arm.values[m])}" for m in metrics)
        for arm in arms
    ]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("key", nargs="?", choices=experiments(), help="which experiment")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--data", type=Path, help="folder with the data sets that some experiments read")
    parser.add_argument("--dry", action="store_true", help="print the table only, do not write it")
    args = parser.parse_args(argv)
    if args.list or args.key is None:
        for key in experiments():
            text = ast.get_docstring(ast.parse((HERE / f"{key}.py").read_text())) or ""  # some need packages of extras
            print(f"{key:24} {text.partition(chr(10))[0]}")
        return
    set_data(args.data)
    module = importlib.import_module(args.key)
    started, load = time.perf_counter(), os.getloadavg()[0]
    arms = module.run(list(range(args.seeds)))
    seconds = time.perf_counter() - started
    facts = [
        f"`python benchmarks/effects {args.key} --seeds {args.seeds}{' --data PATH' if args.data else ''}`",
        f"Mean ± half the 95 % interval (Student's t) of {args.seeds} seeds; arms of one seed share data and initial"
        " weights.",
        f"{versions()}, Python {platform.python_version()}; CPU, {torch.get_num_threads()} threads; {seconds:.0f} s in"
        f" all, load at the start {load:.1f}",
    ]
    text = markdown(args.key, inspect.getdoc(module) or "", arms, facts)
    print(text)
    if not args.dry:
        (RESULTS / f"effects_{args.key}.md").write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
