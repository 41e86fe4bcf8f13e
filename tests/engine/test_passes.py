"""Training batches sent through the module once more, of which nothing remains but what it keeps itself."""

import pytest
import torch
from torch import nn

from lightning_reg.engine.run.passes import replay_step
from tests.toys import QUIET, Classifier, make_trainer

pytestmark = QUIET
X, Y = torch.ones(4, 6), torch.tensor([0, 1, 2, 0])


class Noted(Classifier):
    """Notes what its methods get; a step under manual optimization would train."""

    def __init__(self, automatic):
        super().__init__()
        self.automatic_optimization = automatic
        self.norm, self.calls = nn.BatchNorm1d(6), []

    def forward(self, x):
        self.calls.append(("forward", x))
        return super().forward(self.norm(x))

    def training_step(self, batch, batch_idx):
        self.calls.append(("step", batch_idx))
        assert not torch.is_grad_enabled()
        self.log("loss", 1.0)  # not logged: it is attached to no Trainer that could
        return super().training_step(batch, batch_idx) if self.automatic_optimization else None


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], X], ids=["tuple", "list", "tensor"])
def test_under_manual_optimization_the_module_itself_is_called(batch):
    module, trainer = Noted(automatic=False), make_trainer()
    replay_step(trainer, module, batch, 3)
    assert [name for name, _ in module.calls] == ["forward"]
    assert module.calls[0][1] is X
    assert module.norm.num_batches_tracked == 1


def test_else_its_own_training_step_runs_and_logs_nothing():
    module, trainer = Noted(automatic=True), make_trainer()
    replay_step(trainer, module, (X, Y), 3)
    assert module.calls[0] == ("step", 3)
    assert module.norm.num_batches_tracked == 1
    assert "log" not in vars(module)
