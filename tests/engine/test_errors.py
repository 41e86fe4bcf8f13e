"""The sentences of argument checks, to the letter."""

import math

import numpy as np
import pytest

from lightning_reg.engine.host.arguments import check_bool, check_choice, check_list, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import Technique


class TailTrimmer:
    """An owner of arguments."""


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (0, {"low": 0}),
        (1.0, {"high": 1}),
        (-1e9, {}),
        (0.5, {"low": 0, "high": 1, "low_open": True, "high_open": True}),
        (3, {"low": 1, "integer": True}),
        (np.float32(3), {"low": 1}),
        (np.float64(0.5), {"high": 1}),
        (np.int64(3), {"low": 1, "integer": True}),
        (np.uint8(3), {"low": 1}),
        (2**200, {"low": 1, "integer": True}),
        (8e37, {}),
        (1e-37, {"low": 0, "low_open": True}),
        (1e-300, {"low": 0}),
        (0.7, {"low": 0.7}),
        (0.99999994, {"high": 1, "high_open": True}),
        (None, {"low": 0, "optional": True}),
    ],
)
def test_numbers_that_pass(value, limits):
    check_number(TailTrimmer(), "fraction", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits", "rest"),
    [
        (1.5, {"low": 0, "high": 1}, "a number in [0, 1], got 1.5."),
        (-0.1, {"low": 0, "high": 1}, "a number in [0, 1], got -0.1."),
        (1, {"low": 0, "high": 1, "high_open": True}, "a number in [0, 1), got 1."),
        (0.0, {"low": 0, "high": 0.5, "low_open": True}, "a number in (0, 0.5], got 0.0."),
        (0, {"low": 0, "low_open": True}, "a number in (0, inf), got 0."),
        (math.inf, {"low": 0}, "a number in [0, inf), got inf."),
        (math.nan, {"low": 0, "high": 1}, "a number in [0, 1], got nan."),
        ("0.5", {"low": 0, "high": 1}, "a number in [0, 1], got '0.5'."),
        (None, {"low": 0, "high": 1}, "a number in [0, 1], got None."),
        (1.5, {"low": 0, "high": 1, "optional": True}, "a number in [0, 1], got 1.5."),
        (True, {"low": 0, "high": 1}, "a number in [0, 1], got True."),
        (np.bool_(True), {"low": 0, "high": 1}, f"a number in [0, 1], got {np.bool_(True)!r}."),
        (np.float32("nan"), {"low": 0, "high": 1}, f"a number in [0, 1], got {np.float32('nan')!r}."),
        (np.float32(2), {"low": 1, "integer": True}, f"a whole number in [1, inf), got {np.float32(2)!r}."),
        (1e308, {"low": 0}, "a number in [0, inf), got 1e+308, which counts as inf in float32."),
        (-9e37, {}, "a number in (-inf, inf), got -9e+37, which counts as -inf in float32."),
        (1e-300, {"low": 0, "low_open": True}, "a number in (0, inf), got 1e-300, which counts as 0 in float32."),
        (1e-39, {"low": 0, "low_open": True}, "a number in (0, inf), got 1e-39, which counts as 0 in float32."),
        (
            0.99999999,
            {"high": 1, "high_open": True},
            "a number in (-inf, 1), got 0.99999999, which counts as 1 in float32.",
        ),
        (2.0, {"low": 1, "integer": True}, "a whole number in [1, inf), got 2.0."),
        (0, {"low": 1, "high": 9, "integer": True}, "a whole number in [1, 9], got 0."),
        (False, {"low": 0, "integer": True}, "a whole number in [0, inf), got False."),
        pytest.param(
            2,
            {"high": 1},
            "a number in (-inf, 1], got 2.",
        ),
    ],
)
def test_numbers_that_are_refused(value, limits, rest):
    with pytest.raises(ValueError, match="fraction") as raised:
        check_number(TailTrimmer(), "fraction", value, **limits)
    assert str(raised.value) == f"TailTrimmer: `fraction` must be {rest}"


@pytest.mark.parametrize("value", [True, False])
def test_truth_values_that_pass(value):
    check_bool(TailTrimmer(), "learn", value)


@pytest.mark.parametrize("value", ["False", "true", "", 0, 1, None])
def test_what_is_no_truth_value_is_refused(value):
    with pytest.raises(ValueError, match="learn") as raised:
        check_bool(TailTrimmer(), "learn", value)
    assert str(raised.value) == f"TailTrimmer: `learn` must be True or False, got {value!r}."


@pytest.mark.parametrize("value", ["a", None, 3, {"a"}])
def test_what_is_no_list_is_refused(value):
    check_list(TailTrimmer(), "names", ("a",))
    with pytest.raises(ValueError, match="names") as raised:
        check_list(TailTrimmer(), "names", value)
    assert str(raised.value) == f"TailTrimmer: `names` must be a list, got {value!r}."


def test_a_choice_that_passes():
    check_choice(TailTrimmer(), "mode", "b", ("a", "b"))


@pytest.mark.parametrize("value", ["c", None, "B"])
def test_a_choice_that_is_refused(value):
    with pytest.raises(ValueError, match="mode") as raised:
        check_choice(TailTrimmer(), "mode", value, ("a", "b", 3))
    assert str(raised.value) == f"TailTrimmer: `mode` must be one of 'a', 'b', 3, got {value!r}."


# -- states of another kind -------------------------------------------------------------------------------------------


class Keeper(Technique):
    def __init__(self, read):
        super().__init__()
        self.read = read

    def load_state_dict(self, state_dict):
        """Reads it."""
        self.read(state_dict)


class Elder(Keeper):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("cls", [Keeper, Elder])
@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda state: state["groups"], "it lacks 'groups'"),
        (lambda state: state["a"][3], "it is broken (IndexError: list index out of range)"),
        (lambda state: state["a"].shape, "it is broken (AttributeError: 'list' object has no attribute 'shape')"),
        (lambda state: 1 + state["a"], "it is broken (TypeError: unsupported operand type(s) for +: 'int' and 'list')"),
    ],
)
def test_a_state_of_another_kind_is_refused_in_one_sentence(cls, read, what):
    with pytest.raises(MisconfigurationException) as raised:
        cls(read).load_state_dict({"a": [1]})
    assert str(raised.value) == (
        f"{cls.__name__}: the checkpoint's state cannot be gone on with: {what}. It is of another version of the suite,"
        " of other arguments, or of something else. Go on with what wrote it, or load its weights and train without"
        " `ckpt_path`."
    )


def test_what_a_technique_says_of_a_state_stays_and_gets_its_name():
    def refuse(kind, words):
        def read(state):
            raise kind(words)

        return read

    for kind, words, expected in [
        (ValueError, "two networks", "Keeper: two networks"),
        (ValueError, "Keeper: two networks", "Keeper: two networks"),
        (MisconfigurationException, "two networks", "two networks"),
        (FileNotFoundError, "gone", "gone"),
    ]:
        with pytest.raises(kind) as raised:
            Keeper(refuse(kind, words)).load_state_dict({})
        assert str(raised.value) == expected
    assert Keeper.load_state_dict.__doc__ == "Reads it."
