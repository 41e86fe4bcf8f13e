"""Prototypes of features under masks, masks from maps of attention, and scores of nearest prototypes."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Masks",
    "attention_masks",
    "best_caption",
    "build_prototypes",
    "cosine_scores",
    "kmeans_centres",
    "present_classes",
]

PrototypeKind = Literal["class", "instance", "part"]


def build_prototypes(
    features: Tensor,
    masks: Tensor,
    kinds: Sequence[PrototypeKind] = ("class", "instance", "part"),
    parts: int = 32,
    seed: int = 0,
) -> Tensor:
    """Means of the features under masks: of all images, of each image, of each of K parts.

    Args:
        features: Features of N images ``(N, h, w, D)``.
        masks: What counts, bool ``(N, H, W)``; brought to h x w, where a place counts that any of it touches.
        kinds: Which prototypes: ``"class"`` (one), ``"instance"`` (one for each image that has a place) and ``"part"``
            (centres of K-means over all places).
        parts: K; fewer where there are fewer places.
        seed: Of K-means.

    Returns:
        ``(P, D)`` in float32 at least, up to 1 + N + K of them; none where no place counts.

    Example:
        >>> build_prototypes(torch.tensor([[[[1.0, 0.0], [3.0, 0.0]]]]), torch.ones(1, 1, 2, dtype=torch.bool), parts=1)
        tensor([[2., 0.],
                [2., 0.],
                [2., 0.]])

    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    at = F.adaptive_max_pool2d(masks[:, None].to(wide), (wide.shape[1], wide.shape[2]))[:, 0] > 0
    places = wide[at]
    if not len(places):
        return places
    made: list[Tensor] = []
    if "class" in kinds:
        made.append(places.mean(0, keepdim=True))
    if "instance" in kinds:
        sizes = at.sum((1, 2))[:, None]
        made.append(((wide * at[..., None]).sum((1, 2)) / sizes.clamp(min=1))[sizes[:, 0] > 0])
    if "part" in kinds:
        made.append(kmeans_centres(places, parts, seed))
    return torch.cat(made)


def kmeans_centres(points: Tensor, count: int, seed: int = 0, rounds: int = 25, most: int = 50_000) -> Tensor:
    """Centres of K-means, begun at points drawn far from one another (k-means++).

    Args:
        points: ``(n, D)``.
        count: K; fewer where there are fewer points.
        seed: Of the draws.
        rounds: Of Lloyd's algorithm, at most.
        most: Of more points so many are drawn.

    Returns:
        ``(K, D)``.

    """
    generator = torch.Generator().manual_seed(seed)
    if len(points) > most:
        points = points[torch.randperm(len(points), generator=generator)[:most].to(points.device)]
    chosen = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    for _ in range(1, min(count, len(points))):
        apart = torch.cdist(points, chosen).amin(1).square().cpu()
        weights = apart if bool(apart.any()) else torch.ones_like(apart)
        chosen = torch.cat([chosen, points[torch.multinomial(weights, 1, generator=generator).to(points.device)]])
    for _ in range(rounds):
        nearest = torch.cdist(points, chosen).argmin(1)
        sizes = torch.bincount(nearest, minlength=len(chosen))[:, None]
        sums = torch.zeros_like(chosen).index_add(0, nearest, points)
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), chosen)
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen


def cosine_scores(features: Tensor, prototypes: Tensor, owner: Tensor, groups: int, fill: float = -1.0) -> Tensor:
    r"""The likeness of each place to the nearest prototype of each group, :math:`\max_k \cos(f, p_{c,k})`.

    Args:
        features: ``(B, h, w, D)``.
        prototypes: ``(P, D)``.
        owner: Group of each prototype ``(P,)``; or of each image ``(B, P)``.
        groups: C, how many there are.
        fill: Of a group without a prototype.

    Returns:
        ``(B, C, h, w)`` in float32 at least.

    Example:
        >>> one = torch.tensor([[[[1.0, 0.0]]]])
        >>> cosine_scores(one, torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1]), groups=3).flatten()
        tensor([ 0.,  1., -1.])

    """
    wide = torch.promote_types(features.dtype, torch.float32)
    unit, rows = F.normalize(features.to(wide), dim=-1), F.normalize(prototypes.to(wide), dim=-1)
    with torch.autocast(features.device.type, enabled=False):  # the nearest of many needs all digits
        cosines = torch.einsum("bhwd,pd->bphw", unit, rows)
    places = owner.expand(len(cosines), -1)[..., None, None].expand_as(cosines)
    empty = torch.full((len(cosines), groups, *cosines.shape[2:]), fill, dtype=wide, device=cosines.device)
    return empty.scatter_reduce(1, places, cosines, "amax", include_self=True)


