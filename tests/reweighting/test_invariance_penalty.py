"""InvariancePenalty: six penalties for training on several environments."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_reg import InvariancePenalty, Mixup
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    clove_penalty,
    fishr_average,
    fishr_penalty,
    head_gradient_moments,
    iga_penalty,
    irm_penalty,
    logit_gradients,
    sd_penalty,
    vrex_penalty,
)
from tests.conformance.by_hand import Hand, changed_targets
from tests.conformance.case import Case
from tests.conformance.laws import precision, ranks_agree
from tests.conformance.problems import SIZE
from tests.toys import QUIET, TWO_RANKS, Classifier, fit, make_loader, make_tensors, same_weights, weights_of

pytestmark = QUIET

HERE = "tests.reweighting.test_invariance_penalty"
METHODS = ("irm", "vrex", "sd", "iga", "fishr", "clove")


def halves(size=SIZE):
    return torch.arange(size) % 3 % 2


def more_halves():
    return halves(40)


def toy_environments():
    """Of 32 samples; a batch of 8 has 6 and 2 of them, the last one 8 and none, and a few are of no environment."""
    environments = (torch.arange(32) % 4 == 3).long()
    environments[24:] = 0
    environments[::7] = -1
    return environments


class SlopesByHand(Hand):
    """IRMv1 environment by environment: the derivative by a factor on the logits, of even and of odd samples."""

    def observe(self, loop, moment):
        self.environments = halves()[moment.index].tolist()

    def term(self, loop, moment):
        products, y = [], changed_targets([hand for hand in loop.hands if hand.kind == self.kind], moment.y)
        for environment in range(2):
            own = [i for i, e in enumerate(self.environments) if e == environment]
            if len(own) < 2:
                continue
            slopes = []
            for part in (own[::2], own[1::2]):
                factor = torch.tensor(1.0, requires_grad=True)
                loss = F.cross_entropy(moment.logits[part] * factor, y[part])
                slopes.append(torch.autograd.grad(loss, factor, create_graph=True)[0])
            products.append(slopes[0] * slopes[1])
        return 0.5 * sum(products) / len(products) if products else torch.tensor(0.0)


TABLE = {"num_groups": 2, "weight": 0.5, "groups": f"{HERE}.more_halves", "index_key": "2"}
CASE = Case(
    make=partial(InvariancePenalty, "irm", **TABLE),
    neutral=partial(InvariancePenalty, "irm", **TABLE | {"weight": 0.0}),
    by_hand=SlopesByHand,
    says=(
        f"irm (domainbed), weight=0.5, 2 groups from {HERE}.more_halves by sample",
        "weight=0: inactive",
        f"irm (rfc), weight=0.5 after 3 steps with 1, 2 groups from {HERE}.more_halves by sample",
        f"fishr (domainbed), weight=0.5 after 2 steps with 0, 2 groups from {HERE}.more_halves by sample",
        f"iga (domainbed), weight=0.01, 2 groups from {HERE}.more_halves by sample",
        "vrex (rfc), weight=2, 4 groups from entry '1'",
        f"clove (rfc), weight=0.5, 2 groups from {HERE}.more_halves by sample",
        f"sd (domainbed), weight=0.1 after 2 steps with 3, 2 groups from {HERE}.more_halves by sample",
    ),
    variants=[
        partial(InvariancePenalty, "irm", **TABLE, anneal_steps=3, form="rfc"),
        partial(InvariancePenalty, "fishr", **TABLE, anneal_steps=2),
        partial(InvariancePenalty, "iga", **TABLE | {"weight": 0.01}, params="*.weight"),
        partial(InvariancePenalty, "vrex", 4, 2.0, group_key="1", form="rfc", loss="last"),
        partial(InvariancePenalty, "clove", **TABLE, form="rfc", kernel_width=0.2),
        partial(InvariancePenalty, "sd", **TABLE | {"weight": 0.1}, anneal_steps=2, anneal_weight=3.0),
    ],
    invalid=[
        ({"method": "irm"} | TABLE | more, argument)
        for more, argument in (
            ({"num_groups": 0}, "num_groups"),
            ({"weight": -0.1}, "weight"),
            ({"groups": None}, "group_key"),
            ({"group_key": "1"}, "group_key"),
            ({"anneal_steps": -1}, "anneal_steps"),
            ({"anneal_weight": -0.1}, "anneal_weight"),
            ({"decay": -0.1}, "decay"),
            ({"decay": 1.0}, "decay"),
            ({"kernel_width": 0.0}, "kernel_width"),
        )
    ],
)


# -- the formulas, beside the authors' code ---------------------------------------------------------------------------

# facebookresearch/DomainBed at b93c22a, domainbed/algorithms.py: IRM._irm_penalty; the penalty that update of VREx, SD
# and IGA reports; Fishr._get_grads_var_per_domain and _compute_distance_grads_var with lib/misc.py's MovingAverage and
# l2_between_dicts, on gradients of single samples by torch.autograd in place of BackPACK.
# TjuJianyu/RFC at de4a5a4, coloredmnist/train.py: IRM_penalty, IGA_penalty, the lines of vrex_train and sd_train, the
# functions mmce_penalty and l2_between_grads_variance within clove_train and fishr_train. All run in float64.
AUTHORS = {
    ("irm", "domainbed"): 0.14322451963235827,
    ("vrex", "domainbed"): 0.00019798556584530661,
    ("sd", "domainbed"): 0.9552213471833587,
    ("iga", "domainbed"): 1.6718229513850447,
    ("fishr", "domainbed"): 0.0035997646469085112,
    ("irm", "rfc"): 0.5865423037063148,
    ("vrex", "rfc"): 0.00039597113169061323,
    ("sd", "rfc"): 1.7890493993035599,
    ("iga", "rfc"): 1.6718229513850447,
    ("fishr", "rfc"): 0.0862439176326097,
    ("clove", "rfc"): 0.21193378524722634,
    ("irm binary", "rfc"): 0.040458718178728294,
}
FISHR_IN_THE_SECOND_STEP = 0.011853157658224374  # with half of the head's weight
IGA_GRADIENT = 5.377294392798898  # sum of squares of the gradient that DomainBed's update leaves, less its loss's

Y = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 0])
ENVIRONMENTS = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 1])


class Problem:
    """The tensors of these figures: nine samples of two environments, a network of two layers."""

    def __init__(self, factor=1.0):
        i = torch.arange(72, dtype=torch.float64).reshape(9, 8)
        self.x = torch.sin(1.7 * i + 0.3 * i**1.5)
        self.membership = F.one_hot(ENVIRONMENTS).double()
        self.net = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
        with torch.no_grad():
            first = torch.sin(torch.arange(32, dtype=torch.float64) * 0.9 + 1).reshape(4, 8) * 0.7
            self.net[0].weight.copy_(first)
            self.net[2].weight.copy_(torch.cos(torch.arange(12, dtype=torch.float64) * 1.3).reshape(3, 4) * factor)
            self.net[2].bias.copy_(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
        self.features = self.net[1](self.net[0](self.x))
        self.logits = self.net[2](self.features)

    def losses(self):
        return F.cross_entropy(self.logits, Y, reduction="none")

    def gradients(self):
        means = [self.losses()[environment == ENVIRONMENTS].mean() for environment in range(2)]
        params = list(self.net.parameters())
        each = [torch.autograd.grad(mean, params, create_graph=True) for mean in means]
        return torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in each])

    def variances(self, centred):
        deltas = logit_gradients(self.logits, F.one_hot(Y))
        features = torch.cat([self.features, torch.ones_like(self.features[:, :1])], 1)
        return head_gradient_moments(deltas, features, self.membership, centred=centred)

    def penalty(self, method, form):
        logits, membership, present = self.logits, self.membership, torch.tensor([True, True])
        binary, positive = logits[:, :1], (Y > 0).double()[:, None]
        p = binary[:, 0].sigmoid()
        confidences = torch.maximum(p, 1 - p)
        return {
            "irm": lambda: irm_penalty((logit_gradients(logits, F.one_hot(Y)) * logits).sum(1), membership, form),
            "irm binary": lambda: irm_penalty(
                (logit_gradients(binary, positive, binary=True) * binary)[:, 0], membership, form
            ),
            "vrex": lambda: vrex_penalty(self.losses(), membership, form),
            "sd": lambda: sd_penalty(logits.square().mean(1), membership, form),
            "iga": lambda: iga_penalty(self.gradients(), present),
            "fishr": lambda: fishr_penalty(self.variances(form == "domainbed"), present, form),
            "clove": lambda: clove_penalty(confidences, (p > 0.5) == (positive[:, 0] > 0.5), membership, form),
        }[method]()


@pytest.mark.parametrize(("method", "form"), AUTHORS)
def test_penalties_are_those_of_the_authors(method, form):
    assert Problem().penalty(method, form).item() == pytest.approx(AUTHORS[method, form], rel=1e-10)


def test_fishr_averages_as_the_authors():
    present = torch.tensor([True, True])
    first, kept = fishr_average(Problem().variances(True), None, present, 0.95)
    assert fishr_penalty(first, present).item() == pytest.approx(AUTHORS["fishr", "domainbed"], rel=1e-10)
    second, _ = fishr_average(Problem(0.5).variances(True), kept, present, 0.95)
    assert fishr_penalty(second, present).item() == pytest.approx(FISHR_IN_THE_SECOND_STEP, rel=1e-10)


def test_the_mean_gradient_of_iga_is_a_constant():
    problem = Problem()
    problem.penalty("iga", "domainbed").backward()
    found = sum(p.grad.square().sum() for p in problem.net.parameters())
    assert found.item() == pytest.approx(IGA_GRADIENT, rel=1e-10)


def test_clove_of_environments_is_their_sum_or_their_mean():
    problem = Problem()
    mean, total = (problem.penalty("clove", form).item() for form in ("domainbed", "rfc"))
    assert mean == pytest.approx(total / 2)


def test_moments_are_those_of_gradients_made_one_by_one():
    problem, head = Problem(), nn.Linear(4, 3).double()
    each = []
    for features, label in zip(problem.features.detach(), Y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(head(features[None]), label[None]), list(head.parameters()))
        each.append(torch.cat([gradients[0], gradients[1][:, None]], 1).flatten())
    each = torch.stack(each)
    features = torch.cat([problem.features, torch.ones(9, 1, dtype=torch.float64)], 1)
    deltas = logit_gradients(head(problem.features), F.one_hot(Y))
    for centred in (True, False):
        found = head_gradient_moments(deltas, features, problem.membership, centred=centred)
        for environment in range(2):
            own = each[environment == ENVIRONMENTS]
            wanted = own.var(0, correction=0) if centred else own.square().mean(0)
            torch.testing.assert_close(found[environment], wanted)


def test_logit_gradients_are_those_of_the_losses():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 1, 2, 1, 0])
    smooth = F.one_hot(targets) * 0.7 + 0.1
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, targets, label_smoothing=0.3, reduction="sum"), logits)
    torch.testing.assert_close(logit_gradients(logits, smooth), wanted)
    several = (logits > 0.3).double().detach().flip(0)
    loss = F.binary_cross_entropy_with_logits(logits, several, reduction="none").mean(1).sum()
    torch.testing.assert_close(logit_gradients(logits, several, binary=True), torch.autograd.grad(loss, logits)[0])


# -- limits -----------------------------------------------------------------------------------------------------------


def rows_of(method, rows):
    """The penalty of one column of rows, and of what else it needs."""
    return {
        "irm": irm_penalty,
        "vrex": vrex_penalty,
        "sd": sd_penalty,
        "clove": lambda values, membership, form: clove_penalty(values, torch.ones(len(values)), membership, form),
    }[method]


@pytest.mark.parametrize("form", ["domainbed", "rfc"])
@pytest.mark.parametrize("method", ["irm", "vrex", "sd", "clove"])
def test_an_environment_without_samples_counts_nowhere(method, form):
    values = torch.tensor([0.1, 0.4, 0.3, 0.9], requires_grad=True)
    two = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    three = torch.cat([two[:, :1], torch.zeros(4, 1), two[:, 1:]], 1)
    penalty = rows_of(method, values)
    assert penalty(values, three, form).item() == penalty(values, two, form).item() != 0
    nobody = penalty(values, torch.zeros(4, 2), form)
    assert nobody.item() == 0
    nobody.backward()
    assert values.grad.tolist() == [0.0] * 4
    empty = torch.zeros(0, requires_grad=True)
    assert penalty(empty, torch.zeros(0, 2), form).item() == 0


def test_an_absent_environment_keeps_its_average_and_is_compared_with_none():
    present = torch.tensor([True, False])
    variances = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    average, kept = fishr_average(variances, torch.tensor([[4.0, 4.0], [3.0, 5.0]]), present, 0.5)
    assert kept.tolist() == [[2.5, 3.0], [3.0, 5.0]]
    assert average.tolist() == [[5.0, 6.0], [6.0, 10.0]]
    assert fishr_penalty(average, present).item() == 0.0
    assert iga_penalty(variances, present).item() == 0.0
    three = torch.tensor([[1.0, 0.0], [9.0, 9.0], [3.0, 0.0]])
    assert iga_penalty(three, torch.tensor([True, False, True])).item() == 2.0
    assert fishr_penalty(three, torch.tensor([True, False, True])).item() == 0.5


def test_small_environments():
    one = torch.ones(1, 1)
    assert irm_penalty(torch.tensor([3.0]), one).item() == 0.0  # an even sample, no odd one
    assert irm_penalty(torch.tensor([3.0]), one, "rfc").item() == 9.0
    assert vrex_penalty(torch.tensor([3.0]), one, "rfc").item() == 0.0
    assert irm_penalty(torch.tensor([1.0, 2.0, 5.0]), torch.ones(3, 1)).item() == 6.0
    both = torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # the first sample is in both environments
    assert vrex_penalty(torch.tensor([1.0, 3.0]), both).item() == 0.25


# -- training ---------------------------------------------------------------------------------------------------------


def plain_penalty(method, form, module, x, y, environments, averages):
    """The penalty of a batch with loops over environments, its parts by autograd."""
    own = [torch.where(environments == e)[0] for e in range(2)]
    own = [rows for rows in own if len(rows) > (method == "irm" and form == "domainbed")]
    features = module.net[:3](x)
    logits = module.net[3](features)
    losses = F.cross_entropy(logits, y, reduction="none")
    domainbed, count = form == "domainbed", max(len(own), 1)
    if method == "sd":
        squares = logits.square().mean(1)
        return squares[torch.cat(own)].mean() if domainbed else sum(squares[rows].mean() for rows in own)
    if method == "vrex":
        means = torch.stack([losses[rows].mean() for rows in own])
        return means.var(correction=0) if domainbed else means.var() if count > 1 else means.sum() * 0
    if method == "irm":
        slopes = []
        for rows in own:
            factor = torch.ones((), requires_grad=True)
            parts = (rows[::2], rows[1::2]) if domainbed else (rows, rows)
            means = [F.cross_entropy(logits[part] * factor, y[part]) for part in parts]
            first, second = (torch.autograd.grad(mean, factor, create_graph=True)[0] for mean in means)
            slopes.append(first * second)
        return sum(slopes) / count
    if method == "iga":
        params = list(module.parameters())
        each = [torch.autograd.grad(losses[rows].mean(), params, create_graph=True) for rows in own]
        means = [sum(of_one).detach() / count for of_one in zip(*each, strict=True)]
        return sum((g - m).square().sum() for one in each for g, m in zip(one, means, strict=True))
    if method == "clove":
        values = []
        for rows in own:
            p, predicted = logits[rows].softmax(1).max(1)
            error = (predicted == y[rows]).float() - p
            kernel = torch.exp(-(p[:, None] - p[None]).abs() / 0.4)
            values.append((error[:, None] * error[None] * kernel).sum() / len(rows) ** 2)
        return sum(values) / (count if domainbed else 1)
    variances = []
    for rows in own:
        number = int(environments[rows[0]])
        deltas = logits[rows].softmax(1) - F.one_hot(y[rows], 3)
        wide = torch.cat([features[rows], torch.ones(len(rows), 1)], 1)
        each = (deltas[:, :, None] * wide[:, None]).flatten(1)
        if not domainbed:
            variances.append(each.square().mean(0))
            continue
        average = 0.95 * averages.get(number, 0.0) + 0.05 * each.var(0, correction=0)
        averages[number] = average.detach()
        variances.append(average / 0.05)
    mean = sum(variances) / count
    distances = sum((v - mean).square().sum() for v in variances)
    return distances / (count * len(mean)) if domainbed else distances


def toy_loader(**options):
    x, y = make_tensors()
    return make_loader(TensorDataset(x, y, toy_environments()), **options)


def environment_step(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("form", ["domainbed", "rfc"])
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_is_that_of_the_loop_by_hand(method, form):
    averages = {}

    def by_hand(module, batch):
        return environment_step(module, batch) + 0.3 * plain_penalty(method, form, module, *batch, averages)

    ours, plain = Classifier(environment_step), Classifier(by_hand)
    fit(ours, InvariancePenalty(method, 2, 0.3, group_key="2", form=form), loader=toy_loader())
    fit(plain, loader=toy_loader())
    assert same_weights(ours, plain, atol=2e-6)  # float32, sums in another order
    neither = Classifier(environment_step)
    fit(neither, loader=toy_loader())
    assert not same_weights(ours, neither, atol=2e-5)


class Adam(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)

    def on_train_batch_start(self, batch, batch_idx):
        if self.renewed and self.trainer.global_step == 3:
            self.trainer.optimizers[0].load_state_dict(torch.optim.Adam(self.parameters(), 0.05).state_dict())


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(("method", "before"), [("vrex", 1.0), ("clove", 0.0)])
def test_annealing_ends_with_another_weight_and_a_new_adam(method, before, reset):
    def by_hand(module, batch):
        weight = before if module.trainer.global_step < 3 else 5.0
        return environment_step(module, batch) + weight * plain_penalty(method, "domainbed", module, *batch, {})

    ours, plain = Adam(environment_step), Adam(by_hand)
    ours.renewed, plain.renewed = False, reset
    technique = InvariancePenalty(method, 2, 5.0, group_key="2", anneal_steps=3, reset_optimizer=reset)
    fit(ours, technique, loader=toy_loader())
    fit(plain, loader=toy_loader())
    assert same_weights(ours, plain, atol=1e-5)  # Adam divides small differences by small numbers


def _annealed(method, reset, loader=None, **options):
    """Weights and Adam's state after 3 steps of annealing and 5 others."""
    model = Adam(environment_step)
    model.renewed = False
    technique = InvariancePenalty(method, 2, 5.0, group_key="2", anneal_steps=3, reset_optimizer=reset)
    trainer = fit(model, technique, loader=toy_loader() if loader is None else loader, **options)
    moments = {
        f"{number} {name}": value
        for number, state in trainer.optimizers[0].state_dict()["state"].items()
        for name, value in state.items()
    }
    return weights_of(model), moments


