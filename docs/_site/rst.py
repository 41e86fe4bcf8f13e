"""An extension of griffe: docstrings become Markdown before mkdocstrings reads their sections."""

from typing import Any

import griffe
from text import markdown, without_sections


class Docstrings(griffe.Extension):
    """Rewrites every docstring that the site shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ANN401 # what griffe hands on
        """Rewrites one: a class's source and what differs stand in sections of its page."""
        if obj.docstring:
            text = without_sections(obj.docstring.value, "Source", "Differs") if obj.is_class else obj.docstring.value
            obj.docstring.value = markdown(text)
