"""What was measured, read from the committed files in ``benchmarks/results``; no figure is typed by hand."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Files that are not called `effects_<key of the unit>`, by the beginning of their names.
_OF_UNIT = {
    "amtrl_lasso": ("effects_amtrl_lasso_digits",),
    "elr": ("noisy_labels", "elr_stores"),
    "idf_flops": ("effects_idf_flops_speeches",),
    "gtrs": ("effects_class_dropout", "effects_clamped_self_distillation"),
    "model_soups": ("soups",),
    "loss_reweighting": ("reweighting",),
    "nm_sparsity": ("sparsity",),
    "weight_compander": ("weight_compander",),
    "multi_sample_dropout": ("dropout_samples",),
    "weight_anchors": ("effects_rehearsal_free_cl",),
}


def files() -> list[Path]:
    """Results that can be read as text."""
    return sorted(path for path in RESULTS.iterdir() if path.suffix in (".md", ".txt"))


def files_of(unit: str) -> list[Path]:
    """Results about a unit."""
    beginnings = _OF_UNIT.get(unit, ())
    return [path for path in files() if path.stem == f"effects_{unit}" or path.stem.startswith(beginnings or "?")]


def tables(name: str) -> list[tuple[str, list[list[str]]]]:
    """Tables of a file, each with the text before it: rows of cells, the heading's first."""
    return [(before, rows) for before, rows in _chunks(name) if rows]


@cache
def _chunks(name: str) -> list[tuple[str, list[list[str]]]]:
    """Text and the table that follows it, in order; what stands behind the last table has none."""
    found: list[tuple[str, list[list[str]]]] = []
    before, rows = list[str](), list[list[str]]()
    for line in (RESULTS / name).read_text().splitlines():
        stripped = line.strip()
        if stripped[:1] and stripped[0] in "|│┃":
            cells = [cell.strip() for cell in re.split(r"[|│┃]", stripped)[1:-1]]
            rows += [] if re.fullmatch(r"[-: ]*", "".join(cells)) else [cells]
        elif not stripped or stripped[0] not in "┏┡├└":
            if rows:
                found.append(("\n".join(before), rows))
                before, rows = [], []
            before.append(line)
    return [*found, ("\n".join(before), rows)]


def cell(name: str, section: str, row: str, column: str) -> str:
    """One figure: of the first table that ``section`` stands above, from the row and column that begin so.

    Args:
        name: The file.
        section: Words in the text above the table; "" for the first table.
        row: How the row's first cell begins.
        column: How the column's heading begins, or its position.

    Returns:
        The cell's text.

    Raises:
        LookupError: If there is no such cell.

    """
    for before, rows in tables(name):
        if " ".join(section.split()) in " ".join(before.split()):
            heading = rows[0]
            position = int(column) if column.isdigit() else _beginning(heading, column)
            return rows[_beginning([one[0] for one in rows], row)][position]
    raise LookupError(f"{name}: no table below {section!r}")


def exact_cell(name: str, section: str, row: str, column: str) -> str:
    """The same where row and column are given by their whole names."""
    rows = next((rows for before, rows in tables(name) if section in before), [[""]])
    place = next((place for place, one in enumerate(rows[0]) if one == column), None)
    line = next((line for line in rows[1:] if line[0] == row), None)
    if place is None or line is None:
        raise LookupError(f"{name}: no cell {row!r}, {column!r} below {section!r}")
    return line[place]


def _beginning(cells: Sequence[str], words: str) -> int:
    for position, one in enumerate(cells):
        if one.replace("*", "").startswith(words):
            return position
    raise LookupError(f"no cell begins with {words!r}: {list(cells)}")


def page_of(path: Path) -> str:
    """A file of results as a page."""
    if path.suffix == ".md":
        text = path.read_text()
        return text if text.startswith("# ") else f"# {path.stem.replace('_', ' ')}\n\n{text}"
    parts = [f"# {path.stem.replace('_', ' ')}"]
    for before, rows in _chunks(path.name):
        parts += [_plain(before), *([markdown_table(rows)] if rows else [])]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table, the heading first; rows of the terminal's tables that are short are filled."""
    width = max(map(len, rows))
    lines = [
        [*(cell.replace("_", "\\_").replace("*", "\\*") for cell in row), *[""] * (width - len(row))] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * width, *lines[1:]])


def _plain(text: str) -> str:
    """Words between tables, as they stand in the file."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "```text\n" + "\n".join(lines) + "\n```" if lines else ""


def excerpt(path: Path) -> str:
    """What a technique's page shows of a file: its tables with the words above, and where the rest stands."""
    link = f"[All of it, every seed](../measured/{path.stem}.md)"
    if path.suffix == ".txt":
        before, rows = tables(path.name)[0]
        return f"**{path.stem.replace('_', ' ')}**\n\n{_plain(before)}\n\n{markdown_table(rows)}\n\n{link}\n"
    body = re.sub(r"^# (.*)\n", r"**\1**\n", path.read_text().partition("\nEach seed:")[0], count=1)
    return f"{body.rstrip()}\n\n{link}\n"


def cost_of(key: str) -> str:
    """What a step costs, from the table that ``benchmarks/step_costs.py`` wrote for a technique; "" without one."""
    text = (RESULTS / "step_costs.txt").read_text()
    found = re.search(rf"^ *{key}: (.*?)\n┏.*?\n(.*?)^└", text, re.MULTILINE | re.DOTALL)
    if not found:
        return ""
    setting = " ".join(line.strip() for line in found[1].splitlines())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in found[2].splitlines() if line.startswith("│")]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"A step ({setting}):", "", "| ratio | median | 95 % interval |", "|---|---|---|", *lines, ""])


def models_of(name: str) -> str:
    """What a technique did on models that people have, and what it said where it was refused."""
    rows = tables("models.md")[0][1]
    row = next((row for row in rows[1:] if row[0] == name), None)
    if row is None or "-" in row:  # it asks for a model of its own kind
        return ""
    trains = [model for model, said in zip(rows[0][1:], row[1:], strict=True) if said == "trains"]
    lines = [f"It trains on: {', '.join(trains) or 'none of them'}."]
    found = re.findall(rf"^- `{name}` on (.*?): (.*)$", (RESULTS / "models.md").read_text(), re.MULTILINE)
    lines += ["", "Refused, with what it says:", ""] if found else []
    return "\n".join([*lines, *(f"- {model}: {_literal(said)}" for model, said in found)])


def _literal(words: str) -> str:
    """A sentence in which nothing is Markdown but its code."""
    parts = re.split(r"(`[^`]*`)", words)
    parts[::2] = [re.sub(r"([_*<>$|\[\]])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)
