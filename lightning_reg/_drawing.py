"""What the pictures have in common: style, axes, matrices, images."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from torch import Tensor

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover # where the extra is not installed
    raise ImportError("Pictures need matplotlib: pip install matplotlib.") from error

__all__ = ["BLUE", "LINES", "ORANGE", "Axes", "Figure", "matrix", "one", "picture", "several", "styled"]

_STYLE = Path(__file__).with_name("plots.mplstyle")
BLUE, ORANGE = "#1f4e8c", "#c8702a"  # the style's first two
# Told apart in grey too.
LINES = tuple((f"C{place}", style) for place, style in enumerate(("-", "--", "-.", ":")))
_P = ParamSpec("_P")


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @wraps(draw)
    def in_style(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.style.context(_STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # what is made late is made in the style
            return figure

    return in_style


def one(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure()
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def several(title: str, *labels: tuple[str, str]) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(6.0, 2.3 * len(labels)))
    panels = list(figure.subplots(len(labels), sharex=True))
    for axes, (x, y) in zip(panels, labels, strict=True):
        axes.set(xlabel=x, ylabel=y)
    panels[0].set_title(title)
    return figure, panels


def matrix(
    axes: Axes, values: Tensor, rows: Sequence[str], columns: Sequence[str], words: tuple[str, str, str]
) -> None:
    """Numbers in shaded cells, so that they are read in grey as well."""
    x, y, title = words
    axes.imshow(values.float().numpy(), vmin=0, aspect="auto")
    half = float(values.nan_to_num(0).max()) / 2
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if value == value and (value or values.is_floating_point()):  # NaN: not known; no suspects: left empty
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > half else "black"
                )
    turned: dict[str, Any] = {"rotation": 40, "ha": "right"} if max(map(len, columns)) > 3 else {}
    axes.set_xticks(range(len(columns)), columns, **turned)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(visible=False)


def picture(image: Tensor) -> Any:  # noqa: ANN401 # an array of numpy
    image = image.detach().float().cpu()
    image = image.movedim(0, -1).squeeze(-1) if image.dim() == 3 else image
    return ((image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)).numpy()
