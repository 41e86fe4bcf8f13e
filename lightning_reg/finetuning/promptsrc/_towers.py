"""Where the two towers of a CLIP have their tokens, in open_clip and in transformers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import named_layers

__all__ = ["Tower", "find_towers"]


@dataclass(frozen=True)
class Tower:
    """One tower.

    Args:
        blocks: Names of its transformer layers, in order.
        width: Width D of its tokens.
        dim: Which dimension of what a layer gets is that of the tokens.
        inside: The layer that all its transformer layers are in.
        before: The layer that gets the tokens of images, or puts out those of texts, before the first of them.
        rows: Which dimension of what ``inside`` gets is that of the texts.
        end: Number of the word that ends a text; ``None`` for the highest in it.

    """

    blocks: tuple[str, ...]
    width: int
    dim: int
    inside: str
    before: str
    rows: int = 0
    end: int | None = None

    def ends(self, texts: Tensor) -> Tensor:
        """Where texts ``(C, L)`` end, ``(C,)``."""
        return texts.argmax(1) if self.end is None else (texts == self.end).int().argmax(1)


def find_towers(module: nn.Module, clip: str, owner: str) -> tuple[Tower, Tower]:
    """The towers of a CLIP.

    Args:
        module: What it is in.
        clip: Its name there; "" for the module itself.
        owner: Class to name in errors.

    Returns:
        That of images and that of texts.

    Raises:
        MisconfigurationException: If there is no CLIP of a kind that is known.

    """
    layers, prefix = named_layers(module), f"{clip}." if clip else ""
    if f"{prefix}vision_model.encoder" in layers and f"{prefix}text_model.encoder" in layers:
        images, texts = f"{prefix}vision_model.", f"{prefix}text_model."
        end = getattr(layers[texts[:-1]], "eos_token_id", 2)
        return (
            _tower(layers, f"{images}encoder", "layers", f"{images}pre_layrnorm", 1),
            # With 2, as in old files, transformers takes the highest word of a text for its end.
            _tower(layers, f"{texts}encoder", "layers", f"{texts}embeddings.token_embedding", 1, end=end),
        )
    texts = f"{prefix}text." if f"{prefix}text.transformer" in layers else prefix
    images = f"{prefix}visual."
    if f"{images}transformer.resblocks" in layers and f"{texts}transformer.resblocks" in layers:
        if getattr(layers[images[:-1]], "pool_type", "tok") != "tok":
            raise MisconfigurationException(
                f"{owner}(clip={clip!r}): its images are pooled over all tokens, and prompts would be among them. Leave"
                " prompts of images out (`visual=0`), or take a CLIP that reads its class token."
            )
        orders = [getattr(layers[f"{place}transformer"], "batch_first", None) for place in (images, texts)]
        return (
            _tower(layers, f"{images}transformer", "resblocks", f"{images}ln_pre", int(orders[0] or 0)),
            # One that knows no order, as in OpenAI's code, gets the tokens first already.
            _tower(
                layers,
                f"{texts}transformer",
                "resblocks",
                f"{texts}token_embedding",
                int(orders[1] or 0),
                rows=int(orders[1] is None),
            ),
        )
    found = type(layers[clip]).__name__ if clip in layers else type(module).__name__ if not clip else "no such layer"
    raise MisconfigurationException(
        f"{owner}(clip={clip!r}) must name a CLIP of open_clip or transformers with a vision transformer, found"
        f' {found}. Write the name of the layer as in `named_modules()`, or "" where the module itself is one.'
    )


def _tower(
    layers: Mapping[str, nn.Module],
    inside: str,
    name: str,
    before: str,
    dim: int,
    *,
    rows: int = 0,
    end: int | None = None,
) -> Tower:
    blocks = tuple(f"{inside}.{name}.{i}" for i in range(len(list(layers[f"{inside}.{name}"].children()))))
    norm = next(layer for layer in layers[blocks[0]].modules() if isinstance(layer, nn.LayerNorm))
    width = torch.Size(norm.normalized_shape).numel()
    return Tower(blocks, width, dim, inside, before, rows, None if end == 2 else end)
