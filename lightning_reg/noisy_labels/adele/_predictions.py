"""What the network predicts for whole training images, at several scales: in a step, and in a pass beside the fit."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host.arguments import check_bool, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.networks.records import check_fetched_twice, steps_in_order
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from lightning_reg.noisy_labels._label_stores import LabelStore
from lightning_reg.noisy_labels._scales import resized, scaled_size

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["PredictsMasks", "check_loader"]


class PredictsMasks(BatchTechnique, LossTechnique, ABC):
    """A technique that reads class scores of images and masks; its arguments that say where and how, see ADELE."""

    def __init__(
        self,
        scales: Sequence[float],
        flip: bool,
        temperature: float,
        multiple_of: int,
        layer: str | None,
        keys: tuple[str, str],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given: object = scales
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise ValueError(f"ADELE: `scales` must be at least one number, got {scales!r}.")
        for scale in scales:
            check_number(self, "scales", scale, low=0, low_open=True)
        check_bool(self, "flip", flip)
        check_number(self, "temperature", temperature, low=0, low_open=True)
        check_number(self, "multiple_of", multiple_of, low=1, integer=True)
        self.scales, self.flip, self.temperature, self.multiple_of = list(scales), flip, temperature, multiple_of
        self.layer, (self.input_key, self.target_key) = layer, keys

    @abstractmethod
    @override
    def describe(self) -> str: ...

    @property
    @override
    def feature_layers(self) -> Sequence[str]:
        return [self.layer] if self.layer else []

    def _masks_of(self, batch: Any) -> Tensor:
        """The masks of a batch, ``(B, H, W)`` of whole numbers; refuses others."""
        masks = find_entry(batch, self.target_key, "ADELE: target_key")
        if not isinstance(masks, Tensor) or masks.dim() != 3 or masks.is_floating_point() or masks.dtype == torch.bool:
            found = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
            raise MisconfigurationException(
                "ADELE corrects masks with one class for each pixel, whole numbers (B, H, W), and the entry"
                f" {self.target_key!r} of the batch is {found}. Name the masks: `ADELE(target_key=...)`; several"
                " classes for one pixel (a mask for each class) cannot be corrected."
            )
        return masks

    def _scores_of(self, call: "LossCall | None", features: Mapping[str, Any]) -> Tensor:
        """The class scores ``(B, C, H, W)`` of a step: of the named layer, else of the loss call; without gradient."""
        scores = features.get(self.layer) if self.layer else None if call is None else call.input
        if not isinstance(scores, Tensor) or scores.dim() != 4:
            found = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else "none"
            where = f"from the layer {self.layer!r}" if self.layer else "in the loss call"
            raise MisconfigurationException(
                f"ADELE needs class scores (B, C, H, W), and found {found} {where}. Where the loss is no function of"
                " torch.nn.functional (Dice), or pixels are flattened for it, name the layer that puts the scores out:"
                ' `ADELE(layer="net.head")`.'
            )
        return scores.detach()

    # -- whole images -------------------------------------------------------------------------------------------------

    def _check_samples_stay(self, trainer: "Trainer", store: LabelStore | None) -> None:
        """Refuses samples that are another time others than they were: corrected pixels would lie elsewhere."""
        with self._whole(trainer, store, check_same=_check_same):
            pass

    def _whole(
        self, trainer: "Trainer", store: LabelStore | None, **options: Any
    ) -> "AbstractContextManager[Iterator[tuple[Step, Sequence[int]]]]":
        """Steps with whole images: those behind the store, if there is one."""
        if store is not None:
            options |= {"dataset": store.dataset, "one_by_one": store.size is not None}
        return steps_in_order(trainer, self, **options)

    def _predictions(
        self, trainer: "Trainer", store: LabelStore | None, loader: Any = None
    ) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        """Goes once over the training data in eval mode, after the fit over those of a loader.

        Yields:
            Of each batch the indices ``(B,)`` on the CPU, the masks as given, and probabilities ``(B, C, H, W)``
            float32.

        """
        module, weights, options = trainer.lightning_module, None, {}
        peer = Peer(module, layers=self.feature_layers, owner=self)
        if loader is None:
            peer.share_memory_with(module)
            weights = weights_of(module)
        else:  # to where batches go: the module itself is on the CPU after a fit
            peer.module.to(trainer.strategy.root_device)
            options = {"loader": loader, "check_same": _check_same}
        with self._whole(trainer, store, **options) as steps:
            for step, indices in steps:
                yield torch.tensor(indices), self._masks_of(step.batch), self._seen(step, peer, weights)

    @torch.no_grad()
    def _seen(self, step: "Step", peer: Peer, weights: Mapping[str, Tensor] | None) -> Tensor:
        """The softmax of the mean of a batch's scores at all scales, flipped as well."""
        batch, shape = step.batch, self._masks_of(step.batch).shape[-2:]
        images = find_entry(batch, self.input_key, "ADELE: input_key")
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise MisconfigurationException(
                f"ADELE resizes images (B, C, H, W), and the entry {self.input_key!r} of the batch is"
                f" {tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}. Name the images:"
                " `ADELE(input_key=...)`."
            )
        found = []
        for scale in self.scales:
            size = tuple(images.shape[-2:]) if scale == 1 else scaled_size(images.shape[-2:], scale, self.multiple_of)
            for flipped in (False, True) if self.flip else (False,):
                step.batch = batch
                for key in (self.input_key, self.target_key):
                    entry = resized(find_entry(batch, key, "ADELE"), size)
                    step.batch = replace_entry(step.batch, key, entry.flip(-1) if flipped else entry)
                sight = peer.see(step, None if self.layer else self, weights=weights)
                scores = resized(self._scores_of(sight.call, sight.features).float(), shape)
                found.append(scores.flip(-1) if flipped else scores)
        step.batch = batch
        return (torch.stack(found).mean(0) / self.temperature).softmax(1)


def _check_same(one: "Step", two: "Step") -> None:
    check_fetched_twice(
        one,
        two,
        "ADELE replaces pixels of masks, and a batch that was fetched twice was another one the second time: images are"
        " cropped, flipped or otherwise changed at random, so the pixels of a corrected mask would lie elsewhere. Give"
        " the loader whole images without random transforms, and do these behind it: `LabelStore(whole_images,"
        " num_classes=..., transform=...)` as the dataset hands out corrected masks before its `transform`; or in"
        " `training_step` (with image and mask together), in train mode only.",
    )


def check_loader(loader: Any, num_samples: int | None) -> None:
    """Refuses what is no loader of the training data.

    Args:
        loader: What the user gave.
        num_samples: How many samples its dataset has to have, ``None`` for any number.

    Raises:
        TypeError: If it is no DataLoader that draws batches by index.
        ValueError: If its dataset has another number of samples.

    """
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        raise TypeError(
            f"ADELE: `loader` must be a DataLoader that draws batches by index, got {type(loader).__name__}."
        )
    found = len(loader.dataset) if isinstance(loader.dataset, Sized) else num_samples
    if num_samples is not None and found != num_samples:
        raise ValueError(
            f"ADELE: `loader` must be one of the training dataset with its {num_samples} samples, got {found}."
        )
