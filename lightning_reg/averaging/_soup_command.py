"""``lightning-reg soup``: what all of its methods share, each method being added by its own unit."""

import importlib
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_reg.averaging._checkpoint_files import CheckpointFile, UntrustedFileError, open_checkpoint
from lightning_reg.averaging._file_bars import Evaluate, evaluations
from lightning_reg.averaging._soup_results import SoupResult, own_scores, save_soup
from lightning_reg.engine.host.commands import Commands, Options, Parser

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

__all__ = ["Evaluate", "add_methods", "function_at", "mix_files"]

_OF_EVERY_CLI = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")


def add_methods(
    commands: Commands,
    methods: Mapping[str, str],
    make: Callable[[str, Options, Evaluate | None], SoupResult],
) -> dict[str, Parser]:
    """Adds methods to ``soup``, and ``soup`` to the command line if it is not there yet.

    Args:
        commands: Of ``lightning-reg``.
        methods: One line about each method.
        make: Makes and writes a soup by the name of the method and its options.

    Returns:
        The methods' parsers, for arguments of their own.

    """
    soup = commands.group("soup", "average or mix checkpoints of several runs from one start")
    parsers = {name: soup.add(name, text, partial(_run, name, make)) for name, text in methods.items()}
    for parser in parsers.values():
        _add_common(parser)
    return parsers


def _add_common(parser: Parser) -> None:
    parser.add_argument("checkpoints", type=str, nargs="+", metavar="CKPT", help="files of weights")
    parser.add_argument("--out", type=str, required=True, help=".safetensors, or .ckpt in Lightning's form")
    parser.add_argument("--force", action="store_true", help="replace the file --out if it exists")
    parser.add_argument("--key", type=str, help="entry with the weights, in files that hold several (state.model)")
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="keys to leave as the first checkpoint has them, as `*.position_ids`; may be given several times",
    )
    parser.add_argument("--evaluate", type=str, help="module:function from a state dict to its held-out score")
    parser.add_argument("--config", type=str, help="LightningCLI config, of whose run the validation scores")
    parser.add_argument("--model", type=str, help="module:Class of its model, where the config does not say it")
    parser.add_argument("--data", type=str, help="module:Class of its data, where the config does not say it")
    parser.add_argument("--monitor", type=str, help="metric that the validation of --config logs")
    parser.add_argument("--mode", choices=("max", "min"), default="max", help="which score is better")


def _run(method: str, make: Callable[[str, Options, Evaluate | None], SoupResult], options: Options) -> None:
    if Path(options.out).exists() and not options.force:
        raise ValueError(f"{options.out} exists; give --force to replace it.")
    try:
        result = make(method, options, _evaluation(options))
    except UntrustedFileError as error:
        raise ValueError(str(error)) from error
    Console().print(_table(method, result))
    Console().print(f"[bold]{escape(options.out)}[/]: {method} soup of {len(result.ingredients)}")


def mix_files(
    method: str,
    options: Options,
    evaluate: Evaluate | None,
    mix: Callable[[Sequence[CheckpointFile]], dict[str, Any]],
) -> SoupResult:
    """Mixes all of the files and writes the result, with the scores of the files and of the mix.

    Args:
        method: Its name.
        options: Of the command.
        evaluate: Scores a state dict; ``None`` for no scores.
        mix: From the files to a state dict.

    Returns:
        The mix.

    """
    files = [open_checkpoint(path, options.key) for path in options.checkpoints]
    names = list(options.checkpoints)
    scores, score = list[float](), None
    if evaluate is not None:
        with evaluations(evaluate, len(files), shown=True) as scored:
            scores = own_scores(files, names, scored, options.exclude)
    mixed = mix(files)
    if evaluate is not None:
        with evaluations(evaluate, 1, shown=True) as scored:
            score = float(scored(mixed))
    result = SoupResult.of_all(mixed, names, scores, score)
    save_soup(Path(options.out), result, method, files[0].extra)
    return result


def _evaluation(options: Options) -> Evaluate | None:
    if options.evaluate is not None and options.config is not None:
        raise ValueError("--evaluate and --config exclude each other.")
    if options.evaluate is not None:
        return function_at(options.evaluate)
    if options.config is None:
        return None
    if options.monitor is None:
        raise ValueError("--config needs --monitor, the metric that its validation logs.")
    with _working_directory():
        return _from_config(options)


def function_at(place: str) -> Callable[..., Any]:
    """Finds a function, from the working directory as well.

    Args:
        place: Where it is, as ``module:function``.

    Returns:
        The function.

    Raises:
        ValueError: If there is none.

    """
    module, _, name = place.partition(":")
    if not name:
        raise ValueError(f"{place!r} must be written module:function.")
    try:
        with _working_directory():
            found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {place}: {error}") from error
    return found


@contextmanager
def _working_directory() -> Iterator[None]:
    """Modules are found there too, as they are when a script of the user's runs."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def _from_config(options: Options) -> Evaluate:
    from lightning_reg import TrainerEvaluation  # by its public name: what units share knows none of them

    cli = _cli_of(Path(options.config), options.model, options.data)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batches = cli.datamodule.train_dataloader()
    evaluation: Evaluate = TrainerEvaluation(
        cli.trainer, cli.model, options.monitor, datamodule=cli.datamodule, train_batches=batches
    )
    return evaluation


def _cli_of(path: Path, model: str | None, data: str | None) -> "LightningCLI":
    """The LightningCLI that a config describes; one of fixed classes, as most write it, names no class itself."""
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI  # only with the extra `cli`

    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} could not be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} could not be read: it holds no mapping, as a config of LightningCLI does.")
    config = config.get("fit", config)
    # A validation of ours is no run of the user's, to be logged.
    config["trainer"] = {**(config.get("trainer") or {}), "logger": False}
    for name, given in (("model", model), ("data", data)):
        if given is None and "class_path" not in (config.get(name) or {}):
            raise ValueError(
                f"{path} does not say of which class the {name} is, as a LightningCLI made with fixed classes writes"
                f" it: give --{name} package.module:Class."
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # the words were for lightning-reg
        try:
            return LightningCLI(
                LightningModule if model is None else function_at(model),
                LightningDataModule if data is None else function_at(data),
                subclass_mode_model=model is None,
                subclass_mode_data=data is None,
                run=False,
                save_config_callback=None,
                parser_kwargs={"exit_on_error": False},
                # What else is in it (ckpt_path, arguments that another CLI adds) is nothing to a validation.
                args={key: config[key] for key in _OF_EVERY_CLI if key in config},
            )
        except ArgumentError as error:
            raise ValueError(f"{path} could not be read: {' '.join(str(error).split())}") from error


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
