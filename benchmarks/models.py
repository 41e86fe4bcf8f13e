"""What each technique does on models that people have: BERT, GPT-2, ViT, a graph network, a detector, a diffusion UNet.

All are small, with random weights, and train for a few steps; what counts is whether the technique attaches, or what it
says. ``python benchmarks/models.py --save benchmarks/results/models.md`` takes a minute.
"""

import argparse
import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_reg import registry

SIZE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass
class Setting:
    """A model with its data, and the names that techniques ask for."""

    make: Callable[[], nn.Module]
    step: Callable[[nn.Module, Any], Tensor]
    data: Callable[[], dict[str, Tensor]]
    names: dict[str, Any]  # of layers: features, logits, dropout


class Rows(Dataset):
    """Samples as dicts with the model's own argument names."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.data.items()}


class GraphNetwork(nn.Module):
    """Two dense graph convolutions and a mean over the nodes: a class for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 32), nn.Linear(32, 32)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(32, 4)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        h = (edges @ self.one(nodes)).relu()
        return self.head(self.dropout((edges @ self.two(h)).relu().mean(1)))


class Detector(nn.Module):
    """A class and a box for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.neck, self.dropout = nn.Linear(256, 32), nn.Dropout(0.2)
        self.classes, self.boxes = nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.dropout(self.neck(self.backbone(images)).relu())
        return self.classes(h), self.boxes(h)


class UNet(nn.Module):
    """Down, up and one connection across, with the time as a channel: the noise in an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(4, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.up, self.dropout, self.out = nn.ConvTranspose2d(16, 16, 2, 2), nn.Dropout(0.1), nn.Conv2d(20, 3, 3, 1, 1)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        x = torch.cat([images, time[:, None, None, None].expand(-1, 1, *images.shape[2:])], 1)
        h = self.dropout(self.up(self.middle(self.down(x).relu()).relu()))
        return self.out(torch.cat([x, h], 1))


def detect(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    classes, boxes = net(batch["images"])
    return F.cross_entropy(classes, batch["labels"]) + F.smooth_l1_loss(boxes, batch["boxes"])


def denoise(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    noise, time = torch.randn_like(batch["images"]), torch.rand(len(batch["images"]))
    level = time[:, None, None, None]
    return F.mse_loss(net((1 - level) * batch["images"] + level * noise, time), noise)


def of_hugging_face(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return net(**batch).loss


def labels() -> Tensor:
    return torch.arange(16) % 4


SETTINGS = {
    "BERT": Setting(
        lambda: BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=4, **SIZE)),
        of_hugging_face,
        lambda: {"input_ids": torch.randint(50, (16, 10)), "labels": labels()},
        {"features": "net.dropout", "logits": "net.classifier", "dropout": "net.dropout", "input": "input_ids"},
    ),
    "GPT-2": Setting(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)),
        of_hugging_face,
        lambda: (lambda tokens: {"input_ids": tokens, "labels": tokens})(torch.randint(50, (16, 10))),
        {
            "features": "net.transformer.ln_f",
            "logits": "net.lm_head",
            "dropout": "net.transformer.drop",
            "input": "input_ids",
        },
    ),
    "ViT": Setting(
        lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=4, **SIZE)),
        of_hugging_face,
        lambda: {"pixel_values": torch.rand(16, 3, 16, 16), "labels": labels()},
        {
            "features": "net.vit.layernorm",
            "logits": "net.classifier",
            "dropout": "net.vit.embeddings.dropout",
            "input": "pixel_values",
        },
    ),
    "graph network": Setting(
        GraphNetwork,
        lambda net, batch: F.cross_entropy(net(batch["nodes"], batch["edges"]), batch["labels"]),
        lambda: {"nodes": torch.randn(16, 5, 8), "edges": torch.rand(16, 5, 5), "labels": labels()},
        {"features": "net.two", "logits": "net.head", "dropout": "net.dropout", "input": "nodes"},
    ),
    "detector": Setting(
        Detector,
        detect,
        lambda: {"images": torch.rand(16, 3, 16, 16), "labels": labels(), "boxes": torch.rand(16, 4)},
        {
            "features": "net.neck",
            "logits": "net.classes",
            "dropout": "net.dropout",
            "input": "images",
            "loss": "cross_entropy",
            "numbers": "smooth_l1_loss",
        },
    ),
    "diffusion UNet": Setting(
        UNet,
        denoise,
        lambda: {"images": torch.rand(16, 3, 16, 16)},
        {"features": "net.middle", "logits": "net.out", "dropout": "net.dropout", "input": "images"},
    ),
}


