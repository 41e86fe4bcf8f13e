"""The command ``lightning-reg``: what it shows, what it writes, how it refuses."""

import csv
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file

import lightning_reg
from lightning_reg import _compare, _doctor, functional, registry
from lightning_reg.__main__ import main
from lightning_reg.functional import nm_mask
from lightning_reg.noisy_labels.elr.elr import ELRCallback
from lightning_reg.noisy_labels.elr_plus.elr_plus import ELRPlusCallback
from lightning_reg.sparsity.nm_sparsity._command import most_kept, tightest
from tests.conformance.discovery import case_of
from tests.conformance.harness import fit

COMMAND = Path(sys.executable).with_name("lightning-reg")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def refused(capsys, code, *words):
    """The one sentence."""
    with pytest.raises(SystemExit) as left:
        main([*map(str, words)])
    output = capsys.readouterr()
    assert left.value.code == code
    assert output.err.startswith("lightning-reg: ")
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    return output.err


# -- the installed command --------------------------------------------------------------------------------------------


def test_the_installed_command_works_and_its_exit_code_says_so(tmp_path, monkeypatch, capsys):
    for name, value in (("a", 1.0), ("b", 3.0)):
        torch.save({"weight": torch.full((2, 2), value)}, tmp_path / f"{name}.pt")
    words = ["soup", "uniform", "a.pt", "b.pt", "--out", "soup.safetensors"]
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "uniform soup of 2" in done.stdout
    assert (tmp_path / "soup.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(COMMAND), *words])
    with pytest.raises(SystemExit) as left:  # the same script, in this process: another one takes seconds to start
        runpy.run_path(str(COMMAND), run_name="__main__")
    assert left.value.code == 1
    assert capsys.readouterr().err == "lightning-reg: soup.safetensors exists; give --force to replace it.\n"


def test_without_jsonargparse_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lightning_reg.engine.host.commands")
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "`pip install 'jsonargparse[signatures]'`" in refused(capsys, 1, "list")


def test_help_names_every_command_and_argument(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for command in ("list", "show", "soup", "sparsity", "suspects", "compare", "doctor"):
        assert f"    {command} " in printed
    with pytest.raises(SystemExit):
        main(["soup", "dare", "--help"])
    printed = capsys.readouterr().out
    for option in ("CKPT", "--out", "--density", "--elect-signs", "--evaluate"):
        assert option in printed


def test_words_that_are_not_understood_are_said_with_where_to_look(capsys):
    assert "invalid choice: 'generate'" in refused(capsys, 2, "generate")
    assert "See `lightning-reg list --help`." in refused(capsys, 2, "list", "--nonsense")
    assert "soup.greedy.out" in refused(capsys, 2, "soup", "greedy", "a.pt")
    assert "max_ingredients" in refused(capsys, 2, "soup", "greedy", "a", "--out", "b", "--max-ingredients", "two")


# -- list and show ----------------------------------------------------------------------------------------------------


def test_list_shows_one_purpose(capsys):
    main(["list", "--for", "noisy_labels"])
    printed = capsys.readouterr().out
    assert "ELRPlusCallback" in printed
    assert "NMSparsity" not in printed
    words = ["list", "--for", "noisy_labels", "--kind", "sampler"]
    assert "there is no sampler for noisy labels." in refused(capsys, 1, *words)


def test_a_list_of_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(registry, "units", list)
    assert "there is no sampler." in refused(capsys, 1, "list", "--kind", "sampler")
    assert "there is no unit." in refused(capsys, 1, "list")


def test_show_has_a_card_for_all_techniques_and_one_of_each_other_kind(capsys):
    members = [member for unit in registry.units() for member in unit.members()]
    others = {member.kind: member.name for member in members if member.kind != "technique"}
    for name in [*(m.name for m in members if m.kind == "technique"), *others.values(), "elr_loss", "SoupResult"]:
        main(["show", name])
        printed = capsys.readouterr().out
        package = lightning_reg if name in lightning_reg.__all__ else functional
        assert f"from {package.__name__} import {name} " in printed
        for argument in inspect.signature(getattr(package, name)).parameters:
            assert f"│ {argument} " in printed
    assert "did you mean ELRCallback" in refused(capsys, 1, "show", "elrcalback")
    assert "`lightning-reg list` shows" in refused(capsys, 1, "show", "zzz")


def test_a_card_says_defaults_meanings_and_what_it_goes_with(capsys):
    main(["show", "ELRCallback"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "ELRCallback: technique for noisy labels" in printed
    assert "│ lam │ 3.0 │ Weight of the regularizer (lambda), at least 0." in printed
    assert "Source: Liu et al." in printed
    assert "- Mixup: ELRCallback learns about single samples" in printed
    assert ":math:" not in printed
    main(["show", "ConR"])
    assert "│ layer │ required │" in " ".join(capsys.readouterr().out.split())


def test_the_docstrings_arguments_are_those_of_the_signature():
    for unit in registry.units():
        for cls in unit.techniques():
            assert registry.arguments(cls).keys() == inspect.signature(cls).parameters.keys()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_sparsity_says_what_is_zero_in_which_pattern(tmp_path, capsys):
    torch.manual_seed(0)
    weight, kernel = torch.randn(4, 32), torch.randn(2, 16, 3)
    weights = {
        "half": weight * nm_mask(weight, 2, 4),
        "few": weight * nm_mask(weight, 1, 16),
        "kernel": kernel * nm_mask(kernel, 1, 8),
        "dense": weight,
        "bias": torch.zeros(4),
    }
    assert {name: tightest(value) for name, value in weights.items() if value.ndim > 1} == {
        "half": "2:4",
        "few": "1:16",
        "kernel": "1:8",
        "dense": "",
    }
    assert (most_kept(weights["half"], 4), most_kept(weights["half"], 5), most_kept(weight, 8)) == (2, -1, 8)
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    save_file({"few": weights["few"], "half": weights["half"]}, tmp_path / "a.safetensors")
    main(["sparsity", str(tmp_path / "a.ckpt")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "│ half │ 4 x 32 │ 50.0 % │ 2:4" in printed
    assert "│ few │ 4 x 32 │ 93.8 % │ 1:16" in printed
    assert "│ kernel │ 2 x 16 x 3 │ 87.5 % │ 1:8" in printed
    assert "3 of 4 weights have zeros; 55.8 % of all numbers are zero" in printed  # 64 + 120 + 84 of 480
    assert "dense" not in printed
    main(["sparsity", str(tmp_path / "a.safetensors"), "--pattern", "2:4", "--all"])
    assert "not 1:4 are half." in refused(capsys, 1, "sparsity", tmp_path / "a.safetensors", "--pattern", "1:4")


def test_sparsity_refuses_in_one_sentence(tmp_path, capsys):
    torch.save({"bias": torch.zeros(3)}, tmp_path / "bias.pt")
    torch.save({"w": torch.ones(2, 4)}, tmp_path / "dense.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"w": Path}, tmp_path / "code.pt")
    (tmp_path / "text.ckpt").write_text("words")
    (tmp_path / "text.safetensors").write_text("words")
    for words, sentence in [
        (["none.pt"], "There is no file"),
        (["bias.pt"], "holds no weights of two dimensions"),
        (["list.pt"], "holds no dictionary, but list"),
        (["code.pt"], "not read"),
        (["text.ckpt"], "no checkpoint: not read"),
        (["text.safetensors"], "cannot be read as a checkpoint"),
        (["dense.pt", "--pattern", "2:4"], "no weight has a zero"),
        (["dense.pt", "--pattern", "4:2"], "--pattern must be N:M with N below M"),
    ]:
        assert sentence in refused(capsys, 1, "sparsity", tmp_path / words[0], *words[1:])


@pytest.mark.parametrize("cls", [ELRCallback, ELRPlusCallback])
def test_suspects_are_those_of_the_run(cls, tmp_path, capsys):
    case = case_of(cls)
    technique = case.make()
    run = fit([technique], case.problem, max_epochs=1)
    run.trainer.save_checkpoint(tmp_path / "run.ckpt")
    errors = technique.label_errors()
    assert len(errors) > 3
    main(["suspects", str(tmp_path / "run.ckpt"), "--csv", str(tmp_path / "found.csv")])
    assert f"{len(errors)} suspected label errors" in capsys.readouterr().out
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = [(int(r["index"]), int(r["given"]), int(r["suggested"])) for r in csv.DictReader(file)]
    assert rows == [row[:3] for row in errors.rows()]


def test_suspects_refuses_in_one_sentence(tmp_path, capsys):
    case = case_of(ELRCallback)
    run = fit([case.make(), case.make(name="second")], case.problem, max_epochs=1)
    run.trainer.save_checkpoint(tmp_path / "two.ckpt")
    torch.save({"callbacks": {"Other": {}}}, tmp_path / "other.ckpt")
    assert "but the callbacks ['Other']" in refused(capsys, 1, "suspects", tmp_path / "other.ckpt")
    sentence = refused(capsys, 1, "suspects", tmp_path / "two.ckpt")
    assert "has targets of ELRCallback and ELRCallback[second]; write --callback 'ELRCallback'" in sentence
    main(["suspects", str(tmp_path / "two.ckpt"), "--callback", "ELRCallback[second]"])


def test_suspects_of_a_table_that_keeps_the_largest_targets(tmp_path):
    case = case_of(ELRCallback)
    technique = case.make(top_k=2, table_dtype="bfloat16")
    run = fit([technique], case.problem, max_epochs=1)
    run.trainer.save_checkpoint(tmp_path / "run.ckpt")
    main(["suspects", str(tmp_path / "run.ckpt"), "--csv", str(tmp_path / "found.csv")])
    technique.label_errors().to_csv(tmp_path / "wanted.csv")
    assert (tmp_path / "found.csv").read_text() == (tmp_path / "wanted.csv").read_text()


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_here_and_says_what_there_is(capsys):
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "Nothing is wrong." in printed
    for word in ("lightning_reg", "torch.compile", "torch.export", torch.__version__.partition("+")[0], "GPU"):
        assert word in printed


def test_doctor_names_compromised_releases_and_lost_names(monkeypatch, capsys):
    monkeypatch.setattr(_doctor, "_EXPORTS", (("fails", lambda *_: 1 / 0),))
    monkeypatch.setattr(_doctor.private_names, "missing_names", lambda: ["_gone"])
    monkeypatch.setattr(_doctor, "version", lambda name: "2.6.2" if name == "lightning" else "1.0")
    with pytest.raises(SystemExit) as left:
        main(["doctor"])
    output = capsys.readouterr()
    assert left.value.code == 1
    assert "does not work: ZeroDivisionError: division by zero" in output.out
    assert "lightning 2.6.2 was compromised" in output.err
    assert "rotate the credentials" in output.err
    assert "lack _gone" in output.err


# -- compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path):
    for version, factor in enumerate((1.0, 2.0)):
        logger = CSVLogger(tmp_path, "logs", version)
        for step in range(3):
            logger.log_metrics({"loss": factor / (step + 1)}, step)
        logger.log_metrics({"val_acc": 0.5 * factor}, 2)
        logger.save()
    return tmp_path / "logs"


def test_compare_shows_runs_side_by_side(logs, capsys):
    main(["compare", str(logs)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "┃ metric ┃ version_0 ┃ version_1 ┃" in printed
    assert "│ loss │ 0.3333 (0.3333 to 1) │ 0.6667 (0.6667 to 2) │" in printed
    assert "│ val_acc │ 0.5 │ 1 │" in printed
    main(["compare", str(logs / "version_1" / "metrics.csv"), str(logs / "version_0"), "--metric", "val_*"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "┃ metric ┃ version_1 ┃ version_0 ┃" in printed
    assert "loss" not in printed


def test_compare_draws_the_curves(logs, monkeypatch, capsys):
    out = logs / "curves.png"
    main(["compare", str(logs), "--plot", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(_compare, "_MOST_PLOTS", 1)
    assert "2 metrics do not fit into one picture" in refused(capsys, 1, "compare", logs, "--plot", out)
    monkeypatch.setitem(sys.modules, "lightning_reg.plots", None)  # as where matplotlib is missing
    assert "--plot needs matplotlib" in refused(capsys, 1, "compare", logs, "--plot", out)


def test_compare_refuses_in_one_sentence(logs, tmp_path, capsys):
    (tmp_path / "words.csv").write_text("step,loss\n0,high\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for words, sentence in [
        ([tmp_path / "none"], "is no log, and no folder"),
        ([tmp_path / "words.csv"], "has 'high' under loss"),
        ([tmp_path / "other.csv"], "has no column `step`"),
        ([logs / "version_0", logs / "version_0"], "a run is given twice"),
        ([logs, "--metric", "nothing*"], "no metric is called nothing*; there are loss, val_acc"),
    ]:
        assert sentence in refused(capsys, 1, "compare", *words)
