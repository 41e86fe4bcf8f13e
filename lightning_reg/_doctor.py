"""``lightning-reg doctor``: what is installed, what works with it here, and what is wrong."""

import logging
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_reg.engine.host import private_names
from lightning_reg.engine.host.commands import Commands, Options
from lightning_reg.version import __version__

__all__ = ["add_command"]

# They stole credentials on import (GHSA-w37p-236h-pfx3).
_COMPROMISED = ("2.6.2", "2.6.3")
_PACKAGES = (
    "lightning", "pytorch-lightning", "torch", "torchmetrics", "safetensors", "rich", "numpy", "jsonargparse",
    "matplotlib", "transformers",
)  # fmt: skip


def add_command(commands: Commands) -> None:
    """Adds ``doctor``.

    Args:
        commands: Of ``lightning-reg``.

    """
    commands.add("doctor", "show versions, what torch and the GPU can do here, and what is wrong", _run)


def _run(options: Options) -> None:
    console = Console()
    versions = {name: _version(name) for name in _PACKAGES}
    with _quiet():
        missing = private_names.missing_names()
        exports = [(name, *_outcome(attempt)) for name, attempt in _EXPORTS]
    installed = [("lightning_reg", __version__), ("python", platform.python_version())]
    console.print(_table("versions", [*installed, *((name, found or "-") for name, found in versions.items())]))
    console.print(_table("torch here", list(_features())))
    console.print(_table("ways to export a network here", [(name, what) for name, _, what in exports]))
    names = private_names.private_names()
    found = f"{len(names) - len(missing)} of {len(names)}"
    console.print(_table("private names of Lightning and torch", [("found", found)]))
    troubles = list(_troubles(versions, missing))
    if troubles:
        raise ValueError(" ".join(troubles))
    console.print("Nothing is wrong.")


def _troubles(versions: dict[str, str | None], missing: list[str]) -> Iterator[str]:
    for name in ("lightning", "pytorch-lightning"):
        if versions[name] in _COMPROMISED:
            yield (
                f"{name} {versions[name]} was compromised and steals credentials on import: uninstall it, install"
                " another release, and rotate the credentials of this machine (GHSA-w37p-236h-pfx3)."
            )
    if missing:
        yield (
            f"the installed releases lack {', '.join(missing)}, which techniques use: install releases of Lightning and"
            " torch that lightning_reg was tested with."
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


# -- torch ------------------------------------------------------------------------------------------------------------


def _features() -> Iterator[tuple[str, str]]:
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    yield "torch.compile", "has a compiler" if shutil.which("cc") or shutil.which("gcc") else "no C compiler was found"
    yield "several processes", ", ".join(_backends()) or "no backend"
    if torch.backends.mps.is_available():
        yield "Apple GPU", "available"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
        return
    for number in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(number)
        able = ["bfloat16"] if torch.cuda.is_bf16_supported() else []
        able += ["2:4 sparse tensor cores"] if capability >= (8, 0) else []
        able += ["float8"] if capability >= (8, 9) else []
        about = f"{torch.cuda.get_device_name(number)}, capability {capability[0]}.{capability[1]}"
        yield f"GPU {number}", f"{about}: {', '.join(able) or 'float32 and float16'}"


def _backends() -> list[str]:
    if not torch.distributed.is_available():
        return []
    known = {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
    return [name for name, there in known.items() if there]


# -- exports ----------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _outcome(attempt: Callable[[nn.Module, torch.Tensor], str]) -> tuple[bool, str]:
    """Tries on a small network."""
    try:
        return True, attempt(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.zeros(2, 4))
    except Exception as error:  # noqa: BLE001 # whatever it is, it does not work here
        return False, f"does not work: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"


def _exported(network: nn.Module, x: torch.Tensor) -> str:
    torch.export.export(network, (x,))
    return "works"


def _saved(network: nn.Module, x: torch.Tensor) -> str:
    from safetensors.torch import save

    save(network.state_dict())
    return "works"


def _onnx(network: nn.Module, x: torch.Tensor) -> str:
    lacking = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if lacking:
        return f"needs {' and '.join(lacking)}, which are not installed"
    torch.onnx.export(network, (x,), dynamo=True)
    return "works"


def _sparse(network: nn.Module, x: torch.Tensor) -> str:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return "needs an NVIDIA GPU of capability 8.0 or above"
    weight: Any = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(64, 32).half().cuda()
    torch.sparse.to_sparse_semi_structured(weight)
    return "works"


_EXPORTS: tuple[tuple[str, Callable[[nn.Module, torch.Tensor], str]], ...] = (
    ("safetensors", _saved),
    ("torch.export", _exported),
    ("ONNX", _onnx),
    ("to_semi_structured (2:4)", _sparse),
)
