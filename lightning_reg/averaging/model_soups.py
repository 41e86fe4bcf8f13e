"""Model soups: averages of the weights of one run, or of several runs from one start."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.averaging import _in_fit, _setup
from lightning_reg.averaging._across_runs import load_averaged, make_soup
from lightning_reg.averaging._ancestry import ancestry
from lightning_reg.averaging._batch_norm import reestimate_batchnorm
from lightning_reg.averaging._checkpoint_files import RECORD
from lightning_reg.averaging._collectors import Exchange, Ingredient, Shelf, averaged_tensors, ema_decay
from lightning_reg.averaging._evaluation import TrainerEvaluation
from lightning_reg.averaging._greedy import Candidate, SoupResult, greedy_soup
from lightning_reg.averaging._learned import LearnedSoup
from lightning_reg.averaging._merging import dare_merge, slerp_merge, ties_merge, wise_ft
from lightning_reg.averaging._shards import Layouts, layouts_of, local_parts, own_parts, whole
from lightning_reg.averaging._state_dicts import average_state_dicts
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import Technique
from lightning_reg.engine.weights.shards import reshard_

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = [
    "LearnedSoup",
    "SoupAverager",
    "SoupResult",
    "TrainerEvaluation",
    "ancestry",
    "average_state_dicts",
    "dare_merge",
    "ema_decay",
    "greedy_soup",
    "load_averaged",
    "make_soup",
    "reestimate_batchnorm",
    "slerp_merge",
    "ties_merge",
    "wise_ft",
]


class SoupAverager(Technique):
    r"""Averages of the weights that one fit passes through: greedy soup, uniform soup, LAWA, EMA, SWA.

    - ``"greedy"``: snapshots are ranked by the validation metric; the soup starts as the best one and takes each
      further one in that makes it better on the validation set. Never worse there than the best snapshot.
    - ``"uniform"``: mean of all snapshots. ``"lawa"``: mean of the ``last_k`` latest.
    - ``"swa"``: mean of the weights from ``start_step`` on. ``"ema"``: :math:`\bar\theta \leftarrow d\,\bar\theta +
      (1-d)\,\theta`.

    When the fit ends, the module holds the average (``load_at_end``), with the statistics of its batch-norm layers
    estimated anew on training batches; the raw weights are in :attr:`raw_weights`. Checkpoints say what they hold
    under ``lightning_reg``; ``load_averaged`` gets the average out of any of them, without a Trainer. A run resumed
    from a checkpoint goes on with the raw weights. Another fit without a checkpoint begins anew, from the weights that
    the module holds.

    Averaged are floating-point parameters and the statistics of batch norm; other buffers stay the module's own.
    Optimizer states are not averaged: training on from a soup needs a new optimizer.

    Source:
        Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, recipe 1 (greedy); Kaddour, "Stop wasting my
        time!", arXiv 2209.14981 (LAWA); Izmailov et al., "Averaging weights leads to wider optima and better
        generalization", UAI 2018, arXiv 1803.05407 (SWA).

    Differs:
        Ingredients are snapshots of one run, where the soups paper takes the ends of several (for those there is
        ``make_soup``). A candidate is accepted if strictly better, as in the authors' code; the paper's text has
        "at least as good" (``strict=False``). Sums are divided once instead of averages being updated. SWA's learning
        rate is left to the user's scheduler.

    Memory: greedy and LAWA keep a copy of the weights per snapshot, in host memory and in each checkpoint
    (``keep="disk"``: in files; a checkpoint has their names). Uniform and SWA keep a sum in float64, EMA one float32
    copy. At the end there are two models more. Under DDP every rank averages, and scores are the mean over the ranks,
    so all decide the same. Under ``ModelParallelStrategy`` (``fully_shard``, tensor parallelism) every rank averages
    its own shards and :attr:`raw_weights` holds those; asking for the state, as a checkpoint does, gathers whole
    tensors on all ranks, one after the other, in host memory. FSDP1 and DeepSpeed are refused.

    Args:
        method: What to average.
        monitor: Name of the metric that validation logs. ``"greedy"`` decides by it; other averages are scored by it,
            if it is logged, before and after their batch statistics are estimated anew.
        mode: Whether a larger (``"max"``) or smaller metric is better.
        every_n_epochs: Snapshot at the end of each n-th epoch, at least 1. ``None``: every one for ``"greedy"``,
            ``"uniform"``, ``"lawa"``, unless ``every_n_steps`` is given.
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
        half_life_steps: Updates after which a weight counts half in ``"ema"``, above 0, in place of ``decay``.
        warmup_steps: Updates during which ``"ema"`` is at most as slow as the plain mean, at least 0.
        bn_update_batches: Training batches to estimate batch statistics on, at least 0; ``None`` for one epoch. Only
            used if there are batch-norm layers.
        include: Patterns of parameters to average (``["net.*"]``); ``None`` for all. Others stay as trained.
        exclude: Patterns of parameters to leave out.
        keep: Where snapshots are kept.
        dirpath: Where their folder is made, on a disk that all ranks see; ``None`` for the Trainer's
            ``default_root_dir``.
        keep_files: Whether the files stay when the fit ends.
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
        method: Literal["uniform", "greedy", "lawa", "ema", "swa"] = "greedy",
        monitor: str = "val_acc",
        mode: Literal["max", "min"] = "max",
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
        bn_update_batches: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
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
        self.decay, self.half_life_steps, self.warmup_steps = decay, half_life_steps, warmup_steps
        self.bn_update_batches, self.include, self.exclude = bn_update_batches, include, exclude
        self.keep, self.dirpath, self.keep_files = keep, dirpath, keep_files
        self.swap_for_validation, self.load_at_end = swap_for_validation, load_at_end
        _setup.check_arguments(self)
        self._live: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._layouts: Layouts = {}
        self._exchange = Exchange()
        self._resumed = False
        self._begin()

    def _begin(self) -> None:
        self._every_epochs, self._every_steps = _setup.schedule(self)
        self._gathered = _setup.new_collector(self)
        self._steps, self._last_step = 0, 0
        self._validated: tuple[int, float] | None = None
        self._raw: dict[str, Tensor] = {}
        self._soup: dict[str, Tensor] = {}
        self._soup_score: float | None = None
        self._trace: list[Candidate] = []
        self._outcome: _in_fit.Outcome | None = None

    @override
    def describe(self) -> str:
        return _setup.describe(self)

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        _setup.check_setup(self, trainer)

    @override
    def conflict_with(self, other: Member) -> str | None:
        return _setup.conflict(self, other)

    @override
    def is_active(self, step: "Step") -> bool:
        return False  # nothing happens within a step

    # -- while training runs ------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if not self._resumed:
            self._begin()
        self._tensors = averaged_tensors(pl_module, self.include, self.exclude)
        self._layouts = layouts_of(self._tensors)
        self._live = local_parts(self._tensors, self._layouts)
        if not self._live:
            raise MisconfigurationException(
                f"SoupAverager: there is nothing to average; `include` {self.include} and `exclude` {self.exclude}"
                " leave no floating-point parameter."
            )
        if self.keep == "disk" and isinstance(self._gathered, Shelf) and self._gathered.folder is None:
            self._gathered.folder = _setup.new_folder(self, trainer)
        self._exchange = Exchange(pl_module if self._layouts else None)

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        saved_whole = self._layouts if self._resumed else {}
        self._gathered.follow(self._live, saved_whole)
        if self._resumed and self._raw:  # the checkpoint's `state_dict` is an average; training goes on without it
            self._find_shards()
            _in_fit.copy_into(self._live, own_parts(self._raw, saved_whole))
            reshard_(pl_module)
        self._resumed, self._raw, self._soup, self._outcome = False, {}, {}, None
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
            self._take(trainer, pl_module)
        if host.is_logging_step(trainer):
            pl_module.log(f"{self.log_key}/ingredients", float(self._gathered.taken), batch_size=1)

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        due = self._every_epochs is not None and (trainer.current_epoch + 1) % self._every_epochs == 0
        if due and self._steps > self.start_step:
            self._take(trainer, pl_module)

    def _take(self, trainer: "Trainer", module: "LightningModule") -> None:
        self._find_shards()
        step = trainer.global_step
        score = self._validated[1] if self._validated is not None and self._validated[0] == step else None
        ingredient = Ingredient(f"epoch={trainer.current_epoch:03d}-step={step:07d}", step, score)
        if self.method == "greedy" and self.greedy_at == "snapshot":
            _in_fit.decide(self, trainer, module, ingredient)
        else:
            self._gathered.take(ingredient, self._live, write=trainer.is_global_zero)

    def _find_shards(self) -> None:
        if self._layouts:  # FSDP2 settles in its first forward pass where they lie in memory
            self._live = local_parts(self._tensors, self._layouts)

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.swap_for_validation and self._gathered.taken and self._live and not trainer.sanity_checking:
            with torch.inference_mode(False):
                self._exchange.put(self._live, self._gathered.average())

    @override
    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._exchange.undo()
        if self.method == "greedy" and self._live and not trainer.sanity_checking:
            self._validated = trainer.global_step, _in_fit.score_in(self, trainer.callback_metrics, pl_module)
            for ingredient in self._gathered.ingredients:
                if ingredient.step == trainer.global_step and ingredient.score is None:
                    ingredient.score = self._validated[1]

    # -- when it ends -------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._find_shards()
        self._outcome, average = _in_fit.finish(self, trainer, pl_module)
        if self._outcome is None:
            return
        if self.load_at_end:
            self._raw = {name: value.detach().to("cpu", copy=True) for name, value in self._live.items()}
            _in_fit.copy_into(self._live, average)
            reshard_(pl_module)
        else:
            self._soup = {name: value.detach().to("cpu", copy=True) for name, value in average.items()}
        if isinstance(self._gathered, Shelf) and not self.keep_files:
            trainer.strategy.barrier("every rank has read the ingredients")
            if trainer.is_global_zero:
                self._gathered.clean_up()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._exchange.undo()
        self._gathered.let_go()
        self._live, self._tensors, self._exchange = {}, {}, Exchange()

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._exchange.undo()
        self._gathered.let_go()
        self._live, self._tensors, self._exchange = {}, {}, Exchange()

    # -- what came of it ----------------------------------------------------------------------------------------------

    @property
    def trace(self) -> list[Candidate]:
        """Decisions of the greedy soup, in order."""
        return list(self._trace) if self._outcome is None else self._outcome.trace

    @property
    def ingredients(self) -> list[str]:
        """Names of the snapshots in the average, where it is one of snapshots; greedy: in the order of joining."""
        return self._gathered.names if self._outcome is None else self._outcome.ingredients

    @property
    def score(self) -> float | None:
        """Validation score of the greedy soup; of another average where :attr:`score_before_batch_norm` is."""
        return self._soup_score if self._outcome is None else self._outcome.score

    @property
    def score_before_batch_norm(self) -> float | None:
        """The same before the batch statistics were estimated anew; ``None`` without batch norm."""
        return None if self._outcome is None else self._outcome.before_batch_norm

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
        if self._outcome is not None and self.load_at_end:
            raise RuntimeError("SoupAverager: the module holds the average; `raw_weights` has what it held before.")
        if self._soup:
            return {name: value.clone() for name, value in self._soup.items()}
        return _in_fit.average_of_state(self.state_dict())

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "steps": self._steps,
            "validated": self._validated,
            "gathered": whole(self._gathered.state(), self._layouts),
            "raw": whole(self._raw, self._layouts),
            "soup": whole(self._soup, self._layouts),
            "soup_score": self._soup_score,
            "trace": [asdict(candidate) for candidate in self._trace],
            "outcome": None if self._outcome is None else self._outcome.state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["method"] != self.method:
            raise MisconfigurationException(
                f"SoupAverager(method={self.method!r}): the checkpoint holds the state of method="
                f"{state_dict['method']!r}. Go on with that one, or train without `ckpt_path`."
            )
        self._steps, self._resumed = state_dict["steps"], True
        self._validated = None if state_dict["validated"] is None else tuple(state_dict["validated"])
        self._gathered.load(state_dict["gathered"])
        self._raw, self._soup = dict(state_dict["raw"]), dict(state_dict["soup"])
        self._soup_score = state_dict["soup_score"]
        self._trace = [Candidate(**candidate) for candidate in state_dict["trace"]]
        self._outcome = _in_fit.Outcome.of(state_dict["outcome"])

    @override
    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        swaps = self.swap_for_validation and self._outcome is None and self._gathered.taken > 0
        if swaps:
            raw = _in_fit.exchange_in_checkpoint(checkpoint, self._gathered.average())
            checkpoint["callbacks"][self.state_key]["raw"] = raw
        record = _in_fit.record(self, averaged=swaps or bool(self._raw))
        checkpoint.setdefault(RECORD, {})[self.state_key] = record

    @override
    def __getstate__(self) -> dict[str, Any]:
        held = {"_live": {}, "_tensors": {}, "_layouts": {}, "_exchange": Exchange()}
        return super().__getstate__() | held  # the module's tensors are not this callback's
