"""A quiet fit of a tiny problem that notes all that happens, and comparisons to the last bit."""

import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_reg.engine.weights import shards
from tests.conformance.problems import BATCH, SIZE, Problem, make_loader, seeded

__all__ = ["Interruption", "Run", "demand", "difference", "fit", "fit_made", "go", "new_run", "once", "quiet"]


# -- the user's module ------------------------------------------------------------------------------------------------


class Interruption(Exception):  # noqa: N818 # it is no error of anybody
    """What the user's module raises where it is told to."""


class _SGD(torch.optim.SGD):
    """Notes the gradients it gets: unscaled, accumulated, clipped."""

    def __init__(
        self, named: Mapping[str, Tensor], lr: float, noted: list[dict[str, Tensor]], norms: list[Tensor]
    ) -> None:
        super().__init__(named.values(), lr=lr, momentum=0.9)
        self.named, self.noted, self.norms = named, noted, norms

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.noted.append({name: p.grad.clone() for name, p in self.named.items() if p.grad is not None})
        every = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        here = [shards.local(gradient).flatten() for gradient in every]
        self.norms.append(torch.cat(here).norm() if every else torch.zeros(()))
        super().step()


class Model(LightningModule):
    """What a user would write; it knows of no technique."""

    def __init__(
        self, problem: Problem, lr: float, *, manual: bool, fail: tuple[str, int] | None, checkpoint: str = ""
    ) -> None:
        super().__init__()
        self.loss, self.lr, self.fail, self.batches = problem.loss, lr, fail, 0
        self.checkpoint, self.samples = checkpoint, SIZE
        self.automatic_optimization = not manual
        self.gradients: list[dict[str, Tensor]] = []
        self.norms: list[Tensor] = []  # with those of what a technique trains of its own
        with seeded(0):
            self.net = problem.net()

    def thirds(self) -> Tensor:
        """One of three groups or tasks for each training sample."""
        return torch.arange(self.samples) % 3

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches += 1  # here, because a changing number in a compiled step is compiled anew

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        output = self._checkpointed(x) if self.checkpoint else self.net(x)
        self._interrupt("forward")
        loss = self.loss(output, y)
        self._interrupt("loss")
        if not torch.compiler.is_compiling():  # torch 2.13 cannot trace Lightning's `log`
            self.log("train_loss", loss)
        if not self.automatic_optimization:
            self._optimize(loss)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._interrupt("validation")
        x, y, _ = batch
        self.log("val_loss", self.loss(self.net(x), y), sync_dist=True)

    @override
    def on_after_backward(self) -> None:
        self._interrupt("backward")

    @override
    def configure_optimizers(self) -> Any:
        named = {name.replace("_orig_mod.", ""): p for name, p in self.named_parameters()}
        if self.automatic_optimization:
            return _SGD(named, self.lr, self.gradients, self.norms)
        cut = len(named) // 2
        halves = dict(list(named.items())[:cut]), dict(list(named.items())[cut:])
        return [_SGD(half, self.lr, self.gradients, self.norms) for half in halves]

    def _checkpointed(self, x: Tensor) -> Tensor:
        needed = torch.zeros((), requires_grad=True)  # reentrant ones have gradients where an input needs one
        reentrant = self.checkpoint == "reentrant"
        output: Tensor = checkpoint(lambda x, _: self.net(x), x, needed, use_reentrant=reentrant)
        return output

    def _optimize(self, loss: Tensor) -> None:
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        second, first = self.gradients.pop(), self.gradients.pop()
        self.gradients.append(first | second)

    def _interrupt(self, where: str) -> None:
        if self.fail is not None and self.fail == (where, self.batches):
            raise Interruption(where)


# -- a fit ------------------------------------------------------------------------------------------------------------


