"""The order of the engine's rooms: imports go downwards, nothing in a circle, no technique is known."""

import ast
import inspect
import re

import pytest

from lightning_reg import registry
from lightning_reg.engine import ROOMS
from lightning_reg.engine.host import private_names
from lightning_reg.engine.technique import Technique
from tests.structure import MODULES, SOURCES, foreign_private_names, imports_of, name_of, tree_of

ENGINE = {module: path for module, path in MODULES.items() if module.startswith("lightning_reg.engine.")}


def room_of(module):
    return module.split(".")[2]


def test_every_file_is_in_a_room():
    assert {room_of(module) for module in ENGINE} == set(ROOMS)


@pytest.mark.parametrize("module", ENGINE)
def test_a_room_knows_those_before_it_and_no_technique(module):
    known = imports_of(module)
    assert sorted(other for other in known if not other.startswith("lightning_reg.engine")) == []
    later = ROOMS[ROOMS.index(room_of(module)) + 1 :]
    assert sorted(other for other in known & set(ENGINE) if room_of(other) in later) == []


def test_no_file_imports_itself_by_a_circle():
    left = {module: imports_of(module) & set(MODULES) for module in MODULES}
    while free := [module for module, known in left.items() if not known & set(left)]:
        for module in free:
            del left[module]
    assert sorted(left) == []


def test_no_message_of_the_engine_names_an_argument_of_one_technique():
    shared = set(inspect.signature(Technique.__init__).parameters)
    owners = {}
    for unit in registry.units():
        for cls in unit.techniques():
            for argument in set(inspect.signature(cls.__init__).parameters) - shared:
                owners.setdefault(argument, set()).add(unit.key)
    # Those of F.cross_entropy's `ignore_index` speak of the user's call.
    single = {argument for argument, units in owners.items() if len(units) == 1} - {"ignore_index"}
    named = []
    for module, path in ENGINE.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Raise):
                text = " ".join(
                    n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                )
                named += [(module, word) for word in re.findall(r"\b(\w+)=", text) if word in single]
    assert named == []


# -- private names of Lightning and torch stand in one room ------------------------------------------------------------

HOST = [path for path in SOURCES if name_of(path).startswith("lightning_reg.engine.host.")]
# Python's own, and those of named tuples.
PUBLIC_ENOUGH = {"_getframe", "_fields", "_replace", "_asdict"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p not in HOST], ids=name_of)
def test_private_names_of_others_are_touched_in_the_host_alone(path):
    assert foreign_private_names(path) - PUBLIC_ENOUGH == set()


def private_names_of_the_host():
    return sorted({name for path in HOST for name in foreign_private_names(path)})


@pytest.mark.filterwarnings("ignore")
def test_every_private_name_of_the_host_exists():
    owners = private_names.owners()
    missing = [name for name in private_names_of_the_host() if not any(hasattr(owner, name) for owner in owners)]
    assert private_names.private_names() == private_names_of_the_host()
    assert missing == private_names.missing_names() == [], "a new release of Lightning or torch has moved these"
