"""The command line ``lightning-reg`` as a tree of commands that units add to; needs jsonargparse, the extra ``cli``."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from typing_extensions import override

__all__ = ["Commands", "Options", "Parser"]

Options = Any  # of a command, by their names: jsonargparse's Namespace


class Parser(ArgumentParser):
    """A parser that says in one sentence what it did not understand."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = " ".join(message.split()).rstrip(".")
        sys.stderr.write(f"lightning-reg: {sentence}. See `{self.prog.replace(' [options]', '')} --help`.\n")
        raise SystemExit(2)


class Commands:
    """Commands of one level, and what they run.

    Args:
        parser: Gets the commands.
        name: What they are called in the usage line.

    """

    def __init__(self, parser: Parser, name: str = "command") -> None:
        self._parsers = parser.add_subcommands(dest=name, required=True)
        self._name = name
        self._runs: dict[str, Callable[[Options], None]] = {}
        self._groups: dict[str, Commands] = {}

    def add(self, name: str, about: str, run: Callable[[Options], None]) -> Parser:
        """Adds a command.

        Args:
            name: What the user writes.
            about: One line.
            run: Called with its options. A ``ValueError`` or ``OSError`` is shown to the user as one sentence.

        Returns:
            Its parser, for arguments.

        """
        parser = self._parser(name, about)
        self._runs[name] = run
        return parser

    def group(self, name: str, about: str) -> "Commands":
        """Commands below one of this level, which is added where nobody has done so yet.

        Args:
            name: What the user writes before them.
            about: One line.

        Returns:
            The commands.

        """
        if name not in self._groups:
            self._groups[name] = Commands(self._parser(name, about), "method")
        return self._groups[name]

    def run(self, options: Options) -> None:
        """Runs the command that was chosen.

        Args:
            options: What the parser of the highest level made of the words.

        """
        chosen = options[self._name]
        if chosen in self._groups:
            self._groups[chosen].run(options[chosen])
        else:
            self._runs[chosen](options[chosen])

    def _parser(self, name: str, about: str) -> Parser:
        parser = Parser(description=f"{about[:1].upper()}{about[1:]}.")
        self._parsers.add_subcommand(name, parser, help=about)
        return parser
