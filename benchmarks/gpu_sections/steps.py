"""What a step costs: plain, by hand, by the engine, eager and compiled; kernels and host syncs of a step."""

import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from turns import Turns, fit_in_turns, ratio

from gpu_sections.arms import MODELS, arms_of, loader_of, new_net
from gpu_sections.counting import count_step
from gpu_sections.networks import compile_
from gpu_sections.setting import NO_GPU, Part, Setting, interval

__all__ = ["SECONDS", "parts"]

SECONDS = 480
SKIPPED = 5  # first rounds, which choose kernels


def parts(setting: Setting) -> list[Part]:
    """Eager first, then the counts, then compiled; in small a few of each but of ResNet's and GPT's eager steps."""
    found = []
    for kind, measure in (("eager", eager), ("count", count), ("compiled", in_graphs)):
        for name, model in MODELS.items():
            few = setting.small and (name == "vit" or kind != "eager")
            keys = ("loss_reweighting",) if few else model.keys
            for key in ("plain", *keys) if kind == "count" else keys:
                # The compiler cannot be cut short; a network of blocks compiles one of them.
                needs = 0.0 if setting.small or kind != "compiled" else 120.0 if name == "resnet50" else 60.0
                run = partial(measure, name, key)
                share = {"eager": 1.0, "count": 0.3, "compiled": 2.0}[kind]
                found.append(Part(f"{name}/{kind}/{key}", run, model.batch_of(setting), share, needs))
    return found


def eager(name: str, key: str, setting: Setting) -> dict[str, Any]:
    return compare(name, key, setting, backend="")


def in_graphs(name: str, key: str, setting: Setting) -> dict[str, Any]:
    torch.compiler.reset()  # or the graphs of earlier parts count towards the compiler's limit
    backend = "inductor" if setting.on_gpu else "eager"
    notes = [] if setting.on_gpu else ["compiled to eager code"]
    with warnings_of_compiler() as told:
        result = compare(name, key, setting, backend)
    return result | {"notes": [*notes, *dict.fromkeys(told)]}


@contextmanager
def warnings_of_compiler() -> Iterator[list[str]]:
    """What torch's compiler says of giving up: then part of the step was eager after all."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage().splitlines()[0][:200])
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def compare(name: str, key: str, setting: Setting, backend: str) -> dict[str, Any]:
    """Ratios of step times, in turns."""
    model = MODELS[name]
    make_loader, samples = loader_of(model, setting)
    arms = arms_of(key, new_net(model, setting), samples)
    if backend:
        for module, _ in arms.values():
            compile_(module.net, backend)
    turns = Turns(arms, 3 if setting.small else 200, max(setting.left(), 0.0), at_least=2 if setting.small else 15)
    options = setting.trainer_options(max_epochs=-1, log_every_n_steps=50)
    times = fit_in_turns(arms, make_loader, turns, **options)
    skip = 1 if setting.small else SKIPPED
    over = {under: interval(ratio(times, "engine", under, skip)) for under in ("by hand", "plain")}
    return {
        "figures": {
            "engine / by hand": over["by hand"],
            "engine / plain": over["plain"],
            "by hand / plain": interval(ratio(times, "by hand", "plain", skip)),
            "plain, ms": 1e3 * statistics.median(times["plain"][skip:]),
            "rounds": len(times["plain"]) - skip,
        }
    }


def count(name: str, key: str, setting: Setting) -> dict[str, Any]:
    """Kernels and waits of the engine's step, and of the step by hand."""
    batch = setting.batch = min(setting.batch, 8)  # it changes neither
    model = MODELS[name]
    make_loader, samples = loader_of(model, setting)
    arms = arms_of(key, new_net(model, setting), samples)
    arms.pop("plain" if key != "plain" else "", None)
    found = {arm: count_step(*arms[arm], make_loader(), setting) for arm in arms}
    last = found.get("engine") or found["plain"]
    hand = found.get("by hand", {})
    figures = {
        "kernels per step": last["kernels"],
        "by hand": hand.get("kernels"),
        "host syncs per step": last["syncs"],
        "of them by hand": hand.get("syncs"),
    }
    notes = last["notes"] if setting.on_gpu else [f"kernels and syncs: {NO_GPU}"]
    return {"batch": batch, "figures": figures, "notes": notes}
