"""Files and state dicts that are broken or unusual: one sentence with the path, or the right mean."""

import errno
import json
import resource
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_reg.__main__ import main
from lightning_reg.averaging._checkpoint_files import UntrustedFileError
from lightning_reg.engine.host.written import write_atomically
from lightning_reg.functional import average_state_dicts, dare_merge, greedy_soup, make_soup, wise_ft

W = {"w": torch.ones(2)}
HEADER = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DEEP = "[" * 100_000


def raw(name, content):
    return name, lambda path: path.write_bytes(content)


def index(where, **more):
    return "x.index.json", lambda path: path.write_text(json.dumps({"weight_map": where, **more}))


def safetensors(header, data=bytes(8)):
    text = json.dumps(header).encode()
    return raw("x.safetensors", struct.pack("<Q", len(text)) + text + data)


def torch_file(content):
    return "x.pt", lambda path: torch.save(content(), path)


def extra(text):
    return safetensors({"__metadata__": {"lightning_reg": text}, **HEADER})


BROKEN = [
    (index({"w": 3}), "the index has 3 for 'w', which names no file of weights"),
    (index({"w": None}), "the index has None for 'w'"),
    (index({"w": ["ok.safetensors"]}), r"the index has \['ok.safetensors'\] for 'w'"),
    (index({"w": ""}), "the index has '' for 'w'"),
    (index({"w": "x.index.json"}), "the index has 'x.index.json' for 'w'"),
    (index({"v": "ok.safetensors"}), "the index has 'v' in ok.safetensors, and there is no such entry in that"),
    (index({"w": ".."}), r"names files outside of its folder: \['..'\]"),
    (index({"w": "gone.pt"}), r"names files that are not beside it: \['gone.pt'\]"),
    (index({}), "there is no `weight_map` in it, or nothing in that"),
    (raw("x.index.json", b"{"), "an index of shards is no JSON that can be read"),
    (raw("x.index.json", b"\xff\xfe\x00"), "is no JSON that can be read"),
    (raw("x.index.json", DEEP.encode()), "is no JSON that can be read"),
    (raw("x.index.json", b""), "is no JSON that can be read"),
    (extra("{no json"), "what it says of itself under `lightning_reg` is no JSON"),
    (extra(DEEP), "what it says of itself under `lightning_reg` is no JSON"),
    (safetensors({}, b""), "holds no tensor"),
    (safetensors({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"), "'w' is quantised .*float4"),
    (raw("x.safetensors", b"x"), "no whole safetensors file"),
    (raw("x.safetensors", b""), "no whole safetensors file"),
    (raw("x.pt", b""), "no whole file that torch can read"),
    (raw("x.pt", b"x"), "no file of torch: it is neither a zip archive nor a pickle"),
    (raw("x.pt", b"."), "no whole file that torch can read"),
    (raw("x.pt", b"\x80"), "no whole file that torch can read"),
    (raw("x.pt", b"PK\x03\x04"), "no whole file that torch can read|no file of torch"),
    (torch_file(lambda: {0: torch.ones(2)}), "has an entry under 0, which is no text. Save weights by their names"),
    (torch_file(lambda: {**W, None: torch.ones(2)}), "has an entry under None, which is no text"),
    (torch_file(lambda: {"w": torch.eye(3).to_sparse()}), r"'w' is sparse \(torch.sparse_coo\). Save it dense"),
    (torch_file(lambda: {"w": torch.eye(3).to_sparse_csr()}), r"'w' is sparse \(torch.sparse_csr\)"),
    (torch_file(lambda: {"w": torch.empty(2, device="meta")}), "'w' has no numbers .it is on the device meta"),
    (
        torch_file(lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
        "'w' is quantised|load_scalar",
    ),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*(CSR|TypedStorage|quantize).*")


@pytest.mark.parametrize(("file", "sentence"), BROKEN)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14 says it as it reads one
def test_a_broken_file_ends_in_one_sentence_with_its_path(file, sentence, tmp_path, capsys):
    name, write = file
    save_file(W, tmp_path / "ok.safetensors")
    path = tmp_path / name
    write(path)
    for read in (lambda: make_soup([path, path], out=tmp_path / "soup.ckpt"), lambda: make_soup([path])):
        with pytest.raises((ValueError, FileNotFoundError, UntrustedFileError), match=rf"{name}.*({sentence})") as info:
            read()
        assert type(info.value) in (ValueError, FileNotFoundError, UntrustedFileError)
    with pytest.raises(SystemExit):
        main(["soup", "uniform", str(path), str(path), "--out", str(tmp_path / "soup.ckpt")])
    assert name in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"ok.safetensors", name})


STRIDED = [
    torch.arange(16.0).as_strided((3, 3), (2, 4)),
    torch.arange(16.0).as_strided((3, 3), (1, 1)),
    torch.arange(16.0).as_strided((2, 3), (4, 0), 3),
    torch.arange(6.0).view(2, 3).T,
    torch.arange(36.0).view(1, 4, 3, 3).to(memory_format=torch.channels_last),
    torch.tensor([1 + 2j, 3 - 1j]).conj(),
    torch.ones(1).expand(4),
    torch.arange(4.0)[1::2],
    torch.tensor(2.0),
    torch.ones(0, 3),
]


@pytest.mark.parametrize("value", STRIDED)
def test_tensors_of_unusual_strides_are_averaged(value, tmp_path):
    torch.save({"w": value}, tmp_path / "a.pt")
    torch.save({"w": value.clone() + 2}, tmp_path / "b.pt")
    mean = make_soup([tmp_path / "a.pt", tmp_path / "b.pt"], check_ancestry=False).state_dict["w"]
    assert torch.equal(mean, value.resolve_conj() + 1)
    assert torch.equal(wise_ft({"w": value}, {"w": value + 2}, 0.5)["w"], value + 1)


def test_a_tensor_and_its_conjugate_are_not_tied(tmp_path):
    one = torch.tensor([1 + 2j])
    torch.save({"w": one, "v": one.conj()}, tmp_path / "a.pt")
    for mean in (make_soup([tmp_path / "a.pt"]).state_dict, average_state_dicts([{"w": one, "v": one.conj()}])):
        assert (mean["w"].item(), mean["v"].item()) == (1 + 2j, 1 - 2j)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: torch.eye(2).to_sparse(), "state dict 1: 'w' is sparse"),
        (lambda: torch.empty(2, 2, device="meta"), "state dict 1: 'w' has no numbers"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "state dict 1: 'w' is a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_plain_numbers_are_refused_unless_they_are_left_out(make, sentence):
    states = [{"w": torch.eye(2), "v": torch.ones(1)}, {"w": make(), "v": torch.zeros(1)}]
    with pytest.raises(ValueError, match=sentence):
        average_state_dicts(states)
    assert average_state_dicts(states, exclude="w")["v"].item() == 0.5
    for mix in (
        lambda: dare_merge(*states[:1], states[1:]),
        lambda: greedy_soup(states, [1.0, 0.0], lambda state: 1.0),
    ):
        with pytest.raises(ValueError, match="'w'"):
            mix()


def test_keys_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match="state dict 0 has an entry under 3, which is no text"):
        average_state_dicts([{3: torch.ones(1)}])


def test_metadata_of_an_index_is_not_needed(tmp_path):
    save_file(W, tmp_path / "ok.safetensors")
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"w": "ok.safetensors"}, "metadata": 3}))
    assert torch.equal(make_soup([tmp_path / "x.index.json"]).state_dict["w"], W["w"])


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_disk_that_is_full_is_named_and_nothing_half_written_stays(suffix, tmp_path):
    state = {"w": nn.Parameter(torch.ones(100_000))}
    torch.save(state, tmp_path / "a.pt")
    (tmp_path / f"out.{suffix}").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"out.{suffix} could not be written, and nothing is left of it .* MB free"):
            make_soup([tmp_path / "a.pt"], out=tmp_path / f"out.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", f"out.{suffix}"]
    assert (tmp_path / f"out.{suffix}").read_bytes() == b"old"


def test_the_reason_of_the_system_is_told(tmp_path):
    def write(place):
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"x.pt could not be written.*No space left on device") as info:
        write_atomically(tmp_path / "x.pt", write)
    assert info.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_types_that_only_the_library_reads_are_the_firsts_like_all_integers(tmp_path, dtype):
    for number in (1, 2):
        save_file(
            {"w": W["w"] * number, "code": torch.tensor([number, 7]).to(dtype)}, tmp_path / f"{number}.safetensors"
        )
    soup = make_soup([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], check_ancestry=False).state_dict
    assert soup["w"].tolist() == [1.5, 1.5]
    assert soup["code"].dtype is dtype
    assert soup["code"].tolist() == [1, 7]
