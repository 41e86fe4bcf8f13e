"""``lightning-reg sparsity``: what of a file's weights is zero, and in which pattern."""

import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_reg.engine.host.checkpoints import read_checkpoint
from lightning_reg.engine.host.commands import Commands, Options

__all__ = ["add_command"]

_GROUPS = (4, 8, 16, 32)


def add_command(commands: Commands) -> None:
    """Adds ``sparsity``.

    Args:
        commands: Of ``lightning-reg``.

    """
    parser = commands.add("sparsity", "show what of a checkpoint's weights is zero, and in which N:M pattern", _run)
    parser.add_argument("checkpoint", type=str, metavar="CKPT", help="of Lightning, torch or safetensors")
    parser.add_argument(
        "--pattern", type=str, metavar="N:M", help="fail unless some weight has it, and all sparse ones"
    )
    parser.add_argument("--all", action="store_true", help="show weights without zeros too")


def _run(options: Options) -> None:
    wanted = None if options.pattern is None else _pattern(options.pattern)
    content = read_checkpoint(options.checkpoint)
    weights = {name: value for name, value in content.get("state_dict", content).items() if _is_weight(value)}
    if not weights:
        raise ValueError(f"{options.checkpoint} holds no weights of two dimensions or more.")
    table = Table(
        "weight", "shape", "zeros", "pattern along the inputs", title=options.checkpoint, title_justify="left"
    )
    sparse = {name: value for name, value in weights.items() if (value == 0).any()}
    for name, value in (weights if options.all else sparse).items():
        shape = " x ".join(map(str, value.shape))
        table.add_row(escape(name), shape, f"{100 * float((value == 0).double().mean()):.1f} %", tightest(value) or "-")
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    share = zeros / sum(value.numel() for value in weights.values())
    table.caption = f"{len(sparse)} of {len(weights)} weights have zeros; {100 * share:.1f} % of all numbers are zero"
    Console().print(table)
    if wanted is not None:
        _check(sparse, *wanted)


def _pattern(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"--pattern must be N:M with N below M, 2:4 for example, got {text!r}.")
    return int(match[1]), int(match[2])


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _check(sparse: dict[str, Tensor], n: int, m: int) -> None:
    if not sparse:
        raise ValueError("no weight has a zero.")
    broken = [name for name, value in sparse.items() if not 0 <= most_kept(value, m) <= n]
    if broken:
        raise ValueError(f"not {n}:{m} are {', '.join(broken)}.")


def most_kept(weight: Tensor, m: int) -> int:
    """The largest number of weights other than zero in a group.

    Args:
        weight: ``(out, in, ...)``; groups of neighbours along the inputs.
        m: Size of a group.

    Returns:
        The number; -1 if groups do not divide the inputs.

    """
    rows = weight.movedim(1, -1).flatten(0, -2)
    if rows.shape[-1] % m:
        return -1
    return int((rows.reshape(len(rows), -1, m) != 0).sum(-1).max())


def tightest(weight: Tensor) -> str:
    """The pattern that leaves the fewest weights, the smallest groups of those: ``"1:16"``; "" for none.

    Args:
        weight: ``(out, in, ...)``.

    Returns:
        The pattern.

    """
    kept = {m: most_kept(weight, m) for m in _GROUPS}
    shares = {m: n / m for m, n in kept.items() if 0 <= n < m}
    if not shares:
        return ""
    m = min(shares, key=lambda size: (shares[size], size))
    return f"{kept[m]}:{m}"
