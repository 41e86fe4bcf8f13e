"""Pictures of a run: from the CSV file that Lightning's CSVLogger wrote, or from a callback.

Each function returns a figure of matplotlib (``pip install matplotlib``, the extra ``plots``), and
``figure.savefig("name.png")`` writes it. One style, ``plots.mplstyle`` beside this file, is in force for all; curves
differ by their dashes as well, so they are told apart in grey.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg import _compare
from lightning_reg._drawing import BLUE, LINES, ORANGE, Axes, Figure, matrix, one, picture, several, styled

if TYPE_CHECKING:
    from lightning_reg.averaging._soup_results import Candidate
    from lightning_reg.noisy_labels.label_errors import LabelErrors
    from lightning_reg.sparsity.nm_sparsity.report import SparsityReport

__all__ = [
    "compared",
    "corrected_masks",
    "forgetting",
    "grokking",
    "guidance",
    "interpolation",
    "masks",
    "masks_over_time",
    "memorisation",
    "quality_by_size",
    "read_log",
    "soup_ladder",
    "suspects",
    "weights_over_time",
]

Log = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def read_log(path: str | Path) -> dict[str, tuple[list[float], list[float]]]:
    """The curves in a ``metrics.csv`` of Lightning's CSVLogger.

    Args:
        path: The file, or the folder that it lies in (``trainer.log_dir``).

    Returns:
        For each logged name the steps at which it was logged, and its values.

    Raises:
        ValueError: If the file has no column ``step``, or words where numbers belong.

    """
    try:
        curves = _compare.read_log(Path(path) / "metrics.csv" if Path(path).is_dir() else Path(path))
    except ValueError as error:
        raise ValueError(f"read_log: {error}") from error
    return {name: (curve.steps, curve.values) for name, curve in curves.items()}


@styled
def compared(runs: Mapping[str, Log], names: Sequence[str]) -> Figure:
    """Curves of several runs, with a panel for each metric: what ``lightning-reg compare --plot`` draws.

    Args:
        runs: Logs, see :func:`read_log`, by the name of the run.
        names: Logged names to draw, at least one; a run that has not logged one is left out of its panel.

    Returns:
        The figure.

    Raises:
        ValueError: If no metric is named.

    """
    if not names:
        raise ValueError("compared: `names` must have at least one logged name, got none.")
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    shown = {}
    for axes, name in zip(panels, names, strict=False):
        for (run, log), (color, style) in zip(runs.items(), LINES * len(runs), strict=False):
            if name in log:
                (shown[run],) = axes.plot(*log[name], linestyle=style, color=color, linewidth=1.4)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step")
    for axes in panels[len(names) :]:
        axes.axis("off")
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2, fontsize=8)
    return figure


@styled
def interpolation(curve: Mapping[str, Sequence[float]]) -> Figure:
    """Scores of the mixes between a network before and after fine-tuning, over alpha.

    A mix that is better than both ends in one score, and hardly worse in another, is what WiSE-FT looks for.

    Args:
        curve: From ``WiSEFT.curve`` or ``wise_ft_curve``: ``"alpha"``, and at least one score.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no alpha or no score.

    """
    scores = {name: values for name, values in curve.items() if name != "alpha"}
    if "alpha" not in curve or not scores:
        raise ValueError(f"interpolation: `curve` must have 'alpha' and a score, got {sorted(curve)}.")
    figure, axes = one("Between first and fine-tuned weights", "alpha", "score")
    for (name, values), (color, style) in zip(scores.items(), LINES * len(scores), strict=False):
        axes.plot(curve["alpha"], values, linestyle=style, color=color, marker="o", markersize=3, label=name)
    axes.legend(fontsize=8)
    return figure


@styled
def memorisation(log: Log | str | Path, key: str = "elr", metrics: Sequence[str] = ()) -> Figure:
    """How far the targets of ELR agree with the given labels, over the steps.

    Where agreement climbs to 1 the wrong labels are being memorised; where it levels off, the share of suspects beside
    it is what the network believes to be wrong.

    Args:
        log: A log, see :func:`read_log`, or its path.
        key: Log key of the callback, with the instance's name if it has one: ``"elr"``, ``"elr_plus"``.
        metrics: Further logged names to draw beside it, such as ``"val_acc"``.

    Returns:
        The figure.

    Raises:
        KeyError: If the log has no such curve.

    """
    shares = {"agreement with the given label": f"reg/{key}/agreement", "share of suspects": f"reg/{key}/suspects"}
    figure, axes = one("Memorisation", "step", "share of the samples")
    _curves(axes, log, {**shares, **{name: name for name in metrics}})
    axes.set_ylim(0, 1.02)
    return figure


@styled
def quality_by_size(
    points: Mapping[str, tuple[float, float]], size: str = "index, bytes", quality: str = "NDCG@10"
) -> Figure:
    """What size buys: a point for each index or network, and a line along those that none beats in both.

    Args:
        points: Size, above 0, and quality by the name of what has them, at least one; more quality is better.
        size: What the horizontal axis, which is logarithmic, has.
        quality: What the vertical axis has.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no point, or a size is not above 0.

    """
    if not points or any(x <= 0 for x, _ in points.values()):
        raise ValueError(f"quality_by_size: `points` must have sizes above 0, at least one, got {dict(points)}.")
    figure, axes = one("Quality by size", size, quality)
    figure.set_size_inches(6.0, 3.6 + 0.22 * len(points))
    best: list[tuple[float, float]] = []
    for x, y in sorted(points.values(), key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    axes.plot(*zip(*best, strict=True), color="0.6", linestyle=":", zorder=1, label="not beaten in both")
    for (name, (x, y)), marker in zip(points.items(), "os^vDPX<>*hp" * len(points), strict=False):
        axes.plot([x], [y], marker=marker, linestyle="", markersize=8, label=name)
    axes.set_xscale("log", subs=[2, 5])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside lower left", fontsize=8)
    return figure


@styled
def weights_over_time(log: Log | str | Path, key: str = "loss_reweighting") -> Figure:
    """What LossReweighting makes of the samples of each batch: how many count, how much the largest counts.

    Args:
        log: A log, see :func:`read_log`, or its path.
        key: Log key of the callback.

    Returns:
        The figure.

    Raises:
        KeyError: If the log has no such curve.

    """
    log = log if isinstance(log, Mapping) else read_log(log)
    labels = ("", "number of samples"), ("step", "largest weight\n/ mean")
    figure, (above, below) = several("Weights of the samples", *labels)
    counts = {"in the batch": "samples", "effective": "effective_samples"}
    _curves(above, log, {label: f"reg/{key}/{name}" for label, name in counts.items()})
    above.set_ylim(bottom=0)
    _curves(below, log, {"largest weight": f"reg/{key}/max_weight"})
    return figure


@styled
def soup_ladder(trace: "Sequence[Candidate]", metric: str = "score") -> Figure:
    """The candidates of a greedy soup in the order in which they were tried, accepted and refused.

    Args:
        trace: ``SoupAverager.trace``, or that of a ``SoupResult``.
        metric: What was scored, for the axis.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing was tried, or without scores.

    """
    if not trace or all(candidate.own_score is None for candidate in trace):
        raise ValueError("soup_ladder: `trace` must have scored candidates, as that of a greedy soup.")
    rows = [(row, one, one.own_score if one.score is None else one.score) for row, one in enumerate(trace)]
    figure, axes = one("Members of the soup", metric, "")
    figure.set_figheight(max(2.6, 0.36 * len(trace) + 1.4))
    alone = [(one.own_score, row) for row, one, _ in rows if one.own_score is not None]
    axes.plot(*zip(*alone, strict=True), "|", color="0.4", markersize=13, label="alone")
    kinds = ((True, "o", BLUE, BLUE, "accepted"), (False, "X", ORANGE, "white", "refused"))
    for accepted, marker, color, face, label in kinds:
        points = [(score, row) for row, one, score in rows if one.accepted is accepted and score is not None]
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=8, label=f"soup with it, {label}")
    axes.set_yticks(range(len(trace)), [one.name for one in trace], fontsize=9)
    axes.set_ylim(len(trace) - 0.4, -0.6)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, columnspacing=1, handletextpad=0.3)
    return figure


@styled
def corrected_masks(
    images: Tensor, given: Tensor, corrected: Tensor, ignore_index: int = 255, columns: int = 6
) -> Figure:
    """Images with their masks before and after a correction, and what was replaced: those with most of it.

    Args:
        images: ``(N, H, W)`` or ``(N, C, H, W)`` with 1 or 3 channels, of any range.
        given: Masks as given, ``(N, H, W)``.
        corrected: Masks in their place, such as those of ``adele.corrected_mask``, ``(N, H, W)``.
        ignore_index: Of pixels that do not count; they are left white.
        columns: Number of images at most.

    Returns:
        The figure. In its last row a replaced pixel has the colour of its new class, on the image.

    Raises:
        ValueError: If nothing was replaced.

    """
    counted = given != ignore_index
    changed = counted & (given != corrected)
    pixels = changed.flatten(1).sum(1)
    chosen = [int(index) for index in pixels.argsort(descending=True, stable=True)[:columns] if pixels[index]]
    if not chosen:
        raise ValueError("corrected_masks: `corrected` must differ from `given` in a pixel that counts.")
    top = max(int(torch.where(counted, masks, 0).max()) for masks in (given, corrected))
    colours: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": top, "interpolation": "none"}
    figure = Figure(figsize=(1.1 * len(chosen) + 1.0, 4.8))
    panels = figure.subplots(4, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        for line in (0, 3):
            panels[line, column].imshow(picture(images[index]), cmap="gray")
        for line, masks, shown in ((1, given, counted), (2, corrected, counted), (3, corrected, changed)):
            values = torch.where(shown[index], masks[index].double(), math.nan)
            panels[line, column].imshow(values.numpy(), **colours)
        panels[0, column].set_title(str(index), fontsize=9)
    for axes, name in zip(panels[:, 0], ("image", "given", "corrected", "replaced"), strict=True):
        axes.set_ylabel(name, fontsize=9)
    for axes in panels.flat:
        axes.set(xticks=(), yticks=())
        axes.grid(visible=False)
    return figure


@styled
def masks(report: "SparsityReport", log: Log | str | Path | None = None, key: str = "nm_sparsity") -> Figure:
    """How much magnitude the masks of N:M sparsity keep in each layer, and how many weights changed sides.

    Args:
        report: ``sparse.report(model)``.
        log: A log, see :func:`read_log`, or its path, for the flips over time; ``None`` to leave them out.
        key: Log key of the callback.

    Returns:
        The figure.

    Raises:
        ValueError: If no weight is sparse.
        KeyError: If a log is given that has no flips.

    """
    rows = [row for row in report.rows if not row.why_dense and row.pattern != "dense"]
    if not rows:
        raise ValueError("masks: `report` must have a sparse weight, got dense ones only.")
    height = 0.34 * len(rows) + 1.3
    figure = Figure(figsize=(6.0, height + (2.2 if log is not None else 0)))
    panels = figure.subplots(
        1 if log is None else 2, squeeze=False, height_ratios=[height, 2.2][: 1 + (log is not None)]
    )
    axes = panels[0, 0]
    bars = axes.barh([f"{row.name} ({row.pattern})" for row in rows], [100 * row.kept_magnitude for row in rows])
    axes.bar_label(bars, fmt="%.0f %%", label_type="center", color="white", fontsize=9)
    axes.set(xlabel="kept magnitude, %", xlim=(0, 100), title="Masks")
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    if log is not None:
        _curves(panels[1, 0], log, {"flips": f"reg/{key}/flips"})
        panels[1, 0].set(xlabel="step", ylabel="weights that\nchanged sides")
    return figure


@styled
def masks_over_time(log: Log | str | Path, key: str = "nm_sparsity") -> Figure:
    """How much of each layer's mask changed, and how much magnitude it keeps, over the steps: dark is much.

    Args:
        log: A log, see :func:`read_log`, or its path, of ``NMSparsity(log_layers=True)``.
        key: Log key of the callback.

    Returns:
        The figure.

    Raises:
        KeyError: If the log has nothing of single layers.

    """
    log = log if isinstance(log, Mapping) else read_log(log)
    titles = {"flipped": "Weights that changed sides, %", "kept_magnitude": "Kept magnitude, %"}
    curves = {
        part: {n.removeprefix(f"reg/{key}/{part}/"): c for n, c in log.items() if n.startswith(f"reg/{key}/{part}/")}
        for part in titles
    }
    missing = next((part for part in titles if not curves[part]), None)
    if missing:
        raise KeyError(f"the log has no `reg/{key}/{missing}/...`: train with NMSparsity(log_layers=True)")
    heights = [0.3 * len(layers) + 1.0 for layers in curves.values()]
    figure = Figure(figsize=(6.0, sum(heights)))
    for axes, (part, layers) in zip(figure.subplots(2, height_ratios=heights), curves.items(), strict=True):
        steps = sorted({step for at, _ in layers.values() for step in at})
        values = [
            [dict(zip(*curve, strict=True)).get(step, math.nan) * 100 for step in steps] for curve in layers.values()
        ]
        shown = axes.pcolormesh(_edges(steps), range(len(layers) + 1), values, vmin=0)
        figure.colorbar(shown, ax=axes, aspect=8)
        axes.set_yticks([row + 0.5 for row in range(len(layers))], list(layers), fontsize=9)
        axes.set(title=titles[part], xlabel="step")
        axes.invert_yaxis()
        axes.grid(visible=False)
    return figure


def _edges(steps: Sequence[float]) -> list[float]:
    """Where the cells of steps end: in the middle between two, and as far beyond the outer ones."""
    between = [(one + other) / 2 for one, other in pairwise(steps)]
    first, last = (2 * steps[0] - between[0], 2 * steps[-1] - between[-1]) if between else (steps[0] - 1, steps[0] + 1)
    return [first, *between, last]


@styled
def suspects(
    errors: "LabelErrors", images: Tensor | None = None, classes: Sequence[str] | None = None, thumbnails: int = 12
) -> Figure:
    """Which given labels are suspected to be which other ones, with the most confident suspects as thumbnails.

    Args:
        errors: ``elr.label_errors()``.
        images: Training inputs by position in the dataset, ``(N, H, W)`` or ``(N, C, H, W)`` with 1 or 3 channels, of
            any range; ``None`` for no thumbnails.
        classes: Names of the classes; ``None`` for numbers.
        thumbnails: Number of thumbnails at most, in rows of six.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no suspects.

    """
    if not len(errors):
        raise ValueError("suspects: `errors` must have at least one suspected label.")
    number = int(torch.stack([errors.given, errors.suggested]).max()) + 1
    names = [str(one) for one in (classes if classes is not None else range(number))]
    counts = torch.bincount(errors.given * len(names) + errors.suggested, minlength=len(names) ** 2)
    shown = 0 if images is None else min(thumbnails, len(errors))
    lines = -(-shown // 6)
    figure = Figure(figsize=(6.0, 5.0 + 1.25 * lines))
    above, *below = figure.subfigures(
        1 + bool(lines), 1, height_ratios=[5.0, 1.25 * lines][: 1 + bool(lines)], squeeze=False
    )[:, 0]
    title = f"{len(errors)} suspected labels"
    matrix(above.subplots(), counts.view(len(names), -1), names, names, ("suggested label", "given label", title))
    for place, axes in zip(
        range(6 * lines), below[0].subplots(lines, 6, squeeze=False).flat if below else (), strict=True
    ):
        axes.axis("off")
        if images is not None and place < shown:
            axes.imshow(picture(images[errors.index[place]]), cmap="gray")
            axes.set_title(
                f"{names[errors.given[place]]} → {names[errors.suggested[place]]}", fontsize=9, weight="normal"
            )
    return figure


@styled
def forgetting(accuracies: Tensor, tasks: Sequence[str] | None = None) -> Figure:
    """Accuracy on each task after each task, and so what was forgotten when.

    Args:
        accuracies: ``(T, T)``, in row n the accuracies after task n; NaN where a task was not tested. Of
            ``ContinualMetrics``: ``metrics.right / metrics.tested``.
        tasks: Names of the tasks; ``None`` for numbers from 1.

    Returns:
        The figure.

    Raises:
        ValueError: If it is no square matrix.

    """
    if accuracies.dim() != 2 or accuracies.shape[0] != accuracies.shape[1]:
        raise ValueError(f"forgetting: `accuracies` must be of shape (T, T), got {tuple(accuracies.shape)}.")
    names = [str(one) for one in (tasks if tasks is not None else range(1, len(accuracies) + 1))]
    figure = Figure(figsize=(6.0, 0.5 * len(names) + 2.0))
    percent = 100 * accuracies.detach().float().cpu()
    matrix(figure.subplots(), percent, names, names, ("accuracy on task, %", "after task", "What is left of each task"))
    return figure


@styled
def guidance(similarity: Tensor, threshold: float | None = None) -> Figure:
    """How alike a diffusion model's predictions with and without a condition are at each step of a sampler.

    Args:
        similarity: ``(B, S)``, NaN where it was not asked for: ``guided_sample(...).similarity``, of all steps with a
            threshold above 1.
        threshold: Of ``AdaptiveGuidance``, drawn as a line; ``None``: none.

    Returns:
        The figure: a thin curve for each sample, their median, and the threshold.

    Raises:
        ValueError: If there is no row, or no step.

    """
    if similarity.dim() != 2 or not similarity.numel():
        raise ValueError(f"guidance: `similarity` must be of shape (B, S), got {tuple(similarity.shape)}.")
    figure, axes = one("Where guidance still says something", "step", "similarity of both predictions")
    curves, steps = similarity.detach().float().cpu(), list(range(1, similarity.shape[1] + 1))
    for curve in curves:
        axes.plot(steps, curve.tolist(), color=BLUE, alpha=0.3, linewidth=0.8, linestyle="-")
    axes.plot(steps, curves.nanmedian(0).values.tolist(), color=BLUE, label="median")
    if threshold is not None:
        axes.axhline(threshold, color=ORANGE, linestyle="--", label=f"threshold {threshold:g}")
    axes.legend()
    return figure


@styled
def grokking(
    log: Log | str | Path,
    ratios: Mapping[str, Tensor] | None = None,
    key: str = "ipr_monitor",
    bounds: tuple[float, float] = (0.2, 0.5),
) -> Figure:
    """What a network remembers and finds over the steps, and how many of its neurons are periodic: of IPRMonitor.

    Neurons between the bounds are what is left between the two areas. Where accuracy on corrupted labels falls while
    that on test pairs stays, the wrong labels are being unlearned.

    Args:
        log: A log, see :func:`read_log`, or its path.
        ratios: Inverse participation ratios of neurons ``(N,)`` by the name of their network, each in a histogram of
            its own; ``None`` for none.
        key: Log key of the callback.
        bounds: Its ``low`` and ``high``.

    Returns:
        The figure.

    Raises:
        KeyError: If the log has no shares.

    """
    log = log if isinstance(log, Mapping) else read_log(log)
    parts = {"test": "test", "clean": "training, right labels", "corrupted": "training, wrong labels"}
    named = {label: f"reg/{key}/{part}_accuracy" for part, label in parts.items()}
    shown = {label: name for label, name in named.items() if name in log}
    labels = [*([("step", "accuracy")] if shown else []), ("step", "share of neurons")]
    figure = Figure(figsize=(6.0, 2.5 * len(labels) + 1.7 * len(ratios or {})))
    panels = list(figure.subplots(len(labels) + len(ratios or {}), squeeze=False)[:, 0])
    for axes, (x, y) in zip(panels, labels, strict=False):
        axes.set(xlabel=x, ylabel=y, ylim=(0, 1.02), xmargin=0)
    if shown:
        _curves(panels[0], log, shown)
    _shares(panels[len(labels) - 1], log, key, bounds)
    panels[0].set_title("Grokking")
    for axes, (name, values) in zip(panels[len(labels) :], (ratios or {}).items(), strict=True):
        axes.hist(values.detach().float().cpu().numpy(), bins=[place / 40 for place in range(41)], color=BLUE)
        for bound in bounds:
            axes.axvline(bound, color="0.3", linestyle=":", linewidth=1.2)
        axes.set(title=name, xlabel="inverse participation ratio", ylabel="neurons", xlim=(0, 1))
    return figure


def _shares(axes: Axes, log: Log, key: str, bounds: tuple[float, float]) -> None:
    """Low ones from below, high ones from above, in two greys as well."""
    low, high = (f"reg/{key}/share_{part}" for part in ("low", "high"))
    missing = next((name for name in (low, high) if name not in log), None)
    if missing:
        raise KeyError(f"the log has no `{missing}`; it has {', '.join(sorted(log)) or 'nothing'}")
    axes.fill_between(*log[low], color=ORANGE, alpha=0.5, label=f"ratio below {bounds[0]:g}")
    steps, shares = log[high]
    above = [1 - share for share in shares]
    axes.fill_between(steps, above, 1, color=BLUE, label=f"ratio from {bounds[1]:g}")
    axes.legend(frameon=True, framealpha=0.9)


def _curves(axes: Axes, log: Log | str | Path, names: Mapping[str, str]) -> None:
    log = log if isinstance(log, Mapping) else read_log(log)
    for label, name in names.items():
        if name not in log:
            raise KeyError(f"the log has no `{name}`; it has {', '.join(sorted(log)) or 'nothing'}")
        axes.plot(*log[name], label=label, marker="." if len(log[name][0]) < 20 else None)
    if len(names) > 1:
        axes.legend()
