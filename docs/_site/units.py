"""A page for each technique, made of its docstring, its case in the tests and what was measured."""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import effect_pictures
import results
from purposes import path_of, title, units_by_folder
from purposes import summary as purpose_summary
from text import markdown, paragraphs

from lightning_reg import registry
from lightning_reg.engine.run.phases import LOSS_PHASES, phases_of
from lightning_reg.engine.technique import Technique

ROOT = Path(__file__).resolve().parents[2]
# What a technique does to a step, in words that need no knowledge of the engine.
_DOES = {
    "own_modules": "trains small modules of its own with your optimizer",
    "draw_samples": "can choose the samples that an epoch is made of",
    "transform_batch": "changes the batch before your `training_step` gets it",
    "observe_batch": "shows each batch to a second network",
    "extra_views": "sends further versions of the batch through your network",
    "edit_weights": "puts changed weights into your layers for the forward pass",
    "edit_inputs": "changes what a layer gets",
    "edit_features": "changes what a layer puts out",
    "parts": "lets a part of your network run several times on one batch",
    "change_input": "changes the logits that your loss is computed from",
    "change_targets": "replaces the targets that your loss sees",
    "change_losses": "replaces the losses of the samples",
    "sample_weights": "weighs the samples in your loss",
    "loss_term": "adds a term to your loss",
    "step_term": "adds a term to what `training_step` returns",
    "penalty": "adds the gradient of a penalty on the weights",
    "change_gradients": "changes gradients before the optimizer's step",
    "after_step": "corrects the weights after the optimizer's step",
    "map_weights": "trains your weights through a function of them",
}
_DATA = {
    "classification": "class labels and logits",
    "images": "images with class labels",
    "regression": "numbers as targets",
    "tokens": "token logits",
}
# Of those that `lightning_reg.plots` draws something for; drawn by `docs/_site/pictures.py`.
_PICTURES = {
    "ELRCallback": {
        "memorisation": "Agreement of the targets with the given labels, and the share of suspects, over the steps",
        "suspects": "A matrix of given and suggested labels, and twelve suspects",
    },
    "LossReweighting": {"weights": "Effective number of samples in a batch, and the largest weight"},
    "SoupAverager": {"ladder": "Candidates of a greedy soup from the best one down, accepted and refused"},
    "NMSparsity": {
        "masks": "Kept magnitude of each layer, and weights that changed sides",
        "masks_over_time": "Weights of each layer that changed sides, and its kept magnitude, over the steps",
    },
    "PredictionDistillation": {"forgetting": "Accuracy on each of five tasks after each of them"},
    "IPRMonitor": {
        "grokking": "Accuracies and the share of periodic neurons over the steps, and their ratios at the end"
    },
    "ContinualMetrics": {"forgetting": "Accuracy on each of five tasks after each of them"},
}
_USE = re.compile(r"\b(Use it|Leave it|Not for|Use this|Tune)\b")


def pages() -> Iterator[tuple[str, str]]:
    """Paths below ``docs`` and texts of all generated pages about techniques."""
    for folder, units in units_by_folder().items():
        yield f"techniques/{folder}/index.md", _purpose(folder, units)
        yield f"functions/{folder}.md", _functions(folder, units)
        for unit in units:
            for member in unit.members():
                yield path_of(folder, member), _page(unit, member)


def needs(member: registry.Public) -> str:
    """What it needs of a module, in one line for a table."""
    if member.kind != "technique":
        return (member.kind or "").replace("_", " ")
    required = [name for name, one in _parameters(member) if one.default is inspect.Parameter.empty]
    said = [_data(member)] if set(phases_of(member.value)) & (LOSS_PHASES | {"extra_views", "transform_batch"}) else []
    said += ["samples that it can follow"] if member.value.needs_indices else []
    said += [f"you name `{name}`" for name in required]
    return ", ".join(word for word in said if word) or "nothing"


