"""SourceTasks: the Lasso, its budgets, and draws that follow the relevance of the tasks."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lightning_reg import SourceTasks
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    allocate,
    first_of_tasks,
    head_noise,
    relevance_l1,
    relevance_l2,
    residual_lam,
    sampling_probs,
    target_head,
    task_draws,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.problems import SIZE
from tests.toys import (
    QUIET,
    SAMPLES,
    TWO_RANKS,
    Classifier,
    IndexRecorder,
    fit,
    make_loader,
    make_tensors,
    make_trainer,
)

pytestmark = QUIET

HERE = "tests.reweighting.test_amtrl_lasso"


def thirds():
    return torch.arange(SIZE) % 3


def mostly():
    """Two sources, and three samples of none."""
    tasks = torch.arange(SIZE) % 2
    tasks[:3] = -1
    return tasks


def halves():
    return torch.arange(SIZE) % 2


def toy_thirds():
    """The first three are of no task."""
    tasks = torch.arange(SAMPLES) % 3
    tasks[:3] = -1
    return tasks


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class DrawnByHand(Hand):
    """A task by the quantiles of its probability, then one of its samples."""

    def draw(self, epoch):
        draw = torch.Generator().manual_seed(self.technique.derived_seed(f"draws {epoch}"))
        sizes = [2.0, 0.5, 0.0]
        probs = [0.1 / 3 + 0.9 * one / 2.5 for one in sizes]
        members = [[i for i in range(SIZE) if i % 3 == m] for m in range(3)]
        drawn = torch.rand(SIZE, generator=draw, dtype=torch.float64).tolist()
        places = torch.rand(SIZE, generator=draw, dtype=torch.float64).tolist()
        tasks = [0 if u < probs[0] else 1 if u < probs[0] + probs[1] else 2 for u in drawn]
        return torch.tensor([members[m][int(u * len(members[m]))] for m, u in zip(tasks, places, strict=True)])


KNOWN = {"num_tasks": 3, "tasks": "thirds"}  # a method of the laws' module
FOUND = {
    "tasks": f"{HERE}.mostly",
    "layer": "net.act_body",
    "label_key": "1",
    "num_classes": 4,
    "num_tasks": 2,
}
BOUGHT = FOUND | {"tasks": f"{HERE}.halves"}
CASE = Case(
    make=partial(SourceTasks, **KNOWN, relevance=[-2.0, 0.5, 0.0]),
    neutral=partial(SourceTasks, **KNOWN),
    by_hand=DrawnByHand,
    says=(
        "3 sources by relevance, floor 0.1",
        "3 sources, your own draws",
        "2 sources by relevance, found at epochs 1, floor 0.1",
        "2 sources by squared relevance, found at epochs 0, 1, floor 0.5",
        "3 sources alike, floor 0.1",
    ),
    also=["images", "regression", "tokens"],
    variants=[
        partial(SourceTasks, **FOUND, rounds=[1], lam=0.0),
        partial(SourceTasks, **BOUGHT, rounds=[0, 1], order="l2", floor=0.5, costs=[1.0, 4.0]),
        partial(SourceTasks, **KNOWN, order="uniform"),
    ],
    invalid=[
        (KNOWN | {"num_tasks": 0}, "num_tasks"),
        (KNOWN | {"order": "l0"}, "order"),
        (KNOWN | {"lam": -0.1}, "lam"),
        (KNOWN | {"floor": -0.1}, "floor"),
        (KNOWN | {"floor": 1.1}, "floor"),
        (KNOWN | {"ridge": 0.0}, "ridge"),
        (KNOWN | {"num_classes": 1}, "num_classes"),
        (KNOWN | {"budget": 2}, "budget"),
        (KNOWN | {"relevance": [1.0]}, "relevance"),
        (KNOWN | {"costs": [1.0, 2.0, 4.0], "budget": 6.5}, "budget"),
        (KNOWN | {"samples_per_round": 0}, "samples_per_round"),
        (KNOWN | {"costs": [1.0, 1.0, 0.0]}, "costs"),
        (KNOWN | {"costs": [1.0]}, "costs"),
        (FOUND | {"rounds": [-1]}, "rounds"),
        (FOUND | {"rounds": [1], "layer": None}, "layer"),
        (FOUND | {"rounds": [1], "label_key": None}, "label_key"),
    ],
)


# -- the relevance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 60), (8, 8), (32, 10), (3, 1), (1, 4), (50, 120)])
@pytest.mark.parametrize("share", [0.9, 0.1, 1e-3])
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_no_condition_of_optimality_is_missed(shape, share, common):
    heads, target = random(*shape) + common * random(shape[0], 1, seed=2), random(shape[0], seed=1)
    lam = share * (heads.T @ target).abs().max()
    nu = relevance_l1(heads, target, float(lam))
    slopes = heads.T @ (target - heads @ nu)
    on = nu != 0
    assert on.any()
    torch.testing.assert_close(
        slopes[on], lam * nu[on].sign(), rtol=0, atol=1e-8 * float(lam) / share
    )  # that of the solver
    assert (slopes[~on].abs() <= lam * (1 + 1e-7 / share)).all()


def test_the_lasso_is_that_of_scikit_learn():
    from sklearn.linear_model import Lasso

    heads, target = random(7, 30), random(7, seed=1)
    for lam in (1.0, 0.1):
        theirs = (
            Lasso(alpha=lam / 7, fit_intercept=False, tol=1e-13, max_iter=100_000)
            .fit(heads.numpy(), target.numpy())
            .coef_
        )
        ours = relevance_l1(heads, target, lam)
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-7)  # their tolerance


def test_the_limits_of_the_relevance():
    target = random(6)
    soft = torch.tensor([math.copysign(max(abs(t) - 0.3, 0), t) for t in target.tolist()], dtype=torch.float64)
    torch.testing.assert_close(relevance_l1(torch.eye(6), target, 0.3), soft)
    square = random(6, 6, seed=2)
    torch.testing.assert_close(relevance_l1(square, target), torch.linalg.inv(square) @ target)
    torch.testing.assert_close(relevance_l2(square, target), torch.linalg.inv(square) @ target)
    wide = random(6, 40, seed=3)
    wide /= wide.norm(dim=0)
    assert relevance_l1(wide, wide[:, 17]).nonzero().flatten().tolist() == [17]
    assert not relevance_l1(wide, target, lam=100.0).any()
    assert not relevance_l1(wide, torch.zeros(6)).any()
    sparse, dense = relevance_l1(wide, target), relevance_l2(wide, target)
    torch.testing.assert_close(wide @ sparse, target)
    torch.testing.assert_close(wide @ dense, target)
    assert sparse.count_nonzero() <= 6
    assert sparse.abs().sum() < dense.abs().sum()
    ties = relevance_l1(torch.eye(3), torch.tensor([1.0, -1.0, 1.0]), 0.25)  # all take part from one value on
    assert ties.tolist() == [0.75, -0.75, 0.75]
    alike = random(50, 59, seed=4) + 30 * random(50, 1, seed=5)  # columns that differ by 3 % of their length
    torch.testing.assert_close(alike @ relevance_l1(alike, random(50)), random(50), rtol=0, atol=1e-5)
    doubled = torch.stack([target, target], 1)  # equal columns: any split of the one coefficient
    assert float(relevance_l1(doubled, target).sum()) == pytest.approx(1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_ties_of_whole_numbers_are_no_trouble(lam):
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        heads, target = (torch.randint(-2, 3, shape, generator=draw).double() for shape in ((4, 12), (4,)))
        nu = relevance_l1(heads, target, lam)
        slopes = heads.T @ (target - heads @ nu)
        assert float(slopes.abs().max()) <= lam + 2e-6
        torch.testing.assert_close(slopes[nu != 0], lam * nu[nu != 0].sign(), rtol=0, atol=2e-6)  # 1e-7 of up to 20


def test_the_limit_of_the_lasso_is_the_linear_program():
    from scipy.optimize import linprog

    heads, target = random(4, 20), random(4, seed=1)
    split = torch.cat([heads, -heads], 1)
    least = linprog([1.0] * 40, A_eq=split.numpy(), b_eq=target.numpy(), bounds=(0, None)).fun
    assert float(relevance_l1(heads, target).abs().sum()) == pytest.approx(least, rel=1e-8)


def test_scaled_heads_are_given_back_as_they_are():
    heads, target = random(5, 12), random(5, seed=1)
    large = heads * torch.arange(1, 13)
    lengths = large.norm(dim=0)
    for relevance in (partial(relevance_l1, lam=0.2), relevance_l2):
        scaled = relevance(large, target, scale=True)
        torch.testing.assert_close(scaled * lengths, relevance(large / lengths, target))
        assert not torch.allclose(scaled, relevance(large, target))
    large[:, 3] = 0
    assert relevance_l1(large, target, 0.1, scale=True)[3] == 0


def test_a_rescaled_target_is_drawn_alike():
    heads, target = random(5, 12), random(5, seed=1)
    one, two = relevance_l1(heads, target, 0.2), relevance_l1(heads, 7 * target, 1.4)
    torch.testing.assert_close(sampling_probs(one), sampling_probs(two))


def test_the_largest_lam_that_noise_explains():
    heads, target = random(6, 20), random(6, seed=1)
    lam = residual_lam(heads, target, noise=0.3)
    residual = (heads @ relevance_l1(heads, target, lam) - target).square().sum()
    assert float(residual) == pytest.approx(0.3, rel=1e-9)
    few, top = heads[:, :3], float((heads[:, :3].T @ target).abs().max())
    assert residual_lam(few, target, noise=0.0) == pytest.approx(1e-4 * top)
    assert residual_lam(few, target, noise=math.inf) == pytest.approx(top)
    assert residual_lam(heads, torch.zeros(6), noise=1.0) == 0
    tall = random(20, 6, seed=2)  # of six directions: the residual ends at what they leave
    least = float((tall @ relevance_l2(tall, random(20)) - random(20)).square().sum())
    lam = residual_lam(tall, random(20), noise=1.05 * least)
    nu = relevance_l1(tall, random(20), lam)
    assert float((tall @ nu - random(20)).square().sum()) == pytest.approx(1.05 * least, rel=1e-9)


@pytest.mark.parametrize(
    ("heads", "target", "lam", "sentence"),
    [
        (torch.eye(2), torch.ones(3), 0.0, r"`heads` must be \(k, M\) and `target` \(k,\), got \(2, 2\) and \(3,\)"),
        (torch.ones(2), torch.ones(2), 0.0, r"got \(2,\) and \(2,\)"),
        (torch.eye(2), torch.ones(2), -1.0, r"`lam` must be a number in \[0, inf\), got -1.0"),
        (torch.eye(2), torch.ones(2), math.nan, "got nan"),
        (torch.eye(2), torch.tensor([1.0, math.nan]), 0.1, "must be finite"),
        (torch.eye(2) * math.inf, torch.ones(2), 0.1, "must be finite"),
    ],
)
def test_a_relevance_of_nothing_is_told(heads, target, lam, sentence):
    with pytest.raises(ValueError, match=sentence):
        relevance_l1(heads, target, lam)


def test_heads_of_nearly_one_direction_are_told():
    heads = random(8, 8) @ torch.diag(torch.logspace(0, -10, 8).double()) @ random(8, 30, seed=1)
    with pytest.raises(ValueError, match="heads are too much alike for the Lasso at this `lam`"):
        relevance_l1(heads, random(8))


# -- draws and budgets ------------------------------------------------------------------------------------------------


def test_the_risk_in_closed_form():
    # sum nu_m^2 / p_m over 25 draws, against ||nu||_1^2, M ||nu||_2^2 by squares and alike, ||nu||_1^2 of the dense one
    risks = torch.zeros(4, dtype=torch.float64)
    for seed in range(25):
        heads, target = random(5, 60, seed=seed), random(5, seed=1000 + seed)
        heads, target = heads / heads.norm(dim=0), target / target.norm()
        sparse, dense = relevance_l1(heads, target), relevance_l2(heads, target)
        probs = [sampling_probs(sparse), *(sampling_probs(dense, order) for order in ("l2", "uniform", "l1"))]
        found = [(nu.square() / p)[p > 0].sum() for nu, p in zip([sparse, dense, dense, dense], probs, strict=True)]
        norms = [sparse.abs().sum().square(), *[60 * dense.square().sum()] * 2, dense.abs().sum().square()]
        torch.testing.assert_close(torch.stack(found), torch.stack(norms))
        risks += torch.stack(found) / 25
    # the averages of 50 other draws; a standard error is up to 0.3
    torch.testing.assert_close(risks, torch.tensor([1.50, 5.12, 5.12, 3.58]).double(), rtol=0.1, atol=0)


def test_probabilities_by_hand():
    nu = torch.tensor([-3.0, 1.0, 0.0])
    assert sampling_probs(nu).tolist() == pytest.approx([0.75, 0.25, 0])
    assert sampling_probs(nu, "l2").tolist() == pytest.approx([0.9, 0.1, 0])
    assert sampling_probs(nu, "uniform").tolist() == pytest.approx([1 / 3] * 3)
    assert sampling_probs(nu, floor=0.3).tolist() == pytest.approx([0.625, 0.275, 0.1])
    assert sampling_probs(nu, floor=1.0).tolist() == pytest.approx([1 / 3] * 3)
    assert sampling_probs(nu, costs=[9.0, 1.0, 4.0]).tolist() == pytest.approx([0.5, 0.5, 0])
    assert sampling_probs(torch.zeros(4)).tolist() == [0.25] * 4
    assert sampling_probs(nu.double() * 1e-200, "l2").tolist() == pytest.approx([0.9, 0.1, 0])


def test_costs_make_the_cheapest_draws_of_one_risk():
    nu, costs = random(4).abs(), [1.0, 4.0, 9.0, 0.25]
    p = sampling_probs(nu, costs=costs)

    def price(p):  # of the samples that bring the risk to 1
        return float((nu.square() / p).sum() * (p * torch.tensor(costs)).sum())

    others = [p * (0.3 * random(4, seed=s)).exp() for s in range(1, 30)]
    assert all(price(p) < price(other / other.sum()) for other in others)


def test_budgets_by_hand():
    assert allocate(torch.tensor([6.0, 3.0, 1.0]), 20).tolist() == [12, 6, 2]
    assert allocate(torch.tensor([6.0, 3.0, 1.0]), 20, 3).tolist() == [11, 6, 3]
    assert allocate(torch.tensor([1.0, 1.0, 1.0]), 20).tolist() == [7, 7, 6]
    assert allocate(torch.tensor([-6.0, 3.0, 1.0]), 20, 0, torch.tensor([4, 99, 99])).tolist() == [4, 12, 4]
    assert allocate(torch.tensor([1.0, 0.0, 0.0]), 20, 1, torch.tensor([10, 99, 3])).tolist() == [10, 7, 3]
    assert allocate(torch.zeros(3), 9).tolist() == [3, 3, 3]
    assert allocate(torch.ones(2), 100, 0, torch.tensor([3, 4])).tolist() == [3, 4]
    assert allocate(torch.ones(2), 5, 4, torch.tensor([1, 9])).tolist() == [1, 4]
    assert allocate(torch.tensor([1.0, 3.0]), 8, torch.tensor([5, 0])).tolist() == [5, 3]
    assert allocate(torch.tensor([1.0, 3.0]), 0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="`budget` must be at least 6, the least of all, got 5"):
        allocate(torch.ones(2), 5, 3)


def test_budgets_of_costs_by_hand():
    halves, two = torch.tensor([0.5, 1.0]), torch.ones(2)  # of heads that are as relevant, at costs of 4 and 1
    assert allocate(halves, 60, costs=[4.0, 1.0]).tolist() == [10, 20]
    assert allocate(halves, 20, 0, torch.tensor([2, 99]), costs=[4.0, 1.0]).tolist() == [2, 12]  # capped at 2 for 8
    assert allocate(halves, 13, 2, costs=[4.0, 1.0]).tolist() == [2, 5]
    assert allocate(two, 10, costs=[4.0, 3.0]).tolist() == [1, 2]  # 3 are left of one each: the first is too dear
    assert allocate(two, 29, costs=[20.0, 1.0]).tolist() == [1, 9]
    assert allocate(two, 3.5, costs=[0.5, 0.5]).tolist() == [4, 3]
    assert allocate(two, 1.0, costs=[0.1, 0.3]).tolist() == [4, 2]  # 10 times 0.1 is not 1 in binary numbers
    assert allocate(torch.tensor([1.0, 0.0]), 10, costs=[3.0, 1.0]).tolist() == [3, 0]  # nothing for what counts not
    assert allocate(torch.tensor([1.0, 0.0]), 10, 0, torch.tensor([2, 99]), costs=[3.0, 1.0]).tolist() == [2, 4]
    with pytest.raises(ValueError, match="`budget` must be at least 15, the least of all, got 14"):
        allocate(two, 14, 3, costs=[4.0, 1.0])


def test_a_budget_of_costs_brings_the_least_bound():
    # By Lagrange nu^2 / n^2 is in proportion to c, so n = C |nu| / sqrt(c) / S, and the bound is S^2 / C, where S is
    # the sum of |nu| sqrt(c).
    nu, costs, budget = random(6), [1.0, 4.0, 9.0, 0.25, 2.0, 30.0], 1e6
    price = torch.tensor(costs).double()
    counts = allocate(sampling_probs(nu, costs=costs), budget, costs=costs).double()
    total = float((nu.abs() * price.sqrt()).sum())
    torch.testing.assert_close(counts, budget * nu.abs() / price.sqrt() / total, rtol=0, atol=30 / 0.25)  # whole ones
    assert budget - 0.25 < float(counts @ price) <= budget

    def bound(counts):
        return float((nu.square() / counts).sum())

    assert bound(counts) == pytest.approx(total**2 / budget, rel=1e-3)
    for seed in range(1, 30):
        other = counts * (0.2 * random(6, seed=seed)).exp()
        assert bound(other * budget / float(other @ price)) > bound(counts)


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_of_costs_is_kept(seed):
    draw = torch.Generator().manual_seed(seed)
    weights, costs = torch.rand(7, generator=draw) ** 4, (10 * torch.rand(7, generator=draw) + 0.1).tolist()
    available = torch.randint(1, 60, (7,), generator=draw)
    least, budget, price = seed % 3, 80 + 300 * float(torch.rand((), generator=draw)), torch.tensor(costs).double()
    found = allocate(weights, budget, least, available, costs)
    assert (found <= available).all()
    assert (found >= available.clamp(max=least)).all()
    left = budget - float(price @ found.double())
    assert left > -1e-6
    assert left < min((c for c, n, most in zip(costs, found, available, strict=True) if n < most), default=math.inf)


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_is_kept(seed):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(7, generator=draw) ** 8
    weights[torch.randperm(7, generator=draw)[:2]] = 0
    available = torch.randint(1, 60, (7,), generator=draw)
    least = int(torch.randint(3, (), generator=draw))
    budget = int(torch.randint(14, 200, (), generator=draw))
    found = allocate(weights, budget, least, available)
    assert int(found.sum()) == min(budget, int(available.sum()))
    assert (found <= available).all()
    assert (found >= available.clamp(max=least)).all()
    free = (found < available) & (found > least) & (weights > 0)
    if free.sum() > 1:
        rates = found[free] / weights[free]
        # of those at no bound the rates are one, up to a rounded sample of each
        assert rates.max() - rates.min() <= 2 / weights[free].min()


def test_draws_are_of_the_tasks():
    tasks = torch.tensor([0, 2, 1, -1, 0, 3, 1])
    drawn = task_draws(tasks, torch.tensor([0.5, 0.0, 0.5]), 4000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 4}
    assert (drawn == 1).float().mean().item() == pytest.approx(0.5, abs=0.03)  # 4 standard deviations
    assert (drawn == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    with pytest.raises(ValueError, match="task 3 has no sample to draw"):
        task_draws(tasks[:5], torch.ones(4) / 4, 3, torch.Generator())


def test_the_first_of_tasks_stay():
    tasks, make = torch.tensor([0, 1, -1, 0, 1, 2, 0, 0]), lambda: torch.Generator().manual_seed(3)
    few = first_of_tasks(tasks, torch.tensor([1, 2]), make())
    more = first_of_tasks(tasks, torch.tensor([3, 2]), make())
    assert tasks[few].bincount().tolist() == [1, 2]
    assert tasks[more].bincount().tolist() == [3, 2]
    assert more[few].all()
    firsts = {
        first_of_tasks(tasks, torch.tensor([1]), torch.Generator().manual_seed(s)).nonzero().item() for s in range(40)
    }
    assert firsts == {0, 3, 6, 7}


# -- heads ------------------------------------------------------------------------------------------------------------


def test_heads_are_those_of_ridge_regression():
    from sklearn.linear_model import Ridge

    features, targets = random(30, 4), random(30, 2, seed=1)
    for bias in (False, True):
        theirs = Ridge(alpha=30 * 0.2, fit_intercept=bias).fit(features.numpy(), targets.numpy()).coef_
        torch.testing.assert_close(target_head(features, targets, 0.2, bias=bias), torch.from_numpy(theirs).T)
    assert target_head(features.float(), targets[:, 0].float()).shape == (4,)


@pytest.mark.parametrize("bias", [False, True])
def test_the_noise_of_a_head_is_what_its_error_is(bias):
    features, head = random(40, 5) + 1, random(5, seed=1)
    errors, said = [], []
    for seed in range(300):
        targets = features @ head + 3 * bias + 0.5 * random(40, seed=10 + seed)
        errors.append((target_head(features, targets, 1e-6, bias=bias) - head).square().sum())
        said.append(head_noise(features, targets, 1e-6, bias=bias))
    # the error's relative spread is about sqrt(2 / 5), over 300 draws 4 %
    assert float(torch.stack(errors).mean()) == pytest.approx(sum(said) / 300, rel=0.15)
    assert head_noise(features[:5], features[:5] @ head, 1e-12) == math.inf
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([0.0, 3.0, 0.0])
    # no slope: squares of 9 without a mean, over 2 left of 3; of 6 about the mean, over 1; over the 2 of x
    assert head_noise(x, y, 0.0, bias=bias) == pytest.approx(6 / 1 / 2 if bias else 9 / 2 / 2)


# -- fits -------------------------------------------------------------------------------------------------------------

M, PER_TASK = 6, 40


def multi_tasks():
    return torch.arange(M * PER_TASK) % M


def multi_data():
    """Linear tasks, and a target whose head is minus twice that of task 2: by task, ``(M + 1, 40, ...)``."""
    x, heads = random(PER_TASK, M + 1, 8), random(4, M, seed=1)
    heads = torch.cat([heads, -2 * heads[:, 2:3]], 1)
    y = torch.einsum("nmd,dk,km->nm", x, random(8, 4, seed=2), heads) + 0.1 * random(PER_TASK, M + 1, seed=3)
    return x.float(), y.float()


class Multi(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5))
        self.heads = nn.Linear(4, M + 1)
        with torch.no_grad():
            self.net[0].weight.copy_(random(8, 4, seed=2).T)

    def training_step(self, batch, batch_idx):
        x, y, task = batch
        loss = F.mse_loss(self.heads(self.net(x)).gather(1, task[:, None])[:, 0], y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


COSTS = [2.0, 1.0, 5.0, 1.0, 1.0, 2.0]
MULTI = {"num_tasks": M, "tasks": f"{HERE}.multi_tasks", "layer": "net.1", "label_key": "1"}


def fit_multi(module, sources, *others, ckpt_path=None, sampler=None, **options):
    """The sources are the training data, the target is the validation's."""
    x, y = multi_data()
    training = TensorDataset(x[:, :M].flatten(0, 1), y[:, :M].flatten(), multi_tasks())
    target = TensorDataset(x[:, M], y[:, M], torch.full((PER_TASK,), M))
    trainer = make_trainer(callbacks=[sources, *others], **options)
    loaders = make_loader(training, batch_size=16, sampler=sampler), make_loader(target, batch_size=16)
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer


