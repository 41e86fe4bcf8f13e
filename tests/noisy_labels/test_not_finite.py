"""Early-learning techniques where a forward pass is not finite: an overflow in float16, whose update is skipped."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import CoTeaching, ELRCallback, ELRPlusCallback
from lightning_reg.engine.data.memory import last_occurrences
from lightning_reg.engine.networks.peer import update_average_
from lightning_reg.engine.step import Samples
from lightning_reg.functional import elr_update_targets
from lightning_reg.noisy_labels._target_table import TargetTable
from tests.toys import QUIET

pytestmark = QUIET

SAMPLES, BATCH, EPOCHS, BAD = 24, 4, 4, 3
SAID = r"were not finite, and are left out"


class Overflows(LightningModule):
    """Its logits are infinite in one step."""

    def __init__(self, bad=BAD):
        super().__init__()
        self.bad, self.count, self.losses = bad, 0, []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        self.count += 1
        z = self.net(batch[0])
        loss = F.cross_entropy(z * math.inf if self.count == self.bad else z, batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(SAMPLES, 8, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)
    )


def fit(technique, **options):
    model = Overflows()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    fixed = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed |= {"max_epochs": EPOCHS, "enable_model_summary": False, "log_every_n_steps": 1, "plugins": [plugin]}
    trainer = Trainer(callbacks=[technique], **(fixed | options))
    trainer.fit(model, DataLoader(data(), BATCH))
    return trainer, model


def elr_by_hand(lam, beta):
    """A step that is not finite changes nothing."""
    x, y = data().tensors
    net, targets = Overflows().net, torch.zeros(SAMPLES, 3)
    count = 0
    for _ in range(EPOCHS):
        for start in range(0, SAMPLES, BATCH):
            count += 1
            if count == BAD:
                continue
            rows = slice(start, start + BATCH)
            with torch.autocast("cpu", torch.float16):
                z = net(x[rows])
            p = z.float().softmax(1).clamp(1e-4, 1 - 1e-4)
            targets[rows] = beta * targets[rows] + (1 - beta) * (p / p.sum(1, keepdim=True)).detach()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(z, y[rows])
            loss = loss + lam * (1 - (targets[rows] * p).sum(1)).log().mean()
            net.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.sub_(0.1 * parameter.grad)
    return net, targets


@pytest.mark.parametrize("options", [{}, {"table_device": "cpu"}, {"top_k": 3}])
def test_elr_goes_on_as_the_loop_that_skips_the_step(options):
    elr = ELRCallback(lam=3.0, beta=0.7, **options)
    with pytest.warns(UserWarning, match=f"ELRCallback: {BATCH} rows of predictions {SAID}") as caught:
        trainer, model = fit(elr)
    assert sum("not finite" in str(warning.message) for warning in caught) == 1
    assert sum(not math.isfinite(loss) for loss in model.losses) == 1
    net, targets = elr_by_hand(3.0, 0.7)
    # Gradients in float16.
    torch.testing.assert_close(elr._table.targets.all(), targets, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(model.net.weight.detach(), net.weight.detach(), rtol=1e-2, atol=1e-3)
    assert trainer.callback_metrics["reg/elr/not_finite"] == BATCH
    assert math.isfinite(trainer.callback_metrics["reg/elr/agreement"])


def test_elr_plus_goes_on_too():
    elr_plus = ELRPlusCallback(lam=3.0, beta=0.7, decay_rampup_steps=4)
    with pytest.warns(UserWarning, match=SAID):
        trainer, model = fit(elr_plus)
    assert sum(not math.isfinite(loss) for loss in model.losses) == 1
    for table in elr_plus._tables:
        assert table.targets.all().isfinite().all()
        assert (table.targets.all().sum(1) > 0).all()
    assert trainer.callback_metrics["reg/elr_plus/not_finite"] > 0


def test_co_teaching_says_what_it_has_not_taken_for_a_prediction():
    co_teaching = CoTeaching(0.2)
    with pytest.warns(UserWarning, match=f"CoTeaching: .* rows of predictions {SAID}"):
        trainer, _ = fit(co_teaching)
    assert trainer.callback_metrics["reg/co_teaching/not_finite"] > 0
    assert all(table.targets.all().isfinite().all() for table in co_teaching._tables)


def test_the_count_is_kept_in_checkpoints():
    elr, other = ELRCallback(), ELRCallback()
    with pytest.warns(UserWarning, match=SAID):
        fit(elr)
    other.load_state_dict(elr.state_dict())
    assert other._table.left_out.read() == BATCH


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_core_leaves_rows_that_are_not_finite_as_they_are(bad):
    targets = torch.tensor([[0.1, 0.2], [0.3, 0.1], [0.0, 0.5]])
    logits = torch.tensor([[0.0, 0.0], [bad, 0.0], [1.0, -math.inf]])
    rows = elr_update_targets(targets, torch.tensor([2, 0, 1]), logits, beta=0.5)
    share = 1e-4 / (1.0 - 1e-4 + 1e-4)
    wanted = torch.tensor([[0.1, 0.2], [0.15 + 0.5 * (1 - share), 0.05 + 0.5 * share], [0.25, 0.5]])
    torch.testing.assert_close(targets, wanted)
    torch.testing.assert_close(rows, wanted[[2, 0, 1]])


def test_of_several_rows_for_a_sample_the_last_finite_one_counts():
    zero, nan = [0.0, 0.0], [math.nan, 0.0]
    for logits, index, wanted in [
        ([zero, nan], [1, 1], [0.0, 0.25]),
        ([nan, zero], [1, 1], [0.0, 0.25]),
        ([nan, nan], [1, 1], [0.0, 0.0]),
        ([zero, nan, nan], [1, 0, 1], [0.0, 0.25]),
    ]:
        targets = torch.zeros(2, 2)
        rows = elr_update_targets(targets, torch.tensor(index), torch.tensor(logits), beta=0.5)
        assert targets[:, 0].tolist() == wanted
        assert torch.equal(rows, targets[index])


def test_last_occurrences_prefer():
    indices = torch.tensor([7, 3, 7, 5, 3])
    preferred = torch.tensor([True, False, False, True, False])
    assert last_occurrences(indices, preferred).tolist() == [0, 4, 0, 3, 4]
    assert last_occurrences(indices, torch.ones(5, dtype=torch.bool)).tolist() == last_occurrences(indices).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("distinct", [True, False])
def test_table_counts_what_is_kept_alone_and_gives_the_old_target(distinct, dtype):
    table = TargetTable("T", 4, 3, dtype)
    first = torch.tensor([[0.5, 0.25, 0.25]] * 3)
    table.update(Samples(torch.tensor([0, 1, 2]), distinct, None, 4), first, torch.tensor([0, 1, 2]), 0.5)
    second = torch.tensor([[math.nan] * 3, [0.0, 0.0, 1.0], [math.nan] * 3])
    mass = torch.tensor([1.0, 1.0, 0.0])
    rows = table.update(
        Samples(torch.tensor([2, 1, 0]), distinct, None, 4), second, torch.tensor([2, 1, -1]), 0.5, mass
    )
    assert rows[0].tolist() == [0.25, 0.125, 0.125]
    assert rows.isfinite().all()
    assert table.left_out.read() == 1
    targets, labels = table.all()
    assert targets.tolist() == [[0.25, 0.125, 0.125], [0.125, 0.0625, 0.5625], [0.25, 0.125, 0.125], [0.0, 0.0, 0.0]]
    assert labels.tolist() == [0, 1, 2, -1]


def on_rank():
    """Rank 1's prediction for sample 2 is not finite; both ranks draw sample 3, the second one without a number."""
    rank = torch.distributed.get_rank()
    table = TargetTable("T", 4, 2, "float32")
    indices = torch.tensor([[0, 3], [2, 3]][rank])
    predicted = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[math.nan, 0.5], [math.nan, 0.5]]][rank])
    table.update(Samples(indices, True, 2, 4), predicted, torch.tensor([0, 1]), 0.5)
    return table.all()[0].tolist(), table.left_out.read()


def test_ranks_take_in_finite_rows_alone(two_processes):
    one, two = two_processes.run(on_rank)
    assert one[0] == two[0] == [[0.25, 0.25], [0.0, 0.0], [0.0, 0.0], [0.25, 0.25]]
    assert (one[1], two[1]) == (0, 2)


def test_an_average_is_left_as_it_is_by_values_that_are_not_finite():
    average, params = [torch.ones(2), torch.zeros(3)], [torch.full((2,), 3.0), torch.ones(3)]
    assert update_average_(average, params, 0.75)
    assert [a.tolist() for a in average] == [[1.5, 1.5], [0.25, 0.25, 0.25]]
    params[1][2] = math.inf
    assert not update_average_(average, params, 0.75)
    assert [a.tolist() for a in average] == [[1.5, 1.5], [0.25, 0.25, 0.25]]
