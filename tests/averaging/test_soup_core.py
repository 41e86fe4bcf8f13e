"""The functional core of soups: averages, greedy and learned soups, batch statistics, ancestry."""

import copy
import itertools
import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.averaging._state_dicts import StateDictMismatchError
from lightning_reg.functional import (
    LearnedSoup,
    ancestry,
    average_state_dicts,
    greedy_soup,
    reestimate_batchnorm,
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def models(count=4, dtype=torch.float32):
    return [{"w": draw(5, 3, seed=i, dtype=dtype), "b": draw(3, seed=50 + i, dtype=dtype)} for i in range(count)]


def mean_by_hand(tensors, weights=None):
    """In Python's own doubles."""
    weights = weights or [1.0] * len(tensors)
    columns = zip(*(t.double().flatten().tolist() for t in tensors), strict=True)
    values = [sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights) for column in columns]
    return torch.tensor(values, dtype=torch.float64).reshape(tensors[0].shape)


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)


# -- average_state_dicts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 0.5]])
def test_mean_is_the_formula_rounded_once(dtype, weights):
    members = models(dtype=dtype)
    mean = average_state_dicts(members, weights)
    for key in ("w", "b"):
        expected = mean_by_hand([m[key] for m in members], weights)
        assert mean[key].dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(mean[key], expected, rtol=1e-15, atol=1e-15)  # order of the last rounding
        else:
            assert torch.equal(mean[key], expected.to(dtype))


def test_long_tensors_are_averaged_in_chunks_to_the_same_values():
    members = [{"w": draw(300_001, seed=i)} for i in range(3)]
    assert torch.equal(
        average_state_dicts(members)["w"], torch.stack([m["w"].double() for m in members]).mean(0).float()
    )
    turned = [{"w": draw(40, 50, seed=i).T} for i in range(2)]  # not contiguous
    expected = ((turned[0]["w"].double() + turned[1]["w"].double()) / 2).float()
    assert torch.equal(average_state_dicts(turned)["w"], expected)


def test_one_and_copies_of_one_are_the_model_itself():
    (model,) = models(1)
    assert same(average_state_dicts([model]), model)
    for copies in (2, 3, 7, 10):
        assert same(average_state_dicts([copy.deepcopy(model) for _ in range(copies)]), model)
    naive = sum(model["w"] * (1 / 7) for _ in range(7))  # as file averagers do
    assert not torch.equal(naive, model["w"])


def test_order_does_not_count():
    members = models(5)
    first = average_state_dicts(members)["w"]
    for order in itertools.islice(itertools.permutations(members), 0, 120, 17):
        torch.testing.assert_close(average_state_dicts(list(order))["w"], first, rtol=1e-6, atol=1e-7)


def test_sums_in_float64_keep_what_float32_sums_lose():
    members = (
        [{"w": torch.tensor([1e8])}] + [{"w": torch.tensor([1.0])} for _ in range(64)] + [{"w": torch.tensor([-1e8])}]
    )
    assert average_state_dicts(members)["w"].item() == pytest.approx(64 / 66)
    assert average_state_dicts(members, accumulate_dtype=torch.float32)["w"].item() == 0.0


def test_half_precision_sums_overflow_where_ours_do_not():
    members = [{"w": torch.tensor([40_000.0], dtype=torch.float16)} for _ in range(4)]
    assert torch.stack([m["w"] for m in members]).sum(0).isinf().all()
    assert average_state_dicts(members)["w"].item() == 40_000


def test_integers_and_booleans_are_the_firsts_and_nothing_is_shared():
    one = {"n": torch.tensor(7), "mask": torch.tensor([True, False]), "w": torch.ones(1), "extra": {"a": 1}}
    two = {"n": torch.tensor(8), "mask": torch.tensor([False, False]), "w": torch.zeros(1), "extra": {"a": 2}}
    mean = average_state_dicts([one, two])
    assert mean["n"].item() == 7
    assert mean["mask"].tolist() == [True, False]
    assert mean["mask"].dtype == torch.bool
    assert mean["extra"] == {"a": 1}
    mean["n"].add_(1)
    mean["w"].add_(1)
    assert (one["n"].item(), one["w"].item()) == (7, 1)