def drawn_in(recorder, epochs):
    batches = len(recorder.indices) // epochs
    parts = [recorder.indices[e * batches : (e + 1) * batches] for e in range(epochs)]
    return [torch.tensor([i for batch in part for i in batch]) for part in parts]


def test_a_source_that_is_the_target_is_drawn():
    sources, recorder, module = SourceTasks(**MULTI, rounds=[1], seed=5), IndexRecorder(), Multi()
    fit_multi(module, sources, recorder, max_epochs=2)
    rows, tasks = sources.report(), multi_tasks()
    assert max(range(M), key=lambda m: rows[m]["share"]) == 2
    assert rows[2]["relevance"] < -1
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    first, then = drawn_in(recorder, 2)
    nu = torch.tensor([row["relevance"] for row in rows])
    for epoch, (known, found) in enumerate([(torch.zeros(M), first), (nu, then)]):
        wanted = task_draws(tasks, sampling_probs(known, floor=0.1), len(tasks), sources.draw_generator(epoch))
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("most", [None, 25])
@pytest.mark.parametrize("order", ["l1", "l2"])
def test_heads_and_target_are_of_the_weights_that_the_round_has(most, order):
    module, (x, y) = Multi(), multi_data()
    sources = SourceTasks(**MULTI, rounds=[0], order=order, lam=0.01, scale_heads=False, samples_per_round=most)
    with torch.no_grad():
        features = x @ module.net[0].weight.T + module.net[0].bias  # in evaluation mode there is no dropout
    counts, draw = torch.full((M,), most or PER_TASK), torch.Generator().manual_seed(sources.derived_seed("bought"))
    seen = first_of_tasks(multi_tasks(), counts, draw).view(PER_TASK, M)
    columns = [target_head(features[seen[:, m], m], y[seen[:, m], m], bias=True) for m in range(M)]
    own, wanted = torch.stack(columns, 1), target_head(features[:, M], y[:, M], bias=True)
    nu = relevance_l1(own, wanted, 0.01) if order == "l1" else relevance_l2(own, wanted)
    fit_multi(module, sources, max_epochs=1)
    found = torch.tensor([row["relevance"] for row in sources.report()], dtype=torch.float64)
    torch.testing.assert_close(found, nu, rtol=1e-3, atol=1e-4)  # features are of single precision


