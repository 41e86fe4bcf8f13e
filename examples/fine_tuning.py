"""Teach a small GPT that knows prose to write Python: what is learned, what is forgotten, what it costs, in ten ways.

Run it with ``python examples/fine_tuning.py``; it takes about two minutes and needs no download. The prose is that of
the standard library's docstrings, or a file of yours: ``PROSE=tinyshakespeare/input.txt``. It is a notebook too:
``examples/notebooks/fine_tuning.ipynb``.
"""

# %% [markdown]
# # Fine-tuning in ten ways
#
# A byte-level GPT has read prose; now it is to learn the standard library's source. Each way begins with the same
# weights and sees the same batches. Of interest is the loss on the new text, but also that on the old one, which shows
# what was forgotten, and what a step costs.
#
# `ALLoRA`, `SaRA`, `MaskTuning` and `MaestroLowRank` stand in the Trainer's `callbacks`. The model has no adapter in it
# at any time: its weights keep their names, and what is trained belongs to the callback.

# %%
import ast
import importlib.util
import logging
import os
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_reg import ALLoRA, MaestroLowRank, MaskTuning, SaRA
from lightning_reg.functional import save_delta, sparse_delta

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
FIRST, SECOND, LENGTH, BATCH, WIDTH = (3, 2, 16, 2, 16) if SHORT else (400, 200, 64, 16, 64)
RANK = 4
console = Console()
torch.set_num_threads(1)  # the layers are too small to share among cores
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|treespec)")

# %% [markdown]
# ## Two texts
#
# Docstrings are taken from other files than the source, so that nothing is in both.


# %%
def docstrings(path: Path) -> str:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, documented))))


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: 12 if SHORT else 120]
prose = Path(os.environ.get("PROSE", ""))
old = as_bytes(prose.read_text("utf-8") if prose.is_file() else "\n\n".join(map(docstrings, files[::2])))
new = as_bytes("\n".join(path.read_text("utf-8") for path in files[1::2]))


def batches(text: Tensor, steps: int, seed: int) -> DataLoader:
    """Pieces of the first nine tenths; the last tenth is for the test."""
    starts = torch.randint(
        len(text) * 9 // 10 - LENGTH, (steps * BATCH,), generator=torch.Generator().manual_seed(seed)
    )
    return DataLoader([text[start : start + LENGTH + 1] for start in starts.tolist()], BATCH)


@torch.no_grad()
def loss_on(module: "GPT", text: Tensor) -> float:
    """Mean loss per byte on 200 pieces of the last tenth."""
    starts = torch.linspace(len(text) * 9 // 10, len(text) - LENGTH - 1, 8 if SHORT else 200).long()
    module.eval()
    return float(module.training_step(torch.stack([text[s : s + LENGTH + 1] for s in starts]), 0))


# %% [markdown]
# ## The model


# %%
class Block(nn.Module):
    """Causal self-attention and an MLP, each after a LayerNorm and beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """A GPT over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(256, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(ids) + self.places)))


class GPT(LightningModule):
    """An ordinary module."""

    def __init__(self, net: nn.Module, lr: float = 2e-3) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.0)


def fit(module: GPT, loader: DataLoader, *callbacks: Callback) -> Trainer:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False, **options)
    trainer.fit(module.train(), loader)
    return trainer


torch.manual_seed(0)
base = GPT(Net())
fit(base, batches(old, FIRST, 0))
start = {name: value.clone() for name, value in base.net.state_dict().items()}
console.print(f"before: {loss_on(base, new):.3f} on the new text, {loss_on(base, old):.3f} on the old one")


def pretrained() -> Net:
    net = Net()
    net.load_state_dict(start)
    return net


# %% [markdown]
# ## What a step holds
#
# `held` are the bytes of parameters, gradients, moments and copies that lie there after a step; `peak` adds what is
# saved for the backward pass.


# %%
class Bytes(Callback):
    """Counts storages of tensors, each once, in the second step."""

    def __init__(self, technique: Any) -> None:
        self.technique, self.saved, self.held, self.trained, self.seconds = technique, 0, 0, 0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.sizes = {}
        if batch_idx == 1:
            own = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}

            def pack(tensor: Tensor) -> Tensor:
                if tensor.untyped_storage().data_ptr() not in own:
                    self.add(tensor)
                return tensor

            self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            self.hooks.__enter__()
        self.begun = time.perf_counter()

    def add(self, tensor: Tensor) -> None:
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 1:
            self.saved, self.sizes = sum(self.sizes.values()), {}
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    self.add(parameter.grad)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self.begun
        if batch_idx != 1:
            return
        self.hooks.__exit__(None, None, None)
        kept = [*pl_module.parameters(), *tensors_in([dict(state) for state in trainer.optimizers[0].state.values()])]
        kept += tensors_in(self.technique.state_dict()) if self.technique is not None else []
        for tensor in kept:
            self.add(tensor)
        self.held = sum(self.sizes.values())
        as_they_are = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.trained = as_they_are if self.technique is None else self.technique.latents.size


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in values for tensor in tensors_in(one)]