# What each class asks for by words of its own.
OF_CLASS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ADELE": lambda names: {"target_key": names.get("labels")},
    "AdaWAC": lambda names: {"target_key": names.get("labels")},
    "ClampedSelfDistillation": lambda names: {"views": 3},
    "CoreTuning": lambda names: {"head": names["logits"]},
    "DRTune": lambda names: {"head": names["logits"]},
    "FrozenTwinAgreement": lambda names: {"features": {names["features"]: 1.0}},
    "GradCache": lambda names: {"calls": names["features"], "chunk_size": 2},
    "GroupDRO": lambda names: {"num_groups": 4, "group_key": names.get("labels")},
    "InvariancePenalty": lambda names: {
        "method": "vrex",
        "num_groups": 4,
        "weight": 1.0,
        "group_key": names.get("labels"),
    },
    "MultiScaleConsistency": lambda names: {"target_key": names.get("labels")},
    "OnePrompt": lambda names: {"trained": f"{names['logits']}*", "lengths": [2, 2]},
    "VirtualOutliers": lambda names: {"head": names["logits"], "epochs": 1, "label_key": names.get("labels")},
}
_OF_NUMBERS = ("ClampedSelfDistillation", "ConR", "ProximalMatching")  # a regression's loss, where there is one
# They ask for a model of their own kind, or for more than a module has: their pages say what.
NOT_TRIED = (
    "AdversarialSearch",
    "CandidateDropout",
    "ContrastiveDistillation",
    "DecorSampling",
    "DiffusionClassifierEval",
    "EnsembleDistillation",
    "FalseNegativeMask",
    "FeatureSynthesis",
    "GatheredNegatives",
    "GuidedSampling",
    "HardNegativeMixing",
    "IPRMonitor",
    "ItemSSL",
    "MetricLoss",
    "SourceTasks",
    "SyntheticUnknowns",
)


class Model(LightningModule):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.net, self.setting = setting.make(), setting

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.setting.step(self.net, batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.setting.step(self.net, batch), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def arguments(cls: type, setting: Setting) -> dict[str, Any]:
    """What a user of the model would name."""
    parameters, names = inspect.signature(cls).parameters, setting.names
    # The layer of some puts out the logits; others' the features before them. A regression has its own loss.
    known = {
        "layer": names["logits"] if cls.__name__ in ("Loki", "NestedDropout") else names["features"],
        "gamma_min": 0.1,
        "classes": 4 if cls.__name__ == "DiffusionClassifierEval" else None,
        "dropout": names["dropout"],
        "window": 0.5,
        "params": next(f"net.{name}" for name, _ in setting.make().named_parameters()),
        "input_key": names["input"],
        "label_key": "labels" if "labels" in setting.data() else None,
        "monitor": "val_loss",
        "mode": "min",
        "views": "none",
        "null": "zero",
        "loss": names.get("numbers" if cls.__name__ in _OF_NUMBERS else "loss"),
    }
    own = OF_CLASS.get(cls.__name__, lambda names: {})(names | {"labels": known["label_key"]})
    known |= own
    ours = {"mode": "monitor"}  # of several words with one name those are meant that go with another argument
    given = {name: value for name, value in known.items() if name in parameters and ours.get(name, name) in parameters}
    takes_names = "str" in str(parameters["loss"].annotation) if "loss" in parameters else True
    return {name: value for name, value in given.items() if value is not None and (name != "loss" or takes_names)}


def attempt(cls: type, setting: Setting) -> str:
    """``"trains"``, or what the technique said."""
    seed_everything(0, verbose=False)
    loader = DataLoader(Rows(setting.data()), 4)
    try:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[cls(**arguments(cls, setting))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(Model(setting), loader, loader)
    except Exception as error:  # noqa: BLE001 # whatever it says is the result
        return f"{' '.join(str(error).split())}"
    return "trains"


def main() -> None:
    parser = argparse.ArgumentParser(description="Which technique trains on which model.")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    techniques = sorted((cls for unit in registry.units() for cls in unit.techniques()), key=lambda cls: cls.__name__)
    lines = ["# Techniques on models that people have", "", f"| technique | {' | '.join(SETTINGS)} |"]
    lines += [f"|---{'|---' * len(SETTINGS)}|"]
    reasons = list[str]()
    for cls in techniques:
        cells = list[str]()
        for name, setting in SETTINGS.items():
            if cls.__name__ in NOT_TRIED:
                cells.append("-")
                continue
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                said = attempt(cls, setting)
            cells.append("trains" if said == "trains" else "refused")
            reasons += [] if said == "trains" else [f"- `{cls.__name__}` on {name}: {said}"]
        lines.append(f"| {cls.__name__} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    command = "`python benchmarks/models.py`: small models with random weights, one epoch of four steps"
    lines += ["", "What was said where it was refused:", "", *reasons, "", f"- {command}, torch {torch.__version__}"]
    if options.save:
        options.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