def test_a_budget_is_bought_in_rounds_and_no_more_is_seen():
    sources = SourceTasks(**MULTI, rounds=[1, 2], budget=90, floor=0.4)
    recorder, module, bought = IndexRecorder(), Multi(), []

    class Counts(IndexRecorder):
        def on_train_epoch_start(self, trainer, pl_module):
            bought.append([row["samples"] for row in sources.report()])

    fit_multi(module, sources, recorder, Counts(), max_epochs=3)
    assert [sum(row) for row in bought] == [36, 63, 90]
    assert bought[0] == [6] * M
    assert all(b >= a for one, two in itertools.pairwise(bought) for a, b in zip(one, two, strict=True))
    assert max(bought[2]) == bought[2][2] <= PER_TASK
    indices = [i for batch in recorder.indices for i in batch]
    epochs = [indices[:36], indices[36:99], indices[99:]]
    assert [len(set(epoch)) for epoch in epochs] == [36, 63, 90]  # each once
    assert set(epochs[0]) < set(epochs[1]) < set(epochs[2])
    assert multi_tasks()[epochs[2]].bincount().tolist() == bought[2]


class Stops(IndexRecorder):
    """Keeps a checkpoint after some batches."""

    def __init__(self, at, path):
        super().__init__()
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_budget_goes_on_where_it_was(tmp_path):
    def make():
        return SourceTasks(**MULTI, rounds=[1, 2], costs=COSTS, budget=120.5, floor=0.4)

    path, whole, rest = str(tmp_path / "stop.ckpt"), make(), make()
    one, two = Multi(), Multi()
    one.net[1].p = two.net[1].p = 0.0  # a checkpoint has no global random state
    fit_multi(one, whole, Stops(4, path), max_epochs=3)  # in the middle of the second epoch
    fit_multi(two, rest, max_epochs=3, ckpt_path=path)
    assert whole.report() == rest.report()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_rounds_of_another_plan_are_not_paid_twice(tmp_path):
    path = str(tmp_path / "stop.ckpt")
    fit_multi(Multi(), SourceTasks(**MULTI, rounds=[0], budget=60, floor=0.4), Stops(4, path), max_epochs=1)
    rest = SourceTasks(**MULTI, rounds=[1, 5, 6], budget=90, floor=0.4)
    fit_multi(Multi(), rest, max_epochs=2, ckpt_path=path)
    assert sum(row["samples"] for row in rest.report()) == 60  # bought before; 36 and a third of 54 are fewer


