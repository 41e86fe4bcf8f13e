"""The soup of one fit: what was gathered for it, what is decided about it, what became of it; and its state."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_reg.averaging._soup_results import Candidate
from lightning_reg.averaging._state_dicts import is_averaged
from lightning_reg.averaging.model_soups._gathered import (
    Gathered,
    Ingredient,
    RunningMean,
    Shelf,
    Snapshots,
    are_finite,
)
from lightning_reg.averaging.model_soups._live_weights import Weights
from lightning_reg.averaging.model_soups.core import accepts, greedy_soup_of_numbers, warn_of_no_numbers

__all__ = [
    "GreedyRules",
    "Outcome",
    "Soup",
    "average_of_state",
    "fault_of_shapes",
    "fault_of_state",
    "weights_of_state",
]

ScoreOf = Callable[[Weights | None], float]  # of weights, or of those that the module holds


@dataclass(frozen=True)
class GreedyRules:
    """When a candidate joins a greedy soup; the arguments of :func:`greedy_soup`."""

    mode: Any
    strict: bool
    min_delta: float
    max_ingredients: int | None


@dataclass
class Outcome:
    """What a fit's average is made of.

    Args:
        ingredients: Names, where it is one of snapshots.
        count: How many snapshots or updates are in it.
        score: Of the greedy soup; of another average if it has batch statistics and the metric is logged.
        trace: Decisions of the greedy soup.
        before_batch_norm: The score before batch statistics were estimated anew.

    """

    ingredients: list[str]
    count: int
    score: float | None = None
    trace: list[Candidate] = field(default_factory=list)
    before_batch_norm: float | None = None

    def metrics(self) -> dict[str, float]:
        """What is logged of it."""
        scores = {"score": self.score, "score_before_batch_norm": self.before_batch_norm}
        known = {name: score for name, score in scores.items() if score is not None}
        return {"ingredients": float(self.count), **known}


class Soup:
    """Weights that were gathered in a fit, and the average that is made of them.

    Args:
        method: How the average is made.
        gathered: Collects the weights; a :class:`RunningMean` of a greedy soup has decided about each snapshot at once.
        rules: Of a greedy soup.

    Attributes:
        outcome: What the average is made of; ``None`` until the fit ends.

    """

    def __init__(self, method: str, gathered: Gathered, rules: GreedyRules) -> None:
        self.method, self.gathered, self.rules = method, gathered, rules
        self.outcome: Outcome | None = None
        self._score: float | None = None
        self._trace: list[Candidate] = []
        self._validated: tuple[int, float] | None = None
        self._said_no_number = False

    # -- while training runs ------------------------------------------------------------------------------------------

    def note_validation(self, step: int, score: float) -> None:
        """Notes the score of the weights after so many steps, for the snapshots of that moment."""
        self._validated = step, score
        for ingredient in self.gathered.ingredients:
            if ingredient.step == step and ingredient.score is None:
                ingredient.score = score

    def take(
        self, name: str, step: int, weights: Weights, score_of: ScoreOf, *, write: bool, share: float = 1.0
    ) -> None:
        """Takes the present weights in, or lets a greedy soup decide at once; leaves out those that are not finite.

        Args:
            name: What to call them.
            step: Optimizer steps so far.
            weights: The live tensors.
            score_of: Scores weights by a validation.
            write: Whether this process writes the files, if there are any.
            share: How much they count in a mean.

        """
        if self.gathered.on_host and not are_finite(weights):
            self.gathered.left_out.add(1)
            return
        score = self._validated[1] if self._validated is not None and self._validated[0] == step else None
        ingredient = Ingredient(name, step, score, share)
        if self.method == "greedy" and isinstance(self.gathered, RunningMean):
            self._decide(self.gathered, ingredient, weights, score_of)
        else:
            self.gathered.take(ingredient, weights, write=write)

    def _decide(self, mean: RunningMean, ingredient: Ingredient, weights: Weights, score_of: ScoreOf) -> None:
        """Lets a snapshot join the greedy soup, replace it, or go, whichever scores best."""
        own = ingredient.score = ingredient.score if ingredient.score is not None else score_of(None)
        best, most = self._score, self.rules.max_ingredients
        full = most is not None and mean.taken >= most
        joined = None if mean.taken == 0 or full else score_of(mean.average(weights))
        rules = self.rules  # of the metric, which is known once validation has run
        joins = (
            joined is not None
            and best is not None
            and accepts(joined, best, strict=rules.strict, min_delta=rules.min_delta, mode=rules.mode)
        )
        bar = joined if joins else best
        is_number = not math.isnan(own)
        better_alone = is_number and (bar is None or accepts(own, bar, strict=True, min_delta=0.0, mode=rules.mode))
        if not is_number and not self._said_no_number:
            warn_of_no_numbers("SoupAverager", [ingredient.name])
            self._said_no_number = True
        self._trace.append(Candidate(ingredient.name, own, joined, joins or better_alone))
        if better_alone:
            self.gathered = mean = RunningMean(on_cpu=True, with_names=True, left_out=mean.left_out)
        if joins or better_alone:
            mean.take(ingredient, weights)
            self._score = own if better_alone else joined

    # -- when it ends -------------------------------------------------------------------------------------------------

    def finish(
        self, source: Gathered | Snapshots, own_score: Callable[[Weights], float], score_of: ScoreOf
    ) -> tuple[Outcome, dict[str, Tensor]]:
        """The average of what was gathered; of nothing if no snapshot of a greedy soup has a number for a score.

        Args:
            source: Where the weights are: what was gathered here, or other snapshots.
            own_score: Scores a snapshot as it is.
            score_of: Scores an average, with batch statistics of its own.

        Returns:
            What is in it, and the average.

        """
        if self.method == "greedy" and isinstance(source, Snapshots):
            return self._greedy(source, own_score, score_of)
        return Outcome(list(source.names), source.taken, self._score, list(self._trace)), source.average()

    def _greedy(
        self, snapshots: Snapshots, own_score: Callable[[Weights], float], score_of: ScoreOf
    ) -> tuple[Outcome, dict[str, Tensor]]:
        for position, ingredient in enumerate(snapshots.ingredients):
            if ingredient.score is None:
                ingredient.score = own_score(snapshots[position])
        scores = [math.nan if i.score is None else i.score for i in snapshots.ingredients]
        rules = vars(self.rules)
        soup = greedy_soup_of_numbers("SoupAverager", snapshots, scores, score_of, names=snapshots.names, **rules)
        return Outcome(list(soup.ingredients), len(soup.ingredients), soup.score, soup.trace), soup.state_dict

    # -- what came of it ----------------------------------------------------------------------------------------------

    @property
    def trace(self) -> list[Candidate]:
        """Decisions of the greedy soup, in order."""
        return list(self._trace) if self.outcome is None else self.outcome.trace

    @property
    def ingredients(self) -> list[str]:
        """Names of the snapshots in the average."""
        return self.gathered.names if self.outcome is None else self.outcome.ingredients

    @property
    def score(self) -> float | None:
        """Score of the average, if it has one."""
        return self._score if self.outcome is None else self.outcome.score

    def record(self, *, averaged: bool) -> dict[str, Any]:
        """What a checkpoint says about its weights, in plain values.

        Args:
            averaged: Whether they are the average.

        Returns:
            The record.

        """
        count = self.gathered.taken if self.outcome is None else self.outcome.count
        what = f"{count} {'updates' if self.method in ('ema', 'swa') else 'snapshots'}"
        return {
            "holds": f"{self.method} average of {what}"
            if averaged
            else f"raw weights; {what} are in the callback's state",
            "averaged": averaged,
            "method": self.method,
            "ingredients": list(self.ingredients),
            "score": self.score,
            "trace": [asdict(candidate) for candidate in self.trace],
        }

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "method": self.method,
            "validated": self._validated,
            "gathered": self.gathered.state(),
            "left_out": self.gathered.left_out.read(),
            "soup_score": self._score,
            "mode": self.rules.mode,
            "trace": [asdict(candidate) for candidate in self._trace],
            "outcome": None if self.outcome is None else asdict(self.outcome),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a state.

        Raises:
            FileNotFoundError: If files of snapshots are missing.

        """
        self.gathered.load(state["gathered"], state["left_out"])
        self._validated = None if state["validated"] is None else (state["validated"][0], state["validated"][1])
        self.rules = replace(self.rules, mode=state["mode"])
        self._score, outcome = state["soup_score"], state["outcome"]
        self._trace = _candidates(state["trace"])
        self.outcome = None if outcome is None else Outcome(**{**outcome, "trace": _candidates(outcome["trace"])})


