"""Lightning's command line: every technique is written in YAML, printed, run from what was printed, and explained."""

import inspect
import json
import re
import sys
from dataclasses import asdict, is_dataclass

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_reg import registry
from tests.conformance.discovery import case_of
from tests.conformance.harness import Model, difference, quiet, weights_of
from tests.conformance.problems import BATCH, SIZE, make_loader, seeded
from tests.structure import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI, of jsonargparse
TECHNIQUES = [cls for unit in registry.units() for cls in unit.techniques()]
QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": 1, "limit_train_batches": 3,
    "limit_val_batches": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


class User(Model):
    """The harness's module with the arguments that a command line can give: none."""

    problem = None

    def __init__(self) -> None:
        super().__init__(self.problem, 0.05, manual=False, fail=None)


def command_line(problem, *arguments):
    User.problem = problem
    options = {"run": False, "save_config_callback": None, "seed_everything_default": False}
    with quiet():
        return LightningCLI(User, args=list(arguments), trainer_defaults=QUIET, **options)


def plain(value):
    """A constructor argument as YAML writes it."""
    if is_dataclass(value):
        return {name: plain(one) for name, one in asdict(value).items()}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def arguments_of(technique):
    return {name: plain(getattr(technique, name)) for name in inspect.signature(type(technique)).parameters}


def defaults_of(cls):
    return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}


def as_word(value):
    return value if isinstance(value, str) else json.dumps(value)


def written(path, *techniques):
    entries = [{"class_path": f"lightning_reg.{type(t).__name__}", "init_args": arguments_of(t)} for t in techniques]
    path.write_text(json.dumps({"trainer": {"callbacks": entries}}))  # JSON is YAML
    return str(path)


def printed(capsys, problem, *arguments):
    with pytest.raises(SystemExit) as left:
        command_line(problem, *arguments)
    output = capsys.readouterr()
    assert left.value.code in (0, None), output.err
    return output.out


@pytest.mark.parametrize("cls", TECHNIQUES, ids=lambda cls: cls.__name__)
def test_a_technique_is_written_printed_and_run_from_what_was_printed(cls, tmp_path, capsys):
    case = case_of(cls)
    given = case.make()
    text = printed(capsys, case.problem, "--config", written(tmp_path / "given.yaml", given), "--print_config")
    (tmp_path / "printed.yaml").write_text(text)
    assert f"class_path: lightning_reg.{cls.__name__}" in text
    run = command_line(case.problem, "--config", str(tmp_path / "printed.yaml"))
    made = run.trainer.callbacks[0]
    assert type(made) is cls
    assert arguments_of(made) == arguments_of(given)
    with quiet(), seeded(0):
        before = weights_of(run.model)
        if difference(given.state_dict(), made.state_dict()):  # of an earlier task, where the case goes on from one
            made.load_state_dict(given.state_dict())
        batches = make_loader(case.problem, BATCH, SIZE, None)
        run.trainer.fit(run.model, batches, batches)
    assert run.trainer.global_step == 3
    assert difference(before, weights_of(run.model))


@pytest.mark.parametrize("cls", TECHNIQUES, ids=lambda cls: cls.__name__)
def test_a_technique_is_appended_and_explained(cls, capsys):
    given = case_of(cls).make()
    # Those that have no default, or another value in the case.
    chosen = {name: value for name, value in arguments_of(given).items() if value != defaults_of(cls)[name]}
    options = [f"--trainer.callbacks.{name}={as_word(value)}" for name, value in chosen.items()]
    # In full: a short name makes jsonargparse import the module of every callback that the process knows.
    first = "--trainer.callbacks=lightning.pytorch.callbacks.DeviceStatsMonitor"
    run = command_line(case_of(cls).problem, first, f"--trainer.callbacks+=lightning_reg.{cls.__name__}", *options)
    assert [type(callback).__name__ for callback in run.trainer.callbacks][:2] == ["DeviceStatsMonitor", cls.__name__]
    help_ = printed(capsys, case_of(cls).problem, f"--trainer.callbacks.help=lightning_reg.{cls.__name__}")
    explained = " ".join(help_.split())
    assert " ".join(registry.summary(cls).split())[:60] in explained
    for name in inspect.signature(cls).parameters:
        assert f"--trainer.callbacks.{name} " in explained


CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.filterwarnings("ignore:.*(nothing is reweighted|training ended after 3 steps)")  # three are few
def test_an_example_runs_from_its_file(config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import cli

    short = [f"--trainer.{name}={value}" for name, value in QUIET.items() if name != "enable_checkpointing"]
    with quiet(), seeded(0):
        run = cli.main(["fit", "--config", str(config), *short, f"--trainer.default_root_dir={tmp_path}"])
    names = [type(callback).__name__ for callback in run.trainer.callbacks]
    stacked = re.findall(r"class_path: lightning_reg\.(\w+)", config.read_text())
    assert names[: len(stacked)] == stacked
    assert len(stacked) == (3 if config.stem.startswith("stack") else 1)
    assert run.trainer.global_step == 3
