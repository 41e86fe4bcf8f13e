"""PrototypeSegmenter: segments images by the nearest prototypes of classes, which nobody has labelled."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.diffusion.ovdiff.core import PrototypeKind, build_prototypes, cosine_scores
from lightning_reg.engine.host.arguments import check_choice, check_number

__all__ = ["PrototypeSegmenter"]

ABSENT = -2.0  # below every cosine


class PrototypeSegmenter(nn.Module):
    r"""Segments by prototypes of the foreground and the background of images that a diffusion model drew for each name.

    :meth:`fit` takes the drawn images and their masks (:func:`sample_support`, :func:`attention_masks`) and keeps
    prototypes of their features. A place of an image then belongs to the class of its nearest one,

    .. math:: S_c(p) = \max_k \cos(f(p), m_{c,k}), \qquad S_0(p) = \max_{c,k} \cos(f(p), b_{c,k})

    with scores averaged over the extractors and the windows. Prototypes of the background take the place of a
    threshold; one that is like the foreground of another class is left out (a boat's background is water), and classes
    that are stuff (sky, grass) have none. Leave it where the model cannot draw a class, or boundaries have to be sharp.

    The prototypes are in the ``state_dict``; the extractors' weights are not, and are not moved with it.

    Source:
        Karazija et al., "Diffusion Models for Open-Vocabulary Segmentation", ECCV 2024, arXiv 2306.09316; constants by
        their code (karazijal/sdov).

    Differs:
        No refinement of the borders (PAMR). K-means is ours, with a seed. Classes are filtered before, by
        :func:`present_classes` and :func:`best_caption`, which builds the set of classes one by one.

    Args:
        extractors: Each makes features ``(B, h, w, D)`` of images ``(B, C, H, W)``, see :class:`DenoiserFeatures`.
        kinds: Which prototypes, of ``"class"``, ``"instance"`` and ``"part"``. Paper: all.
        parts: K, centres of K-means for foreground and background of a class, at least 1. Code: 32.
        background_filter: Background prototypes with a larger cosine to other foregrounds are left out, in [-1, 1].
            Code: 0.85; 1: none is.
        filter_against: The foreground of which other classes: ``"all"`` or ``"stuff"``.
        window: Side of windows that are scored besides the whole image; ``None``: none. Code: 448 and 336.
        stride: Between windows. Code: 224.
        seed: Of K-means.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> segmenter = PrototypeSegmenter([lambda images: images.movedim(1, 3)], kinds=["class"])
        >>> image = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> segmenter.fit({"red": image}, {"red": image[:, 0] > 0}, {"red": image[:, 1] > 0})
        >>> segmenter.names, segmenter.predict(image).tolist()
        (['red'], [[[1, 0]]])

    """

    def __init__(
        self,
        extractors: Sequence[Callable[[Tensor], Tensor]],
        kinds: Sequence[PrototypeKind] = ("class", "instance", "part"),
        parts: int = 32,
        background_filter: float = 0.85,
        filter_against: Literal["all", "stuff"] = "all",
        window: int | None = None,
        stride: int = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not extractors or not all(callable(one) for one in extractors):
            raise ValueError(
                f"PrototypeSegmenter: `extractors` must be at least one function of images, got {extractors!r:.80}."
            )
        if not kinds:
            raise ValueError("PrototypeSegmenter: `kinds` must have at least one kind, got none.")
        for kind in kinds:
            check_choice(self, "kinds", kind, ("class", "instance", "part"))
        check_number(self, "parts", parts, low=1, integer=True)
        check_number(self, "background_filter", background_filter, low=-1, high=1)
        check_choice(self, "filter_against", filter_against, ("all", "stuff"))
        check_number(self, "window", window, low=1, integer=True, optional=True)
        check_number(self, "stride", stride, low=1, integer=True)
        self.kinds, self.parts, self.background_filter = list(kinds), parts, background_filter
        self.filter_against, self.window, self.stride, self.seed = filter_against, window, stride, seed
        self.names: list[str] = []
        self.stuff: list[str] = []
        self._extractors = tuple(extractors)  # no submodules, so no keys of a state_dict
        for number in range(len(extractors)):
            self._keep(number, torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))

    @property
    def extractors(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """What makes features of images."""
        return self._extractors

    def _keep(self, number: int, prototypes: Tensor, classes: Tensor, groups: Tensor) -> None:
        """Of an extractor: prototypes, the class each comes from, and what it stands for (0: the background)."""
        for name, value in (("prototypes", prototypes), ("classes", classes), ("groups", groups)):
            self.register_buffer(f"{name}_{number}", value, persistent=False)

    def _kept(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        one, two, three = (getattr(self, f"{name}_{number}") for name in ("prototypes", "classes", "groups"))
        return one, two, three

    @torch.no_grad()
    def fit(
        self,
        support: Mapping[str, Tensor],
        foreground: Mapping[str, Tensor],
        background: Mapping[str, Tensor],
        stuff: Collection[str] = (),
    ) -> None:
        """Makes the prototypes; the names of ``support`` are classes 1, 2, ... in their order.

        Args:
            support: Images of each class ``(N, C, H, W)``.
            foreground: Where the class is, bool ``(N, h, w)``.
            background: What is around it, bool ``(N, h, w)``; not asked for of stuff.
            stuff: Classes that are stuff.

        Raises:
            ValueError: If a class has no mask or no place of a foreground, or ``stuff`` is not among them.

        """
        self.names, self.stuff = list(support), sorted(stuff)
        missing = [name for name in support if name not in foreground or (name not in stuff and name not in background)]
        unknown = sorted(set(stuff) - set(support))
        if not support or missing or unknown:
            raise ValueError(
                "PrototypeSegmenter: `support` must have a class, and `foreground` and `background` a mask for each,"
                f" got none for {missing}; `stuff` must be classes, got {unknown}."
            )
        for number, extract in enumerate(self._extractors):
            front: list[Tensor] = []
            back: list[Tensor] = []
            for name, images in support.items():
                features = extract(images)
                front.append(build_prototypes(features, foreground[name], self.kinds, self.parts, self.seed))
                if not len(front[-1]):
                    raise ValueError(
                        f"PrototypeSegmenter: `foreground` must have a place of each class, got none of {name!r} in all"
                        f" {len(images)} images: nothing would ever be taken for it. Draw others, or leave it out."
                    )
                mask = torch.zeros_like(foreground[name]) if name in stuff else background[name]
                back.append(build_prototypes(features, mask, self.kinds, self.parts, self.seed))
            back = [self._filtered(rows, place, front) for place, rows in enumerate(back)]
            sizes = torch.tensor([len(rows) for rows in (*front, *back)])
            places = torch.arange(len(self.names))
            classes = torch.cat([places, places]).repeat_interleave(sizes)
            groups = torch.cat([places + 1, 0 * places]).repeat_interleave(sizes)
            rows = torch.cat([*front, *back])
            self._keep(number, F.normalize(rows, dim=1), classes.to(rows.device), groups.to(rows.device))

    def _filtered(self, rows: Tensor, place: int, front: list[Tensor]) -> Tensor:
        """Background prototypes of a class without those that are like the foreground of others."""
        others = [
            other
            for number, other in enumerate(front)
            if number != place and (self.filter_against == "all" or self.names[number] in self.stuff)
        ]
        if not others or not len(rows) or self.background_filter == 1:  # a cosine may be rounded to above 1
            return rows
        cosines = F.normalize(rows, dim=1) @ F.normalize(torch.cat(others), dim=1).T
        return rows[cosines.amax(1) <= self.background_filter] if cosines.shape[1] else rows

    @override
    def forward(self, images: Tensor, present: Tensor | None = None) -> Tensor:
        """Scores of images ``(B, C, H, W)``.

        Args:
            images: The images.
            present: Which classes an image may have, bool ``(B, C)``; ``None``: all.

        Returns:
            Of the background and of each class ``(B, 1 + C, H, W)``; classes that are not present have -2.

        """
        size = images.shape[2:]
        total = self._scores(images, present, size)
        if self.window is None:
            return total
        count = torch.ones(size, device=images.device)
        for top in _starts(size[0], self.window, self.stride):
            for left in _starts(size[1], self.window, self.stride):
                part = images[:, :, top : top + self.window, left : left + self.window]
                around = (left, size[1] - left - part.shape[3], top, size[0] - top - part.shape[2])
                total = total + F.pad(self._scores(part, present, part.shape[2:]), around)
                count = count + F.pad(torch.ones(part.shape[2:], device=images.device), around)
        return total / count

    def _scores(self, images: Tensor, present: Tensor | None, size: Sequence[int]) -> Tensor:
        groups = len(self.names) + 1
        found: list[Tensor] = []
        for number, extract in enumerate(self._extractors):
            prototypes, classes, owner = self._kept(number)
            if present is not None:  # those of absent classes stand for a group that is cut off
                owner = torch.where(present[:, classes], owner, groups)
            scores = cosine_scores(extract(images), prototypes, owner, groups + 1)[:, :groups]
            found.append(F.interpolate(scores, tuple(size), mode="bilinear"))
        mean = torch.stack(found).mean(0)
        if present is None:
            return mean
        absent = F.pad(~present, (1, 0))[..., None, None]
        return mean.masked_fill(absent, ABSENT)

    @torch.no_grad()
    def predict(self, images: Tensor, present: Tensor | None = None) -> Tensor:
        """The class of each place ``(B, H, W)``: 0 the background, 1, 2, ... the names in their order."""
        if not self.names:
            raise ValueError("PrototypeSegmenter: there are no prototypes. Call `fit` or load a `state_dict` first.")
        scores: Tensor = self(images, present)
        return scores.argmax(1)

    @override
    def get_extra_state(self) -> dict[str, Any]:
        """The names and prototypes, of which a loaded one may have another number."""
        kept = [tuple(value.cpu() for value in self._kept(number)) for number in range(len(self._extractors))]
        return {"names": self.names, "stuff": self.stuff, "kept": kept}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes them."""
        self.names, self.stuff = list(state["names"]), list(state["stuff"])
        for number, values in enumerate(state["kept"]):
            device = self._kept(number)[0].device
            self._keep(number, *(value.to(device) for value in values))


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start; the last one ends at the end."""
    last = max(length - window, 0)
    return sorted({*range(0, last, stride), last})
