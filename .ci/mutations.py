"""Small changes of a source file, each of which a test should notice.

Left out is what no test should fix: annotations, docstrings, decorators, ``__all__``, the words of errors and of other
texts, and ``strict=`` of ``zip``, which guards what is true.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

__all__ = ["Mutant", "mutants"]

_OPERATORS = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """A change of one file: the bytes from ``start`` to ``end`` become ``after``.

    ``lines`` are those that a test has to run to notice it, in the order in which to look for such tests.
    """

    file: str
    function: str
    kind: str
    before: str
    after: str
    start: int
    end: int
    lines: tuple[range, ...]
    number: int

    @property
    def key(self) -> str:
        """A name that stays where other lines of the file change."""
        what = (self.file, self.function, self.kind, self.before, self.after, str(self.number))
        return sha256("\0".join(what).encode()).hexdigest()[:12]

    def apply(self, source: bytes) -> bytes:
        """The changed source."""
        return source[: self.start] + self.after.encode() + source[self.end :]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """All changes of ``source``, the text of ``file``."""
    starts = [0]
    for line in source.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found: list[Mutant] = []
    seen: dict[tuple[str, ...], int] = {}
    for node, function, lines in _walk(ast.parse(source), "", ()):
        for kind, target, after in _changes(node):
            start = starts[target.lineno - 1] + target.col_offset
            end = starts[target.end_lineno - 1] + target.end_col_offset
            before = source[start:end].decode()
            number = seen[same] = seen.get(same := (function, kind, before, after), -1) + 1
            places = (range(target.lineno, target.end_lineno + 1), *lines)
            found.append(Mutant(file, function, kind, before, after, start, end, places, number))
    return found


def _walk(node, function, lines) -> Iterator[tuple[ast.AST, str, tuple[range, ...]]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    if isinstance(node, ast.stmt):
        header = node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1
        lines = (range(node.lineno, max(header, node.lineno + 1)),)
    yield node, function, lines
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        # A default is read where the function is made, and noticed where it runs.
        body = (
            (range(node.body[0].lineno, node.end_lineno + 1),) if field == "args" and hasattr(node, "name") else lines
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_out(child):
                yield from _walk(child, function, body)


def _is_left_out(node) -> bool:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.keyword) and node.arg == "strict"


def _changes(node) -> Iterator[tuple[str, ast.AST, str]]:
    """Kind, node that is replaced, and what by."""
    yield from _of_operators(node)
    yield from _of_values(node)
    yield from _of_statements(node)
    if isinstance(node, ast.Call):
        yield from _of_calls(node)


def _of_operators(node) -> Iterator[tuple[str, ast.AST, str]]:
    match node:
        case ast.Compare(ops=[*operators]):
            for number, operator in enumerate(operators):
                others = [*operators[:number], _OPERATORS[type(operator)](), *operators[number + 1 :]]
                yield "comparison", node, f"({ast.unparse(_with(node, ops=others))})"
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in _OPERATORS:
            yield "operator", node, f"({ast.unparse(_with(node, op=_OPERATORS[type(operator)]()))})"
        case ast.AugAssign(op=operator) if type(operator) in _OPERATORS:
            yield "operator", node, ast.unparse(_with(node, op=_OPERATORS[type(operator)]()))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "sign", node, f"({ast.unparse(operand)})"


def _of_values(node) -> Iterator[tuple[str, ast.AST, str]]:
    match node:
        case ast.Constant(value=bool(value)):
            yield "constant", node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", node, repr(value + 1)
            yield "constant", node, f"({value - 1!r})"
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield "condition", test, f"(not ({ast.unparse(test)}))"
        case ast.comprehension(ifs=[*conditions]):
            for condition in conditions:
                yield "condition", condition, "True"


def _of_statements(node) -> Iterator[tuple[str, ast.AST, str]]:
    match node:
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return", node, "return None"
        case ast.Expr(value=ast.Call() | ast.Yield()) | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, "pass"
        case ast.Raise() | ast.Delete() | ast.Continue() | ast.Break() | ast.AugAssign():
            yield "statement", node, "pass"


def _of_calls(call) -> Iterator[tuple[str, ast.AST, str]]:
    match call.args:
        case [ast.Starred(), *_] | [_, ast.Starred(), *_]:
            pass
        case [one, two, *rest] if ast.unparse(one) != ast.unparse(two):
            yield "arguments swapped", call, ast.unparse(_with(call, args=[two, one, *rest]))
    for keyword in call.keywords:
        if keyword.arg not in (None, "strict"):
            rest = [other for other in call.keywords if other is not keyword]
            yield "argument left out", call, ast.unparse(_with(call, keywords=rest))


def _with(node, **fields):
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other