def test_what_has_no_weight_takes_no_part_even_if_it_is_infinite():
    mean = average_state_dicts([{"w": torch.ones(2)}, {"w": torch.tensor([math.inf, math.nan])}], [1.0, 0.0])
    assert mean["w"].tolist() == [1.0, 1.0]


def test_tied_weights_are_averaged_once_and_stay_tied():
    def tied(seed):
        w = draw(4, 3, seed=seed)
        return {"embed": w, "head": w, "free": draw(2, seed=seed)}

    mean = average_state_dicts([tied(0), tied(1)])
    assert mean["embed"] is mean["head"]
    assert mean["free"] is not mean["embed"]
    untied = {key: value.clone() for key, value in tied(1).items()}
    mean = average_state_dicts([tied(0), untied])
    assert mean["embed"] is not mean["head"]
    assert torch.equal(mean["embed"], mean["head"])


class Fresh(Mapping):
    """As a file: every access gives a new tensor."""

    def __init__(self, values):
        self.given = values

    def __getitem__(self, key):
        return torch.full((64,), self.given[key])

    def __iter__(self):
        return iter(self.given)

    def __len__(self):
        return len(self.given)


def test_addresses_of_tensors_that_do_not_last_tie_nothing():
    keys = [f"k{i}" for i in range(20)]
    mean = average_state_dicts([Fresh({k: float(i) for i, k in enumerate(keys)}) for _ in range(2)])
    assert [mean[k][0].item() for k in keys] == list(range(20))


def test_prefixes_of_wrappers_do_not_count():
    plain, compiled = {"net.w": torch.zeros(1)}, {"net._orig_mod.w": torch.ones(1)}
    ddp, both = {"module.net.w": torch.ones(1)}, {"module.net._orig_mod.w": torch.ones(1)}
    for other in (compiled, ddp, both):
        assert average_state_dicts([plain, other]).keys() == {"net.w"}
        assert average_state_dicts([other, plain])["net.w"].item() == 0.5
    own = {"module.w": torch.ones(1)}  # a module's own attribute: the result must load into it
    assert average_state_dicts([own, own]).keys() == {"module.w"}


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod."])
@pytest.mark.parametrize("best", [0, 1, 2])
def test_prefixes_of_wrappers_do_not_count_in_a_greedy_soup(prefix, best):
    members = [{"w": torch.full((2,), float(i)), "head": torch.full((1,), float(i))} for i in range(3)]
    wrapped = [*members[:1], {f"{prefix}{key}": value for key, value in members[1].items()}, members[2]]
    seen = []

    def score(state):
        seen.append(sorted(state))
        return 1.0

    scores = [float(i == best) for i in range(3)]
    soups = [greedy_soup(given, scores, score, strict=False, exclude="head") for given in (members, wrapped)]
    assert same(soups[0].state_dict, soups[1].state_dict)
    assert soups[1].state_dict["w"].tolist() == [1.0, 1.0]
    assert soups[1].state_dict["head"].item() == best
    assert seen == [["head", "w"]] * 4
    own = {"module.w": torch.ones(1)}
    assert greedy_soup([own, own], [1.0, 1.0], lambda state: 1.0).state_dict.keys() == {"module.w"}


@pytest.mark.parametrize(
    "mix", [average_state_dicts, lambda given, exclude: greedy_soup(given, [1.0, 1.0], len, exclude=exclude)]
)
def test_a_pattern_without_the_prefix_that_all_keys_have_matches_nothing(mix):
    given = [{"module.w": torch.full((1,), value), "module.head": torch.ones(1)} for value in (1.0, 3.0)]
    with pytest.raises(ValueError, match=r"pattern 'head', which matches no key. Near keys: 'module.head'"):
        mix(given, exclude="head")