class _Recorder(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    @override
    def name(self) -> str:
        return "recorder"

    @property
    @override
    def version(self) -> int:
        return 0

    @override
    def log_hyperparams(self, params: Any) -> None:
        pass

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


class _Watch(Checkpoint):  # Lightning calls checkpoint callbacks last
    """Notes weights and random states after every batch, and saves checkpoints where ModelCheckpoint would.

    Without a ``mid_epoch`` (the batch, counted from the first) there is one checkpoint, at the end.
    """

    def __init__(self, folder: Path | None, mid_epoch: int) -> None:
        self.folder, self.mid_epoch = folder, mid_epoch
        self.random: list[tuple[Any, ...]] = []
        self.random_before: list[Tensor] = []  # torch's
        self.weights: list[dict[str, Tensor]] = []

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.random_before.append(torch.get_rng_state())

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.random.append(_random_state())
        self.weights.append(weights_of(pl_module))
        if self.mid_epoch and len(self.random) == self.mid_epoch:
            trainer.save_checkpoint(self.folder / "mid_epoch.ckpt")
        if self.mid_epoch and trainer.current_epoch == 0 and trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / "last_batch.ckpt")

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.mid_epoch and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.folder / "epoch_end.ckpt")

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / "end.ckpt")


@dataclass
class Run:
    """A fit, before and after."""

    techniques: list[Any]
    model: Model
    trainer: Trainer
    loader: DataLoader
    watch: _Watch
    logger: _Recorder
    fitted: Any  # the compiled module where there is one
    error: BaseException | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights under the user's own names."""
        return weights_of(self.model)

    @property
    def gradients(self) -> list[dict[str, Tensor]]:
        """What the optimizer got in each of its steps."""
        return self.model.gradients

    @property
    def logged(self) -> list[tuple[int, dict[str, float]]]:
        """Rows of the log, by step."""
        return self.logger.rows

    @property
    def own_scalars(self) -> set[str]:
        """Names of what was logged, without what the user's module and Lightning log."""
        return {key for _, row in self.logged for key in row} - {"epoch", "train_loss", "val_loss"}


def new_run(
    techniques: Sequence[Callback],
    problem: Problem,
    *,
    lr: float = 0.05,
    batch: int = BATCH,
    size: int = SIZE,
    ranks: tuple[int, int] | None = None,
    precision: str = "32-true",
    manual: bool = False,
    compiled: str = "",
    fail: tuple[str, int] | None = None,
    checkpoint: str = "",
    folder: Path | None = None,
    mid_epoch: int = 0,
    model: Model | None = None,
    **options: Any,
) -> Run:
    """A Trainer ready to fit; ``options`` go to it.

    The network runs under a ``checkpoint`` that is ``"reentrant"`` or not (``"saved"``), if there is one.
    """
    model = model or Model(problem, lr, manual=manual, fail=fail, checkpoint=checkpoint)
    model.samples = size
    watch, logger = _Watch(folder, mid_epoch), _Recorder()
    if precision == "16-mixed":  # Lightning turns this into bf16 on the CPU, so its plugin is made here
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = precision
    # Logging takes a good part of a tiny fit, and steps that are not logged are to be right too.
    fixed = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "log_every_n_steps": 4, "enable_progress_bar": False}
    fixed |= {"enable_model_summary": False, "logger": logger}
    with quiet():
        trainer = Trainer(callbacks=[*techniques, watch], **(fixed | options))
    loader = make_loader(problem, batch, size, ranks)
    run = Run(list(techniques), model, trainer, loader, watch, logger, fitted=model)
    if compiled == "net":
        model.net = torch.compile(model.net, backend="eager")
    elif compiled == "module":
        run.fitted = torch.compile(model, backend="eager")
    return run


def fit(
    techniques: Sequence[Callback], problem: Problem, *, seed: int = 0, ckpt: Path | None = None, **kwargs: Any
) -> Run:
    """Trains anew and returns everything; an :class:`Interruption` is expected if the module is told to ``fail``."""
    with quiet():
        run = new_run(techniques, problem, **kwargs)
        go(run, seed=seed, ckpt=ckpt)
    return run


