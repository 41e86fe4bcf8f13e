"""Members of each kind that break one law in one place: kind, law, case, and what the law says."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.conformance.kinds.lightning_module import DataModuleCase, LightningModuleCase
from tests.conformance.kinds.network import NetworkCase
from tests.conformance.kinds.sound import INPUT, SOUND, Data, Draws, Gate, MeanDistance, Module, SpreadLoss

__all__ = ["BROKEN"]


class OfTheLastBatch(MeanDistance):
    def update(self, values: Tensor) -> None:
        self.total, self.count = values.abs().pow(2).sum(), torch.tensor(float(len(values)))


class OfOneRank(MeanDistance):
    def __init__(self) -> None:
        super().__init__()
        self._reductions = dict.fromkeys(self._reductions, torch.mean)
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")


class Forgetful(MeanDistance):
    def __getstate__(self):
        return {**super().__getstate__(), "count": torch.ones(())}


class Sticky(MeanDistance):
    def reset(self) -> None:
        total = self.total
        super().reset()
        self.total = total


class HalfSummed(MeanDistance):
    def update(self, values: Tensor) -> None:
        self.total += values.abs().pow(2).sum().float()
        self.count += len(values)


class Undocumented(MeanDistance):
    """Nothing."""


class Shared(Gate):
    def __deepcopy__(self, memo):
        return self


class Hidden(Gate):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.zeros(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).float() @ self.shift + (x * self.weight).float()


class Detached(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.weight.detach()


class Coarse(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight + 512.0) - 512.0 if x.dtype is torch.bfloat16 else x * self.weight


class Breaking(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if float(x.detach().sum()) < 100 else x


class Noisy(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5) * self.weight


class Idle(Gate):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


class Ordered(SpreadLoss):
    def forward(self, x: Tensor) -> Tensor:
        return (x[0] * self.weight).square().sum()


class OwnDraws(Module):
    def training_step(self, batch, batch_idx):
        self.count = getattr(self, "count", 0) + 1
        return super().training_step(batch, batch_idx) * self.count


class Unsaved(Module):
    def save_hyperparameters(self, *args, **kwargs):
        self._set_hparams({"lr": 0.1})


class Untyped(Module):
    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        super().__init__(lr)


class Growing(Data):
    made = 0

    def setup(self, stage):
        super().setup(stage)
        type(self).made += 1
        self.batch_size = 1 + type(self).made


class UntypedData(Data):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()


def moves_weights(module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    with torch.no_grad():
        module[0].weight.add_(1.0)
    return x


def stays_in_evaluation(module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    return module.eval()(x)


def draws(module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    return x + torch.rand(()) * 0


def by_the_batch(module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    return module.eval()(x - x.mean(0))


def needs_autograd(module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    y = module.eval()(x)
    return y if y.requires_grad else 0 * y


def coarse(module: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    return (x + 512.0) - 512.0


class Short(Draws):
    def __len__(self) -> int:
        return self.size - 1


class Stuck(Draws):
    def set_epoch(self, epoch: int) -> None:
        pass


class Alike(Draws):
    def __iter__(self):
        return iter(range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        self.size = 8 + epoch


def _with(kind, make):
    return replace(SOUND[kind], make=make)


def _procedure(function):
    return replace(SOUND["procedure"], subject=function)


_MODULE = {"data": SOUND["lightning_module"].data, "arguments": {"lr": 0.2}}
BROKEN = [
    ("metric", "as_by_hand", _with("metric", OfTheLastBatch), "all batches and by hand"),
    ("metric", "ranks_agree", _with("metric", OfOneRank), "rank 0 of two and one process"),
    ("metric", "copies", _with("metric", Forgetful), "pickled metric and by hand"),
    ("metric", "resets", _with("metric", Sticky), "state after `reset` is not that of a new one"),
    ("metric", "half_precision", _with("metric", HalfSummed), "inputs in torch.bfloat16 and the same numbers"),
    ("metric", "documented", _with("metric", Undocumented), "no section `Source:`"),
    ("network", "copies", _with("network", Shared), "the one copied holds the same weights"),
    ("network", "precise", _with("network", Hidden), "moved to float64 it"),
    ("network", "precise", _with("network", Detached), "not those of finite differences"),
    ("network", "half_precision", _with("network", Coarse), "moved to bfloat16: off by"),
    ("network", "compiles", _with("network", Breaking), "is not compiled in one graph"),
    ("network", "quiet_in_evaluation", _with("network", Noisy), "draws numbers in evaluation"),
    ("network", "trains", _with("network", Idle), "unused gets no gradient"),
    ("network", "documented", replace(SOUND["network"], invalid=[({"size": 3}, "size")]), "is not refused"),
    ("loss", "in_any_order", _with("loss", Ordered), "a batch and its rows in reverse"),
    ("loss", "in_any_order", NetworkCase(Gate, (INPUT,)), "a tensor of shape"),
    ("lightning_module", "resume_is_exact", LightningModuleCase(OwnDraws, **_MODULE), "`state_dict` of a resumed run"),
    ("lightning_module", "saves_and_loads", LightningModuleCase(Unsaved, **_MODULE), "arguments that were saved"),
    ("lightning_module", "runs_from_yaml", LightningModuleCase(Untyped, **_MODULE), "not made from YAML"),
    ("datamodule", "same_every_time", DataModuleCase(Growing, {}), "once more gives other batches"),
    ("datamodule", "runs_from_yaml", DataModuleCase(UntypedData, {}), "not made from YAML"),
    ("procedure", "leaves_as_found", _procedure(moves_weights), r"\['weights'\]"),
    ("procedure", "leaves_as_found", _procedure(stays_in_evaluation), r"\['modes'\]"),
    ("procedure", "leaves_as_found", _procedure(draws), "draws from the global state"),
    ("procedure", "row_by_row", _procedure(by_the_batch), "row 0 alone gives something else"),
    (
        "procedure",
        "row_by_row",
        replace(_procedure(by_the_batch), is_mean=True),
        "mean of both rows alone is something",
    ),
    ("procedure", "where_autograd_is_off", _procedure(needs_autograd), "under inference_mode"),
    ("procedure", "half_precision", _procedure(coarse), "in bfloat16: off by"),
    ("sampler", "as_many_as_it_says", _with("sampler", Short), "has length 7 and draws 8"),
    ("sampler", "same_for_the_same_seed", _with("sampler", Stuck), "draws the same in every epoch"),
    ("sampler", "shared_by_ranks", _with("sampler", Alike), "two ranks draw other samples"),
]
