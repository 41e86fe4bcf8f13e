"""The package as a whole: what is generated is fresh, what is public is documented, importing is quick and quiet."""

import ast
import importlib
import json
import re
import subprocess
import sys

import pytest

import lightning_reg
from lightning_reg import functional, registry
from lightning_reg.__main__ import generate, main, render
from tests.structure import MODULES, ROOT, SOURCES, imports_of, lines_of_code, name_of, tree_of, unit_of


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


WRITTEN = [path for path in SOURCES if path.name != "functional.py"]  # which is generated, a line for each name


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_no_file_is_long(path):
    assert lines_of_code(path) <= 300


@pytest.mark.parametrize("module", [m for m in MODULES if unit_of(m)])
def test_a_technique_knows_the_engine_its_own_files_and_the_parts_of_its_folder(module):
    folder, unit = unit_of(module)
    mine = f"lightning_reg.{folder}.{unit}"

    def is_known(other):
        parts = other.split(".")
        # What units share may itself know a file of the folder that is a unit of its own.
        shared = parts[1] == folder and len(parts) == 3 and (parts[2].startswith("_") or unit.startswith("_"))
        return parts[1] == "engine" or shared or other == mine or other.startswith(f"{mine}.")

    assert [other for other in sorted(imports_of(module)) if not is_known(other)] == []


CORES = sorted(module for module in MODULES if module.endswith(".core"))


# Of one new process, whose start takes seconds; of the processor's time, which others on the machine do not take.
IMPORTING = f"""
import importlib, json, sys, time
sys.modules["diffusers"] = None  # as where it is not installed
started = time.process_time()
import torch
theirs = time.process_time() - started
started = time.process_time()
import lightning_reg
ours = time.process_time() - started
loaded = [name for name in sys.modules if name.startswith("lightning_reg.")]
import lightning_reg.functional
for name in lightning_reg.functional.__all__:
    getattr(lightning_reg.functional, name)
for core in {CORES}:
    importlib.import_module(core)
twins = [name for name in sys.modules if name.split(".")[0] in ("lightning", "pytorch_lightning")]
initialized = torch.cuda.is_initialized()
public = [name for name in lightning_reg.__all__ if getattr(lightning_reg, name)]
print(json.dumps([theirs, ours, loaded, twins, initialized, public]))
"""


@pytest.fixture(scope="module")
def imported():
    """What is found of imports in a new process.

    Seconds of torch's and of ours, what ours has loaded, what cores have of Lightning, whether CUDA is on, the names
    that can be imported without diffusers.
    """
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTING], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_what_works_in_any_loop_imports_no_lightning(imported):
    assert imported[3] == []


def test_import_adds_next_to_nothing_to_that_of_torch_and_touches_no_device(imported):
    theirs, ours, loaded, _, initialized, _ = imported
    assert not initialized
    # However many techniques there are: a name's file is imported when the name is asked for.
    assert loaded == ["lightning_reg._deprecated", "lightning_reg._lazy", "lightning_reg.version"]
    assert ours < 0.01 * theirs  # and so of Lightning's, which has torch's in it


def test_every_public_name_is_imported_without_diffusers(imported):
    assert {"Denoiser", "DiffusionClassifierEval", "DecorProjection"} < set(imported[5])
    assert imported[5] == lightning_reg.__all__


@pytest.mark.parametrize("core", CORES)
def test_the_maths_come_first(core):
    """The first screen of a core has a public function, above which there are imports and constants only."""
    tree = tree_of(MODULES[core])
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if not functions:  # its mathematics are those of several units, and stand beside them
        assert {name.rpartition("._")[0] for name in imports_of(core)} == {core.rpartition(".")[0].rpartition(".")[0]}
        return
    assert functions[0].lineno <= 60
    listed = importlib.import_module(core).__all__
    assert functions[0].name in listed


def test_public_names_are_those_of_their_homes():
    for package in (lightning_reg, functional):
        for name in package.__all__:
            assert getattr(package, name).__name__.rpartition(".")[2] == name or name == "__version__"
        assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=r"^module 'lightning_reg' has no attribute 'ELRCalback'"):
        _ = lightning_reg.ELRCalback


def test_readme_speaks_of_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w[\w-]*)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


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


def test_generate_writes_what_was_rendered_in_a_checkout_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_reg.__main__.render", lambda: {tmp_path / "docs" / "page.md": "new"})
    monkeypatch.setattr("lightning_reg.__main__._ROOT", tmp_path)
    with pytest.raises(SystemExit):
        generate()
    assert "generate works in a checkout of the project" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
    (tmp_path / "pyproject.toml").touch()
    for _ in range(2):
        generate()
        assert (tmp_path / "docs" / "page.md").read_text() == "new"
        (tmp_path / "docs" / "page.md").write_text("old")