def fit_made(problem: Problem, make: Callable[..., Callback] | None = None, *, name: str = "", **options: Any) -> Run:
    """Trains with what ``make`` makes, or without anything; for :func:`once`."""
    named = {"name": name} if name else {}
    return fit([] if make is None else [make(**named)], problem, **options)


def once(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function gives for these arguments, which it is asked once in a process.

    Args:
        function: A module's own function, one that gives the same each time. What it gives is shared: laws read it, and
            neither train nor change it.
        args: Told apart as objects, not by what they hold.
        options: Numbers and strings, told apart by their values.

    Returns:
        What the function gave.

    """
    key = (function, *map(id, args), *sorted(options.items()))
    found = _KNOWN.pop(key, None) or (args, function(*args, **options))
    _KNOWN[key] = found  # with the arguments, so that their ids stay their own
    if len(_KNOWN) > _LIMIT:
        del _KNOWN[next(iter(_KNOWN))]
    return found[1]


_KNOWN: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}  # what was asked for last stands last
_LIMIT = 256  # a fit takes half a megabyte


def go(run: Run, *, seed: int = 0, ckpt: Path | None = None) -> None:
    """Fits once; may be called again after more epochs were allowed."""
    val = DataLoader(run.loader.dataset, 16)
    with quiet(), seeded(seed):
        try:
            run.trainer.fit(run.fitted, run.loader, val, ckpt_path=ckpt, weights_only=True if ckpt else None)
        except Interruption as error:
            run.error = error


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights under the names of the untouched model."""
    return {name.replace("_orig_mod.", ""): value.detach().clone() for name, value in module.state_dict().items()}


@contextmanager
def quiet() -> Iterator[None]:
    """No remarks on a tiny fit; every other warning is what it was."""
    remarks = [
        "does not have many workers",
        "GPU available but not used",
        "The .grad attribute of a Tensor that is not a leaf",
        "rows gives each query . candidates, where others gave",  # the last batch is short here, which is meant
    ]
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    _set_level(log, logging.ERROR)
    try:
        with warnings.catch_warnings():
            for remark in remarks:
                warnings.filterwarnings("ignore", f".*{remark}")
            yield
    finally:
        _set_level(log, level)


def _set_level(log: logging.Logger, level: int) -> None:
    if log.level != level:  # each change empties the caches of all loggers there are
        log.setLevel(level)


def _random_state() -> tuple[Any, ...]:
    _, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), torch.from_numpy(numbers.copy()), rest, random.getstate()


# -- comparing --------------------------------------------------------------------------------------------------------


def demand(condition: bool, sentence: str) -> None:
    """An assertion that may stand where an exception is handled."""
    if not condition:
        raise AssertionError(sentence)


def difference(one: Any, two: Any, *, rtol: float = 0.0, atol: float = 0.0, where: str = "") -> str:
    """Where two nested structures first differ, "" if they do not; to the last bit unless a tolerance is given."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        if one.keys() != two.keys():
            return f"{where or 'the keys'}: {sorted(map(str, one.keys() ^ two.keys()))} on one side only"
        pairs = [(f"{where}[{key!r}]", one[key], two[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if len(one) != len(two):
            return f"{where or 'the lengths'}: {len(one)} and {len(two)} entries"
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        return "" if _equal(one, two, rtol, atol) else f"{where}: {_short(one)} and {_short(two)}"
    return next((found for at, a, b in pairs if (found := difference(a, b, rtol=rtol, atol=atol, where=at))), "")


def _equal(one: Any, two: Any, rtol: float, atol: float) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return (one.shape, one.dtype) == (two.shape, two.dtype) and torch.allclose(
            one.double(), two.double(), rtol=rtol, atol=atol, equal_nan=True
        )
    if isinstance(one, float) and isinstance(two, float):
        return one == two or (one != one and two != two) or abs(one - two) <= atol + rtol * abs(two)
    return bool(type(one) is type(two) and one == two)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        value = f"{value.dtype} {tuple(value.shape)} {value.flatten()[:4].tolist()}"
    return str(value)[:120]