def test_a_source_has_a_sample_before_the_first_round():
    sources = SourceTasks(**MULTI, rounds=[5], budget=10, floor=0.0)
    fit_multi(Multi(), sources, max_epochs=1)
    assert [row["samples"] for row in sources.report()] == [1] * M


def test_a_relevance_counts_until_the_first_round():
    sources = SourceTasks(**MULTI, rounds=[1], relevance=[0.0, 1.0, 0.0, 0.0, 0.0, -3.0], floor=0.0)
    recorder = IndexRecorder()
    fit_multi(Multi(), sources, recorder, max_epochs=2)
    first, then = (multi_tasks()[drawn].bincount(minlength=M) / len(drawn) for drawn in drawn_in(recorder, 2))
    assert first.nonzero().flatten().tolist() == [1, 5]
    assert float(first[5]) == pytest.approx(0.75, abs=0.1)  # 3.6 standard deviations of 240 draws
    assert int(then.argmax()) == 2


def test_a_known_relevance_buys_at_once():
    sources = SourceTasks(**KNOWN | {"tasks": f"{HERE}.toy_thirds"}, relevance=[3.0, -1.0, 0.0], budget=12, floor=0.25)
    recorder = IndexRecorder()
    fit(Classifier(), sources, recorder, max_epochs=1)
    tasks = toy_thirds()[[i for batch in recorder.indices for i in batch]]
    # 9 of source 0 would be a proportion of 3 to 1 with one of source 2 kept
    assert tasks.bincount().tolist() == [8, 3, 1]
    assert [row.get("samples") for row in sources.report()] == [8, 3, 1]


