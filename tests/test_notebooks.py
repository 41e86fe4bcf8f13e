"""The notebooks in ``examples/``: made of their scripts, run from start to end, kept with their outputs."""

import sys

import nbformat
import pytest

from tests.structure import ROOT

sys.path.insert(0, str(ROOT / ".ci"))
try:
    import notebooks
finally:
    sys.path.pop(0)

NOTEBOOKS = [notebooks.notebook_of(script) for script in notebooks.scripts()]
OURS = {
    "adapt_then_unlearn",
    "continual_learning",
    "diffusion_classifier",
    "editing",
    "embedding_stages",
    "failures",
    "few_shot",
    "find_wrong_labels",
    "fine_tuning",
    "grokking",
    "guidance",
    "imbalanced_regression",
    "llm_reweighting",
    "metric_learning",
    "nm_sparsity",
    "projection",
    "search",
    "segmentation",
    "segmentation_noise",
    "soups",
    "stacking",
}


def test_every_script_with_cells_has_a_fresh_notebook_and_no_notebook_is_left_over():
    assert [script.name for script in notebooks.stale()] == [], "run `make notebooks`"
    assert sorted(notebooks.FOLDER.glob("*.ipynb")) == NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} >= OURS


def test_a_change_of_a_script_is_noticed(tmp_path, monkeypatch):
    script, text = (
        tmp_path / "one.py",
        '"""How to run it."""\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n',
    )
    script.write_text(text)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    monkeypatch.setattr(notebooks, "scripts", lambda: [script])
    assert list(notebooks.stale()) == [script]
    nbformat.write(notebooks.make(script), tmp_path / "one.ipynb")
    assert notebooks.cells_of_notebook(tmp_path / "one.ipynb") == [("markdown", "# Title\n\nText."), ("code", "x = 1")]
    assert list(notebooks.stale()) == []
    for changed in (text.replace("x = 1", "x = 2"), text.replace("Text", "Words"), text + "# %%\ny = 1\n"):
        script.write_text(changed)
        assert list(notebooks.stale()) == [script]


def test_outputs_are_kept_while_the_code_is_the_same(tmp_path, monkeypatch):
    script = tmp_path / "one.py"
    script.write_text("# %% [markdown]\n# # Title\n# %%\nx = 1\n")
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    assert notebooks.with_outputs_kept(script) is None
    notebook = notebooks.make(script)
    notebook.cells[1].execution_count = 1
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="one")]
    nbformat.write(notebook, tmp_path / "one.ipynb")
    script.write_text("# %% [markdown]\n# # Other title\n# %%\nx = 1\n")
    kept = notebooks.with_outputs_kept(script)
    assert kept.cells[0].source == "# Other title"
    assert kept.cells[1].outputs == notebook.cells[1].outputs
    script.write_text("# %% [markdown]\n# # Title\n# %%\nx = 2\n")
    assert notebooks.with_outputs_kept(script) is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs_and_pictures(path):
    assert path.stat().st_size < notebooks.LIMIT
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.get("name") != "stderr" and output.output_type != "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("text/plain" in output.get("data", {}) or output.get("name") == "stdout" for output in outputs)


