"""An extension of griffe: docstrings become Markdown before mkdocstrings reads their sections."""

import re
from functools import cache
from typing import Any

import griffe
from purposes import units_by_folder
from text import markdown


class Docstrings(griffe.Extension):
    """Rewrites every docstring that the site shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ANN401 # what griffe hands on
        """Rewrites one; of what has a page of its own, description and source stand in sections of that page."""
        if obj.docstring and obj.path in _with_a_page():
            arguments = re.search(r"^(Args|Raises|Returns|Example):$", obj.docstring.value, re.MULTILINE)
            obj.docstring.value = markdown(obj.docstring.value[arguments.start() :] if arguments else "")
        elif obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


@cache
def _with_a_page() -> frozenset[str]:
    units = [unit for group in units_by_folder().values() for unit in group]
    return frozenset(f"{member.home}.{member.name}" for unit in units for member in unit.members())
