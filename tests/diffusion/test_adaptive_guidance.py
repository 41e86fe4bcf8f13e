"""Adaptive guidance: counts, switching by row, forecasts against fewer steps, the search."""

import math
import sys
from functools import cache, partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    AdaptiveGuidance,
    Denoiser,
    GuidancePolicy,
    GuidedPredict,
    GuidedSampling,
    LinearAG,
    NoiseSchedule,
)
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.row_bits import normals
from lightning_reg.functional import (
    adaptive_guider,
    cosine_similarity,
    fit_linear_ag,
    guided_sample,
    linear_ag_coefficients,
    predict_unconditional,
    search_guidance_policy,
    threshold_for,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.procedure import ProcedureCase
from tests.diffusion.digits import NULL, class_model, scheduler
from tests.diffusion.in_validation import LOADER, Averaged, Digits
from tests.diffusion.test_denoiser import CONDITION, LEVELS, X, small
from tests.diffusion.test_diffusion_classifier import PROBLEM
from tests.toys import QUIET, TWO_RANKS, make_trainer

pytestmark = QUIET

STEPS = 10
watching = partial(
    GuidedSampling,
    [8],
    [0, 3, 1],
    "net",
    null_label=2,
    alphas_cumprod=LEVELS.tolist(),
    scale=2.0,
    threshold=0.98,
    steps=3,
)
CASE = (
    ProcedureCase(
        guided_sample,
        small,
        (X, CONDITION, 0 * CONDITION),
        {"guidance": AdaptiveGuidance(2.0, threshold=2.0), "steps": 4},
        [({"steps": 0}, "steps")],
    ),
    Case(
        make=watching,
        neutral=lambda **options: GuidedSampling([8], [], "net", null_label=2, **options),
        by_hand=Hand,
        says=("3 samples of net in 3 steps, guidance 2 until 0.98", "no labels: inactive"),
        data=PROBLEM,
        trains_as_plain=True,  # it watches
        invalid=[
            ({"shape": []}, "shape"),
            ({"shape": [0]}, "shape"),
            ({"labels": [-1]}, "labels"),
            ({"null_label": -1}, "null_label"),
            ({"null_label": None}, "null"),
            ({"null": "none", "null_label": 2}, "null"),
            ({"scale": -1.0}, "scale"),
            ({"threshold": -1.5}, "threshold"),
            ({"similarity": "v"}, "similarity"),
            ({"min_guided": 1.5}, "min_guided"),
            ({"steps": 0}, "steps"),
            ({"every_n_epochs": 0}, "every_n_epochs"),
            ({"value_range": (1.0, 1.0)}, "value_range"),
            ({"prediction": "noise"}, "prediction"),
        ],
    ),
)


class Scripted(nn.Module):
    """Noise predictions at the angles that are wanted: conditional along one axis, unconditional turned from it."""

    def __init__(self, cosines):
        super().__init__()
        self.cosines, self.rows, self.passes = cosines, [], []  # (B, S)

    def forward(self, x, t, condition):
        self.passes.append(len(x))
        step = (STEPS - 1) - (t // (1000 // STEPS))
        sample = condition[:, 0].long()
        cosine = self.cosines[sample, step].to(x)
        cosine = torch.where(condition[:, 1] == 1, 1.0, cosine)
        return torch.stack([cosine, (1 - cosine**2).clamp(min=0).sqrt()], 1)


SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.001, 1000, dtype=torch.double))
WITH, WITHOUT = (torch.tensor([[n, kind] for n in range(3)]) for kind in (1.0, 0.0))