def run_shortly(path, tmp_path, monkeypatch):
    """Runs the cells one after the other, as a kernel does; what they have defined then.

    A kernel would take seconds for its start alone.
    """
    import matplotlib.pyplot as plt

    monkeypatch.setenv("LIGHTNING_REG_SHORT", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    plt.switch_backend("agg")
    space = {"__name__": "__main__"}
    for number, (kind, source) in enumerate(notebooks.cells_of_notebook(path)):
        if kind == "code":
            exec(compile(source, f"{path.name}, cell {number}", "exec"), space)
    space["pictures"] = len(plt.get_fignums())
    plt.close("all")
    return space


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_start_to_end(path, tmp_path, monkeypatch, capsys):
    import logging

    import torch

    log, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    monkeypatch.setattr(log, "level", log.level)
    try:
        space = run_shortly(path, tmp_path, monkeypatch)
    finally:
        torch.set_num_threads(threads)
    assert space["pictures"] >= 1
    CHECKS.get(path.stem, lambda *_: None)(space, tmp_path, capsys.readouterr().out)


def is_soups(space, folder, printed):
    assert len(space["results"]) == 6
    assert (folder / "soups.png").read_bytes().startswith(b"\x89PNG")
    assert "greedy soup: candidate" in printed


def is_nm_sparsity(space, folder, printed):
    assert [len(accuracies) for accuracies in space["results"].values()] == [1, 1, 1, 1]
    assert (folder / "nm_sparsity.png").read_bytes().startswith(b"\x89PNG")
    assert "Groups with too many weights: 0" in printed
    assert "net.0.weight" in printed


def is_llm_reweighting(space, folder, printed):
    uniform, linupper = (runs[0] for runs in space["results"].values())
    assert uniform["steps"] == linupper["steps"] == list(range(1, 11))
    assert uniform["losses"][0] == linupper["losses"][0]  # the first step is warm-up
    assert uniform["losses"][-1] != linupper["losses"][-1]
    assert all(1 <= size <= 4 for size in linupper["effective"])
    assert (folder / "llm_reweighting.png").read_bytes().startswith(b"\x89PNG")
    assert "Effective samples of 4" in printed


def is_find_wrong_labels(space, folder, printed):
    wrong, suspected = space["wrong"], space["suspected"]
    assert (suspected & wrong).sum() > 0.8 * wrong.sum()
    assert (suspected & wrong).sum() > 0.6 * suspected.sum()
    assert "suspected label errors" in printed


def is_search(space, folder, printed):
    rows = space["results"].rows
    assert len(rows) == 7
    assert all(0 < row["mrr"] < 100 and row["index, kB"] > 0 for row in rows.values())
    assert rows["sparse"]["nnz"] > rows["sparse, IDFFlops"]["nnz"]
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "BM25" in printed


def is_embedding_stages(space, folder, printed):
    rows, before, after = space["results"], space["student"], space["final"]
    assert len(rows) == 11
    assert all(0 < row["mrr"] <= 100 for row in rows.values())
    assert rows["2: mask, mixing, focal weights"] != rows["3, first version: soup of it"]
    raw = space["with_last_weights"](after, space["soup"])
    states = [next(one.parameters()) for one in (before, raw, after)]
    assert not states[0].equal(states[1])
    assert not states[1].equal(states[2])
    assert "to the last bit" in printed


def is_stacking(space, folder, printed):
    assert set(space["results"]) == set(space["ARMS"])
    assert "cannot stand together" in space["refusal"]


def is_continual_learning(space, folder, printed):
    nothing, kept = space["results"]["nothing"], space["results"]["PredictionDistillation"]
    assert nothing[0].isnan().sum() == kept[0].isnan().sum() == 10
    assert kept[1]["accuracy"] > nothing[1]["accuracy"]


def is_imbalanced_regression(space, folder, printed):
    assert [errors.shape for errors in space["results"].values()] == [(1, 10), (1, 10)]
    assert "few (7 to 9)" in printed


def is_adapt_then_unlearn(space, folder, printed):
    shares = [space["results"][name]["share"] for name in ("adapted copy", "original", "away from the copy")]
    assert shares[0] > 2 * shares[1] > 2 * shares[2]
    assert (folder / "adapt_then_unlearn.png").read_bytes().startswith(b"\x89PNG")
    assert "unlearned (PUL)" in printed


def is_metric_learning(space, folder, printed):
    assert [len(found) for found in space["results"].values()] == [1, 1]
    assert all(0 < scores["opis"] < 1 for found in space["results"].values() for scores in found)
    assert (folder / "metric_learning.png").read_bytes().startswith(b"\x89PNG")
    assert "digits that training has not seen" in printed


def is_fine_tuning(space, folder, printed):
    results, ours = space["results"], {"full", "LoRA", "rsLoRA", "ALLoRA", "SaRA", "random mask"}
    assert results.keys() >= ours | {"PEFT's LoRA", "PEFT's DoRA"}
    start = {name: results[name]["trained"] for name in results}
    assert start["full"] > 5 * start["LoRA"] == 5 * start["ALLoRA"] == 5 * start["PEFT's LoRA"]
    assert all(row["peak"] > row["held"] > 0 < row["stored"] for row in results.values())
    assert results["full"]["held"] > results["LoRA"]["held"] > results["SaRA"]["held"]
    assert len({row["new"] for row in results.values()}) == len(results)
    assert printed.startswith("before: ")


def is_few_shot(space, folder, printed):
    assert "unknown" in printed


def is_diffusion_classifier(space, folder, printed):
    assert float((space["found"].labels == space["labels"]).float().mean()) >= 0.75
    assert "8 digits not trained on" in printed


def is_guidance(space, folder, printed):
    assert float(space["made"]["full guidance"].calls.double().mean()) == 8
    assert all(
        float(found.calls.double().mean()) < 8 for name, found in space["made"].items() if name != "full guidance"
    )


def is_grokking(space, folder, printed):
    assert [one.neurons.tolist() for one in space["pruned"].values()] == [[0, 30, 60, 90, 120, 150]] * 3
    assert space["pruned"]["lowest"].scores["test"][0] == 100 * space["results"][0.0].test
    assert (folder / "grokking.png").read_bytes().startswith(b"\x89PNG")
    assert "wrong labels" in printed


def is_failures(space, folder, printed):
    assert space["found"].noise.flatten(1).norm(dim=1).tolist() == pytest.approx([8.0] * 3)
    assert "through the sampler" in printed


def is_editing(space, folder, printed):
    assert space["same"].samples.equal(space["same"].source)
    assert space["inversion"].noise.equal(space["found"]["null-text", 3.0].noise)
    for guidance in (3.0, 7.5):
        alone, moved = (space["found"][name, guidance].current for name in ("alone", "null-text"))
        assert (moved - space["images"]).square().mean() < (alone - space["images"]).square().mean()


def is_projection(space, folder, printed):
    left = [(row - space["encoded"](space["wanted"])).norm() for row in (space["changed"],)]
    assert float(left[0]) > 0
    assert space["found"].samples.shape == (2, 1, 8, 8)
    assert "passes for a sample" in printed


def is_segmentation(space, folder, printed):
    assert {name: tuple(one.shape) for name, one in space["predicted"].items()} == dict.fromkeys(
        ("attention", "pixels"), (2, 16, 16)
    )
    assert "mean intersection over union" in printed


def is_segmentation_noise(space, folder, printed):
    assert space["corrected"].shape == space["given"].shape == (20, 24, 24)
    assert [*space["adele"].curves[0]] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert "IoU with the true masks" in printed


CHECKS = {name: globals()[f"is_{name}"] for name in OURS}
