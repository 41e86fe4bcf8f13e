"""Factors of low-rank updates in averages and mixes."""

import warnings

import pytest
import torch
from torch import nn

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

NAMES = [
    ("net.q.lora_A.default.weight", "net.q.lora_B.default.weight"),
    ("net.q.lora_A", "net.q.lora_B"),
    ("net.e.lora_embedding_A.default", "net.e.lora_embedding_B.default"),
    ("unet_q.lora_down.weight", "unet_q.lora_up.weight"),
]


def factors(seed, names=NAMES[0], shapes=((2, 5), (4, 2)), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in zip(names, shapes, strict=True)
    }


def gap_by_hand(states):
    pairs = [[value.double().flatten(1) for value in state.values()] for state in states]
    mean = sum(b @ a for a, b in pairs) / len(pairs)
    product = (sum(b for _, b in pairs) / len(pairs)) @ (sum(a for a, _ in pairs) / len(pairs))
    return float((product - mean).norm() / mean.norm())


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        for name, value in factors(0, NAMES[1]).items():
            self.register_parameter(name.rpartition(".")[2], nn.Parameter(value))


def learned(one, two):
    bare = [{key.rpartition(".")[2]: value for key, value in state.items()} for state in (one, two)]
    return LearnedSoup(Adapted(), bare)


MIXES = {
    "average_state_dicts": lambda one, two: average_state_dicts([one, two]),
    "greedy_soup": lambda one, two: greedy_soup([one, two, two], [2.0, 1.0, 0.0], lambda state: 3.0),
    "ties_merge": lambda one, two: ties_merge(one, [two]),
    "dare_merge": lambda one, two: dare_merge(one, [two]),
    "slerp_merge": lambda one, two: slerp_merge(one, two, 0.5),
    "wise_ft": lambda one, two: wise_ft(one, two, 0.5),
    "LearnedSoup": learned,
}


