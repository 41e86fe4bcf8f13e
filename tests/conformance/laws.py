"""The laws that every technique keeps; each is a function that raises AssertionError with a sentence.

What is compared "to the last bit" is compared without tolerance; where there is one, it stands at the comparison.
"""

import copy
import dataclasses
import inspect
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor

from tests.conformance.case import Case
from tests.conformance.footprint import footprint, globals_of_torch
from tests.conformance.harness import Interruption, Run, demand, difference, fit, fit_made, go, new_run, once
from tests.conformance.pairs import as_by_hand, order, train_pair
from tests.conformance.problems import BATCHES, KINDS, Problem
from tests.conformance.recomputation import recomputation
from tests.conformance.words import cited, says_what_it_does

__all__ = ["LAWS", "NEED_TWO_PROCESSES"]


# -- 1 ----------------------------------------------------------------------------------------------------------------


def neutral_is_nothing(case: Case) -> None:
    """The neutral instance trains and is validated as the plain run, to the last bit; the active one is not."""
    assert case.neutral is not None, f"{case.cls.__name__}: CASE has no neutral instance."
    plain, active = once(fit_made, case.problem), once(fit_made, case.problem, case.make)
    neutral = fit([case.neutral()], case.problem)
    _same("the weights of the plain run and of the neutral instance", plain.weights, neutral.weights)
    _same("the gradients of the plain run and of the neutral instance", plain.gradients, neutral.gradients)
    _same("what the module logs, plain and neutral", _users(plain), _users(neutral))
    changed = difference(plain.weights, active.weights) or active.own_scalars or any(_state(active).values())
    changed = changed or difference(_users(plain), _users(active))  # of one that acts in evaluation alone
    assert changed, f"{case.cls.__name__}: `make()` changes nothing, so no law would test anything."


# -- 2 ----------------------------------------------------------------------------------------------------------------


def resume_is_exact(case: Case) -> None:
    """A run resumed from an epoch's end, its last batch or its middle goes on as if never stopped, to the last bit."""
    for make in (case.make, *case.variants):
        with tempfile.TemporaryDirectory() as name:
            _check_resume(case, make, Path(name))


def _check_resume(case: Case, make: Callable[..., Any], folder: Path) -> None:
    options = {"max_epochs": 3, "log_every_n_steps": 2}
    whole = fit([make()], case.problem, folder=folder, mid_epoch=BATCHES + 3, **options)
    wanted = _load(folder / "end.ckpt")
    for stop in ("epoch_end", "last_batch", "mid_epoch"):
        checkpoint = folder / f"{stop}.ckpt"
        _load(checkpoint)
        (folder / stop).mkdir()
        # Another global seed: nothing but the checkpoint may lead on.
        resumed = fit([make()], case.problem, folder=folder / stop, ckpt=checkpoint, seed=1, **options)
        rest = whole.logged[-len(resumed.logged) :]
        assert len(resumed.logged) > BATCHES, f"only {len(resumed.logged)} rows were logged after the resume"
        _same(f"the log, resumed at {stop} and uninterrupted", resumed.logged, rest)
        end = _load(folder / stop / "end.ckpt")
        for part in ("state_dict", "optimizer_states", "callbacks"):
            _same(f"`{part}` of the last checkpoint, resumed at {stop} and uninterrupted", end[part], wanted[part])
        extra = end["state_dict"].keys() ^ once(fit_made, case.problem).weights.keys()
        assert not extra, f"the checkpoint's `state_dict` has not the keys of the untouched model: {sorted(extra)}"


def _load(checkpoint: Path) -> dict[str, Any]:
    try:
        return torch.load(checkpoint, weights_only=True)
    except pickle.UnpicklingError as error:
        raise AssertionError(f"The checkpoint does not load with weights_only=True: {error}") from error


# -- 3 ----------------------------------------------------------------------------------------------------------------


def leaves_no_trace(case: Case) -> None:
    """After a fit, a second one, and an exception anywhere in a step, all is as the plain run leaves it."""
    left = once(_left_by_plain_fits, case.problem)  # torch and Lightning set themselves up here
    before = globals_of_torch()
    run = fit([case.make()], case.problem)
    _leaves_the_same(case, "what a plain fit leaves and what this one leaves", left, "a fit", run)
    _fit_further(run)
    _leaves_the_same(case, "what a second plain fit leaves and what this one leaves", left, "a second fit", run)
    for fail in _FAILURES:
        where = fail[0]
        run = fit([case.make()], case.problem, fail=fail)
        assert isinstance(run.error, Interruption), f"the user's exception in {where} did not come through"
        _leaves_the_same(case, f"what an exception in {where} leaves, plain and here", left, where, run)
        _same(
            f"the weights after an exception in {where} and after the batch before", run.weights, run.watch.weights[-1]
        )
        run.model.fail = None
        run.model.train()  # Lightning leaves it as the exception found it
        again = new_run(run.techniques, case.problem, model=run.model, max_epochs=1)
        go(again)
        assert len(again.watch.weights) == BATCHES, f"the fit after an exception in {where} is cut short"
    _same("torch and Lightning before and after", before, globals_of_torch())