def test_a_budget_counts_what_samples_cost():
    known = {"relevance": [3.0, -1.0, 0.0], "costs": [4.0, 1.0, 1.0], "floor": 0.25}
    sources = SourceTasks(**KNOWN | {"tasks": f"{HERE}.toy_thirds"}, **known, budget=24)
    fit(Classifier(), sources, max_epochs=1)
    # one of each for 6; the rest would be 4.9 and 3.3 by 3 / sqrt(4) to 1, and of 4 and 3 another first one is left
    assert [row["samples"] for row in sources.report()] == [5, 3, 1]
    sources, bought = SourceTasks(**MULTI, rounds=[1, 2], costs=COSTS, budget=120.5, floor=0.3), []

    class Spent(IndexRecorder):
        def on_train_epoch_start(self, trainer, pl_module):
            counts = [row["samples"] for row in sources.report()]
            bought.append(sum(c * n for c, n in zip(COSTS, counts, strict=True)))

    fit_multi(Multi(), sources, Spent(), max_epochs=3)
    # 3 of each for 36 of the first 36.15, then half of the rest each; samples that count cost up to 5, one of them 1
    assert bought == [36, pytest.approx(78.3, abs=1), 120]


def test_no_relevant_source_is_told():
    sources = SourceTasks(**MULTI, rounds=[0], lam=1e6)
    with pytest.warns(UserWarning, match="with lam=1e\\+06 no source is relevant, so all are drawn alike. Lower `lam`"):
        fit_multi(Multi(), sources, max_epochs=1)
    assert [row["share"] for row in sources.report()] == [pytest.approx(1 / M)] * M


