"""Pictures of what a technique did to a run, drawn from the committed results when the site is built.

One picture for each measure, of the width of a phone's screen; they stand side by side where there is room. Arms are
rows, a mark stands at the mean, a bar is its interval, ticks are the seeds. Shape and filling tell marks apart in grey.
"""

import functools
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import results

# What is drawn of units whose results are no `effects_<key>.md`: a file, what its cells give behind the mean, how many
# of its columns are drawn, and what they measure.
_OF_UNIT = {
    "elr": ("noisy_labels_worse.md", "half the 95 % interval of the seeds", 2, "test accuracy, {} (%)"),
    "loss_reweighting": ("reweighting.txt", "one standard deviation of the seeds", 2, "test loss {}"),
    "model_soups": ("soups_cifar.txt", "", 2, "{} accuracy"),
    "nm_sparsity": ("sparsity_digits.md", "one standard deviation of the seeds", 5, "test accuracy, {}"),
}
_STYLE = Path(__file__).resolve().parents[2] / "lightning_reg" / "plots.mplstyle"
_NUMBER = re.compile(r"([-+]?[\d.]+)(?: %)?(?: ± ([\d.]+))?")
_AT_ONCE = 4  # measures that are shown before one asks for the others


@dataclass(frozen=True)
class Row:
    """One arm in the picture of one measure.

    Args:
        arm: Its name.
        mean: The mean of the seeds.
        half: Half the width of the interval; 0 if there is none.
        seeds: The value of each seed, where the file has them.
        differs: Whether the difference to the first arm has an interval without 0; ``None`` where that was not asked.

    """

    arm: str
    mean: float
    half: float
    seeds: Sequence[float]
    differs: bool | None


def source(unit: str) -> tuple[str, str] | None:
    """The file that a unit's pictures are drawn from, and what the bars in them are; ``None`` without one."""
    own = next((path.name for path in results.files_of(unit) if path.stem.startswith("effects_")), None)
    if own is not None:
        return own, "the 95 % interval (Student's t) of the seeds"
    return _OF_UNIT[unit][:2] if unit in _OF_UNIT else None


def measures(unit: str) -> dict[str, list[Row]]:
    """What was measured, in the order of the file: a row for each arm, the one to compare with first."""
    found = source(unit)
    if found is None:
        return {}
    name, (heading, *rows) = found[0], results.tables(found[0])[0][1]
    number_of_columns, words = _OF_UNIT[unit][2:] if name == _OF_UNIT.get(unit, ("",))[0] else (len(heading), "{}")
    columns = heading[1 : 1 + number_of_columns]
    drawn = {}
    for place, measure in enumerate(columns, 1):
        numbers = [(row[0], _NUMBER.match(row[place])) for row in rows]
        drawn[words.format(measure)] = [
            Row(
                arm,
                float(number[1]),
                float(number[2] or 0),
                _seeds(name, arm, measure, columns),
                _differs(name, arm, measure),
            )
            for arm, number in numbers
            if number
        ]
    return drawn


def paths(unit: str) -> list[str]:
    """Where the pictures of a unit stand below ``docs``."""
    return [_path(unit, place) for place in range(len(measures(unit)))]


def pictures(unit: str) -> dict[str, bytes]:
    """Paths below ``docs`` and contents of the pictures of a unit."""
    return {path: draw(*drawn) for path, drawn in zip(paths(unit), measures(unit).items(), strict=True)}


def section(unit: str) -> str:
    """What stands about them on a page of the unit."""
    found, drawn = source(unit), measures(unit)
    if found is None:
        return ""
    images = [
        f"![{measure}: {', '.join(f'{row.arm} {row.mean:g}' for row in rows)}](../../{_path(unit, place)})"
        for place, (measure, rows) in enumerate(drawn.items())
    ]
    first = next(iter(drawn.values()))
    bars = f" Bars: {found[1]}." if found[1] else ""
    seeds = " Ticks: the seeds." if any(row.seeds for row in first) else ""
    asked = any(row.differs is not None for row in first)
    filled = f" Filled: other than `{first[0].arm}` seed by seed; open: no effect shown." if asked else ""
    words = f"Square and dashed line: `{first[0].arm}`.{filled}{bars}{seeds}"
    words += f" Drawn from [{Path(found[0]).stem}](../../measured/{Path(found[0]).stem}.md)"
    words += ", which says what was trained and what the measures are."
    more = len(images) - _AT_ONCE
    lines = [" ".join(images[:_AT_ONCE])]
    if more > 0:
        title = f"{more} more measure{'s' if more > 1 else ''}"
        lines.append(f'??? note "{title}"\n\n    ' + " ".join(images[_AT_ONCE:]))
    return "\n\n".join([*lines, words])


def draw(measure: str, rows: Sequence[Row]) -> bytes:
    """The picture of one measure, as SVG."""
    import matplotlib.style
    from matplotlib.figure import Figure

    labels = [textwrap.fill(row.arm, 22) for row in rows]
    heights = [1 + label.count("\n") for label in labels]
    with matplotlib.style.context(["default", _STYLE, {"svg.hashsalt": "lightning_reg", "font.size": 9}]):
        figure = Figure(figsize=(3.5, 0.7 + 0.21 * sum(heights)))
        axes = figure.subplots()
        places = [sum(heights[:place]) + height / 2 for place, height in enumerate(heights)]
        axes.axvline(rows[0].mean, color="0.55", linestyle="--", linewidth=1)
        for place, row in zip(places, rows, strict=True):
            color, marker = ("0.25", "s") if row is rows[0] else ("C0", "o")
            axes.plot(row.seeds, [place] * len(row.seeds), "|", color="0.45", markersize=6, markeredgewidth=0.8)
            axes.errorbar(
                row.mean,
                place,
                xerr=row.half or None,
                color=color,
                marker=marker,
                markersize=5,
                linestyle="none",
                markerfacecolor="white" if row.differs is False else color,
                elinewidth=1.4,
                capsize=2.5,
            )
        axes.set_yticks(places, labels)
        axes.set_ylim(sum(heights), 0)
        axes.set_xlabel(textwrap.fill(measure, 36))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(visible=False, axis="y")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _path(unit: str, place: int) -> str:
    return f"assets/effects/{unit}-{place + 1}.svg"


@functools.cache
def _text(name: str) -> str:
    return (results.RESULTS / name).read_text()


def _seeds(name: str, arm: str, measure: str, columns: Sequence[str]) -> list[float]:
    """The value of each seed, from the lines below `Each seed:`."""
    lines = _text(name).partition("\nEach seed:\n")[2].splitlines()
    line = next((line for line in lines if line.startswith(f"- {arm}: ")), "").removeprefix(f"- {arm}: ")
    for part in re.split(rf"; (?={'|'.join(map(re.escape, columns))})", line):
        if part.startswith(f"{measure} "):
            return [float(value) for value in part.removeprefix(measure).split(",")]
    return []


def _differs(name: str, arm: str, measure: str) -> bool | None:
    try:
        said = results.exact_cell(name, "Difference to", arm, measure)
    except LookupError:
        return None
    return "no effect shown" not in said and "one seed" not in said
