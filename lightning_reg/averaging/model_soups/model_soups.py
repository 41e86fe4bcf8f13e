"""SoupAverager: averages of the weights that one fit passes through."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging._checkpoint_files import RECORD
from lightning_reg.averaging._soup_results import Candidate
from lightning_reg.averaging.model_soups._arguments import (
    check_arguments,
    describe,
    mode_of,
    new_soup,
    schedule,
    score_by,
    share_of_epoch,
)
from lightning_reg.averaging.model_soups._gathered import Gathered, Shelf, Snapshots
from lightning_reg.averaging.model_soups._live_weights import LiveWeights, own_parts
from lightning_reg.averaging.model_soups._setup import (
    check_setup,
    check_state,
    chosen_tensors,
    kept_checkpoints,
    new_folder,
    why_it_keeps,
)
from lightning_reg.averaging.model_soups._soup import average_of_state, fault_of_state
from lightning_reg.averaging.model_soups._validation import Validation, agreed_score
from lightning_reg.averaging.model_soups.files import exchange_in_checkpoint
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.run.watching import progress, told
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["SoupAverager"]

_NO_NUMBER = "no snapshot has a score that is a number"


class SoupAverager(Technique):
    r"""Averages of the weights that one fit passes through: greedy soup, uniform soup, LAWA, EMA, SWA, gaussian.

    - ``"greedy"``: snapshots are ranked by the validation metric; the soup starts as the best one and takes each
      further one in that makes it better on the validation set. Never worse there than the best snapshot.
    - ``"uniform"``: mean of all snapshots. ``"lawa"``: mean of the ``last_k`` latest.
    - ``"swa"``: mean of the weights from ``start_step`` on. ``"ema"``: :math:`\bar\theta \leftarrow d\,\bar\theta +
      (1-d)\,\theta`.
    - ``"gaussian"``: mean of the weights at the ends of epochs, each with the weight
      :math:`\exp(-(t - \mu)^2 / 2 s^2)`; of those that there were, if the fit ends early.

    When the fit ends, the module holds the average (``load_at_end``), with the statistics of its batch-norm layers
    estimated anew on training batches; the raw weights are in :attr:`raw_weights`. Checkpoints say what they hold
    under ``lightning_reg``; ``load_averaged`` gets the average out of any of them, without a Trainer. A run resumed
    from a checkpoint goes on with the raw weights. Another fit without a checkpoint begins anew, from the weights that
    the module holds.

    Weights that are not finite are left out and counted (``not_finite`` in the log), and a snapshot whose score is NaN
    ranks last and is never taken, with a warning. Averaged are floating-point parameters and the statistics of batch
    norm; other buffers stay the module's own. What techniques train beside the module (prompts, a projection) is
    averaged with it, under names such as ``"DeepPrompts/..."``, and is in no file of weights. Optimizer states are not
    averaged: training on from a soup needs a new optimizer.

    Source:
        Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, recipe 1 (greedy); Kaddour, "Stop wasting my
        time!", arXiv 2209.14981 (LAWA); Izmailov et al., "Averaging weights leads to wider optima and better
        generalization", UAI 2018, arXiv 1803.05407 (SWA); Khattak, Wasim et al., "Self-regulating Prompts", ICCV
        2023, arXiv 2307.06948 (gaussian).

    Differs:
        Ingredients are snapshots of one run, where the soups paper takes the ends of several (for those there is
        ``make_soup``). A candidate is accepted if strictly better, as in the authors' code; the paper's text has
        "at least as good" (``strict=False``). Sums are divided once instead of averages being updated. SWA's learning
        rate is left to the user's scheduler. The gaussian average is kept in float64 and lost in no resume, where the
        authors' is in float16, frozen weights and all.

    Memory: greedy and LAWA keep a copy of the weights per snapshot, in host memory and in each checkpoint
    (``keep="disk"``: in files; a checkpoint has their names). Uniform, gaussian and SWA keep a sum in float64, EMA one
    float32 copy. At the end there are two models more. Under DDP every rank averages, and scores are the mean over the
    ranks, so all decide the same. Under ``ModelParallelStrategy`` (``fully_shard``, tensor parallelism) every rank
    averages its own shards and :attr:`raw_weights` holds those; asking for the state, as a checkpoint does, gathers
    whole tensors on all ranks, one after the other, in host memory. FSDP1 and DeepSpeed are refused.

    Args:
        method: What to average.
        monitor: Name of the metric that validation logs. ``"greedy"`` decides by it; other averages are scored by it,
            if it is logged, before and after their batch statistics are estimated anew. ``None``: ``"val_acc"``, or
            ``"val_loss"`` where that is not logged.
        mode: Whether a larger (``"max"``) or smaller metric is better. ``None``: a smaller one if its name has "loss"
            or "error" in it.
        every_n_epochs: Snapshot at the end of each n-th epoch, at least 1. ``None``: every one for ``"greedy"``,
            ``"uniform"``, ``"lawa"``, ``"gaussian"``, unless ``every_n_steps`` is given.
        every_n_steps: Snapshot or update after each n-th batch with an optimizer step, at least 1. ``None``: every one
            for ``"ema"`` and ``"swa"``, unless ``every_n_epochs`` is given.
        from_checkpoints: Whether the snapshots are the checkpoints that ``ModelCheckpoint`` keeps (``"greedy"`` and
            ``"uniform"``).
        start_step: Optimizer steps before the first snapshot, at least 0.
        last_k: Number of latest snapshots to keep, at least 1; ``None`` for all (10 for ``"lawa"``). Neutral: 1 with
            ``"lawa"``.
        max_ingredients: Largest number of ingredients of a greedy soup, at least 1; ``None`` for no limit.
        min_delta: By how much a candidate must beat the best score, at least 0. Paper: 0.
        strict: Whether an equal score is not enough.
        greedy_at: ``"end"`` ranks all snapshots when the fit ends. ``"snapshot"`` decides at once: a snapshot joins,
            replaces the soup, or is dropped, whichever scores best. It keeps one sum instead of all snapshots.
        decay: d of ``"ema"``, in [0, 1); ``None`` for 0.999, or for what ``half_life_steps`` says.
        half_life_steps: Updates after which a weight counts half in ``"ema"``, in (0, 1e7], in place of ``decay``.
        warmup_steps: Updates during which ``"ema"`` is at most as slow as the plain mean, at least 0.
        mean_epoch: :math:`\mu` of ``"gaussian"``, at least 1: the epoch that counts most, the first is 1. Paper: 15 or
            6 of 20, 30 or 45 of 50.
        std_epochs: s of ``"gaussian"``, in epochs, above 0. Paper: 1 or 10 of 20, 30 or 5 of 50.
        bn_update_batches: Training batches to estimate batch statistics on, at least 0; ``None`` for one epoch. Only
            used if there are batch-norm layers.
        include: Patterns of parameters to average (``["net.*"]``), or one pattern; ``None`` for all. Others stay as
            trained.
        exclude: Patterns of parameters to leave out.
        keep: Where snapshots are kept.
        dirpath: Where their folder is made, on a disk that all ranks see; ``None`` for the Trainer's
            ``default_root_dir``.
        keep_files: Whether all files stay, those beyond ``last_k`` and when the fit ends. Without it, of those beyond
            ``last_k`` only the ones stay that the last two checkpoints name.
        swap_for_validation: Whether validation sees the average once there is one (not for ``"greedy"``). Checkpoints
            then hold the average as ``state_dict`` and the raw weights in the callback's state.
        load_at_end: Whether the module holds the average when the fit ends; else :meth:`averaged_weights` has it.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range, or two contradict each other.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> soup = SoupAverager(method="greedy", monitor="val_acc", last_k=8)
        >>> trainer = Trainer(max_epochs=20, callbacks=[soup], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        method: Literal["uniform", "greedy", "lawa", "ema", "swa", "gaussian"] = "greedy",
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        from_checkpoints: bool = False,
        start_step: int = 0,
        last_k: int | None = None,
        max_ingredients: int | None = None,
        min_delta: float = 0.0,
        strict: bool = True,
        greedy_at: Literal["end", "snapshot"] = "end",
        decay: float | None = None,
        half_life_steps: float | None = None,
        warmup_steps: int = 0,
        mean_epoch: float | None = None,
        std_epochs: float | None = None,
        bn_update_batches: int | None = None,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        keep: Literal["cpu", "disk"] = "cpu",
        dirpath: str | None = None,
        keep_files: bool = False,
        swap_for_validation: bool = False,
        load_at_end: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.method, self.monitor, self.mode = method, monitor, mode
        self.every_n_epochs, self.every_n_steps, self.from_checkpoints = every_n_epochs, every_n_steps, from_checkpoints
        self.start_step, self.last_k, self.max_ingredients = start_step, last_k, max_ingredients
        self.min_delta, self.strict, self.greedy_at = min_delta, strict, greedy_at
        self.decay, self.half_life_steps, self.mean_epoch = decay, half_life_steps, mean_epoch
        self.std_epochs, self.warmup_steps = std_epochs, warmup_steps
        self.bn_update_batches, self.include, self.exclude = bn_update_batches, include, exclude
        self.keep, self.dirpath, self.keep_files = keep, dirpath, keep_files
        self.swap_for_validation, self.load_at_end = swap_for_validation, load_at_end
        check_arguments(self)
        self._live = LiveWeights()
        self._resumed = False
        self._begin()

    def _begin(self) -> None:
        self._every_epochs, self._every_steps = schedule(self)
        self._soup = new_soup(self)
        self._steps, self._last_step, self._epochs = 0, 0, 0
        self._has_missed_end = False
        self._raw: dict[str, Tensor] = {}  # what the average in the module stands in for
        self._average: dict[str, Tensor] = {}  # where the module does not hold it at the end
        self._masks: dict[str, Tensor] = {}  # of a checkpoint, for files from before

    @override
    def describe(self) -> str:
        return describe(self)

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        check_setup(self, trainer)

    @override
    def conflict_with(self, other: Member) -> str | None:
        if type(other) is type(self) and self.load_at_end and getattr(other, "load_at_end", False):
            return "each puts its average into the module when the fit ends. Give all but one `load_at_end=False`."
        if self.swap_for_validation and "edit_weights" in phases_of(other):
            return "`swap_for_validation` would validate the average without the other's edits. Set it to False."
        return None

    @override
    def is_active(self, step: "Step") -> bool:
        if self._has_missed_end:
            self._make_up_for_end(step.trainer, step.module)
        return False  # nothing happens within a step

    # -- while training runs ------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if not self._resumed:
            self._begin()
        self._live = LiveWeights(pl_module, chosen_tensors(self, trainer, pl_module), self._masks)
        shelf = self._soup.gathered
        if self.keep == "disk" and isinstance(shelf, Shelf) and shelf.folder is None:
            shelf.folder = new_folder(trainer, self.dirpath)

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        saved_whole = self._live.layouts if self._resumed else {}
        if self._resumed:
            check_state({**self._soup.state(), "soup": self._average}, self._live)
        self._soup.gathered.follow(self._live.tensors, saved_whole)
        if self._resumed and self._raw:  # the checkpoint's `state_dict` is an average; training goes on without it
            self._live.find_shards()
            self._live.overwrite(own_parts(self._raw, saved_whole))
        # Lightning does not end an epoch again whose checkpoint was written after its last batch.
        self._has_missed_end = self._resumed and trainer.current_epoch > self._epochs
        self._epochs = self._epochs if self._resumed else trainer.current_epoch
        self._resumed, self._raw, self._average, self._soup.outcome = False, {}, {}, None
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # gradients are being accumulated
        self._last_step = trainer.global_step
        self._steps += 1
        if self._every_steps and self._steps % self._every_steps == 0 and self._steps > self.start_step:
            self._take(trainer, pl_module, trainer.current_epoch)
        if host.is_logging_step(trainer):
            attached_engine(trainer).log_own(self, self._soup.gathered.counts(pl_module.device))

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._end_epoch(trainer, pl_module, trainer.current_epoch)

    def _end_epoch(self, trainer: "Trainer", module: "LightningModule", epoch: int) -> None:
        if epoch < self._epochs:
            return  # resumed under `max_steps`, Lightning ends an epoch twice
        self._epochs = epoch + 1
        self._live.find_masks()
        due = self._every_epochs is not None and self._epochs % self._every_epochs == 0
        if due and self._steps > self.start_step:
            self._take(trainer, module, epoch)
        self._soup.gathered.left_out.say()

    def _make_up_for_end(self, trainer: "Trainer", module: "LightningModule") -> None:
        # Not in `on_train_start`: other callbacks may put other weights into the module there.
        self._has_missed_end = False
        self._end_epoch(trainer, module, trainer.current_epoch - 1)

    def _take(self, trainer: "Trainer", module: "LightningModule", epoch: int) -> None:
        self._live.find_shards()
        step = trainer.global_step
        self._soup.take(
            f"epoch={epoch:03d}-step={step:07d}",
            step,
            self._live.tensors,
            self._validation(trainer, module).score_of,
            write=trainer.is_global_zero,
            share=share_of_epoch(self, epoch + 1),
        )

    def _validation(self, trainer: "Trainer", module: "LightningModule") -> Validation:
        return Validation(trainer, module, self._live, self._score_by, self.bn_update_batches)

    def _score_by(self, metrics: Mapping[str, Any]) -> str:
        metric = score_by(self, metrics)
        self._soup.rules = replace(self._soup.rules, mode=mode_of(self, metric))
        return metric

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        gathered = self._soup.gathered
        if self.swap_for_validation and gathered.taken and self._live.tensors and not trainer.sanity_checking:
            with torch.inference_mode(False):
                self._live.put(gathered.average())

    @override
    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._live.restore()
        self._live.find_masks()
        if self.method == "greedy" and self._live.tensors and not trainer.sanity_checking:
            score = agreed_score(trainer.callback_metrics, self._score_by(trainer.callback_metrics), pl_module)
            self._soup.note_validation(trainer.global_step, score)

    # -- when it ends -------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._has_missed_end:  # resumed after the last batch of all
            self._make_up_for_end(trainer, pl_module)
        self._live.find_shards()
        self._live.find_masks()
        source = self._source(trainer)
        self._soup.gathered.left_out.say()
        if why := why_it_keeps(self, trainer, self._epochs, source.taken, self._soup.gathered.left_out.read()):
            self._say_it_keeps(_NO_NUMBER if self._soup.trace and not source.taken else why)
        else:
            self._finish(trainer, source, self._validation(trainer, pl_module))
        if isinstance(source, Shelf):
            trainer.strategy.barrier("every rank has read the ingredients")
            if trainer.is_global_zero:
                source.clean_up()

    @staticmethod
    def _say_it_keeps(why: str) -> None:
        host.rank_zero_warn(f"SoupAverager: {why}: the module keeps its weights.")

    def _finish(self, trainer: "Trainer", source: Gathered | Snapshots, validation: Validation) -> None:
        most = 2 * source.taken if self.method == "greedy" and isinstance(source, Snapshots) else 0
        with progress(trainer, "SoupAverager: candidates", most) as advance:
            scores = told(validation.own_score, advance), told(validation.score_of, advance)
            outcome, average = self._soup.finish(source, *scores)
        if not average:
            self._say_it_keeps(_NO_NUMBER)
            return
        average = self._live.alike(average)
        if outcome.count > 1 and validation.estimates:
            outcome.before_batch_norm, score = validation.settle(average, rescore=self.method != "greedy")
            outcome.score = outcome.score if score is None else score
        self._soup.outcome = outcome
        metrics = {f"{self.log_key}/{name}": value for name, value in outcome.metrics().items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if self.load_at_end:
            self._raw = self._live.on_cpu()
            self._live.overwrite(average)
        else:
            self._average = {name: value.detach().to("cpu", copy=True) for name, value in average.items()}

    def _source(self, trainer: "Trainer") -> Gathered | Snapshots:
        if self.from_checkpoints:
            return kept_checkpoints(trainer, self._score_by(trainer.callback_metrics), self._live.tensors)
        if isinstance(self._soup.gathered, Shelf):
            trainer.strategy.barrier("the last ingredient is written")
        return self._soup.gathered

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._live.let_go()
        self._soup.gathered.let_go()

    # -- what came of it ----------------------------------------------------------------------------------------------

    @property
    def trace(self) -> list[Candidate]:
        """Decisions of the greedy soup, in order."""
        return self._soup.trace

    @property
    def ingredients(self) -> list[str]:
        """Names of the snapshots in the average, where it is one of snapshots; greedy: in the order of joining."""
        return self._soup.ingredients

    @property
    def score(self) -> float | None:
        """Validation score of the greedy soup; of another average where :attr:`score_before_batch_norm` is."""
        return self._soup.score

    @property
    def score_before_batch_norm(self) -> float | None:
        """The same before the batch statistics were estimated anew; ``None`` without batch norm."""
        return None if self._soup.outcome is None else self._soup.outcome.before_batch_norm

    @property
    def raw_weights(self) -> dict[str, Tensor]:
        """The averaged tensors' own last values, on the CPU, while the module holds the average; else empty."""
        return dict(self._raw)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The average as it is now, where the module does not hold it.

        Returns:
            Averaged tensors by name; a copy.

        Raises:
            RuntimeError: If there is none, or the module holds it.

        """
        if self._soup.outcome is not None and self.load_at_end:
            raise RuntimeError("SoupAverager: the module holds the average; `raw_weights` has what it held before.")
        if self._average:
            return {name: value.clone() for name, value in self._average.items()}
        return average_of_state(self.state_dict())

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        places = {"steps": self._steps, "epochs": self._epochs}
        state = self._live.whole({**places, **self._soup.state(), "raw": self._raw, "soup": self._average})
        masks = self._live.masks() if self.keep == "disk" else {}
        return {**state, "masks": masks} if masks else state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if fault := fault_of_state(state_dict):
            raise MisconfigurationException(f"SoupAverager: the checkpoint's state cannot be gone on with: {fault}")
        if state_dict["method"] != self.method:
            raise MisconfigurationException(
                f"SoupAverager(method={self.method!r}): the checkpoint holds the state of method="
                f"{state_dict['method']!r}. Go on with that one, or train without `ckpt_path`."
            )
        self._steps, self._epochs, self._resumed = state_dict["steps"], state_dict["epochs"], True
        self._raw, self._average = dict(state_dict["raw"]), dict(state_dict["soup"])
        self._masks = dict(state_dict.get("masks", {}))
        try:
            self._soup.load(state_dict)
        except FileNotFoundError as error:
            raise MisconfigurationException(str(error)) from error

    @override
    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        if isinstance(self._soup.gathered, Shelf):
            self._soup.gathered.note_checkpoint(write=trainer.is_global_zero)
        swaps = self.swap_for_validation and self._soup.outcome is None and self._soup.gathered.taken > 0
        if swaps:
            raw = exchange_in_checkpoint(checkpoint, self._live.pruned(self._soup.gathered.average()))
            checkpoint["callbacks"][self.state_key]["raw"] = raw
        record = self._soup.record(averaged=swaps or bool(self._raw))
        checkpoint.setdefault(RECORD, {})[self.state_key] = record

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_live": LiveWeights()}  # the module's tensors are not this callback's
