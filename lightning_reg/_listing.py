"""``lightning-reg list`` and ``lightning-reg show``: what there is, and what is known of one of it."""

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import product
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import lightning_reg
from lightning_reg import functional, registry
from lightning_reg.engine.host.commands import Commands, Options
from lightning_reg.engine.run.composition import conflict_between

__all__ = ["add_command"]


def add_command(commands: Commands) -> None:
    """Adds ``list`` and ``show``.

    Args:
        commands: Of ``lightning-reg``.

    """
    listing = commands.add("list", "show what there is, and what it is for", _list)
    listing.add_argument("--kind", choices=registry.KINDS, help="those of one kind")
    listing.add_argument("--for", choices=registry.purposes(), metavar="PURPOSE", help="those of one purpose")
    showing = commands.add("show", "show the card of one technique: what for, arguments, what it goes with", _show)
    showing.add_argument("name", type=str, metavar="NAME", help="a public name, ELRCallback for example")


def _list(options: Options) -> None:
    table = Table(title="lightning_reg", title_justify="left")
    for column in ("name", "kind", "for", "what it does"):
        table.add_column(column, no_wrap=column == "name")
    for folder, member in _members():
        if options["kind"] in (None, member.kind) and options["for"] in (None, folder):
            what = escape(_plain(registry.summary(member.value)))
            table.add_row(member.name, _words(member.kind or ""), _words(folder), what)
    if not table.row_count:
        purpose = "" if options["for"] is None else f" for {_words(options['for'])}"
        raise ValueError(f"there is no {_words(options['kind'] or 'unit')}{purpose}.")
    Console().print(table)


def _members() -> Iterator[tuple[str, registry.Public]]:
    for unit in registry.units():
        for member in unit.members():
            yield unit.folder, member


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(text: str) -> str:
    """Without the marks of docstrings."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("`", "")


# -- one of it --------------------------------------------------------------------------------------------------------


def _show(options: Options) -> None:
    name = options.name
    package = next((package for package in (lightning_reg, functional) if name in package.__all__), None)
    if package is None:
        known = {public.lower(): public for public in (*lightning_reg.__all__, *functional.__all__)}
        near = [known[one] for one in get_close_matches(name.lower(), known, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else "`lightning-reg list` shows what there is."
        raise ValueError(f"there is nothing of the name {name!r}; {hint}")
    Console().print(_card(getattr(package, name), f"from {package.__name__} import {name}"))


def _card(value: Any, line: str) -> Group:  # noqa: ANN401 # a public class or function
    folder = value.__module__.split(".")[1]
    kind = registry.kind_of(value) or ("function" if inspect.isfunction(value) else "class")
    parts: list[Any] = [
        Text(f"{value.__name__}: {_words(kind)} for {_words(folder)}", style="bold"),
        Text(_plain(registry.summary(value))),
        Padding(Text(line, style="cyan"), (1, 0)),
    ]
    parts += [Padding(Text(_plain(paragraph)), (0, 0, 1, 0)) for paragraph in registry.paragraphs(value)]
    parts.append(_arguments(value))
    for title in ("Source", "Differs"):
        if text := registry.section(value, title):
            parts.append(Padding(Text(f"{title}: {_plain(text)}"), (1, 0, 0, 0)))
    if kind == "technique":
        parts.append(Padding(Text(_goes_with(value)), (1, 0, 0, 0)))
    return Group(*parts)


def _arguments(value: Any) -> Table:  # noqa: ANN401 # a public class or function
    table = Table("argument", "default", "meaning", title="arguments", title_justify="left")
    said = registry.arguments(value)
    for name, parameter in inspect.signature(value).parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        shown = Text("required", style="bold") if needed else Text(repr(parameter.default))
        table.add_row(name, shown, Text(_plain(said.get(name, ""))))
    return table


def _goes_with(cls: type[Any]) -> str:
    """What it cannot stand beside, found by asking both at their defaults."""
    mine, refused, asked = _example(cls), [], 0
    for _, member in _members():
        other = _example(member.value) if member.kind == "technique" and member.value is not cls else None
        if mine is None or other is None:
            continue
        asked += 1
        sentence = conflict_between(mine, other) or conflict_between(other, mine)
        if sentence is not None:
            refused.append(f"\n- {member.name}: {sentence.removeprefix('cannot stand together: ')}")
    if mine is None:
        return "What it goes with depends on its arguments; what cannot work together is refused when the fit starts."
    if not refused:
        return f"Goes with all {asked} other techniques, at their defaults."
    return f"Goes with {asked - len(refused)} of {asked} other techniques, at their defaults; not with" + "".join(
        refused
    )


# What stands in for arguments without a default: there is no module here that they could speak of.
_STAND_INS: tuple[Any, ...] = (1, 2, 0.5, "layer", ["layer"], [1, 1], [[0.0, 1.0], [1.0, 0.0]])


def _example(cls: type[Any]) -> Any | None:  # noqa: ANN401 # a technique
    """One at its defaults, with anything that is taken for arguments that have none; ``None`` if nothing is."""
    required = [n for n, p in inspect.signature(cls).parameters.items() if p.default is inspect.Parameter.empty]
    for values in product(_STAND_INS, repeat=len(required)):
        with suppress(ValueError, TypeError):
            return cls(**dict(zip(required, values, strict=True)))
    return None
