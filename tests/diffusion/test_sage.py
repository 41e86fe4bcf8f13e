"""SAGE: steps on the sphere by hand, both ways of the gradient, words, and digits."""

import base64
import io
import re
from functools import cache, partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import AdversarialSearch, Denoiser, SearchResult
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    append_token,
    conditions_failed,
    ensemble_prob,
    failure_groups,
    failure_report,
    is_failure,
    latent_search,
    non_gaussian,
    prompt_search,
    random_failures,
    region_size,
    residual_path,
    sphere_step,
    to_sphere,
    token_search,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.problems import seeded
from tests.diffusion.digits import class_model, prompt, scheduler, training_digits, word_model, words
from tests.diffusion.in_validation import LOADER, Averaged, Digits
from tests.diffusion.test_denoiser import CONDITION, LEVELS, X, small
from tests.diffusion.test_diffusion_classifier import PROBLEM, SCHEDULE, columns
from tests.toys import QUIET, make_trainer

pytestmark = QUIET


def judge(x):
    """Class scores of rows, two classes."""
    return torch.stack([x.flatten(1).sum(1), -x.flatten(1)[:, 0]], 1)


LABELS = torch.tensor([0, 1])
searching = partial(
    AdversarialSearch,
    [8],
    4,
    ["net"],
    denoiser="net",
    alphas_cumprod=LEVELS.tolist(),
    starts=4,
    sampler_steps=2,
    iterations=2,
)
CASE = (
    Case(
        make=searching,
        neutral=partial(searching, starts=0),
        by_hand=Hand,
        says=("net, 4 starts, 2 steps, judges net", "no starts: inactive"),
        data=PROBLEM,
        trains_as_plain=True,  # it watches
        invalid=[
            ({"classes": 1}, "classes"),
            ({"judges": []}, "judges"),
            ({"starts": -1}, "starts"),
            ({"every_n_epochs": 0}, "every_n_epochs"),
            ({"sampler_steps": 0}, "sampler_steps"),
            ({"iterations": 0}, "iterations"),
            ({"step": 0.0}, "step"),
            ({"threshold": 1.5}, "threshold"),
            ({"scale": 3.0}, "null"),
            ({"prediction": "noise"}, "prediction"),
            ({"prompts": ["one"]}, "prompts"),
        ],
    ),
    ProcedureCase(
        latent_search,
        small,
        (X, CONDITION, LABELS),
        {"judges": [judge], "sampler_steps": 3, "iterations": 3, "step": 0.3, "sampler_gradient": True},
        [
            ({"judges": []}, "judges"),
            ({"iterations": 0}, "iterations"),
            ({"step": 0.0}, "step"),
            ({"residual": -1.0}, "residual"),
            ({"residual": 0.0, "sampler_gradient": False}, "residual"),
            ({"threshold": 2.0}, "threshold"),
        ],
    ),
    ProcedureCase(
        random_failures,
        small,
        (X, CONDITION, LABELS),
        {"judges": [judge], "sampler_steps": 3},
        [({"sampler_steps": 0}, "sampler_steps"), ({"threshold": -0.1}, "threshold")],
    ),
    ProcedureCase(
        region_size,
        small,
        (X, CONDITION, LABELS),
        {"judges": [judge], "sampler_steps": 2, "draws": 3},
        [({"draws": 0}, "draws"), ({"radii": [0.0]}, "radii"), ({"threshold": 1.1}, "threshold")],
    ),
    ProcedureCase(
        conditions_failed,
        small,
        (X,),
        {"conditions": torch.cat([CONDITION, -CONDITION]), "labels": LABELS.repeat(2), "judges": [judge]}
        | {"sampler_steps": 2},
        [({"sampler_steps": 0}, "sampler_steps"), ({"judges": []}, "judges"), ({"threshold": 2.0}, "threshold")],
    ),
    ProcedureCase(
        failure_report,
        small,
        (X, -X, CONDITION, LABELS),
        {"judges": [judge], "sampler_steps": 2},
        [
            ({"judges": []}, "judges"),
            ({"prompts": ["one"]}, "prompts"),
            ({"prompts_after": ["one"]}, "prompts_after"),
            ({"sampler_steps": 0}, "sampler_steps"),
            ({"threshold": -1.0}, "threshold"),
        ],
    ),
)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_what_counts_as_a_failure():
    one, two = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    labels = torch.tensor([0, 0, 0])
    half, sure = 1 / (1 + torch.tensor(-1.0).exp()), 1 / (1 + torch.tensor(-3.0).exp())
    wanted = [0.5 * (half + 1 - half), sure, 0.5 * (0.5 + 1 / (1 + torch.tensor(5.0).exp()))]
    assert ensemble_prob([one, two], labels).tolist() == pytest.approx([float(q) for q in wanted])
    assert is_failure([one, two], labels, 0.4).tolist() == [False, False, True]
    assert is_failure([one, two], labels, 0.6).tolist() == [True, False, True]
    # No judge sees the class, however likely it is: three classes.
    assert is_failure([torch.tensor([[0.4, 0.6, 0.0]])], torch.tensor([0]), 0.1).tolist() == [True]
    assert torch.equal(ensemble_prob([one, one], labels), ensemble_prob([one], labels))


