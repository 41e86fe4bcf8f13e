"""``lightning-reg soup {uniform,greedy,learned}``: averages of checkpoints from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_reg.averaging._checkpoint_files import CheckpointFile
from lightning_reg.averaging._file_bars import counted_batches, counted_files
from lightning_reg.averaging._soup_command import Evaluate, add_methods, function_at, mix_files
from lightning_reg.averaging._soup_results import SoupResult
from lightning_reg.averaging.model_soups.core import LearnedSoup
from lightning_reg.averaging.model_soups.files import make_soup
from lightning_reg.engine.host.commands import Commands, Options

__all__ = ["add_command"]

_METHODS = {
    "uniform": "mean of all checkpoints, read in pieces",
    "greedy": "checkpoints join while the held-out score improves",
    "learned": "mixing weights learned on held-out data",
}


def add_command(commands: Commands) -> None:
    """Adds the averages to ``lightning-reg soup``.

    Args:
        commands: Of ``lightning-reg``.

    """
    parsers = add_methods(commands, _METHODS, _make)
    uniform, greedy, learned = parsers.values()
    uniform.add_argument("--weights", type=float, nargs="+", help="a number per checkpoint")
    uniform.add_argument(
        "--factors",
        choices=("mean", "stack"),
        default="mean",
        help="stack: LoRA factors side by side",
    )
    for parser in (uniform, greedy):
        parser.add_argument("--start", type=str, help="the file that all runs started from, to check that")
    greedy.add_argument("--min-delta", type=float, default=0.0, help="least improvement of the score")
    greedy.add_argument("--at-least-as-good", action="store_true", help="accept an equal score too")
    greedy.add_argument("--max-ingredients", type=int, help="how many to take at most")
    learned.add_argument("--learn-on", required=True, help="module:function that returns (module, batches)")
    learned.add_argument("--per", choices=("tensor", "model"), default="tensor", help="a mixing weight for each")
    learned.add_argument("--lr", type=float, default=0.05, help="learning rate of the mixing weights")
    learned.add_argument("--epochs", type=int, default=5, help="passes over the batches")


def _make(method: str, options: Options, evaluate: Evaluate | None) -> SoupResult:
    if method == "learned":
        return mix_files(method, options, evaluate, lambda files: _learned(options, files))
    if method == "uniform":
        choices: dict[str, Any] = {"weights": options.weights, "factors": options.factors}
    else:
        if evaluate is None:
            raise ValueError("a greedy soup needs a held-out score: --evaluate, or --config with --monitor.")
        choices = {"min_delta": options.min_delta, "strict": not options.at_least_as_good}
        choices["max_ingredients"] = options.max_ingredients
    return make_soup(
        options.checkpoints,
        "uniform" if method == "uniform" else "greedy",
        evaluate,
        out=Path(options.out),
        start=options.start,
        key=options.key,
        mode=options.mode,
        progress=True,
        exclude=options.exclude,
        **choices,
    )


def _learned(options: Options, files: Sequence[CheckpointFile]) -> dict[str, Any]:
    module, batches = function_at(options.learn_on)()
    with counted_files(files, f"reading {len(files)} files", shown=True) as members:
        soup = LearnedSoup(module, members, options.per, options.exclude)
    with counted_batches(batches, options.epochs, "learning mixing weights") as counted:
        soup.fit(counted, lr=options.lr, epochs=options.epochs)
    return soup.soup()
