"""How many batches an epoch of Lightning's has, and the moment at which its pass over the training loader begins."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.lightning import Replacement, combined_loader

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["batches_of_loader", "count_batches", "counts_as_resumed", "limited", "when_pass_begins"]


def limited(trainer: "Trainer", batches: int) -> int:
    """How many of the batches of an epoch count, by ``limit_train_batches``."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))


def batches_of_loader(trainer: "Trainer", loader: Any) -> float:
    """How many batches of the user's own training loader count, whatever the present epoch is made of."""
    try:
        return limited(trainer, len(loader))
    except TypeError:  # a sampler without a length, which nobody draws in place of
        return float(trainer.num_training_batches)


def count_batches(trainer: "Trainer") -> None:
    """Lightning counts the batches of its one training loader anew, for progress, validation and the epoch's end."""
    loop, combined = trainer.fit_loop, combined_loader(trainer)
    batches = limited(trainer, len(combined.flattened[0]))
    combined.limits = [batches]
    loop.max_batches = batches
    every = trainer.val_check_interval
    if isinstance(every, float) and trainer.val_check_batch not in (None, math.inf):
        trainer.val_check_batch = max(1, int(batches * every))


def counts_as_resumed(trainer: "Trainer", batches_of: Callable[[], None]) -> None:
    """Has Lightning count the batches of the epoch that a checkpoint is from, before it looks where in it that was.

    Args:
        trainer: A Trainer in ``on_train_start``.
        batches_of: Has it count those of the present epoch.

    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if progress.is_last_batch and progress.current.ready:
        trainer.fit_loop.max_batches = progress.current.ready
    elif progress.current.ready:
        batches_of()


def when_pass_begins(trainer: "Trainer", prepare: Callable[[int], bool], begun: Callable[[], int]) -> Replacement:
    """Calls a function before each of Lightning's passes over the training loader, and has the pass begin after it.

    The first pass of a fit Lightning begins before the fit has started; it begins anew then, if the function says so.

    Args:
        trainer: A Trainer that fits.
        prepare: Gets the number of batches of this epoch that an earlier fit has trained on; whether the loader has
            changed.
        begun: How many passes over the loader have begun.

    Returns:
        What stands in for the method, until it is undone.

    """
    loop = trainer.fit_loop.epoch_loop

    def on_run_start(fetcher: Any) -> None:
        done = loop.batch_progress.current.ready
        changed = prepare(done)
        before = begun()
        replaced.original(fetcher)
        if changed and begun() == before:
            with isolated_randomness():  # where a pass of the plain fit begins nothing is drawn a second time
                iter(fetcher)
            fetcher.fetched += done

    replaced = Replacement(loop, "on_run_start", on_run_start)
    return replaced
