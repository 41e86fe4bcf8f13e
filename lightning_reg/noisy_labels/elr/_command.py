"""``lightning-reg suspects``: the labels that a checkpoint of an early-learning technique believes to be wrong."""

from typing import Any

import torch
from rich.console import Console

from lightning_reg.engine.host.checkpoints import read_checkpoint
from lightning_reg.engine.host.commands import Commands, Options
from lightning_reg.noisy_labels._reports import errors_by_confidence
from lightning_reg.noisy_labels._target_table import targets_in_state

__all__ = ["add_command"]


def add_command(commands: Commands) -> None:
    """Adds ``suspects``.

    Args:
        commands: Of ``lightning-reg``.

    """
    parser = commands.add("suspects", "show labels that ELRCallback or ELRPlusCallback believes to be wrong", _run)
    parser.add_argument("checkpoint", type=str, metavar="CKPT", help="a checkpoint of Lightning's, of a run with it")
    parser.add_argument(
        "--csv", type=str, metavar="FILE", help="write all of them: index, given, suggested, confidence"
    )
    parser.add_argument("--callback", type=str, metavar="KEY", help="which callback's, if there are several")


def _run(options: Options) -> None:
    states = read_checkpoint(options.checkpoint).get("callbacks", {})
    known = {key: state for key, state in states.items() if isinstance(state, dict) and _tables(state)}
    if options.callback is not None:
        known = {key: state for key, state in known.items() if key == options.callback}
    if len(known) != 1:
        raise ValueError(_sentence(options.checkpoint, list(states), list(known)))
    (state,) = known.values()
    parts = [targets_in_state(table) for table in _tables(state)]
    errors = errors_by_confidence(torch.stack([targets for targets, _ in parts]).sum(0), parts[0][1])
    Console().print(errors)
    if options.csv is not None:
        errors.to_csv(options.csv)
        Console().print(f"{options.csv}: {len(errors)} rows", markup=False, soft_wrap=True)


def _tables(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Tables of targets in a callback's state: one, or one for each network."""
    tables = state.get("tables", [state])
    return [table for table in tables if isinstance(table, dict) and {"targets", "labels"} <= table.keys()]


def _sentence(path: str, callbacks: list[str], known: list[str]) -> str:
    if known:
        return f"{path} has targets of {' and '.join(known)}; write --callback {known[0]!r}."
    return f"{path} has no targets of ELRCallback or ELRPlusCallback, but the callbacks {callbacks or 'of no run'}."
