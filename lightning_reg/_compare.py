"""``lightning-reg compare``: the CSV logs of several runs side by side, as a table and as curves."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_reg.engine.host.commands import Commands, Options

__all__ = ["add_command"]

_LOG = "metrics.csv"
_NO_METRICS = ("step", "epoch")
_MOST_PLOTS = 12


def add_command(commands: Commands) -> None:
    """Adds ``compare``.

    Args:
        commands: Of ``lightning-reg``.

    """
    parser = commands.add("compare", "compare runs by their CSV logs: a table, and curves with --plot", _run)
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help=f"{_LOG}, or a folder of CSVLogger with it")
    parser.add_argument(
        "--metric",
        action="append",
        metavar="PATTERN",
        help="what to show, val_* for example; may be given several times",
    )
    parser.add_argument("--plot", type=str, metavar="FILE", help="draw the curves too, needs matplotlib")


@dataclass(frozen=True)
class Curve:
    """Values of a metric in one run.

    Args:
        steps: Steps at which it was logged.
        values: Its values.

    """

    steps: list[float]
    values: list[float]


def _run(options: Options) -> None:
    logs = [log for run in options.runs for log in logs_of(Path(run))]
    runs = dict(zip(names_of(logs), map(read_log, logs), strict=True))
    metrics = sorted({name for curves in runs.values() for name in curves})
    patterns = options.metric or ["*"]
    shown = [name for name in metrics if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not shown:
        raise ValueError(f"no metric is called {' or '.join(patterns)}; there are {', '.join(metrics) or 'none'}.")
    Console().print(_table(runs, shown))
    if options.plot is not None:
        draw(runs, shown, Path(options.plot))
        Console().print(options.plot, markup=False, soft_wrap=True)


def logs_of(run: Path) -> list[Path]:
    """The logs of a run, or of all runs below a folder.

    Args:
        run: A log, or a folder.

    Returns:
        The logs, by name.

    Raises:
        ValueError: If there is none.

    """
    if run.is_file():
        return [run]
    found = sorted(run.rglob(_LOG)) if run.is_dir() else []
    if not found:
        raise ValueError(f"{run} is no log, and no folder with a {_LOG} of Lightning's CSVLogger.")
    return found


def names_of(logs: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    folders = [log.parent.resolve().parts if log.name == _LOG else log.resolve().parts for log in logs]
    for length in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-length:]) for parts in folders]
        if len({*names}) == len(names):
            return names
    raise ValueError("a run is given twice.")


def read_log(path: Path) -> dict[str, Curve]:
    """Reads a log of CSVLogger.

    Args:
        path: The file.

    Returns:
        Curves by the name of the metric; a row has the metrics that were logged in its step, others are empty there.

    Raises:
        ValueError: If it has no column ``step``, or words where numbers belong.

    """
    curves: dict[str, Curve] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} has no column `step`: it is no log of Lightning's CSVLogger.")
        for row in reader:
            for name, text in row.items():
                if name not in _NO_METRICS and text:
                    curve = curves.setdefault(name, Curve([], []))
                    try:
                        curve.values.append(float(text))
                        curve.steps.append(float(row["step"]))
                    except ValueError as error:
                        raise ValueError(f"{path} has {text!r} under {name}, which is no number.") from error
    return curves


def _table(runs: dict[str, dict[str, Curve]], shown: Sequence[str]) -> Table:
    table = Table(title="last value (least to greatest)", title_justify="left")
    table.add_column("metric")
    for run in runs:
        table.add_column(escape(run), justify="right", overflow="fold")
    for name in shown:
        table.add_row(escape(name), *(_cell(curves.get(name)) for curves in runs.values()))
    return table


def _cell(curve: Curve | None) -> str:
    if curve is None:
        return "-"
    finite = [value for value in curve.values if isfinite(value)]
    between = f" ({min(finite):.4g} to {max(finite):.4g})" if len(finite) > 1 else ""
    return f"{curve.values[-1]:.4g}{between}"


def draw(runs: dict[str, dict[str, Curve]], shown: Sequence[str], path: Path) -> None:
    """Draws a picture with one panel for each metric.

    Args:
        runs: Curves by run and metric.
        shown: The metrics.
        path: Where the picture goes.

    Raises:
        ValueError: If matplotlib is missing, or too many metrics were chosen.

    """
    try:
        import lightning_reg.plots as plots  # an attribute that is there already would hide it
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; install it with `pip install matplotlib`.") from error
    if len(shown) > _MOST_PLOTS:
        raise ValueError(f"{len(shown)} metrics do not fit into one picture; choose up to {_MOST_PLOTS} by --metric.")
    logs = {run: {name: (curve.steps, curve.values) for name, curve in curves.items()} for run, curves in runs.items()}
    plots.compared(logs, shown).savefig(path)
