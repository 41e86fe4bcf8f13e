"""What is trained in the sections on steps and memory: three networks, each technique on them, by hand beside it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from by_hand import (
    LAM,
    Averaged,
    ByHand,
    Contrasted,
    Copies,
    Cut,
    Features,
    FirmlyTied,
    Mixed,
    MovingAverage,
    Numbers,
    Outputs,
    Parametrized,
    Plain,
    Reweighted,
    Sparse,
    Tied,
    after_one_task,
    ewc,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpu_sections.networks import GPT, Net, ResNet, ViT
from gpu_sections.setting import Setting
from lightning_reg import (
    ConR,
    CutMix,
    ELRCallback,
    ELRPlusCallback,
    FeatureDistillation,
    L2ToStart,
    LossReweighting,
    Mixup,
    MultiSampleDropout,
    NMSparsity,
    PredictionDistillation,
    SoupAverager,
    WeightCompander,
)

__all__ = ["MODELS", "Batches", "arms_of", "loader_of", "new_net"]

SAMPLES = 8  # of dropout
A, B = 2.0, 1.0  # of the companders
OF_ANY = (
    "loss_reweighting",
    "nm_sparsity",
    "model_soups",
    "l2_to_start",
    "feature_distillation",
    "weight_compander",
)
OF_IMAGES = (
    "elr",
    "elr_plus",
    "cutmix",
    "mixup",
    "prediction_distillation",
    "multi_sample_dropout",
    "conr",
    "ewc",  # it refuses tokens flattened to rows
    *OF_ANY,
)


@dataclass(frozen=True)
class Model:
    """A network and its batches, full and in small.

    Args:
        full: Makes the network.
        small: Makes the small one.
        batch: Samples of a step; 4 in small.
        inputs: Shape of a sample, full and in small.
        classes: Number of classes or of tokens, full and in small.
        keys: The techniques that are measured on it.

    """

    full: Callable[[], Net]
    small: Callable[[], Net]
    batch: int
    inputs: tuple[tuple[int, ...], tuple[int, ...]]
    classes: tuple[int, int]
    keys: tuple[str, ...]

    def batch_of(self, setting: Setting) -> int:
        return 4 if setting.small else self.batch


MODELS = {
    "resnet50": Model(ResNet, lambda: ResNet((1, 1), 8, 12), 256, ((3, 224, 224), (3, 32, 32)), (1000, 12), OF_IMAGES),
    "vit": Model(ViT, lambda: ViT(32, 8, 32, 2, 12), 128, ((3, 224, 224), (3, 32, 32)), (1000, 12), OF_IMAGES),
    "gpt": Model(GPT, lambda: GPT(64, 16, 32, 2), 16, ((1024,), (16,)), (50257, 64), OF_ANY),
}


def new_net(model: Model, setting: Setting) -> Net:
    torch.manual_seed(setting.seed)
    with torch.device(setting.device):
        return model.small() if setting.small else model.full()


class Batches(Dataset):
    """So many samples by number, of which a few batches lie on the device: a batch is one gather, without a wait."""

    def __init__(self, x: Tensor, y: Tensor, count: int) -> None:
        self.x, self.y, self.count = x, y, count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor(indices)
        if self.x.is_cuda:  # from pageable memory the copy would wait for the device
            index = index.pin_memory().to(self.x.device, non_blocking=True)
        rows = index % len(self.x)
        return self.x[rows], self.y[rows], index


def as_it_is(batch: Any) -> Any:
    return batch


def loader_of(model: Model, setting: Setting) -> tuple[Callable[[], DataLoader], int]:
    """Makes loaders over the same random samples, 100 batches long; and the number of the samples."""
    shape, classes = model.inputs[setting.small], model.classes[setting.small]
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    drawn: dict[str, Any] = {"generator": generator, "device": setting.device}
    kept, count = 2 * setting.batch, 100 * setting.batch
    if model.full is GPT:
        text = torch.randint(classes, (kept, shape[0] + 1), **drawn)
        x, y = text[:, :-1], text[:, 1:]
    else:
        x, y = torch.randn(kept, *shape, **drawn), torch.randint(classes, (kept,), **drawn)
    if model.full is ResNet:
        x = x.contiguous(memory_format=torch.channels_last)
    batches = Batches(x, y, count)
    return lambda: DataLoader(batches, setting.batch, shuffle=True, drop_last=True, collate_fn=as_it_is), count


def arms_of(key: str, net: Net, samples: int) -> dict[str, tuple[Plain, list[Any]]]:
    """Plain, by hand and by the engine, each a module and its callbacks; only "plain" for the key "plain"."""
    plain = partial(Numbers, scale=net.head.out_features) if key == "conr" else Plain
    arms: dict[str, tuple[Plain, list[Any]]] = {"plain": (plain(copy.deepcopy(net)), [])}
    if key != "plain":
        hand, technique = MAKERS[key](net, samples)
        arms |= {"by hand": (hand, []), "engine": (plain(copy.deepcopy(net)), [technique])}
    return {name: (module.to(next(net.parameters()).device), callbacks) for name, (module, callbacks) in arms.items()}


def _sparse(net: Net, samples: int) -> tuple[Plain, Any]:
    def technique() -> NMSparsity:
        return NMSparsity(2, 4, recipe="srste", layers="*.fc[12]" if _has_blocks(net) else "auto", dense_steps=0)

    return Sparse(copy.deepcopy(net), technique()), technique()


def _has_blocks(net: Net) -> bool:
    return any(name.endswith("fc1") for name, _ in net.named_modules())


def _companded(net: Net, samples: int) -> tuple[Plain, Any]:
    def technique() -> WeightCompander:
        return WeightCompander(a=A, b=B, exclude=["*head*"])

    return Parametrized(copy.deepcopy(net), A, B, exclude=["*head*"]), technique()


# Key to the step by hand and the technique, of a network and the number of samples.
MAKERS: dict[str, Callable[[Net, int], tuple[Plain, Any]]] = {
    "elr": lambda net, n: (ByHand(copy.deepcopy(net), n, net.head.out_features), ELRCallback(lam=3.0, beta=0.7)),
    "elr_plus": lambda net, n: (
        Averaged(copy.deepcopy(net), n, net.head.out_features),
        ELRPlusCallback(networks=1, mixup_alpha=0.0, decay_rampup_steps=0),
    ),
    "cutmix": lambda net, n: (Cut(copy.deepcopy(net)), CutMix(prob=1.0)),
    "mixup": lambda net, n: (Mixed(copy.deepcopy(net)), Mixup(prob=1.0)),
    "prediction_distillation": lambda net, n: (
        Outputs(copy.deepcopy(net)),
        after_one_task(PredictionDistillation(new_classes=[5, net.head.out_features - 5]), teacher={}),
    ),
    "feature_distillation": lambda net, n: (
        Features(copy.deepcopy(net)),
        FeatureDistillation("net.body", LAM, anchor="start_of_fit"),
    ),
    "multi_sample_dropout": lambda net, n: (
        Copies(copy.deepcopy(net), SAMPLES),
        MultiSampleDropout("net.drop", num_samples=SAMPLES),
    ),
    "conr": lambda net, n: (
        Contrasted(copy.deepcopy(net), scale=net.head.out_features),
        ConR("net.body", window=0.1, augment="augment"),
    ),
    "loss_reweighting": lambda net, n: (Reweighted(copy.deepcopy(net)), LossReweighting(warmup_steps=0)),
    "nm_sparsity": _sparse,
    "model_soups": lambda net, n: (
        MovingAverage(copy.deepcopy(net)),
        SoupAverager("ema", decay=0.999, load_at_end=False),
    ),
    "l2_to_start": lambda net, n: (Tied(copy.deepcopy(net)), L2ToStart(LAM)),
    "ewc": lambda net, n: (FirmlyTied(copy.deepcopy(net)), ewc(net)),
    "weight_compander": _companded,
}
