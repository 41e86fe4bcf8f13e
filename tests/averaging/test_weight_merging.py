"""Mixes of few models: TIES, DARE, slerp, WiSE-FT."""

import math
from functools import partial

import pytest
import torch

from lightning_reg import DeepPrompts, OnePrompt, SoupAverager, WiSEFT
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.composition import conflict_between
from lightning_reg.functional import average_state_dicts, dare_merge, slerp_merge, ties_merge, wise_ft, wise_ft_curve
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.toys import QUIET, Callback, Classifier, fit, make_loader, make_trainer, same_weights, weights_of

pytestmark = QUIET


class MixedByHand(Hand):
    def begin(self, loop):
        self.first = loop.constants()

    def end(self, weights):
        return {name: 0.7 * self.first[name] + 0.3 * weight for name, weight in weights.items()}


CASE = Case(
    make=partial(WiSEFT, 0.3),
    neutral=partial(WiSEFT, 1.0),
    by_hand=MixedByHand,
    says=(
        "ends at alpha=0.3 between first and fine-tuned weights; first weights on the CPU, taken at the first batch",
        "ends at alpha=1 between first and fine-tuned weights; first weights on the CPU, taken at the first batch",
        "ends at alpha=0.5 between first and fine-tuned weights; first weights on the CPU, taken at the first batch",
    ),
    also=["images", "regression", "tokens"],
    variants=[partial(WiSEFT, exclude="*.head.*")],
    invalid=[({"alpha": -0.1}, "alpha"), ({"alpha": 1.1}, "alpha")],
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def models(count=4, dtype=torch.float32):
    return [{"w": draw(5, 3, seed=i, dtype=dtype), "b": draw(3, seed=50 + i, dtype=dtype)} for i in range(count)]


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)


def test_wise_ft():
    start, end = models(2)
    start["n"], end["n"] = torch.tensor(1), torch.tensor(2)
    assert same(wise_ft(start, end, 0.0), start)
    assert same(wise_ft(start, end, 1.0), end)
    mixed = wise_ft(start, end, 0.75)
    assert torch.equal(mixed["w"], (0.25 * start["w"].double() + 0.75 * end["w"].double()).float())
    assert mixed["n"].item() == 2
    assert torch.equal(
        wise_ft(start, end, 1.5, extrapolate=True)["b"], (-0.5 * start["b"].double() + 1.5 * end["b"].double()).float()
    )
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\]"):
            wise_ft(start, end, alpha)


@pytest.mark.parametrize("mix", [wise_ft, slerp_merge])
def test_at_an_end_the_other_one_counts_for_nothing(mix):
    start, other = models(2)
    broken = {**other, "w": torch.full((5, 3), math.inf)}  # 0 * inf is not 0
    assert same(mix(start, broken, 0.0), start)
    assert same(mix(broken, start, 1.0), start)


def test_slerp():
    start, end = models(2)
    assert same(slerp_merge(start, end, 0.0), start)
    assert same(slerp_merge(start, end, 1.0), end)
    one, two = start["b"].double().tolist(), end["b"].double().tolist()
    dot = sum(a * b for a, b in zip(one, two, strict=True))
    angle = math.acos(dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in two)))
    expected = [
        (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle) for a, b in zip(one, two, strict=True)
    ]
    torch.testing.assert_close(slerp_merge(start, end, 0.3)["b"], torch.tensor(expected))
    parallel = slerp_merge({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 4.0])}, 0.25)
    assert torch.equal(parallel["w"], torch.tensor([1.25, 2.5]))
    opposite = slerp_merge({"w": torch.tensor([1.0])}, {"w": torch.tensor([-2.0])}, 0.5)
    assert opposite["w"].item() == -0.5
    assert slerp_merge({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.5)["w"].tolist() == [0.5, 0.5]
    circle = slerp_merge({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}, 0.2)["w"]
    assert circle.norm().item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"`t` must be in \[0, 1\]"):
        slerp_merge(start, end, 1.5)
    with pytest.raises(ValueError, match="`threshold` must be in"):
        slerp_merge(start, end, 0.5, threshold=0.0)