def _candidates(values: list[dict[str, Any]]) -> list[Candidate]:
    return [Candidate(**candidate) for candidate in values]


def fault_of_state(state: object) -> str:
    """What makes a callback's state none that an average can be taken from, as a sentence; "" if nothing does."""
    parts = [state.get(part) if isinstance(state, Mapping) else None for part in ("gathered", "soup")]
    if not isinstance(state, Mapping) or "method" not in state or not all(isinstance(part, Mapping) for part in parts):
        return "it is no state of a SoupAverager."
    count = state["gathered"].get("count", 0)
    if not isinstance(count, int) or count < 0:
        return f"it counts {count!r} weights."
    for values in weights_of_state(state):
        if not isinstance(values, Mapping):
            return f"it holds a {type(values).__name__} in place of weights."
        for name, value in values.items():
            if not is_averaged(value):
                return f"{name!r} in it is no tensor that can be averaged."
        if not are_finite(values):
            bad = [name for name, value in values.items() if not are_finite({name: value})]
            return f"{bad[0]!r} in it is not finite (NaN or infinite)."
    return ""


def weights_of_state(state: Mapping[str, Any]) -> list[Any]:
    """All weights in a callback's state, those that are there: an average, sums, snapshots."""
    gathered = state["gathered"]
    held = (gathered.get("average"), gathered.get("sums"), state["soup"], *gathered.get("weights", ()))
    return [weights for weights in held if weights]


