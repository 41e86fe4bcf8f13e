"""The fit around SoupAverager: setups that are refused, a folder for files, the checkpoints that are kept."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.averaging._checkpoint_files import open_checkpoint
from lightning_reg.averaging._state_dicts import key_of, plain_keys
from lightning_reg.averaging.model_soups._arguments import SoupArguments
from lightning_reg.averaging.model_soups._gathered import Ingredient, Snapshots
from lightning_reg.averaging.model_soups._live_weights import LiveWeights, averaged_tensors
from lightning_reg.averaging.model_soups._soup import fault_of_shapes, weights_of_state
from lightning_reg.averaging.model_soups.core import gaussian_epoch_weights
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.names import is_selected
from lightning_reg.engine.run.phases import OnModules

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "KeptCheckpoints",
    "check_setup",
    "check_state",
    "chosen_tensors",
    "kept_checkpoints",
    "new_folder",
    "why_it_keeps",
]


def check_setup(soup: SoupArguments, trainer: "Trainer") -> None:
    """Refuses setups in which the average would be wrong or never made."""
    _check_strategy(soup, type(trainer.strategy).__name__)
    if soup.method == "greedy" and not trainer.enable_validation:
        raise MisconfigurationException(
            f"SoupAverager(method='greedy') decides by the validation metric {soup.monitor or 'val_acc'!r}, but this"
            " fit has no validation. Give `fit` validation data and the module a `validation_step` that logs it, or"
            " take method='uniform' or 'lawa'."
        )
    everyone: list[object] = list(host.callbacks(trainer))
    after = everyone[next((i for i, callback in enumerate(everyone) if callback is soup), len(everyone)) :]
    if soup.swap_for_validation and any(isinstance(callback, ModelPruning) for callback in after):
        raise MisconfigurationException(
            "SoupAverager(swap_for_validation=True): ModelPruning writes the module's own weights into checkpoints, in"
            " place of the average. Put ModelPruning before SoupAverager among the callbacks."
        )
    savers = [callback for callback in host.callbacks(trainer) if hasattr(callback, "best_k_models")]
    if soup.method == "gaussian" and 0 < (trainer.max_epochs or 0) < (soup.mean_epoch or 0):
        raise MisconfigurationException(
            f"SoupAverager(method='gaussian', mean_epoch={soup.mean_epoch:g}) lies beyond the last epoch of"
            f" Trainer(max_epochs={trainer.max_epochs}). Paper: three quarters of them."
        )
    if soup.from_checkpoints and not savers:
        raise MisconfigurationException(
            "SoupAverager(from_checkpoints=True) takes the checkpoints that ModelCheckpoint keeps, but there is none"
            " among the callbacks. Add `ModelCheckpoint(monitor=..., save_top_k=5)`."
        )
    if any(getattr(saver, "save_weights_only", False) for saver in savers):
        host.rank_zero_warn(
            "SoupAverager: Lightning calls no callback for files of ModelCheckpoint(save_weights_only=True), so those"
            " written while training runs hold the raw weights, without the average and without a word about it. The"
            " average is in the module when the fit ends: `trainer.save_checkpoint(path, weights_only=True)`."
        )


def _check_strategy(soup: SoupArguments, strategy: str) -> None:
    if strategy.startswith(("FSDP", "DeepSpeed", "XLAFSDP")):
        raise MisconfigurationException(
            f"SoupAverager: {strategy} splits parameters into pieces that are no tensors of their own."
            " Use DDP or ModelParallelStrategy (`fully_shard`), or average consolidated checkpoints afterwards:"
            " `lightning-reg soup uniform A.ckpt B.ckpt --out soup.ckpt`."
        )
    if not strategy.startswith("ModelParallel"):
        return
    for name, is_set in (
        ('keep="disk"', soup.keep == "disk"),
        ("from_checkpoints=True", soup.from_checkpoints),
        ("swap_for_validation=True", soup.swap_for_validation),
    ):
        if is_set:
            raise MisconfigurationException(
                f"SoupAverager({name}) works on files of whole models; under {strategy} each process has shards only."
                " Leave that argument out: the shards' average is kept in memory, and checkpoints hold it whole."
            )


def why_it_keeps(soup: SoupArguments, trainer: "Trainer", epochs: int, taken: int, left_out: int) -> str:
    """Why the module keeps its weights when a fit ends, as a clause; "" if there is an average.

    Args:
        soup: The averager.
        trainer: The Trainer.
        epochs: Epochs that have ended.
        taken: How many snapshots or updates there are.
        left_out: How many there were that are not finite.

    Returns:
        The clause.

    """
    if not taken:
        return (
            f"the fit ended before the first {'finite ' if left_out else ''}snapshot (start_step={soup.start_step},"
            f" every_n_epochs={soup.every_n_epochs}, every_n_steps={soup.every_n_steps})"
        )
    if soup.method != "gaussian" or soup.mean_epoch is None or soup.std_epochs is None:
        return ""
    most = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
    all_of_them = gaussian_epoch_weights(most or max(epochs, int(soup.mean_epoch)), soup.mean_epoch, soup.std_epochs)
    held = float(all_of_them[:epochs].sum())
    if held >= _LEAST_MASS:
        return ""
    return (
        f"the fit ended after epoch {epochs}, and epochs around {soup.mean_epoch:g} (mean_epoch, std_epochs="
        f"{soup.std_epochs:g}) were to count: those that there were have {held:.1g} of the weight"
    )


_LEAST_MASS = 1e-3


def chosen_tensors(soup: SoupArguments, trainer: "Trainer", module: nn.Module) -> dict[str, Tensor]:
    """What is averaged.

    Args:
        soup: Chooses by ``include`` and ``exclude``.
        trainer: Whose techniques' own modules are averaged too, but for the average of files.
        module: The user's.

    Returns:
        Live tensors of the module, and of what techniques train beside it, by name.

    Raises:
        MisconfigurationException: If there is none, or a pattern matches nothing.

    """
    tensors = averaged_tensors(module)
    owners = [t for t in host.callbacks(trainer) if isinstance(t, OnModules) and not soup.from_checkpoints]
    tensors |= {f"{t.state_key}/{name}": p for t in owners for name, p in t.own.parameters.items()}
    chosen = {name: t for name, t in tensors.items() if is_selected(name, soup.include, soup.exclude)}
    if not chosen:
        raise MisconfigurationException(
            f"SoupAverager: there is nothing to average; `include` {soup.include} and `exclude` {soup.exclude}"
            " leave no floating-point parameter."
        )
    for argument, patterns in (("include", soup.include), ("exclude", soup.exclude)):
        check_patterns(soup, argument, patterns, tensors, "parameter or batch statistic")
    return chosen


def check_state(state: Mapping[str, Any], live: LiveWeights) -> None:
    """Refuses a checkpoint's state that is of other tensors than those that are averaged."""
    held = {name for values in weights_of_state(state) for name in values}
    other = sorted(held.symmetric_difference(live.tensors)) if held else []
    shapes = {name: tuple(tensor.shape) for name, tensor in live.tensors.items() if name not in live.layouts}
    fault = fault_of_shapes(state, shapes)
    if other:
        what = "held in it, and not averaged here" if other[0] in held else "averaged here, and not held in it"
        fault = f"{other[0]!r} is {what}. Are `include` and `exclude` the same?"
    if fault:
        raise MisconfigurationException(f"SoupAverager: the checkpoint's state cannot be gone on with: {fault}")


