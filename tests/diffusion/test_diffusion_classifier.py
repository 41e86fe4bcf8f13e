"""DiffusionClassifier: exact cases, counts of calls, and digits."""

import math
from collections import OrderedDict
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import Denoiser, DiffusionAccuracy, DiffusionClassifier, DiffusionClassifierEval, NoiseSchedule
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    class_log_posterior,
    classify_images,
    condition_errors,
    match_pairs,
    stage_times,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.metric import MetricCase
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.problems import KINDS, Problem
from tests.diffusion.digits import class_model, held_out, scheduler
from tests.diffusion.test_denoiser import CONDITION, LEVELS, X, small
from tests.toys import QUIET, make_trainer

pytestmark = QUIET
SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.001, 1000, dtype=torch.double))


def columns(t, x):
    alpha, sigma = SCHEDULE.alphas_cumprod[t].sqrt(), (1 - SCHEDULE.alphas_cumprod[t]).sqrt()
    shape = (-1, *[1] * (x.dim() - 1))
    return alpha.reshape(shape).to(x), sigma.reshape(shape).to(x)


class Watched(nn.Module):
    """A function of x, t and the condition, which counts its rows."""

    def __init__(self, function):
        super().__init__()
        self.function, self.rows, self.passes = function, 0, []

    def forward(self, x, t, condition):
        self.rows += len(x)
        self.passes.append(len(x))
        return self.function(x, t, condition)


def gaussian(x, t, means):
    """The noise that is expected where a class is N(mean, 1)."""
    alpha, sigma = columns(t, x)
    return sigma * (x - alpha * means)


def classifier(function, conditions, n_samples=(20,), keep=(1,), **options):
    return DiffusionClassifier(Denoiser(Watched(function), SCHEDULE), conditions, n_samples, keep, **options)


def of_rows(**options):
    return DiffusionClassifier(
        **{"denoiser": small(), "conditions": CONDITION, "n_samples": [3], "keep": [1], **options}
    )


# -- the laws ----------------------------------------------------------------------------------------------------------


class Net(nn.Sequential):
    """The laws' classifier, which is a denoiser as well where a time is given."""

    def forward(self, x, t=None, condition=None):
        output = super().forward(x)
        return output if t is None else output.repeat(1, 2) * (1 + condition[:, None].to(x))


def net():
    return Net(OrderedDict(KINDS["classification"].net().named_children()))


def numbered(size):
    return KINDS["classification"].data(size)


PROBLEM = Problem(net, numbered, F.cross_entropy, serves=["classification"])
watching = partial(
    DiffusionClassifierEval, 4, "net", alphas_cumprod=LEVELS.tolist(), n_samples=[2, 5], keep=[3, 1], max_images=6
)


def batches_of_digits():
    generator = torch.Generator().manual_seed(0)
    return [
        {"images": torch.randn(n, 3, generator=generator), "labels": torch.randint(2, (n,), generator=generator)}
        for n in (4, 4, 4, 3)
    ]


def accuracy_by_loops(batches):
    seen = []
    for batch in batches:
        p = of_rows()(batch["images"].float()).detach().double().softmax(1).tolist()
        seen += [
            (max(row), row.index(max(row)) == label) for row, label in zip(p, batch["labels"].tolist(), strict=True)
        ]
    off = 0.0
    for lower in range(4):
        inside = [(c, r) for c, r in seen if min(int(4 * c), 3) == lower]
        off += abs(sum(r for _, r in inside) - sum(c for c, _ in inside))
    return {"accuracy": sum(r for _, r in seen) / len(seen), "calibration_error": off / len(seen)}


