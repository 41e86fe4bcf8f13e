"""Null-text inversion: the card's exact checks, a loop by hand, the digits models, and edits by prompts."""

import math
import sys
from functools import cache

import diffusers
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import AdaptiveGuidance, Denoiser, GuidancePolicy, NoiseSchedule, NullTextInversion
from lightning_reg.diffusion.null_text_inversion.prompt_to_prompt import LocalBlend
from lightning_reg.functional import (
    align_tokens,
    blend_mask,
    ddim_invert,
    guided_sample,
    null_text_invert,
    null_text_rate,
    null_text_sample,
    prompt_to_prompt,
)
from tests.conformance.kinds.procedure import ProcedureCase
from tests.diffusion.digits import (
    class_model,
    flow_condition,
    flow_model,
    flow_scheduler,
    held_out,
    prompt,
    scheduler,
    training_digits,
    word_model,
    words,
)
from tests.diffusion.test_denoiser import CONDITION, X, function, small
from tests.toys import QUIET, make_trainer

pytestmark = QUIET


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(double=False):
    """A small UNet of random weights, with cross-attention to 5 numbers."""
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=5,
        attention_head_dim=4,
    )  # fmt: skip
    return Denoiser(network.double() if double else network, scheduler())


SAMPLE, PROMPT, OTHER = drawn(2, 1, 4, 4), drawn(2, 3, 5, seed=1), drawn(2, 3, 5, seed=2)
EARLY = {"guidance": 2.0, "steps": 3, "inner_steps": 2}


@cache
def inversion():
    return null_text_invert(unet(), SAMPLE, PROMPT, 0 * PROMPT[:1], **EARLY)


CASE = (
    ProcedureCase(
        null_text_invert,
        small,
        (X, CONDITION, 0.1 * CONDITION),
        {"guidance": 2.0, "steps": 4, "inner_steps": 3},
        [
            ({"guidance": 0.5}, "guidance"),
            ({"steps": 0}, "steps"),
            ({"inner_steps": -1}, "inner_steps"),
            ({"lr": 0.0}, "lr"),
            ({"early_stop": (1e-5, -1.0)}, "early_stop"),
            ({"stop_after": 0}, "stop_after"),
            ({"fixed_point_iterations": -1}, "fixed_point_iterations"),
        ],
        half_tolerance=0.2,  # the updates of Adam are signs at first
    ),
    ProcedureCase(null_text_sample, unet, (inversion(), OTHER)),
    ProcedureCase(
        prompt_to_prompt,
        unet,
        (inversion(), PROMPT, OTHER),
        {},
        [
            ({"cross_replace": 1.5}, "cross_replace"),
            ({"self_replace": -0.5}, "self_replace"),
            ({"blend": LocalBlend(PROMPT, PROMPT, threshold=0.0)}, "blend"),
        ],
    ),
)


