"""N:M sparsity: choosing the masks of a billion weights, a step with sparse feed-forward blocks, the 2:4 export."""

import copy
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from by_hand import Plain
from torch import nn
from turns import Turns, fit_in_turns, ratio

from gpu_sections.arms import MODELS, loader_of, new_net
from gpu_sections.averages import OF_FLOAT, times_of
from gpu_sections.networks import Net
from gpu_sections.setting import Part, Setting, interval
from lightning_reg import NMSparsity
from lightning_reg.functional import nm_mask, to_semi_structured

__all__ = ["SECONDS", "parts"]

SECONDS = 150
PATTERNS = ((2, 4), (4, 8), (1, 8), (1, 16), (1, 32))
FEED_FORWARD = "*.fc[12]"


def parts(setting: Setting) -> list[Part]:
    """Masks of 32768 x 32768 weights (the rows stand in for a batch), steps, exports."""
    rows, columns = (64, 64) if setting.small else (32768, 32768)
    found = [
        Part(f"masks/{dtype}/{n}:{m}", partial(choose, dtype, n, m, columns), rows)
        for dtype in OF_FLOAT
        for n, m in (PATTERNS[:1] if setting.small else PATTERNS)
    ]
    for name in ("vit", "gpt"):
        found.append(Part(f"step/{name}", partial(step, name), MODELS[name].batch_of(setting), share=4.0))
        for backend in ("cusparselt", "cutlass"):
            run = partial(export, name, backend)
            found.append(Part(f"export/{name}/{backend}", run, MODELS[name].batch_of(setting), share=2.0))
    return found


def choose(dtype: str, n: int, m: int, columns: int, setting: Setting) -> dict[str, Any]:
    """Against one ``abs()`` of the same weights."""
    weight = torch.randn(setting.batch, columns, device=setting.device).to(OF_FLOAT[dtype])
    ways: dict[str, Callable[[], object]] = {"abs": weight.abs, "mask": lambda: nm_mask(weight, n, m)}
    times = times_of(ways, setting, 5 if setting.small else 30)
    figures = {
        "weights, millions": weight.numel() / 1e6,
        "mask, ms": 1e3 * statistics.median(times["mask"]),
        "abs(), ms": 1e3 * statistics.median(times["abs"]),
        "time / abs()": interval(ratio(times, "mask", "abs", skip=0)),
    }
    return {"figures": figures}


def step(name: str, setting: Setting) -> dict[str, Any]:
    """With sparse feed-forward blocks, against the dense step."""
    model = MODELS[name]
    make_loader, _ = loader_of(model, setting)
    net = new_net(model, setting)
    recipes = {
        "dense": [],
        "2:4, decaying": [NMSparsity(2, 4, layers=FEED_FORWARD, dense_steps=0)],
        "1:8, SR-STE": [NMSparsity(1, 8, recipe="srste", layers=FEED_FORWARD, dense_steps=0)],
        "1:8, STE": [NMSparsity(1, 8, recipe="ste", layers=FEED_FORWARD, dense_steps=0)],
    }
    arms = {recipe: (Plain(copy.deepcopy(net)), callbacks) for recipe, callbacks in recipes.items()}
    # The length is known, so that the phases of the recipes are.
    turns = Turns(arms, 3 if setting.small else 60, setting.left(), at_least=2 if setting.small else 15)
    times = fit_in_turns(arms, make_loader, turns, **setting.trainer_options(log_every_n_steps=50))
    skip = 1 if setting.small else 5
    ratios = {f"{arm} / dense": interval(ratio(times, arm, "dense", skip)) for arm in list(arms)[1:]}
    return {"figures": {"dense, ms": 1e3 * statistics.median(times["dense"][skip:]), **ratios}}


def export(name: str, backend: Any, setting: Setting) -> dict[str, Any]:
    """Time of the layers and of the whole network, dense and with 2:4 weights compressed; what stays dense, and why."""
    model = MODELS[name]
    net = new_net(model, setting).eval()
    prune(net)
    x, _, _ = next(iter(loader_of(model, setting)[0]()))
    rows = setting.batch * (x.shape[1] if x.dim() == 2 else 196)
    dense = copy.deepcopy(net).bfloat16()
    try:
        layers = to_semi_structured(net, "bfloat16", backend, rows=rows)
    except RuntimeError as error:
        if setting.on_gpu:
            raise
        figures = dict.fromkeys(["end to end, dense / compressed", "layers compressed", "largest difference"])
        return {"figures": figures, "notes": [str(error)]}
    x = x if x.dim() == 2 else x.bfloat16()
    with torch.inference_mode():
        ways = {"dense": partial(dense, x), "compressed": partial(net, x)}
        times = times_of(ways, setting, 30)
        difference = float((dense(x).float() - net(x).float()).abs().max() / dense(x).float().abs().max())
    converted = [layer for layer in layers if not layer.why_dense]
    why = Counter(layer.why_dense for layer in layers if layer.why_dense)
    timed = [layer for layer in layers if layer.sparse_ms]
    speed = []
    for kind in dict.fromkeys(layer.name.rpartition(".")[2] for layer in timed):
        alike = [layer for layer in timed if layer.name.endswith(f".{kind}")]
        medians = [statistics.median(getattr(layer, which) for layer in alike) for which in ("dense_ms", "sparse_ms")]
        speed.append(f"{len(alike)} layers {kind}: {medians[0]:.3f} ms dense, {medians[1]:.3f} ms compressed")
    figures = {
        "end to end, dense / compressed": interval(ratio(times, "dense", "compressed", skip=0)),
        "layers compressed": len(converted),
        "largest difference": difference,
    }
    notes = [*(f"{number} layers stay dense: {reason}" for reason, number in why.items()), *speed]
    return {"figures": figures, "notes": notes}


@torch.no_grad()
def prune(net: Net) -> None:
    """2:4 in all linear layers of the blocks."""
    for layer in net.body.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(nm_mask(layer.weight, 2, 4))
