"""Which changes ``make mutants`` makes of a source file."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PATH = Path(__file__).parents[1] / ".ci" / "mutations.py"


def load(monkeypatch):
    spec = spec_from_file_location("mutations", PATH)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutations", module)  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    return module.mutants


SOURCE = '''
"""A docstring."""

from typing import TYPE_CHECKING

__all__ = ["mean"]
if TYPE_CHECKING:
    LIMIT = 3


class Sums:
    @deprecated(2)
    def mean(self, x: list[1], scale: float = 2.0) -> list[4]:
        """A docstring."""
        if not x:
            raise ValueError(f"not of {0}")
        self.seen = zip(x, x, strict=True)
        self.log(x, scale, exact=False)
        return scale * sum(x) / len(x)
'''
CHANGES = [
    ("argument left out", "self.log(x, scale, exact=False)", "self.log(x, scale)"),
    ("arguments swapped", "self.log(x, scale, exact=False)", "self.log(scale, x, exact=False)"),
    ("condition", "not x", "(not (not x))"),
    ("constant", "2.0", "(1.0)"),
    ("constant", "2.0", "3.0"),
    ("constant", "False", "True"),
    ("operator", "scale * sum(x)", "(scale / sum(x))"),
    ("operator", "scale * sum(x) / len(x)", "(scale * sum(x) * len(x))"),
    ("return", "return scale * sum(x) / len(x)", "return None"),
    ("sign", "not x", "(x)"),
    ("statement", 'raise ValueError(f"not of {0}")', "pass"),
    ("statement", "self.log(x, scale, exact=False)", "pass"),
    ("statement", "self.seen = zip(x, x, strict=True)", "pass"),
]


def test_all_changes_of_a_source(monkeypatch):
    found = load(monkeypatch)("a.py", SOURCE.encode())
    assert sorted((m.kind, m.before, m.after) for m in found) == CHANGES
    assert {m.function for m in found} == {"Sums.mean"}
    for mutant in found:
        changed = mutant.apply(SOURCE.encode()).decode()
        assert changed == SOURCE[: mutant.start] + mutant.after + SOURCE[mutant.end :]
        compile(changed, "a.py", "exec")


def test_a_change_is_noticed_where_its_line_runs_and_a_default_where_the_function_does(monkeypatch):
    found = {m.after: m for m in load(monkeypatch)("a.py", SOURCE.encode())}
    at = {line: number for number, line in enumerate(SOURCE.splitlines(), 1)}
    first, last = at["        if not x:"], at["        return scale * sum(x) / len(x)"]
    assert found["(not (not x))"].lines[0] == range(first, first + 1)
    assert range(first - 1, last + 1) in found["3.0"].lines


def test_a_change_keeps_its_name_where_other_lines_change(monkeypatch):
    mutants = load(monkeypatch)
    before = {m.key for m in mutants("a.py", SOURCE.encode())}
    assert len(before) == len(CHANGES)
    assert {m.key for m in mutants("a.py", ("import os\n" + SOURCE).encode())} == before
    assert not {m.key for m in mutants("b.py", SOURCE.encode())} & before
    twice = mutants("a.py", b"x = 1\ny = 1\n")
    assert len({m.key for m in twice}) == len(twice) == 4
