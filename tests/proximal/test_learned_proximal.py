"""Learned proximal networks: proximal matching, the convex network, what is read off it, and inverse problems."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import LPN, NonNegative, ProximalMatching, ProximalMatchingLoss, WeightCompander
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import matches
from lightning_reg.functional import (
    inverse_prox,
    largest_eigenvalues,
    learned_regularizer,
    pgd,
    pnp_admm,
    proximal_matching_gamma,
    proximal_matching_loss,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds import network as network_laws
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.kinds.procedure import ProcedureCase
from tests.conformance.problems import seeded
from tests.toys import QUIET, Classifier, StepLosses, fit, make_loader, make_tensors, make_trainer, same_weights

pytestmark = QUIET

BIASES = ["net.body*.bias", "net.head.bias"]
SMOOTH = torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]]) / 16
MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 0.25]], dtype=torch.double)
ROWS = torch.tensor([[0.5, -1.0, 0.25], [1.5, 0.3, -0.7]], dtype=torch.double)


def forwards(x):
    return x @ MATRIX.to(x).T


def backwards(y):
    return y @ MATRIX.to(y)


def kept(name=None, **options):
    """Two in one Trainer keep different weights: a second projection of the same would change nothing."""
    return NonNegative(**{"params": BIASES[:1] if name == "two" else BIASES[1:], "name": name, **options})


class KeptByHand(Hand):
    def latent(self, name, weight):
        return (weight.relu(), lambda here: here) if matches(name, self.technique.params) else None  # at the start

    def follow(self, loop):
        with torch.no_grad():
            for name, leaf in loop.leaves.items():
                if matches(name, self.technique.params):
                    leaf.copy_(leaf.relu())


class MatchedByHand(Hand):
    """Always of the last width."""

    def losses(self, output, moment):
        return 1 - torch.exp(-(output - moment.y).square().sum(1) / 2.0**2)


def made(*args, negative=False, **options):
    """A network whose weights are of a size at which its layers count, some of them negative if asked for."""
    with seeded(0):
        network = LPN(*args, **options)
        for layer in (*network.inner, network.last):
            size = layer.weight[0].numel()
            nn.init.normal_(layer.weight, 1 / size, 1 / size)
            layer.weight.data = layer.weight.data if negative else layer.weight.data.abs()
    return network


def steep():
    return made([3], hidden=5, layers=2, alpha=0.25).double()


CASE = (
    Case(
        make=kept,
        neutral=partial(kept, minimum=-100.0),
        by_hand=KeptByHand,
        says=("['net.head.bias'] at least 0", "['net.head.bias'] at least -100", "net.*.weight at least -0.05"),
        also=["regression", "images"],
        variants=[partial(NonNegative, "net.*.weight", minimum=-0.05)],
        invalid=[({"minimum": math.inf}, "minimum")],
    ),
    Case(
        make=partial(ProximalMatching, gamma_min=2.0, widths=1, pretrain=0.0),  # stages go by steps, not by batches
        neutral=partial(ProximalMatching, gamma_min=2.0, pretrain=1.0),
        by_hand=MatchedByHand,
        says=(
            "gamma 2, after 0 of the training on the module's own loss",
            "pretrain=1: inactive",
            "gamma 2 to 1 in 2 stages, after 0.25 of the training on the module's own loss",
        ),
        data="regression",
        variants=[partial(ProximalMatching, gamma_min=1.0, widths=2, pretrain=0.25, elementwise=True, loss="last")],
        invalid=[
            ({"gamma_min": 0.0}, "gamma_min"),
            ({"widths": 0}, "widths"),
            ({"pretrain": -0.1}, "pretrain"),
            ({"pretrain": 1.1}, "pretrain"),
        ],
    ),
    NetworkCase(
        make=lambda **options: made(**{"in_shape": [3], "hidden": 4, "layers": 2, "alpha": 0.1, **options}),
        inputs=(ROWS.float(),),
        invalid=[
            ({"in_shape": [2, 2]}, "in_shape"),
            ({"in_shape": [0]}, "in_shape"),
            ({"in_shape": [3], "hidden": 0}, "hidden"),
            ({"in_shape": [3], "layers": 0}, "layers"),
            ({"in_shape": [3], "beta": 0.0}, "beta"),
            ({"in_shape": [3], "alpha": -0.1}, "alpha"),
        ],
    ),
    NetworkCase(
        make=lambda **options: ProximalMatchingLoss(**{"gamma_min": 1.5, **options}),
        inputs=(ROWS.float(), 0.5 * ROWS.float().flip(1)),
        invalid=[
            ({"gamma_min": 0.0}, "gamma_min"),
            ({"stages": 0}, "stages"),
            ({"steps": 0}, "steps"),
            ({"pretrain_steps": 40_000}, "pretrain_steps"),
            ({"pretrain_steps": -1}, "pretrain_steps"),
            ({"elementwise": "no"}, "elementwise"),
            ({"reduction": "none"}, "reduction"),
        ],
    ),
    ProcedureCase(
        pgd,
        steep,
        (ROWS[:, :2],),
        {"operator": forwards, "adjoint": backwards, "iterations": 20},
        [({"step": 2.0}, "step"), ({"step": 0.0}, "step"), ({"iterations": 0}, "iterations")],
    ),
    ProcedureCase(
        pnp_admm,
        steep,
        (ROWS[:, :2],),
        {"operator": forwards, "adjoint": backwards, "iterations": 20},
        [
            ({"penalty": 0.5}, "penalty"),
            ({"penalty": -1.0}, "penalty"),
            ({"iterations": 0}, "iterations"),
            ({"solver_iterations": 0}, "solver_iterations"),
        ],
    ),
    *(
        ProcedureCase(one, steep, (ROWS,), {}, [({"iterations": 0}, "iterations"), ({"tolerance": 0.0}, "tolerance")])
        for one in (inverse_prox, learned_regularizer)
    ),
)

# -- proximal matching ------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    x, y = [[0.0, 1.0], [3.0, -4.0]], [[0.5, 1.0], [0.0, 0.0]]
    each = [1 - math.exp(-(0.5**2) / 9), 1 - math.exp(-25 / 9)]
    one, two = (torch.tensor(rows, dtype=torch.double) for rows in (x, y))
    assert proximal_matching_loss(one, two, 3.0, reduction="none").tolist() == pytest.approx(each, rel=1e-14)
    assert float(proximal_matching_loss(one, two, 3.0)) == pytest.approx(sum(each) / 2, rel=1e-14)
    assert float(proximal_matching_loss(one, two, 3.0, reduction="sum")) == pytest.approx(sum(each), rel=1e-14)
    alone = [[1 - math.exp(-((a - b) ** 2) / 9) for a, b in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)]
    elements = proximal_matching_loss(one, two, 3.0, elementwise=True, reduction="none")
    assert elements.flatten().tolist() == pytest.approx([*alone[0], *alone[1]], rel=1e-14)
    numbers = proximal_matching_loss(one[:, 1], two[:, 1], 3.0, reduction="none")  # (B,): one number of a sample
    assert numbers.tolist() == pytest.approx([alone[0][1], alone[1][1]], rel=1e-14, abs=1e-15)


def test_the_loss_at_its_limits():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert float(proximal_matching_loss(x.detach(), x.detach(), 0.1)) == 0.0
    assert float(proximal_matching_loss(x.detach(), x.detach() + 10, 0.1)) == 1.0
    near = x.detach() + 1e-3
    wide = proximal_matching_loss(x, near, 1e3)  # r^2 / gamma^2, far below what 1 - exp() can tell from 0
    assert float(wide.detach()) == pytest.approx(2e-6 / 1e6, rel=1e-3)
    (gradient,) = torch.autograd.grad(wide, x)
    assert gradient.flatten().tolist() == pytest.approx([-2e-3 / 1e6] * 2, rel=1e-3)
    assert proximal_matching_loss(x.bfloat16(), near.bfloat16(), 1.0).dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"gamma": 0.0}, "gamma"), ({"gamma": 1.0, "reduction": "median"}, "reduction"), ({"gamma": math.nan}, "gamma")],
)
def test_arguments_of_the_loss(options, argument):
    with pytest.raises(ValueError, match=f"proximal_matching_loss: `{argument}`"):
        proximal_matching_loss(ROWS, ROWS, **options)
    with pytest.raises(ValueError, match="proximal_matching_loss: `targets` must be of the shape"):
        proximal_matching_loss(ROWS, ROWS[:1], 1.0)


# get_loss_hparams_and_lr of lpn/utils/utils.py with its defaults, Sulam-Group/learned-proximal-networks, commit
# cbc3cfa.
WIDTHS = {0: None, 19_999: None, 20_000: 8, 24_999: 8, 25_000: 4, 30_000: 2, 34_999: 2, 35_000: 1, 39_999: 1, 99_999: 1}


@pytest.mark.parametrize(("step", "times"), WIDTHS.items())
def test_the_schedule_is_that_of_the_authors(step, times):
    wanted = None if times is None else 2.24 * times
    assert proximal_matching_gamma(step, 2.24) == wanted
    loss, (x, y) = ProximalMatchingLoss(2.24), (ROWS, ROWS.flip(0))
    assert loss.gamma(step) == wanted
    value = F.l1_loss(x, y) if wanted is None else proximal_matching_loss(x, y, wanted)
    assert float(loss(x, y, step)) == float(value)
    assert float(loss(x, y)) == float(proximal_matching_loss(x, y, 2.24))


def test_stages_of_a_short_training():
    widths = [proximal_matching_gamma(step, 1.0, steps=12, pretrain_steps=2, stages=3) for step in range(14)]
    assert widths == [None] * 2 + [4.0] * 3 + [2.0] * 3 + [1.0] * 6
    assert proximal_matching_gamma(0, 1.0, steps=2, pretrain_steps=0, stages=4) == 8.0


# -- the network ------------------------------------------------------------------------------------------------------

SHAPES = {"vectors": [3], "images": [2, 5, 4]}


def of_shape(kind, **options):
    return made(SHAPES[kind], hidden=3, layers=2, negative=True, **options).double()


@pytest.mark.parametrize("law", network_laws.LAWS.values())
def test_laws_of_networks_on_images(law):
    inputs = (torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2),)
    law(NetworkCase(make=partial(made, [1, 2, 2], hidden=2, layers=1, alpha=0.1), inputs=inputs))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_its_jacobian_is_symmetric_and_not_negative(kind, alpha):
    network = of_shape(kind, alpha=alpha)
    assert any(bool((layer.weight < 0).any()) for layer in network.inner)
    with seeded(1):
        points = torch.randn(4, 1, *SHAPES[kind], dtype=torch.double)
    for point in points:
        size = point.numel()
        jacobian = torch.autograd.functional.jacobian(network, point).reshape(size, size)
        torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12)
        assert float(torch.linalg.eigvalsh(jacobian)[0]) >= 2 * alpha - 1e-10
        assert float(torch.linalg.eigvalsh(jacobian)[-1]) > 2 * alpha + 0.01


@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_the_gradient_of_its_potential(kind):
    network = of_shape(kind, alpha=0.1)
    y = torch.linspace(-1, 1, 2 * math.prod(SHAPES[kind]), dtype=torch.double).reshape(2, *SHAPES[kind])
    flat, step = network(y).detach().flatten(), 1e-6
    for position in range(y.numel()):
        offset = torch.zeros_like(y)
        offset.view(-1)[position] = step
        rise = float((network.potential(y + offset) - network.potential(y - offset)).detach().sum()) / (2 * step)
        assert float(flat[position]) == pytest.approx(rise, abs=1e-8)


def test_without_layers_that_count_it_scales_its_input():
    network = LPN([3], alpha=0.35)
    nn.init.zeros_(network.last.weight)
    nn.init.zeros_(network.straight.weight)
    torch.testing.assert_close(network(ROWS), 0.7 * ROWS.float())


def test_negative_weights_count_as_zero_and_have_the_gradient_that_they_would_have():
    network, bounded = (made([3], hidden=3, layers=1, negative=True).double() for _ in range(2))
    for layer in (*bounded.inner, bounded.last):
        layer.weight.data.clamp_(min=0)
    assert torch.equal(network(ROWS), bounded(ROWS))
    for one in (network, bounded):
        one(ROWS).square().sum().backward()
    assert torch.equal(network.inner[0].weight.grad, bounded.inner[0].weight.grad)
    assert bool((network.inner[0].weight.grad[network.inner[0].weight < 0] != 0).any())


# Parameters in the order of the authors' modules; the k-th has cos(0.7 n + k) / sqrt(inputs), squared where it must not
# be negative. exps/laplacian/network.py and lpn/networks/lpn_mnist.py, LPN.forward, of
# Sulam-Group/learned-proximal-networks, commit cbc3cfa.
AUTHORS_1D = [0.258914591915745, -0.3456457341432144, 0.35497472292442817, -0.25795276977936105]
AUTHORS_28 = [0.00012685473112074216, 0.007359021257898656, 0.01382159678991853, 0.39762305388869745]


def as_the_authors(network):
    weights, skips = [network.first.weight], []
    for inner, skip in zip(network.inner, network.skips, strict=True):
        weights.append(inner.weight)
        skips += [skip.weight, skip.bias]
    weights.append(network.last.weight)
    skips += [] if network.straight is None else [network.straight.weight]
    nn.init.zeros_(network.first.bias)
    for k, weight in enumerate([*weights, *skips]):
        inputs = weight[0].numel() if weight.dim() > 1 else len(weight)
        values = torch.cos(0.7 * torch.arange(weight.numel(), dtype=torch.double) + k) / math.sqrt(inputs)
        weight.data.copy_((values.square() if 0 < k < len(weights) else values).reshape(weight.shape))
    return network


def test_it_gives_what_the_authors_networks_give():
    small = as_the_authors(LPN([2], hidden=3, layers=2).double())
    y = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.double)
    assert small(y).flatten().tolist() == pytest.approx(AUTHORS_1D, rel=1e-12)
    large = as_the_authors(LPN([1, 28, 28], hidden=2, alpha=0.01).double())
    images = torch.sin(0.37 * torch.arange(784, dtype=torch.double)).reshape(1, 1, 28, 28)
    given = large(images).detach()
    assert [*given[0, 0, 0, :3].tolist(), float(given.norm())] == pytest.approx(AUTHORS_28, rel=1e-9)


def test_it_leaves_the_batch_alone_and_keeps_a_graph_only_where_gradients_are_recorded():
    network, y = made([3]), ROWS.float()
    trained = network(y)
    assert trained.requires_grad
    assert not y.requires_grad
    with torch.no_grad():
        assert not network(y).requires_grad
    with torch.inference_mode():
        assert torch.equal(network(y.clone()), trained)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(y), trained)
    with pytest.raises(ValueError, match=r"LPN: `y` must be of shape \(B, 3\), got \(2, 2\)"):
        network(y[:, :2])


# -- what is read off it ----------------------------------------------------------------------------------------------


def test_the_regularizer_of_a_quadratic_by_hand():
    network = LPN([3], alpha=0.2).double()
    nn.init.zeros_(network.last.weight)
    nn.init.zeros_(network.straight.weight)
    torch.testing.assert_close(inverse_prox(network, ROWS), ROWS / 0.4)
    wanted = [(1 / 0.8 - 0.5) * sum(value**2 for value in row) for row in ROWS.tolist()]
    got = learned_regularizer(network, ROWS) + network.potential(torch.zeros_like(ROWS)).detach()
    assert got.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_inverse_is_one_and_the_network_the_proximal_operator_of_the_regularizer(kind):
    network = of_shape(kind, alpha=0.05)
    with seeded(2):
        y = torch.randn(3, *SHAPES[kind], dtype=torch.double)
        x = network(y).detach()
        torch.testing.assert_close(network(inverse_prox(network, x, tolerance=1e-9)), x, atol=1e-7, rtol=0)
        at_prox = learned_regularizer(network, x) + 0.5 * (x - y).flatten(1).square().sum(1)
        for _ in range(3):
            other = network(y + torch.randn_like(y)).detach()
            value = learned_regularizer(network, other) + 0.5 * (other - y).flatten(1).square().sum(1)
            assert bool((value > at_prox).all())


def test_what_is_outside_the_range_is_told():
    network = made([3]).double()  # without alpha its slopes are bounded
    x = torch.stack([network(ROWS)[0].detach(), torch.full((3,), 1e3, dtype=torch.double)])
    assert learned_regularizer(network, x).isnan().tolist() == [False, True]
    assert inverse_prox(network, x).isnan().all(1).tolist() == [False, True]


# -- inverse problems -------------------------------------------------------------------------------------------------


class Shrinks(nn.Module):
    """The proximal operator of (1/s - 1) |x|^2 / 2."""

    def __init__(self, share=0.6):
        super().__init__()
        self.share = share

    def forward(self, y):
        return self.share * y


def test_norms_of_operators_by_row():
    eigen = float(torch.linalg.eigvalsh(MATRIX.T @ MATRIX)[-1])
    assert largest_eigenvalues(forwards, backwards, ROWS).flatten().tolist() == pytest.approx([eigen] * 2, rel=1e-9)
    masks = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.1, 0.0]], dtype=torch.double)
    rows = largest_eigenvalues(lambda x: masks * x, lambda y: masks * y, ROWS)
    assert rows.tolist() == [pytest.approx([4.0], rel=1e-9), pytest.approx([0.25], rel=1e-9)]
    assert largest_eigenvalues(lambda x: 0 * x, lambda y: 0 * y, ROWS).tolist() == [[0.0], [0.0]]


def test_fixed_points_by_hand():
    y, gram = ROWS[:, :2], MATRIX.T @ MATRIX
    ours = pgd(Shrinks(), y, forwards, backwards, step=0.4, iterations=400)
    # x = s (x - eta (G x - A'y))
    system = (1 / 0.6 - 1) * torch.eye(3, dtype=torch.double) + 0.4 * gram
    torch.testing.assert_close(ours, torch.linalg.solve(system, 0.4 * y @ MATRIX, left=False))
    ours = pnp_admm(Shrinks(), y, forwards, backwards, penalty=2.0, iterations=400)
    # (G + rho (1/s - 1)) x = A'y
    system = gram + 2.0 * (1 / 0.6 - 1) * torch.eye(3, dtype=torch.double)
    torch.testing.assert_close(ours, torch.linalg.solve(system, y @ MATRIX, left=False))


def test_first_steps_by_hand():
    y, eye = ROWS[:, :2], torch.eye(3, dtype=torch.double)
    x = y @ MATRIX
    wanted = 0.6 * (x - 0.4 * (x @ MATRIX.T - y) @ MATRIX)
    torch.testing.assert_close(pgd(Shrinks(), y, forwards, backwards, step=0.4, iterations=1), wanted)
    z, u, back = x, torch.zeros_like(x), x
    for _ in range(2):
        x = torch.linalg.solve(MATRIX.T @ MATRIX + 2.0 * eye, back + 2.0 * (z - u), left=False)
        u = u + x - z
        z = 0.6 * (x + u)
    torch.testing.assert_close(pnp_admm(Shrinks(), y, forwards, backwards, penalty=2.0, iterations=2), x)


def test_conditions_are_checked_and_can_be_left():
    y, norm = ROWS[:, :2], float(torch.linalg.eigvalsh(MATRIX.T @ MATRIX)[-1])
    with pytest.raises(ValueError, match=rf"pgd: `step` must be below 1 / .* = {1 / norm:.4g}, got 0.9: beyond it"):
        pgd(Shrinks(), y, forwards, backwards, step=0.9)
    with pytest.raises(ValueError, match=rf"pnp_admm: `penalty` must be above .* = {norm:.4g}, got 0.05: below it"):
        pnp_admm(Shrinks(), y, forwards, backwards, penalty=0.05)
    free = pgd(Shrinks(), y, forwards, backwards, step=0.9, iterations=1, check=False)
    assert float((free - pgd(Shrinks(), y, forwards, backwards, iterations=1)).abs().max()) > 1e-3
    pnp_admm(Shrinks(), y, forwards, backwards, penalty=0.05, iterations=1, check=False)
    # Without a number the condition holds of itself, for an operator of zeros too.
    assert pgd(Shrinks(), 0 * y, lambda x: 0 * x[:, :2], lambda y: F.pad(y, (0, 1))).isfinite().all()


@pytest.mark.parametrize(
    "made",
    [
        lambda physics: physics.Blur(filter=SMOOTH, padding="circular"),
        lambda physics: physics.Inpainting(img_size=(1, 6, 6), mask=(torch.arange(36) % 3 > 0).view(1, 6, 6)),
        lambda physics: physics.Downsampling(img_size=(1, 6, 6), factor=2, filter=SMOOTH, padding="circular"),
    ],
    ids=["blur", "inpainting", "downsampling"],
)
def test_operators_of_deepinv_fit(made):
    physics = made(import_module("deepinv.physics"))  # three seconds: not for those who run other tests of this file
    y = physics.A(torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    matrix = physics.A(torch.eye(36).view(36, 1, 6, 6)).flatten(1).T
    gram, back = matrix.T @ matrix, matrix.T @ y.flatten(1).T
    norm, eye = float(torch.linalg.eigvalsh(gram)[-1]), torch.eye(36)
    step, penalty = 0.9 / norm, 1.1 * norm
    ours = pgd(Shrinks(), y, physics.A, physics.A_adjoint, step=step, iterations=200)
    wanted = torch.linalg.solve((1 / 0.6 - 1) * eye + step * gram, step * back)
    torch.testing.assert_close(ours.flatten(1).T, wanted)
    ours = pnp_admm(Shrinks(), y, physics.A, physics.A_adjoint, penalty=penalty, iterations=200)
    wanted = torch.linalg.solve(gram + penalty * (1 / 0.6 - 1) * eye, back)
    torch.testing.assert_close(ours.flatten(1).T, wanted)


# -- weights that are not negative ------------------------------------------------------------------------------------


class Decayed(Classifier):
    """Trained by AdamW."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.3)


