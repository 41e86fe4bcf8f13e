"""The files of an adapter as PEFT writes them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

__all__ = ["CONFIG", "ROOT", "TENSORS", "read_peft"]

TENSORS, CONFIG, ROOT = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def read_peft(folder: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor, float]], dict[str, Tensor], dict[str, Any]]:
    """Reads an adapter.

    Args:
        folder: With the two files.

    Returns:
        By layer B, A (both as matrices) and their product's factor; other tensors by name; the configuration.

    Raises:
        ValueError: If it is no plain LoRA.

    """
    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError(f"{str(folder)!r} is no plain LoRA: without DoRA, with bias='none', peft_type='LORA'.")
    tensors = {key.removeprefix(ROOT): value for key, value in load_file(Path(folder) / TENSORS).items()}
    factors = {}
    for key in [key for key in tensors if re.search(r"\.lora_(embedding_)?A(\.weight)?$", key)]:
        layer, other = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", key), re.sub(r"A(\.weight)?$", r"B\1", key)
        right, left = tensors.pop(key).flatten(1), tensors.pop(other).flatten(1)
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        factors[layer] = (left, right, alpha / (len(right) ** 0.5 if config.get("use_rslora") else len(right)))
    if any("lora_" in key for key in tensors):
        raise ValueError(f"{str(folder)!r} has tensors of another kind of LoRA: {sorted(tensors)[:3]}.")
    return factors, tensors, config


def _by_pattern(patterns: Mapping[str, float] | None, layer: str, usual: float) -> float:
    found = [value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key.lstrip('^')})$", layer)]
    return float(found[0] if found else usual)
