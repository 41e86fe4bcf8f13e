"""The benchmark for a GPU, in small on the CPU: every section runs, and what goes wrong stays in its part."""

import importlib
import json
import math
import re
import sys
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg import registry
from tests.structure import ROOT

FOLDER = ROOT / "benchmarks"
RESULTS = sorted((FOLDER / "results").glob("gpu_*.json"))
PAGE = ROOT / "docs" / "gpu.md"
NAMES = [path.stem for path in FOLDER.glob("*.py")] + ["gpu_sections"]


@pytest.fixture
def modules(monkeypatch):
    """Modules of the benchmarks by name; none of them stays imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)  # an example may have the same name
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in NAMES:
            del sys.modules[name]
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def numbers(figures):
    for name, value in figures.items():
        for number in value.values() if isinstance(value, dict) else [value]:
            if number is not None:
                yield name, number


def test_every_section_runs_in_small_and_is_not_run_again(modules, tmp_path, monkeypatch):
    gpu, record = modules("gpu"), modules("gpu_sections.record")
    assert gpu.main(["--smoke", "--results", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu_smoke.json").read_text())
    assert list(content["sections"]) == list(gpu.SECTIONS)
    reasons = {"count": "needs a GPU", "export": "CUDA devices only"}
    for section, entry in content["sections"].items():
        assert entry["finished"]
        assert entry["left_out"] == []
        for part, result in entry["parts"].items():
            assert result["figures"], (section, part, result)
            for name, number in numbers(result["figures"]):
                assert math.isfinite(number), (section, part, name)
                assert number > 0 or "/" not in name, (section, part, name)
            if None in result["figures"].values() and section in ("steps", "masks", "memory"):
                kind = next((reason for word, reason in reasons.items() if word in part), "needs a GPU")
                assert any(kind in note for note in result["notes"]), (section, part)
    assert (tmp_path / "gpu_smoke.md").read_text() == record.markdown(content)

    monkeypatch.setattr(gpu, "run_part", lambda *_: pytest.fail("run again"))
    assert gpu.main(["--smoke", "--results", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "gpu_smoke.json").read_text())
    assert again["sections"] == content["sections"]
    assert len(again["runs"]) == 2


def test_the_limits_are_those_of_the_page(modules):
    seconds = {name: modules(f"gpu_sections.{name}").SECONDS for name in modules("gpu").SECTIONS}
    assert max(seconds.values()) <= 8 * 60
    assert sum(seconds.values()) <= 25 * 60
    told = re.findall(r"^\| `(\w+)` \| ([\d.]+) (min|s) \|", PAGE.read_text(), re.MULTILINE)
    assert {name: float(number) * {"min": 60, "s": 1}[unit] for name, number, unit in told} == seconds


def test_what_is_measured_are_techniques(modules):
    arms = modules("gpu_sections.arms")
    known = {cls.key() for unit in registry.units() for cls in unit.techniques()}
    assert set(arms.OF_IMAGES) == set(arms.MAKERS) <= known  # those for models of other kinds have no arm
    assert set(arms.OF_ANY) < known


def test_the_networks_are_those_of_their_names(modules):
    networks = modules("gpu_sections.networks")
    with torch.device("meta"):
        nets = [networks.ResNet(), networks.ViT(), networks.GPT()]
    sizes = {type(net).__name__: sum(p.numel() for p in net.parameters()) for net in nets}
    assert sizes["ResNet"] == 25_557_032  # as torchvision's
    assert sizes["ViT"] == 86_567_656 - 2 * 768  # torchvision's, less the class token and its place
    assert sizes["GPT"] == 124_439_808  # as transformers' GPT2Config()


# -- what may go wrong on the day --------------------------------------------------------------------------------------


@pytest.fixture
def small(modules, tmp_path):
    return modules("gpu_sections.setting").Setting(True, "cpu", tmp_path)


def test_where_memory_is_out_the_batch_is_halved_and_said(modules, small):
    setting = modules("gpu_sections.setting")

    def run(given):
        if given.batch > 16:
            raise torch.OutOfMemoryError("so many GiB")
        return {"figures": {"rows": given.batch}, "notes": ["its own"]}

    result = setting.run_part(setting.Part("name", run, batch=64), small)
    assert (result["figures"], result["batch"]) == ({"rows": 16}, 16)
    assert result["notes"] == [f"out of memory with a batch of {batch}: halved" for batch in (64, 32)] + ["its own"]
    without = setting.run_part(setting.Part("name", lambda _: run(replace(small, batch=17))), small)
    assert without["error"] == "out of memory: so many GiB"


def test_an_error_ends_its_part_alone(modules, small):
    setting = modules("gpu_sections.setting")
    result = setting.run_part(setting.Part("name", lambda _: 1 / 0), small)
    assert result["error"] == "ZeroDivisionError: division by zero"


def test_an_error_of_one_arm_ends_the_turns(modules):
    by_hand, turns = modules("by_hand"), modules("turns")

    class Fails(by_hand.Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise torch.OutOfMemoryError("so many GiB")
            return super().training_step(batch, batch_idx)

    data = [(torch.randn(3), torch.tensor(1), 0)] * 8
    arms = {"plain": (by_hand.Plain(nn.Linear(3, 2)), []), "fails": (Fails(nn.Linear(3, 2)), [])}
    before = threading.active_count()
    with pytest.raises(torch.OutOfMemoryError), quiet(modules):
        turns.fit_in_turns(arms, lambda: DataLoader(data, 2), turns.Turns(arms, 4))
    assert threading.active_count() == before


def quiet(modules):
    return modules("gpu").quiet()


def test_turns_end_when_their_time_is_over(modules):
    by_hand, turns = modules("by_hand"), modules("turns")
    data = [(torch.randn(3), torch.tensor(1), 0)] * 40
    arms = {name: (by_hand.Plain(nn.Linear(3, 2)), []) for name in ("one", "other")}
    taken = turns.Turns(arms, 20, seconds=0.0, at_least=3)
    with quiet(modules):
        times = turns.fit_in_turns(arms, lambda: DataLoader(data, 2), taken)
    assert [len(values) for values in times.values()] == [3, 3]


def test_what_failed_or_had_no_time_is_done_by_the_next_call(modules, tmp_path, monkeypatch):
    gpu, setting = modules("gpu"), modules("gpu_sections.setting")
    section, fails, ran = modules("gpu_sections.averages"), [True], []

    def run(name, given):
        ran.append(name)
        if name == "second" and fails.pop(0):
            raise RuntimeError("no such kernel")
        return {"figures": {"value": 1.0}}

    names = ("first", "second", "third")
    parts = [setting.Part(name, lambda given, n=name: run(n, given), needs=1e9 * (name == "third")) for name in names]
    monkeypatch.setattr(section, "parts", lambda _: parts)
    command = ["--smoke", "--sections", "averages", "--results", str(tmp_path)]
    fails.append(False)
    gpu.main(command)
    entry = json.loads((tmp_path / "gpu_smoke.json").read_text())["sections"]["averages"]
    assert entry["parts"]["second"]["error"] == "RuntimeError: no such kernel"
    assert (entry["left_out"], entry["finished"]) == (["third"], False)
    parts[2].needs = 0.0
    gpu.main(command)
    entry = json.loads((tmp_path / "gpu_smoke.json").read_text())["sections"]["averages"]
    assert ran == ["first", "second", "second", "third"]
    assert entry["finished"]
    assert list(entry["parts"]) == list(names)


def test_an_interrupted_call_keeps_what_is_done(modules, tmp_path, monkeypatch):
    gpu, setting = modules("gpu"), modules("gpu_sections.setting")

    def interrupted(_):
        raise KeyboardInterrupt

    parts = [setting.Part("first", lambda _: {"figures": {"value": 1.0}}), setting.Part("second", interrupted)]
    monkeypatch.setattr(modules("gpu_sections.averages"), "parts", lambda _: parts)
    assert gpu.main(["--smoke", "--sections", "averages", "--results", str(tmp_path)]) == 130
    assert list(json.loads((tmp_path / "gpu_smoke.json").read_text())["sections"]["averages"]["parts"]) == ["first"]


def test_waits_of_the_host_are_counted_by_torchs_warnings(modules, monkeypatch):
    by_hand, counting = modules("by_hand"), modules("gpu_sections.counting")
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Waits(by_hand.Plain):
        def training_step(self, batch, batch_idx):
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
            return super().training_step(batch, batch_idx)

    counts = counting.Counts(True, first=1, steps=3)
    loader = DataLoader([(torch.randn(3), torch.tensor(1), 0)] * 20, 2)
    with quiet(modules):
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 8}
        Trainer(callbacks=[counts], accelerator="cpu", **options).fit(Waits(nn.Linear(3, 2)), loader)
    assert modes == ["warn", "default"]
    assert sum(counts.places.values()) == 3 * 2
    assert all(place.partition(":")[0].endswith("test_gpu_benchmark.py") for place in counts.places)


def tiny(modules):
    """A classifier that is quick, and data for it."""
    training, published = modules("gpu_sections.training"), modules("gpu_sections.published")
    sgd = lambda module, epochs, steps: torch.optim.SGD(module.parameters(), 0.1)  # noqa: E731
    return training, training.Classifier(published.small_net(), sgd)


def test_a_run_is_cut_to_the_time_there_is(modules, small):
    training, module = tiny(modules)
    columns = training.cifar10(small)
    late = replace(small, small=False, batch=32, seconds=0.0)
    with quiet(modules):
        result = training.train(module, [], columns, 3, late)
        loader = DataLoader([(torch.zeros(3, 32, 32), torch.tensor(1), 0)] * 8, 4)
        fits = [
            training.epochs_that_fit(module, [], loader, 7, replace(late, seconds=seconds), "")[0]
            for seconds in (0.0, 1e6)
        ]
    assert result["figures"]["epochs"] == 1
    assert result["notes"] == ["1 of 3 epochs, as time allows; the schedule is scaled to 1"]
    assert fits == [1, 7]


def test_where_the_compiler_fails_a_run_is_eager_and_says_so(modules, small, monkeypatch):
    training, module = tiny(modules)

    def fails(net, backend):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(training, "compile_", fails)
    given = replace(small, batch=32, compile=True)
    with quiet(modules):
        result = training.train(module, [], training.cifar10(small), 1, given)
    assert result["notes"] == ["not compiled: RuntimeError: no compiler"]
    assert result["figures"]["epochs"] == 1


def test_without_a_gpu_it_says_what_to_write(modules, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        modules("gpu").main([])
    assert "there is no GPU here; `--smoke` runs everything in small on the CPU" in capsys.readouterr().err


def test_results_of_another_machine_are_not_mixed_in(modules, tmp_path):
    record = modules("gpu_sections.record")
    path = tmp_path / "gpu_name.json"
    path.write_text(json.dumps({"facts": {"device": "H200"}, "runs": [], "sections": {}}))
    with pytest.raises(SystemExit, match="results of H200, and this is H100"):
        record.Record(path, {"device": "H100", "run": {}})


def test_bars_are_met_or_missed(modules):
    record = modules("gpu_sections.record")
    ratio = {"median": 1.02, "low": 0.9, "high": 1.1}
    parts = {
        "a": {"figures": {"engine / by hand": ratio, "plain, ms": 3.0}},
        "b": {"figures": {"engine / by hand": ratio | {"median": 1.03}, "plain, ms": 3.0}},
        "c": {"figures": {"host syncs per step": None}, "notes": ["needs a GPU"]},
        "d": {"error": "RuntimeError: gone"},
    }
    content = {"sections": {"steps": {"parts": parts, "left_out": ["e"]}}, "runs": [{"started": "now", "command": "c"}]}
    content["facts"] = {"device": "H100", "small": False, "seed": 0, "cpu_cores": 2, "versions": {"torch": "2"}}
    assert [row[1::3] for row in record.verdicts(content)] == [("a", True), ("b", False)]
    text = record.markdown(content)
    assert "| a | 1.020 (0.900 to 1.100) met | 3.000 |" in text
    assert "- missed: steps, b: engine / by hand 1.030 (0.900 to 1.100), bar at most 1.02" in text
    assert "Bars: 1 of 2 met." in text
    assert "- d: RuntimeError: gone" in text
    assert "- no time was left for e; a further call goes on there" in text


# -- the pages ---------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_results(modules):
    markdown = modules("gpu_sections.record").markdown
    for path in RESULTS:
        assert path.with_suffix(".md").read_text() == markdown(json.loads(path.read_text())), path.name


def test_the_page_says_what_was_run():
    linked = re.findall(r"\]\(\.\./benchmarks/results/(gpu_\w+)\.md\)", PAGE.read_text())
    assert linked == [path.stem for path in RESULTS]
    assert ("Not yet run" in PAGE.read_text()) == (not RESULTS)
