"""The part that has the training loader draw what a technique says."""

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_reg.engine.data.draws import Draws
from lightning_reg.engine.host import epochs
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.run.part import Part

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.engine.data.indices import IndexSource
    from lightning_reg.engine.data.loaders import TrainLoaders
    from lightning_reg.engine.run.phases import OnDraws

__all__ = ["DrawPart"]


class DrawPart(Part):
    """Epochs made of the samples that a technique draws.

    Args:
        trainer: The Trainer.
        loaders: The followed training loaders.
        technique: The one that draws.

    """

    def __init__(self, trainer: "Trainer", loaders: "TrainLoaders", technique: "OnDraws") -> None:
        self._trainer, self._loaders, self._technique = trainer, loaders, technique
        self._replaced: host.Replacement | None = None
        self._source: IndexSource | None = None
        self._draws: Draws | None = None
        self._drawn_for: tuple[int, Any] | None = None

    @override
    def start(self) -> None:
        self._loaders.drawn_from(self._technique)  # refuses
        self._replaced = epochs.when_pass_begins(self._trainer, self._begin_pass, self._passes)
        epochs.counts_as_resumed(self._trainer, self.begin_epoch)

    @override
    def begin_epoch(self) -> None:
        loader, source = self._loaders.drawn_from(self._technique)
        epoch = self._trainer.current_epoch
        if self._drawn_for is not None and self._drawn_for[0] == epoch and self._drawn_for[1] is loader:
            return
        self._drawn_for = epoch, loader  # Lightning may have made a new loader for this epoch
        had_draws = self._draws is not None
        indices = self._technique.draw_samples(epoch, len(loader.dataset))
        group = host.data_parallel_group(self._trainer)
        self._draws = None if indices is None else Draws(indices, loader, self._technique, group)
        self._source = source
        source.draw(self._draws)
        if had_draws or self._draws is not None:
            epochs.count_batches(self._trainer)

    @override
    def close(self) -> None:
        if self._replaced is not None:
            self._replaced.undo()
            self._replaced = None
        if self._source is not None:
            self._source.draw(None)
            self._source = None
        self._draws = self._drawn_for = None

    def _begin_pass(self, done: int) -> bool:
        self.begin_epoch()
        if self._draws is None:
            return False
        self._give_up_pass()
        self._draws.start = done
        return True

    def _give_up_pass(self) -> None:
        """Ends a pass over the user's own samples that Lightning has begun before this epoch was drawn."""
        changed = [] if self._source is None else self._source.give_up(self._trainer.current_epoch)
        if changed:
            host.rank_zero_warn(
                f"{type(self._technique).__name__} draws the samples of this epoch, and Lightning had begun a pass over"
                f" the loader's own before. It has changed {', '.join(changed)}, and epochs of the loader's own samples"
                " go on from there. If that is a state of the sampler, give it `state_dict` and `load_state_dict`, with"
                " which it is put back."
            )

    def _passes(self) -> int:
        return 0 if self._source is None else self._source.passes
