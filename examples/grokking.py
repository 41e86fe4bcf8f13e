"""Sums with wrong labels: a network remembers them, finds the rule, and unlearns what contradicts it.

Run it with ``python examples/grokking.py``; it takes half a minute on a CPU and downloads nothing. It is a notebook
too: ``examples/notebooks/grokking.ipynb``.
"""

# %% [markdown]
# # To grok, and to unlearn
#
# All pairs of residues modulo 59 and their sums; on three quarters of them a network is trained, and a fifth of these
# has labels that were redrawn. So it is known which labels are wrong, and that the right ones can be found.
#
# A neuron that adds has weights that are cosines of the residue; one that remembers pairs has weights of all
# frequencies. The **inverse participation ratio** (IPR) of their spectrum tells them apart: 1 for a cosine, 0.03 for
# one residue among 59. `IPRMonitor` logs it while the network learns.

# %%
import logging
import os
import tempfile
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_reg import CorruptedModularArithmetic, IPRMonitor, QuadraticMLP, plots
from lightning_reg.functional import (
    inverse_participation_ratio,
    neuron_participation_ratios,
    prune_memorising,
    training_phase,
)

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
P, WIDTH, CORRUPTION = 59, 300, 0.2
# Steps by weight decay. It looks large, for AdamW multiplies it by the learning rate.
RUNS = {0.0: 10 if SHORT else 500, 5.0: 10 if SHORT else 120}
console = Console(width=100)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|number of training batches)")
warnings.filterwarnings("ignore", ".*no `validation_step`")

# %%
residues = torch.arange(P)
sequences = {
    "cosine": (2 * torch.pi * 5 * residues / P).cos(),
    "random": torch.randn(P, generator=torch.Generator().manual_seed(0)),
    "one residue": F.one_hot(torch.tensor(20), P).float(),
}
figure, panels = plt.subplots(1, 3, figsize=(6, 2), dpi=90, layout="constrained")
for axes, (name, values) in zip(panels, sequences.items(), strict=True):
    axes.plot(residues, values, color="#1f4e8c", linewidth=1)
    axes.set(title=f"{name}: {float(inverse_participation_ratio(values)):.2f}", xlabel="residue")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("weight")
plt.show()

# %% [markdown]
# ## The network
#
# The paper's: one hidden layer of squares, trained on the squared distance to one-hot targets, all pairs in one batch.


# %%
class Sums(LightningModule):
    """An ordinary module: nothing in it knows who watches."""

    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        self.weight_decay = weight_decay
        self.net = QuadraticMLP(P, WIDTH)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], P).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01, betas=(0.9, 0.98), weight_decay=self.weight_decay)


data = CorruptedModularArithmetic(P, train_fraction=0.75, corruption=CORRUPTION)
networks, logs = {}, {}
for weight_decay, steps in RUNS.items():
    seed_everything(0, verbose=False)
    module = Sums(weight_decay)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[IPRMonitor("net.hidden", "net.head", network="net")],
        log_every_n_steps=2,
        logger=CSVLogger(tempfile.mkdtemp()),
        accelerator="cpu",
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    networks[weight_decay], logs[weight_decay] = module.net, plots.read_log(trainer.log_dir)

# %% [markdown]
# ## Two stages
#
# With strong weight decay: first all labels are remembered, wrong ones as well as right ones, and nothing is known of
# other pairs. Then neurons become periodic, and with them the test accuracy rises (it *groks*). And then the network
# **unlearns the wrong labels**: what contradicts the rule is forgotten, though it is trained on in each step.

# %%
ratios = {
    decay: neuron_participation_ratios(net.hidden.weight.detach(), net.head.weight.detach())
    for decay, net in networks.items()
}
figure = plots.grokking(logs[5.0], {"Neurons at the end, weight decay 5": ratios[5.0]})
figure.savefig("grokking.png")
figure  # noqa: B018 # a notebook shows it

# %% [markdown]
# Without weight decay it groks too, and keeps the wrong labels: both kinds of neurons live side by side.

# %%
table = Table("weight decay", "trained on", "wrong labels", "right labels", "test", "mean IPR", "phase")
results = {}
for decay, net in networks.items():
    found = results[decay] = data.accuracies(net)
    shown = [f"{100 * value:.1f}" for value in (found.train, found.corrupted, found.clean, found.test)]
    phase = training_phase(found.train, found.test, CORRUPTION)
    table.add_row(f"{decay:g}", *shown, f"{float(ratios[decay].mean()):.2f}", phase)
table.title = "accuracy in per cent, by the labels that were given"
console.print(table)

# %% [markdown]
# ## Without the neurons that remember
#
# In the network that keeps both, the neurons of the lowest ratio are set to zero, without training again: the wrong
# labels go, and all else stays. From the other end it is the other way round: the rule goes, and what was remembered
# stays. A random choice harms both.

# %%
fractions = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def evaluate(net: torch.nn.Module) -> dict[str, float]:
    """Accuracies in per cent."""
    return {name: 100 * value for name, value in data.accuracies(net)._asdict().items()}


pruned = {
    order: prune_memorising(networks[0.0], fractions, evaluate, order=order)
    for order in ("lowest", "highest", "random")
}
table = Table("first pruned", "share", "neurons", "wrong labels", "right labels", "test")
for order, one in pruned.items():
    for row, share in enumerate(fractions.tolist()):
        shown = [f"{float(one.scores[name][row]):.1f}" for name in ("corrupted", "clean", "test")]
        table.add_row(order, f"{share:.0%}", str(int(one.neurons[row])), *shown)
    table.add_section()
console.print(table)

# %%
figure, panels = plt.subplots(1, 3, figsize=(6, 2.8), dpi=90, sharey=True, layout="constrained")
lines = {"test": "-", "clean": "--", "corrupted": "-."}
for axes, (order, one) in zip(panels, pruned.items(), strict=True):
    for name, style in lines.items():
        axes.plot(100 * fractions, one.scores[name], style, label=name)
    axes.set(title=f"{order} first", xlabel="pruned, %", ylim=(0, 102))
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("accuracy, %")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# ## What it is good for
#
# Whoever tries a technique against wrong labels can try it here, where they are known: add it to `callbacks`. As a way
# to prune networks in general it is not meant: a spectrum says something only where weights have an axis of residues.
