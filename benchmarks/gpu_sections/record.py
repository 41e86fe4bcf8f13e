"""The file of results: written after every part, read when the next call goes on, rendered as Markdown."""

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["BARS", "Record", "facts", "markdown", "verdicts"]

# Figure, by section: the largest value that is good (or the least, where it stands so).
BARS = {
    ("steps", "engine / by hand"): ("at most", 1.02),
    ("steps", "host syncs per step"): ("at most", 0),
    ("averages", "speed / device copy"): ("at least", 0.8),
    ("masks", "time / abs()"): ("at most", 1.5),
    ("masks", "engine / by hand"): ("at most", 1.02),
}
TITLES = {
    "steps": "Step cost, bfloat16",
    "averages": "Averages",
    "masks": "N:M sparsity",
    "published": "Published figures",
    "language": "Reweighting of a language model",
    "memory": "Peak memory",
}


class Record:
    """Results by section and part.

    Args:
        path: The JSON file; what stands there is kept.
        facts: Machine, versions, command.

    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"sections": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            known, here = self.content["facts"]["device"], facts["device"]
            if known != here:
                raise SystemExit(f"{path.name} has results of {known}, and this is {here}: choose another --name.")
        runs = [*self.content.pop("runs", []), facts.pop("run")]
        self.content = {"facts": facts, "runs": runs, "sections": self.content["sections"]}

    def section(self, name: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"finished": False, "parts": {}, "left_out": []}
        return self.content["sections"].setdefault(name, empty)

    def keep(self, section: str, part: str, result: dict[str, Any]) -> None:
        self.section(section)["parts"][part] = result
        self.write()

    def write(self) -> None:
        """The JSON and the Markdown beside it; each at once, so that a broken-off call leaves no half file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        texts = {".json": json.dumps(self.content, indent=1) + "\n", ".md": markdown(self.content)}
        for suffix, text in texts.items():
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path.with_suffix(suffix))


def facts(device: str, small: bool, seed: int, command: str) -> dict[str, Any]:
    """Where and with what the figures are made."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": version("lightning")}
    try:
        versions["lightning_reg"] = version("lightning-reg")
    except PackageNotFoundError:
        versions["lightning_reg"] = "(source tree)"
    machine = f"CPU ({platform.machine()})"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "device": machine,
        "cpu_cores": os.cpu_count(),
        "versions": versions,
        "seed": seed,
        "small": small,
        "run": {"command": command, "started": time.strftime("%Y-%m-%d %H:%M", time.gmtime())},
    }


def is_met(section: str, figure: str, value: Any) -> bool | None:
    """Whether a figure keeps its bar; ``None`` where there is no bar or no figure."""
    number = value["median"] if isinstance(value, dict) else value
    kind, bar = BARS.get((section, figure), ("", 0.0))
    if not kind or not isinstance(number, int | float):
        return None
    return bool(number <= bar if kind == "at most" else number >= bar)


def verdicts(content: dict[str, Any]) -> list[tuple[str, str, str, str, bool]]:
    """Of every figure with a bar: section, part, figure with value, bar, whether it is met."""
    found = []
    for section, entry in content["sections"].items():
        for part, result in entry["parts"].items():
            for figure, value in result.get("figures", {}).items():
                met = is_met(section, figure, value)
                if met is not None:
                    kind, bar = BARS[section, figure]
                    found.append((section, part, f"{figure} {shown(value)}", f"{kind} {bar:g}", met))
    return found


def shown(value: Any) -> str:
    """A figure as a cell has it."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(content: dict[str, Any]) -> str:
    """The page: facts, bars, a table for each section and each set of figures in it."""
    known = content["facts"]
    versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    lines = [f"# Measured on {known['device']}", ""]
    if known["small"]:
        lines += ["**In small, to see that it runs: no figure here means anything.**", ""]
    lines += [f"{known['cpu_cores']} CPU cores; {versions}; seed {known['seed']}. Intervals are of 95 %.", ""]
    lines += [f"- {run['started']} UTC: `{run['command']}`" for run in content["runs"]]
    checked = verdicts(content)
    missed = [row for row in checked if not row[-1]]
    lines += ["", f"Bars: {len(checked) - len(missed)} of {len(checked)} met.", ""]
    lines += [f"- missed: {section}, {part}: {figure}, bar {bar}" for section, part, figure, bar, _ in missed]
    for section, entry in content["sections"].items():
        lines += ["", f"## {TITLES[section]}", "", *_tables(section, entry)]
    return "\n".join(lines).rstrip() + "\n"


def _tables(section: str, entry: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    columns: list[str] | None = None
    for part, result in entry["parts"].items():
        if "error" in result:
            continue
        if list(result["figures"]) != columns:
            columns = list(result["figures"])
            lines += ["", f"| part | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        cells = [_cell(section, figure, value) for figure, value in result["figures"].items()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    notes: dict[str, list[str]] = {}
    for part, result in entry["parts"].items():
        for note in [*result.get("notes", []), *([result["error"]] if "error" in result else [])]:
            notes.setdefault(note, []).append(part)
    lines += [""] + [f"- {_listed(parts)}: {note}" for note, parts in notes.items()]
    if entry["left_out"]:
        lines.append(f"- no time was left for {_listed(entry['left_out'])}; a further call goes on there")
    return lines


def _listed(parts: list[str]) -> str:
    return ", ".join(parts) if len(parts) <= 3 else f"{parts[0]} and {len(parts) - 1} more"


def _cell(section: str, figure: str, value: Any) -> str:
    met = is_met(section, figure, value)
    return shown(value) + ("" if met is None else " met" if met else " **missed**")
