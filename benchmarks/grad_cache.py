"""What a step costs in chunks: CPU time against the whole batch, attached and written by hand with torch's checkpoint.

A BERT of 3 layers and 128 features, 64 queries and 64 documents of 32 tokens, dropout on; medians over the steps of a
fit, the arms in turns.

    python benchmarks/grad_cache.py --save benchmarks/results/grad_cache.txt
"""

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch import LightningModule, Trainer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import GradCache

BATCH, TOKENS = 64, 32


class Search(LightningModule):
    def __init__(self, chunk=None, kept=False):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=1000, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512
        )
        self.encoder = transformers.BertModel(config, add_pooling_layer=False).train()
        self.chunk, self.kept, self.seconds, self.start = chunk, kept, [], 0.0

    def encode(self, tokens):
        return F.normalize(self.encoder(input_ids=tokens).last_hidden_state.mean(1))

    def embedded(self, tokens):
        if self.chunk is None:
            return self.encode(tokens)
        parts = tokens.split(self.chunk)
        if self.kept:
            return torch.cat([self.encode(part) for part in parts])
        return torch.cat([checkpoint(self.encode, part, use_reentrant=False) for part in parts])

    def training_step(self, batch, batch_idx):
        queries, documents = (self.embedded(tokens) for tokens in batch)
        return F.cross_entropy(queries @ documents.T / 0.05, torch.arange(len(queries)))

    def on_train_batch_start(self, batch, batch_idx):
        self.start = time.process_time()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seconds.append(time.process_time() - self.start)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def seconds(module, *techniques):
    draws = torch.Generator().manual_seed(0)
    data = TensorDataset(*(torch.randint(1000, (6 * BATCH, TOKENS), generator=draws) for _ in range(2)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[*techniques], enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(data, BATCH))
    return statistics.median(module.seconds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ratios = {}
    for _ in range(options.rounds):
        whole = seconds(Search())
        for chunk in (32, 16, 8):
            for name, found in (
                ("graphs of all chunks kept", seconds(Search(chunk, kept=True))),
                ("checkpoint by hand", seconds(Search(chunk))),
                ("GradCache", seconds(Search(), GradCache("encode", chunk))),
            ):
                ratios.setdefault(f"chunks of {chunk:2}, {name}", []).append(found / whole)
    lines = ["time of a step / that of the whole batch: median (least to most)"]
    lines += [f"{name:40} {statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for name, r in ratios.items()]
    lines.append(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {options.rounds} rounds")
    print("\n".join(lines))
    if options.save:
        options.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