_FAILURES = (("forward", 5), ("loss", 5), ("backward", 5), ("validation", BATCHES))


def _left_by_plain_fits(problem: Problem) -> dict[str, Any]:
    run = fit([], problem)
    left = {"a fit": footprint(run)}
    _fit_further(run)
    failed = {fail[0]: footprint(fit([], problem, fail=fail)) for fail in _FAILURES}
    return {**left, "a second fit": footprint(run), **failed}


def _leaves_the_same(case: Case, what: str, left: dict[str, Any], after: str, run: Run) -> None:
    here = footprint(run)
    if difference(left[after], here):  # tests in between may have left traces of their own, in a plain fit too
        left = _left_by_plain_fits(case.problem)
    _same(what, left[after], here)


def _fit_further(run: Run) -> None:
    run.trainer.fit_loop.max_epochs += 1
    go(run)


# -- 4 ----------------------------------------------------------------------------------------------------------------


def ranks_agree(case: Case, pool: Any) -> None:
    """Two processes of batch b train as one of batch 2b; the technique's state is the same on both, and on the one.

    Where rows are compared on each rank by itself (``compares_rows``) the one accumulates two batches of b.
    """
    one = _on_rank(case.make(), case.data, 1, parts=2 if case.compares_rows else 1)
    ranks = pool.run(_on_rank, case.make(), case.data, 2)
    assert [r["world_size"] for r in ranks] == [2, 2], "the two processes did not find one another"
    _same("the technique's state on rank 0 and rank 1", ranks[0]["state"], ranks[1]["state"])
    _same("the weights on rank 0 and rank 1", ranks[0]["weights"], ranks[1]["weights"])
    # float32, sums in another order, 12 steps: 1e-5 of each number, and of the largest ones where they cancel.
    close = {"rtol": 1e-4, "atol": 1e-5}
    for part in ("gradients", "weights", "state"):
        _same(f"the {part} of two processes and of one with the joined batch", ranks[0][part], one[part], **close)


