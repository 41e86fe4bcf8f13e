"""A whole condition without what is undesired: token vectors, and the pooled vector beside them."""

from collections.abc import Mapping

from torch import Tensor

from lightning_reg.diffusion._service import Condition
from lightning_reg.diffusion.decor.decor_projection import DecorProjection

__all__ = ["decor_condition"]

_TOKENS = "encoder_hidden_states"
_POOLED = ("pooled_projections", "text_embeds")  # of SD3 and Flux; of SDXL


def decor_condition(
    condition: Condition,
    tokens: DecorProjection,
    pooled: DecorProjection | None = None,
    token_mask: Tensor | None = None,
) -> Condition:
    """A condition of a denoiser from which undesired directions are taken; entries of other names stay.

    Args:
        condition: Token vectors ``(B, l, d)``, or a mapping by the model's own argument names, with them as
            ``"encoder_hidden_states"``.
        tokens: The projection of the token vectors.
        pooled: The projection of the pooled vectors (``"pooled_projections"`` or ``"text_embeds"``), made of undesired
            *pooled* vectors; ``None``: they stay, and carry the concept past the tokens.
        token_mask: Rows that are changed, bool ``(B, l)``; ``None``: all.

    Returns:
        A condition of the same form; the given one stays as it is.

    Raises:
        ValueError: If there are no token vectors, or no pooled vector where ``pooled`` is given.

    Example:
        >>> import torch
        >>> undesired = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
        >>> decor_condition(torch.ones(1, 1, 4), DecorProjection(undesired))
        tensor([[[1., 0., 1., 1.]]])

    """
    names = [name for name in _POOLED if isinstance(condition, Mapping) and name in condition]
    if pooled is not None and not names:
        raise ValueError(
            "decor_condition: `pooled` must be None where the condition has no pooled vectors"
            f" ({' or '.join(_POOLED)})."
        )
    rows = condition.get(_TOKENS) if isinstance(condition, Mapping) else condition
    if rows is None or rows.dim() != 3:
        found = "none" if rows is None else f"shape {tuple(rows.shape)}"
        raise ValueError(f"decor_condition: `condition` must have token vectors (B, l, d), got {found}.")
    changed: Tensor = tokens(rows, token_mask)
    if not isinstance(condition, Mapping):
        return changed
    vectors = {} if pooled is None else {name: pooled(condition[name]) for name in names}
    return {**condition, _TOKENS: changed, **vectors}