def test_differences_are_a_table_and_never_skipped():
    one = {"a": torch.zeros(2), "b": torch.zeros(3), "n": torch.tensor(1)}
    two = {"b": torch.zeros(4), "c": torch.zeros(1), "n": torch.tensor(1.0)}
    with pytest.raises(StateDictMismatchError) as caught:
        average_state_dicts([one, two], names=["one.ckpt", "two.ckpt"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("The state dicts differ in 4 entries")
    assert [line.split("  ")[0] for line in lines[1:]] == ["key", "a", "c", "b", "n"]
    assert lines[1].split() == ["key", "one.ckpt", "other", "which"]
    assert lines[2].split() == ["a", "present", "missing", "two.ckpt"]
    assert lines[4].split() == ["b", "float32", "(3,)", "float32", "(4,)", "two.ckpt"]
    with pytest.raises(StateDictMismatchError, match=r"differ in 30 entries[\s\S]*\.\.\. and 10 more"):
        average_state_dicts([{f"k{i}": torch.zeros(1) for i in range(30)}, {}])


def test_other_float_types_of_one_key_give_the_wider():
    mean = average_state_dicts([{"w": torch.ones(1, dtype=torch.bfloat16)}, {"w": torch.zeros(1)}])
    assert mean["w"].dtype == torch.float32


def test_include_and_exclude():
    one = {"net.a": torch.ones(1), "net.b": torch.ones(1), "head": torch.ones(1)}
    two = {key: torch.zeros(1) for key in one}
    mean = average_state_dicts([one, two], include=["net.*"], exclude=["*.b"])
    assert {key: value.item() for key, value in mean.items()} == {"net.a": 0.5, "net.b": 1.0, "head": 1.0}


def test_a_string_is_one_pattern_and_every_pattern_matches_a_key():
    one, two = {"net.a": torch.ones(1), "head": torch.ones(1)}, {"net.a": torch.zeros(1), "head": torch.zeros(1)}
    mean = average_state_dicts([one, two], include="net.*")
    assert {key: value.item() for key, value in mean.items()} == {"net.a": 0.5, "head": 1.0}
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"`{argument}` has the pattern 'ned.\*', which matches no key.*'net.a'"):
            average_state_dicts([one, two], **{argument: ["head", "ned.*"]})


@pytest.mark.parametrize(
    ("state_dicts", "options", "sentence"),
    [
        ([], {}, "`state_dicts` must hold at least one state dict, got none"),
        (models(2), {"weights": [1.0]}, r"`weights` must have one number per state dict \(2\)"),
        (models(2), {"weights": [1.0, -1.0]}, "`weights` must be finite with a positive sum"),
        (models(2), {"weights": [1.0, math.nan]}, "`weights` must be finite with a positive sum"),
        (models(2), {"accumulate_dtype": torch.float16}, "`accumulate_dtype` must be torch.float32 or torch.float64"),
    ],
)
def test_average_refuses(state_dicts, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        average_state_dicts(state_dicts, **options)


def test_soup_of_linear_models_gives_the_mean_of_the_logits():
    nets = [nn.Linear(4, 3) for _ in range(5)]
    x = draw(7, 4)
    soup = nn.Linear(4, 3)
    soup.load_state_dict(average_state_dicts([net.state_dict() for net in nets]))
    torch.testing.assert_close(soup(x), torch.stack([net(x) for net in nets]).mean(0), rtol=1e-5, atol=1e-6)


# -- greedy_soup ------------------------------------------------------------------------------------------------------


def scalar(*values):
    return [{"w": torch.tensor([v], dtype=torch.float64)} for v in values]


def near(target):
    return lambda state: -abs(state["w"].item() - target)


def greedy_by_hand(values, score, strict=True, min_delta=0.0):
    order = sorted(range(len(values)), key=lambda i: (-score(values[i]), i))
    kept, best = [order[0]], score(values[order[0]])
    for i in order[1:]:
        new = score(sum(values[j] for j in [*kept, i]) / (len(kept) + 1))
        if new > best + min_delta or (not strict and new >= best + min_delta):
            kept.append(i)
            best = new
    return kept, best


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_recipe_1_and_never_below_the_best(seed, strict):
    values = draw(8, seed=seed, dtype=torch.float64).tolist()
    evaluate = near(0.1)
    soup = greedy_soup(scalar(*values), [-abs(v - 0.1) for v in values], evaluate, strict=strict)
    kept, best = greedy_by_hand(values, lambda v: -abs(v - 0.1), strict)
    assert soup.ingredients == kept
    assert soup.score == pytest.approx(best, abs=1e-12)
    assert soup.score >= max(-abs(v - 0.1) for v in values)
    assert evaluate(soup.state_dict) == soup.score
    assert [t.accepted for t in soup.trace] == [int(t.name) in kept for t in soup.trace]
    again = greedy_soup(scalar(*values), [-abs(v - 0.1) for v in values], evaluate, strict=strict)
    assert again.trace == soup.trace


def test_a_duplicate_is_rejected_by_the_code_and_accepted_by_the_paper():
    for strict, kept in ((True, [0]), (False, [0, 1])):
        soup = greedy_soup(scalar(1.0, 1.0), [0.0, 0.0], near(1.0), strict=strict)
        assert soup.ingredients == kept


def test_minimum_delta_is_asked_of_every_candidate():
    values = (0.0, 1.0)  # the soup is nearer by 0.3
    for min_delta, strict, kept in ((0.0, True, 2), (0.05, True, 2), (0.35, True, 1), (0.35, False, 1)):
        soup = greedy_soup(scalar(*values), [-0.4, -0.6], near(0.4), min_delta=min_delta, strict=strict)
        assert len(soup.ingredients) == kept


def test_smaller_is_better_with_mode_min():
    loss = lambda state: abs(state["w"].item() - 0.4)  # noqa: E731 # one expression, named for the reader
    soup = greedy_soup(scalar(5.0, 0.0, 1.0), [4.6, 0.4, 0.6], loss, mode="min")
    assert soup.ingredients == [1, 2]
    assert soup.score == pytest.approx(0.1)


def test_equal_scores_rank_by_name_whatever_the_order():
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        states, names = scalar(0.0, 1.0, 2.0), ["c", "a", "b"]
        soup = greedy_soup([states[i] for i in order], [1.0] * 3, lambda state: 0.0, names=[names[i] for i in order])
        assert [t.name for t in soup.trace] == ["a", "b", "c"]
        assert soup.ingredients == ["a"]
    many = greedy_soup(scalar(*range(12)), [1.0] * 12, lambda state: 0.0)
    assert [t.name for t in many.trace] == [str(i) for i in range(12)]  # not "10" before "2"


def test_no_evaluation_beyond_max_ingredients():
    calls = []
    soup = greedy_soup(
        scalar(0.0, 1.0, 2.0), [3.0, 2.0, 1.0], lambda s: calls.append(s) or 9.0 + len(calls), max_ingredients=2
    )
    assert soup.ingredients == [0, 1]
    assert len(calls) == 1
    assert [(t.score, t.accepted) for t in soup.trace] == [(3.0, True), (10.0, True), (None, False)]


def test_a_score_that_is_no_number_is_never_accepted():
    for strict in (True, False):
        assert greedy_soup(scalar(0.0, 1.0), [1.0, 0.0], lambda s: math.nan, strict=strict).ingredients == [0]


def test_candidates_are_means_and_not_drifting_averages():
    members = [{"w": draw(50, seed=i)} for i in range(9)]
    rising = itertools.count(1)
    soup = greedy_soup(members, [float(-i) for i in range(9)], lambda state: float(next(rising)))
    assert torch.equal(soup.state_dict["w"], average_state_dicts(members)["w"])
    drifting = members[0]["w"].half().float()
    for n, member in enumerate(members[1:], 1):
        drifting = drifting * n / (n + 1) + member["w"] / (n + 1)
    assert not torch.equal(drifting, soup.state_dict["w"])


def test_greedy_copies_integers_keeps_ties_and_shares_nothing():
    w = draw(3)
    states = [{"e": w, "h": w, "n": torch.tensor(1)}, {"e": 1 - w, "h": 1 - w, "n": torch.tensor(2)}]
    soup = greedy_soup(states, [0.0, 1.0], lambda s: 2.0)
    assert soup.ingredients == [1, 0]
    assert soup.state_dict["n"].item() == 2
    tied = greedy_soup([states[0], {**states[0]}], [1.0, 0.0], lambda s: 2.0).state_dict
    assert tied["e"] is tied["h"]
    alone = greedy_soup(states[:1], [0.0], lambda s: 2.0).state_dict
    assert torch.equal(alone["e"], w)
    alone["e"].add_(1)
    assert torch.equal(w, draw(3))


@pytest.mark.parametrize(
    ("scores", "options", "sentence"),
    [
        ([0.0], {}, "`scores` must be 2 numbers"),
        ([0.0, math.nan], {}, "`scores` must be numbers"),
        ([0.0, 1.0], {"names": ["a", "a"]}, "`names` must be 2 distinct names"),
        ([0.0, 1.0], {"min_delta": -1.0}, "`min_delta` must be at least 0"),
        ([0.0, 1.0], {"max_ingredients": 0}, "`max_ingredients` must be at least 1"),
    ],
)
def test_greedy_refuses(scores, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        greedy_soup(scalar(0.0, 1.0), scores, near(0.0), **options)


def test_greedy_refuses_nothing_and_what_differs():
    with pytest.raises(ValueError, match="at least one state dict"):
        greedy_soup([], [], near(0.0))
    with pytest.raises(StateDictMismatchError, match="present"):
        greedy_soup([{"w": torch.zeros(1)}, {"v": torch.zeros(1)}], [1.0, 0.0], near(0.0))


# -- LearnedSoup ------------------------------------------------------------------------------------------------------


def small_net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def net_states(count=3):
    states = []
    for seed in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = small_net()
            net(torch.randn(16, 4))
        states.append(copy.deepcopy(net.state_dict()))
    return states


@pytest.mark.parametrize("per", ["tensor", "model"])
def test_learned_soup_starts_as_the_uniform_one(per):
    states = net_states()
    soup = LearnedSoup(small_net(), states, per=per).eval()
    uniform = small_net().eval()
    uniform.load_state_dict(average_state_dicts(states))
    soup._module[0].eval()
    torch.testing.assert_close(soup(draw(5, 4)), uniform(draw(5, 4)), rtol=1e-5, atol=1e-6)
    mixed = soup.soup()
    for key, value in uniform.state_dict().items():
        torch.testing.assert_close(mixed[key], value, rtol=1e-6, atol=1e-7)  # softmax(1) in float32 is 1/3 rounded
    assert soup.raw.shape == ((6, 3) if per == "tensor" else (1, 3))
    assert torch.equal(soup.raw, torch.ones_like(soup.raw))
    assert [name for name, _ in soup.named_parameters()] == ["raw", "beta"]


@pytest.mark.parametrize("per", ["tensor", "model"])
def test_gradients_of_the_learned_soup_are_finite_differences(per):
    states = [
        {key: value.double() if value.is_floating_point() else value for key, value in s.items()} for s in net_states()
    ]
    module = small_net().double().eval()
    soup = LearnedSoup(module, states, per=per).double()
    x, y = draw(9, 4, dtype=torch.float64), torch.arange(9) % 3
    loss = F.cross_entropy(soup(x), y)
    gradients = torch.autograd.grad(loss, [soup.raw, soup.beta])
    for parameter, gradient in zip((soup.raw, soup.beta), gradients, strict=True):
        for position in range(parameter.numel()):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[position] += step
                    values.append(F.cross_entropy(soup(x), y).item())
                    parameter.view(-1)[position] -= step
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(gradient.flatten()[position].item(), abs=1e-8)  # error of order step ** 2


def test_learning_prefers_the_good_model_and_leaves_the_module_alone():
    x, w = draw(64, 4), draw(4, 3, seed=3)
    y = (x @ w).argmax(1)
    good, bad = {"weight": 3 * w.T, "bias": torch.zeros(3)}, {"weight": -3 * w.T, "bias": torch.zeros(3)}
    module = nn.Linear(4, 3)
    before = copy.deepcopy(module.state_dict())
    soup = LearnedSoup(module, [bad, good])
    history = soup.fit([(x, y)] * 4, epochs=20)
    assert history[-1] < 0.5 * history[0]
    weights = soup.mixing_weights()
    assert weights[0, 1] > 0.9
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert same(module.state_dict(), before)
    module.load_state_dict(soup.soup())
    assert (module(x).argmax(1) == y).float().mean() == 1
    assert soup.raw.grad is None


def test_learned_soup_matches_by_name_and_refuses_what_is_missing():
    states = net_states(2)
    turned = [dict(reversed(list(s.items()))) for s in states]
    module = small_net().eval()
    x = draw(5, 4)
    torch.testing.assert_close(LearnedSoup(module, states)(x), LearnedSoup(module, turned)(x))
    with pytest.raises(ValueError, match="`per` must be 'tensor' or 'model'"):
        LearnedSoup(module, states, per="layer")
    with pytest.raises(ValueError, match=r"lack parameters of `module`: \['3.bias'\]"):
        LearnedSoup(module, [{k: v for k, v in s.items() if k != "3.bias"} for s in states])
    with pytest.raises(ValueError, match="at least one"):
        LearnedSoup(module, [])
    with pytest.raises(ValueError, match="`lr` must be positive"):
        LearnedSoup(module, states).fit([], lr=0.0)
    with pytest.raises(ValueError, match="`epochs` must be at least 1"):
        LearnedSoup(module, states).fit([], epochs=0)


# -- reestimate_batchnorm ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.frozen = (
            nn.BatchNorm1d(3),
            nn.Dropout(0.0),
            nn.BatchNorm1d(3, track_running_stats=False),
        )
        self.eval()
        self.drop.train()

    def forward(self, x):
        return self.drop(self.norm(x))


def test_statistics_are_those_of_one_cumulative_pass_and_all_else_is_put_back():
    batches = [(draw(6, 3, seed=i) * (i + 1) + i, "label") for i in range(4)]
    model = Net()
    model.norm.running_mean += 9
    assert reestimate_batchnorm(model, batches, 3) == 3
    means = [b[0].double().mean(0) for b in batches[:3]]
    variances = [b[0].double().var(0) for b in batches[:3]]
    torch.testing.assert_close(model.norm.running_mean.double(), sum(means) / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var.double(), sum(variances) / 3, rtol=1e-5, atol=1e-6)
    assert model.norm.momentum == 0.1
    assert (model.training, model.norm.training, model.drop.training) == (False, False, True)
    assert reestimate_batchnorm(model, iter(batches)) == 4
    assert reestimate_batchnorm(model, batches, forward=lambda batch: model(batch[0])) == 4
    assert reestimate_batchnorm(model, batches, 1) == 1
    torch.testing.assert_close(model.norm.running_mean.double(), means[0], rtol=1e-5, atol=1e-6)
    assert reestimate_batchnorm(nn.Linear(1, 1), iter([1])) == 0


def test_an_exception_leaves_modes_and_momenta():
    model = Net()

    def fail(batch):
        raise KeyError(batch)

    with pytest.raises(KeyError):
        reestimate_batchnorm(model, [1], forward=fail)
    assert (model.norm.momentum, model.training, model.norm.training) == (0.1, False, False)
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        reestimate_batchnorm(model, [1], 0)
    with pytest.raises(ValueError, match="gave no batch"):
        reestimate_batchnorm(model, [])


# -- ancestry ---------------------------------------------------------------------------------------------------------


def test_ancestry_measures_distances_and_cosines():
    start = {"w": torch.tensor([3.0, 4.0])}
    ends = [{"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([4.0, 4.0])}, {"w": torch.tensor([3.0, 3.5])}]
    with pytest.warns(UserWarning, match=r"may not share a basin.*state dict 0 and state dict 2 have cosine -1.00"):
        found = ancestry(ends, start)
    assert found.distances == pytest.approx([0.2, 0.2, 0.1])
    torch.testing.assert_close(found.cosines, torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]], dtype=torch.float64))
    assert found.has_start
    assert len(found.suspicions) == 1


def test_ancestry_samples_large_tensors():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(500_000, generator=generator)
    ends = [start + 0.1 * torch.randn(500_000, generator=generator) for _ in range(2)]
    ends[1] += 0.1 * (ends[0] - start)
    found = ancestry([{"w": end} for end in ends], {"w": start})
    moved = [(end - start).double() for end in ends]
    assert found.distances == pytest.approx([float(m.norm() / start.double().norm()) for m in moved], rel=0.02)
    cosine = float(moved[0] @ moved[1] / (moved[0].norm() * moved[1].norm()))
    assert found.cosines[0, 1].item() == pytest.approx(cosine, abs=0.02)


def test_ancestry_tells_fine_tunings_from_strangers():
    common = draw(4000)
    tuned = [{"w": common + 0.05 * draw(4000, seed=i)} for i in (1, 2)]
    assert ancestry(tuned, {"w": common}).suspicions == []
    assert ancestry(tuned).suspicions == []
    strangers = [{"w": draw(4000, seed=i)} for i in (1, 2)]
    with pytest.warns(UserWarning, match="away from the mean"):
        found = ancestry(strangers, names=["a", "b"])
    assert any("the weights of a and b have cosine" in s for s in found.suspicions)
    assert not ancestry(strangers, warn=False).has_start