def _on_rank(technique: Any, data: Any, world_size: int, parts: int = 1) -> dict[str, Any]:
    problem = KINDS[data] if isinstance(data, str) else data
    options = {"size": 32, "batch": 8 // world_size // parts, "max_epochs": 3, "devices": world_size}
    options |= {"accumulate_grad_batches": parts} if parts > 1 else {}
    options |= {"strategy": "ddp", "use_distributed_sampler": False} if world_size > 1 else {}
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in a worker process pytest does not see to it
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        run = fit([technique], problem, ranks=(rank, world_size), **options)
    parts = {"weights": run.weights, "gradients": run.gradients, "state": technique.state_dict()}
    return {**parts, "world_size": run.trainer.world_size}


# -- 5 ----------------------------------------------------------------------------------------------------------------

# Of the gradient's norm. Half precision rounds to 2^-9 and 2^-12; the plain problems show up to 7e-3 and 9e-4.
_PRECISIONS = {"32-true": 1e-5, "bf16-mixed": 3e-2, "16-mixed": 4e-3}


def precision(case: Case) -> None:
    """Gradients agree over precision x accumulation; the technique's state is kept in float32 at least."""
    # A learning rate of 0: weights stay, so every step's gradient can be compared.
    unchanged = once(fit_made, case.problem, case.make, lr=0.0)
    exact = unchanged.gradients
    for name, tolerance in _PRECISIONS.items():
        for accumulate in (1, 3):
            options = {"precision": name, "accumulate_grad_batches": accumulate}
            is_it = (name, accumulate) == ("32-true", 1)
            run = unchanged if is_it else fit([case.make()], case.problem, lr=0.0, **options)
            wanted = [_mean(exact[k : k + accumulate]) for k in range(0, len(exact), accumulate)]
            where = f"precision={name!r}, accumulate_grad_batches={accumulate}"
            assert len(run.gradients) == len(wanted), f"{where}: {len(run.gradients)} steps in place of {len(wanted)}"
            for step, (got, want) in enumerate(zip(run.gradients, wanted, strict=True)):
                error = _distance(got, want)
                assert error <= tolerance, f"{where}: the gradient of step {step} is off by {error:.1e} of its norm"
            for at, tensor in _tensors(_state(run)):
                if tensor.is_floating_point():
                    least = torch.promote_types(tensor.dtype, case.state_dtype)
                    assert tensor.dtype is least, f"{where}: state{at} is kept in {tensor.dtype}"


def _mean(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}


def _distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    assert one.keys() == two.keys(), f"gradients of {sorted(one.keys() ^ two.keys())} on one side only"
    a, b = (torch.cat([g[name].double().flatten() for name in one]) for g in (one, two))
    return float((a - b).norm() / b.norm())


# -- 6 ----------------------------------------------------------------------------------------------------------------


def works_or_is_refused(case: Case) -> None:
    """Clipping, compiling and manual optimization with two optimizers give the eager run's gradients, or a refusal."""
    eager = once(fit_made, case.problem, case.make, lr=0.0)
    exact, norms = eager.gradients, eager.model.norms
    setups: dict[str, dict[str, Any]] = {
        "gradient_clip_val=0.05": {"gradient_clip_val": 0.05},
        "torch.compile of a network": {"compiled": "net", "limit_val_batches": 0},
        "torch.compile of the module": {"compiled": "module", "limit_val_batches": 0},
        "automatic_optimization=False, two optimizers": {"manual": True},
    }
    for name, options in setups.items():
        torch.compiler.reset()
        try:
            run = fit([case.make()], case.problem, lr=0.0, **options)
        except MisconfigurationException as error:
            demand(case.cls.__name__ in str(error), f"{name} is refused, but not by name: {error}")
            continue
        wanted = (
            [_clipped(g, norm, 0.05) for g, norm in zip(exact, norms, strict=True)]
            if "gradient_clip_val" in options
            else exact
        )
        assert len(run.gradients) == len(wanted), f"{name}: {len(run.gradients)} steps in place of {len(wanted)}"
        error = max(_distance(got, want) for got, want in zip(run.gradients, wanted, strict=True))
        assert error <= 1e-5, f"{name}: a gradient is off by {error:.1e} of its norm"  # float32, another order
    torch.compiler.reset()


def _clipped(gradient: dict[str, Tensor], norm: Tensor, limit: float) -> dict[str, Tensor]:
    return {name: g * (limit / (norm + 1e-6)).clamp(max=1.0) for name, g in gradient.items()}  # 1e-6 is torch's


# -- 7 ----------------------------------------------------------------------------------------------------------------


def instances(case: Case) -> None:
    """Two of a class with other names keep apart; without names they are refused."""
    first = once(fit_made, case.problem, case.make, name="one")
    state = copy.deepcopy(_state(first))
    fit([case.make(name="two")], case.problem, lr=0.3)
    _same("an instance's state before and after another one was trained", state, _state(first))
    both = train_pair(case.make(name="one"), case.make(name="two"), case.problem)
    if both is not None:
        one, two = both.techniques
        assert one.state_key != two.state_key, f"both save their state under {one.state_key!r}"
        assert one.log_key != two.log_key, f"both log under {one.log_key!r}"
        shared = {t.data_ptr() for _, t in _tensors(vars(one))} & {t.data_ptr() for _, t in _tensors(vars(two))} - {0}
        # Equal references are one memory by contract: the engine alone writes to it, once a step.
        shared -= {t.data_ptr() for each in getattr(one, "references", ()) for _, t in _tensors(vars(each))}
        assert not shared, "the two instances hold the same tensor"
    try:
        fit([case.make(), case.make()], case.problem)
    except (MisconfigurationException, RuntimeError) as error:  # Lightning's own check comes first
        demand(case.cls.__name__ in str(error), f"two without names are refused, but not by name: {error}")
    else:
        raise AssertionError(f"two {case.cls.__name__} without names were not refused")


# -- 8 ----------------------------------------------------------------------------------------------------------------


def plain_data(case: Case) -> None:
    """Pickling and copying before and after a fit keep everything; arguments and state are plain values and tensors."""
    for make in (case.make, *case.variants):
        fresh = make()
        for copied in (_pickled(fresh), copy.deepcopy(fresh)):
            _same("the arguments of a technique and of its copy", _arguments(fresh), _arguments(copied))
        odd = _not_plain(_arguments(fresh), "arguments")
        assert not odd, f"{odd}: YAML holds numbers, strings, lists and dataclasses only"
        run = once(fit_made, case.problem, make)
        (technique,) = run.techniques
        for copied in (_pickled(technique), copy.deepcopy(technique)):
            _same("the state of a trained technique and of its copy", technique.state_dict(), copied.state_dict())
        _check_carries_no_module(technique, run.model)
        second = _fit_watched(_pickled(fresh), case)
        _same("the weights trained with a technique and with its pickled copy", run.weights, second.weights)
        states = technique.state_dict(), second.techniques[0].state_dict()
        _same("the state of a technique and of its pickled copy, after training", *states)
        _check_carries_no_module(second.techniques[0], second.model)
        odd = _not_plain(technique.state_dict(), "state")
        assert not odd, f"{odd}: state is tensors and plain values only"


def _fit_watched(technique: Any, case: Case) -> Run:
    """Trains with it and looks at copies of it while it fits."""

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == BATCHES + 3:
                _check_carries_no_module(technique, pl_module)
                states.append((copy.deepcopy(technique.state_dict()), _pickled(technique).state_dict()))

    states: list[Any] = []
    run = fit([technique, Copies()], case.problem)
    assert states, "the fit is shorter than others"
    _same("the state of a technique and of its copy, while it fits", *states[0])
    return run


def _check_carries_no_module(technique: Any, module: Any) -> None:
    own, found = {p.data_ptr() for p in module.parameters()}, []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> None:  # asked for everything that is pickled
            if value is module or (isinstance(value, Tensor) and value.data_ptr() in own):
                found.append(type(value).__name__)

    try:
        Pickler(io.BytesIO()).dump(technique)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"{type(technique).__name__} does not pickle while it fits: {error}") from error
    demand(
        not found, f"a copy of {type(technique).__name__} carries the user's module along, or tensors of it: {found}"
    )