@pytest.mark.parametrize("name", MIXES)
def test_every_mix_says_that_factors_are_mixed_one_by_one_and_how_far_that_is(name):
    one, two = (factors(seed, NAMES[1]) for seed in (0, 1))
    with pytest.warns(UserWarning, match=f"{name}: .*lora_B' and .*lora_A' are the factors of an update") as said:
        MIXES[name](one, two)
    assert len(said) == 1
    assert f"is {gap_by_hand([one, two]):.0%} away from the mean of their products" in str(said[0].message)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("shapes", [((2, 5), (4, 2)), ((2, 5, 3, 3), (4, 2, 1, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gap_is_that_of_the_products(names, shapes, dtype):
    states = [factors(seed, names, shapes, dtype) for seed in range(3)]
    with pytest.warns(UserWarning, match=f"is {gap_by_hand(states):.0%} away"):
        average_state_dicts(states)


def test_biases_of_the_factors_have_no_product():
    states = [{f"{name}.bias": draw for name, draw in zip(("lora_A", "lora_B"), torch.eye(2), strict=True)}] * 2
    states[1] = {key: value + 1 for key, value in states[0].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean = average_state_dicts(states)
    assert mean["lora_A.bias"].tolist() == [1.5, 0.5]
    assert mean["lora_B.bias"].tolist() == [0.5, 1.5]


def test_factors_side_by_side_are_the_mean_of_the_products_as_the_advice_says():
    (one_a, one_b), (two_a, two_b) = (factors(seed).values() for seed in (0, 1))
    side_by_side = torch.cat([one_b, two_b], 1) / 2 @ torch.cat([one_a, two_a])
    torch.testing.assert_close(side_by_side, (one_b @ one_a + two_b @ two_a) / 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda one, two: {**two, NAMES[0][0]: one[NAMES[0][0]]},  # one factor is the same: the mean is right
        lambda one, two: {**two, NAMES[0][1]: one[NAMES[0][1]]},
        lambda one, two: {key: value * 1.01 for key, value in one.items()},  # snapshots of one run
        lambda one, two: {NAMES[0][0]: one[NAMES[0][0]], NAMES[0][1]: torch.zeros(4, 2)},
    ],
)
def test_where_the_mean_is_right_nothing_is_said(change):
    one, two = factors(0), factors(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average_state_dicts([one, change(one, two)])
        average_state_dicts([one, two], exclude="*lora_A*")
        average_state_dicts([one])
        only = [{NAMES[0][0]: state[NAMES[0][0]]} for state in (one, two)]
        average_state_dicts(only)


def test_files_of_adapters_are_told_of_as_well(tmp_path):
    for seed in (0, 1):
        torch.save(factors(seed), tmp_path / f"{seed}.pt")
    with pytest.warns(UserWarning, match="are the factors of an update"):
        make_soup([tmp_path / "0.pt", tmp_path / "1.pt"], check_ancestry=False)


# -- side by side -----------------------------------------------------------------------------------------------------


def product(state, names):
    a, b = (state[name].double().flatten(1) for name in names)
    return b @ a


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("shapes", [((2, 5), (4, 2)), ((2, 5, 3, 3), (4, 2, 1, 1))])
@pytest.mark.parametrize("weights", [None, [1.0, 2.5, 0.5], [1.0, 0.0, 3.0]])
def test_stacked_factors_have_the_mean_of_the_products(names, shapes, weights):
    states = [factors(seed, names, shapes) | {"head": torch.full((2,), float(seed))} for seed in range(3)]
    shares = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soup = average_state_dicts(states, weights, factors="stack")
    rank = 2 * sum(share > 0 for share in shares)
    assert [tuple(soup[name].shape[:2]) for name in names] == [(rank, 5), (4, rank)]
    assert list(soup) == [*names, "head"]
    assert soup[names[0]].dtype is torch.float32
    wanted = sum(share * product(state, names) for share, state in zip(shares, states, strict=True))
    torch.testing.assert_close(product(soup, names), wanted, rtol=1e-5, atol=1e-6)
    head = sum(share * state["head"] for share, state in zip(shares, states, strict=True))
    torch.testing.assert_close(soup["head"], head)


class Updated(nn.Linear):
    """A linear layer with a low-rank update, as peft has it: scaled by alpha/r."""

    def __init__(self, rank, alpha):
        super().__init__(5, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 4, bias=False)})
        self.scale = alpha / rank

    def forward(self, x):
        return super().forward(x) + self.scale * self.lora_B["default"](self.lora_A["default"](x))


def test_a_model_with_stacked_factors_computes_the_mean_of_the_outputs():
    torch.manual_seed(0)
    members, x = [Updated(2, 6.0) for _ in range(3)], torch.randn(7, 5)
    soup = Updated(3 * 2, 3 * 6.0)
    soup.load_state_dict(average_state_dicts([m.state_dict() for m in members], factors="stack"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(soup(x), sum(m(x) for m in members) / 3)


def test_strengths_beside_the_factors_are_taken_account_of():
    names = NAMES[3]
    states = [factors(seed, names) | {"unet_q.alpha": torch.tensor(alpha)} for seed, alpha in enumerate((1.0, 4.0))]
    soup = average_state_dicts(states, [1.0, 3.0], factors="stack")
    wanted = 0.25 * (1 / 2) * product(states[0], names) + 0.75 * (4 / 2) * product(states[1], names)
    assert soup["unet_q.alpha"].item() == 4.0
    scaled = soup["unet_q.alpha"].item() / len(soup[names[0]]) * product(soup, names)
    torch.testing.assert_close(scaled, wanted, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_stacked_is_refused_and_what_is_left_out_stays(tmp_path):
    states = [factors(seed) | factors(seed + 5, NAMES[1]) for seed in range(2)]
    soup = average_state_dicts(states, factors="stack", exclude="net.q.lora_?")
    assert [tuple(soup[name].shape) for name in (*NAMES[0], *NAMES[1])] == [(4, 5), (4, 4), (2, 5), (4, 2)]
    assert torch.equal(soup["net.q.lora_A"], states[0]["net.q.lora_A"])
    with pytest.raises(ValueError, match=r"^factors=\"stack\": there are no factors of low-rank updates"):
        average_state_dicts([{"w": torch.ones(2)}] * 2, factors="stack")
    dora = [state | {"net.q.lora_magnitude_vector": torch.ones(4)} for state in states]
    with pytest.raises(ValueError, match=r"'net.q.lora_magnitude_vector' norms what its factors change \(DoRA\)"):
        average_state_dicts(dora, factors="stack")
    with pytest.raises(ValueError, match="`factors` must be 'mean' or 'stack', got 'sum'"):
        average_state_dicts(states, factors="sum")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    made = make_soup(paths, factors="stack", check_ancestry=False).state_dict
    assert all(torch.equal(made[key], value) for key, value in average_state_dicts(states, factors="stack").items())
    with pytest.raises(ValueError, match="method='greedy' must have factors='mean'"):
        make_soup(paths, "greedy", lambda state: 1.0, factors="stack")
