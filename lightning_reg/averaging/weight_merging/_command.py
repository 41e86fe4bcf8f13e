"""``lightning-reg soup {wise-ft,ties,dare,slerp}``: mixes of few checkpoints from the command line."""

from collections.abc import Sequence
from typing import Any

import torch

from lightning_reg.averaging._checkpoint_files import CheckpointFile
from lightning_reg.averaging._file_bars import counted_files
from lightning_reg.averaging._soup_command import Evaluate, add_methods, mix_files
from lightning_reg.averaging._soup_results import SoupResult
from lightning_reg.averaging.weight_merging.core import dare_merge, slerp_merge, ties_merge, wise_ft
from lightning_reg.engine.host.commands import Commands, Options

__all__ = ["add_command"]

_METHODS = {
    "wise-ft": "interpolation from the first checkpoint (before fine-tuning) to the second",
    "ties": "task vectors on the first checkpoint, trimmed, signs elected",
    "dare": "task vectors on the first checkpoint, entries dropped at random",
    "slerp": "position on the arc from the first checkpoint to the second",
}


def add_command(commands: Commands) -> None:
    """Adds the mixes to ``lightning-reg soup``.

    Args:
        commands: Of ``lightning-reg``.

    """
    parsers = add_methods(commands, _METHODS, _make)
    parsers["wise-ft"].add_argument("--alpha", type=float, default=0.5, help="0 is the first, 1 the second")
    parsers["slerp"].add_argument("--t", type=float, default=0.5, help="0 is the first, 1 the second")
    for name, density in (("ties", 0.2), ("dare", 0.5)):
        parsers[name].add_argument("--density", type=float, default=density, help="share of a task vector that stays")
        parsers[name].add_argument("--weights", type=float, nargs="+", help="a number per model after the first")
        parsers[name].add_argument("--lam", type=float, default=1.0, help="factor of the merged task vector")
    parsers["dare"].add_argument(
        "--rescale", choices=("density", "norm"), default="density", help="what keeps its size"
    )
    parsers["dare"].add_argument("--elect-signs", action="store_true", help="elect signs as ties does")
    parsers["dare"].add_argument("--seed", type=int, default=0, help="of what is dropped")


def _make(method: str, options: Options, evaluate: Evaluate | None) -> SoupResult:
    return mix_files(method, options, evaluate, lambda files: _mix(method, options, files))


def _mix(method: str, options: Options, files: Sequence[CheckpointFile]) -> dict[str, Any]:
    if len(files) < 2 or (method in ("wise-ft", "slerp") and len(files) != 2):
        raise ValueError(f"{method} takes two checkpoints (ties and dare: two or more), got {len(files)}.")
    with counted_files(files, f"{method} of {len(files)} files", shown=True) as members:
        return _mixed(method, options, members)


def _mixed(method: str, options: Options, files: Sequence[CheckpointFile]) -> dict[str, Any]:
    if method == "wise-ft":
        return wise_ft(files[0], files[1], options.alpha, exclude=options.exclude)
    if method == "slerp":
        return slerp_merge(files[0], files[1], options.t, exclude=options.exclude)
    if method == "ties":
        return ties_merge(files[0], files[1:], options.density, options.weights, options.lam, exclude=options.exclude)
    return dare_merge(
        files[0],
        files[1:],
        options.density,
        options.weights,
        options.lam,
        rescale=options.rescale,
        elect_signs=options.elect_signs,
        generator=torch.Generator().manual_seed(options.seed),
        exclude=options.exclude,
    )
