"""A dataset that hands out corrected masks before images and masks are cropped, flipped or scaled."""

from collections.abc import Callable, Sequence, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.data.shared_maps import SharedMapMemory
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = ["LabelStore"]


class _Samples(Protocol):
    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401 # samples of any kind

    def __len__(self) -> int: ...


class LabelStore(Dataset[Any]):
    """Masks that a technique has corrected take the place of those given, before random crops, flips and scales.

    Pixels of a corrected mask belong to the whole image. So the dataset gives whole images with their masks, the mask
    is replaced, and ``transform`` moves both together. ADELE finds the store as the dataset of its training loader,
    writes corrections into it, and predicts whole images of ``dataset``, without ``transform``::

        train = LabelStore(whole_images, num_classes=21, transform=crop_and_flip, size=(500, 500))
        Trainer(callbacks=[ADELE()]).fit(model, DataLoader(train, batch_size=16, shuffle=True, num_workers=8))

    Workers read what is written, persistent ones too. Checkpoints of the technique have the corrections in them. Pixels
    whose label is no class (255, -100) stay as they are.

    Memory: H x W bytes for a mask that was corrected, less with few classes, in a mapped temporary file which all
    workers share; 25 bytes for any other.

    Args:
        dataset: Samples by index, the same each time: image and mask, and what else there is.
        num_classes: Number of classes C, from 2 to 256; labels 0 to C - 1 can be corrected.
        transform: Takes a sample as the dataset gives it, with the mask to be trained on, and returns what the loader
            shall get; ``None`` for the sample itself.
        target_key: Entry of a sample with the mask, ``(H, W)`` whole numbers, a tensor or an array of NumPy (leading
            dimensions of size 1 are allowed): keys and positions, separated by dots.
        size: Largest height and width of a mask, where images are of different sizes: whole images are then predicted
            one by one. ``None``: all are as large as the first.

    Raises:
        ValueError: If an argument is outside its range.
        MisconfigurationException: If the mask of a sample is no tensor or array of whole numbers.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> whole = TensorDataset(torch.rand(10, 3, 32, 32), torch.zeros(10, 32, 32, dtype=torch.long))
        >>> store = LabelStore(whole, num_classes=2, transform=lambda sample: [entry[..., :16] for entry in sample])
        >>> store[0][1].shape
        torch.Size([32, 16])

    """

    def __init__(
        self,
        dataset: _Samples,
        num_classes: int,
        transform: Callable[[Any], Any] | None = None,
        target_key: str = "1",
        size: Sequence[int] | None = None,
    ) -> None:
        check_number(self, "num_classes", num_classes, low=2, high=256, integer=True)
        given: object = dataset
        if not isinstance(given, Sized) or not len(given):
            raise ValueError(f"LabelStore: `dataset` must have a length above 0, got {type(dataset).__name__}.")
        if size is not None and len(size) != 2:
            raise ValueError(f"LabelStore: `size` must be a height and a width, got {size!r}.")
        for number in size or ():
            check_number(self, "size", number, low=1, integer=True)
        self.dataset, self.num_classes, self.transform = dataset, num_classes, transform
        self.target_key, self.size = target_key, size
        height, width = self._mask(dataset[0])[1].shape if size is None else size
        self._maps = SharedMapMemory(len(dataset), num_classes, height * width)

    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        corrected = self._maps.map_of(index)
        if corrected is not None:
            mask, view = self._mask(sample)
            if view.shape != corrected.shape:
                raise MisconfigurationException(
                    f"LabelStore: the mask of sample {index} was {tuple(corrected.shape)} and is {tuple(view.shape)}"
                    " now. Its dataset must give the same sample each time; what is random belongs into `transform`."
                )
            inside = (view >= 0) & (view < self.num_classes)
            view.copy_(torch.where(inside, corrected.to(view.dtype), view))
            sample = replace_entry(sample, self.target_key, mask)
        return sample if self.transform is None else self.transform(sample)

    def maps(self) -> SharedMapMemory:
        """The corrected masks by index, to be written by the technique; in a file of this process."""
        if not self._maps.is_ours:  # several ranks that were started with one store
            self._maps = SharedMapMemory(self._maps.num_samples, self.num_classes, self._maps.pixels)
        return self._maps

    def _mask(self, sample: Any) -> tuple[Any, Tensor]:  # noqa: ANN401 # samples of any kind
        """A copy of a sample's mask, and its numbers ``(H, W)`` in the same memory."""
        mask = find_entry(sample, self.target_key, "LabelStore: target_key")
        copied = mask.clone() if isinstance(mask, Tensor) else mask.copy() if isinstance(mask, np.ndarray) else None
        view = copied if copied is None or isinstance(copied, Tensor) else torch.from_numpy(copied)
        if view is None or view.dim() < 2 or view[..., 0, 0].numel() != 1 or view.is_floating_point():
            found = type(mask).__name__ if view is None else f"{view.dtype} {tuple(view.shape)}"
            raise MisconfigurationException(
                f"LabelStore keeps masks (H, W) of whole numbers, and the entry {self.target_key!r} of a sample is"
                f" {found}. Name the mask: `LabelStore(target_key=...)`, and let the dataset make a tensor or an array"
                " of NumPy of it."
            )
        plain = view.as_subclass(Tensor) if type(view) is not Tensor else view
        return copied, plain.view(plain.shape[-2:])
