"""Images that a diffusion model draws of a class, with maps of attention to its word; and its features of images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.diffusion._attention import AttentionMaps, check_tokens
from lightning_reg.diffusion._service import Condition, Denoiser, can_join, spread
from lightning_reg.engine.host.names import Patterns, is_selected, near_names, unmatched
from lightning_reg.engine.host.procedures import left_as_found, procedure
from lightning_reg.engine.host.row_bits import normals

__all__ = ["DenoiserFeatures", "Support", "sample_support"]


class Support(NamedTuple):
    """Images of a class.

    Args:
        images: ``(N, C, H, W)``.
        maps: Attention to the word of the class, ``(N, H, W)``: means of layers, heads and steps.

    """

    images: Tensor
    maps: Tensor


@procedure
def sample_support(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    null: Condition,
    tokens: Tensor,
    guidance: float = 8.0,
    steps: int = 30,
    layers: Patterns = None,
) -> Support:
    """Samples images of a class, and sums its word's maps of attention as they come.

    Maps alone make poor masks. On a digits model of ours what is above their half covers half of an image of which a
    third is drawn, so the parts of the foreground look like background, and the filter takes the background's own
    prototypes away: 18 of 46 points of the index, 25 without the filter. Maps of 4 x 4 places are not the cause, as
    drawn masks of so many reach 43. With proposals of regions the foreground overlaps by 89 %, and with a background
    that is not eroded (``erosion=0`` of :func:`attention_masks`) 34 points are reached, 21 with one that is
    (``benchmarks/effects/ovdiff.py``).

    Source:
        Karazija et al., "Diffusion Models for Open-Vocabulary Segmentation", ECCV 2024, arXiv 2306.09316, section 3.1.

    Differs:
        Steps are those of DDIM (of Euler for flows). The prompt is the user's ("A good picture of a boat").

    Args:
        module: The denoiser, a UNet or transformer of diffusers with attention to its prompt.
        noise: Where samples start, ``(N, C, H, W)``. Code: 32 of a class.
        condition: The prompt, a row for each or one.
        null: What stands for no condition, or a negative prompt; a row for each or one.
        tokens: Which tokens of the prompt are the class's word, bool ``(N, L)`` or ``(1, L)``.
        guidance: Scale. Code: 8.
        steps: Of the sampler, at least 1. Code: 30.
        layers: Patterns of the layers that are read; ``None``: all with attention to the prompt.

    Returns:
        Images and maps.

    Raises:
        ValueError: If ``steps`` is below 1, ``tokens`` chooses none, or the model has no attention to a prompt.

    Example:
        >>> Support(torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8)).maps.shape
        torch.Size([2, 8, 8])

    """
    if not steps >= 1:
        raise ValueError(f"sample_support: `steps` must be at least 1, got {steps!r}.")
    check_tokens("sample_support", "tokens", tokens)
    module.eval()
    count, (height, width) = len(noise), noise.shape[-2:]
    condition, null = spread(condition, count), spread(null, count)
    if guidance != 1 and not can_join(condition, null):
        raise ValueError(
            "sample_support: `null` must have the shape of `condition`, so that both are one pass. Pad the prompts to"
            " one length."
        )
    # Conditional rows come first in a pass of both.
    with torch.no_grad(), AttentionMaps(module, layers, rows=slice(count)) as maps:
        images = module.sample(noise, condition, null, guidance, steps)
        grid = maps.grid(height, width)
    chosen = tokens.to(grid.device).expand(count, -1)[..., None, None]
    return Support(images, (grid * chosen).sum(1))


class DenoiserFeatures:
    """Features of images inside a denoiser, for :class:`PrototypeSegmenter`: outputs of its layers at a level of noise.

    Every image gets the same noise, drawn from the seed for its size, so that features are the same at each call. The
    outputs are brought to the size of the largest and joined.

    Source:
        Karazija et al., "Diffusion Models for Open-Vocabulary Segmentation", ECCV 2024, arXiv 2306.09316, section 3.2.

    Differs:
        Any layers, by name; the mean of several draws.

    Args:
        denoiser: The denoiser.
        layers: Patterns of names of layers of its model.
        time: The level of noise. Code: 200 of 1000, in [20, 400].
        condition: One row, an empty prompt; ``None``: none.
        draws: How many draws of noise are averaged, at least 1.
        seed: Of the noise.

    Raises:
        ValueError: If a pattern matches nothing, or an argument is outside its range.

    Example:
        >>> from lightning_reg import NoiseSchedule
        >>> denoiser = Denoiser(nn.Sequential(), NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
        >>> DenoiserFeatures(denoiser, "mid*")
        Traceback (most recent call last):
        ValueError: DenoiserFeatures: `layers` must match names of layers, got 'mid*'. Near it: none at all.

    """

    def __init__(
        self,
        denoiser: Denoiser,
        layers: Patterns,
        time: int = 200,
        condition: Condition = None,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        network = denoiser.model if isinstance(denoiser.model, nn.Module) else nn.Module()
        found = {name: layer for name, layer in network.named_modules() if name}
        for pattern in unmatched(layers, found):
            near = near_names(pattern, found)
            raise ValueError(
                f"DenoiserFeatures: `layers` must match names of layers, got {pattern!r}. Near it: {near}."
            )
        if not draws >= 1:
            raise ValueError(f"DenoiserFeatures: `draws` must be at least 1, got {draws!r}.")
        self.denoiser, self.time, self.condition, self.draws, self.seed = denoiser, time, condition, draws, seed
        self.layers = [name for name in found if is_selected(name, layers)]

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, h, w, D)`` of images ``(B, C, H, W)``, in float32."""
        with left_as_found(self.denoiser), torch.no_grad():
            self.denoiser.eval()
            return torch.stack([self._drawn(images, draw) for draw in range(self.draws)]).mean(0)

    def _drawn(self, images: Tensor, draw: int) -> Tensor:
        kept: list[Tensor] = []
        times = torch.tensor(self.time, device=images.device)
        noise = normals(self.seed, torch.tensor([draw], device=images.device), images.shape[1:])
        noisy = self.denoiser.noised(images, noise.expand_as(images), times.expand(len(images)))
        found = dict(self.denoiser.named_modules())
        hooks = [found[f"model.{name}"].register_forward_hook(_keeper(kept)) for name in self.layers]
        try:
            self.denoiser.predict(noisy, times, self.condition)
        finally:
            for hook in hooks:
                hook.remove()
        if not kept:
            raise ValueError(
                f"DenoiserFeatures: `layers` must be layers that make tensors, got {self.layers}, which were not called"
                " or made none: a list of layers is called by none. Write the names of those in it, or `name.[0-9]`."
            )
        return _joined(kept, images.shape[-2:])


def _keeper(kept: list[Tensor]) -> Callable[[nn.Module, object, object], None]:
    def hook(layer: nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            kept.append(first.detach().float())

    return hook


def _joined(outputs: list[Tensor], size: torch.Size) -> Tensor:
    """Outputs of layers at the size of the largest, ``(B, h, w, D)``; tokens are brought to the image's shape."""
    shapeless = next((one for one in outputs if one.dim() not in (3, 4)), None)
    if shapeless is not None:
        raise ValueError(
            "DenoiserFeatures: `layers` must be layers whose output has places, (B, D, h, w) or (B, N, D), got one of"
            f" {tuple(shapeless.shape)}. Write patterns that match whole blocks, such as 'up_blocks.[0-9]'."
        )
    grids = [one if one.dim() == 4 else _as_grid(one, size) for one in outputs]
    height, width = max(one.shape[2] for one in grids), max(one.shape[3] for one in grids)
    wide = [F.interpolate(one, (height, width), mode="bilinear") for one in grids]
    return torch.cat(wide, 1).movedim(1, 3)


def _as_grid(tokens: Tensor, size: torch.Size) -> Tensor:
    rows = round((tokens.shape[1] * size[0] / size[1]) ** 0.5)
    return tokens.mT.reshape(len(tokens), tokens.shape[2], rows, -1)