def test_each_row_stops_where_its_similarity_reaches_the_threshold_and_never_goes_on():
    cosines = torch.full((3, STEPS), 0.5, dtype=torch.double)
    cosines[0, 3:] = 0.95
    cosines[1, 6] = 0.91
    model = Scripted(cosines)
    policy = AdaptiveGuidance(3.0, 0.9, "eps", min_guided=0.0)
    found = guided_sample(Denoiser(model, SCHEDULE), torch.ones(3, 2), WITH, WITHOUT, policy, STEPS)
    assert found.calls.tolist() == [2 * 4 + 6, 2 * 7 + 3, 2 * STEPS]
    assert model.passes == [6] * 4 + [5] * 3 + [4] * 3
    assert sum(model.passes) == int(found.calls.sum())
    for row, last in ((0, 4), (1, 7), (2, STEPS)):
        assert found.similarity[row, :last].tolist() == pytest.approx(cosines[row, :last].tolist(), abs=1e-6)
        assert bool(found.similarity[row, last:].isnan().all())
    scales = [[3.0] * last + [1.0] * (STEPS - last) for last in (4, 7, STEPS)]
    for row, scale in enumerate(scales):
        pick = slice(row, row + 1)
        alone = guided_sample(
            Denoiser(model, SCHEDULE), torch.ones(1, 2), WITH[pick], WITHOUT[pick], GuidancePolicy(scale), STEPS
        )
        torch.testing.assert_close(found.samples[pick], alone.samples)
        assert GuidancePolicy(scale).calls == int(alone.calls) == int(found.calls[row])
    assert "step  10: 0.5000" in found.curve()


def digits_denoiser():
    return Denoiser(class_model(), scheduler())