# %% [markdown]
# ## The ways
#
# LoRA and rsLoRA are `ALLoRA` with another `scale`. With Adam, ALLoRA's own scale belongs to the update. PEFT's
# adapters stand beside them, where `peft` is installed.

# %%
LAYERS = ["qkv", "out", "up", "down"]
OURS: dict[str, Any] = {
    "full": lambda: None,
    "LoRA": lambda: ALLoRA([f"net.blocks.*.{name}" for name in LAYERS], rank=RANK, scale="fixed", alpha=4.0 * RANK),
    "rsLoRA": lambda: ALLoRA([f"net.blocks.*.{name}" for name in LAYERS], rank=RANK, scale="rank", alpha=1.0 * RANK),
    "ALLoRA": lambda: ALLoRA([f"net.blocks.*.{name}" for name in LAYERS], rank=RANK, eta=4.0, mode="update"),
    "SaRA": lambda: SaRA(0.1, layers="net.blocks*"),
    "random mask": lambda: SaRA(0.1, layers="net.blocks*", select="random", rank_weight=0.0),
    # A mask moves from 0.01 to below 0.005 before its weight is off: Adam's steps are as large as the learning rate.
    "MaskTuning": lambda: MaskTuning("net.blocks*", lr_factor=2.0 if SHORT else 0.1),
    "Maestro": lambda: MaestroLowRank("net.blocks*", lr_factor=0.25),
}
THEIRS = {"PEFT's LoRA": False, "PEFT's DoRA": True} if importlib.util.find_spec("peft") else {}


def stored(way: str, technique: Any, module: GPT) -> float:
    """Kilobytes of a file with what was trained."""
    if isinstance(technique, SaRA):
        with tempfile.TemporaryDirectory() as folder:
            save_delta(sparse_delta(technique, module), Path(folder) / "delta.safetensors")
            return (Path(folder) / "delta.safetensors").stat().st_size / 1000
    if way == "MaskTuning":  # a bit for each entry
        return sum(value.numel() for value in technique.latents.values.values()) / 8000
    if technique is not None:
        return technique.latents.size * 4 / 1000
    return sum(p.numel() * 4 for p in module.parameters() if p.requires_grad) / 1000


results = {}
for way in [*OURS, *THEIRS]:
    torch.manual_seed(1)
    technique, net = OURS[way]() if way in OURS else None, pretrained()
    if way in THEIRS:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=4 * RANK, target_modules=LAYERS, use_dora=THEIRS[way])
        net = peft.get_peft_model(net, config)
    module, count = GPT(net, 5e-4 if way == "full" else 2e-3), Bytes(technique)
    fit(module, batches(new, SECOND, 1), *([] if technique is None else [technique]), count)
    results[way] = {
        "new": loss_on(module, new),
        "old": loss_on(module, old),
        "held": count.held / 1e6,
        "peak": (count.held + count.saved) / 1e6,
        "ms": 1000 * count.seconds / SECOND,
        "trained": count.trained,
        "stored": stored(way, technique, module),
    }

# %% [markdown]
# ## What came of it
#
# To the lower left is better. Maestro, which trains two factors as large as the weights, and full fine-tuning, with a
# smaller learning rate, have learned most; the low-rank ways have forgotten a little more than full fine-tuning, masks
# most (they begin from the same weights and only leave some out), SaRA least of all, and it has learned least. Learning
# rates were not searched and it is one seed, so this ranks nothing. What does not go by them stands in the other
# columns: our low-rank ways hold a copy of the weights that PEFT's do not, and SaRA's file has six bytes for each
# entry.

# %%
table = Table("way", "new text", "old text", "trained", "stored KB", "held MB", "peak MB", "ms a step")
for way, row in results.items():
    losses, sizes = f"{row['new']:.3f} {row['old']:.3f}".split(), f"{row['held']:.2f} {row['peak']:.2f}".split()
    table.add_row(way, *losses, f"{row['trained']:,}", f"{row['stored']:.0f}", *sizes, f"{row['ms']:.1f}")
console.print(table)

figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
axes.plot(loss_on(base, old), loss_on(base, new), "kx", label="before")
for way, row in results.items():
    axes.plot(row["old"], row["new"], "o" if way in OURS else "s", label=way)
axes.set(xlabel="loss on the old text (what was forgotten is to the right)", ylabel="loss on the new text")
axes.legend(fontsize="small")
plt.show()
