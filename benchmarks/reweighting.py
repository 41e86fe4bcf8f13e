"""What loss-based reweighting does to training, and what it costs.

    python benchmarks/reweighting.py toy
    python benchmarks/reweighting.py lm --data input.txt
    python benchmarks/reweighting.py cost

``toy``: linear regression whose samples are redundant, uniform weights against all strategies, 5 seeds. ``lm``: a
byte-level GPT (4 layers, d = 128) on a text (tiny Shakespeare), alone and drowned in near-duplicate boilerplate made of
the running Python's licence and docstrings; evaluated on the text only; the share of uniform's tokens that linupper
needs to reach uniform's last loss. ``cost``: step time of the engine against the step written by hand and the plain
step, in turns within one process (``--size gpt2`` is the 124M configuration in bf16, for a GPU).
"""

import argparse
import logging
import math
import random
import statistics
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from by_hand import linupper_loss
from lightning.pytorch import Callback, LightningModule, Trainer
from redundant_text import Validation, share_of_tokens, window_places
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from turns import Turns, fit_in_turns, ratio

from lightning_reg import LossReweighting

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from llm_reweighting import ByteGPT, LanguageModel, Windows

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}

# -- the toy regression -----------------------------------------------------------------------------------------------

TOY = {
    "uniform": None,
    "linupper, r=1": {"strategy": "linupper", "r": 1.0},
    "linupper, r=0.4": {"strategy": "linupper", "r": 0.4},
    "quadratic, r=1": {"strategy": "quadratic", "r": 1.0},
    "extremes, r=0.4": {"strategy": "extremes", "r": 0.4},
}


class Regression(LightningModule):
    """Half the squared error of a linear map without bias, plain SGD."""

    def __init__(self, dimensions):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dimensions))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return 0.5 * F.mse_loss(x @ self.weight, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Distance(Callback):
    """Half the expected squared error on isotropic inputs, at chosen steps."""

    def __init__(self, truth, steps):
        self.truth, self.steps, self.values = truth, steps, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            error = 0.5 * (pl_module.weight.detach() - self.truth).square().sum()
            self.values[trainer.global_step] = error.item()


def toy_data(seed, noise, samples, dimensions=40, common=5, share=0.9, leak=0.05):
    """Samples of which nine in ten lie in a few directions, but for a leak of up to 5 %."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(dimensions, generator=generator)
    x = torch.randn(samples, dimensions, generator=generator)
    redundant = torch.rand(samples, generator=generator) < share
    leaks = leak * torch.rand(samples, 1, generator=generator)
    scale = torch.cat([torch.ones(samples, common), leaks.expand(-1, dimensions - common)], dim=1)
    x = torch.where(redundant[:, None], x * scale, x)
    return truth, x, x @ truth + noise * torch.randn(samples, generator=generator)


def toy_run(arm, seed, noise, steps):
    truth, x, y = toy_data(seed, noise, 32 * max(steps))
    distance = Distance(truth, steps)
    technique = [LossReweighting(warmup_steps=0, **TOY[arm])] if TOY[arm] else []
    trainer = Trainer(accelerator="cpu", max_steps=max(steps), callbacks=[*technique, distance], **QUIET)
    trainer.fit(Regression(len(truth)), DataLoader(TensorDataset(x, y), 32))
    return [distance.values[step] for step in steps]


def toy(options):
    """Test loss after 300 and 1000 steps."""
    steps = (300, 1000)
    for noise in options.noise:
        table = Table("weights", *[f"after {step} steps" for step in steps])
        table.title = f"linear regression, label noise {noise:g}, batch 32, {options.seeds} seeds: test loss, mean ± sd"
        for arm in TOY:
            runs = [toy_run(arm, seed, noise, steps) for seed in range(options.seeds)]
            table.add_row(arm, *[mean_sd(values, 4) for values in zip(*runs, strict=True)])
        yield table


# -- language models --------------------------------------------------------------------------------------------------


def lm_windows(text, redundant, seed, options):
    """Training windows: of the text alone, or four in five from boilerplate; the last tenth of the text is held out."""
    train_text, starts, held_out = window_places(
        text, redundant, seed, options.steps * options.batch, options.length, options.thin
    )
    return Windows(train_text, starts, options.length), Windows(text, held_out, options.length)


def lm_run(arm, text, redundant, seed, options):
    torch.manual_seed(seed)
    train, val = lm_windows(text, redundant, seed, options)
    reweighting = LossReweighting("linupper", r=0.4, warmup_steps=options.steps // 20)
    validation = Validation()
    trainer = Trainer(
        accelerator="auto",
        max_steps=options.steps,
        max_epochs=-1,
        val_check_interval=options.every,
        check_val_every_n_epoch=None,
        callbacks=[*([reweighting] if arm == "linupper" else []), validation],
        **QUIET,
    )
    model = LanguageModel(ByteGPT(4, 128, options.length))
    trainer.fit(model, DataLoader(train, options.batch), DataLoader(val, 64))
    return validation.curve


def lm(options):
    """Validation loss of both arms, and the tokens to equal loss."""
    text = torch.frombuffer(bytearray(options.data.read_bytes()), dtype=torch.uint8)
    table = Table("training data", "uniform", "linupper", "difference, 95 % interval", "tokens to equal loss")
    table.title = (
        f"byte-level GPT, 4 layers, d = 128, {options.steps} steps of {options.batch} x {options.length} bytes,"
        f" {options.seeds} seeds: last validation loss (nats per byte), mean ± sd"
    )
    for name, redundant in (("text", False), ("1/5 text, 4/5 boilerplate", True)):
        curves = {}
        for seed in range(options.seeds):
            for arm in ("uniform", "linupper"):
                curves[arm, seed] = lm_run(arm, text, redundant, seed, options)
                Console(stderr=True).print(f"{name}, seed {seed}, {arm}: {curves[arm, seed][-1][1]:.4f}")
        last = {arm: [curves[arm, seed][-1][1] for seed in range(options.seeds)] for arm in ("uniform", "linupper")}
        differences = [b - a for a, b in zip(last["uniform"], last["linupper"], strict=True)]
        shares = [share_of_tokens(curves["linupper", s], curves["uniform", s][-1][1]) for s in range(options.seeds)]
        reached = [share for share in shares if share < math.inf]
        ratio_text = interval(reached, sign="") if reached else ""
        missed = f"{len(shares) - len(reached)} of {len(shares)} not reached"
        table.add_row(
            name,
            mean_sd(last["uniform"], 4),
            mean_sd(last["linupper"], 4),
            interval(differences),
            "; ".join(filter(None, [ratio_text, missed if len(reached) < len(shares) else ""])),
        )
    yield table


def mean_sd(values, digits):
    return f"{statistics.mean(values):.{digits}f}" + (
        f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    )


def interval(values, sign="+"):
    """Mean and 95 % interval by Student's t, of few paired values."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.4f}"
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.571)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.4f} [{mean - half:{sign}.4f}, {mean + half:{sign}.4f}]"