def start(count, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 10


NONE = torch.tensor([NULL])


def test_a_threshold_above_one_is_guidance_to_the_last_bit_and_minus_one_stops_at_once():
    noise, labels = start(2)
    denoiser = digits_denoiser()
    with torch.no_grad():
        full = denoiser.sample(noise, labels, NONE, 3.0, steps=6)
    never = guided_sample(denoiser, noise, labels, NONE, AdaptiveGuidance(3.0, 1.5), 6)
    assert torch.equal(never.samples, full)
    assert never.calls.tolist() == [12] * 2
    at_once = guided_sample(denoiser, noise, labels, NONE, AdaptiveGuidance(3.0, -1.0, min_guided=0.0), 6)
    assert at_once.calls.tolist() == [7] * 2
    later = guided_sample(denoiser, noise, labels, NONE, AdaptiveGuidance(3.0, -1.0, min_guided=0.5), 6)
    assert later.calls.tolist() == [9] * 2
    plain = guided_sample(denoiser, noise, labels, NONE, AdaptiveGuidance(1.0, 0.0), 6)
    assert plain.calls.tolist() == [6] * 2
    with torch.no_grad():
        assert torch.equal(plain.samples, denoiser.sample(noise, labels, steps=6))


@cache
def guided(steps):
    noise, labels = start(10)
    with torch.no_grad():
        return digits_denoiser().sample(noise, labels, NONE, 3.0, steps=steps)


def off(samples):
    return float((samples - guided(20)).square().mean())


def test_a_higher_threshold_is_nearer_to_full_guidance_and_costs_more():
    noise, labels = start(10)
    found = [
        guided_sample(digits_denoiser(), noise, labels, NONE, AdaptiveGuidance(3.0, threshold), 20)
        for threshold in (0.9, 0.99)
    ]
    calls = [float(one.calls.double().mean()) for one in found]
    assert 20 < calls[0] < calls[1] < 40
    assert off(found[0].samples) > off(found[1].samples) > 0


def test_forecasts_beat_fewer_steps_at_the_same_cost():
    denoiser = digits_denoiser()
    fitted = fit_linear_ag(denoiser, *start(30, seed=1), NONE, 3.0, steps=20, guided_share=1.0)
    noise, labels = start(10)
    found = guided_sample(denoiser, noise, labels, NONE, fitted, 20)
    assert found.calls.tolist() == [30] * 10
    assert off(found.samples) < 0.1 * off(guided(15))


def test_with_the_start_among_the_regressors_it_is_the_same_whatever_the_model_predicts():
    """The present sample is a sum of the start and of past predictions, so each kind has the other's regressors."""
    model, schedule = small().double().model, torch.linspace(0.95, 0.1, 100)
    noise_kind = Denoiser(model, NoiseSchedule(schedule))

    def clean(x, t, condition):
        return noise_kind.predict(x, t, condition).clean

    sample_kind = Denoiser(clean, NoiseSchedule(schedule, "sample"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, *X.shape[1:], generator=generator).double()
    condition = torch.randn(20, *CONDITION.shape[1:], generator=generator).double()
    made = {}
    for affine in (True, False):
        for denoiser in (noise_kind, sample_kind):
            options = {"steps": 4, "guided_share": 1.0, "affine": affine}
            policy = fit_linear_ag(denoiser, noise, condition, 0 * condition[:1], 3.0, **options)
            assert [len(row) for row in policy.coefficients] == [n + 2 * affine for n in (1, 3, 5, 7)]
            rows = noise[:2] + 0.1, condition[:2], 0 * condition[:1]
            made[affine, denoiser] = guided_sample(denoiser, *rows, policy, 4).samples
    first, second, third, fourth = made.values()
    torch.testing.assert_close(first, second, atol=1e-8, rtol=0)  # regressors are nearly collinear
    assert float((third - fourth).abs().max()) > 1e-6


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_cosines_by_hand():
    one, two = torch.randn(2, 3, 4, dtype=torch.double), torch.randn(2, 3, 4, dtype=torch.double)
    for row, found in enumerate(cosine_similarity(one, two).tolist()):
        a, b = one[row].flatten().tolist(), two[row].flatten().tolist()
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        assert found == pytest.approx(dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b)), rel=1e-12)
    assert cosine_similarity(one.bfloat16(), two.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize(("kind", "value"), [("x0", "clean"), ("eps", "noise"), ("output", "output")])
def test_what_is_compared(kind, value):
    denoiser = Denoiser(small().model, NoiseSchedule(torch.linspace(0.9, 0.1, 100), "v_prediction"))
    one, two = denoiser.both(X, torch.tensor(40), CONDITION, 0 * CONDITION)
    found = AdaptiveGuidance(similarity=kind).compare(one, two)
    torch.testing.assert_close(found, cosine_similarity(getattr(one, value), getattr(two, value)))


def test_a_multiple_is_recovered_with_nothing_left():
    c = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    u = 0.7 * c
    found = linear_ag_coefficients(c, u)
    assert [len(row) for row in found] == [1, 3, 5, 7, 9]
    for step in range(5):
        forecast = predict_unconditional(found[step], list(c[: step + 1]), list(u[:step]))
        torch.testing.assert_close(forecast, u[step], atol=1e-12, rtol=0)
    assert float(found[0]) == pytest.approx(0.7)
    start, ones = torch.linspace(-1, 1, 24).double().view(8, 3), torch.ones(8, 3).double()
    rows = linear_ag_coefficients(c, u + 0.3 * start - 2, others=[start, ones])
    for step in range(5):
        past = [*c[: step + 1], *(u + 0.3 * start - 2)[:step]]
        forecast = predict_unconditional(rows[step], past[: step + 1], past[step + 1 :], [start, ones])
        torch.testing.assert_close(forecast, u[step] + 0.3 * start - 2, atol=1e-11, rtol=0)
    wanted = torch.tensor([0.7, 0.3, -2.0], dtype=torch.double)
    torch.testing.assert_close(rows[0], wanted, atol=1e-11, rtol=0)
    mixed = torch.stack([c[0] - 2 * c[0], 0.5 * c[1] + 0.25 * c[0]])
    again = linear_ag_coefficients(c[:2], mixed, ridge=1e-9)
    torch.testing.assert_close(again[1][1], torch.tensor(0.5, dtype=torch.double), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"^linear_ag_coefficients: `conditional` must have at least 9 numbers"):
        linear_ag_coefficients(c[:, :2], u[:, :2])
    with pytest.raises(ValueError, match="`ridge` must be at least 0"):
        linear_ag_coefficients(c, u, ridge=-1.0)
    with pytest.raises(ValueError, match=r"^predict_unconditional: `coefficients` must be one for each of 2"):
        predict_unconditional(found[1], [c[0]], [c[0]])


def test_forecasts_enter_the_history_and_guidance_ends(tmp_path):
    """By a loop: true at even steps, forecast at odd ones, conditional in the second half."""
    denoiser, coefficients = small().double(), [torch.linspace(0.1, 0.5, 2 * n + 1).double() for n in range(4)]
    policy = LinearAG(coefficients, 2.5)
    policy.save(tmp_path / "linear.safetensors")
    policy = LinearAG.load(tmp_path / "linear.safetensors")
    x = X.double()
    found = guided_sample(denoiser, x, CONDITION.double(), 0 * CONDITION.double(), policy, 4)
    path, past_c, past_u = denoiser.path(4), [], []
    for step in range(4):
        time = path.times[step]
        one, two = (denoiser.predict(x, time, c) for c in (CONDITION.double(), 0 * CONDITION.double()))
        output = one.output
        if step < 2:
            past_c.append(one.output)
            last = (
                two.output
                if step == 0
                else sum(w * p for w, p in zip(coefficients[step], [*past_c, *past_u], strict=True))
            )
            past_u.append(last)
            output = last + 2.5 * (one.output - last)
        alpha, sigma = path.alphas[step], path.sigmas[step]
        x = alpha[1] * (x - sigma[0] * output) / alpha[0] + sigma[1] * output
    torch.testing.assert_close(found.samples, x)
    assert found.calls.tolist() == [5, 5]
    with pytest.raises(ValueError, match=r"^LinearAG: `steps` must be 4, which it was fitted for, got 5"):
        guided_sample(denoiser, X.double(), CONDITION.double(), 0 * CONDITION.double(), policy, 5)


def test_a_policy_of_other_steps_is_refused():
    with pytest.raises(ValueError, match=r"^GuidancePolicy: `steps` must be 2, as many as scales, got 3"):
        guided_sample(small(), X, CONDITION, 0 * CONDITION, GuidancePolicy([1.0, 2.0]), 3)


def test_thresholds_are_read_off_a_curve():
    curve = torch.tensor([[0.5, 0.6, 0.7, 0.8], [0.6, 0.7, 0.8, 0.9], [0.1, 0.8, 0.9, 1.0]])
    assert threshold_for(curve, 0.5) == pytest.approx(0.7)
    assert threshold_for(curve, 1.0) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="threshold_for: `share`"):
        threshold_for(curve, 0.0)


