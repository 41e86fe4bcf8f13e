"""Methods of one object that something else stands in for, for a time."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Replacement"]


class Replacement:
    """A method of one object replaced by a function, until :meth:`undo`.

    Args:
        owner: The object; its class is not touched.
        name: The method.
        function: What stands in for it; ``None`` for a hook that is not to be called.

    """

    _standing: ClassVar[list["weakref.ref[Replacement]"]] = []

    def __init__(self, owner: object, name: str, function: Callable[..., Any] | None) -> None:
        self.original: Callable[..., Any] = getattr(owner, name)
        self._owner, self._name, self._function = owner, name, function
        self._before = owner.__dict__.get(name)
        setattr(owner, name, function)
        self._standing.append(weakref.ref(self))

    def undo(self) -> None:
        """Puts back what was there, an earlier replacement by somebody else included."""
        self._standing[:] = [one for one in self._standing if one() not in (None, self)]
        self._put_back()

    @classmethod
    @contextmanager
    def aside(cls, module: "nn.Module") -> Iterator[None]:
        """A context in which a module and its layers have the methods that were there, for copies of it."""
        owners = {id(layer) for layer in module.modules()}
        standing = [one for ref in cls._standing if (one := ref()) is not None and id(one._owner) in owners]
        for one in reversed(standing):
            one._put_back()
        try:
            yield
        finally:
            for one in standing:
                setattr(one._owner, one._name, one._function)

    def _put_back(self) -> None:
        if self._before is None:
            self._owner.__dict__.pop(self._name, None)
        else:
            setattr(self._owner, self._name, self._before)
