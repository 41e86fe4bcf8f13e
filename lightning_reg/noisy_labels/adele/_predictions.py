"""What the network predicts for whole training images, at several scales, in one pass beside the fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.named_weights import weights_of
from lightning_reg.engine.networks.peer import Peer
from lightning_reg.engine.networks.records import check_fetched_twice, steps_in_order
from lightning_reg.noisy_labels._scales import resized, scaled_size
from lightning_reg.noisy_labels.adele._settings import Settings
from lightning_reg.noisy_labels.adele.label_store import LabelStore

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step


__all__ = ["MOVING", "check_samples_stay", "masks_of", "predictions", "scores_of", "seen"]

MOVING = (
    "ADELE replaces pixels of masks, and a batch that was fetched twice was another one the second time: images are"
    " cropped, flipped or otherwise changed at random, so the pixels of a corrected mask would lie elsewhere. Give"
    " the loader whole images without random transforms, and do these behind it: `LabelStore(whole_images,"
    " num_classes=..., transform=...)` as the dataset hands out corrected masks before its `transform`; or in"
    " `training_step` (with image and mask together), in train mode only."
)


def check_samples_stay(trainer: "Trainer", owner: Settings, store: LabelStore | None = None) -> None:
    """Refuses samples that are another time others than they were: corrected pixels would lie elsewhere."""
    with _steps(trainer, owner, store, lambda one, two: check_fetched_twice(one, two, MOVING)):
        pass


def _steps(
    trainer: "Trainer",
    owner: Settings,
    store: LabelStore | None,
    check_same: "Callable[[Step, Step], None] | None" = None,
) -> "AbstractContextManager[Iterator[tuple[Step, Sequence[int]]]]":
    """Whole images: those behind the store, if there is one."""
    if store is None:
        return steps_in_order(trainer, owner, "train", check_same)
    return steps_in_order(trainer, owner, "train", check_same, store.dataset, one_by_one=store.size is not None)


@contextmanager
def predictions(
    trainer: "Trainer", owner: Settings, store: LabelStore | None = None
) -> Iterator[Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """Goes once over the training data in eval mode.

    Yields:
        Of each batch the indices ``(B,)`` on the CPU, the masks as given, and probabilities ``(B, C, H, W)`` float32.

    """
    module = trainer.lightning_module
    peer = Peer(module, layers=[owner.layer] if owner.layer else [], owner=owner)
    peer.share_memory_with(module)
    weights = weights_of(module)
    with _steps(trainer, owner, store) as steps:
        yield ((torch.tensor(indices), *seen(step, owner, peer, weights)) for step, indices in steps)


@torch.no_grad()
def seen(
    step: "Step", owner: Settings, peer: Peer, weights: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The masks of a batch, and the softmax of the mean of its scores at all scales, flipped as well."""
    batch, masks = step.batch, masks_of(step.batch, owner)
    images = find_entry(batch, owner.input_key, "ADELE: input_key")
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise MisconfigurationException(
            f"ADELE resizes images (B, C, H, W), and the entry {owner.input_key!r} of the batch is"
            f" {tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}. Name the images:"
            " `ADELE(input_key=...)`."
        )
    found = []
    for scale in owner.scales:
        size = tuple(images.shape[-2:]) if scale == 1 else scaled_size(images.shape[-2:], scale, owner.multiple_of)
        for flipped in (False, True) if owner.flip else (False,):
            step.batch = _changed(batch, owner, size, flipped=flipped)
            sight = peer.see(step, None if owner.layer else owner, weights=weights)
            scores = resized(scores_of(owner, sight.call, sight.features, size).float(), masks.shape[-2:])
            found.append(scores.flip(-1) if flipped else scores)
    step.batch = batch
    return masks, (torch.stack(found).mean(0) / owner.temperature).softmax(1)


def _changed(batch: Any, owner: Settings, size: tuple[int, ...], *, flipped: bool) -> Any:
    for key, argument in ((owner.input_key, "input_key"), (owner.target_key, "target_key")):
        entry = resized(find_entry(batch, key, f"ADELE: {argument}"), size)
        batch = replace_entry(batch, key, entry.flip(-1) if flipped else entry)
    return batch


def masks_of(batch: Any, owner: Settings) -> Tensor:
    """The masks of a batch, ``(B, H, W)`` of whole numbers; refuses others."""
    masks = find_entry(batch, owner.target_key, "ADELE: target_key")
    if not isinstance(masks, Tensor) or masks.dim() != 3 or masks.is_floating_point() or masks.dtype == torch.bool:
        found = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise MisconfigurationException(
            f"ADELE corrects masks with one class for each pixel, whole numbers (B, H, W), and the entry"
            f" {owner.target_key!r} of the batch is {found}. Name the masks: `ADELE(target_key=...)`; several classes"
            " for one pixel (a mask for each class) cannot be corrected."
        )
    return masks


def scores_of(
    owner: Settings, call: "LossCall | None", features: Mapping[str, Any], size: tuple[int, ...] | None = None
) -> Tensor:
    """The class scores ``(B, C, H, W)`` of a step: of the named layer, else of the loss call."""
    scores = features.get(owner.layer) if owner.layer else None if call is None else call.input
    if scores is None or not isinstance(scores, Tensor) or scores.dim() != 4:
        found = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else "none"
        where = f"from the layer {owner.layer!r}" if owner.layer else "in the loss call"
        raise MisconfigurationException(
            f"ADELE needs class scores (B, C, H, W), and found {found} {where}. Where the loss is no function of"
            " torch.nn.functional (Dice), or pixels are flattened for it, name the layer that puts the scores out:"
            ' `ADELE(layer="net.head")`.'
        )
    return scores if size is None else scores.detach()