def test_the_search_drops_guidance_where_it_says_nothing():
    def late(x, t, condition):  # in the second half both passes are the same
        said = condition.expand(-1, 2).to(x)
        return torch.where((t < 500)[:, None], torch.full_like(x, 0.2), said)

    denoiser = Denoiser(late, SCHEDULE)
    inputs = (torch.ones(2, 2), torch.ones(2, 1), torch.zeros(1, 1))
    policy = search_guidance_policy(denoiser, *inputs, 3.0, steps=6, cost_weight=0.05, updates=25)
    assert policy.scales == [3.0] * 3 + [1.0] * 3
    assert policy.calls == 9
    for options in ({"cost_weight": -1.0}, {"updates": 0}):
        with pytest.raises(ValueError, match=r"^search_guidance_policy: `cost_weight`"):
            search_guidance_policy(denoiser, *inputs, 3.0, **options)


def test_a_threshold_that_is_met_at_the_first_step_is_told():
    cosines = torch.full((3, STEPS), 0.999, dtype=torch.double)
    policy = AdaptiveGuidance(3.0, 0.99, "eps")
    with pytest.warns(UserWarning, match=r"predictions are alike \(0\.9990\) at the first step already"):
        found = guided_sample(Denoiser(Scripted(cosines), SCHEDULE), torch.ones(3, 2), WITH, WITHOUT, policy, STEPS)
    assert found.calls.tolist() == [STEPS + 3] * 3  # a quarter of the steps is guided all the same


@pytest.mark.parametrize(
    ("kind", "options", "argument"),
    [
        (AdaptiveGuidance, {"scale": -1.0}, "scale"),
        (AdaptiveGuidance, {"threshold": math.nan}, "threshold"),
        (AdaptiveGuidance, {"threshold": -1.5}, "threshold"),
        (AdaptiveGuidance, {"similarity": "v"}, "similarity"),
        (AdaptiveGuidance, {"min_guided": 1.5}, "min_guided"),
        (AdaptiveGuidance, {"rescale": -0.1}, "rescale"),
        (GuidancePolicy, {"scales": []}, "scales"),
        (GuidancePolicy, {"scales": [-1.0]}, "scales"),
        (LinearAG, {"coefficients": [], "scale": 1.0}, "coefficients"),
        (LinearAG, {"coefficients": [torch.ones(2)], "scale": 1.0}, "coefficients"),
        (LinearAG, {"coefficients": [torch.ones(3), torch.ones(3)], "scale": 1.0}, "coefficients"),
        (LinearAG, {"coefficients": [torch.ones(1)], "scale": 1.0, "every": 0}, "every"),
        (LinearAG, {"coefficients": [torch.ones(1)], "scale": 1.0, "guided_share": 0.0}, "guided_share"),
    ],
)
def test_arguments(kind, options, argument):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: `{argument}`"):
        kind(**options)


