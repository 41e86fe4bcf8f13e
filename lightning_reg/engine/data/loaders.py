"""The training loaders of a fit, followed for their sample indices."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_reg.engine.data.indices import BatchIndices, IndexSource, check_has_indices
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.owner import Owner

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["TrainLoaders", "find_source"]


_SEVERAL = (Mapping, list, tuple)
_DRAWS = "draws the samples of the epochs"


class TrainLoaders:
    """Follows the training loaders while techniques need indices from them.

    Args:
        trainer: The Trainer.
        techniques: All techniques; those that need indices and name no ``index_key`` count.
        drawer: The one that draws the samples of the epochs, if any.

    """

    def __init__(self, trainer: "Trainer", techniques: Sequence[Owner], drawer: Owner | None = None) -> None:
        self._trainer, self._drawer = trainer, drawer
        self._askers = [t for t in techniques if t is drawer or (t.needs_indices and t.index_key is None)]
        self._followed: list[_Followed] = []
        self._sources: dict[str, IndexSource] | None = None
        self._processing: host.Replacement | None = None

    def attach(self) -> None:
        """Stands in for ``Strategy.process_dataloader``, the last that Lightning does to a loader.

        Raises:
            MisconfigurationException: If the training loader was made ready before.

        """
        if not self._askers:
            return
        if self._trainer.train_dataloader is not None:
            does = _DRAWS if self._askers[0] is self._drawer else "needs sample indices"
            raise MisconfigurationException(
                f"{type(self._askers[0]).__name__} {does}, but the training DataLoader was made ready"
                " before the technique's `setup` (an earlier callback asked for `trainer.estimated_stepping_batches`?)."
                " Put the technique first in `Trainer(callbacks=[...])`."
            )
        self._processing = host.Replacement(self._trainer.strategy, "process_dataloader", self._follow)

    def detach(self) -> None:
        """Puts the user's own loaders back; may be called twice."""
        if self._processing is None:
            return
        self._processing.undo()
        self._processing = None
        combined = host.combined_loader(self._trainer)
        if combined is not None:
            combined.flattened = [self.original(loader) for loader in combined.flattened]
        self._followed.clear()
        self._sources = None

    def sizes(self) -> dict[Owner, int]:
        """Number of samples behind each technique that needs indices.

        Returns:
            Lengths of the datasets.

        Raises:
            MisconfigurationException: If a technique's loader is not there or has no indices.

        """
        sources = self._resolve()
        return {technique: find_source(technique, sources).size for technique in self._askers}

    @property
    def several(self) -> bool:
        """Whether the batch is put together from several training loaders."""
        return isinstance(self._trainer.train_dataloader, _SEVERAL)

    def drawn_from(self, technique: Owner) -> tuple[Any, IndexSource]:
        """The one training loader, without a tap, and the source whose passes can be made of other draws.

        Args:
            technique: Who draws.

        Returns:
            The loader and its source.

        Raises:
            MisconfigurationException: If there are several, or its samples have no indices.

        """
        loader = self.the_only_one(technique, _DRAWS)
        check_has_indices(loader, technique, _DRAWS)
        return loader, find_source(technique, self._resolve())

    def advance(self) -> Mapping[str, tuple[IndexSource, BatchIndices | None]]:
        """Indices of the present batch, for each followed loader."""
        if not self._askers:
            return {}
        return {key: (source, source.advance()) for key, source in self._resolve().items()}

    def _follow(self, loader: Any) -> Any:
        if self._processing is None:
            return loader
        processed = self._processing.original(loader)
        if not self._trainer.training:
            return processed
        self._sources = None
        for technique in self._askers:
            technique.meet_loader(self._trainer, processed)
        source, refusal, twin = IndexSource(is_drawn=self._drawer is not None), None, processed
        try:
            twin = source.attach(processed)
        except MisconfigurationException as error:
            # With several loaders another one may be meant: whoever asks for this one is told when the fit starts.
            refusal = error
        self._followed.append(_Followed(twin, processed, source, refusal))
        return twin

    def original(self, loader: Any) -> Any:
        """The loader behind a followed one; any other as it is."""
        return next((f.original for f in self._followed if f.twin is loader), loader)

    def the_only_one(self, technique: Owner, why: str) -> Any:
        """The training loader, as Lightning made it ready and without a tap.

        Args:
            technique: Who asks, for the error.
            why: What for.

        Returns:
            The loader.

        Raises:
            MisconfigurationException: If there are several.

        """
        loaders = host.combined_loader(self._trainer).flattened
        if self.several or len(loaders) != 1:
            raise MisconfigurationException(
                f"{type(technique).__name__} {why}, and there are {len(loaders)} training loaders. Give the Trainer one"
                " DataLoader."
            )
        return self.original(loaders[0])

    def _resolve(self) -> dict[str, IndexSource]:
        if self._sources is None:
            loaders = _by_key(self._trainer.train_dataloader)
            # Loaders of earlier epochs (reload_dataloaders_every_n_epochs) are not held on to.
            self._followed = [f for f in self._followed if any(f.twin is loader for loader in loaders.values())]
            chosen = {_choose(technique, loaders): technique for technique in self._askers}
            self._sources = {key: self._source(loaders[key]) for key in chosen}
        return self._sources

    def _source(self, loader: Any) -> IndexSource:
        followed = next((f for f in self._followed if f.twin is loader), None)
        if followed is None:
            raise MisconfigurationException("The training DataLoader was replaced while the fit was running.")
        if followed.refusal is not None:
            raise followed.refusal
        return followed.source


def find_source(technique: Owner, sources: Mapping[str, Any]) -> Any:
    """What belongs to the technique's loader, of things that are listed by loader."""
    return next(iter(sources.values())) if len(sources) == 1 else sources[technique.dataloader or ""]


class _Followed(NamedTuple):
    twin: Any
    original: Any
    source: IndexSource
    refusal: MisconfigurationException | None


def _by_key(structure: Any) -> dict[str, Any]:
    if isinstance(structure, Mapping):
        return {str(key): loader for key, loader in structure.items()}
    if isinstance(structure, list | tuple):
        return {str(position): loader for position, loader in enumerate(structure)}
    return {"": structure}


def _choose(technique: Owner, loaders: Mapping[str, Any]) -> str:
    key = technique.dataloader or ("" if len(loaders) != 1 else next(iter(loaders)))
    if key not in loaders:
        name = type(technique).__name__
        raise MisconfigurationException(
            f"{name} counts the samples of one training loader, and dataloader={technique.dataloader!r} is none of the"
            f" {len(loaders)} there are: {', '.join(repr(k) for k in loaders) or 'none'}. Write"
            f' `{name}(dataloader="...")`.'
        )
    return key
