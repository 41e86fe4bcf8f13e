"""Entries of files and state dicts that have no mean, or of which it is not said what they are."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from lightning_reg.averaging._checkpoint_files import open_checkpoint
from lightning_reg.averaging._not_finite import spoilers
from lightning_reg.functional import (
    LearnedSoup,
    average_state_dicts,
    dare_merge,
    greedy_soup,
    make_soup,
    slerp_merge,
    ties_merge,
    wise_ft,
)

NAN, INF = math.nan, math.inf
MIXES = [
    lambda one, two: average_state_dicts([one, two]),
    lambda one, two: greedy_soup([one, two], [1.0, 0.0], lambda state: 2.0).state_dict,
    lambda one, two: ties_merge(one, [two], density=1.0),
    lambda one, two: dare_merge(one, [two]),
    lambda one, two: slerp_merge(one, two, 0.5),
    lambda one, two: wise_ft(one, two, 0.5),
]


# -- which are the weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"epoch": 1, "model_state_dict": {"w": torch.ones(2)}, "loss": torch.tensor(0.5)}, "model_state_dict"),
        ({"state": {"model": {"w": torch.ones(2)}}, "loss": torch.tensor(0.5)}, "state.model"),
        ({"w": torch.ones(2), "ema": {"w": torch.zeros(2)}}, "ema"),
        ({"state_dict": {"loss": torch.ones(1), "net": {"w": torch.ones(2)}}}, "net"),
    ],
)
def test_a_tensor_beside_nested_weights_is_not_the_weights(content, where, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=rf"x.pt: holds tensors in entries of entries, '{where}'.*Write `key='{where}'`"
    ):
        open_checkpoint(tmp_path / "x.pt")


def test_a_key_with_dots_is_an_entry_of_an_entry(tmp_path):
    torch.save({"state": {"model": {"w": torch.ones(2)}}, "loss": torch.tensor(0.5)}, tmp_path / "x.pt")
    assert list(open_checkpoint(tmp_path / "x.pt", "state.model")) == ["w"]
    torch.save({"a.b": {"w": torch.ones(2)}, "a": {"b": {"v": torch.ones(1)}}}, tmp_path / "y.pt")
    assert list(open_checkpoint(tmp_path / "y.pt", "a.b")) == ["w"]
    for key in ("state.other", "state.model.w", "other.model"):
        with pytest.raises(ValueError, match=f"has no weights under '{key}'"):
            open_checkpoint(tmp_path / "x.pt", key)


def test_what_a_module_gives_as_extra_state_is_no_other_weights(tmp_path):
    torch.save({"w": torch.ones(2), "net._extra_state": {"scale": torch.ones(1)}, "n": {"a": 1}}, tmp_path / "x.pt")
    assert len(open_checkpoint(tmp_path / "x.pt")) == 3


@pytest.mark.parametrize("mix", MIXES)
def test_a_name_with_and_without_a_compilers_prefix_is_refused(mix):
    one = {"net._orig_mod.w": torch.ones(2), "net.w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"has both 'net._orig_mod.w' and 'net.w', which are one name"):
        mix(one, {**one})


# -- codes and masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_codes_of_quantised_weights_are_refused_where_they_differ(mix, dtype):
    one = {"net.qweight": torch.tensor([[1, 2]], dtype=dtype), "net.scales": torch.tensor([0.5])}
    two = {"net.qweight": torch.tensor([[2, 2]], dtype=dtype), "net.scales": torch.tensor([1.5])}
    with pytest.raises(ValueError, match=r"'net.qweight', u?int\d+ \(1, 2\), differs between .* Dequantise it"):
        mix(one, two)
    same = {**two, "net.qweight": one["net.qweight"]}  # the mean of c * s is c times the mean of s
    assert torch.equal(mix(one, same)["net.qweight"], one["net.qweight"])


def test_counters_and_flags_are_the_firsts_still():
    def state(number):
        counter = torch.tensor(number, dtype=torch.int32)
        flags = torch.tensor([True, number > 1])
        return {"w": torch.full((1,), float(number)), "seen": torch.arange(3) + number, "flags": flags, "n": counter}

    mean = {key: value.tolist() for key, value in average_state_dicts([state(1), state(2)]).items()}
    assert mean == {"w": [1.5], "seen": [1, 2, 3], "flags": [True, False], "n": 1}


def test_files_with_codes_are_refused_by_name(tmp_path):
    for name, code in (("a", 1), ("b", 2)):
        weights = {"w": torch.tensor([[code, 3]], dtype=torch.int8), "w_scale": torch.ones(1)}
        save_file(weights, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"'w', int8 \(1, 2\), differs between .*a.safetensors and .*b.safetensors"):
        make_soup([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], check_ancestry=False)


@pytest.mark.parametrize("scale", ["net.weight_scale", "net.weight_scale_inv", "net.scale", "net.weight.scale"])
def test_eight_bit_floats_with_a_scale_are_refused_and_without_one_averaged(scale):
    one, two = (torch.tensor([v, 2.0]).to(torch.float8_e4m3fn) for v in (1.0, 3.0))
    with pytest.raises(ValueError, match="it has a scale beside it"):
        average_state_dicts([{"net.weight": v, scale: torch.ones(1)} for v in (one, two)])
    mean = average_state_dicts([{"net.weight": one}, {"net.weight": two}])["net.weight"]
    assert (mean.dtype, mean.float().tolist()) == (torch.float8_e4m3fn, [2.0, 2.0])


def test_eight_bit_floats_beside_other_types_give_the_wider():
    narrow, wide = torch.tensor([3.0]).to(torch.float8_e4m3fn), torch.ones(1, dtype=torch.bfloat16)
    for members in ([narrow, wide], [wide, narrow], [wide, narrow, wide]):
        mean = average_state_dicts([{"w": value} for value in members])["w"]
        assert mean.dtype == torch.bfloat16
        assert mean.item() == pytest.approx(sum(float(v) for v in members) / len(members), rel=2**-8)
    other = torch.tensor([2.0]).to(torch.float8_e5m2)
    assert average_state_dicts([{"w": narrow}, {"w": other}])["w"].dtype == torch.float32
    soup = greedy_soup([{"w": wide}, {"w": narrow}], [1.0, 0.0], lambda state: 2.0)
    assert soup.state_dict["w"].item() == 2.0


def pruned(seed, amount=0.5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", amount)
    return layer


@pytest.mark.parametrize("mix", MIXES)
def test_masks_of_pruned_weights_are_refused_where_they_differ(mix):
    one, two = pruned(0), pruned(1)
    with pytest.raises(ValueError, match=r"'weight_mask', float32 \(8, 8\), differs between .* `torch.nn.utils.prune"):
        mix(one.state_dict(), two.state_dict())
    for layer in (one, two):
        prune.remove(layer, "weight")
    mix(one.state_dict(), two.state_dict())


def test_one_mask_for_all_stays_it():
    one, two = pruned(0), pruned(0)
    two.weight_orig.data += 1
    mean = average_state_dicts([one.state_dict(), two.state_dict()])
    assert torch.equal(mean["weight_mask"], one.weight_mask)
    wanted = (one.weight_orig.double() + two.weight_orig.double()) / 2 * one.weight_mask
    torch.testing.assert_close((mean["weight_orig"] * mean["weight_mask"]).double(), wanted.detach())


# -- complex tensors --------------------------------------------------------------------------------------------------


def spectrum(*values, dtype=torch.complex64):
    return {"c": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_mixes_keep_the_imaginary_part(dtype):
    one, two = spectrum(1 + 2j, 0j, dtype=dtype), spectrum(3 + 6j, 4 - 2j, dtype=dtype)
    for mixed, wanted in [
        (wise_ft(one, two, 0.25), [1.5 + 3j, 1 - 0.5j]),
        (wise_ft(one, two, 1.0), [3 + 6j, 4 - 2j]),
        (ties_merge(one, [two], density=1.0), [3 + 6j, 4 - 2j]),
        (ties_merge(one, [two], density=0.5), [3 + 6j, 0j] if abs(2 + 4j) >= abs(4 - 2j) else [1 + 2j, 4 - 2j]),
        (dare_merge(one, [two], density=1.0, lam=0.5), [2 + 4j, 2 - 1j]),
        (average_state_dicts([one, two]), [2 + 4j, 2 - 1j]),
        (greedy_soup([one, two], [1.0, 0.0], lambda state: 2.0).state_dict, [2 + 4j, 2 - 1j]),
    ]:
        assert mixed["c"].dtype == dtype
        assert mixed["c"].tolist() == wanted


def test_signs_of_complex_entries_are_those_of_both_parts():
    start, ends = spectrum(0j), [spectrum(2 + 1j), spectrum(-1 + 3j)]
    assert ties_merge(start, ends, density=1.0)["c"].tolist() == [2 + 2j]
    assert dare_merge(start, ends, 1.0, elect_signs=True)["c"].tolist() == [2 + 4j]


def test_the_arc_between_complex_tensors_is_that_of_their_parts():
    one, two = [1 + 2j, 0.5 - 1j], [-2 + 1j, 1 + 0.5j]
    parts = [{"c": torch.view_as_real(torch.tensor(values))} for values in (one, two)]
    real = slerp_merge(*parts, 0.3)["c"]
    mixed = slerp_merge(spectrum(*one), spectrum(*two), 0.3)["c"]
    torch.testing.assert_close(torch.view_as_real(mixed), real)
    assert slerp_merge(spectrum(1j), spectrum(-1 + 0j), 0.5)["c"].item() == pytest.approx((-1 + 1j) / math.sqrt(2))


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.w, n=4)


def test_learned_soups_keep_the_imaginary_part():
    values = [[1 + 2j, 0j, 1j], [3 + 6j, 2j, 1j]]
    soup = LearnedSoup(Spectral(), [{"w": torch.tensor(v)} for v in values])
    assert soup.soup()["w"].tolist() == [2 + 4j, 1j, 1j]


# -- tied names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
def test_tied_names_stay_tied(mix):
    start, end = torch.zeros(64), torch.ones(64)
    mixed = mix({"embed": start, "head": start}, {"embed": end, "head": end})
    assert mixed["embed"] is mixed["head"]
    untied = mix({"embed": start, "head": start}, {"embed": end, "head": end.clone()})
    assert untied["embed"] is not untied["head"]


# -- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("mix", MIXES)
def test_what_is_not_finite_is_said_by_name(mix, bad):
    one = {"w": torch.ones(2), "v": torch.ones(1)}
    two = {"w": torch.tensor([1.0, bad]), "v": torch.ones(1)}
    with pytest.warns(UserWarning, match=r"'w' is not finite \(NaN or infinite\) in (state dict [01]|1|end|finetuned)"):
        mixed = mix(one, two)
    assert not mixed["w"][1].isfinite()
    assert mixed["v"].tolist() == [1.0]


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[1]])
def test_an_infinity_that_all_have_is_meant(mix):
    mask = torch.tensor([0.0, -INF])
    assert mix({"mask": mask}, {"mask": mask.clone()})["mask"].tolist() == [0.0, -INF]


def test_long_tensors_and_files_are_looked_at_in_every_piece(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        for place in (0, 200_000, 300_000):
            weights = [torch.ones(300_001, dtype=dtype) for _ in range(2)]
            weights[1][place] = NAN
            for name, value in zip("ab", weights, strict=True):
                torch.save({"w": value}, tmp_path / f"{name}.pt")
            with pytest.warns(UserWarning, match=r"'w' is not finite .* in .*b.pt, so the result is not"):
                make_soup([tmp_path / "a.pt", tmp_path / "b.pt"], check_ancestry=False)


def test_a_member_without_weight_spoils_nothing():
    members = [{"w": torch.ones(1)}, {"w": torch.tensor([NAN])}]
    assert average_state_dicts(members, [1.0, 0.0])["w"].item() == 1.0


def test_sums_that_float32_cannot_hold_are_no_false_alarm():
    members = [{"w": torch.full((4,), 3e38)}, {"w": torch.full((4,), 1e38)}]
    mean = average_state_dicts(members)["w"]
    torch.testing.assert_close(mean, torch.full((4,), 2e38))


def test_spoilers_are_those_that_bring_it():
    one, two = torch.tensor([1.0, INF, INF]), torch.tensor([1.0, INF, 2.0])
    assert spoilers(torch.tensor([1.0, INF, INF]), [one, two], ["a", "b"]) == ["a"]
    assert spoilers(torch.tensor([1.0, INF, 1.0]), [one, two], ["a", "b"]) == []
    assert spoilers(torch.tensor([INF]), [torch.ones(1)], ["a"]) == ["the mix"]


def test_a_learned_soup_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="LearnedSoup: 'weight' is not finite in state dict 1"):
        LearnedSoup(nn.Linear(1, 1, bias=False), [{"weight": torch.ones(1, 1)}, {"weight": torch.full((1, 1), NAN)}])


@pytest.mark.parametrize("lam", [INF, -INF, NAN])
@pytest.mark.parametrize("merge", [ties_merge, dare_merge])
def test_a_factor_that_is_not_finite_is_refused(merge, lam):
    with pytest.raises(ValueError, match="`lam` must be a finite number"):
        merge({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], lam=lam)


def test_weights_that_sum_to_nothing_divide_nothing():
    base, ends = {"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.ones(2)}]
    with pytest.raises(ValueError, match=r"`weights` must not sum to 0 with normalize=True, got \[1.0, -1.0\]"):
        dare_merge(base, ends, 1.0, [1.0, -1.0], normalize=True)
    assert dare_merge(base, ends, 1.0, [1.0, -1.0])["w"].tolist() == [0.0, 0.0]