def fault_of_shapes(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What in a callback's state is of other shapes than the weights have, as a sentence; "" if nothing is."""
    for values in weights_of_state(state):
        for name, value in values.items():
            if name in shapes and tuple(value.shape) != shapes[name]:
                return f"{name!r} in it has the shape {tuple(value.shape)}, and the weight has {shapes[name]}."
    return ""


def average_of_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The average that a callback's state holds.

    Returns:
        Averaged tensors by name.

    Raises:
        RuntimeError: If there is none.

    """
    gathered = state["gathered"]
    if state["soup"]:
        return dict(state["soup"])
    if state["method"] == "greedy" and "weights" in gathered:
        raise RuntimeError(
            "SoupAverager: a greedy soup is decided when the fit ends; this state is from before. Take"
            " `greedy_at='snapshot'` to have one all along."
        )
    if gathered.get("average"):
        return {name: value.clone() for name, value in gathered["average"].items()}
    if gathered.get("sums") and gathered["count"]:
        mass = sum(i.get("share", 1.0) for i in gathered["ingredients"]) or gathered["count"]
        return {name: value / mass for name, value in gathered["sums"].items()}
    if gathered.get("ingredients"):
        shelf = Shelf(None, None)
        shelf.load(gathered)
        masks = state.get("masks", {})  # files hold the weights as they were trained
        return {name: value * masks.get(name, 1) for name, value in shelf.average().items()}
    raise RuntimeError("SoupAverager: there is no average yet.")
