"""What a step of low-rank fine-tuning costs: PEFT's LoRA beside the same as a weight map, in time and in bytes.

The arms take turns step by step in one process (see turns.py); figures are medians over rounds of the ratio within a
round, with a 95 % bootstrap interval. A BERT of 4 layers, 256 wide, 64 tokens, and a Llama-like of the same size;
random weights, rank 8 on all linear layers of the blocks, AdamW. ``saved`` are the bytes that autograd keeps from the
forward to the backward pass, parameters left out; ``held`` all others that lie there in a step: parameters, copies of
frozen weights, gradients, moments.

    OMP_NUM_THREADS=1 python benchmarks/adapters.py --rounds 40 --batch 4 --save benchmarks/results/adapters.txt

The bar: weight map / PEFT <= 1.1.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from overhead import quiet, show
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from turns import Turns, fit_in_turns

from lightning_reg import ALLoRA

VOCABULARY, TOKENS, WIDTH, RANK = 5000, 64, 256, 8
LAYERS = {
    "BERT": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}


def network(name):
    torch.manual_seed(0)
    if name == "BERT":
        return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=4 * WIDTH, num_labels=3))
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=4 * WIDTH))


class Tuned(LightningModule):
    """An ordinary module around a network of transformers."""

    def __init__(self, net, labels):
        super().__init__()
        self.net, self.labels = net, labels

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch[0], labels=batch[1] if self.labels else batch[0])["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


class Dense(ALLoRA):
    """The same map with the gradient of the weight pulled back, as where a weight is shared."""

    is_product = False


def arms(name):
    heads = ["classifier", "pooler.dense"] if name == "BERT" else []
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS[name], modules_to_save=heads or None)
    options = {
        "layers": [f"net.*layer*.{layer}" for layer in LAYERS[name]],
        "rank": RANK,
        "train": [f"*.{head}" for head in heads] or None,
    }
    labels = bool(heads)
    return {
        "full": (Tuned(network(name), labels), []),
        "PEFT": (Tuned(get_peft_model(network(name), config), labels), []),
        "map": (Tuned(network(name), labels), [ALLoRA(scale="fixed", **options)]),
        "row scale": (Tuned(network(name), labels), [ALLoRA(mode="update", **options)]),
        "dense": (Tuned(network(name), labels), [Dense(scale="fixed", **options)]),
    }


def loader(batch):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, VOCABULARY, (batch * 10, TOKENS), generator=draw)
    return DataLoader(TensorDataset(rows, torch.randint(3, (len(rows),), generator=draw)), batch, drop_last=True)


class Bytes:
    """Counts storages, each once."""

    def __init__(self):
        self.seen = {}

    def add(self, tensor):
        if tensor is not None:
            storage = tensor.untyped_storage()
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def megabytes(self):
        return sum(self.seen.values()) / 2**20


def memory(module, callbacks, batches):
    """MB saved for the backward pass of a step, and held by parameters, gradients and moments after it."""
    held, saved = Bytes(), Bytes()
    step = module.training_step

    def watched(rows, batch_idx):
        if batch_idx == 0:
            return step(rows, batch_idx)
        parts = [t for technique in callbacks for _, _, t in technique.latents.parts()]
        own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *parts)}
        pack = lambda t: t if t.untyped_storage().data_ptr() in own else saved.add(t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return step(rows, batch_idx)

    module.training_step = watched
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 2}
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **options)
    sums = {"gradients": 0}

    def gradients(optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        sums["gradients"] = sum(p.grad.numel() * p.grad.element_size() for p in params) / 2**20

    module.on_before_optimizer_step = gradients
    trainer.fit(module, batches)
    states = [*trainer.optimizers[0].state.values()]
    for technique in callbacks:
        moments = technique.latents.state_dict()["moments"]
        states += [state for parts in moments.values() for state in parts.values()]
        for tensor in (*technique.latents.values.values(), *(t for _, _, t in technique.latents.parts())):
            held.add(tensor)
    for tensor in (*module.parameters(), *(t for s in states for t in s.values() if torch.is_tensor(t))):
        held.add(tensor)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    for technique in callbacks:
        beside = sum(module.get_parameter(name).numel() for name in technique.trained_beside)
        trained = technique.latents.size + beside
    return saved.megabytes, held.megabytes + sums["gradients"], trained


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--nets", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--save", type=Path, help="append the tables to this file")
    options = parser.parse_args(argv)
    quiet()
    for name in options.nets:
        chosen = arms(name)
        times = fit_in_turns(chosen, lambda: loader(options.batch), Turns(chosen, options.rounds))
        pairs = [("map", "PEFT"), ("row scale", "PEFT"), ("dense", "PEFT"), ("map", "full"), ("PEFT", "full")]
        title = f"{name}, batch {options.batch}, {options.rounds} rounds"
        show(times, pairs, title, options.save, skip=min(10, options.rounds // 3))
        table = Table("arm", "trained", "saved MB", "held MB", title=f"{name}: bytes of a step")
        for arm, (module, callbacks) in arms(name).items():
            saved, held, trained = memory(module, callbacks, loader(options.batch))
            table.add_row(arm, f"{trained:,}", f"{saved:.1f}", f"{held:.1f}")
        Console().print(table)
        if options.save:
            with options.save.open("a") as file:
                Console(file=file, width=120).print(table)


if __name__ == "__main__":
    main()
