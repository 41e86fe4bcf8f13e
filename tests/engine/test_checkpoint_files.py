"""Files with weights: read safely, a piece at a time, and written whole or not at all."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_reg.averaging._checkpoint_files import UntrustedFileError, open_checkpoint
from lightning_reg.averaging._written_files import save_weights
from lightning_reg.engine.host.written import write_atomically

WEIGHTS = {"a.w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "flag": torch.tensor([True, False])}


def same(file, expected=WEIGHTS):
    assert list(file) == list(expected) or sorted(file) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(file[key], value)
        assert file[key].dtype == value.dtype
        assert file.shape_and_dtype(key) == (tuple(value.shape), value.dtype)
    return len(file) == len(expected)


def test_all_forms_give_the_same_weights(tmp_path):
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, tmp_path / "lightning.ckpt")
    torch.save({"ema": WEIGHTS, "model": {}}, tmp_path / "several.pt")
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    save_file({"a.w": WEIGHTS["a.w"]}, tmp_path / "s-1.safetensors")
    torch.save({key: WEIGHTS[key] for key in ("n", "flag")}, tmp_path / "s-2.bin")
    index = {"metadata": {"size": 1}, "weight_map": {"a.w": "s-1.safetensors", "n": "s-2.bin", "flag": "s-2.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("plain.pt", "lightning.ckpt", "old.pt", "w.safetensors", "model.safetensors.index.json"):
        file = open_checkpoint(tmp_path / name)
        assert same(file)
        assert file.nbytes == 24 + 8 + 2
        assert file.read("a.w", 1, torch.empty(4)).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert open_checkpoint(tmp_path / "lightning.ckpt").extra == {"epoch": 3}
    assert same(open_checkpoint(tmp_path / "several.pt", "ema"))
    with pytest.raises(KeyError):
        open_checkpoint(tmp_path / "w.safetensors")["other"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-run",)


def test_code_in_a_file_is_never_run_and_there_is_no_other_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": WEIGHTS, "x": Evil()}, "evil.ckpt")
    with open("plain.pkl", "wb") as file:
        pickle.dump({"w": Evil()}, file, protocol=2)
    for name in ("evil.ckpt", "plain.pkl"):
        with pytest.raises((UntrustedFileError, ValueError)) as caught:
            open_checkpoint(name)
        assert name in str(caught.value)
    with pytest.raises(
        UntrustedFileError, match=r"holds more than tensors and plain values.*mkdir.*save its weights alone"
    ):
        open_checkpoint("evil.ckpt")
    assert not os.path.exists("evil-was-run")
    torch.load("evil.ckpt", weights_only=False)  # the naive way
    assert os.path.exists("evil-was-run")
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"w": "../evil.ckpt"}}))
    with pytest.raises(UntrustedFileError, match="outside of its folder"):
        open_checkpoint("x.index.json")


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda p: None, FileNotFoundError, "There is no file"),
        (lambda p: torch.save([1, 2], p), ValueError, "holds a list, no mapping"),
        (lambda p: torch.save({"a": {"b": 1}}, p), ValueError, r"holds no tensor on its first level; it has \['a'\]"),
        (lambda p: p.write_bytes(b"PK\x03\x04 cut off"), ValueError, "no whole file that torch can read"),
    ],
)
def test_what_holds_no_weights_is_said(make, error, sentence, tmp_path):
    make(tmp_path / "x.ckpt")
    with pytest.raises(error, match=sentence):
        open_checkpoint(tmp_path / "x.ckpt")


def test_cut_off_and_empty_files_are_said(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        open_checkpoint(tmp_path / "w.safetensors")
    torch.save({"state_dict": WEIGHTS}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="has no weights under 'ema'"):
        open_checkpoint(tmp_path / "w.ckpt", "ema")
    (tmp_path / "i.json").write_text("{}")
    with pytest.raises(ValueError, match="there is no `weight_map` in it"):
        open_checkpoint(tmp_path / "i.json")


def test_tied_weights_lie_in_one_place(tmp_path):
    w = torch.ones(3)
    torch.save({"e": w, "h": w, "o": torch.ones(3)}, tmp_path / "t.pt")
    file = open_checkpoint(tmp_path / "t.pt")
    assert file.place("e") == file.place("h") != file.place("o")


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_written_weights_come_back_with_their_record(name, tmp_path):
    w = torch.arange(12.0).reshape(3, 4)
    save_weights(tmp_path / name, {"w": w, "tied": w, "t": w.T}, {"made": {"of": [1, 2]}}, {"epoch": 2})
    file = open_checkpoint(tmp_path / name)
    assert same(file, {"w": w, "tied": w, "t": w.T})
    assert file.extra["lightning_reg"] == {"made": {"of": [1, 2]}}
    assert [p.name for p in tmp_path.iterdir()] == [name]
    if name == "x.safetensors":
        assert load_file(tmp_path / name).keys() == {"w", "tied", "t"}
    else:
        assert torch.load(tmp_path / name, weights_only=True)["epoch"] == 2
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~_mask()


def _mask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "w.ckpt"
    save_weights(path, WEIGHTS, {})

    def fail(place):
        place.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert same(open_checkpoint(path))
    assert [p.name for p in tmp_path.iterdir()] == ["w.ckpt"]


WRITER = """
import sys, torch
from lightning_reg.averaging._written_files import save_weights
print("ready", flush=True)
number = 0
while True:
    number += 1
    save_weights(sys.argv[1], {"w": torch.full((400_000,), float(number))}, {"number": number})
"""


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt"])
def test_killed_at_any_point_no_file_is_half_written(name, tmp_path):
    path = tmp_path / name
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        while not path.exists():
            time.sleep(0.01)
        for _ in range(40):  # a reader at any time sees one whole file
            time.sleep(0.007)
            file = open_checkpoint(path)
            number = file.extra["lightning_reg"]["number"]
            assert torch.equal(file["w"], torch.full((400_000,), float(number)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    file = open_checkpoint(path)
    assert file["w"].unique().tolist() == [float(file.extra["lightning_reg"]["number"])]