def test_steps_stay_on_the_sphere():
    z = torch.tensor([[1.0, 2.0, 2.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    assert to_sphere(z).norm(dim=1).tolist() == pytest.approx([2.0, 2.0])
    gradient = torch.tensor([[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    moved = sphere_step(z, gradient, 0.1)
    raw = torch.tensor([1.0, 2.0, 2.0 - 0.1 * 3, 0.0])
    torch.testing.assert_close(moved, torch.stack([2 * raw / raw.norm(), torch.tensor([2.0, 0.0, 0.0, 0.0])]))


def test_the_way_around_adds_its_weight_to_the_derivative():
    z = torch.tensor([[1.0, -2.0]], requires_grad=True)
    made = residual_path(z.square(), z, 0.25)
    assert torch.equal(made, z.square())
    (gradient,) = torch.autograd.grad(made.sum(), z)
    assert torch.equal(gradient, 2 * z + 0.25)
    assert residual_path(made, z, 0.0) is made


def test_groups_are_chains_of_near_samples():
    angles = torch.tensor([0.0, 0.2, 0.4, 2.0, 2.1])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    assert failure_groups(rows, 0.97).tolist() == [0, 0, 0, 3, 3]
    assert failure_groups(rows[:0]).tolist() == []


def test_noise_that_is_not_gaussian_is_told_as_scipy_tells_it():
    with seeded(0):
        z = torch.randn(200, 1, 8, 8)
    assert float(non_gaussian(z).double().mean()) == pytest.approx(0.05, abs=0.04)
    assert bool(non_gaussian(z.sign() + 0.1 * z).all())
    assert non_gaussian(torch.ones(1, 20)).tolist() == [True]
    with pytest.raises(ValueError, match=r"^non_gaussian: `noise` must have at least 20 numbers in a row, got 19"):
        non_gaussian(torch.ones(1, 19))
    tests = pytest.importorskip("scipy.stats")
    for length in (20, 64):
        rows = torch.cat([z.flatten(1)[:, :length], z.flatten(1)[:, :length].pow(3), z.flatten(1)[:, :length].abs()])
        wanted = torch.from_numpy(tests.normaltest(rows.double().numpy(), axis=1).pvalue)
        for level in (0.001, 0.05, 0.3, 0.9):
            assert torch.equal(non_gaussian(rows, level), wanted < level)


MATRIX = torch.tensor([[1.0, 0.5], [-0.5, 2.0]], dtype=torch.double)
SCORES = torch.tensor([[1.0, 0.2], [-0.3, 0.4]], dtype=torch.double)


class Linear(nn.Module):
    """A denoiser whose sample of one step is ``W z + c``."""

    def forward(self, x, t, condition):
        alpha, sigma = columns(t, x)
        clean = x @ MATRIX.T.to(x) if condition is None else x @ MATRIX.T.to(x) + condition
        return (x - alpha * clean) / sigma


def linear_judge(x):
    return x @ SCORES.T.to(x)


Z = torch.tensor([[1.0, 1.0], [1.2, -0.4], [-3.0, -3.0]], dtype=torch.double)
ZEROS = torch.zeros(1, 2, dtype=torch.double)


@pytest.mark.parametrize(("through", "residual"), [(True, 0.0), (True, 0.3), (False, 1.0), (False, 7.0)])
def test_the_direction_of_a_linear_model_by_hand(through, residual):
    network, labels = Denoiser(Linear(), SCHEDULE), torch.zeros(3, dtype=torch.long)
    made = latent_search(
        network, Z, ZEROS, labels, [linear_judge], sampler_steps=1, iterations=1, step=0.2, residual=residual,
        sampler_gradient=through, threshold=0.2,
    )  # fmt: skip
    scores = (Z @ MATRIX.T @ SCORES.T)[:2]
    p = scores.softmax(1)
    by_sample = (p[:, :1] * (torch.eye(2, dtype=torch.double)[0] - p)) @ SCORES
    gradient = (by_sample @ MATRIX if through else 0) + residual * by_sample
    raw = Z[:2] - 0.2 * Z[:2].norm(dim=1, keepdim=True) * gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(made.noise[:2], raw / raw.norm(dim=1, keepdim=True) * 2**0.5)
    torch.testing.assert_close(made.samples, made.noise @ MATRIX.T)
    # The third one fails from the start, and stays as it is.
    assert made.iteration[2] == 0
    assert torch.equal(made.noise[2], Z[2])
    assert made.found.tolist() == [False, False, True]
    assert made.history[:2, 0].tolist() == pytest.approx(p[:, 0].tolist())
    assert float(made.history[2, 1]) == float(made.history[2, 0])


def test_judges_are_left_as_they_were_and_results_can_be_kept(tmp_path):
    network, seen = nn.Linear(2, 2).double().train(), []
    network.register_forward_hook(lambda module, args, output: seen.append(module.training))
    labels = torch.zeros(3, dtype=torch.long)
    made = latent_search(
        Denoiser(Linear(), SCHEDULE), Z, ZEROS, labels, [network], sampler_steps=1, iterations=2, threshold=0.0,
        held_out=lambda x: torch.stack([0 * x[:, 0], x[:, 0]], 1),
    )  # fmt: skip
    assert network.training
    assert not any(seen)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert made.confirmed.tolist() == (made.found & (made.samples[:, 0] > 0)).tolist()
    count = max(int(made.found.sum()), 1)
    assert made.rates() == {"found": int(made.found.sum()) / 3, "confirmed": int(made.confirmed.sum()) / count}
    made.save(tmp_path / "failures.safetensors")
    for one, two in zip(SearchResult.load(tmp_path / "failures.safetensors"), made, strict=True):
        assert torch.equal(one, two)


def test_around_what_was_found_and_under_other_conditions():
    network, labels = Denoiser(Linear(), SCHEDULE), torch.zeros(2, dtype=torch.long)

    def first(x):  # class 0 where the first number is above 0
        return torch.stack([20 * x[:, 0], -20 * x[:, 0]], 1)

    z = torch.tensor([[-1.0, 0.0], [-0.02, 1.4]], dtype=torch.double)
    shares = region_size(network, z, ZEROS, labels, [first], [0.01, 1.0], 40, sampler_steps=1)
    with seeded(0):
        draws = torch.randn(40, 2)
    steps = -F.normalize(draws.double(), dim=1)
    for row in range(2):
        start = z[row] / z[row].norm() * 2**0.5
        for place, radius in enumerate((0.01, 1.0)):
            moved = (start + radius * 2**0.5 * steps) @ MATRIX.T
            assert float(shares[row, place]) == pytest.approx(float((moved[:, 0] < 0).double().mean()), abs=0.026)
    shifts = torch.tensor([[0.0, 0.0], [5.0, 0.0], [9.0, 0.0], [0.0, 9.0]], dtype=torch.double)
    shares = conditions_failed(network, z, shifts, torch.tensor([0, 0, 1, 1]), [first], sampler_steps=1)
    wanted = [
        [float((row @ MATRIX.T + shift)[0] * (1 - 2 * y) < 0) for shift, y in zip(shifts, (0, 0, 1, 1), strict=True)]
        for row in z
    ]
    assert shares.tolist() == [sum(row) / 4 for row in wanted]


# -- the report --------------------------------------------------------------------------------------------------------


def first_number(x):
    """Class 0 where the first number is above 0."""
    return torch.stack([20 * x[:, 0], -20 * x[:, 0]], 1)


def second_number(x):
    return torch.stack([20 * x[:, 1], -20 * x[:, 1]], 1)


def test_a_report_has_the_rates_of_the_paper_and_what_was_changed(tmp_path):
    network, labels = Denoiser(Linear(), SCHEDULE), torch.zeros(3, dtype=torch.long)
    start = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0]]).double()
    noise = torch.tensor([[-1.0, 1.0], [-1.0, -1.0], [2.0, 0.0]]).double()  # the first of W z is below 0 in two
    options = {"sampler_steps": 1, "held_out": second_number}
    made = failure_report(network, start, noise, ZEROS, labels, [first_number], prompts=["<one>", "b", "c"], **options)
    torch.testing.assert_close(made.before, start @ MATRIX.T)
    torch.testing.assert_close(made.after, noise @ MATRIX.T)
    assert made.distance.tolist() == pytest.approx([2**0.5, 2.0, 0.0])
    assert made.failed.tolist() == [True, True, False]
    assert made.confirmed.tolist() == [False, True, False]  # the third is no failure
    for place, side in enumerate((made.before, made.after)):
        for column, number in enumerate((0, 1)):
            torch.testing.assert_close(made.scores[:, place, column], (40 * side[:, number]).sigmoid().float())
    assert made.rates() == {"SSR(A)": pytest.approx(2 / 3), "SSR(H)": pytest.approx(1 / 3)}
    made.save(tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text()
    assert text.index("b</td>") < text.index("&lt;one&gt;") < text.index("c</td>")  # the worst first
    assert "<h1>2 failures of 3 starts</h1>" in text
    assert "SSR(A) 0.67, SSR(H) 0.33" in text
    assert "failure, confirmed" in text
    assert "<img" not in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    # Words that were changed: the noise stays.
    made = failure_report(
        network, start, start, ZEROS, labels, [first_number], condition_after=ZEROS - 5, prompts_after=list("xyz"),
        sampler_steps=1,
    )  # fmt: skip
    torch.testing.assert_close(made.after, made.before - 5)
    assert made.prompts == ["class 0"] * 3
    assert not bool(made.confirmed.any())
    made.save(tmp_path / "words.html", decode=lambda rows: rows.view(3, 1, 1, 2))
    assert "class 0 → x" in (tmp_path / "words.html").read_text()


def test_pictures_are_those_of_the_samples(tmp_path):
    image = pytest.importorskip("PIL.Image")
    with seeded(0):
        noise = torch.randn(2, 3, 4, 5)
    for channels in (1, 3):
        network = Denoiser(Own(), SCHEDULE)
        rows = noise[:, :channels]
        labels, path = torch.tensor([0, 1]), tmp_path / "report.html"
        made = failure_report(network, rows, rows, None, labels, [judge], sampler_steps=1)
        made.save(path)
        assert made.rates().keys() == {"SSR(A)", "SSR(H)", "NGR"}
        found = [
            torch.from_numpy(numpy.array(image.open(io.BytesIO(base64.b64decode(data)))))
            for data in re.findall(r"base64,([^\"]+)", path.read_text())
        ]
        order = sorted(range(2), key=lambda row: not bool(made.failed[row]))
        wanted = [((made.after[row].clamp(-1, 1) + 1) * 127.5).round().byte() for row in order for _ in range(2)]
        assert len(found) == 4
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one if channels == 3 else one[..., None], other.movedim(0, 2))


class Own(nn.Module):
    """A denoiser whose sample of one step is the noise itself."""

    def forward(self, x, t):
        alpha, sigma = columns(t, x)
        return (1 - alpha) * x / sigma


# -- words -------------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A denoiser whose sample of one step is the sum of the prompt's token vectors."""

    def forward(self, x, t, condition):
        alpha, sigma = columns(t, x)
        return (x - alpha * condition.sum(1)) / sigma


def test_a_token_is_found_by_adam_through_the_sampler():
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 0.5]], [[2.0, 0.0], [1.0, 0.0]]])
    options = {"sampler_steps": 1, "lr": 0.1}
    network, noise = Denoiser(Pooled(), SCHEDULE), torch.zeros(2, 2)
    made = token_search(network, noise, prompts, 1, [linear_judge], iterations=1, **options)
    first = prompts.mean((0, 1))
    samples = (prompts.sum(1) + first).requires_grad_()
    q = linear_judge(samples).softmax(1)[:, 1]
    (gradient,) = torch.autograd.grad(-q.log().mean(), samples)
    torch.testing.assert_close(made.token, first - 0.1 * gradient.sum(0).sign())  # Adam's first step
    assert float(made.history[0]) == pytest.approx(float(q.detach().mean()))
    made = token_search(network, noise, prompts, 1, [linear_judge], init=torch.zeros(2), iterations=40, **options)
    assert made.hits.tolist() == [True, True]
    assert float(made.history[-1]) > 0.8 > 0.5 > float(made.history[0])
    mapping = {"encoder_hidden_states": prompts}
    assert append_token(mapping, first)["encoder_hidden_states"].shape == (2, 3, 2)
    with pytest.raises(ValueError, match="append_token: `condition` must be token vectors"):
        append_token(torch.arange(2), first)
    with pytest.raises(ValueError, match="token_search: `init` must be a vector"):
        token_search(network, noise, torch.arange(2), 1, [linear_judge])


