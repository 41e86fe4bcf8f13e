"""Laws of LightningModules and LightningDataModules: exact resume, saved and loaded, run from YAML."""

import json
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from tests.conformance.harness import difference, quiet
from tests.conformance.problems import seeded

__all__ = ["DATAMODULE_LAWS", "LAWS", "DataModuleCase", "LightningModuleCase"]


@dataclass(frozen=True)
class LightningModuleCase:
    """A LightningModule as its laws see it.

    Args:
        make: The class, or a function that makes one from some arguments.
        arguments: Constructor arguments, plain data.
        data: Makes training batches that are the same in each epoch: a loader without shuffling, or a datamodule.
        invalid: Constructor arguments that are refused, and the argument that the error names.

    """

    subject: type[LightningModule]
    data: Callable[[], Any]
    arguments: Mapping[str, Any]
    invalid: Sequence[tuple[Mapping[str, Any], str]] = ()

    def make(self, **arguments: Any) -> LightningModule:
        """Makes one, with the same weights at each call."""
        with seeded(0):
            return self.subject(**{**self.arguments, **arguments})


@dataclass(frozen=True)
class DataModuleCase:
    """A LightningDataModule as its laws see it.

    Args:
        subject: The class.
        arguments: Constructor arguments, plain data.
        invalid: Constructor arguments that are refused, and the argument that the error names.

    """

    subject: type[LightningDataModule]
    arguments: Mapping[str, Any]
    invalid: Sequence[tuple[Mapping[str, Any], str]] = ()

    def make(self, **arguments: Any) -> LightningDataModule:
        """Makes one."""
        return self.subject(**{**self.arguments, **arguments})


# -- modules ----------------------------------------------------------------------------------------------------------


def resume_is_exact(case: LightningModuleCase) -> None:
    """A run resumed after its first epoch ends as the uninterrupted one, to the last bit."""
    with TemporaryDirectory() as name:
        folder, ends = Path(name), []
        first = _fit(case.make(), case.data(), 1)
        first.save_checkpoint(folder / "first.ckpt")
        for epochs, checkpoint, end in ((2, None, "whole"), (2, folder / "first.ckpt", "resumed")):
            trainer = _fit(case.make(), case.data(), epochs, checkpoint)
            trainer.save_checkpoint(folder / end)
            ends.append(torch.load(folder / end, weights_only=False))
    begun = difference(case.make().state_dict(), ends[0]["state_dict"])
    assert begun, f"{case.subject.__name__}: training changes nothing, so that no law would test anything"
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        found = difference(ends[0][part], ends[1][part])
        assert not found, f"{case.subject.__name__}: `{part}` of a resumed run and an uninterrupted one: {found}"


def _fit(module: LightningModule, data: Any, epochs: int, checkpoint: Path | None = None) -> Trainer:
    with quiet(), seeded(0):
        trainer = Trainer(max_epochs=epochs, **_QUIET)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return trainer


def saves_and_loads(case: LightningModuleCase) -> None:
    """``load_from_checkpoint`` needs the file alone, and gives the same weights and arguments."""
    with TemporaryDirectory() as name:
        trainer = _fit(module := case.make(), case.data(), 1)
        trainer.save_checkpoint(Path(name) / "end.ckpt")
        try:
            loaded = case.subject.load_from_checkpoint(Path(name) / "end.ckpt", weights_only=False)
        except TypeError as error:
            sentence = f"{case.subject.__name__} is not made from its checkpoint (`save_hyperparameters`): {error}"
            raise AssertionError(sentence) from error
    found = difference(module.state_dict(), loaded.state_dict())
    assert not found, f"{case.subject.__name__}: weights that were saved and loaded: {found}"
    found = difference(dict(case.arguments), {name: loaded.hparams.get(name) for name in case.arguments})
    assert not found, f"{case.subject.__name__}: arguments that were saved and loaded: {found}"


def runs_from_yaml(case: LightningModuleCase) -> None:
    """Lightning's command line makes it from a file."""
    made = _from_yaml({"model": case}, case.subject, BoringDataModule).model
    found = difference(dict(case.arguments), {name: made.hparams.get(name) for name in case.arguments})
    assert not found, f"{case.subject.__name__}: arguments from YAML: {found}"


# -- data -------------------------------------------------------------------------------------------------------------


def same_every_time(case: DataModuleCase) -> None:
    """Made twice, pickled, or set up twice, it gives the same batches for the same seed."""
    wanted = _batches(case.make())
    assert wanted, f"{case.subject.__name__} has no batch"
    again = case.make()
    again.setup("fit")
    for how, other in (("made", case.make()), ("pickled", pickle.loads(pickle.dumps(case.make()))), ("set up", again)):
        found = difference(wanted, _batches(other))
        assert not found, f"{case.subject.__name__} {how} once more gives other batches: {found}"


def _batches(data: LightningDataModule) -> list[Any]:
    data.prepare_data()
    data.setup("fit")
    with seeded(0):
        return [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]


def data_runs_from_yaml(case: DataModuleCase) -> None:
    """Lightning's command line makes it from a file."""
    made = _from_yaml({"data": case}, BoringModel, case.subject).datamodule
    found = difference(_batches(case.make()), _batches(made))
    assert not found, f"{case.subject.__name__}: batches of one from YAML: {found}"


def _from_yaml(parts: Mapping[str, Any], model: type[LightningModule], data: type[LightningDataModule]) -> LightningCLI:
    text = json.dumps({name: dict(case.arguments) for name, case in parts.items()})  # JSON is YAML
    arguments = sys.argv
    with TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "config.yaml"
        path.write_text(text)
        sys.argv = ["main"]
        try:
            return LightningCLI(
                model,
                data,
                args=["--config", str(path)],
                run=False,
                save_config_callback=None,
                trainer_defaults=_QUIET,
                seed_everything_default=False,
            )
        except SystemExit as error:
            names = ", ".join(case.subject.__name__ for case in parts.values())
            raise AssertionError(f"{names} is not made from YAML: {text}") from error
        finally:
            sys.argv = arguments


_QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
LAWS: dict[str, Callable[..., None]] = {law.__name__: law for law in (resume_is_exact, saves_and_loads, runs_from_yaml)}
DATAMODULE_LAWS: dict[str, Callable[..., None]] = {
    "same_every_time": same_every_time, "runs_from_yaml": data_runs_from_yaml,
}  # fmt: skip