CASE = (
    Case(
        make=watching,
        neutral=partial(watching, max_images=0),
        by_hand=Hand,
        says=("net, 4 classes, 6 images, times [2, 5]", "no images: inactive"),
        data=PROBLEM,
        trains_as_plain=True,  # it watches
        invalid=[
            ({"classes": 1}, "classes"),
            ({"prediction": "noise"}, "prediction"),
            ({"loss": "l3"}, "loss"),
            ({"max_images": -1}, "max_images"),
            ({"chunk": 0}, "chunk"),
            ({"n_samples": [5, 2]}, "n_samples"),
            ({"keep": [3, 2]}, "keep"),
        ],
    ),
    NetworkCase(
        make=of_rows,
        inputs=(X,),
        invalid=[
            ({"conditions": torch.zeros(0)}, "conditions"),
            ({"loss": "l3"}, "loss"),
            ({"n_trials": 9}, "n_trials"),
            ({"chunk": 0}, "chunk"),
            ({"seed": -1}, "seed"),
            ({"n_samples": [101]}, "n_samples"),
            ({"n_samples": [5, 5], "keep": [2, 1]}, "n_samples"),
            ({"keep": [2]}, "keep"),
            ({"keep": [2, 1]}, "keep"),
            ({"class_of": [0]}, "class_of"),
            ({"class_of": [0, 2]}, "class_of"),
        ],
    ),
    MetricCase(
        make=lambda **options: DiffusionAccuracy(**{"classifier": of_rows(), "bins": 4, **options}),
        batches=batches_of_digits(),
        expected=accuracy_by_loops,
        invalid=[({"bins": 0}, "bins")],
    ),
    ProcedureCase(classify_images, of_rows, (X,)),
    ProcedureCase(
        match_pairs,
        small,
        (torch.stack([X, X.flip(1)], 1), torch.stack([CONDITION, CONDITION.flip(0)], 1), 0 * CONDITION),
        {"n_samples": 5},
        [({"n_samples": 0}, "n_samples"), ({"n_samples": 101}, "n_samples")],
    ),
)


# -- the card's exact checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 2])
def test_the_true_noise_under_one_condition_gives_error_nought(label):
    x = torch.tensor([[0.5, -1.0, 2.0, 0.1]], dtype=torch.double)

    def oracle(noisy, t, condition):
        alpha, sigma = columns(t, noisy)
        return torch.where(condition[:, None] == label, (noisy - alpha * x) / sigma, 0.0)

    judge = classifier(oracle, torch.arange(3), n_samples=[500])
    errors = judge.errors(x)[0]
    assert int(judge(x).argmax()) == label
    assert float(errors[label]) < 1e-20
    others = [float(errors[n]) for n in range(3) if n != label]
    assert others[0] == others[1] == pytest.approx(1.0, abs=4 * (2 / 2000) ** 0.5)  # four deviations of a mean of e^2


def test_a_denoiser_that_ignores_the_condition_gives_equal_errors_to_the_last_bit():
    judge = classifier(lambda x, t, c: torch.sin(x), torch.arange(4))
    errors = judge.errors(X)
    assert bool((errors == errors[:, :1]).all())
    assert classify_images(judge, X).probabilities.tolist() == [[0.25] * 4] * 2


def test_stages_that_drop_nothing_are_one_on_all_times():
    means = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    judge = classifier(gaussian, means, (50, 100), (3, 1))
    union = sorted({*range(15, 1000, 20), *range(5, 1000, 10)})
    flat = condition_errors(
        judge.denoiser, X, means, torch.arange(3).expand(2, 3), torch.tensor(union), torch.zeros(2, dtype=torch.long)
    )
    torch.testing.assert_close(judge.errors(X), flat / len(union), rtol=1e-6, atol=0)


@pytest.mark.parametrize("trials", [1, 2])
def test_rows_that_the_denoiser_sees(trials):
    judge = classifier(gaussian, torch.zeros(6, 3), (5, 10, 40), (4, 2, 1), n_trials=trials, chunk=7)
    judge(X)
    new = [len(times) for times in stage_times(1000, (5, 10, 40))]
    wanted = trials * (6 * new[0] + 4 * new[1] + 2 * new[2])
    assert judge.denoiser.model.rows == 2 * wanted == 2 * judge.calls()
    assert max(judge.denoiser.model.passes) <= 7


