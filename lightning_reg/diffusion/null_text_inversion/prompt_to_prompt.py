"""Procedure: an inverted sample is edited by its prompt, with the attention of the source kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.diffusion._attention import AttentionMaps, AttentionPlace, check_tokens
from lightning_reg.diffusion._service import Condition, Denoiser, spread
from lightning_reg.diffusion.null_text_inversion.core import TokenMap, blend_mask, edited_maps
from lightning_reg.diffusion.null_text_inversion.null_text_inversion import NullTextInversion
from lightning_reg.diffusion.null_text_inversion.null_text_invert import check_finished, device_of, sampled_step
from lightning_reg.engine.host.procedures import procedure

__all__ = ["EditedSamples", "LocalBlend", "prompt_to_prompt"]


class EditedSamples(NamedTuple):
    """An edit.

    Args:
        samples: The edited ones ``(B, ...)``.
        source: The reconstruction, ``(B, ...)``.

    """

    samples: Tensor
    source: Tensor


class LocalBlend(NamedTuple):
    """Where an edit may change the sample: at places that attend to some words.

    Args:
        source: Words of the source prompt, bool ``(B, L)``.
        edited: Words of the edited one, bool ``(B, M)``.
        threshold: Share of the strongest attention, in (0, 1). Reference: 0.3.
        start: Share of the steps before blending, in [0, 1). Reference: 0.2.

    """

    source: Tensor
    edited: Tensor
    threshold: float = 0.3
    start: float = 0.2


@procedure
def prompt_to_prompt(
    module: Denoiser,
    inversion: NullTextInversion,
    condition: Condition,
    edited: Condition,
    tokens: TokenMap | None = None,
    token_weights: Tensor | None = None,
    cross_replace: float = 0.8,
    self_replace: float = 0.4,
    blend: LocalBlend | None = None,
    size_limit: int = 1024,
) -> EditedSamples:
    """Samples the reconstruction and, beside it, an edit that keeps its layout, by the source's maps of attention.

    At the first steps words of the edited prompt look where the source's did, and places of the image look at the same
    places. With the same prompt the edit is the reconstruction, to the last bit.

    Source:
        Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", ICLR 2023, arXiv 2208.01626; on
        inverted images: Mokady et al., arXiv 2211.09794, section 4.

    Differs:
        A word in the place of several takes the first one's map. Joint attention of transformers is edited in the
        blocks from the image to the prompt and to itself; their code knows UNets alone.

    Args:
        module: The denoiser, a UNet or transformer of diffusers with attention to its prompt.
        inversion: Of the samples, finished.
        condition: Their prompts, as they were inverted.
        edited: The edited prompts, a row for each.
        tokens: Which words take whose maps, see :func:`align_tokens`; ``None``: each that of the word in its place,
            for prompts of one length.
        token_weights: What attention to each edited word is multiplied by, ``(B, M)`` or ``(1, M)``; ``None``: 1.
        cross_replace: Share of the steps with the source's attention to words, in [0, 1]. Reference: 0.8.
        self_replace: Share of the steps with the source's attention among places, in [0, 1]. Reference: 0.4.
        blend: Where the edit may differ from the source; ``None``: everywhere.
        size_limit: Layers where more places attend to one another keep their own maps. Reference: 32 x 32.

    Returns:
        The edit and the reconstruction.

    Raises:
        ValueError: If an argument is outside its range, the model has no attention, or prompts of different lengths
            come without ``tokens``.

    Example:
        >>> from lightning_reg.functional import align_tokens
        >>> align_tokens(torch.tensor([[1, 5, 6]]), torch.tensor([[1, 5, 7]])).source.tolist()
        [[0, 1, 2]]

    """
    check_finished("prompt_to_prompt", inversion)
    for name, value in (("cross_replace", cross_replace), ("self_replace", self_replace)):
        if not 0 <= value <= 1:
            raise ValueError(f"prompt_to_prompt: `{name}` must be in [0, 1], got {value!r}.")
    if blend is not None and not (0 < blend.threshold < 1 and 0 <= blend.start < 1 and inversion.noise.dim() == 4):
        raise ValueError(
            "prompt_to_prompt: `blend` must have a threshold in (0, 1) and a start in [0, 1), for samples (B, C, H, W),"
            f" got {blend.threshold!r}, {blend.start!r} and {tuple(inversion.noise.shape)}."
        )
    if blend is not None:
        check_tokens("prompt_to_prompt", "blend", blend.source, blend.edited)
    module.eval()
    condition, edited = (spread(one, len(inversion.noise)) for one in (condition, edited))
    editor = _Editor(module, inversion, tokens, token_weights, blend, size_limit)
    editor.shares = cross_replace, self_replace
    source = sample = inversion.noise.to(device_of(condition, module))
    path = module.path(inversion.steps, joined=True)
    with torch.no_grad():
        for number in range(inversion.steps):
            # Both are passes of the same shape as in `null_text_sample`: equal inputs give equal bits.
            watch = editor.watching(number, is_source=True)
            source = sampled_step(module, source, path, number, condition, inversion, watch)
            watch = editor.watching(number, is_source=False)
            sample = editor.blended(
                number, sampled_step(module, sample, path, number, edited, inversion, watch), source
            )
    return EditedSamples(sample, source)


class _Editor:
    """Keeps the maps of the source's pass, and puts them into the edited one's; one step's maps at a time."""

    shares: tuple[float, float] = 1.0, 1.0

    def __init__(
        self,
        module: Denoiser,
        inversion: NullTextInversion,
        tokens: TokenMap | None,
        token_weights: Tensor | None,
        blend: LocalBlend | None,
        size_limit: int,
    ) -> None:
        self.module, self.count, self.steps = module, len(inversion.noise), inversion.steps
        self.tokens, self.token_weights, self.blend, self.size_limit = tokens, token_weights, blend, size_limit
        self.size = tuple(inversion.noise.shape[-2:])
        self.kept: dict[str, tuple[Tensor, AttentionPlace]] = {}
        self.totals: dict[bool, Tensor] = {}
        self.has_words = False
        self.maps()  # refuses a model without attention before the first step

    def maps(self) -> AttentionMaps:
        keep = self.blend is not None
        return AttentionMaps(
            self.module, rows=slice(self.count), size_limit=self.size_limit, replace=self.replaced, keep=keep
        )

    @contextmanager
    def watching(self, number: int, *, is_source: bool) -> Iterator[None]:
        """Around the pass of a step."""
        self.cross, self.own = (number < share * self.steps for share in self.shares)
        self.is_source = is_source
        if not (self.cross or self.own or self.blend or self.token_weights is not None):
            yield
            return
        with self.maps() as maps:
            yield
            if not self.has_words:
                raise ValueError(
                    "prompt_to_prompt: no cross-attention was seen: the model takes no prompt whose tokens could be"
                    " edited (write `null_text_sample(denoiser, inversion, edited)`), or has joint attention of more"
                    f" places than `size_limit`={self.size_limit} (write a larger one)."
                )
            if self.blend is not None:
                grid = maps.grid(*self.size)
                self.totals[is_source] = self.totals[is_source] + grid if is_source in self.totals else grid

    def replaced(self, weights: Tensor, place: AttentionPlace) -> Tensor:
        """The maps of a layer, those of the edited rows with the source's."""
        has_words, has_pixels = place.words.stop > 0, place.pixels.stop > 0
        self.has_words |= has_words
        is_wanted = (has_words and self.cross) or (has_pixels and self.own)
        if self.is_source:
            if is_wanted:
                self.kept[place.layer] = weights[: self.count], place
            return weights
        if not is_wanted and (not has_words or self.token_weights is None):
            return weights
        changed, queries = weights.clone(), place.queries
        rows = changed[: self.count]
        before, there = self.kept.pop(place.layer, (rows, place))
        if has_words and self.cross:
            own, source = rows[:, :, queries, place.words], before[:, :, there.queries, there.words]
            if self.tokens is None and own.shape != source.shape:
                raise ValueError(
                    "prompt_to_prompt: `tokens` must be given where prompts have different lengths, got"
                    f" {source.shape[3]} and {own.shape[3]}. Write `tokens=align_tokens(source_ids, edited_ids)`."
                )
            rows[:, :, queries, place.words] = edited_maps(own, source, self.tokens)
        if has_pixels and self.own:
            rows[:, :, queries, place.pixels] = before[:, :, there.queries, there.pixels]
        if has_words and self.token_weights is not None:
            rows[:, :, queries, place.words] *= self.token_weights[:, None, None].to(rows)
        return changed

    def blended(self, number: int, sample: Tensor, source: Tensor) -> Tensor:
        """The edited samples, with the source's in their place where neither prompt's words are attended to."""
        blend = self.blend
        if blend is None or number < blend.start * self.steps:
            return sample
        masks = [
            blend_mask(self.totals[is_source], words, blend.threshold)
            for is_source, words in ((True, blend.source), (False, blend.edited))
        ]
        return torch.where(masks[0] | masks[1], sample, source)
