"""Keys that are left out of averages and mixes: they may differ, and be in one state dict alone."""

import pytest
import torch
from torch import nn

from lightning_reg.__main__ import main
from lightning_reg.functional import (
    LearnedSoup,
    ancestry,
    average_state_dicts,
    dare_merge,
    greedy_soup,
    make_soup,
    slerp_merge,
    ties_merge,
    wise_ft,
)
from tests.averaging.test_soup_files import equal


def linear(value, **more):
    return {"weight": torch.full((3, 5), float(value)), "bias": torch.full((3,), float(value)), **more}


def soup_of(one, two, exclude):
    return greedy_soup([one, two], [1.0, 0.0], lambda state: 2.0, exclude=exclude).state_dict


MIXES = {
    "average": lambda one, two, exclude: average_state_dicts([one, two], exclude=exclude),
    "greedy": soup_of,
    "ties": lambda one, two, exclude: ties_merge(one, [two], density=1.0, lam=0.5, exclude=exclude),
    "dare": lambda one, two, exclude: dare_merge(one, [two], density=1.0, lam=0.5, exclude=exclude),
    "slerp": lambda one, two, exclude: slerp_merge(one, two, 0.25, exclude=exclude),
    "wise_ft": lambda one, two, exclude: wise_ft(one, two, 0.25, exclude=exclude),
    "learned": lambda one, two, exclude: LearnedSoup(nn.Linear(5, 3), [one, two], exclude=exclude).soup(),
}
QUARTER = ("slerp", "wise_ft")  # constant tensors are parallel: the arc is the line


@pytest.mark.parametrize("name", MIXES)
def test_what_is_left_out_may_differ_and_be_in_one_alone(name):
    mean = 1.5 if name in QUARTER else 2.0
    one = linear(1, old=torch.ones(2), ids=torch.zeros(2, dtype=torch.int8), head=torch.ones(4))
    two = linear(3, new=torch.ones(2), ids=torch.ones(2, dtype=torch.int8), head=torch.ones(7))
    mixed = MIXES[name](one, two, ["old", "n*w", "ids", "head", "bias"])
    assert equal(mixed, {**one, "weight": torch.full((3, 5), mean)})
    for pattern in ("old", "new", "ids", "head"):
        with pytest.raises(ValueError, match="differ"):
            MIXES[name](one, two, [p for p in ("old", "new", "ids", "head") if p != pattern])
    with pytest.raises(ValueError, match=r"`exclude` has the pattern 'hed', which matches no key. Near keys: 'head'"):
        MIXES[name](one, two, ["old", "new", "ids", "head", "hed"])


@pytest.mark.parametrize("mix", [slerp_merge, wise_ft])
def test_what_is_left_out_is_the_nearer_ends(mix):
    one, two = linear(1, old=torch.ones(2)), linear(3, new=torch.ones(2))
    assert equal(mix(one, two, 0.75, exclude=["old", "new"]), {**linear(2.5), "new": torch.ones(2)})


def test_prefixes_of_wrappers_do_not_count_in_patterns():
    one, two = ({f"module._orig_mod.{k}": v for k, v in linear(1).items()}, linear(3))
    assert equal(average_state_dicts([one, two], exclude="bias"), linear(2, bias=torch.ones(3)))


def test_a_learned_soup_runs_with_the_firsts_parameters_where_they_are_left_out():
    soup = LearnedSoup(nn.Linear(5, 3), [linear(1), linear(3)], exclude="bias")
    assert soup.raw.shape == (1, 2)
    assert torch.equal(soup(torch.ones(1, 5)), torch.full((1, 3), 5 * 2.0 + 1.0))


def test_what_is_left_out_makes_no_strangers():
    one, two = linear(1, head=torch.full((4,), 9.0)), linear(1, head=torch.full((4,), -9.0))
    assert ancestry([one, two], exclude="head").suspicions == []
    assert len(ancestry([one, two], warn=False).suspicions) == 3


def scored(state):
    """``--evaluate``."""
    return -abs(state["weight"].mean().item() - 2)


def learn_on():
    """``--learn-on``."""
    return nn.Linear(5, 3), [(torch.ones(2, 5), torch.tensor([0, 1]))]


@pytest.mark.parametrize(
    ("words", "mean"),
    [
        ("uniform", 2.0),
        ("greedy --evaluate tests.averaging.test_exclude:scored", 2.0),
        ("learned --learn-on tests.averaging.test_exclude:learn_on --epochs 1", 2.0),
        ("ties --density 1 --lam 0.5", 2.0),
        ("dare --density 1 --lam 0.5", 2.0),
        ("slerp --t 0.25", 1.5),
        ("wise-ft --alpha 0.25", 1.5),
    ],
)
def test_the_command_leaves_keys_out_of_weights_two_levels_deep(words, mean, tmp_path, capsys):
    torch.save({"state": {"model": linear(1)}, "step": torch.tensor(3)}, tmp_path / "a.pt")
    two = linear(3, ids=torch.arange(4), scale=torch.ones(1))
    torch.save({"state": {"model": two}, "step": torch.tensor(4)}, tmp_path / "b.pt")
    files = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    out = tmp_path / "out.ckpt"
    common = ["--key", "state.model", "--exclude", "ids", "--exclude", "sc*", "--out", str(out)]
    method, *options = words.split()
    main(["soup", method, *files, *options, *common])
    capsys.readouterr()
    mixed = torch.load(out, weights_only=True)["state_dict"]
    assert mixed.keys() == linear(1).keys()
    assert torch.allclose(mixed["weight"], torch.full((3, 5), mean), atol=0.2 if method == "learned" else 1e-6)


def test_make_soup_leaves_keys_out(tmp_path):
    torch.save(linear(1), tmp_path / "a.pt")
    torch.save(linear(3, ids=torch.arange(4)), tmp_path / "b.pt")
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for method in ("uniform", "greedy"):
        soup = make_soup(files, method, scored, exclude="ids", check_ancestry=False)
        assert equal(soup.state_dict, linear(2))
