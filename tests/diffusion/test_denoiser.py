"""Denoiser: step for step as diffusers' own schedulers and pipelines."""

import copy
import warnings

import diffusers
import pytest
import torch
from torch import nn

from lightning_reg import Denoiser, NoiseSchedule
from lightning_reg.diffusion.denoiser import Prediction
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.problems import seeded
from tests.diffusion.digits import NULL, class_model, scheduler, training_digits

LEVELS = torch.linspace(0.999, 0.001, 100, dtype=torch.double)
X = torch.tensor([[0.5, -1.0, 0.25], [1.5, 0.3, -0.7]])


class Small(nn.Module):
    """A denoiser of rows of 3 numbers, with a condition of 2."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.layer = nn.Linear(6, 3)

    def forward(self, x, t, condition):
        time = (t[:, None] / 100).to(x.dtype)
        return self.layer(torch.cat([x, time, condition], 1)).tanh()


def small(**options):
    return Denoiser(**{"model": Small(), "scheduler": NoiseSchedule(LEVELS), **options})


CONDITION = torch.tensor([[0.2, -0.4], [1.0, 0.6]])
CASE = NetworkCase(
    make=small,
    inputs=(X, torch.tensor([10, 80]), CONDITION),
    invalid=[
        ({"model": 3}, "model"),
        ({"scheduler": LEVELS}, "scheduler"),
        ({"prediction": "noise"}, "prediction"),
        ({"model": lambda x, t: x, "weights": {}}, "weights"),
    ],
)


def function(x, t, condition=None):
    """Any function of x, t and the condition."""
    out = torch.sin(3 * x + t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) / 400)
    return out if condition is None else out * condition.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def noise(count=2, dtype=torch.float32, seed=0):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def in_diffusers(own, model, x, steps, **options):
    """The loop of a pipeline of diffusers, every sample kept."""
    own = copy.deepcopy(own)
    own.set_timesteps(steps, **options)
    kept = []
    for t in own.timesteps:
        x = own.step(model(x, t.expand(len(x))), t, x).prev_sample
        kept.append(x)
    return kept


def ours(denoiser, x, steps, **options):
    """The same by ours."""
    kept = []

    def guide(here, time, number):
        kept.append(here)
        return denoiser.predict(here, time)

    last = denoiser.sample(x, steps=steps, guide=guide, **options)
    return [*kept[1:], last]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [20, 7])
def test_steps_are_those_of_ddim_in_diffusers(kind, spacing, steps):
    options = {"timestep_spacing": spacing, "set_alpha_to_one": spacing == "trailing"}
    options |= {"beta_schedule": "linear", "steps_offset": 0}
    own = scheduler(kind, **options)
    before = copy.deepcopy(vars(own))
    found = ours(Denoiser(function, own), noise(), steps)
    wanted = in_diffusers(own, function, noise(), steps)
    assert len(found) == len(wanted) == steps
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-5, rtol=1e-5)
    assert str(vars(own)) == str(before)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_schedule_that_ends_in_pure_noise_divides_by_nothing(kind):
    own = scheduler(kind, rescale_betas_zero_snr=True, timestep_spacing="trailing", beta_schedule="scaled_linear")
    assert float(own.alphas_cumprod[-1]) == 0.0
    found = ours(Denoiser(function, own), noise(), 10)
    torch.testing.assert_close(found, in_diffusers(own, function, noise(), 10), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`scheduler` ends in pure noise .* `rescale_betas_zero_snr=False`"):
        Denoiser(function, own, prediction="epsilon")


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}])
def test_steps_of_flows_are_those_of_euler_in_diffusers(options):
    own = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    mu = {"mu": 0.8} if "use_dynamic_shifting" in options else {}
    found = ours(Denoiser(function, own, **mu), noise(), 9)
    torch.testing.assert_close(found, in_diffusers(own, function, noise(), 9, **mu), atol=1e-5, rtol=1e-5)
    if mu:
        with pytest.raises(ValueError, match=r"^Denoiser: `mu` must be given"):
            Denoiser(function, own).sample(noise(), steps=9)


def test_the_pipeline_of_diffusers_gives_the_same_images():
    with seeded(0):
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
    own = scheduler()
    pipeline = diffusers.DDIMPipeline(unet, own)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline(2, generator, num_inference_steps=6, output_type="np", use_clipped_model_output=False).images
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = Denoiser(unet.eval(), own).sample(start, steps=6)
    torch.testing.assert_close(
        (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.tensor(images), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_each_prediction_gives_back_sample_and_noise(kind):
    x, e = noise(dtype=torch.double), noise(seed=1, dtype=torch.double)
    own = diffusers.FlowMatchEulerDiscreteScheduler() if kind == "flow" else scheduler(kind)
    times = torch.tensor([100, 900])
    level = times.double() / 1000 if kind == "flow" else (1 - own.alphas_cumprod[times].double()).sqrt()
    sigma = level[:, None, None, None]
    alpha = 1 - sigma if kind == "flow" else (1 - sigma**2).sqrt()
    said = {"epsilon": e, "v_prediction": alpha * e - sigma * x, "sample": x, "flow": e - x}[kind]
    denoiser = Denoiser(lambda noisy, t: said, own)
    noisy = denoiser.noised(x, e, times)
    torch.testing.assert_close(noisy, alpha * x + sigma * e)
    found = denoiser.predict(noisy, times)
    for one, two in ((found.clean, x), (found.noise, e), (denoiser(noisy, times), e)):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


def test_steps_may_end_where_the_next_ones_start():
    denoiser = Denoiser(function, scheduler(timestep_spacing="linspace"))
    apart, together = denoiser.path(7), denoiser.path(7, joined=True)
    assert bool((together.alphas[:-1, 1] == together.alphas[1:, 0]).all())
    assert not bool((apart.alphas[:-1, 1] == apart.alphas[1:, 0]).all())
    assert float(together.sigmas[-1, 1]) == float(apart.sigmas[-1, 1]) == 0.0


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "DDPMScheduler"]
)
def test_of_other_schedulers_levels_and_times_are_read(name):
    own = scheduler(kind=name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of diffusers on new numpy
        path = Denoiser(function, own).path(10)
    assert len(path) == 10
    assert bool((path.times.diff() < 0).all())
    torch.testing.assert_close(path.alphas[:, 0] ** 2, own.alphas_cumprod[path.times].double(), rtol=1e-6, atol=1e-9)
    assert float(path.alphas[-1, 1]) > 0.99
    if name == "PNDMScheduler":
        with pytest.raises(ValueError, match=r"got 13 of PNDMScheduler for 10 steps.*skip_prk_steps=True"):
            Denoiser(function, scheduler(kind=name)).path(10)


@pytest.mark.parametrize("name", ["clip_sample", "thresholding"])
def test_schedulers_that_cut_samples_are_refused_with_what_to_write(name):
    own = scheduler(**{name: True})
    with pytest.raises(ValueError, match=rf"DDIMScheduler\.from_config\(scheduler\.config, {name}=False\)"):
        Denoiser(function, own).sample(noise(), steps=3)
    Denoiser(function, own)(noise(), torch.tensor(3))  # its predictions are read all the same


def test_schedulers_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"`scheduler` must have `alphas_cumprod` or be a flow-matching one"):
        Denoiser(function, type("Odd", (), {"config": None})())
    with pytest.raises(ValueError, match="prediction_type='score'"):
        Denoiser(function, NoiseSchedule(LEVELS, "score"))
    for levels in (torch.ones(2, 2), torch.tensor([2.0]), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"^NoiseSchedule: `alphas_cumprod`"):
            NoiseSchedule(levels)


# -- models ------------------------------------------------------------------------------------------------------------


def transformer(kind):
    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 2, "num_layers": 1, "num_attention_heads": 2}
    with seeded(0):
        if kind == "dit":
            return diffusers.DiTTransformer2DModel(
                **sizes, attention_head_dim=4, out_channels=4, num_embeds_ada_norm=5, norm_num_groups=2
            ).eval()
        return diffusers.SD3Transformer2DModel(
            **sizes, attention_head_dim=8, joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=4,
            out_channels=2,
        ).eval()  # fmt: skip


def test_a_transformer_with_learned_variance_gives_its_first_channels():
    model, x = transformer("dit"), torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    labels, times = torch.tensor([1, 3]), torch.tensor([10, 700])
    with torch.no_grad():
        whole = model(x, timestep=times, class_labels=labels).sample
        assert whole.shape[1] == 4
        found = Denoiser(model, scheduler())(x, times, labels)
    assert torch.equal(found, whole[:, :2])


def test_a_flow_transformer_takes_two_conditions_by_name():
    model, x = transformer("sd3"), torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = {"encoder_hidden_states": torch.randn(2, 3, 6), "pooled_projections": torch.randn(2, 4)}
    null = {name: torch.zeros_like(value[:1]) for name, value in condition.items()}
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def guided(here, times):
        with_it, without = (
            model(here, timestep=times, return_dict=False, **{k: v.expand(2, *v.shape[1:]) for k, v in c.items()})[0]
            for c in (condition, null)
        )
        return without + 4.5 * (with_it - without)

    with torch.no_grad():
        found = Denoiser(model, own).sample(x, condition, null, 4.5, steps=4)
        wanted = in_diffusers(own, guided, x, 4)[-1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)  # of numbers around 10


class Counting(nn.Module):
    """Counts rows and passes."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, x, t, condition):
        self.passes.append(len(x))
        return function(x, t, condition)


