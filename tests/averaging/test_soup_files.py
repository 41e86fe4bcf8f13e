"""Soups of several runs: from files, by function and by command, in bounded memory."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.__main__ import main
from lightning_reg.averaging._state_dicts import StateDictMismatchError
from lightning_reg.functional import average_state_dicts, load_averaged, make_soup, slerp_merge, ties_merge, wise_ft

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # LightningCLI, of jsonargparse
]


def points(size=60):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.7 * torch.randn(size, 3, generator=generator)).argmax(1))


class Points(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(points(), 15)

    def val_dataloader(self):
        return DataLoader(points(), 30)


class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def linear(seed):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(3, 5, generator=torch.Generator().manual_seed(99))
    return {
        "weight": common + 0.1 * torch.randn(3, 5, generator=generator),
        "bias": torch.zeros(3),
        "n": torch.tensor(seed),
    }


def score(state):
    """``--evaluate``: accuracy of a linear model."""
    x, y = points().tensors
    return ((x @ state["weight"].T + state["bias"]).argmax(1) == y).float().mean().item()


def material():
    """``--learn-on``: module and batches."""
    return nn.Linear(5, 3), [points().tensors]


@pytest.fixture
def files(tmp_path):
    states = [linear(seed) for seed in range(4)]
    torch.save(states[0], tmp_path / "a.pt")
    torch.save({"state_dict": states[1], "epoch": 1, "hyper_parameters": {"width": 3}}, tmp_path / "b.ckpt")
    save_file(states[2], tmp_path / "c.safetensors")
    save_file({k: states[3][k] for k in ("weight", "n")}, tmp_path / "d-1.safetensors")
    save_file({"bias": states[3]["bias"]}, tmp_path / "d-2.safetensors")
    where = {"weight": "d-1.safetensors", "n": "d-1.safetensors", "bias": "d-2.safetensors"}
    (tmp_path / "d.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    names = ("a.pt", "b.ckpt", "c.safetensors", "d.safetensors.index.json")
    return [str(tmp_path / name) for name in names], states


def equal(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) for key in one)


def test_files_of_all_forms_are_averaged(files):
    paths, states = files
    soup = make_soup(paths)
    assert equal(soup.state_dict, average_state_dicts(states))
    assert soup.ingredients == paths
    assert soup.score is None
    assert equal(make_soup(paths, weights=[1, 0, 0, 3]).state_dict, average_state_dicts(states, [1, 0, 0, 3]))
    scored = make_soup(paths, evaluate=score, progress=True)
    assert [t.own_score for t in scored.trace] == [score(s) for s in states]
    assert scored.score == score(scored.state_dict)


def test_greedy_soup_of_files_is_that_of_the_state_dicts(files, tmp_path):
    paths, states = files
    soup = make_soup(paths, "greedy", score, out=tmp_path / "soup.ckpt")
    assert soup.score >= max(score(s) for s in states)
    assert score(soup.state_dict) == soup.score
    members = [states[paths.index(name)] for name in soup.ingredients]
    assert equal(soup.state_dict, average_state_dicts(members))
    assert equal(load_averaged(tmp_path / "soup.ckpt"), soup.state_dict)
    record = torch.load(tmp_path / "soup.ckpt", weights_only=True)["lightning_reg"]["make_soup"]
    assert record["ingredients"] == soup.ingredients
    assert [t["accepted"] for t in record["trace"]] == [t.accepted for t in soup.trace]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([],), "`checkpoints` must name at least one file"),
        ((["a"], "median"), "`method` must be 'uniform' or 'greedy'"),
        ((["a"], "greedy"), "needs `evaluate`"),
    ],
)
def test_make_soup_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_soup(*arguments)


def test_files_that_differ_or_come_from_elsewhere(files, tmp_path):
    paths, _ = files
    torch.save({"weight": torch.zeros(3, 6), "bias": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(StateDictMismatchError, match=r"weight +float32 \(3, 5\) +float32 \(3, 6\) +.*x.pt"):
        make_soup([paths[0], tmp_path / "x.pt"], check_ancestry=False)
    torch.save({**linear(0), "weight": torch.randn(3, 5)}, tmp_path / "stranger.pt")
    with pytest.warns(UserWarning, match="may not share a basin"):
        make_soup([paths[0], tmp_path / "stranger.pt"])
    with pytest.warns(UserWarning, match="away from the start"):
        make_soup([paths[0], tmp_path / "stranger.pt"], start=paths[2])


def trained(tmp_path, seed):
    torch.manual_seed(0)
    model = Net()
    trainer = quiet_trainer(max_epochs=6)
    torch.manual_seed(seed)
    trainer.fit(model, DataLoader(points(), 15, shuffle=True), DataLoader(points(), 30))
    path = tmp_path / f"run{seed}.ckpt"
    trainer.save_checkpoint(path)
    return path


def quiet_trainer(**options):
    fixed = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, log_every_n_steps=1, **(fixed | options))


def test_lightning_runs_through_their_own_validation_with_new_batch_statistics(tmp_path):
    from lightning_reg import TrainerEvaluation

    paths = [trained(tmp_path, seed) for seed in range(3)]
    model = Net()
    evaluate = TrainerEvaluation(
        quiet_trainer(), model, "val_loss", datamodule=Points(), train_batches=DataLoader(points(), 15)
    )
    soup = make_soup(paths, "greedy", evaluate, mode="min", out=tmp_path / "soup.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "soup.ckpt", weights_only=True)  # hyperparameters went along
    with torch.no_grad():
        hidden = [loaded.net[0](x) for x, _ in DataLoader(points(), 15)]
    mean = torch.stack([h.double().mean(0) for h in hidden]).mean(0).float()
    torch.testing.assert_close(loaded.net[1].running_mean, mean, rtol=1e-4, atol=1e-5)  # float32
    trainer = quiet_trainer()
    assert trainer.validate(loaded, Points(), verbose=False)[0]["val_loss"] == pytest.approx(soup.score, abs=1e-6)
    assert soup.score <= min(t.own_score for t in soup.trace)
    assert len(soup.scores_before_batch_norm) == 5
    with pytest.raises(ValueError, match=r"logged no 'f1', but \['val_acc', 'val_loss'\]"):
        TrainerEvaluation(quiet_trainer(), model, "f1", datamodule=Points())(model.state_dict())


# -- the command ------------------------------------------------------------------------------------------------------

HERE = "tests.averaging.test_soup_files"


def run(*words):
    main(["soup", *map(str, words)])


def test_command_prints_every_decision(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    paths, _ = files
    out = tmp_path / "soup.safetensors"
    run("greedy", *paths, "--out", out, "--evaluate", f"{HERE}:score")
    printed = capsys.readouterr().out
    soup = make_soup(paths, "greedy", score)
    assert equal(load_averaged(out), soup.state_dict)
    rows = [line for line in printed.splitlines() if str(tmp_path) in line and "│" in line]
    assert len(rows) == 4
    for candidate, row in zip(soup.trace, rows, strict=True):
        assert candidate.name in row
        assert f"{candidate.own_score:.6g}" in row
        assert (" in " in row) is candidate.accepted
    assert f"{soup.score:.6g}" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["uniform"], average_state_dicts),
        (["uniform", "--weights", "1", "3"], lambda s: average_state_dicts(s, [1, 3])),
        (["wise-ft", "--alpha", "0.25"], lambda s: wise_ft(*s, 0.25)),
        (["slerp", "--t", "0.25"], lambda s: slerp_merge(*s, 0.25)),
        (["ties", "--density", "0.5"], lambda s: ties_merge(s[0], s[1:], 0.5)),
    ],
)
def test_commands_are_the_functions(words, expected, files, tmp_path, capsys):
    paths, states = files
    run(*words[:1], *paths[:2], "--out", tmp_path / "o.ckpt", *words[1:])
    assert equal(load_averaged(tmp_path / "o.ckpt"), expected(states[:2]))
    carried = torch.load(tmp_path / "o.ckpt", weights_only=True)
    assert "hyper_parameters" not in carried  # the first file has none
    assert "soup of 2" in " ".join(capsys.readouterr().out.split())


def test_commands_that_draw_or_learn(files, tmp_path, capsys):
    paths, states = files
    for seed in (0, 0, 1):
        run("dare", *paths[:3], "--out", tmp_path / f"dare{seed}.pt", "--seed", seed, "--force", "--rescale", "norm")
    assert not equal(load_averaged(tmp_path / "dare0.pt"), load_averaged(tmp_path / "dare1.pt"))
    run(
        "learned",
        *paths,
        "--out",
        tmp_path / "l.pt",
        "--learn-on",
        f"{HERE}:material",
        "--evaluate",
        f"{HERE}:score",
        "--per",
        "model",
    )
    learned = load_averaged(tmp_path / "l.pt")
    weights = torch.stack([s["weight"].flatten() for s in states])
    mix = torch.linalg.lstsq(weights.T.double(), learned["weight"].flatten().double()[:, None]).solution
    assert mix.sum().item() == pytest.approx(1, abs=1e-4)
    assert (mix > 0).all()
    assert "soup" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (f"model: {{class_path: {HERE}.Net, init_args: {{width: 8}}}}\ndata: {{class_path: {HERE}.Points}}\n", []),
        # As `LightningCLI(Net, Points)` writes it, and what it knows besides.
        ("model: {width: 8}\nckpt_path: null\n", ["--model", f"{HERE}:Net", "--data", f"{HERE}:Points"]),
    ],
)
def test_a_lightning_config_evaluates(classes, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-reg", "soup"])  # Lightning's CLI warns of words that are not its own
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"{classes}trainer: {{accelerator: cpu, devices: 1, enable_checkpointing: false,"
        " enable_progress_bar: false, enable_model_summary: false}\nseed_everything: 1\n"
    )
    paths = [trained(tmp_path, seed) for seed in range(2)]
    scores = ["--config", config, "--monitor", "val_loss", "--mode", "min"]
    run("greedy", *paths, "--out", tmp_path / "s.ckpt", *scores, *words)
    assert not (tmp_path / "lightning_logs").exists()
    record = torch.load(tmp_path / "s.ckpt", weights_only=True)["lightning_reg"]["make_soup"]
    assert len(record["trace"]) == 2
    loaded = Net.load_from_checkpoint(tmp_path / "s.ckpt", weights_only=True)
    scored = quiet_trainer().validate(loaded, Points(), verbose=False)[0]["val_loss"]
    assert scored == pytest.approx(record["score"], abs=1e-6)


class Unknown:
    pass


def test_command_refuses_in_words(files, tmp_path, capsys):
    paths, _ = files
    torch.save({"state_dict": linear(0), "x": Unknown()}, tmp_path / "u.ckpt")
    (tmp_path / "old.ckpt").write_text("mine")
    out = ["--out", tmp_path / "o.ckpt"]
    (tmp_path / "c.yaml").write_text(f"data: {{class_path: {HERE}.Points}}\nmodel: {{width: 8}}")
    (tmp_path / "d.yaml").write_text(f"data: {{class_path: {HERE}.Points}}\nmodel: {{class_path: {HERE}.Nothing}}")
    (tmp_path / "e.yaml").write_text("model: {width")
    (tmp_path / "f.yaml").write_text("- width")
    config = ["greedy", *paths, *out, "--monitor", "val_loss", "--config"]
    for words, sentence in [
        (["uniform", tmp_path / "u.ckpt", *out], "holds more than tensors and plain values"),
        (["uniform", tmp_path / "none.ckpt", *out], "There is no file"),
        (["uniform", *paths, "--out", tmp_path / "old.ckpt"], "exists; give --force to replace it"),
        (["greedy", *paths, *out], "needs a held-out score"),
        (["greedy", *paths, *out, "--evaluate", "nowhere:f"], "there is no nowhere:f"),
        (["greedy", *paths, *out, "--evaluate", "f"], "must be written module:function"),
        (["greedy", *paths, *out, "--config", "c.yaml"], "--config needs --monitor"),
        (["greedy", *paths, *out, "--config", "c.yaml", "--evaluate", "a:b"], "exclude each other"),
        ([*config, tmp_path / "c.yaml"], "of which class the model is, as .* give --model package.module:Class"),
        ([*config, tmp_path / "d.yaml"], "d.yaml could not be read: .*Nothing"),
        ([*config, tmp_path / "e.yaml"], "e.yaml could not be read: while parsing a flow mapping"),
        ([*config, tmp_path / "f.yaml"], "f.yaml could not be read: it holds no mapping"),
        (["wise-ft", *paths, *out], "takes two checkpoints"),
        (["wise-ft", *paths[:2], *out, "--alpha", "2"], "`alpha` must be in"),
    ]:
        with pytest.raises(SystemExit):
            run(*words)
        assert re.search(sentence, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "o.ckpt").exists()
    assert (tmp_path / "old.ckpt").read_text() == "mine"


# -- memory -----------------------------------------------------------------------------------------------------------

STREAM = """
import resource, sys, torch
from lightning_reg.functional import make_soup
def used(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) // 1024
make_soup([sys.argv[1]] * 2, check_ancestry=False)
before = used("VmRSS")
soup = make_soup(sys.argv[2:], check_ancestry=False)
print(used("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_uniform_soup_takes_the_memory_of_one_model(suffix, tmp_path):
    paths = []
    for i in range(5):
        weights = {f"w{j}": torch.full((2048, 1024), float(i + j)) for j in range(8)}  # 64 MB
        path = tmp_path / f"{i}.{suffix}"
        save_file(weights, path) if suffix == "safetensors" else torch.save({"state_dict": weights}, path)
        paths.append(str(path))
    torch.save({"w": torch.zeros(4)}, tmp_path / "small.pt")
    command = [sys.executable, "-W", "ignore", "-c", STREAM, str(tmp_path / "small.pt"), *paths]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 60 < peak < 64 + 32  # one model and some 10 MB, whatever the number of files (320 MB)
