"""What a soup came out as, how it came about, and the file that it is written to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_reg.averaging._checkpoint_files import CheckpointFile
from lightning_reg.averaging._state_dicts import aligned, wrapped_differently
from lightning_reg.averaging._written_files import save_weights
from lightning_reg.engine.host.names import Patterns

__all__ = ["Candidate", "SoupResult", "own_scores", "save_soup"]

# Entries of a Lightning checkpoint that `load_from_checkpoint` needs to build the module.
_CARRIED = ("pytorch-lightning_version", "epoch", "global_step", "hyper_parameters", "hparams_name", "hparams_type")


@dataclass(frozen=True)
class Candidate:
    """One decision on the way to a soup.

    Args:
        name: The ingredient that was tried.
        own_score: Its score alone; ``None`` if nobody asked for it.
        score: Score of the soup with it; ``None`` if nobody asked for it.
        accepted: Whether it stayed.

    """

    name: str
    own_score: float | None
    score: float | None
    accepted: bool


@dataclass
class SoupResult:
    """A soup, and how it came about.

    Args:
        state_dict: The averaged weights.
        ingredients: What is in it, in the order of joining: names if they were given, else positions.
        trace: Every decision, in order.
        score: Score of the soup; ``None`` if nothing was evaluated.
        scores_before_batch_norm: For each evaluated model with batch statistics its score before they were estimated
            anew, in the order of evaluation.

    """

    state_dict: dict[str, Any]
    ingredients: list[Any]
    trace: list[Candidate] = field(default_factory=list)
    score: float | None = None
    scores_before_batch_norm: list[float] = field(default_factory=list)

    @classmethod
    def of_all(
        cls, state_dict: dict[str, Any], names: Sequence[str], scores: Sequence[float], score: float | None
    ) -> "SoupResult":
        """A soup that takes every model.

        Args:
            state_dict: Its weights.
            names: The models.
            scores: Score of each model alone; empty if nobody asked for them.
            score: Of the soup.

        Returns:
            The soup.

        """
        own: Sequence[float | None] = scores or [None] * len(names)
        trace = [Candidate(name, alone, None, True) for name, alone in zip(names, own, strict=True)]
        return cls(state_dict, list(names), trace, score)


def own_scores(
    files: Sequence[CheckpointFile],
    names: Sequence[str],
    evaluate: Callable[[dict[str, Any]], float] | None,
    exclude: Patterns,
) -> list[float]:
    """Score of each file alone.

    Args:
        files: The files.
        names: What to call them.
        evaluate: Scores a state dict; ``None`` for no scores.
        exclude: Patterns of keys that need not be such as can be averaged.

    Returns:
        A score for each, or none.

    """
    if evaluate is None:
        return []
    unwrap = wrapped_differently(files)
    pairs = zip(files, names, strict=True)
    states = (aligned([file], [name], exclude, unwrap=unwrap)[0].load() for file, name in pairs)
    return [float(evaluate(state)) for state in states]


def save_soup(path: str | Path, result: SoupResult, method: str, extra: Mapping[str, Any]) -> None:
    """Writes a soup, atomically, with a record of what it is.

    Args:
        path: ``.safetensors``, or a file in the form of a Lightning checkpoint.
        result: The soup.
        method: How it was made.
        extra: Entries of an ingredient, of which those go along that ``load_from_checkpoint`` needs.

    """
    record = {
        "holds": f"{method} soup of {len(result.ingredients)} checkpoints",
        "averaged": True,
        "method": method,
        "ingredients": [str(name) for name in result.ingredients],
        "score": result.score,
        "trace": [asdict(candidate) for candidate in result.trace],
    }
    carried = {name: extra[name] for name in _CARRIED if name in extra}
    save_weights(path, result.state_dict, {"make_soup": record}, carried)