class TextFirst(nn.Module):
    """Takes its arguments in the order of some transformers, where the time comes late."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        return hidden_states * encoder_hidden_states + timestep[:, None]


def test_a_compiled_model_has_the_arguments_of_the_network_in_it():
    condition, time = torch.full((2, 3), 0.5), torch.tensor(7)
    for model in (TextFirst(), torch.compile(TextFirst(), backend="eager")):
        found = Denoiser(model, scheduler()).predict(torch.ones(2, 3), time, condition).output
        assert torch.equal(found, torch.full((2, 3), 7.5))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_that_of_the_pipelines_in_one_pass(rescale):
    try:
        from diffusers.guiders.guider_utils import rescale_noise_cfg
    except ImportError:  # before 0.35
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    x, times, condition, null = noise(), torch.tensor(400), torch.tensor([0.9, 0.4]), torch.tensor([0.2])
    for batched, passes in ((True, [4]), (False, [2, 2])):
        model = Counting()
        found = Denoiser(model, scheduler("v_prediction")).guided(
            x, times, condition, null, 5.0, rescale, batched=batched
        )
        with_it, without = function(x, times.expand(2), condition), function(x, times.expand(2), null)
        wanted = without + 5.0 * (with_it - without)
        wanted = rescale_noise_cfg(wanted, with_it, rescale) if rescale else wanted
        torch.testing.assert_close(found.output, wanted, atol=1e-5, rtol=1e-5)
        assert model.passes == passes
    model = Counting()
    Denoiser(model, scheduler()).guided(x, times, condition, null, 1.0)
    assert model.passes == [2]


def test_prompts_of_other_lengths_take_two_passes():
    seen = []

    def words(x, t, condition):
        seen.append(condition.shape)
        return function(x, t, condition.mean((1, 2)))

    Denoiser(words, scheduler()).guided(noise(), torch.tensor(5), torch.ones(2, 3, 4), torch.ones(1, 7, 4), 2.0)
    assert seen == [(2, 3, 4), (2, 7, 4)]
    with pytest.raises(ValueError, match=r"^Denoiser: `condition` must have a row for each of 2 samples or one, got 3"):
        Denoiser(words, scheduler()).predict(noise(), torch.tensor(5), torch.ones(3, 3, 4))


def test_models_distilled_with_guidance_are_refused():
    model = Counting()
    model.config = type("Config", (), {"guidance_embeds": True})()
    denoiser = Denoiser(model, scheduler())
    with pytest.raises(ValueError, match=r"Counting was distilled with guidance \(guidance_embeds in its config\)"):
        denoiser.guided(noise(), torch.tensor(5), torch.ones(2), torch.ones(1), 3.0)
    denoiser.guided(noise(), torch.tensor(5), torch.ones(2), torch.ones(1), 1.0)


def test_averaged_weights_stand_in_for_the_models_own():
    model, other = Small(), Small()
    with torch.no_grad():
        other.layer.weight.mul_(0.5)
    inputs = (X, torch.tensor([3, 50]), CONDITION)
    found = Denoiser(model, NoiseSchedule(LEVELS), weights=dict(other.named_parameters()))(*inputs)
    assert torch.equal(found, Denoiser(other, NoiseSchedule(LEVELS))(*inputs))
    assert not torch.equal(found, Denoiser(model, NoiseSchedule(LEVELS))(*inputs))


def test_half_precision_keeps_the_levels():
    denoiser = small().to(torch.bfloat16)
    alpha, sigma = denoiser.levels(torch.tensor([7]))
    assert (alpha.dtype, float(alpha)) == (torch.float64, float(LEVELS[7].sqrt()))
    assert float(sigma) == float((1 - LEVELS[7]).sqrt())
    assert denoiser(X.bfloat16(), torch.tensor(7), CONDITION).dtype is torch.float32


# -- sampling ----------------------------------------------------------------------------------------------------------


def stored_numbers(steps, checkpoint):
    """What a sample and its gradients are, and how many numbers are kept for the backward pass."""
    denoiser, start, condition = small().double(), X.double(), CONDITION.double()
    start.requires_grad_()
    condition.requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        made = denoiser.sample(start, condition, torch.zeros(1, 2), 2.0, steps=steps, checkpoint=checkpoint)
    made.square().sum().backward()
    return [made.detach(), start.grad, condition.grad, denoiser.model.layer.weight.grad], sum(sizes)


def test_samples_have_gradients_and_recomputed_ones_are_the_same():
    kept = {key: stored_numbers(*key) for key in ((4, False), (4, True), (8, False), (8, True))}
    for steps in (4, 8):
        torch.testing.assert_close(kept[steps, True][0], kept[steps, False][0], atol=1e-12, rtol=1e-12)
    growth = [kept[8, checkpoint][1] - kept[4, checkpoint][1] for checkpoint in (True, False)]
    assert growth[0] < 0.2 * growth[1]  # the sample alone at each step


def test_the_trained_model_makes_digits_that_it_recognizes():
    """A sanity check of the fixture: guided samples are nearest to the mean of their class."""
    labels = torch.arange(10).repeat(2)
    start = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = Denoiser(class_model(), scheduler()).sample(start, labels, torch.tensor([NULL]), 2.0, steps=10)
    x, y = training_digits()
    means = torch.stack([x[y == n].mean(0) for n in range(10)])
    assert ((made[:, None] - means).flatten(2).square().sum(2).argmin(1) == labels).float().mean() >= 0.8


def test_predictions_are_plain_data():
    made = Prediction(X, X, torch.ones(2, 1), torch.ones(2, 1), "epsilon")
    assert torch.equal(made.at(0.5, 0.25), 0.25 * X)