def test_words_are_ordered_by_gradient_and_the_best_prompts_stay():
    network, noise = Denoiser(Pooled(), SCHEDULE), torch.zeros(3, 2)
    with seeded(1):
        embedding = torch.randn(12, 2)
    ids, tried = torch.tensor([0, 1, 2]), []

    def q(words):
        return float(linear_judge(embedding[list(words)].sum(0)[None]).softmax(1)[0, 0])

    def offered(prompt, slot):
        tried.append((tuple(prompt.tolist()), slot))
        return range(12)

    arguments = (network, noise, ids, [1], 0, [linear_judge], lambda rows: rows, embedding)
    found = prompt_search(*arguments, offered, sampler_steps=1, top_k=12, beam=3)
    everything = sorted({(0, word, 2) for word in range(12)}, key=q)
    assert [tuple(row) for row in found.ids.tolist()] == everything[:3]
    assert found.values.tolist() == pytest.approx([q(words) for words in everything[:3]], rel=1e-4)
    assert found.tried == 12
    assert tried == [((0, 1, 2), 1)]
    # The sample is linear in the words and the probability monotone: the order by gradient is exact.
    one = prompt_search(*arguments, list(range(12)), sampler_steps=1, top_k=1, beam=1)
    assert (tuple(one.ids[0].tolist()), one.tried) == (everything[0], 2)
    two = prompt_search(network, noise, ids, [1, 0], *arguments[4:], range(12), sampler_steps=1, top_k=1, beam=1)
    assert q(two.ids[0].tolist()) <= q(one.ids[0].tolist())
    for slots in ([-1], [0, 3]):
        with pytest.raises(ValueError, match=r"^prompt_search: `slots` must be positions in a prompt of 3 tokens"):
            prompt_search(network, noise, ids, slots, *arguments[4:], range(12), sampler_steps=1)


