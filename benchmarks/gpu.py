"""All that waits for one large GPU, in one command: step costs, averages, N:M masks, published figures, memory.

    python benchmarks/gpu.py --name h100
    python benchmarks/gpu.py --name h100 --sections published --parts "elr/*" --minutes 25
    python benchmarks/gpu.py --smoke

Results go to ``benchmarks/results/gpu_<name>.json``, with a page in Markdown beside it, after every part. A section
keeps its own limit of at most 8 minutes (``--minutes``): it measures its steps first and cuts the length of its runs,
which the result says. What has a result is not run again (``--again``), what there was no time for and what failed is
done by the next call; Ctrl-C keeps what is done. Nothing is downloaded; ``--data`` has ``cifar10n`` (``train.parquet``,
``test.parquet``) and ``tinyshakespeare/input.txt``. ``--smoke`` runs everything in small on random data, on the CPU.
"""

import argparse
import fnmatch
import importlib
import json
import logging
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_sections.record import Record, facts, verdicts
from gpu_sections.setting import Part, Setting, run_part
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
SECTIONS = ("steps", "averages", "masks", "published", "language", "memory")
NEED_DATA = {"published": "cifar10n/train.parquet", "language": "tinyshakespeare/input.txt"}


def found_data() -> Path:
    """``shared/data`` in the repository or in a folder around it."""
    folders = [folder / "shared" / "data" for folder in HERE.parents]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the results: gpu_<name>.json (the GPU's name)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--parts", default="*", help="shell pattern of the parts to run, as elr/*")
    parser.add_argument("--minutes", type=float, help="limit of each section (its own, 8 at most)")
    parser.add_argument("--again", action="store_true", help="run what has a result, too")
    parser.add_argument("--smoke", action="store_true", help="everything in small, on random data, on the CPU")
    parser.add_argument("--data", type=Path, default=found_data(), help="folder of the data sets (shared/data)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side-by-side", type=int, default=4, help="training runs at a time, each in a process")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="training runs, too")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    # Of one part in a process of its own: where its result goes, and when it must be over.
    parser.add_argument("--part-to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor remarks of Lightning, which would be the same hundreds of times."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    loggers += [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Call:
    """One call of the script.

    Args:
        options: As given.
        console: Where it prints.

    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        device = "cpu" if options.smoke else "cuda"
        self.setting = Setting(options.smoke, device, options.data, options.seed, compile=options.compile)
        command = "python benchmarks/gpu.py " + shlex.join(told_options(options))
        known = facts(device, options.smoke, options.seed, command.strip())
        name = options.name or ("smoke" if options.smoke else known["device"].partition(",")[0].lower())
        self.path = options.results / f"gpu_{name.replace(' ', '_')}.json"
        self.record = Record(self.path, known)

    def run(self, progress: Progress) -> None:
        for name in self.options.sections:
            needed = self.options.data / NEED_DATA.get(name, "")
            if not self.options.smoke and not needed.exists():
                self.console.print(f"{name}: there is no {NEED_DATA[name]} in --data; left out")
                continue
            self._section(name, progress)

    def _section(self, name: str, progress: Progress) -> None:
        module = importlib.import_module(f"gpu_sections.{name}")
        entry = self.record.section(name)
        limit = 60 * self.options.minutes if self.options.minutes else module.SECONDS
        parts = module.parts(self.setting)
        todo = [part for part in parts if self._is_due(part, entry)]
        task = progress.add_task(name, total=len(todo))
        until = time.monotonic() + limit
        side_by_side = getattr(module, "SIDE_BY_SIDE", False) and self.setting.on_gpu and self.options.side_by_side > 1
        made = (self._in_processes if side_by_side else self._one_by_one)(name, todo, until)
        for part, result in made:
            self.record.keep(name, part.name, result)
            self._say(name, part, result)
            progress.advance(task)
        results = entry["parts"]
        entry["left_out"] = [part.name for part in parts if part.name not in results]
        entry["finished"] = not entry["left_out"] and all("error" not in results[part.name] for part in parts)
        self.record.write()

    def _is_due(self, part: Part, entry: dict[str, Any]) -> bool:
        known = entry["parts"].get(part.name, {"error": "not run"})
        return fnmatch.fnmatch(part.name, self.options.parts) and (self.options.again or "error" in known)

    def _one_by_one(self, name: str, todo: list[Part], until: float) -> Iterator[tuple[Part, dict[str, Any]]]:
        for number, part in enumerate(todo):
            left = until - time.monotonic()
            if left <= part.needs:
                continue  # a part that needs less may follow
            seconds = left * part.share / sum(other.share for other in todo[number:])
            yield part, run_part(part, replace(self.setting, seconds=seconds))

    def _in_processes(self, name: str, todo: list[Part], until: float) -> Iterator[tuple[Part, dict[str, Any]]]:
        """Several at a time, each in a process of its own, which may die without the others."""
        from gpu_sections.training import cifar10

        cifar10(self.setting)  # decoded once for all of them
        waiting, running = list(todo), []
        lanes = min(self.options.side_by_side, len(todo))
        try:
            while waiting or running:
                left = until - time.monotonic()
                if left < -60:
                    return  # what hangs is ended, and left out
                while waiting and len(running) < lanes and left > 15:
                    part = waiting.pop(0)
                    others = sum(other.share for other in [part, *waiting]) + sum(p.share for p, _, _ in running) / 2
                    running.append(self._begin(name, part, min(left, lanes * left * part.share / others)))
                if not running:
                    return
                for entry in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove(entry)
                    yield entry[0], result_of(*entry[1:])
                time.sleep(0.1)
        finally:
            for _, process, _ in running:
                process.terminate()

    def _begin(self, section: str, part: Part, seconds: float) -> tuple[Part, Any, Path]:
        target = Path(tempfile.mkdtemp()) / "result.json"
        until = time.time() + seconds  # a process takes a while to begin
        words = ["--sections", section, "--parts", part.name, "--until", str(until), "--part-to", str(target)]
        words += ["--data", str(self.options.data), "--seed", str(self.options.seed)]
        words += ["--smoke"] * self.options.smoke + ["--compile" if self.options.compile else "--no-compile"]
        with (target.parent / "errors").open("w") as errors:
            command = [sys.executable, str(HERE / "gpu.py"), *words]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        return part, process, target

    def _say(self, section: str, part: Part, result: dict[str, Any]) -> None:
        what = result.get("error", "done")
        self.console.print(f"{section}, {part.name}: {what} ({result['seconds']:.1f} s)", highlight=False)


def result_of(process: Any, target: Path) -> dict[str, Any]:
    """What a process wrote, or how it ended."""
    if target.exists():
        return json.loads(target.read_text())
    lines = (target.parent / "errors").read_text().strip().splitlines()[-1:]
    return {"error": f"the process ended with {process.returncode}: {''.join(lines)[:300]}", "seconds": 0.0}


def told_options(options: argparse.Namespace) -> list[str]:
    """The options that differ from their defaults; where files lie on this machine stays out of it."""
    words = []
    for action in make_parser()._actions:
        value = getattr(options, action.dest, action.default)
        if action.dest in ("help", "data", "results", "part_to", "until") or value == action.default:
            continue
        values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
        words += [action.option_strings[0 if value else -1], *map(str, values)]
    return words


def one_part(options: argparse.Namespace) -> None:
    """As a process of `_in_processes`."""
    device = "cpu" if options.smoke else "cuda"
    seconds = options.until - time.time()
    setting = Setting(options.smoke, device, options.data, options.seed, seconds, compile=options.compile)
    module = importlib.import_module(f"gpu_sections.{options.sections[0]}")
    part = next(part for part in module.parts(setting) if part.name == options.parts)
    options.part_to.write_text(json.dumps(run_part(part, setting)))


def show_bars(record: Record, console: Console) -> None:
    table = Table("section", "part", "figure", "bar", "", title="Bars")
    for section, part, figure, bar, met in verdicts(record.content):
        table.add_row(section, part, figure, bar, "met" if met else "[red]missed[/red]")
    console.print(table if table.row_count else "No figure with a bar yet.")


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen sections, prints the bars, and returns 130 if it was interrupted."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; `--smoke` runs everything in small on the CPU")
    console = Console()
    if options.smoke:
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    with quiet():
        if options.part_to is not None:
            one_part(options)
            return 0
        call = Call(options, console)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=console) as progress:
                call.run(progress)
        except KeyboardInterrupt:
            console.print("Interrupted: what is done is kept, and the next call goes on there.")
            return 130
        finally:
            call.record.write()
    show_bars(call.record, console)
    console.print(f"Results: {call.path} and .md", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
