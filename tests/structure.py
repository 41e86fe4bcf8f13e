"""The package's files as data: what they import, how long they are, which private names they touch."""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import lightning_reg

ROOT = Path(lightning_reg.__file__).parent.parent
SOURCES = sorted((ROOT / "lightning_reg").rglob("*.py"))


def name_of(path):
    """The module's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def unit_of(module):
    """Purpose and unit of a technique's file, ``None`` for others; what two units share is a unit of its own here."""
    parts = module.split(".")
    is_purpose = len(parts) > 2 and (ROOT / "lightning_reg" / parts[1]).is_dir() and parts[1] != "engine"
    return (parts[1], parts[2]) if is_purpose else None


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def imports_of(module):
    """Modules of the package that a module imports, for types alone as well."""
    found = set()
    for node in ast.walk(tree_of(MODULES[module])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_reg."):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {module}


def lines_of_code(path):
    """Number of lines without docstrings, comments and blank lines."""
    text = path.read_text()
    documented = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                documented |= set(range(first.lineno, first.end_lineno + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documented - {len(text.splitlines()) + 1})


@cache
def own_private_names():
    """Private names that the package itself defines."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
                found |= {node.attr} if node.value.id in ("self", "cls") else set()
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names = [element for target in targets for element in ast.walk(target)]
            found |= {element.id for element in names if isinstance(element, ast.Name)}
    return found


def foreign_private_names(path):
    """Private names of other libraries that a file touches: attributes, and what it imports."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and re.match(r"_[A-Za-z]", node.attr):
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_reg"):
            found |= {alias.name for alias in node.names if re.match(r"_[A-Za-z]", alias.name)}
    return {name for name in found - own_private_names() if not name.startswith("_foreach_")}
