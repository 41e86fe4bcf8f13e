"""Toys for all tests: a classifier, data, a quiet Trainer, and techniques that each override one phase."""

import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

# Of the twins lightning.pytorch and pytorch_lightning the one that a test has imported alone.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
else:
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_reg.engine.technique import (
    BatchTechnique,
    LossTechnique,
    PenaltyTechnique,
    Technique,
    WeightMapTechnique,
    WeightTechnique,
)
from lightning_reg.engine.weights.factors import Factors, product, pulled_back, write_product_
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.places import layouts_of

__all__ = [
    "BATCH",
    "CLASSES",
    "INPUTS",
    "QUIET",
    "SAMPLES",
    "TWO_RANKS",
    "BatchShift",
    "Boom",
    "BoomError",
    "Classifier",
    "Doubled",
    "Halve",
    "IndexRecorder",
    "LossRecorder",
    "LowRank",
    "Pair",
    "Pairs",
    "Penalty",
    "ShiftTargets",
    "StepLosses",
    "Term",
    "Watch",
    "WeightsByLabel",
    "WeightsByPosition",
    "fit",
    "make_loader",
    "make_tensors",
    "make_trainer",
    "same_weights",
    "weights_of",
]

SAMPLES, INPUTS, CLASSES, BATCH = 32, 6, 3, 8
TWO_RANKS = {"devices": 2, "strategy": "ddp"}

# `pytestmark = QUIET` in a module whose Trainers meet these remarks of Lightning on the machine and the toy data.
QUIET = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


# -- data -------------------------------------------------------------------------------------------------------------


def make_tensors(samples=SAMPLES, seed=0):
    """Inputs ``(samples, INPUTS)`` and labels ``(samples,)``; the label can be learned from the input."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, INPUTS, generator=generator)
    return x, (x[:, :CLASSES] + 0.1 * torch.rand(samples, CLASSES, generator=generator)).argmax(1)


def make_loader(dataset=None, batch_size=BATCH, **kwargs):
    return DataLoader(TensorDataset(*make_tensors()) if dataset is None else dataset, batch_size=batch_size, **kwargs)


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Pairs(Dataset):
    """The toy data with samples in another form, and every sample's index in its first input if ``mark`` is set."""

    def __init__(self, form="tuple", samples=SAMPLES, mark=False):
        self.form = form
        self.x, self.y = make_tensors(samples)
        if mark:
            self.x[:, 0] = torch.arange(samples)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x, y = self.x[index], self.y[index]
        if self.form == "dict":
            return {"x": x, "y": y, "index": index}
        if self.form == "dataclass":
            return Pair(x, y)
        return x if self.form == "tensor" else (x, y)


# -- training ---------------------------------------------------------------------------------------------------------


class Classifier(LightningModule):
    """Two layers and SGD; ``training_step`` can be handed over: ``Classifier(step=lambda module, batch: ...)``."""

    def __init__(self, step=None, lr=0.5, dropout=0.0, seed=0):
        super().__init__()
        self.lr, self.step = lr, step
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, CLASSES))

    @override
    def forward(self, x):
        return self.net(x)

    @override
    def training_step(self, batch, batch_idx):
        if self.step is not None:
            return self.step(self, batch)
        x, y = batch
        return F.cross_entropy(self(x), y)

    @override
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def make_trainer(**kwargs):
    """A Trainer on the CPU that writes and prints nothing: two epochs unless told otherwise."""
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **kwargs,
        }
    )


def fit(module, *callbacks, loader=None, seed=1, **kwargs):
    """Fits and returns the Trainer; the global random state is the same at each start."""
    seed_everything(seed, verbose=False)
    trainer = make_trainer(callbacks=list(callbacks), **kwargs)
    trainer.fit(module, make_loader() if loader is None else loader)
    return trainer


def weights_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same_weights(one, two, atol=0.0):
    """Whether two modules (or state dicts) agree; to the last bit unless ``atol`` is given."""
    one, two = (m.state_dict() if isinstance(m, nn.Module) else m for m in (one, two))
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) if atol == 0.0 else torch.allclose(one[k], two[k], rtol=0.0, atol=atol) for k in one
    )


class StepLosses(Callback):
    """Collects what ``training_step`` returned (``None`` for a skipped step), as Lightning hands it on."""

    def __init__(self):
        self.losses = []

    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() if outputs else None)


class BoomError(Exception):
    """The user's own exception."""


class Boom:
    """A step (see :class:`Classifier`) that raises in its ``at``-th call, after the forward pass."""

    def __init__(self, error=BoomError, at=2):
        self.error, self.left = error, at

    def __call__(self, module, batch):
        loss = F.cross_entropy(module(batch[0]), batch[1])
        self.left -= 1
        if self.left == 0:
            raise self.error("boom")
        return loss


# -- techniques -------------------------------------------------------------------------------------------------------


class _Toy(Technique):
    @classmethod
    @override
    def key(cls):
        return cls.__name__.lower()  # several techniques in one file: the suite's own have one each