# -- inversion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to_one", [True, False])
def test_pivots_are_those_of_the_inverse_scheduler_of_diffusers(kind, to_one):
    options = {"timestep_spacing": "leading", "set_alpha_to_one": to_one}
    denoiser, x = Denoiser(function, scheduler(kind, **options)), drawn(2, 1, 4, 4)
    if kind == "sample" and to_one:
        with pytest.raises(ValueError, match=r"^ddim_invert: `denoiser` predicts samples, .* `set_alpha_to_one=False`"):
            ddim_invert(denoiser, x, steps=20)
        return
    found = ddim_invert(denoiser, x, steps=20)
    own = scheduler(kind, "DDIMInverseScheduler", clip_sample=False, **options)
    own.set_timesteps(20)
    kept = [x]
    for time in own.timesteps:
        kept.append(own.step(function(kept[-1], time.expand(2)), time, kept[-1]).prev_sample)
    torch.testing.assert_close(found, torch.stack(kept[::-1], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["ddim", "flow"])
def test_noise_that_depends_on_the_time_alone_is_inverted_to_the_last_digit(scheme):
    def of_time(x, t):
        return torch.full_like(x, 0.3) * torch.sin(t.to(x) / 100)[:, None, None, None]

    denoiser = Denoiser(of_time, scheduler() if scheme == "ddim" else flow_scheduler(shift=2.0))
    x = drawn(2, 1, 4, 4).double()
    for steps in (7, 20):
        pivots = ddim_invert(denoiser, x, steps=steps)
        found = denoiser.sample(pivots[:, 0], steps=steps, joined=True)
        assert float((found - x).abs().max()) < 1e-6


def kinds_of_denoisers():
    """One function, taken for a velocity, as models of all kinds and spacings."""

    def of_velocity(x, t):
        return (0.7 * x).sin() + 0.5 * x.flip(3).cos() + (t.to(x) / 300).sin()[:, None, None, None]

    for kind in ("epsilon", "v_prediction", "sample"):
        for spacing in ("leading", "trailing", "linspace"):
            own = scheduler(kind, timestep_spacing=spacing, set_alpha_to_one=kind != "sample")
            levels = own.alphas_cumprod.double()

            def model(x, t, levels=levels, kind=kind):
                velocity, abar = of_velocity(x, t), levels[t][:, None, None, None]
                alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
                clean, noise = alpha * x - sigma * velocity, alpha * velocity + sigma * x
                return {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]

            yield f"{kind}, {spacing}", Denoiser(model, own)
    for shift in (1.0, 3.0):
        yield f"flow, {shift}", Denoiser(of_velocity, flow_scheduler(shift=shift))


def test_with_iterations_inversion_is_exact_at_any_spacing():
    x, errors = SAMPLE.double(), {}
    for name, denoiser in kinds_of_denoisers():
        for iterations in (0, 10):
            with torch.no_grad():
                pivots = ddim_invert(denoiser, x, None, 10, iterations)
                made = denoiser.sample(pivots[:, 0], steps=10, joined=True)
            errors[name, iterations] = float((made - x).abs().max())
    assert len(errors) == 22
    assert min(error for (_, iterations), error in errors.items() if not iterations) > 0.02
    assert max(error for (_, iterations), error in errors.items() if iterations) < 1e-4


def test_iterations_by_hand():
    """Noise that is half of the sample, one step from abar = 0.64 to no noise; the velocity is held in between."""

    def noise(z, t, c):
        return z / 2 + 0 * c

    denoiser, x = Denoiser(noise, NoiseSchedule(torch.tensor([0.64]))), torch.tensor([[1.0]]).double()
    first = 0.8 * 1.0 + 0.6 * 0.5  # the noise at the sample
    second = first + (1.0 - (first - 0.6 * first / 2) / 0.8) / 0.8
    for iterations, wanted in ((0, first), (1, second), (60, 0.8 / 0.7)):
        found = null_text_invert(
            denoiser, x, 0 * x, 0 * x, steps=1, inner_steps=0, fixed_point_iterations=iterations
        ).pivots
        assert float(found[0, 0]) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match=r"^ddim_invert: `fixed_point_iterations` must be at least 0, got -1"):
        ddim_invert(denoiser, x, 0 * x, 1, -1)


# -- the embedding -----------------------------------------------------------------------------------------------------


