"""Which technique takes which call, and the lists in the errors where that is not certain."""

import re

import pytest
from torch import nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.user_functions import place_of_code
from lightning_reg.engine.loss.choice import Selection
from lightning_reg.engine.technique import Technique

CALLS = [("cross_entropy", "m.py:4"), ("mse_loss", "m.py:5"), ("cross_entropy", "m.py:9")]


class Trimmer(Technique):
    """A technique on one loss."""


class Smoother(Technique):
    """Another."""


def run(techniques: list[Technique], calls=CALLS) -> tuple[Selection, list[list[Technique]]]:
    """A step that makes these calls, and who took each."""
    selection = Selection(techniques)
    return selection, [selection.take(name, site, f"F.{name}() at {site}") for name, site in calls]


@pytest.mark.parametrize(
    ("loss", "taken"),
    [
        (0, [True, False, False]),
        (2, [False, False, True]),
        ("mse_loss", [False, True, False]),
        ("m.py:9", [False, False, True]),
        ("last", [False, False, False]),
    ],
)
def test_a_choice_takes_its_call(loss, taken):
    trimmer = Trimmer(loss=loss)
    selection, takers = run([trimmer])
    assert takers == [[trimmer] * t for t in taken]
    assert selection.late == [trimmer] * (loss == "last")
    selection.check()


def test_the_only_call_needs_no_choice():
    techniques = [Trimmer(), Smoother(loss="last"), Smoother(loss=0)]
    selection, takers = run(techniques, CALLS[:1])
    assert takers == [[techniques[0], techniques[2]]]
    selection.check()


def test_techniques_take_in_their_order_and_apart():
    techniques = [Smoother(loss="mse_loss"), Trimmer(loss=1), Trimmer(loss=0)]
    assert run(techniques)[1] == [[techniques[2]], techniques[:2], []]


def test_several_calls_without_a_choice_are_listed():
    techniques = [Smoother(loss=1), Trimmer()]
    selection, takers = run(techniques)
    assert takers == [techniques[1:], techniques[:1], []]  # until it is known that there are more
    with pytest.raises(MisconfigurationException) as raised:
        selection.check()
    assert str(raised.value) == (
        "Trimmer: the training step calls 3 losses and it is not said which one the technique is for."
        "\n  loss=0: F.cross_entropy() at m.py:4"
        "\n  loss=1: F.mse_loss() at m.py:5"
        "\n  loss=2: F.cross_entropy() at m.py:9"
        '\nChoose with `Trimmer(loss=...)`: a position as listed, "last", the name of the function, or its place in the'
        ' code ("model.py:42").'
    )


def test_two_calls_are_several():
    with pytest.raises(MisconfigurationException, match=r"^Trimmer: the training step calls 2 losses"):
        run([Trimmer()], CALLS[:2])[0].check()


@pytest.mark.parametrize(
    ("loss", "calls", "count"),
    [
        ("cross_entropy", CALLS, "2 of the 3"),
        ("l1_loss", CALLS, "0 of the 3"),
        ("m.py:5", CALLS[:1], "0 of the 1"),
        (1, CALLS[:1], "0 of the 1"),
        (3, CALLS, "0 of the 3"),
    ],
)
def test_a_choice_that_matches_not_one_is_refused(loss, calls, count):
    with pytest.raises(MisconfigurationException) as raised:
        run([Trimmer(loss=loss)], calls)[0].check()
    listed = "".join(f"\n  loss={i}: F.{name}() at {site}" for i, (name, site) in enumerate(calls))
    assert str(raised.value) == (
        f"Trimmer(loss={loss!r}) matches {count} loss calls in this step; it must match one.{listed}"
    )


@pytest.mark.parametrize(
    ("losses", "seen", "needed"),
    [
        ([None], [], False),
        ([None], CALLS[:1], True),
        ([0, "last"], [], False),
        (["last", "m.py:4"], [], True),
        (["cross_entropy"], [], True),
    ],
)
def test_the_place_in_the_code_is_looked_up_only_where_it_matters(losses, seen, needed):
    assert run([Trimmer(loss=loss) for loss in losses], seen)[0].needs_site() is needed


def test_nothing_seen_shows_the_mixin():
    assert str(Selection([Trimmer(), Smoother()]).nothing_seen(by_mixin=False)) == (
        "Trimmer, Smoother: `training_step` returned a loss, but none of torch's loss functions (torch.nn.functional"
        " and the modules of torch.nn) was called with a gradient, so there is nothing to attach to. If the loss is"
        " written by hand or fused into a kernel, hand over its value per sample:\n"
        """
    class MyModel(LossMixin, LightningModule):    # from lightning_reg import LossMixin
        def training_step(self, batch, batch_idx):
            return self.reduce_loss(per_sample_loss, logits=logits, targets=targets)    # instead of .mean()
"""
    )


def test_nothing_seen_in_a_library_s_module_shows_a_class_of_one_s_own():
    error = str(Selection([Trimmer()]).nothing_seen(by_mixin=False, place="model.py:7", library="Detector"))
    assert error.startswith("Trimmer: `training_step` at model.py:7 returned a loss, but none of torch's")
    assert error.endswith(
        """
    class MyModel(LossMixin, Detector):    # from lightning_reg import LossMixin
        def training_step(self, batch, batch_idx):
            ...    # as there; the library's own file stays as it is
            return self.reduce_loss(per_sample_loss, logits=logits, targets=targets)    # instead of .mean()
"""
    )


def test_nothing_seen_in_a_module_with_the_mixin():
    assert str(Selection([Trimmer()]).nothing_seen(by_mixin=True)) == (
        "Trimmer: the module inherits LossMixin but `training_step` did not call `self.reduce_loss`, so there is"
        " nothing to attach to. Call it, or drop the mixin to have torch's loss functions watched."
    )


def test_the_place_of_code_tells_libraries_from_one_s_own():
    place, installed = place_of_code(nn.Linear(1, 1).forward)
    assert re.fullmatch(r"linear\.py:\d+", place)
    assert installed
    assert place_of_code(run) == (f"test_selection.py:{run.__code__.co_firstlineno}", False)
    assert place_of_code(len) == ("", False)
