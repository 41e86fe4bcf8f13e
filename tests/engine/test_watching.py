"""What one sees of a run: values beside Lightning's own bars, long work in them, a table at the end."""

import io
import sys
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console
from rich.progress import Progress

from lightning_reg import EWC, ELRCallback, LossReweighting, NMSparsity, SoupAverager
from lightning_reg.__main__ import main
from lightning_reg.averaging.model_soups.files import make_soup
from lightning_reg.engine.run import passes, report, watching
from lightning_reg.engine.run.phases import PHASES
from lightning_reg.sparsity.nm_sparsity._permute import Probe
from tests.conformance.discovery import case_of
from tests.conformance.harness import fit
from tests.conformance.problems import BATCHES, KINDS

BARS = [RichProgressBar, TQDMProgressBar]
SHOWN = {"enable_progress_bar": True, "enable_model_summary": True, "log_every_n_steps": 1}


class Columns(Callback):
    """What the bar would show after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        shown = trainer.progress_bar_callback.get_metrics(trainer, pl_module)
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        self.seen.append((shown, logged))


@pytest.mark.parametrize("bar", BARS)
def test_values_stand_beside_lightnings_bar_and_are_those_in_the_log(bar, capsys):
    columns, mine = Columns(), bar()
    elr, reweighting = ELRCallback(lam=3.0), LossReweighting(warmup_steps=0)
    run = fit([elr, reweighting, columns, mine], KINDS["classification"], max_epochs=2, **SHOWN)
    shown = columns.seen[-1][0]
    ours = [name for name in shown if name.startswith(("elr", "loss_reweighting"))]
    assert len(ours) == 2
    assert ours[1] == "loss_reweighting/effective_samples"
    assert f"reg/{ours[0]}" in run.own_scalars
    # The hook sees the log of the step before: Lightning writes it after the hooks.
    rows = {step: row for step, row in run.logged if f"reg/{ours[0]}" in row}
    assert [seen[ours[0]] for seen, _ in columns.seen] == [pytest.approx(rows[step][f"reg/{ours[0]}"]) for step in rows]
    assert "get_metrics" not in vars(mine)  # left as it was
    capsys.readouterr()


def test_a_value_stays_between_steps_that_log_and_is_read_once(monkeypatch, capsys):
    columns, reads = Columns(), []
    monkeypatch.setattr(watching, "float", lambda value: reads.append(value) or float(value), raising=False)
    bar = {"enable_progress_bar": True, "log_every_n_steps": 3, "max_epochs": 1}
    fit([ELRCallback(lam=3.0), columns, TQDMProgressBar()], KINDS["classification"], **bar)
    (name,) = {key for seen, _ in columns.seen for key in seen if key.startswith("elr")}
    values = [seen.get(name) for seen, _ in columns.seen]
    assert len(values) == BATCHES
    assert values[:2] == [None] * 2
    assert values[2:5] == [values[2]] * 3 != [None] * 3
    assert values[5] != values[2]
    assert len(reads) == 2
    capsys.readouterr()


@pytest.mark.parametrize("bar", BARS)
def test_a_table_at_the_end_has_first_and_last(bar, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run = fit([ELRCallback(lam=3.0), bar()], KINDS["classification"], max_epochs=1, **SHOWN)
    printed = " ".join(capsys.readouterr().out.split())
    assert "lightning_reg, at the end" in printed
    for name in run.own_scalars - {"reg/loss/base", "reg/loss/total"}:
        values = [row[name] for _, row in run.logged if name in row]
        assert f"│ ELRCallback │ {name.removeprefix('reg/elr/')} │ {values[0]:.4g} │ {values[-1]:.4g} │" in printed
    fit([ELRCallback(lam=3.0)], KINDS["classification"], max_epochs=1, enable_model_summary=False)
    assert "at the end" not in capsys.readouterr().out


@pytest.mark.parametrize("bar", [*BARS, None])
def test_long_work_is_shown_in_the_bar_that_is_there(bar, monkeypatch, capsys):
    seen = []
    real = watching.progress

    def noted(trainer, what, total):
        live = watching._rich_progress(trainer)
        seen.append([what, total, bar is RichProgressBar and [task.description for task in live.tasks]])
        return real(trainer, what, total)

    monkeypatch.setattr("lightning_reg.continual.weight_anchors.ewc.progress", noted)
    monkeypatch.setattr("lightning_reg.averaging.model_soups.model_soups.progress", noted)
    techniques = [EWC(5.0), SoupAverager(method="greedy", monitor="val_loss", mode="min"), *([bar()] if bar else [])]
    options = {"enable_progress_bar": bar is not None}
    fit(techniques, KINDS["classification"], max_epochs=2, **options)
    assert sorted(row[:2] for row in seen) == [["EWC: Fisher information", BATCHES], ["SoupAverager: candidates", 4]]
    capsys.readouterr()


def test_long_work_has_the_time_left(capsys):
    class During(Callback):
        def on_train_end(self, trainer, pl_module):
            with watching.progress(trainer, "work", 3) as advance:
                live = watching._rich_progress(trainer)
                assert list(watching.counted("abc", advance)) == ["a", "b", "c"]
                task = live.tasks[-1]
                assert (task.description, task.total, task.completed) == ("work", 3, 3)
                assert watching.told(str.upper, advance)("d") == "D"
                assert task.completed == 4
                names = [type(column).__name__ for column in live.columns]
                assert "CustomTimeColumn" in names  # of Lightning: elapsed and left
            assert not task.visible

    fit([During(), case_of(ELRCallback).make(), RichProgressBar()], KINDS["classification"], max_epochs=1, **SHOWN)
    capsys.readouterr()


@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize("alone", [False, True])
def test_the_search_for_channel_orders_is_shown(bar, alone, monkeypatch, capsys):
    seen, real = [], watching.progress

    @contextmanager
    def noted(trainer, what, total):
        with real(trainer, what, total) as advance:
            seen.append([what, total, 0])

            def counting():
                seen[-1][2] += 1
                advance()

            yield counting

    monkeypatch.setattr("lightning_reg.sparsity.nm_sparsity._permute.progress", noted)
    if alone:  # the whole network would compute something else: each layer is tried again
        answers = iter([False])
        monkeypatch.setattr(Probe, "unchanged", lambda self: next(answers, True))
    fit([NMSparsity(2, 4, layers=["*.body", "*.head"], permute=True), bar()], KINDS["classification"], **SHOWN)
    again = [["NMSparsity: channel orders, one layer at a time", 2, 2]] if alone else []
    assert seen == [["NMSparsity: channel orders", 2, 2], *again]
    capsys.readouterr()


class Kept(Progress):
    """Keeps what stood in every bar."""

    stood: ClassVar[list[tuple[str, float | None, float]]] = []

    def stop(self):
        super().stop()
        self.stood += [(task.description, task.total, task.completed) for task in self.tasks]


MIXES = {
    "wise-ft": ["a.pt", "b.pt"],
    "slerp": ["a.pt", "b.pt"],
    "ties": ["a.pt", "b.pt", "c.pt"],
    "dare": ["a.pt", "b.pt", "c.pt"],
    "uniform": ["a.pt", "b.pt", "c.pt"],
    "learned": ["a.pt", "b.pt", "c.pt", "--learn-on", "work_of_mine:held_out", "--epochs", "3"],
}
WORK = """
import torch