class Masks(NamedTuple):
    """Which places are the object and which are around it.

    Attributes:
        foreground: bool ``(N, h, w)``.
        background: bool ``(N, h, w)``; places that are neither count for nothing.

    """

    foreground: Tensor
    background: Tensor


def attention_masks(
    maps: Tensor, high: float = 0.5, low: float = 0.2, proposals: Tensor | None = None, erosion: int = 1
) -> Masks:
    """Foreground and background from maps of attention to the word of a class.

    Each map is scaled to [0, 1]. Alone, what is above ``high`` is foreground, what is below ``low`` background. With
    proposals of regions, from any model that segments without classes, each is weighted by the mean of the map inside;
    a place belongs to the heaviest that holds it; the heaviest of all is the foreground, and the background is the
    lightest where the map is below ``low``, made smaller by a place on each side: on maps of few places that leaves
    none (of 8 x 8 in three of four images of ours), so write ``erosion=0`` there.

    Args:
        maps: ``(N, h, w)``.
        high: In [0, 1].
        low: In [0, 1].
        proposals: bool ``(N, J, h, w)``; images with fewer than two regions are treated as without.
        erosion: Places that the background of proposals loses on each side, at least 0.

    Returns:
        The masks.

    Raises:
        ValueError: If ``erosion`` is below 0.

    Example:
        >>> attention_masks(torch.tensor([[[0.0, 1.0, 4.0]]])).foreground.tolist()
        [[[False, False, True]]]

    """
    if not erosion >= 0:
        raise ValueError(f"attention_masks: `erosion` must be at least 0, got {erosion!r}.")
    least, most = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = (maps - least) / (most - least).clamp(min=torch.finfo(maps.dtype).tiny)
    alone = Masks(scaled > high, scaled < low)
    if proposals is None:
        return alone
    size = proposals.flatten(2).sum(2)
    weights = (proposals * scaled[:, None]).flatten(2).sum(2) / size.clamp(min=1)
    weights = weights.masked_fill(size == 0, -1.0)  # no region at all
    owner = torch.where(proposals, weights[..., None, None], -1.0).max(1)
    lightest = weights.masked_fill(size == 0, torch.inf).argmin(1)
    is_held = owner.values >= 0
    foreground = is_held & (owner.indices == weights.argmax(1)[:, None, None])
    around = is_held & (owner.indices == lightest[:, None, None]) & alone.background
    background = F.max_pool2d((~around).to(maps)[:, None], 2 * erosion + 1, 1, erosion)[:, 0] == 0
    has_two = ((size > 0).sum(1) >= 2)[:, None, None]
    return Masks(torch.where(has_two, foreground, alone.foreground), torch.where(has_two, background, alone.background))


def present_classes(
    images: Tensor, names: Tensor, at_most: int = 10, stuff: Sequence[int] = (), scale: float = 1.0
) -> Tensor:
    """Which classes an image may have, by embeddings of images and names (CLIP's): softmax of cosines at least 1 / C.

    Args:
        images: Embeddings of images ``(B, D)``.
        names: Embeddings of class names ``(C, D)``.
        at_most: Classes kept, the likeliest, besides stuff.
        stuff: Classes that are always kept.
        scale: Of the cosines in the softmax.

    Returns:
        bool ``(B, C)``.

    Example:
        >>> present_classes(torch.tensor([[1.0, 0.2]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[ True, False]])

    """
    cosines = F.normalize(images.float(), dim=1) @ F.normalize(names.float(), dim=1).T
    shares = (scale * cosines).softmax(1)
    place = shares.argsort(1, descending=True).argsort(1)
    kept = (shares >= 1 / len(names)) & (place < at_most)
    kept[:, list(stuff)] = True
    return kept


def best_caption(candidates: Sequence[int], score: Callable[[Sequence[int]], float]) -> list[int]:
    """The set of classes whose joint caption ("a cat and a boat") fits an image best, found one class at a time.

    Args:
        candidates: Classes.
        score: How well a set fits, by the caption that you write of it.

    Returns:
        The set, in the order of its choice: each class is the one that raises the score most, until none does.

    Example:
        >>> best_caption([3, 5, 7], lambda classes: -abs(sum(classes) - 12))
        [7, 5]

    """
    chosen: list[int] = []
    best = -float("inf")
    while len(chosen) < len(candidates):
        scores = {one: score([*chosen, one]) for one in candidates if one not in chosen}
        name = max(scores, key=lambda one: scores[one])
        if scores[name] <= best:
            break
        chosen, best = [*chosen, name], scores[name]
    return chosen
