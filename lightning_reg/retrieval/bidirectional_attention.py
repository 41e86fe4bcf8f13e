"""Decoders of transformers as text encoders: each token sees those after it, too."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.procedures import left_as_found

__all__ = ["bidirectional_attention_"]


def bidirectional_attention_(model: nn.Module) -> None:
    """Takes the causal mask from a decoder of Hugging Face's transformers, in place, for training and afterwards.

    The mark of it, ``is_causal=False``, is set on the attention layers and in their configs, so that
    ``save_pretrained`` writes it. Newer releases (5.2 and later) follow it: padding stays masked, and layers with a
    sliding window see as far ahead as back. For older ones the model gets a full mask instead. Whether a token then
    sees those after it is tried with three tokens before this returns. Call it again on a model that was loaded.

    Source:
        Zhao et al., "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
        2025, arXiv 2506.20923: "fully bidirectional attention".

    Differs:
        Nothing.

    Args:
        model: The model, or a module around it; ``eager`` and ``sdpa`` attention.

    Raises:
        ValueError: If there is no decoder in it, if it has an encoder, or if its tokens see none after them even so.

    Example:
        >>> from transformers import Qwen2Config, Qwen2Model
        >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
        >>> model = Qwen2Model(Qwen2Config(vocab_size=20, num_hidden_layers=1, **small))
        >>> bidirectional_attention_(model)
        >>> model.config.is_causal
        False

    """
    decoders = _decoders(model)
    if not decoders:
        raise ValueError(
            f"bidirectional_attention_: {type(model).__name__} holds no decoder of transformers with attention layers"
            " that are marked as causal (`is_causal`)."
        )
    for decoder in decoders:
        _mark(decoder)
        if not _sees_ahead(decoder):  # a release that does not follow the mark
            _give_masks(decoder)


def _decoders(model: nn.Module) -> list[nn.Module]:
    """The innermost models without a head that embed tokens and have attention layers."""
    found = [layer for layer in model.modules() if _is_decoder(layer)]
    return [one for one in found if not any(other is not one and other in found for other in one.modules())]


def _is_decoder(layer: nn.Module) -> bool:
    embeddings: Any = getattr(layer, "get_input_embeddings", None)
    if embeddings is None or getattr(layer, "base_model", None) is not layer or not any(_attentions(layer)):
        return False
    try:
        if not isinstance(embeddings(), nn.Embedding):  # of images
            return False
    except NotImplementedError:
        return False
    if getattr(layer.config, "is_encoder_decoder", False):
        raise ValueError(
            f"bidirectional_attention_: {type(layer).__name__} has an encoder, which sees all tokens already."
        )
    return True


def _attentions(decoder: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in decoder.modules() if isinstance(getattr(layer, "is_causal", None), bool))


def _mark(decoder: nn.Module) -> None:
    layers: list[Any] = [*_attentions(decoder)]
    for layer in layers:
        layer.is_causal = False
    for layer in (decoder, *layers):
        if getattr(layer, "config", None) is not None:
            layer.config.is_causal = False


def _sees_ahead(decoder: nn.Module) -> bool:
    """Whether the first of three tokens changes with the second, with a mask of padding and without."""
    device = next(decoder.parameters()).device
    tokens = torch.tensor([[1, 2, 3], [1, 4, 3]], device=device)
    masks = (None, torch.ones_like(tokens), torch.tensor([[1, 1, 1, 0]] * 2, device=device))
    with left_as_found(decoder), torch.no_grad():
        decoder.eval()
        return all(_first_changes(decoder, tokens, mask) for mask in masks)


def _first_changes(decoder: nn.Module, tokens: Tensor, mask: Tensor | None) -> bool:
    if mask is not None and mask.shape[1] > tokens.shape[1]:
        tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
    hidden: Tensor = decoder(input_ids=tokens, attention_mask=mask, use_cache=False)[0]
    first, second = ((hidden[0] - hidden[1])[position].abs().max() for position in (0, 1))
    return bool(first > 1e-5 * second)


def _give_masks(decoder: nn.Module) -> None:
    config: Any = decoder.config
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"bidirectional_attention_: {type(decoder).__name__} has a sliding window, which this release of"
            " transformers cannot have without the causal mask. Install transformers 5.2 or newer."
        )
    hook, cause = decoder.register_forward_pre_hook(_with_full_mask, with_kwargs=True), None
    try:
        if _sees_ahead(decoder):
            return
    except RuntimeError as error:  # it takes no mask of this form
        cause = error
    hook.remove()
    raise ValueError(
        f"bidirectional_attention_: tokens of {type(decoder).__name__} see none after them even so: it makes a causal"
        " mask that no argument lifts. Install transformers 5.2 or newer, or load it with"
        " `attn_implementation='eager'`."
    ) from cause


def _with_full_mask(decoder: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The padding for all queries, ``(B, 1, T, T)``, which is taken as it is in place of the causal mask."""
    there: Tensor | None = args[1] if len(args) > 1 else named.get("attention_mask")
    given: Any = args[0] if args else named.get("input_ids")
    given = named.get("inputs_embeds") if given is None else given
    if there is not None and there.dim() != 2:
        return args, named
    if there is None:
        there = torch.ones(given.shape[:2], device=given.device)
    dtype = next(decoder.parameters()).dtype
    full = torch.zeros(len(there), 1, there.shape[1], there.shape[1], dtype=dtype, device=there.device)
    full = full.masked_fill(there[:, None, None] == 0, torch.finfo(dtype).min)
    return args[:1], {**named, "attention_mask": full}
