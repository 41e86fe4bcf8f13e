"""Mixup of a batch as ELR+ does it: one share for all samples, never below one half."""

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_reg.engine.data.blend import draw_lam, mixup, problem_with_blending
from lightning_reg.engine.data.entries import find_inputs, replace_entry
from lightning_reg.engine.data.mixing import Mixing

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["mix_batch", "mix_rows"]


def mix_batch(
    batch: object, step: "Step", by: "Technique", *, alpha: float, input_key: str | None, in_targets: bool
) -> object:
    r"""Blends each sample with another one, and notes in ``step.mixing`` how.

    .. math:: \lambda \sim \text{Beta}(\alpha, \alpha), \quad \lambda \leftarrow \max(\lambda, 1 - \lambda), \quad
        \tilde x_i = \lambda x_i + (1 - \lambda)\, x_{\pi(i)}

    Args:
        batch: The batch; it stays as it is.
        step: The step, for its draws.
        by: Who mixes.
        alpha: Parameter of the Beta distribution, above 0.
        input_key: Entry with the inputs; ``None`` where the batch's structure says it.
        in_targets: Whether ``by`` mixes the targets itself, so that the loss is left as it is.

    Returns:
        The batch with mixed inputs.

    Raises:
        MisconfigurationException: If the inputs are not found, or are no floating-point tensor.

    """
    otherwise = ", or write `mixup_alpha=0`"
    key, inputs = find_inputs(batch, by, input_key, step.several, problem_with_blending, otherwise)
    generator = by.generator(step)
    share = float(draw_lam(alpha, generator))
    mixed, permutation, lam = mixup(inputs, max(share, 1.0 - share), generator=generator)
    step.mixing = Mixing(by, permutation, lam, mixed, batch, in_targets=in_targets)
    return replace_entry(batch, key, mixed)


def mix_rows(rows: Tensor, step: "Step") -> Tensor:
    """A row per sample ``(B, ...)``, mixed as the images of the step's batch are; as it is where they are not mixed."""
    return rows if step.mixing is None else step.mixing.rows(rows)