def by_hand(model, x, condition, null, guidance, steps, inner_steps, lr, early):
    """The algorithm as it stands in the card, in plain loops, one sample, in float64; levels of a linear schedule."""
    levels = torch.linspace(0.999, 0.001, 100, dtype=torch.double).tolist()
    times = [round(100 - n * 100 / steps) - 1 for n in range(steps)]
    abar = [levels[time] for time in times] + [1.0]

    def move(z, e, a, b):
        return math.sqrt(b) * (z - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(1 - b) * e

    def noise(z, time, c):
        return model(z[None], torch.tensor([time]), c[None])[0]

    pivots = [x]
    for n in reversed(range(steps)):
        with torch.no_grad():
            pivots.insert(0, move(pivots[0], noise(pivots[0], times[n], condition), abar[n + 1], abar[n]))
    z, nulls = pivots[0], []
    for n in range(steps):
        null, m, v = null.clone(), 0, 0
        share = 50 * n / steps
        for j in range(1, inner_steps + 1):
            leaf = null.clone().requires_grad_()
            with torch.no_grad():
                given = noise(z, times[n], condition)
            without = noise(z, times[n], leaf)
            made = move(z, without + guidance * (given - without), abar[n], abar[n + 1])
            loss = (made - pivots[n + 1]).square().mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            rate = lr * (1 - share / 100)
            null = null - rate * (m / (1 - 0.9**j)) / ((v / (1 - 0.999**j)).sqrt() + 1e-8)
            if loss.item() < early[0] + early[1] * share:
                break
        with torch.no_grad():
            given, without = noise(z, times[n], condition), noise(z, times[n], null)
            z = move(z, without + guidance * (given - without), abar[n], abar[n + 1])
        nulls.append((null, j))
    return pivots, nulls, z


def test_the_algorithm_by_hand_for_each_sample():
    denoiser, x, condition = small().double(), X.double(), CONDITION.double()
    options = {"guidance": 3.0, "steps": 10, "inner_steps": 6, "lr": 0.05, "early_stop": (0.5, 2e-5)}
    found = null_text_invert(denoiser, x, condition, 0.1 * condition[:1], **options)
    assert found.updates.max() == 6
    assert 0 < found.updates.min() < 6
    assert not torch.equal(found.updates[0], found.updates[1])  # each sample ends for itself
    for row in range(2):
        pivots, nulls, z = by_hand(denoiser.model, x[row], condition[row], 0.1 * condition[0], *options.values())
        torch.testing.assert_close(found.pivots[row], torch.stack(pivots))
        torch.testing.assert_close(found.null[row], torch.stack([null for null, _ in nulls]))
        assert found.updates[row].tolist() == [count for _, count in nulls]
        torch.testing.assert_close(found.current[row], z)
        last = (z - pivots[-1]).square().mean()
        assert float(found.losses[row, -1]) == pytest.approx(float(last))
    torch.testing.assert_close(null_text_sample(denoiser, found, condition), found.current)


def test_figures_of_the_community_pipeline():
    """huggingface/diffusers, 16163e3, examples/community/pipeline_null_text_inversion.py: `ddim_inversion_loop` and

    `null_optimization`, run in float64 on the same function with the same 50 steps, 3 updates and thresholds.
    """

    def noise(z, t, e):
        return (z + 0.5 * z.flip(1) + e).tanh() + 0.1 * e

    denoiser = Denoiser(noise, scheduler(set_alpha_to_one=False, timestep_spacing="leading"))
    x, condition = torch.tensor([[0.5, -1.0, 0.2]]).double(), torch.tensor([[0.3, 0.1, -0.2]]).double()
    found = null_text_invert(denoiser, x, condition, 0 * condition, 7.5, 50, 3)
    for ours, theirs in (
        (found.noise, [0.9695641585, -0.9075440710, 0.7380472376]),
        (found.null[:, 0], [0.0299366952, 0.0298899639, -0.0299623407]),
        (found.null[:, 24], [0.6600125160, 0.6598988813, -0.6600601592]),
        (found.null[:, 49], [1.1173124372, 1.1171071954, -1.1172631655]),
        (found.current, [-5.0287256507, -2.4419247148, 7.9825960456]),
    ):  # the levels are those of a float32 schedule
        torch.testing.assert_close(ours, torch.tensor([theirs]).double(), atol=1e-6, rtol=1e-6)


def test_without_updates_it_is_guided_sampling_and_at_scale_one_nothing_moves():
    denoiser, null = small(), 0.1 * CONDITION[:1]
    found = null_text_invert(denoiser, X, CONDITION, null, 3.0, 5, 0)
    with torch.no_grad():
        plain = denoiser.sample(found.noise, CONDITION, null, 3.0, steps=5, joined=True)
        alone = denoiser.sample(found.noise, CONDITION, steps=5, joined=True)
    torch.testing.assert_close(found.current, plain)
    assert found.updates.sum() == 0
    found = null_text_invert(denoiser, X, CONDITION, null, 1.0, 5, 10)
    assert torch.equal(found.null, null[:, None].expand(2, 5, 2))  # the gradient is zero to the last bit
    torch.testing.assert_close(found.current, alone, atol=1e-6, rtol=1e-6)


def test_a_linear_model_is_solved_at_every_step():
    """e(z, U) = A z + U: the null embedding that meets the pivot is known in closed form."""
    matrix = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.double)
    denoiser = Denoiser(lambda z, t, c: z @ matrix.T + c, NoiseSchedule(torch.linspace(0.99, 0.01, 100).double()))
    x, condition = torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[0.2, 0.1]]).double()
    options = {"guidance": 2.0, "steps": 4, "early_stop": (0.0, 0.0)}
    found = null_text_invert(denoiser, x, condition, 0 * condition, inner_steps=500, lr=0.03, **options)
    path, z = denoiser.path(4, joined=True), found.noise
    for n in range(4):
        (a, b), (s, r) = path.alphas[n].tolist(), path.sigmas[n].tolist()
        rate = r - b * s / a  # of the noise in the step
        wanted = (found.pivots[:, n + 1] - b * z / a) / rate  # the guided noise that meets the pivot
        null = (wanted - z @ matrix.T - 2.0 * condition) / (1 - 2.0)
        torch.testing.assert_close(found.null[:, n], null, atol=1e-3, rtol=0)
        z = found.pivots[:, n + 1]
    assert float(found.losses.max()) < 1e-10