def test_gaussian_classes_are_told_by_the_nearest_mean():
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(5, 6, generator=generator, dtype=torch.double)
    x = torch.randn(40, 6, generator=generator, dtype=torch.double)
    nearest = (x[:, None] - means).square().sum(2).argmin(1)
    sure = (x[:, None] - means).square().sum(2).topk(2, largest=False).values.diff()[:, 0] > 1.0
    found = classifier(gaussian, means, n_samples=[1000])(x).argmax(1)
    assert int(sure.sum()) > 20
    assert bool((found == nearest)[sure].all())
    staged = classifier(gaussian, means, (100, 1000), (2, 1))
    logits = staged(x)
    assert bool((logits.argmax(1) == nearest)[sure].all())
    assert bool((logits.isinf().sum(1) == 3).all())


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_errors_by_loops(loss):
    from lightning_reg.engine.host.row_bits import normals

    means, times, indices = torch.randn(3, 3, dtype=torch.double), [7, 500, 900], [4, 9]
    x = X.double()
    candidates = torch.tensor([[0, 2], [1, 2]])
    denoiser = Denoiser(lambda noisy, t, c: gaussian(noisy, t, c).sin(), SCHEDULE)
    found = condition_errors(
        denoiser, x, means, candidates, torch.tensor(times), torch.tensor(indices), loss, n_trials=2, chunk=3, seed=5
    )
    size = {"l2": lambda d: d * d, "l1": abs, "huber": lambda d: d * d / 2 if abs(d) <= 1 else abs(d) - 0.5}[loss]
    for b in range(2):
        for k in range(2):
            total = 0.0
            for t in times:
                abar = 0.999 + t / 999 * (0.001 - 0.999)
                for trial in range(2):
                    noise = normals(5, torch.tensor([(indices[b] * 2**20 + t) * 8 + trial]), (3,), torch.double)[0]
                    for e, clean, mean in zip(
                        noise.tolist(), x[b].tolist(), means[candidates[b, k]].tolist(), strict=True
                    ):
                        noisy = abar**0.5 * clean + (1 - abar) ** 0.5 * e
                        total += size(e - math.sin((1 - abar) ** 0.5 * (noisy - abar**0.5 * mean))) / 3
            assert float(found[b, k]) == pytest.approx(total, rel=1e-10)


def test_posterior_is_that_of_summed_errors():
    errors = torch.tensor([[0.1, 0.3, float("nan")]], dtype=torch.double)
    logs = class_log_posterior(errors, 10, torch.tensor([0.2, 0.5, 0.3]).log().double())
    weights = [0.2 * math.exp(-1.0), 0.5 * math.exp(-3.0)]
    assert logs[0].exp().tolist() == pytest.approx([w / sum(weights) for w in weights] + [0.0], rel=1e-6)
    assert class_log_posterior(errors, 10).exp()[0, 0].item() == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_times_are_those_of_the_released_code():
    # eval_prob_adaptive.py of diffusion-classifier: t = (T // M) // 2 and on in steps of T // M.
    assert stage_times(1000, [500]) == [list(range(1, 1000, 2))]
    assert stage_times(1000, [50, 500])[0] == list(range(11, 1000, 20))
    coarse, finer, _ = stage_times(1000, [50, 100, 1000])
    assert (coarse, finer) == (list(range(10, 1000, 20)), list(range(5, 1000, 10)))  # not nested: 150 after both
    assert stage_times(7, [3]) == [[1, 3, 5]]


def test_several_prompts_of_a_class_count_by_the_best_and_priors_count():
    means = torch.tensor([[0.0], [4.0], [10.0]]).expand(3, 3)
    judge = classifier(gaussian, means, class_of=[0, 1, 0])
    x = torch.full((1, 3), 10.0)
    assert judge(x).shape == (1, 2)
    torch.testing.assert_close(judge(x), classifier(gaussian, means)(x)[:, [2, 1]])
    assert classify_images(judge, x).labels.tolist() == [0]
    assert classify_images(judge, x, None, torch.tensor([-1e9, 0.0])).labels.tolist() == [1]


def test_noise_is_that_of_a_sample_whatever_else_is_in_the_batch():
    judge = classifier(gaussian, torch.randn(3, 3), (10, 40), (2, 1))
    whole = judge.errors(torch.cat([X, X]), torch.tensor([5, 6, 7, 5]))
    torch.testing.assert_close(whole[1:2], judge.errors(X[1:], torch.tensor([6])), equal_nan=True)
    assert torch.equal(whole[0].nan_to_num(9), judge.errors(X[:1], torch.tensor([5]))[0].nan_to_num(9))
    assert not torch.equal(whole[0].nan_to_num(9), whole[2].nan_to_num(9))


def test_pairs_of_captions():
    """Means as captions: an item that is told, one with its captions exchanged, one where a caption says nothing."""
    images = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]], [[1.0], [3.0]]]).expand(3, 2, 4)
    captions = torch.tensor([[[1.0], [-1.0]], [[-1.0], [1.0]], [[1.0], [1.5]]]).expand(3, 2, 4)
    found = match_pairs(Denoiser(gaussian, SCHEDULE), images, captions, torch.zeros(1, 4), n_samples=200)
    assert found.text.tolist() == [True, False, True]
    assert found.image.tolist() == [True, False, False]  # 3 gains more by 1 than 1 does
    assert found.group.tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"^match_pairs: `captions` must be two of each item"):
        match_pairs(Denoiser(gaussian, SCHEDULE), images, captions[:, :1], torch.zeros(1, 4))


