"""Adapters in PEFT's files: what was trained written as one, and one to go on from. PEFT itself is not needed."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_reg.engine.host.modules import Convolution, TransposedConvolution
from lightning_reg.engine.weights.factors import Factors, Layout, write_product_
from lightning_reg.engine.weights.places import Place, layout_in, places_of
from lightning_reg.finetuning.allora._peft_files import CONFIG, ROOT, TENSORS, read_peft

if TYPE_CHECKING:
    from lightning_reg.finetuning.allora.allora import ALLoRA

__all__ = ["applied", "export_peft", "from_peft"]


class _Adapted(NamedTuple):
    layer: nn.Module
    left: Tensor
    right: Tensor


def export_peft(technique: "ALLoRA", model: nn.Module, folder: str | Path) -> list[str]:
    """Writes what was trained as an adapter that ``PeftModel.from_pretrained(base, folder)`` loads.

    Args:
        technique: After its fit.
        model: What PEFT is to wrap, in the fit the module or a part of it (``module.bert``).
        folder: Gets ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Names of the tensors written.

    Raises:
        ValueError: If something trained has no place in such files: stacks of experts, grouped and transposed
            convolutions, attention's joined projections, shared weights; or is no part of ``model``.

    """
    places, own = places_of(model), technique.latents.own
    if not own:
        raise ValueError("export_peft: nothing was trained yet. Export after the fit.")
    prefix = _prefix(list(own), places)
    factor = technique.product_factor
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    names = {id(layer): name for name, layer in model.named_modules()}
    for weight, parts in own.items():
        place = _only_place(weight, places[weight[len(prefix) :]])
        layer = names[id(place.layer)]
        ranks[layer] = len(parts["A"])
        tensors |= _named(layer, _Adapted(place.layer, parts["B"].detach(), parts["A"].detach()))
    saved = _saved_layers(technique, model, prefix, set(ranks))
    for layer in saved:
        named = model.get_submodule(layer).state_dict()
        tensors |= {f"{ROOT}{layer}.{key}": value for key, value in named.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / TENSORS)
    layers = [model.get_submodule(name) for name in ranks]
    turned = any(layout_in(layer, "weight") == Layout(turned=True) for layer in layers if not _is_table(layer))
    config = _config(ranks, factor, saved, fan_in_fan_out=turned)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return sorted(tensors)


def _prefix(weights: list[str], places: Mapping[str, Any]) -> str:
    """What the names of weights have in the fit before those in the model."""
    first = weights[0]
    starts = ["", *(first[: match.end()] for match in re.finditer(r"\.", first))]
    for start in starts:
        if all(name.startswith(start) and name[len(start) :] in places for name in weights):
            return start
    raise ValueError(
        f"export_peft: {first!r} was trained, and is not in the given {len(places)} parameters. Give the module of the"
        " fit, or the part of it that has all layers that were trained."
    )


def _only_place(weight: str, places: list[Place]) -> Place:
    place = places[0]
    grouped = isinstance(place.layer, TransposedConvolution) or getattr(place.layer, "groups", 1) != 1
    unknown = place.key != "weight" or layout_in(place.layer, "weight") is None
    if len(places) > 1 or place.in_attention or grouped or unknown:
        _refuse(weight, place.layer)
    return place


def _refuse(weight: str, layer: nn.Module) -> NoReturn:
    raise ValueError(
        f"export_peft: {weight!r} of {type(layer).__name__} has no place in an adapter of PEFT (shared weights, grouped"
        " and transposed convolutions, joined projections, stacks). The module has it: save that, or exclude it."
    )


def _is_table(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _named(layer: str, adapted: _Adapted) -> dict[str, Tensor]:
    left, right = adapted.left, adapted.right
    if _is_table(adapted.layer):
        return {f"{ROOT}{layer}.lora_embedding_A": right, f"{ROOT}{layer}.lora_embedding_B": left}
    if isinstance(adapted.layer, Convolution):
        kernel = adapted.layer.weight.shape[1:]
        left, right = left.reshape(*left.shape, *[1] * (len(kernel) - 1)), right.reshape(-1, *kernel)
    return {f"{ROOT}{layer}.lora_A.weight": right, f"{ROOT}{layer}.lora_B.weight": left}


def _saved_layers(technique: "ALLoRA", model: nn.Module, prefix: str, adapted: set[str]) -> list[str]:
    """Layers with parameters that were trained as they are."""
    found = []
    for name in technique.trained_beside:
        if not name.startswith(prefix):
            raise ValueError(f"export_peft: {name!r} was trained, and is not in the given model.")
        layer, _, key = name[len(prefix) :].rpartition(".")
        if not layer or layer in adapted or key not in model.get_submodule(layer).state_dict():
            _refuse(name, model.get_submodule(layer))
        found.append(layer)
    return list(dict.fromkeys(found))


def _config(ranks: Mapping[str, int], factor: float, saved: list[str], *, fan_in_fan_out: bool) -> dict[str, Any]:
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": factor * most,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in others.items()},
        "alpha_pattern": {f"^{re.escape(name)}": factor * rank for name, rank in others.items()},
        "target_modules": "|".join(re.escape(name) for name in ranks),
        "modules_to_save": saved or None,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "task_type": None,
    }


def from_peft(folder: str | Path, model: nn.Module, prefix: str = "") -> "ALLoRA":
    """A technique that goes on from an adapter of PEFT's; its other trained layers are written into the model.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base that PEFT would wrap; layers that the adapter has whole get its values, in place.
        prefix: Name of the model in the LightningModule that will be trained (``"bert"``); "" if it is that.

    Returns:
        ``ALLoRA(scale="fixed", start=folder)`` on the same layers, with the same factors, ranks and scaling.

    Raises:
        ValueError: If the adapter is of another kind than plain LoRA, or of another model.

    """
    from lightning_reg.finetuning.allora.allora import ALLoRA

    factors, others, config = read_peft(folder)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, value in others.items():
        if key not in state or state[key].shape != value.shape:
            raise ValueError(f"from_peft: the adapter has {key!r} {tuple(value.shape)}, and the model has none.")
        with torch.no_grad():
            state[key].copy_(value)
    start = f"{prefix}." if prefix else ""
    return ALLoRA(
        layers=[f"{start}{layer}" for layer in factors],
        rank=config["r"],
        scale="rank" if config.get("use_rslora") else "fixed",
        alpha=float(config["lora_alpha"]),
        train=sorted({f"{start}{key}" for key in others}) or None,
        start=str(folder),
    )


@contextmanager
@torch.no_grad()
def applied(model: nn.Module, folder: str | Path, alpha: float = 1.0) -> Iterator[nn.Module]:
    """While an adapter is added to a model's weights; one inside another gives the sum of both.

    Args:
        model: The base that PEFT would wrap.
        folder: An adapter that :func:`export_peft` or PEFT wrote.
        alpha: How much of it: ``W + alpha c B A``, and layers that it has whole go so far from the base's to its own. 0
            is the base, 1 the trained network.

    Returns:
        A context that gives the model; its weights are put back to the last bit.

    Raises:
        ValueError: If the adapter is of another kind than plain LoRA, or of another model.

    """
    factors, others, _ = read_peft(folder)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    names = {**{f"{layer}.weight": layer for layer in factors}, **{key: key for key in others}}
    for name in names:
        if name not in state:
            raise ValueError(f"applied: the adapter in {str(folder)!r} has {name!r}, and the model has none such.")
    kept = {name: state[name].detach().clone() for name in names}
    try:
        for layer, (left, right, factor) in factors.items():
            weight = state[f"{layer}.weight"]
            layout = layout_in(model.get_submodule(layer), "weight") or Layout()
            both = Factors(left.to(weight.device), right.to(weight.device), alpha * factor)
            write_product_(weight.detach(), kept[f"{layer}.weight"], both, layout)
        for key, value in others.items():
            if value.is_floating_point():
                state[key].lerp_(value.to(state[key]), alpha)
        yield model
    finally:
        for name, value in kept.items():
            state[name].copy_(value)