def test_rates_are_the_papers_at_fifty_steps_and_stay_above_zero_at_any_number():
    for step in range(50):
        wanted = (0.01 * (1 - step / 100), 1e-5 + 2e-5 * step)
        assert null_text_rate(0.01, (1e-5, 2e-5), step, 50) == pytest.approx(wanted)
    assert null_text_rate(0.01, (1e-5, 2e-5), 399, 400)[0] > 0.005


def test_a_stopped_inversion_goes_on_from_its_file(tmp_path):
    denoiser, null = small(), 0.1 * CONDITION[:1]
    whole = null_text_invert(denoiser, X, CONDITION, null, 3.0, 5, 4)
    found = None
    for done in (2, 4, 5):
        found = null_text_invert(denoiser, X, CONDITION, null, 3.0, 5, 4, resume=found, stop_after=2)
        assert (found.done, found.is_finished) == (done, done == 5)
        if done < 5:
            with pytest.raises(ValueError, match=rf"`inversion` must be finished, got {done} of 5 steps"):
                null_text_sample(denoiser, found, CONDITION)
        found.save(tmp_path / "inversion.safetensors")
        found = NullTextInversion.load(tmp_path / "inversion.safetensors")
    for one, two in zip(found, whole, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    again = null_text_invert(denoiser, X, CONDITION, null, 3.0, 5, 4, resume=found)
    assert torch.equal(again.null, whole.null)
    for options, told in (
        ({"guidance": 2.0}, "of 5 steps and guidance 2.0, got 5 and 3.0"),
        ({"steps": 6}, "of 6 steps"),
        ({"x": X + 1}, "of the samples `x`"),
        ({"fixed_point_iterations": 2}, "of `fixed_point_iterations=2`, got 0"),
    ):
        call = {"x": X, "condition": CONDITION, "null": null, "guidance": 3.0, "steps": 5, **options}
        with pytest.raises(ValueError, match=f"^null_text_invert: `resume` must be {told}"):
            null_text_invert(denoiser, resume=whole, **call)


def test_the_fixed_point_iterations_of_the_pivots_are_kept_in_the_file(tmp_path):
    denoiser, null = small(), 0.1 * CONDITION[:1]
    options = {"guidance": 3.0, "steps": 4, "inner_steps": 2}
    whole = null_text_invert(denoiser, X, CONDITION, null, fixed_point_iterations=2, **options)
    begun = null_text_invert(denoiser, X, CONDITION, null, stop_after=1, fixed_point_iterations=2, **options)
    begun.save(tmp_path / "inversion.safetensors")
    begun = NullTextInversion.load(tmp_path / "inversion.safetensors")
    assert begun.fixed_point_iterations == 2
    for other in (0, 3):
        with pytest.raises(ValueError, match=rf"`resume` must be of `fixed_point_iterations={other}`, got 2\."):
            null_text_invert(denoiser, X, CONDITION, null, resume=begun, fixed_point_iterations=other, **options)
    ended = null_text_invert(denoiser, X, CONDITION, null, resume=begun, fixed_point_iterations=2, **options)
    assert torch.equal(ended.current, whole.current)
    assert torch.equal(ended.pivots, whole.pivots)


def test_a_cold_start_begins_with_the_null_embedding():
    denoiser, null = small(), 0.1 * CONDITION[:1]
    warm, cold = (
        null_text_invert(denoiser, X, CONDITION, null, 3.0, 4, 1, early_stop=(0.0, 0.0), warm_start=warm)
        for warm in (True, False)
    )
    assert torch.equal(warm.null[:, 0], cold.null[:, 0])
    moved = (cold.null - null[:, None]).abs().amax((0, 2))
    rates = torch.tensor([null_text_rate(0.01, (0.0, 0.0), step, 4)[0] for step in range(4)])
    torch.testing.assert_close(moved, rates, atol=1e-5, rtol=0)  # one update of Adam is the rate
    assert float((warm.null[:, 3] - null).abs().max()) > float(rates[3]) * 1.5


def test_memory_does_not_grow_with_the_steps():
    alive, sizes = set(), []

    class Kept:
        def __init__(self, value):
            self.value = value
            alive.add(id(self))
            sizes.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    most = []
    for steps in (3, 12):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
            null_text_invert(small(), X, CONDITION, 0 * CONDITION, 3.0, steps, 3, early_stop=(0.0, 0.0))
        most.append(max(sizes))
    assert most[0] == most[1] > 0


def test_what_cannot_be_moved_is_refused():
    labels = torch.tensor([3])
    with pytest.raises(ValueError, match=r"`null` must be embeddings, which can be moved, got labels \(torch.int64\)"):
        null_text_invert(Denoiser(class_model(), scheduler()), drawn(1, 1, 8, 8), labels, torch.tensor([10]), steps=2)
    with pytest.raises(ValueError, match=r"`null` must be embeddings with a row for each sample or one, got none"):
        null_text_invert(small(), X, CONDITION, None)


def test_labels_are_inverted_by_the_table_of_their_embeddings():
    import copy

    network = copy.deepcopy(class_model())
    table, network.class_embedding = network.class_embedding.weight.detach(), nn.Identity()
    denoiser = Denoiser(lambda x, t, e: network(x, t, class_labels=e).sample, scheduler())
    x, label = held_out()[0][:1], held_out()[1][:1]
    plain, found = (null_text_invert(denoiser, x, table[label], table[[10]], 3.0, 8, n, lr=0.3) for n in (0, 6))
    assert (found.current - x).square().mean() < 0.1 * (plain.current - x).square().mean()
    assert all(param.grad is None for param in network.parameters())


def test_an_embedding_that_moves_is_refused_by_policies_of_guidance():
    for null in (inversion(), inversion().null):
        for policy in (AdaptiveGuidance(2.0), GuidancePolicy([2.0] * 3)):
            with pytest.raises(ValueError, match=r"^AdaptiveGuidance: `null` must stand still .* null-text inversion"):
                guided_sample(unet(), inversion().noise, PROMPT, null, policy, 3)


# -- the digits models -------------------------------------------------------------------------------------------------


@cache
def text(*prompts):
    with torch.no_grad():
        return word_model()[1](words(*prompts)).last_hidden_state


def word_denoiser():
    return Denoiser(word_model()[0], scheduler("v_prediction"))


@cache
def inverted(guidance, inner_steps):
    x, labels = held_out()[0][:2], held_out()[1][:2].tolist()
    return null_text_invert(
        word_denoiser(), x, text(*map(prompt, labels)), text(""), guidance, 10, inner_steps, lr=0.15
    )


@pytest.mark.parametrize("guidance", [3.0, 7.5])
def test_on_digits_the_error_is_ten_times_lower_than_of_ddim_inversion(guidance):
    x = held_out()[0][:2]
    plain, found = ((inverted(guidance, count).current - x).square().mean((1, 2, 3)) for count in (0, 6))
    assert float(found.mean()) < 0.1 * float(plain.mean())


def nearest(samples):
    x, y = training_digits()
    return (samples[:, None] - torch.stack([x[y == n].mean(0) for n in range(10)])).flatten(2).square().sum(2).argmin(1)


def test_an_edit_with_the_same_prompt_is_the_reconstruction_bit_for_bit():
    labels, found = held_out()[1][:2].tolist(), inverted(3.0, 6)
    own = text(*map(prompt, labels))
    wanted = null_text_sample(word_denoiser(), found, own)
    for options in (
        {},
        {"cross_replace": 1.0, "self_replace": 1.0},
        {"blend": LocalBlend(torch.ones(2, 8) > 0, torch.ones(2, 8) > 0)},
    ):
        made = prompt_to_prompt(word_denoiser(), found, own, own.clone(), **options)
        assert torch.equal(made.samples, made.source)
        assert torch.equal(made.source, wanted)
    torch.testing.assert_close(wanted, found.current, atol=1e-4, rtol=0)


def test_another_prompt_makes_another_digit():
    labels, found = held_out()[1][:2], inverted(3.0, 6)
    others = (labels + 5) % 10
    own, edited = (text(*map(prompt, one.tolist())) for one in (labels, others))
    made = prompt_to_prompt(word_denoiser(), found, own, edited, cross_replace=0.0, self_replace=0.0)
    torch.testing.assert_close(made.samples, null_text_sample(word_denoiser(), found, edited), atol=1e-5, rtol=0)
    assert (nearest(made.samples) == others).float().mean() == 1
    kept = prompt_to_prompt(word_denoiser(), found, own, edited, cross_replace=1.0, self_replace=1.0)
    change, less = ((one.samples - one.source).square().mean() for one in (made, kept))
    assert less < change  # under the source's maps less is changed


def test_a_flow_transformer_is_inverted_and_edited_too():
    x, labels = held_out()[0][:2], held_out()[1][:2].tolist()
    denoiser, own = Denoiser(flow_model(), flow_scheduler()), flow_condition(*map(prompt, labels))
    null, edited = flow_condition(""), flow_condition(*(prompt((n + 5) % 10) for n in labels))
    plain, found = (null_text_invert(denoiser, x, own, null, 3.0, 6, count, lr=0.2) for count in (0, 6))
    assert set(found.null) == {"encoder_hidden_states", "pooled_projections"}
    assert (found.current - x).square().mean() < 0.1 * (plain.current - x).square().mean()
    same = prompt_to_prompt(denoiser, found, own, own)
    assert torch.equal(same.samples, same.source)
    made = prompt_to_prompt(denoiser, found, own, edited)
    assert torch.equal(made.source, same.source)
    assert not torch.allclose(made.samples, made.source, atol=1e-2)
    with pytest.raises(ValueError, match=r"or has joint attention of more places than `size_limit`=15"):
        prompt_to_prompt(denoiser, found, own, edited, size_limit=15)


# -- edits -------------------------------------------------------------------------------------------------------------


def test_tokens_that_two_prompts_share():
    source = words("a photo of d3", "photo d3 inverted")
    edited = words("a photo of d5 inverted", "photo d5 d6 inverted")
    swapped, kept = align_tokens(source, edited), align_tokens(source, edited, swap=False)
    assert swapped.source[1].tolist()[:5] == [0, 1, 2, 2, 3]
    assert swapped.share[1].tolist()[:5] == [1, 1, 0.5, 0.5, 1]
    assert kept.source[1].tolist()[:5] == [0, 1, -1, -1, 3]
    assert kept.source[0].tolist()[:4] == [0, 1, 2, 3]
    same = align_tokens(source, source)
    assert same.source.tolist() == [list(range(8))] * 2
    assert bool((same.share == 1).all())


def test_maps_are_the_sources_for_the_share_of_steps_and_the_tokens_that_are_named(monkeypatch):
    """The maps that the edited pass uses, seen from outside, against those of the source's pass."""
    from lightning_reg.diffusion.null_text_inversion import prompt_to_prompt as module

    seen = []
    own = module._Editor.replaced

    def spy(self, weights, place):
        result = own(self, weights, place)
        seen.append((self.is_source, place, weights[:2].clone(), result[:2].clone()))
        assert torch.equal(result[2:], weights[2:])
        return result

    monkeypatch.setattr(module._Editor, "replaced", spy)
    tokens = align_tokens(torch.tensor([[1, 2, 3]] * 2), torch.tensor([[1, 9, 3]] * 2), swap=False)
    weights = torch.tensor([[1.0, 1.0, 4.0]])
    prompt_to_prompt(unet(), inversion(), PROMPT, OTHER, tokens, weights, cross_replace=0.5, self_replace=0.34)
    cross = [one for one in seen if one[1].words.stop]
    alone = [one for one in seen if one[1].pixels.stop]
    layers = len({one[1].layer for one in cross})
    for number in range(3):
        start = number * 2 * layers
        for (_, place, source, _), (is_source, where, before, used) in zip(
            cross[start : start + layers], cross[start + layers : start + 2 * layers], strict=True
        ):
            assert place == where
            assert not is_source
            wanted = before.clone()
            if number < 1.5:
                wanted[..., [0, 2]] = source[..., [0, 2]]
            wanted[..., 2] *= 4
            assert torch.equal(used, wanted)
        for (_, _, source, _), (_, _, before, used) in zip(
            alone[start : start + layers], alone[start + layers : start + 2 * layers], strict=True
        ):
            assert torch.equal(used, source if number < 1.02 else before)


def test_prompts_of_other_lengths_need_their_tokens():
    longer = drawn(2, 4, 5, seed=3)
    with pytest.raises(ValueError, match=r"^prompt_to_prompt: `tokens` must be given .* got 3 and 4"):
        prompt_to_prompt(unet(), inversion(), PROMPT, longer)
    tokens = align_tokens(torch.tensor([[1, 2, 3]] * 2), torch.tensor([[1, 2, 9, 3]] * 2))
    made = prompt_to_prompt(unet(), inversion(), PROMPT, longer, tokens)
    torch.testing.assert_close(made.source, inversion().current, atol=1e-5, rtol=0)
    assert not torch.allclose(made.samples, made.source)
    with pytest.raises(ValueError, match=r"^AttentionMaps: `model` must have layers with attention"):
        prompt_to_prompt(small(), inversion(), CONDITION, CONDITION)


def test_a_blend_changes_the_sample_where_its_words_are_attended_to():
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, 0, 0], maps[0, 1, 4, 4], maps[0, 1, 0, 4] = 1.0, 2.0, 0.5
    found = blend_mask(maps, torch.tensor([[False, True]]))
    wanted = torch.zeros(5, 5, dtype=torch.bool)
    wanted[3:, 3:] = True
    assert torch.equal(found[0, 0], wanted)
    assert bool(blend_mask(maps, torch.tensor([[False, True]]), 0.2)[0, 0, :2, 3:].all())
    is_word = torch.tensor([[False, True, False]] * 2)
    made = prompt_to_prompt(unet(), inversion(), PROMPT, OTHER, blend=LocalBlend(is_word, is_word, 0.95, 0.0))
    free = prompt_to_prompt(unet(), inversion(), PROMPT, OTHER)
    nothing = is_word & ~is_word
    for one, other, said in ((is_word[:, :1].long(), is_word, "torch.int64"), (nothing, nothing, "a row without one")):
        with pytest.raises(ValueError, match=rf"^prompt_to_prompt: `blend` must be bool, .* got {said}"):
            prompt_to_prompt(unet(), inversion(), PROMPT, OTHER, blend=LocalBlend(one, other))
    # A word that the source has not.
    prompt_to_prompt(unet(), inversion(), PROMPT, OTHER, blend=LocalBlend(nothing, is_word))
    same = made.samples == made.source
    assert bool(same.any())
    assert not bool(same.all())
    assert float((free.samples == free.source).float().mean()) < 0.1