# -- digits ------------------------------------------------------------------------------------------------------------


@cache
def judges():
    """Four small classifiers of digits, trained from different weights."""
    x, y = training_digits()
    made = []
    for seed in range(4):
        with seeded(seed):
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
            optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
            for _ in range(60):
                optimizer.zero_grad()
                F.cross_entropy(network(x + 0.2 * torch.randn_like(x)), y).backward()
                optimizer.step()
        made.append(network)
    return made


def starts(count, seed=0):
    with seeded(seed):
        return to_sphere(torch.randn(count, 1, 8, 8)), torch.arange(count) % 10


def test_a_search_finds_what_random_draws_do_not():
    noise, labels = starts(6)
    network, (*three, fourth) = Denoiser(class_model(), scheduler()), judges()
    options = {"null": torch.tensor([10]), "scale": 1.5, "sampler_steps": 4}
    many, wanted = starts(30, seed=1)
    assert float(random_failures(network, many, wanted, wanted, three, **options).double().mean()) <= 0.05
    through = {"sampler_gradient": True, "residual": 0.0, "iterations": 12}
    made = latent_search(network, noise, labels, labels, three, held_out=fourth, **through, **options)
    assert made.rates()["found"] >= 0.5
    assert made.rates()["confirmed"] >= 0.5
    assert made.noise.flatten(1).norm(dim=1).tolist() == pytest.approx([8.0] * 6)


