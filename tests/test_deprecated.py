"""What goes is said for two minor versions, and is gone then."""

import ast

import pytest
from packaging.version import Version

import lightning_reg
from lightning_reg import _deprecated, functional
from lightning_reg._deprecated import Deprecated, warn_deprecated
from tests.structure import SOURCES, tree_of

VERSION = Version(Version(lightning_reg.__version__).base_version)


def announced():
    """What the package says will go: the renamed names, and every call of the helper."""
    yield from _deprecated.RENAMED
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "warn_deprecated":
                words = [argument for argument in node.args if isinstance(argument, ast.Constant)]
                if not any(isinstance(argument, ast.Starred) for argument in node.args):
                    yield Deprecated(*(word.value for word in words))


def is_over(entry, version):
    since, end = Version(entry.since), Version(entry.removed_in)
    assert (end.major, end.minor) >= (since.major, since.minor + 2), f"{entry.old} goes in less than two minor versions"
    return version >= end


def test_what_was_to_go_is_gone():
    assert [entry.old for entry in announced() if is_over(entry, VERSION)] == []


def test_the_end_is_seen():
    entry = Deprecated("old", "new", "0.3", "0.5")
    assert not is_over(entry, Version("0.4.9"))
    assert is_over(entry, Version("0.5.0"))
    with pytest.raises(AssertionError, match="less than two minor versions"):
        is_over(Deprecated("old", "new", "0.3", "0.4"), Version("0.3"))


@pytest.mark.parametrize(
    ("module", "new"), [(lightning_reg, "ELRCallback"), (functional, "elr_loss")], ids=["package", "functional"]
)
def test_an_old_name_is_the_new_one_with_a_warning_at_the_user_s_line(module, new):
    _deprecated.RENAMED.append(Deprecated("Former", new, "0.1", "0.3"))
    try:
        sentence = f"`Former` is deprecated since lightning_reg 0.1 and goes in 0.3: write `{new}`."
        with pytest.warns(FutureWarning, match=f"^{sentence}$") as caught:
            assert module.Former is getattr(module, new)
    finally:
        _deprecated.RENAMED.pop()
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'Former'"):
        _ = module.Former


def test_an_argument_warns_at_the_line_that_gives_it():
    def takes(**options):
        if "former" in options:
            warn_deprecated("takes(former=...)", "takes(latter=...)", "0.1", "0.3")

    with pytest.warns(FutureWarning, match=r"^`takes\(former=...\)` is deprecated") as caught:
        takes(former=1)
    assert caught[0].filename == __file__
