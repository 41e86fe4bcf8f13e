"""Every law fails on techniques that break it in one place, and passes on the sound one."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_reg.engine.technique import LayerTechnique
from lightning_reg.noisy_labels.elr.elr import ELRCallback
from tests.conformance import discovery, test_laws
from tests.conformance.broken import BROKEN, COUNTS_ONCE, SOUND
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.discovery import MissingCaseError, case_of, technique_classes
from tests.conformance.harness import difference, fit
from tests.conformance.laws import LAWS, NEED_TWO_PROCESSES
from tests.conformance.problems import KINDS
from tests.conformance.sound import Sound


@pytest.fixture
def pool(request):
    return lambda law: [request.getfixturevalue("two_processes")] if law in NEED_TWO_PROCESSES else []


def test_every_law_is_tried():
    assert {law for law, *_ in BROKEN} == LAWS.keys()


@pytest.mark.parametrize("law", LAWS)
def test_sound(law, pool):
    LAWS[law](SOUND, *pool(law))


def test_one_that_counts_and_draws_in_layers_is_sound():
    LAWS["recomputation"](COUNTS_ONCE)


@pytest.mark.parametrize(
    ("law", "case", "sentence"), [pytest.param(*b, id=f"{b[0]}-{b[1].cls.__name__}") for b in BROKEN]
)
def test_broken(law, case, sentence, pool, monkeypatch):
    monkeypatch.setenv("CONFORMANCE_TOY", "as it was")
    with pytest.raises(AssertionError, match=sentence):
        LAWS[law](case, *pool(law))


class Outside(LayerTechnique):
    """Multiplies the logits of validations."""

    def __init__(self, factor=2.0, **options):
        super().__init__(**options)
        self.factor, self.stages = factor, frozenset({"validate"})

    def features_to_edit(self, module):
        return ["net.head"]

    def is_active(self, step):
        return self.factor != 1.0

    def edit_features(self, call):
        call.step.log(self, "rows", torch.ones(()))
        return self.factor * call.output


class OutsideByHand(Hand):
    def edit_evaluation(self, name, rows):
        return 2.0 * rows if name == "net.head" else rows


def outside(factor=2.0, hand=OutsideByHand):
    return Case(partial(Outside, factor), neutral=partial(Outside, 1.0), by_hand=hand)


@pytest.mark.parametrize("law", ["neutral_is_nothing", "as_by_hand", "order"])
def test_one_that_acts_in_evaluation_alone_is_sound(law):
    LAWS[law](outside())


@pytest.mark.parametrize(
    ("law", "case", "sentence"),
    [
        ("as_by_hand", outside(3.0), "the validation by hand and that of the fit differ"),
        ("as_by_hand", outside(1.0, Hand), "trains as one without the technique"),
        ("as_by_hand", replace(outside(), trains_as_plain=True), "`trains_as_plain`, but the loop by hand makes"),
        ("neutral_is_nothing", outside(1.0), r"`make\(\)` changes nothing"),
        ("neutral_is_nothing", replace(outside(), neutral=Outside), "what the module logs, plain and neutral"),
    ],
)
def test_one_that_acts_in_evaluation_alone_is_caught(law, case, sentence):
    with pytest.raises(AssertionError, match=sentence):
        LAWS[law](case)


@pytest.mark.parametrize("kind", KINDS)
def test_problems_train(kind):
    losses = [row["train_loss"] for _, row in fit([], KINDS[kind], max_epochs=8).logged if "train_loss" in row]
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])


def test_discovery_finds_what_is_in_no_list(tmp_path, monkeypatch):
    package = tmp_path / "toy_suite"
    for folder in ("engine", "noisy_labels"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
        text = (
            "from lightning_reg.engine.technique import Technique\n__all__ = []\nclass Unlisted(Technique):\n    pass\n"
        )
        (package / folder / "unlisted.py").write_text(text)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    import toy_suite

    assert [cls.__module__ for cls in technique_classes(toy_suite)] == ["toy_suite.noisy_labels.unlisted"]
    assert ELRCallback in list(technique_classes())


def test_a_technique_without_case_is_told_what_to_write(monkeypatch, tmp_path):
    wanted = r"Sound: write `CASE = Case\(make=partial\(Sound, \.\.\.\).* in tests/conformance/test_sound.py"
    with pytest.raises(MissingCaseError, match=f"There is no such file. {wanted}"):
        case_of(Sound)
    (tmp_path / "conformance").mkdir()
    (tmp_path / "conformance" / "test_sound.py").touch()
    for value, problem in ((None, "has no `CASE`"), (Case(ELRCallback, None), "`CASE` is for ELRCallback")):
        module = type("module", (), {"CASE": value})
        monkeypatch.setattr(discovery.importlib, "import_module", lambda name, module=module: module)
        with pytest.raises(MissingCaseError, match=f"{problem}.*Sound: write"):
            case_of(Sound, tmp_path)
    both = (Case(ELRCallback, None), Case(Sound, None))
    monkeypatch.setattr(discovery.importlib, "import_module", lambda name: type("module", (), {"CASE": both}))
    assert case_of(Sound, tmp_path) is both[1]


def test_an_exemption_is_a_strict_xfail(monkeypatch):
    case = replace(SOUND, exempt={"cited": "it stands alone by nature"})
    monkeypatch.setattr(test_laws, "CLASSES", [Sound])
    monkeypatch.setattr(test_laws, "case_of", lambda cls: case)
    marks = {parameters.values[1]: parameters.marks for parameters in test_laws.every_law()}
    (mark,) = marks.pop("cited")
    assert mark.name == "xfail"
    assert mark.kwargs == {"reason": "it stands alone by nature", "strict": True, "raises": AssertionError}
    assert marks.keys() == LAWS.keys() - {"cited", "order", "recomputation"}  # it touches no layers
    assert not any(marks.values())
    test_laws.test_every_technique_has_a_case(Sound)
    for exempt, sentence in (({"order": "it stands alone by nature"}, "names no law"), ({"cited": "no"}, "no reason")):
        case = replace(SOUND, exempt=exempt)
        with pytest.raises(AssertionError, match=sentence):
            test_laws.test_every_technique_has_a_case(Sound)


def test_difference():
    same = {"a": [1, 2.0, None], "b": (float("nan"),)}
    assert not difference(same, {"a": [1, 2.0, None], "b": (float("nan"),)})
    assert difference({"a": [1.0]}, {"a": [1.0 + 1e-9]}) == "['a'][0]: 1.0 and 1.000000001"
    assert not difference({"a": [1.0]}, {"a": [1.0 + 1e-9]}, rtol=1e-6)
    assert difference({"a": 1}, {"b": 1}) == "the keys: ['a', 'b'] on one side only"
    assert difference([1], [1, 2]) == "the lengths: 1 and 2 entries"
    assert difference(1, 1.0) == ": 1 and 1.0"