def new_folder(trainer: "Trainer", dirpath: str | None) -> Path:
    """A new folder, the same on all ranks, in a given one or in the Trainer's."""
    root = Path(dirpath or trainer.default_root_dir)
    name = ""
    if trainer.is_global_zero:
        root.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix="soup-", dir=root)
    return Path(trainer.strategy.broadcast(name))


def kept_checkpoints(trainer: "Trainer", monitor: str, names: Iterable[str]) -> "KeptCheckpoints":
    """The checkpoints that ModelCheckpoint keeps.

    Args:
        trainer: The Trainer.
        monitor: Scores of savers with this metric count.
        names: The averaged tensors.

    Returns:
        They, by file name.

    """
    trainer.strategy.barrier("the last checkpoint is written")
    scores: dict[str, float | None] = {}
    for saver in host.callbacks(trainer):
        same = getattr(saver, "monitor", None) == monitor
        for path, value in getattr(saver, "best_k_models", {}).items():
            scores[str(path)] = float(value) if same else None
    return KeptCheckpoints(scores, names)


class KeptCheckpoints(Snapshots):
    """The averaged tensors of checkpoints, by file name.

    Args:
        scores: Of each file, by its path; ``None`` if it is not known.
        names: The averaged tensors.

    """

    def __init__(self, scores: Mapping[str, float | None], names: Iterable[str]) -> None:
        self._names = list(names)
        self._paths = sorted(scores, key=lambda path: Path(path).name)
        self.ingredients = [Ingredient(Path(path).name, 0, scores[path]) for path in self._paths]

    @override
    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        file = open_checkpoint(self._paths[position])
        keys = plain_keys(file, str(self._paths[position]))
        places = {name: key_of(name, keys) for name in self._names}
        missing = [name for name, key in places.items() if key is None]
        if missing:
            raise MisconfigurationException(
                f"SoupAverager: the checkpoint {self._paths[position]} lacks {missing[:5]}, so it cannot be averaged."
            )
        return {name: file[key] for name, key in places.items() if key is not None}