def test_the_next_training_begins_anew():
    sources = SourceTasks(**MULTI, rounds=[1], budget=60, floor=0.5)
    shares = []
    for _ in range(2):
        fit_multi(Multi(), sources, max_epochs=2)
        shares.append(sources.report())
    assert shares[0] == shares[1]


def test_what_is_logged():
    trainer = fit_multi(Multi(), SourceTasks(**MULTI, rounds=[1]), max_epochs=2)
    logged = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("reg/")}
    names = {"support", "residual", "lam", *(f"{of}_{m}" for of in ("relevance", "share") for m in range(M))}
    assert logged.keys() == {f"reg/amtrl_lasso/{name}" for name in names}
    assert 0 <= logged["reg/amtrl_lasso/residual"] < 0.1
    assert 1 <= logged["reg/amtrl_lasso/support"] <= 4


def numbers():
    return torch.ones(SAMPLES)


def too_many():
    return torch.arange(SAMPLES) % 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tasks": f"{HERE}.numbers"}, r"must return whole numbers \(N,\), got torch.float32 \(32,\)"),
        (
            {"tasks": f"{HERE}.too_many"},
            r"there is a task 4, and num_tasks=3 counts from 0. Raise `num_tasks`",
        ),
        ({"tasks": f"{HERE}.toy_thirds", "num_tasks": 4}, r"no training sample is of task \[3\]. Leave these out"),
        ({"tasks": f"{HERE}.thirds"}, r"returns the tasks of 22 samples, the training dataset has 32"),
        ({"tasks": "nothing"}, r"SourceTasks\(tasks=...\): 'nothing' names no function"),
    ],
)
def test_tasks_that_do_not_fit_are_told(change, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Classifier(), SourceTasks(**({"num_tasks": 3, "order": "uniform"} | change)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"num_classes": 2},
            r"must be classes \(B,\) from 0 to 1 with num_classes=2, got torch.float32 \('B',\) up to",
        ),
        ({"layer": "net.2", "rounds": [9]}, "net.2"),
    ],
)
def test_heads_that_do_not_fit_are_told(change, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        fit_multi(Multi(), SourceTasks(**MULTI | {"rounds": [0]} | change))


def test_a_pass_without_a_task_is_told():
    with pytest.raises(MisconfigurationException, match="a pass over the training data has no sample of task 1, so it"):
        fit_multi(Multi(), SourceTasks(**MULTI, rounds=[0]), sampler=range(0, 240, 6))


def on_ranks():
    sources, recorder = SourceTasks(**MULTI, rounds=[1], samples_per_round=30), IndexRecorder()
    fit_multi(Multi(), sources, recorder, max_epochs=2, **TWO_RANKS)
    return [row["relevance"] for row in sources.report()], [i for batch in recorder.indices for i in batch]


def test_ranks_find_one_relevance(two_processes):
    (nu, first), (other, second) = two_processes.run(on_ranks)
    assert nu == other
    assert max(range(M), key=lambda m: abs(nu[m])) == 2
    assert len(first) == len(second) == 240
    assert first != second


class Vision(Classifier):
    """A small ResNet of timm with a head for two classes."""

    def __init__(self):
        import timm

        super().__init__()
        torch.manual_seed(0)
        self.net = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step


def test_a_model_of_timm():
    images = TensorDataset(random(SAMPLES, 3, 32, 32).float(), make_tensors()[1])
    sources = SourceTasks(2, f"{HERE}.halves_of_toys", "net.global_pool", "1", num_classes=3, rounds=[1], floor=0.3)
    make_trainer(callbacks=[sources], max_epochs=2).fit(Vision(), make_loader(images), make_loader(images))
    shares = [row["share"] for row in sources.report()]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] != shares[1]


def halves_of_toys():
    return torch.arange(SAMPLES) % 2
