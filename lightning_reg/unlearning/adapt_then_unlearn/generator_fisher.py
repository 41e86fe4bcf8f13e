"""How much each weight of a generator matters to its discriminator."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_reg.engine.host.names import Patterns, is_selected, near_names, plain_name, unmatched
from lightning_reg.engine.host.procedures import procedure
from lightning_reg.engine.weights.squares import add_row_squares_

__all__ = ["generator_fisher"]

_SAMPLES_AT_ONCE = 4  # the gradients of B samples out of one pass cost B passes back over all of them


@procedure
def generator_fisher(
    module: nn.Module,
    *inputs: Tensor,
    generator: str = "generator",
    discriminator: str = "discriminator",
    params: list[str] | str | None = None,
) -> dict[str, Tensor]:
    r"""Fisher information of a generator's weights: the mean squared gradient of what the discriminator says.

    .. math:: F_j = \frac1B \sum_{b=1}^B \Bigl(\frac{\partial D(G(z_b))}{\partial \theta_j}\Bigr)^2

    While a generator is adapted to a few samples, weights with a large F are to stay where they are: save it with
    ``torch.save(fisher, path)`` and write ``L2ToStart(weight, importance=path)``, which adds :math:`\lambda \sum_j F_j
    (\theta_j - \theta^*_j)^2` to the generator's loss. Both networks are in evaluation mode for it, where samples do
    not meet in batch norm.

    Source:
        Tiwary et al., "Adapt then Unlearn: Exploring Parameter Space Semantics for Unlearning in Generative Adversarial
        Networks", TMLR 2025, arXiv 2309.14054, the first stage; after Li et al., "Few-shot Image Generation with
        Elastic Weight Consolidation", NeurIPS 2020.

    Differs:
        Evaluation mode. The released code takes the convolutions of the synthesis network alone, which is
        ``params="generator.convs.*"`` there, and 32 samples once at the start.

    Args:
        module: Has both networks: the user's LightningModule, or an ``nn.ModuleDict``.
        *inputs: What the generator takes, each with a row for each of the B samples; the discriminator takes what it
            returns. Reference: 32 rows of noise.
        generator: Name of the layer that generates.
        discriminator: Name of the layer that gives a number for each sample.
        params: Patterns of parameter names as in ``module.named_parameters()``, each of which must match one of the
            generator's; ``None`` for all of them.

    Returns:
        By name as in ``module.named_parameters()`` a tensor of each parameter's shape, in float32 at least.

    Raises:
        ValueError: If a layer is not there, if there is no sample, no parameter, or not one finite number for each
            sample.

    Example:
        >>> gan = nn.ModuleDict({"generator": nn.Linear(2, 1, bias=False), "discriminator": nn.Linear(1, 1)})
        >>> nn.init.constant_(gan["discriminator"].weight, 2.0)
        Parameter containing:
        tensor([[2.]], requires_grad=True)
        >>> generator_fisher(gan, torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
        {'generator.weight': tensor([[20.,  2.]])}

    """
    layers = {plain_name(f"{name}.")[:-1]: layer for name, layer in module.named_modules()}
    for argument, name in (("generator", generator), ("discriminator", discriminator)):
        if name not in layers:
            raise ValueError(
                f"generator_fisher: `{argument}` must be the name of a layer, got {name!r}. Near names:"
                f" {near_names(name, layers)}."
            )
    named = _chosen(layers[generator], generator, params)
    module.eval()
    module.requires_grad_(requires_grad=False)
    for param in named.values():
        param.requires_grad_()
    sums = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in named.items()}
    count = 0
    for part in _parts(inputs):
        scores = layers[discriminator](layers[generator](*part))
        if scores.numel() != len(part[0]):
            raise ValueError(
                f"generator_fisher: `discriminator` must give one number for each sample, got shape"
                f" {tuple(scores.shape)} for {len(part[0])}. Name a layer that takes the mean."
            )
        count += add_row_squares_(list(sums.values()), scores.flatten(), list(named.values()))
    samples = len(inputs[0]) if inputs else 0
    if not samples or count < samples:
        what = "no sample" if not samples else f"{samples - count} of {samples} whose gradient is not finite"
        raise ValueError(f"generator_fisher: `inputs` must give finite gradients, a row for each sample, got {what}.")
    return {name: (total / count).detach() for name, total in sums.items()}


def _chosen(layer: nn.Module, prefix: str, params: Patterns) -> dict[str, nn.Parameter]:
    start = f"{prefix}." if prefix else ""
    named = {start + plain_name(name): p for name, p in layer.named_parameters()}
    missing = unmatched(params, named)
    if missing:
        raise ValueError(
            f"generator_fisher: `params` must match parameters of {prefix!r}, got {missing[0]!r}. Near names:"
            f" {near_names(missing[0], named)}."
        )
    chosen = {name: p for name, p in named.items() if is_selected(name, params)}
    if not chosen:
        raise ValueError(f"generator_fisher: `generator` must be a layer with parameters, got {prefix!r}.")
    return chosen


def _parts(inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    size = len(inputs[0]) if inputs else 0
    for start in range(0, size, _SAMPLES_AT_ONCE):
        yield tuple(tensor[start : start + _SAMPLES_AT_ONCE] for tensor in inputs)