def _pickled(technique: Any) -> Any:
    try:
        return pickle.loads(pickle.dumps(technique))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"{type(technique).__name__} does not pickle: {error}") from error


def _arguments(technique: Any) -> dict[str, Any]:
    names = list(inspect.signature(type(technique).__init__).parameters)[1:]
    missing = [name for name in names if not hasattr(technique, name)]
    assert not missing, f"constructor arguments {missing} are no attributes of the same name"
    return {name: getattr(technique, name) for name in names}


def _not_plain(value: Any, where: str) -> str:
    value = vars(value) if dataclasses.is_dataclass(value) else value
    if isinstance(value, dict):
        odd = [f"a key {k!r} in {where}" for k in value if type(k) not in (str, int)]
        odd += [_not_plain(v, f"{where}[{k!r}]") for k, v in value.items()]
    elif isinstance(value, list | tuple):
        odd = [_not_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    else:
        odd = [] if type(value) in (Tensor, int, float, str, bool, type(None)) else [f"{where} is a {type(value)}"]
    return next(filter(None, odd), "")


# -- 10 ---------------------------------------------------------------------------------------------------------------


def own_randomness(case: Case) -> None:
    """The global random states are those of the plain run after every batch, and nothing depends on them."""
    plain, run = once(fit_made, case.problem), once(fit_made, case.problem, case.make)
    for batch, (wanted, got) in enumerate(zip(plain.watch.random, run.watch.random, strict=True)):
        for name, one, two in zip(("torch", "numpy", "numpy's rest", "random"), wanted, got, strict=True):
            assert not difference(one, two), (
                f"after batch {batch} the global random state of {name} is not the plain run's"
            )
    other = fit([case.make()], case.problem, seed=1)
    _same("the weights under two global seeds", run.weights, other.weights)


# -- common -----------------------------------------------------------------------------------------------------------


def _same(what: str, one: Any, two: Any, **tolerance: float) -> None:
    found = difference(one, two, **tolerance)
    assert not found, f"Not the same: {what}: {found}"


def _state(run: Run) -> dict[str, Any]:
    return {t.state_key: t.state_dict() for t in run.techniques}


def _users(run: Run) -> list[tuple[int, dict[str, float]]]:
    rows = [(step, {k: v for k, v in row.items() if not k.startswith("reg/")}) for step, row in run.logged]
    return [(step, row) for step, row in rows if row]


def _tensors(value: Any, where: str = "", seen: tuple[int, ...] = ()) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(where, value)]
    if id(value) in seen:
        return []
    seen = (*seen, id(value))
    if isinstance(value, Mapping):
        return [found for k, v in value.items() for found in _tensors(v, f"{where}[{k!r}]", seen)]
    if isinstance(value, list | tuple):
        return [found for i, v in enumerate(value) for found in _tensors(v, f"{where}[{i}]", seen)]
    if type(value).__module__.startswith(("lightning_reg", "tests")) and hasattr(value, "__dict__"):
        return _tensors(vars(value), where, seen)
    return []


LAWS: dict[str, Callable[..., None]] = {
    law.__name__: law
    for law in (
        neutral_is_nothing,
        resume_is_exact,
        leaves_no_trace,
        ranks_agree,
        precision,
        works_or_is_refused,
        instances,
        plain_data,
        says_what_it_does,
        own_randomness,
        cited,
        as_by_hand,
        order,
        recomputation,
    )
}
NEED_TWO_PROCESSES = ("ranks_agree",)