def ties_by_hand(base, models_, density, weights, lam, normalize=True):
    vectors = []
    for model in models_:
        tau = [m - b for m, b in zip(model, base, strict=True)]
        keep = sorted(range(len(tau)), key=lambda i: -abs(tau[i]))[: int(density * len(tau))]
        vectors.append([t if i in keep else 0.0 for i, t in enumerate(tau)])
    result = []
    for i, b in enumerate(base):
        sign = 1 if sum(w * v[i] for w, v in zip(weights, vectors, strict=True)) >= 0 else -1
        agree = [(w, v[i]) for w, v in zip(weights, vectors, strict=True) if v[i] * sign > 0]
        divisor = sum(w for w, _ in agree) if normalize else 1.0
        result.append(b + lam * sum(w * v for w, v in agree) / (divisor or 1.0))
    return result


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_against_loops(density, normalize):
    base, *rest = [{"w": draw(17, seed=i, dtype=torch.float64)} for i in range(4)]
    weights = [1.0, 0.5, 2.0]
    merged = ties_merge(base, rest, density, weights, lam=0.7, normalize=normalize)
    expected = ties_by_hand(base["w"].tolist(), [r["w"].tolist() for r in rest], density, weights, 0.7, normalize)
    torch.testing.assert_close(merged["w"], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_ties_limits():
    base = {"w": torch.zeros(4), "n": torch.tensor(5)}
    rest = [{"w": torch.tensor([1.0, 2.0, -1.0, 0.5]) * s, "n": torch.tensor(6)} for s in (1.0, 3.0)]
    merged = ties_merge(base, rest, density=1.0)
    assert torch.equal(merged["w"], average_state_dicts([{"w": r["w"]} for r in rest])["w"])  # equal signs
    assert merged["n"].item() == 5
    assert same(ties_merge(base, rest, lam=0.0), base)
    tie = ties_merge({"w": torch.zeros(1)}, [{"w": torch.tensor([1.0])}, {"w": torch.tensor([-1.0])}], density=1.0)
    assert tie["w"].item() == 1.0  # a sum of 0 elects plus
    equal = ties_merge({"w": torch.zeros(4)}, [{"w": torch.ones(4)}], density=0.5)
    assert equal["w"].sum().item() == 2.0  # exactly int(density * numel), ties or not


@pytest.mark.parametrize("rescale", ["density", "norm"])
@pytest.mark.parametrize("elect_signs", [False, True])
def test_dare_against_loops_with_given_masks(rescale, elect_signs):
    base, *rest = [{"w": draw(11, seed=i, dtype=torch.float64), "n": torch.tensor(1)} for i in range(3)]
    masks = [{"w": (draw(11, seed=20 + i) > 0).double()} for i in range(2)]
    merged = dare_merge(base, rest, 0.5, [1.0, 2.0], rescale=rescale, elect_signs=elect_signs, masks=masks)
    kept = []
    for model, mask in zip(rest, masks, strict=True):
        tau = (model["w"] - base["w"]).tolist()
        on = [t * m for t, m in zip(tau, mask["w"].tolist(), strict=True)]
        factor = 2.0 if rescale == "density" else sum(map(abs, tau)) / sum(map(abs, on))
        kept.append([b + factor * t for b, t in zip(base["w"].tolist(), on, strict=True)])
    b = base["w"].tolist()
    if elect_signs:
        expected = ties_by_hand(b, kept, 1.0, [1.0, 2.0], 1.0, normalize=False)
    else:
        expected = [x + (k0 - x) + 2.0 * (k1 - x) for x, k0, k1 in zip(b, *kept, strict=True)]
    torch.testing.assert_close(merged["w"], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_dare_draws_its_own_numbers_and_keeps_expectation_or_norm():
    base, end = {"w": torch.zeros(20_000)}, {"w": torch.ones(20_000)}
    state = torch.get_rng_state()
    paper = dare_merge(base, [end], 0.25)["w"]
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(set(paper.tolist())) == [0.0, 4.0]
    assert paper.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(3 / 20_000))  # four standard errors
    norm = dare_merge(base, [end], 0.25, rescale="norm")["w"]
    assert norm.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(dare_merge(base, [end], 0.25)["w"], paper)
    other = dare_merge(base, [end], 0.25, generator=torch.Generator().manual_seed(1))["w"]
    assert not torch.equal(other, paper)
    assert torch.equal(dare_merge(base, [end], 1.0)["w"], end["w"])
    assert dare_merge(base, [end, end], 1.0, normalize=True)["w"].mean().item() == 1.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda b, m: ties_merge(b, [], 0.5), "ties_merge: `state_dicts` must hold at least one"),
        (lambda b, m: ties_merge(b, m, 1.5), r"ties_merge: `density` must be in \[0, 1\]"),
        (lambda b, m: dare_merge(b, m, 0.0), r"dare_merge: `density` must be in \(0, 1\]"),
        (lambda b, m: dare_merge(b, m, 0.5, [1.0]), "dare_merge: `weights` must be 2 finite numbers"),
        (lambda b, m: dare_merge(b, m, 0.5, rescale="L1"), "`rescale` must be 'density' or 'norm'"),
    ],
)
def test_merges_refuse(call, sentence):
    base, *rest = models(3)
    with pytest.raises(ValueError, match=sentence):
        call(base, rest)