def test_a_token_of_the_word_model_changes_what_prompts_show():
    network, text = word_model()
    with torch.no_grad():
        condition = text(words(*(prompt(n) for n in (1, 2, 4)))).last_hidden_state
    denoiser = Denoiser(network, scheduler("v_prediction"))
    made = token_search(denoiser, starts(3)[0], condition, 0, judges()[:2], sampler_steps=2, iterations=6, lr=0.5)
    assert float(made.history[-1]) > 4 * float(made.history[0])


class Judged(Digits):
    """With two judges by name."""

    def __init__(self):
        super().__init__()
        self.one, self.two, *_ = judges()


SHORT = {"shape": [1, 8, 8], "classes": 10, "judges": ["one"], "held_out": "two", "denoiser": "unet", "starts": 4}
SHORT |= {"sampler_steps": 2, "iterations": 2, "threshold": 0.999}


def validated(*others, **options):
    search = AdversarialSearch(**SHORT | options)
    (logged,) = make_trainer(callbacks=[*others, search]).validate(Judged(), LOADER, verbose=False)
    return search, {name.removeprefix("reg/adversarial_search/"): value for name, value in logged.items()}


def test_validation_logs_what_the_search_finds():
    search, logged = validated(scale=1.5, null="none")
    noise, labels = search._noise(torch.arange(4), 0), torch.arange(4)
    network, options = (
        Denoiser(class_model(), scheduler()),
        {"null": torch.tensor([10]), "scale": 1.5, "sampler_steps": 2},
    )
    made = latent_search(
        network, noise, labels, labels, [judges()[0]], iterations=2, threshold=0.999, held_out=judges()[1], **options
    )
    assert logged.keys() == {"loss", "found", "confirmed", "random", "distinct", "non_gaussian"}
    assert {name: logged[name] for name in ("found", "confirmed")} == pytest.approx(made.rates())
    failed = [
        random_failures(network, search._noise(labels, n), labels, labels, [judges()[0]], threshold=0.999, **options)
        for n in range(3)
    ]
    assert logged["random"] == pytest.approx(float(torch.stack(failed).any(0).double().mean()))
    torch.testing.assert_close(search.result.noise, made.noise)
    assert logged["non_gaussian"] == pytest.approx(float(non_gaussian(made.noise[made.found]).double().mean()))
    assert "random" not in validated(baseline=False)[1]
    assert validated(scale=1.5, null="none", every_n_epochs=2)[1] == logged  # it is of a fit