def test_the_guider_of_diffusers_does_the_same():
    """A loop as in a modular pipeline: the guider says how many passes, the scheduler steps."""
    pytest.importorskip("diffusers.guiders", reason="diffusers has guiders since 0.35")
    noise, labels = start(1)
    policy = AdaptiveGuidance(3.0, 0.9)
    wanted = guided_sample(digits_denoiser(), noise, labels, NONE, policy, 8)
    own, x = scheduler(), noise
    guider = adaptive_guider(policy, own)
    for _ in range(2):  # a second sampling begins anew
        own.set_timesteps(8)
        x = noise
        for number, time in enumerate(own.timesteps):
            guider.set_state(step=number, num_inference_steps=8, timestep=time)
            passes = guider.prepare_inputs({"latents": (x, x), "labels": (labels, NONE)})
            with torch.no_grad():
                for one in passes:
                    one.noise_pred = class_model()(one.latents, time[None], class_labels=one.labels).sample
            x = own.step(guider(passes).pred, time, x).prev_sample
        torch.testing.assert_close(x, wanted.samples, atol=1e-4, rtol=1e-4)
        assert guider.calls == int(wanted.calls) < 16


def test_without_diffusers_the_guider_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.guiders", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-reg\[diffusion\]'"):
        adaptive_guider(AdaptiveGuidance(), scheduler())


class Sampler(GuidedPredict, LightningModule):
    sampling_steps = 3

    def __init__(self):
        super().__init__()
        self.unet = class_model()

    def guided_denoiser(self):
        return Denoiser(self.unet, scheduler())

    def guidance(self):
        return AdaptiveGuidance(2.0, 1.5)

    def null_condition(self):
        return NONE

    def sample_shape(self):
        return (1, 8, 8)


def test_a_module_samples_for_the_conditions_of_its_loader():
    module, labels = Sampler(), torch.tensor([3, 1, 4])
    found = {}
    for size in (2, 3):
        made = make_trainer().predict(module, DataLoader(TensorDataset(labels), batch_size=size))
        found[size] = torch.cat([one.samples for one in made])
        assert torch.cat([one.calls for one in made]).tolist() == [6] * 3
    torch.testing.assert_close(found[2], found[3])
    noise = normals(0, torch.arange(3), (1, 8, 8))
    with torch.no_grad():
        wanted = Denoiser(class_model(), scheduler()).sample(noise, labels, NONE, 2.0, steps=3)
    torch.testing.assert_close(found[3], wanted)
    assert not [key for key in module.state_dict() if not key.startswith("unet.")]
    with pytest.raises(NotImplementedError, match=r"define `guided_denoiser\(self\)`"):
        GuidedPredict().guided_denoiser()


# -- in validation -----------------------------------------------------------------------------------------------------


class Drawn(Digits):
    """With conditions, a policy and a decoder by name."""

    def __init__(self):
        super().__init__()
        self.table, self.policy = torch.tensor([3, 1, 4]), GuidancePolicy([2.0, 1.0, 2.0])

    def prompts(self):
        return self.table

    def brighter(self, samples):
        return 0.5 * samples + 0.25


DRAWN = {"shape": [1, 8, 8], "labels": [3, 1, 4], "denoiser": "unet", "null_label": NULL, "scale": 3.0, "steps": 3}


def validated(*others, **options):
    watch = GuidedSampling(**DRAWN | options)
    (logged,) = make_trainer(callbacks=[*others, watch]).validate(Drawn(), LOADER, verbose=False)
    return watch, {name.removeprefix("reg/guided_sampling/"): value for name, value in logged.items()}


def test_validation_draws_and_counts_the_passes():
    rows = []
    with class_model().register_forward_hook(lambda module, args, output: rows.append(len(args[0]))):
        watch, logged = validated(threshold=-1.0)
    noise, labels = normals(0, torch.arange(3), (1, 8, 8)), torch.tensor([3, 1, 4])
    wanted = guided_sample(digits_denoiser(), noise, labels, NONE, AdaptiveGuidance(3.0, -1.0), 3)
    torch.testing.assert_close(watch.last_samples, wanted.samples)
    assert watch.last_calls.tolist() == wanted.calls.tolist() == [4, 4, 4]
    assert sum(rows) == 12
    assert logged == {"loss": 1.0, "calls": 4.0}
    with torch.no_grad():
        full = digits_denoiser().sample(noise, labels, NONE, 3.0, 3)
    compared, logged = validated(threshold=-1.0, compare=True, every_n_epochs=5, seed=0)  # outside a fit: always
    assert logged["distance"] == pytest.approx(float((wanted.samples - full).square().mean()), rel=1e-4)
    assert torch.equal(compared.last_samples, watch.last_samples)
    assert not torch.equal(validated(seed=1)[0].last_samples, validated(seed=0)[0].last_samples)