# -- in a fit ---------------------------------------------------------------------------------------------------------


class Loads(Callback):
    """Puts weights in when training starts, as a user's own callback may."""

    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            for p in pl_module.parameters():
                p.mul_(0.5)


def test_the_module_ends_between_the_weights_of_the_first_batch_and_the_last():
    plain = Classifier()
    fit(plain, Loads())
    start, end = {k: 0.5 * v for k, v in weights_of(Classifier()).items()}, weights_of(plain)
    model, technique = Classifier(), WiSEFT(0.25, exclude="net.3.bias")
    fit(model, technique, Loads())
    for name, value in weights_of(model).items():
        wanted = start[name] if name == "net.3.bias" else 0.75 * start[name] + 0.25 * end[name]
        torch.testing.assert_close(value, wanted, atol=1e-7, rtol=0.0)  # one rounding
    assert same_weights(technique.mixed(1.0), end)
    assert same_weights(technique.mixed(0.0), start)


def test_the_curve_scores_each_mix_and_leaves_the_module_as_it_was():
    model, technique, (x, y) = Classifier(), WiSEFT(), next(iter(make_loader()))
    fit(model, technique)
    held, ends = weights_of(model), [technique.mixed(alpha) for alpha in (0.0, 0.5, 1.0)]

    def evaluate():
        with torch.no_grad():
            return {"loss": torch.nn.functional.cross_entropy(model(x), y)}

    curve = technique.curve(model, evaluate, alphas=[0.0, 0.5, 1.0])
    assert same_weights(model, held)
    for weights, loss in zip(ends, curve["loss"], strict=True):
        model.load_state_dict(weights)
        assert evaluate()["loss"].item() == loss
    assert curve["alpha"] == [0.0, 0.5, 1.0]
    model.load_state_dict(held)
    with pytest.raises(ZeroDivisionError):
        technique.curve(model, lambda: 1 / 0)
    assert same_weights(model, held)


def test_a_run_resumed_from_its_end_goes_on_with_the_weights_that_were_reached(tmp_path):
    whole = Classifier()
    fit(whole, WiSEFT(0.25), max_epochs=2)
    fit(Classifier(), WiSEFT(0.25), max_epochs=1).save_checkpoint(tmp_path / "end.ckpt")
    resumed = Classifier(seed=3)
    trainer = make_trainer(callbacks=[WiSEFT(0.25)], max_epochs=2)
    trainer.fit(resumed, make_loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert same_weights(whole, resumed)


def test_a_further_fit_keeps_the_first_weights():
    model, technique = Classifier(), WiSEFT(0.0)
    fit(model, technique, max_epochs=1)
    with torch.no_grad():
        model.net[0].weight.add_(1.0)
    fit(model, technique, max_epochs=1)
    assert same_weights(model, Classifier())


def test_what_has_no_two_ends_is_told():
    with pytest.raises(RuntimeError, match="no two ends to mix before a fit has ended"):
        WiSEFT().mixed(0.5)
    technique, model = WiSEFT(), Classifier()
    fit(model, technique, limit_train_batches=0)
    assert same_weights(model, Classifier())
    with pytest.raises(RuntimeError, match="no two ends to mix"):
        technique.curve(model, dict)


@pytest.mark.parametrize("other", [SoupAverager(method="ema"), WiSEFT(name="b")])
def test_two_that_put_weights_in_at_the_end_are_refused(other):
    with pytest.raises(MisconfigurationException, match="when the fit ends"):
        fit(Classifier(), WiSEFT(), other)
    fit(Classifier(), WiSEFT(1.0), other)


def test_a_curve_of_state_dicts():
    start, end = models(2)
    curve = wise_ft_curve(start, end, lambda state: {"sum": state["w"].sum().item()}, [0.25])
    assert curve == {"alpha": [0.25], "sum": [wise_ft(start, end, 0.25)["w"].sum().item()]}
    assert len(wise_ft_curve(start, end, lambda state: {"one": 1.0})["alpha"]) == 11
    with pytest.raises(ValueError, match="at least one number, got none"):
        wise_ft_curve(start, end, dict, [])
    names = iter("ab")
    with pytest.raises(ValueError, match=r"same names each time, got \['b'\] after \['a'\]"):
        wise_ft_curve(start, end, lambda _: {next(names): 0.0}, [0.0, 1.0])


def test_what_is_trained_beside_the_module_is_in_no_mix_and_refused():
    for other in (DeepPrompts("net"), OnePrompt()):
        assert "is not among the weights that are mixed" in conflict_between(other, WiSEFT(0.5))
        assert conflict_between(other, WiSEFT(1.0)) is None