# -- cost -------------------------------------------------------------------------------------------------------------


class ByHand(LanguageModel):
    """LinUpper as a user would write it."""

    def loss(self, tokens):
        logits, labels = self.net(tokens[:, :-1]), tokens[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.reshape(labels.shape).mean(1)
        return linupper_loss(losses)


class Logits(nn.Module):
    """A transformers model as a map from tokens to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).logits


def cost_net(size):
    if size == "small":
        return ByteGPT(4, 128, 64)
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(GPT2LMHeadModel(GPT2Config()))


def cost(options):
    """Median ratios of step times."""
    small = options.size == "small"
    shape, vocabulary = ((options.batch, 65), 256) if small else ((8, 513), 50257)
    data = torch.randint(vocabulary, (shape[0] * min(options.steps, 50), shape[1]))
    arms = {
        "plain": (LanguageModel, []),
        "by hand": (ByHand, []),
        "engine": (LanguageModel, [LossReweighting(warmup_steps=0)]),
        "warm-up": (LanguageModel, [LossReweighting(warmup_steps=options.steps, warmup="plain")]),
    }
    modules = {arm: (cls(cost_net(options.size)), callbacks) for arm, (cls, callbacks) in arms.items()}
    times = fit_in_turns(
        modules,
        lambda: DataLoader(data, shape[0], drop_last=True),
        Turns(arms, options.steps),
        accelerator="cpu" if small else "cuda",
        precision="32-true" if small else "bf16-mixed",
        max_epochs=-1,
    )
    table = Table("ratio", "median", "95 % interval")
    where = "CPU" if small else torch.cuda.get_device_name()
    tokens = f"{shape[0]} x {shape[1] - 1} tokens"
    table.title = f"{options.size}, {tokens}, {options.steps} rounds, torch {torch.__version__}, {where}"
    for over, under in (("engine", "plain"), ("engine", "by hand"), ("by hand", "plain"), ("warm-up", "plain")):
        middle, low, high = ratio(times, over, under)
        table.add_row(f"{over} / {under}", f"{middle:.4f}", f"{low:.4f} to {high:.4f}")
    table.caption = f"plain step: median {statistics.median(times['plain']) * 1e3:.1f} ms"
    yield table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="append the tables to this file")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    commands = parser.add_subparsers(required=True)
    for function in (toy, lm, cost):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        if function is toy:
            command.add_argument("--seeds", type=int, default=5)
            command.add_argument("--noise", type=float, nargs="+", default=[0.0, 1.0])
        if function is lm:
            command.add_argument("--data", type=Path, required=True, help="a text file")
            command.add_argument("--seeds", type=int, default=3)
            command.add_argument("--steps", type=int, default=500)
            command.add_argument("--every", type=int, default=25, help="steps between validations")
            command.add_argument("--length", type=int, default=48)
            command.add_argument("--thin", type=int, default=8, help="validate on every k-th held-out window")
        if function is cost:
            command.add_argument("--size", choices=("small", "gpt2"), default="small")
            command.add_argument("--steps", type=int, default=300)
        if function is not toy:
            command.add_argument("--batch", type=int, default=32)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    random.seed(0)
    for table in options.function(options):
        Console().print(table)
        if options.save:
            with options.save.open("a") as file:
                Console(file=file, width=160).print(table)


if __name__ == "__main__":
    main()
