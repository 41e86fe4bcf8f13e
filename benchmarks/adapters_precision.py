"""Loss after training in each precision: PEFT's LoRA and the same as a weight map.

A Llama-like network of 2 layers, 64 wide, learns text in which each word follows from the two before; factors of rank 8
on all linear layers, AdamW 2e-3, 200 steps of batch 8, 32 tokens. The loss of 64 other rows, in float32 weights of
where the training ended, for each seed.

    OMP_NUM_THREADS=1 python benchmarks/adapters_precision.py --save benchmarks/results/adapters_precision.txt
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from overhead import quiet
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_reg import ALLoRA

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
WORDS, TOKENS, RANK = 30, 32, 8


def rows(count, seed):
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(WORDS, (count, TOKENS), generator=draw)
    for at in range(2, TOKENS):
        text[:, at] = (text[:, at - 1] + 2 * text[:, at - 2] + 1) % WORDS
    return text


class Tuned(LightningModule):
    """An ordinary module around a network of transformers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch[0], labels=batch[0])["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.0)


def final_loss(way, precision, seed, steps):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    net, callbacks = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)), []
    if way == "PEFT":
        net = get_peft_model(net, LoraConfig(r=RANK, lora_alpha=4 * RANK, target_modules=LAYERS))
    else:
        layers = [f"*.{layer}" for layer in LAYERS]
        callbacks = [ALLoRA(layers, rank=RANK, scale="fixed", alpha=4.0 * RANK, seed=seed)]
    module = Tuned(net)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": steps}
    options |= {"accelerator": "cpu", "precision": precision, "enable_model_summary": False}
    trainer = Trainer(callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(TensorDataset(rows(8 * steps, 1)), 8))
    module.float().eval()
    with torch.no_grad():
        text = rows(64, 2)
        return float(net(input_ids=text, labels=text)["loss"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", type=Path, help="append the table to this file")
    options = parser.parse_args(argv)
    quiet()
    table = Table("precision", "PEFT", "map", title=f"loss after {options.steps} steps, torch {torch.__version__}, CPU")
    for precision in PRECISIONS:
        cells = []
        for way in ("PEFT", "map"):
            losses = [final_loss(way, precision, seed, options.steps) for seed in range(options.seeds)]
            cells.append(", ".join(f"{loss:.4f}" for loss in losses))
        table.add_row(precision, *cells)
    Console().print(table)
    if options.save:
        with options.save.open("a") as file:
            Console(file=file, width=120).print(table)


if __name__ == "__main__":
    main()
