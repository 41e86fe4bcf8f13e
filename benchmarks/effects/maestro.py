"""Digits at a half and a quarter of every layer's rank, without training again; and what a lasso leaves of the ranks.

MLP 64-256-128-10, SGD 0.03 with momentum 0.9, 60 epochs of batch 32 on 1,000 digits, tested on 797 others. "Half" and
"quarter" keep that share of each layer's present columns; "FLOPs" is the exported network of full present rank as a
share of the dense one. The dense network is cut by its singular values afterwards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import MaestroLowRank
from lightning_reg.functional import export_low_rank, forward_flops, low_rank_product, svd_factors

WAYS: dict[str, dict[str, Any] | None] = {
    "dense, cut afterwards by its SVD": None,
    "factors, no layer truncated": {"sampler": "none", "lasso_weight": 0.0, "threshold": 0.0},
    "one layer truncated in a batch": {"lasso_weight": 0.0, "threshold": 0.0},
    "each layer truncated in a batch": {"sampler": "independent", "lasso_weight": 0.0, "threshold": 0.0},
    "one layer, lasso 5e-4, threshold 1e-2": {"lasso_weight": 5e-4, "threshold": 1e-2},
    "one layer, lasso 2e-3, threshold 1e-2": {"lasso_weight": 2e-3, "threshold": 1e-2},
}


class Classifier(LightningModule):
    """An ordinary classifier: nothing in it knows about lightning_reg."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.03, momentum=0.9)


def shrunk(module: Classifier, technique: MaestroLowRank | None, share: float) -> nn.Module:
    """The network with this share of every layer's columns."""
    if technique is not None:
        ranks = {name: max(1, round(share * rank)) for name, rank in technique.ranks.items()}
        return export_low_rank(technique, module.net, ranks, prefix="net")[0]
    small = Classifier()
    small.load_state_dict(module.state_dict())
    for layer in small.net:
        if isinstance(layer, nn.Linear):
            rank = max(1, round(share * min(layer.weight.shape)))
            layer.weight.data = low_rank_product(*svd_factors(layer.weight), rank)
    return small.net


def figures(module: Classifier, technique: MaestroLowRank | None, x: Tensor, y: Tensor) -> Mapping[str, float]:
    """Accuracies at three sizes, in per cent, and operations as a share of the dense network's."""
    found = {}
    for name, share in (("full", 1.0), ("half", 0.5), ("quarter", 0.25)):
        network = shrunk(module, technique, share)
        with torch.no_grad():
            found[f"{name}_accuracy"] = 100 * float((network(x).argmax(1) == y).float().mean())
    whole = shrunk(module, technique, 1.0)
    found["FLOPs"] = 100 * forward_flops(lambda: whole(x)) / forward_flops(lambda: module.net(x))
    return found


def run(seeds: Sequence[int]) -> list[Arm]:
    """All arms over all seeds.

    Args:
        seeds: Of the data, the network and the order of samples.

    Returns:
        The arms.

    """
    data, arms = load_digits(), {name: Arm(name) for name in WAYS}
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    for seed in seeds:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = order[:1000], order[1000:]
        for name, options in WAYS.items():
            torch.manual_seed(seed)
            module = Classifier()
            technique = None if options is None else MaestroLowRank(**options)
            loader = DataLoader(TensorDataset(x[train], y[train]), 32, shuffle=True)
            fit(module, [] if technique is None else [technique], loader, max_epochs=60)
            arms[name].add(**figures(module, technique, x[test], y[test]))
    return [*arms.values()]
