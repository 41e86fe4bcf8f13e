"""Names of layers, parameters and other entries: near ones, and those that patterns choose.

A pattern is a shell pattern, as in :mod:`fnmatch`: ``*`` stands for any characters, dots included, ``?`` for one, and
``[ab]`` for one of several. A pattern matches a whole name: ``"net.head"`` that layer alone, ``"net.head.*"`` all that
is in it, ``"*.qkv.weight"`` all of such an ending.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

__all__ = ["Patterns", "as_patterns", "is_selected", "matches", "near_names", "plain_name", "unmatched"]

Patterns = str | Sequence[str] | None


def near_names(name: str, names: Iterable[str]) -> str:
    """A sentence part with the names most like ``name``."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    return ", ".join(repr(n) for n in near) or "none at all"


def plain_name(name: str) -> str:
    """A name as the user knows it: without the ``_orig_mod.`` that ``torch.compile`` puts in between."""
    return name.replace("_orig_mod.", "")


def as_patterns(patterns: Patterns) -> list[str]:
    """Patterns as a list; a plain string is one pattern, and ``None`` is none."""
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matches(name: str, patterns: Patterns) -> bool:
    """Whether one of the patterns matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in as_patterns(patterns))


def is_selected(name: str, include: Patterns = None, exclude: Patterns = None) -> bool:
    """Whether a name is asked for by ``include`` (every name without it) and not taken out by ``exclude``.

    Args:
        name: The name.
        include: Patterns, one of which must match; ``None`` for all names.
        exclude: Patterns, none of which may match.

    Returns:
        Whether it is.

    Example:
        >>> [is_selected(name, "net.*", ["*.bias"]) for name in ("net.weight", "net.bias", "head.weight")]
        [True, False, False]

    """
    return (include is None or matches(name, include)) and not matches(name, exclude)


def unmatched(patterns: Patterns, names: Iterable[str]) -> list[str]:
    """The patterns that match none of the names."""
    names = list(names)
    return [pattern for pattern in as_patterns(patterns) if not any(fnmatchcase(name, pattern) for name in names)]