def _annealed_on_ranks(method, reset):
    loader = toy_loader(batch_size=4, sampler=DistributedSampler(range(32), shuffle=False))
    return _annealed(method, reset, loader, use_distributed_sampler=False, **TWO_RANKS)


@pytest.mark.parametrize("method", ["vrex", "fishr", "clove"])
def test_two_ranks_forget_adams_moments_as_one_does(two_processes, method):
    weights, moments = _annealed(method, True)
    (first, state), (second, other) = two_processes.run(_annealed_on_ranks, method, True)
    assert same_weights(first, second)
    assert same_weights(state, other)
    assert {value.item() for name, value in state.items() if name.endswith("step")} == {5}
    assert same_weights(first, weights, atol=1e-5)
    assert same_weights(state, moments, atol=1e-5)
    kept, steps = _annealed(method, False)
    assert {value.item() for name, value in steps.items() if name.endswith("step")} == {8}
    assert not same_weights(kept, weights, atol=1e-3)


def test_fishr_averages_while_it_waits():
    waits, at_once = (
        InvariancePenalty("fishr", 2, weight, group_key="2", anneal_steps=steps) for weight, steps in ((1.0, 9), (0, 0))
    )
    ours, plain = Classifier(environment_step), Classifier(environment_step)
    fit(ours, waits, loader=toy_loader())
    fit(plain, at_once, loader=toy_loader())
    assert same_weights(ours, plain)
    assert waits.state_dict()["average"].shape == (2, 3 * 9)
    assert at_once.state_dict() == {}