# -- digits ------------------------------------------------------------------------------------------------------------


@cache
def digits_classifier(n_samples=(4,), keep=(1,)):
    return DiffusionClassifier(Denoiser(class_model(), scheduler()), torch.arange(10), n_samples, keep, seed=1)


def test_digits_are_told_without_training():
    x, y = held_out()
    found = classify_images(digits_classifier(), x[:40], torch.arange(40))
    assert float((found.labels == y[:40]).double().mean()) >= 0.9


def test_shared_noise_makes_differences_vary_less():
    """Over eight draws of the noise, at one time; the benchmark has more of it."""
    x, y = (rows[:10] for rows in held_out())
    denoiser, time = Denoiser(class_model(), scheduler()), torch.tensor([100])

    def differences(seeds):
        with torch.no_grad():
            right, wrong = (
                condition_errors(denoiser, x, torch.arange(10), label[:, None], time, torch.arange(10), seed=seed)
                for label, seed in zip((y, (y + 1) % 10), seeds, strict=True)
            )
        return wrong - right

    shared = torch.stack([differences((draw, draw)) for draw in range(8)])
    own = torch.stack([differences((draw, draw + 100)) for draw in range(8)])
    assert float(shared.var(0).mean().sqrt()) < 0.85 * float(own.var(0).mean().sqrt())


class Digits(LightningModule):
    """What a user would write around a UNet and a scheduler of diffusers."""

    def __init__(self):
        super().__init__()
        self.unet, self.scheduler, self.table = class_model(), scheduler(), torch.arange(10)

    def validation_step(self, batch, batch_idx):
        self.log("loss", batch[0].mean())


def test_validation_logs_what_the_classifier_says():
    x, y = held_out()
    watch = DiffusionClassifierEval(10, "unet", n_samples=[2, 5], keep=[4, 1], max_images=20, seed=3)
    module = Digits()
    module.unet.train()
    (logged,) = make_trainer(callbacks=[watch]).validate(
        module, DataLoader(TensorDataset(x, y), batch_size=8), verbose=False
    )
    judge = DiffusionClassifier(Denoiser(module.unet, module.scheduler), torch.arange(10), [2, 5], [4, 1], seed=3)
    wanted = classify_images(judge, x[:20], torch.arange(20)).labels == y[:20]
    assert logged["reg/diffusion_classifier_eval/accuracy"] == pytest.approx(float(wanted.float().mean()))
    assert set(logged) == {"loss", *(f"reg/diffusion_classifier_eval/{n}" for n in ("accuracy", "calibration_error"))}
    module.unet.eval()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_a_fit_without_a_validation_is_told():
    class Trained(Digits):
        def training_step(self, batch, batch_idx):
            return self.weight * batch[0].mean()

        def configure_optimizers(self):
            self.weight = nn.Parameter(torch.ones(()))
            return torch.optim.SGD([self.weight], 0.1)

    loader = DataLoader(TensorDataset(*(part[:2] for part in held_out())), batch_size=2)
    watch = DiffusionClassifierEval(10, "unet", n_samples=[1], keep=[1], max_images=2)
    with pytest.warns(UserWarning, match=r"^DiffusionClassifierEval: nothing was classified in this fit"):
        make_trainer(callbacks=[watch], max_epochs=1).fit(Trained(), loader)
    for options in ({"max_epochs": 1}, {"max_epochs": 1, "limit_val_batches": 0}):  # it ran, or was switched off
        make_trainer(callbacks=[watch], **options).fit(Trained(), loader, loader)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"denoiser": "net"}, r"denoiser='net' names nothing in Digits\. Write the name"),
        ({"scheduler": "levels"}, r"scheduler='levels' names nothing in Digits.*or give `alphas_cumprod`"),
        ({"conditions": "table", "classes": 3}, r"conditions='table' must name a tensor with a row for each of 3"),
        ({"input_key": "image"}, "input_key='image' names nothing in the batch"),
    ],
)
def test_what_the_module_does_not_have_is_told(options, words):
    watch = DiffusionClassifierEval(**{"classes": 10, "denoiser": "unet", "n_samples": [1], "keep": [1], **options})
    loader = DataLoader(TensorDataset(*(rows[:2] for rows in held_out())), batch_size=2)
    with pytest.raises(MisconfigurationException, match=words):
        make_trainer(callbacks=[watch]).validate(Digits(), loader, verbose=False)