def test_validation_writes_a_report(tmp_path):
    search, logged = validated(
        scale=1.5, null="none", report=str(tmp_path / "failures.html"), prompts=[f"a {n}" for n in range(10)]
    )
    text = (tmp_path / "failures.html").read_text()
    assert f"<h1>{int(search.result.found.sum())} failures of 4 starts</h1>" in text
    assert f"SSR(A) {logged['found']:.2f}, SSR(H) {logged['found'] * logged['confirmed']:.2f}" in text
    assert f"NGR {logged['non_gaussian']:.2f}" in text
    assert text.count("<img") == 8
    assert all(f"a {n}</td>" in text for n in range(4))


def test_weights_are_those_of_the_validation():
    averaged, plain = (validated(*others, baseline=False)[0].result.samples for others in ([Averaged()], []))
    assert float((averaged - plain).abs().max()) > 0.01


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize(("options", "validates"), [({}, False), ({"every_n_epochs": 3}, True)])
def test_a_fit_in_which_nothing_was_searched_is_told(options, validates):
    search = AdversarialSearch(**SHORT, **options)
    trainer = make_trainer(callbacks=[search], max_epochs=1)
    with pytest.warns(UserWarning, match=r"^AdversarialSearch: nothing was searched in this fit, .* `every_n_epochs`="):
        trainer.fit(Judged(), LOADER, LOADER if validates else None)
    assert search.result is None


def test_judges_are_found_by_name_or_import_path_or_told():
    _, logged = validated(judges=["tests.diffusion.test_sage.judge_of_digits"])
    assert "found" in logged
    with pytest.raises(
        MisconfigurationException, match=r"^AdversarialSearch\(judges=\.\.\.\): 'three' names no function"
    ):
        validated(judges=["three"])


def judge_of_digits(x):
    return judges()[0](x)
