"""Attention of a denoiser, seen and replaced: maps of its layers, through the attention processors of diffusers."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self, override

from lightning_reg.diffusion._service import Denoiser
from lightning_reg.engine.host.arguments import check_choice
from lightning_reg.engine.host.names import Patterns, is_selected, near_names, unmatched

__all__ = ["AttentionMaps", "AttentionPlace"]


@dataclass(frozen=True)
class AttentionPlace:
    """Where a map of attention stands.

    Args:
        layer: Name of the layer.
        queries: Which of its queries are places of the image.
        pixels: Which of its keys are places of the image; empty in cross-attention.
        words: Which of its keys are tokens of the prompt; empty in self-attention.

    """

    layer: str
    queries: slice
    pixels: slice
    words: slice

    def keys(self, kind: str) -> slice:
        """Which keys a kind of map has."""
        return self.words if kind == "cross" else self.pixels


Replace: TypeAlias = Callable[[Tensor, AttentionPlace], Tensor]


class AttentionMaps:
    r"""Sees the maps of attention inside a ``with``, and replaces them if asked to.

    .. math:: M = \operatorname{softmax}(Q K^T / \sqrt d + \text{mask}), \qquad
        \text{out} = \operatorname{attention}(Q, K, V) + (M' - M) V

    The model's own processors run, whatever they are (norms, rotary positions, fused projections, joint attention), and
    their calls of attention are seen; maps are computed beside them in float32. Without a replacement the output is
    theirs to the last bit, and likewise where the replacement M' is M. On leaving, after an exception as well, the
    processors and their attention backends are put back and the maps are cleared: read them inside.

    Maps are ``"cross"``, from places of the image to tokens of the prompt, or ``"self"``, to places of the image.
    Layers of joint attention have both, as blocks of one map whose rows sum to 1 over both. Where text and image were
    joined before the layer (single-stream blocks of Flux), all of it counts as ``"self"``.

    Source:
        Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", ICLR 2023, arXiv 2208.01626.

    Differs:
        Their code has processors of its own in place of the model's; here the model's own are kept.

    Args:
        model: A network of diffusers, one that has it inside, or a :class:`Denoiser` of one.
        layers: Patterns of names of layers; ``None``: all. ``"*.attn2"`` is the cross-attention of a UNet.
        kind: ``"cross"`` or ``"self"``; of the others nothing is kept.
        rows: Which rows of a batch are kept; ``None``: all. Of guidance in one pass, ``slice(0, B)`` is the
            conditional half.
        size_limit: Layers where more places than this attend to one another are left alone, since their maps are
            large; ``None``: none are.
        replace: Gets all maps ``(R, H, Q, K)`` of a layer and its :class:`AttentionPlace`, and returns those that take
            their place.
        keep: Whether maps are summed; ``False`` where they are only replaced.
        gradients: Whether the sums can be differentiated.

    Raises:
        ValueError: If the model has no attention processors, a pattern matches nothing, ``kind`` is none of both, or a
            layer has no map (linear attention) or several (IP-Adapter).

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(4, 1, 1, down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
        ...                    block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
        >>> with torch.no_grad(), AttentionMaps(unet, "down*", kind="self") as maps:
        ...     _ = unet(torch.zeros(1, 1, 4, 4), 0)
        ...     print({name: tuple(one.shape) for name, one in maps.means().items()})
        {'down_blocks.0.attentions.0': (1, 16, 16)}

    """

    def __init__(
        self,
        model: nn.Module,
        layers: Patterns = None,
        kind: Literal["cross", "self"] = "cross",
        rows: slice | None = None,
        size_limit: int | None = None,
        replace: Replace | None = None,
        *,
        keep: bool = True,
        gradients: bool = False,
    ) -> None:
        check_choice(self, "kind", kind, ("cross", "self"))
        network = model.model if isinstance(model, Denoiser) else model
        found = _attention_layers(network)
        if not found:
            raise ValueError(
                "AttentionMaps: `model` must have layers with attention processors of diffusers, got"
                f" {type(network).__name__}, which has none."
            )
        for pattern in unmatched(layers, found):
            raise ValueError(
                f"AttentionMaps: `layers` must match names of attention layers, got {pattern!r}. Near it:"
                f" {near_names(pattern, found)}."
            )
        self.kind, self.rows, self.size_limit = kind, rows, size_limit
        self.replace, self.keep, self.gradients = replace, keep, gradients
        self._layers = {name: layer for name, layer in found.items() if is_selected(name, layers)}
        _check_have_maps(self._layers)
        self._before: list[tuple[Any, Any, dict[str, Any]]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Puts itself around the processors."""
        for name, layer in self._layers.items():
            processor = layer.get_processor()
            kept = {key: value for key, value in vars(processor).items() if key == _BACKEND}
            self._before.append((layer, processor, kept))
            layer.set_processor(_Watched(processor, name, self))
            if hasattr(processor, _BACKEND):
                setattr(processor, _BACKEND, "native")  # torch's own kernels, whatever is the default
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the processors and their backends back, and forgets the maps."""
        while self._before:
            layer, processor, kept = self._before.pop()
            vars(processor).pop(_BACKEND, None)
            vars(processor).update(kept)
            layer.set_processor(processor)
        self.clear()

    def clear(self) -> None:
        """Forgets the maps, so that a sum starts anew."""
        self._sums.clear()
        self._counts.clear()

    def see(self, weights: Tensor, place: AttentionPlace) -> None:
        """Adds a layer's maps ``(R, H, Q, K)`` to its sum, as the mean of its heads."""
        part = weights[slice(None) if self.rows is None else self.rows, :, place.queries, place.keys(self.kind)]
        mean = (part if self.gradients else part.detach()).mean(1)
        held = self._sums.get(place.layer)
        self._sums[place.layer] = mean if held is None else held + mean
        self._counts[place.layer] = self._counts.get(place.layer, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """The maps by layer ``(R, N, K)`` in float32: means of the heads and of the passes so far."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def grid(self, height: int, width: int) -> Tensor:
        """The mean of the layers, resized.

        Args:
            height: Of the result; the image of a layer has this ratio of height to width.
            width: Of the result.

        Returns:
            ``(R, K, height, width)``.

        Raises:
            ValueError: If nothing was seen.

        """
        means = self.means()
        if not means:
            raise ValueError(
                f"AttentionMaps: no {self.kind}-attention was seen. Run the model inside the `with`, and read there."
            )
        grids = []
        for one in means.values():
            rows = round(math.sqrt(one.shape[1] * height / width))
            image = one.mT.reshape(*one.mT.shape[:2], rows, -1)
            grids.append(F.interpolate(image, (height, width), mode="bilinear", antialias=rows > height))
        return torch.stack(grids).mean(0)


def check_tokens(owner: str, argument: str, *tokens: Tensor) -> None:
    """Refuses choices of tokens that name them by their positions, or have none of them in a row."""
    odd = next((str(one.dtype) for one in tokens if one.dtype is not torch.bool), None)
    if odd or not bool(reduce(torch.logical_or, [one.any(-1) for one in tokens]).all()):
        raise ValueError(
            f"{owner}: `{argument}` must be bool, a place for each token of the prompt and at least one True in a row,"
            f" got {odd or 'a row without one'}. Write `ids == word` of the tokenized prompt."
        )


_BACKEND = "_attention_backend"  # of diffusers' processors since 0.36: which kernels they ask for


def _attention_layers(network: object) -> dict[str, Any]:
    if not isinstance(network, nn.Module):
        return {}
    wanted = ("get_processor", "set_processor")
    return {name: one for name, one in network.named_modules() if all(hasattr(one, method) for method in wanted)}


def _check_have_maps(layers: Mapping[str, Any]) -> None:
    """Refuses processors that have several maps or none."""
    for name, layer in layers.items():
        kind = type(layer.get_processor()).__name__
        if "IPAdapter" in kind:
            raise ValueError(
                f"AttentionMaps: `layers` must have one map of attention each, got {name!r} with {kind}, which attends"
                " to an image prompt beside the text. Write `pipeline.unload_ip_adapter()` before."
            )
        if "LinearAttn" in kind:
            raise ValueError(
                f"AttentionMaps: `layers` must have maps of attention, got {name!r} with {kind}, whose linear attention"
                " makes none. Name the others, such as layers='*.attn2' for the cross-attention of Sana."
            )


class _Watched:
    """A processor with eyes around it."""

    def __init__(self, processor: Any, layer: str, maps: AttentionMaps) -> None:  # noqa: ANN401 # of diffusers
        self.processor, self.layer, self.maps = processor, layer, maps
        # Layers read the signature of their processor to see which arguments it takes.
        vars(self)["__call__"] = processor.__call__

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 # of the processor
        return getattr(vars(self)["processor"], name)

    def __call__(self, attention: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 # as diffusers calls it
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if not isinstance(hidden, Tensor):
            return self.processor(attention, *args, **kwargs)
        places = math.prod(hidden.shape[2:]) if hidden.dim() == 4 else hidden.shape[1]
        tokens = 0 if context is None else context.shape[1]
        eyes = _Eyes(self.maps, self.layer, places, tokens, "Joint" in type(self.processor).__name__)
        with eyes, _scores_seen(attention, eyes, len(hidden)):
            result = self.processor(attention, *args, **kwargs)
        if not eyes.has_seen:
            kind = type(self.processor).__name__
            raise RuntimeError(
                f"AttentionMaps: attention of {kind} (layer {self.layer!r}) is not that of torch, and its maps are not"
                " seen. Write `model.set_attn_processor(AttnProcessor2_0())` of diffusers before."
            )
        return result


class _Eyes(TorchFunctionMode):
    """Sees calls of attention in one layer."""

    def __init__(self, maps: AttentionMaps, layer: str, places: int, tokens: int, is_image_first: bool) -> None:
        super().__init__()
        self.maps, self.layer, self.places, self.tokens = maps, layer, places, tokens
        self.is_image_first = is_image_first
        self.has_seen = False

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat and self.tokens != self.places:
            sizes = [set(one.shape) for one in (args[0] if args else kwargs["tensors"])]
            if len(sizes) == 2 and {self.tokens, self.places} <= sizes[0] | sizes[1]:
                self.is_image_first = self.places in sizes[0] and self.tokens in sizes[1]
        output = func(*args, **kwargs)
        if func is not F.scaled_dot_product_attention or self.has_seen:
            return output
        call = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
        call |= kwargs
        place = self.place(call["query"].shape[-2], call["key"].shape[-2])
        if place is None or not self.wants(place):
            return output
        with torch.autocast(output.device.type, enabled=False):  # which would make products of half precision
            weights = _weights(call)
            changed = self.looked_at(weights, place)
            if changed is weights:
                return output
            value = call["value"].repeat_interleave(call["query"].shape[1] // call["value"].shape[1], 1)
            return (output + (changed - weights) @ value.to(weights.dtype)).to(output.dtype)

    def place(self, queries: int, keys: int) -> AttentionPlace | None:
        """Where the image and the prompt are in a map of this size; ``None``: it is something else."""
        places, tokens = self.places, self.tokens
        empty, everything = slice(0, 0), slice(0, keys)
        if tokens and keys == tokens and queries == places:
            return AttentionPlace(self.layer, slice(0, queries), empty, everything)
        if not tokens and keys == queries == places:
            return AttentionPlace(self.layer, slice(0, queries), everything, empty)
        if not tokens or keys != places + tokens or queries not in (places, keys):
            return None
        image = slice(0, places) if self.is_image_first else slice(tokens, keys)
        words = slice(places, keys) if self.is_image_first else slice(0, tokens)
        return AttentionPlace(self.layer, image if queries == keys else slice(0, places), image, words)

    def wants(self, place: AttentionPlace) -> bool:
        """Whether the maps of a layer are asked for; its call is the one that was looked for in any case."""
        self.has_seen = True
        limit = self.maps.size_limit
        if place.pixels.stop and limit is not None and self.places > limit:
            return False
        return self.maps.replace is not None or bool(place.keys(self.maps.kind).stop)

    def looked_at(self, weights: Tensor, place: AttentionPlace) -> Tensor:
        """The maps, or those in their place."""
        if self.maps.keep and place.keys(self.maps.kind).stop:
            self.maps.see(weights, place)
        return weights if self.maps.replace is None else self.maps.replace(weights, place)


def _weights(call: dict[str, Any]) -> Tensor:
    query, key, mask, scale = call["query"], call["key"], call.get("attn_mask"), call.get("scale")
    wide = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).to(wide)
    scores: Tensor = (query.to(wide) @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if call.get("is_causal"):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        is_choice = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if is_choice else scores + mask.to(wide)
    return scores.softmax(-1)


@contextmanager
def _scores_seen(attention: Any, eyes: _Eyes, count: int) -> Iterator[None]:  # noqa: ANN401 # a layer of diffusers
    """Sees the maps of processors that ask their layer for them, as those before torch 2 did."""
    own = getattr(attention, "get_attention_scores", None)
    if own is None:
        yield
        return
    before = vars(attention).get("get_attention_scores")

    def scores(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        weights: Tensor = own(query, key, mask)
        place = eyes.place(weights.shape[1], weights.shape[2])
        is_slice = weights.shape[0] != count * attention.heads  # of the rows or the heads: not all would be seen
        if place is None or is_slice or eyes.has_seen or not eyes.wants(place):
            return weights
        by_head = weights.reshape(-1, attention.heads, *weights.shape[1:]).to(
            torch.promote_types(weights.dtype, torch.float32)
        )
        return eyes.looked_at(by_head, place).flatten(0, 1).to(weights.dtype)

    vars(attention)["get_attention_scores"] = scores
    try:
        yield
    finally:
        vars(attention).pop("get_attention_scores")
        if before is not None:
            vars(attention)["get_attention_scores"] = before