def held_out():
    return torch.nn.Linear(4, 2), [(torch.ones(3, 4), torch.tensor([0, 1, 0]))] * 5

def score(state):
    return float(state["weight"].sum())
"""


@pytest.mark.parametrize("method", MIXES)
def test_every_mix_of_files_has_a_bar_that_comes_to_its_end(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work_of_mine.py").write_text(WORK)
    monkeypatch.delitem(sys.modules, "work_of_mine", raising=False)
    monkeypatch.setattr("lightning_reg.averaging._file_bars.Progress", Kept)
    monkeypatch.setattr(Kept, "stood", [])
    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        weights = {"weight": 5 + torch.randn(2, 4, generator=generator), "bias": torch.ones(2)}
        torch.save(weights, f"{name}.pt")
    evaluated = [] if method == "learned" else ["--evaluate", "work_of_mine:score"]
    assert main(["soup", method, *MIXES[method], "--out", "soup.safetensors", *evaluated]) in (0, None)
    number = sum(name.endswith(".pt") for name in MIXES[method])
    size = 40.0 * number  # 10 numbers in each file
    words = {"uniform": f"averaging {number} files", "learned": f"reading {number} files"}
    bars = [(words.get(method, f"{method} of {number} files"), size, size)]
    if method == "learned":
        bars.append(("learning mixing weights", 15, 15))
    else:
        bars.insert(0, ("scoring candidates", number, number))
    if method not in ("learned", "uniform"):
        bars.append(("scoring candidates", 1, 1))
    assert Kept.stood == bars
    capsys.readouterr()


def test_a_greedy_soup_of_files_shows_its_candidates(tmp_path, monkeypatch):
    shown = io.StringIO()
    console = partial(Console, file=shown, force_terminal=True, width=100)
    monkeypatch.setattr("lightning_reg.averaging._file_bars.Console", lambda **_: console())
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.pt")
        torch.save({"w": torch.full((2, 2), float(i))}, paths[-1])
    quiet = make_soup(paths, "greedy", lambda s: -float(s["w"].mean()), check_ancestry=False)
    assert shown.getvalue() == ""
    loud = make_soup(paths, "greedy", lambda s: -float(s["w"].mean()), check_ancestry=False, progress=True)
    assert loud.trace == quiet.trace
    assert "scoring candidates" in shown.getvalue()
    assert "5/5" in shown.getvalue()


@pytest.mark.parametrize("bar", BARS)
def test_what_a_technique_measures_outside_of_the_step_is_shown_too(bar, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    columns = Columns()
    sparse = NMSparsity(1, 4, dense_steps=1, validate_hard_mask=True)
    run = fit([sparse, columns, bar()], KINDS["classification"], max_epochs=1, **SHOWN)
    factors = [row["reg/nm_sparsity/factor"] for _, row in run.logged if "reg/nm_sparsity/factor" in row]
    assert columns.seen[-1][0]["nm_sparsity/factor"] == pytest.approx(factors[-1])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"│ NMSparsity │ factor │ {factors[0]:.4g} │ {factors[-1]:.4g} │" in printed


def test_a_validation_of_ours_has_a_line_with_its_batches(monkeypatch, capsys):
    seen = []
    real = passes.progress

    @contextmanager
    def noted(trainer, what, total):
        with real(trainer, what, total) as advance:
            seen.append([what, total, 0])

            def counted():
                seen[-1][2] += 1
                advance()

            yield counted

    monkeypatch.setattr(passes, "progress", noted)
    sparse = NMSparsity(1, 4, dense_steps=1, validate_hard_mask=True)
    fit([sparse, RichProgressBar()], KINDS["classification"], max_epochs=1, **SHOWN)
    assert seen
    assert all(what == "NMSparsity: with the target mask" and total == done > 0 for what, total, done in seen)
    capsys.readouterr()


def test_the_table_at_the_start_has_words_for_every_phase():
    assert set(report._CHANGES) == set(PHASES)
