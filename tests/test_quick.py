"""What makes fits quicker leaves them what they are, and what is asked once is told apart."""

import copy
import inspect

import pytest
import torch
from lightning.fabric.utilities import registry
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import signature_utils
from torch._dynamo import guards

from tests import quick
from tests.conformance import harness
from tests.conformance.harness import difference, fit, fit_made, once
from tests.conformance.problems import KINDS


def test_a_fit_is_what_it_is_without(monkeypatch):
    quicker = fit([], KINDS["classification"])
    monkeypatch.setattr(_ResultMetric, "to", quick._move)
    monkeypatch.setattr(registry, "entry_points", registry.entry_points.__wrapped__)
    monkeypatch.setattr(signature_utils, "inspect", inspect)
    monkeypatch.setattr(PassThroughProfiler, "profile", Profiler.profile)
    as_it_is = fit([], KINDS["classification"])
    for part in ("weights", "gradients", "logged"):
        assert not difference(getattr(quicker, part), getattr(as_it_is, part))


def test_what_is_elsewhere_is_moved():
    meta = _Metadata("training_step", "loss")
    meta.sync = _Sync()
    result = _ResultMetric(meta, is_tensor=True)
    before = result.value
    assert result.to("cpu").value is before
    assert result.to(torch.device("meta")).value.device.type == "meta"


def test_an_action_that_nobody_times_has_its_name():
    with PassThroughProfiler().profile("a step") as action:
        assert action == "a step"


def test_states_are_equal_whatever_their_case():
    assert TrainerFn.FITTING == TrainerFn.FITTING == "FIT"
    assert TrainerFn.VALIDATING == RunningStage.VALIDATING  # of another class, with the same text
    assert TrainerFn.FITTING != TrainerFn.TESTING
    assert TrainerFn.FITTING != "fitting"
    assert TrainerFn.FITTING is not None
    assert TrainerFn.FITTING != None  # noqa: E711 # what it is compared with


class Hooks:
    def with_index(self, batch, batch_idx):
        pass

    def with_anything(self, *args):
        pass

    alone = staticmethod(lambda batch: None)


class Calls:
    __slots__ = ()  # cannot be held weakly

    def __call__(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("hook", [Hooks().with_index, Hooks.with_index, Hooks().with_anything, Hooks.alone, Calls()])
def test_arguments_of_a_hook_are_those_that_inspect_finds(hook):
    for _ in range(2):
        assert quick._arguments_of(hook) == inspect.getfullargspec(hook)


def test_a_compiled_frame_is_not_timed():
    assert not hasattr(guards, "profile_guard_manager") or guards.profile_guard_manager(None, {}, 1) == 0.0


def test_what_is_asked_once_is_told_apart_by_what_is_asked():
    problem, alike = KINDS["classification"], copy.copy(KINDS["classification"])
    first = once(fit_made, problem, log_every_n_steps=3)
    assert once(fit_made, problem, log_every_n_steps=3) is first
    assert once(fit_made, problem, log_every_n_steps=4) is not first
    assert once(fit_made, alike, log_every_n_steps=3) is not first
    assert once(fit_made, problem, log_every_n_steps=3) is first
    assert first.logged != once(fit_made, problem, log_every_n_steps=4).logged


def _new(name):
    return [name]


def test_what_was_asked_long_ago_is_let_go(monkeypatch):
    monkeypatch.setattr(harness, "_KNOWN", {})
    monkeypatch.setattr(harness, "_LIMIT", 2)
    names = ["a", "b", "a", "c", "a", "b"]
    lists = [once(_new, name=name) for name in names]
    assert lists[0] is lists[2] is lists[4]
    assert lists[1] is not lists[5]
    assert len(harness._KNOWN) == 2