def by_hand(every=1, epochs=2):
    model = Decayed()
    optimizer = model.configure_optimizers()
    x, y = make_tensors()
    model.net[0].weight.data[model.net[0].weight < 0] = 0.0
    for _ in range(epochs):
        batches = list(zip(x.split(8), y.split(8), strict=True))
        for position, (inputs, labels) in enumerate(batches, 1):
            (F.cross_entropy(model.net(inputs), labels) / every).backward()
            if position % every == 0 or position == len(batches):
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    weight = model.net[0].weight
                    weight[weight < 0] = 0.0
    return model


@pytest.mark.parametrize("every", [1, 2])
def test_beside_the_decay_of_adamw_it_projects_what_the_step_made(every):
    model = Decayed()
    fit(model, NonNegative("net.0.weight"), max_epochs=2, accumulate_grad_batches=every)
    assert same_weights(model, by_hand(every), atol=1e-6)
    assert float(model.net[0].weight.detach().min()) == 0.0
    assert bool((model.net[3].weight < 0).any())


def test_the_share_at_the_bound_is_logged():
    model = Decayed()
    trainer = fit(model, NonNegative(["net.0.weight", "net.3.*"]), max_epochs=1)
    chosen = torch.cat([p.detach().flatten() for p in (model.net[0].weight, *model.net[3].parameters())])
    share = float((chosen <= 0).double().mean())
    assert 0 < share < 1
    assert float(trainer.logged_metrics["reg/non_negative/share_at_minimum"]) == pytest.approx(share)


