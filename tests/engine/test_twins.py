"""``pytorch_lightning``, the twin of ``lightning.pytorch``; in processes of their own: an import is for good."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALONE = """
import sys
import pytorch_lightning
from tests.toys import Classifier, Halve, IndexRecorder, Penalty, Term, WeightsByLabel, fit, make_loader, same_weights

assert Classifier.__mro__[1] is pytorch_lightning.LightningModule
assert issubclass(Term, pytorch_lightning.Callback)


def by_hand(module, batch):
    x, y = batch
    logits = module(x)
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    term, penalty = 0.1 * logits.square().mean(1), 0.01 * sum(p.square().sum() for p in module.parameters())
    return ((1 + 0.5 * y) * losses).mean() + term.mean() + penalty


import torch

ours, hand, recorder = Classifier(), Classifier(step=by_hand), IndexRecorder()
trainer = fit(ours, WeightsByLabel(), Term(), Penalty(), recorder)
fit(hand)
assert same_weights(ours, hand, atol=1e-6)
assert recorder.indices == [list(range(start, start + 8)) for start in (0, 8, 16, 24)] * 2
assert len(trainer.callbacks) == 4 and "training_step" not in trainer.strategy.__dict__
fit(Classifier(), Halve(), max_steps=1)
assert "lightning.pytorch" not in sys.modules, "the other twin was imported too"
print("fine")
"""

BOTH = """
import {first}
import {second}
import lightning.pytorch, pytorch_lightning, torch
from lightning_reg import LossMixin
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import Term, Penalty, make_loader, same_weights

trained = []
for twin in (lightning.pytorch, pytorch_lightning):
    class Module(twin.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(6, 3)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Mixed(LossMixin, Module):
        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            losses = torch.nn.functional.cross_entropy(logits, batch[1], reduction="none")
            return self.reduce_loss(losses, logits=logits)

    for kind in (Module, Mixed):
        module, plain = kind(), kind()
        for m, callbacks in ((module, [Term(), Penalty()]), (plain, [])):
            trainer = twin.Trainer(
                max_epochs=1, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )
            trainer.fit(m, make_loader())
            assert trainer.callbacks == callbacks
        assert not same_weights(module, plain, atol=1e-3)
        trained.append(module)
assert same_weights(trained[0], trained[2]) and same_weights(trained[1], trained[3])
assert same_weights(trained[0], trained[1], atol=1e-6)
print("fine")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(ALONE, id="pytorch_lightning alone"),
        pytest.param(BOTH.format(first="pytorch_lightning", second="lightning.pytorch"), id="both"),
    ],
)
def test_twins(script):
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stderr
