"""The runner of the effect benchmarks: its statistics, and what every experiment's file must have."""

import ast
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "effects"
EXPERIMENTS = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("effects_runner", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_interval_is_students(runner):
    mean, half = runner.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))  # t(0.975, 2), standard deviation 1
    assert runner.cell([1.5]) == "1.500"


def test_a_difference_is_one_only_outside_its_interval(runner):
    assert runner.verdict([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == "+1.000 ± 0.000"
    assert runner.verdict([1.0, 2.0, 3.0], [2.0, 2.0, 3.1]) == "+0.367 ± 1.368: no effect shown"
    assert runner.verdict([1.0], [0.5]) == "-0.500 (one seed)"


def test_table_holds_every_seed(runner):
    arms = [runner.Arm("plain"), runner.Arm("other")]
    for seed in range(2):
        arms[0].add(test_accuracy=50 + seed)
        arms[1].add(test_accuracy=52 + seed)
    text = runner.markdown("key", "What is trained.", arms, ["a fact"])
    assert "| other | 52.500 ± 6.353 |" in text
    assert "| other | +2.000 ± 0.000 |" in text
    assert "- plain: test accuracy 50.000, 51.000" in text
    assert text.startswith("# key: effect\n\nWhat is trained.\n")
    assert text.endswith("- a fact\n")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_is_and_runs_on_seeds(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    runs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    assert [argument.arg for argument in runs[0].args.args] == ["seeds"]