def test_a_weight_that_is_trained_through_a_map_is_refused_and_others_are_not():
    for layers, params in ((["net.0"], ["net.*.weight"]), ("auto", "net.3.weight")):
        with pytest.raises(
            MisconfigurationException,
            match=r"^NonNegative and WeightCompander cannot stand together on 'net\.\d\.weight': .* Take it out of one",
        ):
            fit(Classifier(), NonNegative(params), WeightCompander(layers), max_epochs=1)
    model = Classifier()
    fit(model, NonNegative("net.0.weight"), WeightCompander(["net.3"]), max_epochs=1)
    assert float(model.net[0].weight.detach().min()) == 0.0


def test_a_pattern_without_a_match_is_refused():
    with pytest.raises(MisconfigurationException, match=r"^NonNegative\(params=\['net.0.wait'\]\): no parameter has"):
        fit(Classifier(), NonNegative(["net.0.weight", "net.0.wait"]), max_epochs=1)


# -- trained ----------------------------------------------------------------------------------------------------------


class Denoiser(Classifier):
    """A LPN that takes noise off numbers; validated in Lightning's inference mode."""

    def __init__(self):
        super().__init__()
        self.net = made([1], hidden=4, layers=1)
        self.criterion = ProximalMatchingLoss(0.5, stages=2, steps=8, pretrain_steps=4)

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[1]), batch[0], self.global_step)

    def validation_step(self, batch, batch_idx):
        self.log("error", (self.net(batch[1]) - batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Plain(Denoiser):
    """With the mean absolute error in its step, as anybody would write it."""

    def training_step(self, batch, batch_idx):
        return F.l1_loss(self.net(batch[1]), batch[0])


@pytest.mark.parametrize("elementwise", [False, True])
def test_the_callback_gives_an_unchanged_step_the_loss_of_the_module(elementwise):
    x, y = ROWS.float().repeat(8, 1), ROWS.float().flip(1).repeat(8, 1) + torch.arange(16)[:, None] / 8
    pairs, losses = torch.utils.data.TensorDataset(x, y), []
    for model, callbacks in ((Denoiser(), []), (Plain(), [ProximalMatching(0.5, widths=2, elementwise=elementwise)])):
        model.net = made([3], hidden=4, layers=1)
        model.criterion = ProximalMatchingLoss(0.5, stages=2, steps=8, pretrain_steps=4, elementwise=elementwise)
        kept = StepLosses()
        trainer = make_trainer(callbacks=[*callbacks, kept], max_epochs=4)
        trainer.fit(model, make_loader(pairs), make_loader(pairs))
        losses.append(kept.losses)
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert float(trainer.logged_metrics["reg/proximal_matching/gamma"]) == 0.5


def test_the_callback_refuses_what_is_no_regression_in_the_first_step():
    losses = StepLosses()
    with pytest.raises(MisconfigurationException, match=r"^ProximalMatching compares .* in F.cross_entropy"):
        fit(Classifier(), ProximalMatching(1.0), losses, max_epochs=2)
    assert not losses.losses
    with pytest.raises(MisconfigurationException, match=r"^ProximalMatching has stages in shares .* `max_steps`\.$"):
        fit(Classifier(), ProximalMatching(1.0), max_epochs=-1)
    assert ProximalMatching(1.0).gamma(3) is None


def test_a_denoiser_trains_and_is_validated_in_lightning():
    with seeded(3):
        x = torch.distributions.Laplace(0.0, 1.0).sample((32, 1))
        pairs = torch.utils.data.TensorDataset(x, x + torch.randn_like(x))
    model, hand, losses = Denoiser(), Denoiser(), StepLosses()
    trainer = make_trainer(callbacks=[NonNegative(["net.inner.*", "net.last.*"]), losses])
    trainer.fit(model, make_loader(pairs), make_loader(pairs))
    optimizer, wanted = hand.configure_optimizers(), []
    for step in range(8):
        clean, noisy = pairs[8 * (step % 4) : 8 * (step % 4) + 8]
        error = hand.net(noisy) - clean
        gamma = {0: None, 1: 1.0, 2: 0.5}[max(step - 2, 0) // 2]
        loss = error.abs().mean() if gamma is None else (1 - torch.exp(-(error[:, 0] ** 2) / gamma**2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in (*hand.net.inner, hand.net.last):
            layer.weight.data.clamp_(min=0)
        wanted.append(loss.item())
    assert losses.losses == pytest.approx(wanted, abs=1e-6)
    assert same_weights(model.net, hand.net, atol=1e-5)
    (found,) = trainer.validate(model, make_loader(pairs), verbose=False)
    assert found["error"] == pytest.approx(float((hand.net(pairs.tensors[1]) - x).detach().square().mean()), abs=1e-5)