def compositions(name: str) -> str:
    """What was seen of a technique beside the others, from ``docs/compositions.md``."""
    text = (ROOT / "docs" / "compositions.md").read_text()
    found = re.search(rf"^## {name}\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _page(unit: registry.Unit, member: registry.Public) -> str:
    about = paragraphs(member.value)
    when = [part for part in about if _USE.search(part)]
    cost = [part for part in about if part.startswith(("Memory:", "Cost:"))]
    what = [part for part in about if part not in when + cost]
    head = [f"# {member.name}", f"**{markdown(registry.summary(member.value))}**", _tags(unit, member)]
    sections = [
        ("What it does", _joined(what)),
        ("Pictures", pictures(unit, member.name)),
        ("When to use it, and when not", _joined(when)),
        ("What it needs of your module", _needs_in_full(member)),
        ("On models that people have", results.models_of(member.name)),
        ("Arguments and methods", _reference(member)),
        ("What it costs", "\n\n".join([_joined(cost), results.cost_of(member.home.rpartition(".")[2])]).strip()),
        ("What it goes with", compositions(member.name)),
        ("Evidence", "\n\n---\n\n".join(map(results.excerpt, results.files_of(unit.key))).replace("](../", "](../../")),
        ("Source", markdown(registry.section(member.value, "Source"))),
        ("Where it differs from its source", markdown(registry.section(member.value, "Differs"))),
        ("Without Lightning", _cores(unit)),
    ]
    return "\n\n".join([*head, *(f"## {name}\n\n{text}" for name, text in sections if text)]) + "\n"


def _tags(unit: registry.Unit, member: registry.Public) -> str:
    does = [_DOES[phase] for phase in phases_of(member.value)] if member.kind == "technique" else []
    said = f" It {', '.join(does)}." if does else ""
    return f"{(member.kind or '').replace('_', ' ').capitalize()} for [{title(unit.folder).lower()}](index.md).{said}"


def _needs_in_full(member: registry.Public) -> str:
    if member.kind != "technique":
        return ""
    names = dict(_parameters(member))
    lines = [f"- `{name}`: you name it; it has no default." for name, one in names.items() if one.default is one.empty]
    phases = set(phases_of(member.value))
    if phases & LOSS_PHASES:
        lines.append(
            "- A loss that `training_step` computes by a function of `torch.nn.functional` or a module of `torch.nn`"
            " (also inside a Hugging Face model), or hands over by `LossMixin`. With several, say which:"
            " [`loss=`](../../arguments.md#loss)."
        )
    if "step_term" in phases:
        lines.append("- A loss that `training_step` returns, whatever made it.")
    if member.value.needs_indices:
        lines.append(
            "- Samples that it can follow: a map-style dataset in a DataLoader, or a batch entry that you name by"
            " [`index_key`](../../arguments.md#index_key)."
        )
    if _data(member):
        lines.append(f"- Tried on {_data(member)}.")
    reasons = _case(member).exempt.values() if _case(member) else ()
    lines += [f"- Not as elsewhere: {reason}." for reason in reasons]
    guessed = [name for name in names if name in _explained()]
    links = ", ".join(f"[`{name}`](../../arguments.md#{name})" for name in guessed)
    lines += [f"- Arguments that are explained at length: {links}."] if links else []
    return "\n".join(lines) or "Nothing: any LightningModule."


def pictures(unit: registry.Unit, name: str) -> str:
    """What a page shows: pictures of a run, and of what was measured; "" if there is neither."""
    drawn = [f"![{words}](../../assets/{file}.png)" for file, words in _PICTURES.get(name, {}).items()]
    data = "digits with 40 % of the labels redrawn or in five tasks, or from sums"
    how = f"[How it is drawn](../../how-to/pictures.md), from {data}."
    return "\n\n".join(part for part in [*drawn, how if drawn else "", effect_pictures.section(unit.key)] if part)


def _data(member: registry.Public) -> str:
    case = _case(member)
    kinds = [case.data, *case.also] if case and isinstance(case.data, str) else []
    words = list(dict.fromkeys(_DATA[kind] for kind in kinds if kind in _DATA))
    return " or ".join(words) if len(words) < 3 else "any kind of data"


@cache
def _case_of(cls: type[Technique]) -> Any:  # noqa: ANN401 # a case of the tests
    sys.path.insert(0, str(ROOT))
    try:
        from tests.conformance.discovery import case_of

        return case_of(cls)
    finally:
        sys.path.pop(0)


def _case(member: registry.Public) -> Any:  # noqa: ANN401 # a case of the tests
    return _case_of(member.value) if member.kind == "technique" else None


@cache
def _explained() -> frozenset[str]:
    return frozenset(re.findall(r"^## (\w+)$", (ROOT / "docs" / "arguments.md").read_text(), re.MULTILINE))


def _parameters(member: registry.Public) -> list[tuple[str, inspect.Parameter]]:
    return list(inspect.signature(member.value).parameters.items())


def _reference(member: registry.Public) -> str:
    options = {"members": str(_own_methods(member.value)).replace("'", '"')}
    lines = [f"::: {member.home}.{member.name}", "    options:", *(f"      {k}: {v}" for k, v in options.items())]
    return "\n".join(lines)


def _own_methods(value: Any) -> list[str]:  # noqa: ANN401 # a class or function
    """Methods that a user calls: those that are no hook of a base class."""
    if not inspect.isclass(value):
        return []
    hooks = {name for base in value.__mro__[1:] if not base.__name__.startswith("_") for name in vars(base)}
    return [name for name in vars(value) if name[0] != "_" and name not in hooks and not name.startswith("needs_")]


def _joined(parts: Sequence[str]) -> str:
    return markdown("\n\n".join(parts))


def _cores(unit: registry.Unit) -> str:
    members = {member.name for member in unit.members()}
    page = f"../../functions/{unit.folder}.md"
    names = [
        f"[`{core.name}`]({f'{core.name}.md' if core.name in members else f'{page}#{core.name.lower()}'})"
        for core in unit.cores()
    ]
    return f"In any training loop: {', '.join(names)}." if names else ""


def _purpose(folder: str, units: Sequence[registry.Unit]) -> str:
    head = [f"# {title(folder)}", "", purpose_summary(folder), ""]
    link = f"[The functions](../../functions/{folder}.md) work in any training loop."
    return "\n".join([*head, *_rows(units), "", link, ""])


def _rows(units: Sequence[registry.Unit]) -> list[str]:
    rows = [
        f"| [{member.name}]({member.name}.md) | {markdown(registry.summary(member.value))} | {needs(member)} |"
        for unit in units
        for member in unit.members()
    ]
    return ["| name | what it does | needs |", "|---|---|---|", *rows]


def _functions(folder: str, units: Sequence[registry.Unit]) -> str:
    lines = [f"# Functions: {title(folder).lower()}", "", "All of them are in `lightning_reg.functional` too.", ""]
    for unit in units:
        members = {member.name for member in unit.members()}
        for core in unit.cores():
            if core.name not in members:
                lines += [f"## {core.name}", "", f"::: {core.home}.{core.name}", "    options:"]
                lines += ["      show_root_heading: false", "      members: false", ""]
    return "\n".join(lines)