@pytest.mark.parametrize("method", METHODS)
def test_ignored_samples_and_class_weights_leave_the_penalty_of_the_others(method):
    weight = torch.tensor([1.0, 2.0, 3.0])

    def masked(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1], weight=weight, ignore_index=2)

    def by_hand(module, batch):
        kept = [rows[batch[1] != 2] for rows in batch]
        return masked(module, batch) + 0.3 * plain_penalty(method, "rfc", module, *kept, {})

    ours, plain = Classifier(masked), Classifier(by_hand)
    fit(ours, InvariancePenalty(method, 2, 0.3, group_key="2", form="rfc"), loader=toy_loader(), max_epochs=1)
    fit(plain, loader=toy_loader(), max_epochs=1)
    assert same_weights(ours, plain, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_one_binary_logit(method):
    def binary(module, batch):
        return F.binary_cross_entropy_with_logits(module(batch[0])[:, 0], (batch[1] > 0).float())

    class Binary(Classifier):
        def __init__(self, step):
            super().__init__(step)
            self.net[3] = nn.Linear(8, 1)

    torch.manual_seed(0)
    module = Binary(binary)
    before = weights_of(module)
    trainer = fit(module, InvariancePenalty(method, 2, 0.3, group_key="2"), loader=toy_loader(), max_epochs=1)
    value = trainer.callback_metrics["reg/invariance_penalty/penalty"]
    assert value.isfinite()
    assert not same_weights(module, before)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_of_unlike_batches_are_one(two_processes, method):
    make = partial(InvariancePenalty, method, **TABLE | {"weight": 0.05})
    ranks_agree(Case(make=make, neutral=None), two_processes)


@pytest.mark.parametrize("method", ["vrex", "sd", "iga", "fishr", "clove"])
def test_half_precision(method):
    precision(Case(make=partial(InvariancePenalty, method, **TABLE | {"weight": 0.05}), neutral=None))


def test_a_classifier_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.tensor(i % 3), "env": i % 2} for i in range(8)]

    def step(module, batch):
        return module.net(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    for method in ("fishr", "iga"):
        module = Classifier(step)
        module.net = transformers.BertForSequenceClassification(config)
        trainer = fit(
            module,
            InvariancePenalty(method, 2, 1.0, group_key="env"),
            loader=DataLoader(rows, 4),
            max_epochs=1,
        )
        assert trainer.callback_metrics["reg/invariance_penalty/penalty"] > 0


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(step, sentence, loader=None, module=Classifier, **arguments):
    technique = InvariancePenalty(**{"num_groups": 2, "weight": 1.0, "group_key": "2"} | arguments)
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(module(step), technique, loader=toy_loader() if loader is None else loader, max_epochs=1)


def of_features(module, batch):
    return F.cross_entropy(module.net[:1](batch[0])[:, :3], batch[1])


def twice(module, batch):
    module(batch[0])
    return environment_step(module, batch)


def log_probabilities(module, batch):
    return F.nll_loss(module(batch[0]).log_softmax(1), batch[1])


def weighted_binary(module, batch):
    return F.binary_cross_entropy_with_logits(
        module(batch[0]), F.one_hot(batch[1], 3).float(), pos_weight=torch.tensor([1.0, 2.0, 1.0])
    )


def several_labels(module, batch):
    return F.binary_cross_entropy_with_logits(module(batch[0]), F.one_hot(batch[1], 3).float())


def squares(module, batch):
    return F.mse_loss(module(batch[0]), batch[0][:, :3])


@pytest.mark.parametrize(
    ("step", "arguments", "sentence"),
    [
        (environment_step, {"num_groups": 1, "method": "vrex"}, "there is a group 1, and num_groups=1"),
        (environment_step, {"method": "fishr", "head": "net.0"}, "got|does not get what the head 'net.0' puts out"),
        (environment_step, {"method": "fishr", "head": "net.1"}, r"\(head='net.1'\) must name the linear layer"),
        (environment_step, {"method": "iga", "params": "nothing"}, "nothing"),
        (of_features, {"method": "fishr"}, "the head 'net.3' has got nothing in this step"),
        (of_features, {"method": "fishr", "head": "net.0"}, "the loss does not get what the head 'net.0' puts out"),
        (twice, {"method": "fishr"}, r"the head 'net.3' has got \(8, 8\), \(8, 8\) in this step"),
        (log_probabilities, {"method": "sd"}, 'gets log-probabilities, and method="sd" is about logits'),
        (weighted_binary, {"method": "irm"}, "has a `pos_weight`, which this penalty does not know"),
        (several_labels, {"method": "clove"}, "has 3 labels for each sample"),
        (squares, {"method": "irm"}, "has no class logits"),
    ],
)
def test_misuse_is_told_at_the_first_step(step, arguments, sentence):
    refused(step, sentence, **arguments)


def test_a_module_without_a_linear_layer_has_no_gradients_for_fishr():
    class Still(Classifier):
        def __init__(self, step):
            super().__init__(step)
            self.net = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 3, 1), nn.Flatten())

    refused(environment_step, "has no linear layer whose gradients", module=Still, method="fishr")


def test_gradients_of_gradients_are_not_compiled(monkeypatch):
    monkeypatch.setattr("lightning_reg.engine.host.lightning.is_compiled", lambda module: True)
    refused(environment_step, "differentiates gradients, which torch.compile cannot", method="iga")


def test_what_goes_with_any_loss_goes_with_log_probabilities_and_numbers():
    for step, method in ((log_probabilities, "irm"), (log_probabilities, "fishr"), (squares, "vrex"), (squares, "iga")):
        trainer = fit(Classifier(step), InvariancePenalty(method, 2, 1.0, group_key="2"), loader=toy_loader())
        assert math.isfinite(trainer.callback_metrics["reg/invariance_penalty/penalty"])


def test_mixed_samples_are_refused():
    with pytest.raises(MisconfigurationException, match="a mixed sample is of two environments"):
        fit(Classifier(), Mixup(), InvariancePenalty("vrex", 2, 1.0, group_key="1"), max_epochs=1)
