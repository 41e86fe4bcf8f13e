"""``lightning-reg soup``: averages and mixes of checkpoints from the command line."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_reg.averaging._across_runs import make_soup, save_soup
from lightning_reg.averaging._checkpoint_files import UntrustedFileError, open_checkpoint
from lightning_reg.averaging._evaluation import TrainerEvaluation
from lightning_reg.averaging._greedy import Candidate, SoupResult
from lightning_reg.averaging._learned import LearnedSoup
from lightning_reg.averaging._merging import dare_merge, slerp_merge, ties_merge, wise_ft
from lightning_reg.averaging._state_dicts import aligned

__all__ = ["add_command"]

Commands = Any  # argparse names the type of its subparsers with a leading underscore
Evaluate = Callable[[dict[str, Any]], float]

_METHODS = {
    "uniform": "mean of all checkpoints, read in pieces",
    "greedy": "checkpoints join while the held-out score improves",
    "learned": "mixing weights learned on held-out data",
    "wise-ft": "interpolation from the first checkpoint (before fine-tuning) to the second",
    "ties": "task vectors on the first checkpoint, trimmed, signs elected",
    "dare": "task vectors on the first checkpoint, entries dropped at random",
    "slerp": "position on the arc from the first checkpoint to the second",
}


def add_command(commands: Commands) -> None:
    """Adds ``soup`` to the command line.

    Args:
        commands: Subparsers of ``lightning-reg``.

    """
    soup = commands.add_parser("soup", help="average or mix checkpoints of several runs from one start")
    methods = soup.add_subparsers(dest="method", required=True)
    parsers = {name: methods.add_parser(name, help=text, description=text) for name, text in _METHODS.items()}
    for parser in parsers.values():
        _add_common(parser)
        parser.set_defaults(run=_run, parser=parser)
    parsers["uniform"].add_argument("--weights", type=float, nargs="+", help="a number per checkpoint")
    for name in ("uniform", "greedy"):
        parsers[name].add_argument("--start", type=Path, help="the file that all runs started from, to check that")
    greedy, learned = parsers["greedy"], parsers["learned"]
    greedy.add_argument("--min-delta", type=float, default=0.0, help="least improvement of the score")
    greedy.add_argument("--at-least-as-good", action="store_true", help="accept an equal score too")
    greedy.add_argument("--max-ingredients", type=int)
    learned.add_argument("--learn-on", required=True, help="module:function that returns (module, batches)")
    learned.add_argument("--per", choices=("tensor", "model"), default="tensor")
    learned.add_argument("--lr", type=float, default=0.05)
    learned.add_argument("--epochs", type=int, default=5)
    parsers["wise-ft"].add_argument("--alpha", type=float, default=0.5, help="0 is the first, 1 the second")
    parsers["slerp"].add_argument("--t", type=float, default=0.5, help="0 is the first, 1 the second")
    for name in ("ties", "dare"):
        parsers[name].add_argument("--density", type=float, default=0.2 if name == "ties" else 0.5)
        parsers[name].add_argument("--weights", type=float, nargs="+", help="a number per model after the first")
        parsers[name].add_argument("--lam", type=float, default=1.0, help="factor of the merged task vector")
    parsers["dare"].add_argument("--rescale", choices=("density", "norm"), default="density")
    parsers["dare"].add_argument("--elect-signs", action="store_true")
    parsers["dare"].add_argument("--seed", type=int, default=0)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CKPT")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors, or .ckpt in Lightning's form")
    parser.add_argument("--force", action="store_true", help="replace the file --out if it exists")
    parser.add_argument("--key", help="entry with the weights, in files that hold several things")
    parser.add_argument("--evaluate", help="module:function from a state dict to its held-out score")
    parser.add_argument(
        "--config", type=Path, help="LightningCLI config (class_path of model and data) whose validation scores"
    )
    parser.add_argument("--monitor", help="metric that the validation of --config logs")
    parser.add_argument("--mode", choices=("max", "min"), default="max")


def _run(options: argparse.Namespace) -> None:
    parser: argparse.ArgumentParser = options.parser
    try:
        if options.out.exists() and not options.force:
            raise ValueError(f"{options.out} exists; give --force to replace it.")
        evaluate = _evaluation(options)
        if options.method == "greedy" and evaluate is None:
            raise ValueError("a greedy soup needs a held-out score: --evaluate, or --config with --monitor.")
        result = _soup(options, evaluate)
    except (ValueError, OSError, UntrustedFileError) as error:
        parser.error(str(error))
    Console().print(_table(options.method, result))
    Console().print(f"[bold]{escape(str(options.out))}[/]: {options.method} soup of {len(result.ingredients)}")


def _soup(options: argparse.Namespace, evaluate: Evaluate | None) -> SoupResult:
    if options.method in ("uniform", "greedy"):
        choices: dict[str, Any] = {"weights": options.weights} if options.method == "uniform" else {}
        if options.method == "greedy":
            choices = {"min_delta": options.min_delta, "strict": not options.at_least_as_good}
            choices["max_ingredients"] = options.max_ingredients
        return make_soup(
            options.checkpoints,
            options.method,
            evaluate,
            out=options.out,
            start=options.start,
            key=options.key,
            mode=options.mode,
            progress=True,
            **choices,
        )
    files = [open_checkpoint(path, options.key) for path in options.checkpoints]
    own = [None if evaluate is None else float(evaluate(aligned([file])[0].load())) for file in files]
    trace = [Candidate(str(p), score, None, True) for p, score in zip(options.checkpoints, own, strict=True)]
    mixed = _mix(options, files)
    result = SoupResult(mixed, [str(p) for p in options.checkpoints], trace)
    result.score = None if evaluate is None else float(evaluate(mixed))
    save_soup(options.out, result, options.method, files[0].extra)
    return result


def _mix(options: argparse.Namespace, files: list[Any]) -> dict[str, Any]:
    if options.method == "learned":
        module, batches = _function(options.learn_on)()
        soup = LearnedSoup(module, files, options.per)
        soup.fit(batches, lr=options.lr, epochs=options.epochs)
        return soup.soup()
    if len(files) < 2 or (options.method in ("wise-ft", "slerp") and len(files) != 2):
        raise ValueError(f"{options.method} takes two checkpoints (ties and dare: two or more), got {len(files)}.")
    if options.method == "wise-ft":
        return wise_ft(files[0], files[1], options.alpha)
    if options.method == "slerp":
        return slerp_merge(files[0], files[1], options.t)
    if options.method == "ties":
        return ties_merge(files[0], files[1:], options.density, options.weights, options.lam)
    return dare_merge(
        files[0],
        files[1:],
        options.density,
        options.weights,
        options.lam,
        rescale=options.rescale,
        elect_signs=options.elect_signs,
        generator=torch.Generator().manual_seed(options.seed),
    )


def _evaluation(options: argparse.Namespace) -> Evaluate | None:
    if options.evaluate is not None and options.config is not None:
        raise ValueError("--evaluate and --config exclude each other.")
    if options.evaluate is not None:
        return _function(options.evaluate)
    if options.config is None:
        return None
    if options.monitor is None:
        raise ValueError("--config needs --monitor, the metric that its validation logs.")
    return _from_config(options.config, options.monitor)


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    if not name:
        raise ValueError(f"{place!r} must be written module:function.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {place}: {error}") from error
    finally:
        sys.path.pop(0)
    return found


def _from_config(path: Path, monitor: str) -> TrainerEvaluation:
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI  # only with the extra `cli`

    sys.path.insert(0, str(Path.cwd()))
    try:
        cli = LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            save_config_callback=None,
            args=["--config", str(path)],
        )
    finally:
        sys.path.pop(0)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batches = cli.datamodule.train_dataloader()
    return TrainerEvaluation(cli.trainer, cli.model, monitor, datamodule=cli.datamodule, train_batches=batches)


def _table(method: str, result: SoupResult) -> Table:
    table = Table(
        "checkpoint", "own score", "score of the soup with it", "", title=f"{method} soup", title_justify="left"
    )
    for candidate in result.trace:
        verdict = "[green]in[/]" if candidate.accepted else "[red]out[/]"
        table.add_row(escape(candidate.name), _number(candidate.own_score), _number(candidate.score), verdict)
    if result.score is not None:
        table.add_section()
        table.add_row("soup", _number(result.score), "", "")
    for before in result.scores_before_batch_norm[-1:]:
        table.add_row("the last evaluated, before batch statistics were estimated anew", _number(before), "", "")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
