"""Public names and arguments that go: how their users are told, and when."""

import warnings
from typing import NamedTuple

__all__ = ["RENAMED", "Deprecated", "warn_deprecated"]


class Deprecated(NamedTuple):
    """A public name or argument that goes.

    Attributes:
        old: What users write: ``"SoupAverager(keep=...)"``, ``"make_soup"``.
        new: What they are to write.
        since: The version that deprecates it.
        removed_in: The version without it, two minor versions later; a test fails in that.

    """

    old: str
    new: str
    since: str
    removed_in: str


# Names of `lightning_reg` and `lightning_reg.functional` that have another one; imports of the old ones find these.
RENAMED: list[Deprecated] = []


def warn_deprecated(old: str, new: str, since: str, removed_in: str, *, stacklevel: int = 2) -> None:
    """Tells the user of a public name or argument that it goes.

    Args:
        old: What was written.
        new: What to write.
        since: The version that deprecates it.
        removed_in: The version without it.
        stacklevel: How many frames above this one the user's line is.

    """
    warnings.warn(
        f"`{old}` is deprecated since lightning_reg {since} and goes in {removed_in}: write `{new}`.",
        FutureWarning,
        stacklevel=stacklevel + 1,
    )