@pytest.mark.parametrize(
    "options",
    [
        {"labels": [0, 1, 2], "conditions": "table"},
        {"labels": [0, 1, 2], "conditions": "prompts"},
        {"null": "none", "null_label": None},
    ],
)
def test_conditions_are_those_of_the_module(options):
    assert torch.equal(validated(**options)[0].last_samples, validated()[0].last_samples)


def test_a_policy_of_the_module_takes_the_place_of_thresholds():
    watch, logged = validated(guidance="policy")
    assert logged["calls"] == 5
    assert watch.describe() == "3 samples of unet in 3 steps, policy"


class Board(Logger):
    """A logger that takes pictures, in one of two ways."""

    def __init__(self, way):
        super().__init__()
        self.shown, self.way = [], way
        if way == "log_image":
            self.log_image = lambda key, images, step: self.shown.append((key, torch.stack(images), step))

    name, version = "board", 0

    @property
    def experiment(self):
        return self if self.way == "add_images" else None

    def add_images(self, tag, images, step):
        self.shown.append((tag, images, step))

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_pictures_go_to_loggers_and_are_those_of_one_noise():
    boards = [Board(way) for way in ("add_images", "log_image", "neither")]
    watch = GuidedSampling(**DRAWN, decode="brighter", value_range=(0.0, 1.0), every_n_epochs=2)
    trainer = make_trainer(callbacks=[watch], logger=boards, max_epochs=4)
    trainer.fit(Drawn(), LOADER, LOADER)
    assert [len(board.shown) for board in boards] == [2, 2, 0]
    for board in boards[:2]:
        (tag, first, step), (_, second, later) = board.shown
        assert (tag, step, later) == ("reg/guided_sampling/samples", 4, 8)
        assert torch.equal(first, second)  # the network is not trained here
        torch.testing.assert_close(first, (0.5 * watch.last_samples + 0.25).clamp(0, 1))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize(("options", "validates"), [({}, False), ({"every_n_epochs": 3}, True)])
def test_a_fit_in_which_nothing_was_sampled_is_told(options, validates):
    watch = GuidedSampling(**DRAWN, **options)
    with pytest.warns(UserWarning, match=r"^GuidedSampling: nothing was sampled in this fit, .* `every_n_epochs`="):
        make_trainer(callbacks=[watch], max_epochs=1).fit(Drawn(), LOADER, LOADER if validates else None)


def test_weights_are_those_of_the_validation():
    averaged, plain = validated(Averaged())[0].last_samples, validated()[0].last_samples
    assert float((averaged - plain).abs().max()) > 0.01
    assert torch.equal(validated()[0].last_samples, plain)


def _on_ranks(_):
    watch = GuidedSampling(**DRAWN, threshold=0.9, compare=True)
    trainer = make_trainer(callbacks=[watch], **TWO_RANKS)
    (logged,) = trainer.validate(Drawn(), LOADER, verbose=False)
    return watch.last_samples, watch.last_calls, logged


def test_two_ranks_draw_what_one_does(two_processes):
    """Three samples: one rank draws two, the other one, and the first anew."""
    watch, wanted = validated(threshold=0.9, compare=True)
    for samples, calls, logged in two_processes.run(_on_ranks, None):
        torch.testing.assert_close(samples, watch.last_samples)
        assert torch.equal(calls, watch.last_calls)
        assert logged["reg/guided_sampling/calls"] == pytest.approx(wanted["calls"])
        assert logged["reg/guided_sampling/distance"] == pytest.approx(wanted["distance"], rel=1e-4)


def test_too_few_conditions_are_told():
    with pytest.raises(
        MisconfigurationException, match=r"conditions='table' must name a tensor.* than 3 rows.* found 3"
    ):
        validated(conditions="table", labels=[3])
    with pytest.raises(MisconfigurationException, match=r"^GuidedSampling: denoiser='net' names nothing in Drawn"):
        validated(denoiser="net")