class Inverting(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = small().model

    def predict_step(self, batch, batch_idx):
        denoiser = Denoiser(self.network, NoiseSchedule(torch.linspace(0.999, 0.001, 100)))
        return null_text_invert(denoiser, *batch, torch.zeros(1, 2), 2.0, steps=3, inner_steps=2)


def test_it_runs_in_predictions_of_a_trainer_which_are_without_autograd():
    made = make_trainer().predict(Inverting(), DataLoader(TensorDataset(X, CONDITION), batch_size=1))
    wanted = null_text_invert(small(), X, CONDITION, torch.zeros(1, 2), 2.0, steps=3, inner_steps=2)
    torch.testing.assert_close(torch.cat([one.null for one in made]), wanted.null)
    row = tree_map_only(torch.Tensor, lambda value: value[1:], wanted)
    torch.testing.assert_close(row.current, made[1].current)


def test_without_diffusers_inversion_works(monkeypatch):
    # That all public names are imported without diffusers is tested in a process of its own, by test_package.
    monkeypatch.setitem(sys.modules, "diffusers", None)
    denoiser = Denoiser(lambda x, t, c: x + c, NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
    assert null_text_invert(denoiser, torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2), 2.0, 3).done == 3


LEVELS_OF_MASKED = NoiseSchedule(torch.linspace(0.99, 0.01, 100))


class Masked(torch.nn.Module):
    """A denoiser with a mask beside its embeddings, and a condition that may be missing."""

    def forward(self, x, t, hidden=None, mask=None, encoder_attention_mask=None):
        if hidden is None:
            return x.tanh()
        if encoder_attention_mask is not None:
            assert not encoder_attention_mask.requires_grad
            hidden = hidden * encoder_attention_mask[..., None]
        return x.tanh() + (hidden * mask[..., None]).mean(1)


def test_masks_beside_embeddings_stay_and_a_condition_may_be_missing(tmp_path):
    denoiser, x = Denoiser(Masked(), LEVELS_OF_MASKED), drawn(2, 5)
    mask, soft = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1.0, 0.5, 1.0]])
    null = {"hidden": 0 * OTHER, "mask": mask, "encoder_attention_mask": soft}
    own = {**null, "hidden": PROMPT}
    options = {"guidance": 3.0, "steps": 4, "lr": 0.1}
    plain, found = (null_text_invert(denoiser, x, own, null, inner_steps=n, **options) for n in (0, 20))
    assert float((found.current - x).square().mean()) < 0.1 * float((plain.current - x).square().mean())
    assert torch.equal(found.null["mask"], mask[:, None].expand(2, 4, 3))
    assert torch.equal(found.null["encoder_attention_mask"], soft.expand(2, 4, 3))
    assert not bool(found.null["hidden"][1, :, 1:].any())  # what is masked gets no gradient
    found.save(tmp_path / "one.safetensors")
    again = null_text_sample(denoiser, NullTextInversion.load(tmp_path / "one.safetensors"), own)
    torch.testing.assert_close(again, found.current, atol=1e-5, rtol=0)
    free = null_text_invert(denoiser, x, None, null, inner_steps=2, **options)
    torch.testing.assert_close(null_text_sample(denoiser, free, None), free.current, atol=1e-5, rtol=0)