class LossRecorder(_Toy, LossTechnique):
    """Notes the sample losses of each call, and changes nothing."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.losses, self.names, self.sites = [], [], []

    @override
    def loss_term(self, call):
        self.losses.append(call.losses.clone())
        self.names.append(call.name)
        self.sites.append(call.site)


class IndexRecorder(_Toy, LossTechnique):
    """Notes the dataset indices of each batch, and changes nothing."""

    needs_indices = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.indices, self.inputs, self.sizes = [], [], []

    @override
    def loss_term(self, call):
        samples = call.samples(self)
        self.indices.append(samples.indices.tolist())
        self.sizes.append(samples.size)


class WeightsByLabel(_Toy, LossTechnique):
    """Sample weight ``1 + factor * label``."""

    def __init__(self, factor=0.5, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    @override
    def sample_weights(self, call):
        return 1 + self.factor * call.labels


class WeightsByPosition(_Toy, LossTechnique):
    """Sample weight ``1 + position / batch size``, for any loss."""

    @override
    def sample_weights(self, call):
        return 1 + torch.arange(call.batch_size, device=call.input.device) / call.batch_size


class Term(_Toy, LossTechnique):
    """Adds ``factor`` times the mean square of the sample's logits."""

    def __init__(self, factor=0.1, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    @override
    def describe(self):
        return f"factor={self.factor:g}"

    @override
    def loss_term(self, call):
        return self.factor * call.logits.square().mean(1)


class Penalty(_Toy, PenaltyTechnique):
    """Adds ``factor`` times the sum of the squared parameters."""

    def __init__(self, factor=0.01, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    @override
    def penalty(self, module):
        return self.factor * sum(p.square().sum() for p in module.parameters())


class BatchShift(_Toy, BatchTechnique):
    """Adds ``amount`` to the inputs of an ``(x, y)`` batch."""

    def __init__(self, amount=0.5, **kwargs):
        super().__init__(**kwargs)
        self.amount = amount

    @override
    def transform_batch(self, batch, step):
        x, y = batch
        return x + self.amount, y


class ShiftTargets(_Toy, LossTechnique):
    """Trains on the class after the given one."""

    @override
    def change_targets(self, call):
        return (call.labels + 1) % CLASSES


class Doubled(WeightMapTechnique):
    """w = 2 v: with SGD the learning rate of the weight is four times its own."""

    def __init__(self, names=("net.3.weight",), **options):
        super().__init__(**options)
        self.names, self.latents, self.mapped = names, Latents(), 0

    @classmethod
    @override
    def key(cls):
        return cls.__name__.lower()

    @override
    def weights_to_map(self, module):
        return self.names

    @override
    def begin_map(self, weights):
        return self.latents_of(weights)

    @override
    def latents_of(self, weights):
        return {name: weight / 2 for name, weight in weights.items()}

    @override
    def map_weights(self, latents, weights):
        assert weights
        self.mapped += 1
        for name, weight in weights.items():
            weight.copy_(2 * latents[name])

    @override
    def pull_back(self, latents, weights, gradients):
        for gradient in gradients.values():
            gradient.mul_(2)


class LowRank(_Toy, WeightMapTechnique):
    """w = v + 0.5 B A with v frozen; the gradient at the layer, or that of the weight with ``dense``."""

    def __init__(self, names=("net.3.weight",), rank=2, dense=False, row_scale=None, lr_factor=1.0, **options):
        super().__init__(**options)
        self.names, self.rank, self.row_scale = names, rank, row_scale
        self.is_product, self.latents, self.mapped = not dense, Latents(lr_factor, frozen=True), 0
        self.layouts = {}

    @override
    def weights_to_map(self, module):
        self.layouts = layouts_of(module)
        return self.names

    @override
    def begin_map(self, weights):
        for number, (name, weight) in enumerate(weights.items()):
            rows, columns = self.layouts[name].matrix(weight).shape
            draw = torch.Generator().manual_seed(number)
            kind = torch.promote_types(weight.dtype, torch.float32)
            left = torch.randn(rows, self.rank, generator=draw, dtype=kind) * 0.1
            right = torch.randn(self.rank, columns, generator=draw, dtype=kind) * 0.3
            self.latents.own[name] = {"B": left.requires_grad_(), "A": right.requires_grad_()}
        return {name: weight.clone() for name, weight in weights.items()}

    @override
    def latents_of(self, weights):
        added = {n: self.layouts[n].weight(product(self.factors_of(n)), w.shape) for n, w in weights.items()}
        return {name: (weight - added[name]).to(weight.dtype) for name, weight in weights.items()}

    @override
    def map_weights(self, latents, weights):
        self.mapped += 1
        for name, weight in weights.items():
            write_product_(weight, latents[name], self.factors_of(name), self.layouts[name])

    @override
    def factors_of(self, name):
        own = self.latents.own[name]
        scale = None if self.row_scale is None else torch.linspace(1, self.row_scale, len(own["B"])).to(own["B"])
        return Factors(own["B"], own["A"], 0.5, scale)

    @override
    def pull_back(self, latents, weights, gradients):
        for name, gradient in gradients.items():
            left, right = pulled_back(self.layouts[name].matrix(gradient), self.factors_of(name))
            self.latents.add_gradients(name, {"B": left, "A": right})

    @override
    def state_dict(self):
        return self.latents.state_dict()

    @override
    def load_state_dict(self, state_dict):
        self.latents.load_state_dict(state_dict)


class Halve(_Toy, WeightTechnique):
    """Trains with half the weights of the named parameters."""

    def __init__(self, names=("net.0.weight", "net.3.weight"), **kwargs):
        super().__init__(**kwargs)
        self.names = names

    @override
    def weights_to_edit(self, module):
        return self.names

    @override
    def edit_weights(self, weights):
        for weight in weights.values():
            weight.mul_(0.5)


class Watch(_Toy, LossTechnique):
    """Adds ``factor`` times the mean square of a layer's outputs, per sample."""

    def __init__(self, layer="net.1", factor=0.1, **kwargs):
        super().__init__(**kwargs)
        self.layer, self.factor = layer, factor

    @property
    @override
    def feature_layers(self):
        return [self.layer]

    @override
    def loss_term(self, call):
        return self.factor * call.step.features[self.layer].square().mean(1)
