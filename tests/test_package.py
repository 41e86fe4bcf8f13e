"""The package as a whole: what is generated is fresh, what is public is documented, importing is quick and quiet."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_reg
from lightning_reg import registry
from lightning_reg.__main__ import main, render

ROOT = Path(lightning_reg.__file__).parent.parent
SOURCES = sorted((ROOT / "lightning_reg").rglob("*.py"))
LINES = {"engine": 500}  # elsewhere 400


@pytest.mark.parametrize("path", list(render()), ids=lambda path: path.name)
def test_generated_files_are_fresh(path):
    assert path.read_text() == render()[path], "run `python -m lightning_reg generate`"


def test_every_public_name_is_in_the_changelog_or_is_a_core():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    public = [cls.__name__ for unit in registry.units() for cls in unit.techniques()] + ["Technique", "LossMixin"]
    assert [name for name in public if f"`{name}`" not in changelog] == []


def test_list_names_every_technique(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    assert all(cls.__name__ in printed for unit in registry.units() for cls in unit.techniques())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layering_and_length(path):
    folder = path.parent.name
    assert len(path.read_text().splitlines()) <= LINES.get(folder, 400)
    imported = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_reg.")
        for name in [f"{node.module}.{alias.name}" for alias in node.names]
    ]
    purposes = {unit.folder for unit in registry.units()}
    # Files `_part.py` belong to the techniques of their folder, and may name them.
    own_parts = f"lightning_reg.{folder}." + ("" if path.stem.startswith("_") else "_")
    if folder == "engine" or folder in purposes:  # the engine knows no technique, and no technique another one
        assert [n for n in imported if n.split(".")[1] != "engine" and not n.startswith(own_parts)] == []


def test_readme_speaks_of_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w[\w-]*)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


IMPORTING = """
import json, time
started = time.perf_counter()
import lightning.pytorch
between = time.perf_counter()
import lightning_reg, lightning_reg.functional
ended = time.perf_counter()
import torch
print(json.dumps([between - started, ended - between, torch.cuda.is_initialized()]))
"""


def test_import_adds_little_to_that_of_lightning_and_touches_no_device():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTING], capture_output=True, text=True, check=True)
    theirs, ours, initialized = json.loads(run.stdout)
    assert not initialized
    assert ours < 0.05 * theirs  # measured 0.2 % to 0.4 %


def test_demo_runs_in_a_short_mode(tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import noisy_labels
    finally:
        sys.path.pop(0)
    results = noisy_labels.main(["--seeds", "1", "--epochs", "3", "--output", str(tmp_path / "plot.png")])
    assert len(results["plain"][0]["curve"]) == len(results["elr"][0]["curve"]) == 3
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Suspected labels" in capsys.readouterr().out


def test_soup_example_runs_in_a_short_mode(tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import soups
    finally:
        sys.path.pop(0)
    results = soups.main(["--epochs", "2", "--output", str(tmp_path / "plot.png")])
    assert len(results) == 6
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "greedy soup: candidate" in capsys.readouterr().out
