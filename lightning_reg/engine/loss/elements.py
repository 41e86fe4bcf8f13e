r"""What each loss of ``torch.nn.functional`` is made of: elements, their mass, and how they are reduced.

Every loss the engine understands is a weighted mean or a sum over *elements*:

.. math:: \text{mean} = \frac{\sum_e \ell_e}{\sum_e m_e}, \qquad \text{sum} = \sum_e \ell_e

``elements`` is what ``reduction="none"`` returns, ``mass`` is what the function's own ``"mean"`` divides by (1 for an
element that counts, 0 for an ignored one, the class weight where there is one).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.host.errors import MisconfigurationException

__all__ = [
    "CLASS_LOSSES",
    "LOSS_FUNCTIONS",
    "ROW_LOSSES",
    "Decomposition",
    "bind",
    "check_logits",
    "decompose",
    "element_mass",
    "first_name",
    "has_gradient",
    "reduction_of",
    "target_name",
]


class Decomposition(NamedTuple):
    """A loss call taken apart.

    ``elements`` carries the gradient, ``plain`` is the user's own value from the same intermediate results, and
    ``reduction`` is what leads from one to the other: ``batchmean`` has become ``mean`` over summed rows here.
    """

    elements: Tensor
    plain: Tensor
    reduction: str


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


_NAMES = (
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss "
    "huber_loss kl_div poisson_nll_loss gaussian_nll_loss soft_margin_loss multilabel_margin_loss "
    "multilabel_soft_margin_loss multi_margin_loss margin_ranking_loss hinge_embedding_loss cosine_embedding_loss "
    "triplet_margin_loss triplet_margin_with_distance_loss ctc_loss linear_cross_entropy"
)
# Functions that this torch does not have (linear_cross_entropy before 2.12) are left out.
LOSS_FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    getattr(F, name): _names(getattr(F, name)) for name in _NAMES.split() if hasattr(F, name)
}
# Losses over classes: the input has one dimension more than the elements.
CLASS_LOSSES = frozenset(
    f for f in LOSS_FUNCTIONS if f.__name__ in ("cross_entropy", "nll_loss", "linear_cross_entropy")
)
# Losses whose elements are one number per row although their input is a matrix.
ROW_LOSSES = frozenset(
    (
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.multi_margin_loss,
        F.cosine_embedding_loss,
        F.triplet_margin_loss,
        F.triplet_margin_with_distance_loss,
        F.ctc_loss,
    )
)
_FIRST_NAMES = {function: names[0] for function, names in LOSS_FUNCTIONS.items()}
_TARGET_NAMES = {
    function: next((name for name in ("target", "targets") if name in names), None)
    for function, names in LOSS_FUNCTIONS.items()
}


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Names the positional arguments (cheaper than ``inspect.signature``, which the hot path cannot afford)."""
    return dict(zip(LOSS_FUNCTIONS[function], args, strict=False)) | kwargs


def has_gradient(arguments: Mapping[str, Any]) -> bool:
    """Whether a call has something to learn: a teacher, a metric, a loss that is only logged has not."""
    for value in arguments.values():  # noqa: SIM110 # a generator is slower, and every step asks
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def first_name(function: Callable[..., Any]) -> str:
    """The name of the first argument."""
    return _FIRST_NAMES[function]


def target_name(function: Callable[..., Any]) -> str | None:
    """The name of the target argument, ``None`` where a loss has no target (the triplet family)."""
    return _TARGET_NAMES[function]


def reduction_of(arguments: Mapping[str, Any]) -> str:
    """The reduction asked for, the two deprecated flags of torch included."""
    size_average, reduce = arguments.get("size_average"), arguments.get("reduce")
    if size_average is None and reduce is None:
        return str(arguments.get("reduction", "mean"))
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def decompose(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Decomposition:
    """Takes a loss call apart.

    Args:
        function: One of :data:`LOSS_FUNCTIONS`.
        arguments: Its arguments by name, see :func:`bind`.

    Returns:
        Elements, the plain value, and the reduction between them.

    Raises:
        MisconfigurationException: If the call has no value per element.

    """
    reduction = reduction_of(arguments)
    arguments = {k: v for k, v in arguments.items() if k not in ("size_average", "reduce")}
    if function is F.cross_entropy and not (_is_soft(arguments) or arguments.get("label_smoothing", 0.0)):
        return _decompose_cross_entropy(arguments, reduction)
    try:
        elements = function(**{**arguments, "reduction": "none"})
    except (NotImplementedError, ValueError) as error:
        raise MisconfigurationException(
            f"F.{function.__name__} has no value per sample for these arguments ({error}). Write the loss with"
            " `LossMixin.reduce_loss`, which takes the per-sample loss from you."
        ) from error
    if reduction == "none":
        return Decomposition(elements, elements, reduction)
    plain = function(**{**arguments, "reduction": reduction})
    if reduction == "batchmean":
        return Decomposition(elements.flatten(1).sum(1) if elements.dim() > 1 else elements, plain, "mean")
    if function is F.ctc_loss and reduction == "mean":
        lengths = torch.as_tensor(arguments["target_lengths"], device=elements.device)
        elements = elements / lengths.to(elements.dtype).clamp(min=1)
    return Decomposition(elements, plain, reduction)


def _decompose_cross_entropy(arguments: Mapping[str, Any], reduction: str) -> Decomposition:
    # torch computes cross_entropy as nll_loss(log_softmax(input)): sharing the log-probabilities gives both the
    # per-element losses and, bit for bit, the user's own value for one softmax over the vocabulary.
    logits, target = arguments["input"], arguments["target"]
    if torch.is_autocast_enabled(logits.device.type) and logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # as autocast does for cross_entropy, but on the CPU not for log_softmax
    log_probs = F.log_softmax(logits, dim=1 if logits.dim() > 1 else 0)
    options = {"weight": arguments.get("weight"), "ignore_index": arguments.get("ignore_index", -100)}
    elements = F.nll_loss(log_probs, target, reduction="none", **options)
    plain = elements if reduction == "none" else F.nll_loss(log_probs, target, reduction=reduction, **options)
    return Decomposition(elements, plain, reduction)


def _is_soft(arguments: Mapping[str, Any]) -> bool:
    # The rule of torch's cross_entropy: class probabilities have the shape of the input, and are floating point.
    return bool(arguments["target"].is_floating_point())


def check_logits(function: Callable[..., Any], arguments: Mapping[str, Any], changed: Tensor, call: object) -> None:
    """Refuses logits in place of those of a call, if the loss would not be the same loss of them.

    Args:
        function: One of :data:`LOSS_FUNCTIONS`.
        arguments: Its arguments by name.
        changed: The other logits.
        call: What to name in the error.

    Raises:
        MisconfigurationException: If the call is none of logits, rows do not agree, or classes are fewer, or more where
            targets, weights or smoothing are those of the given classes.

    """
    if function is not F.cross_entropy:
        raise MisconfigurationException(
            f"A technique changes the logits of the loss, and {call} has none that a softmax follows (`nll_loss` gets"
            " log-probabilities, which would no longer add up to 1). Compute the loss with `F.cross_entropy`, or choose"
            " such a call with `loss=...`."
        )
    given: Tensor = arguments["input"]
    dim = 1 if given.dim() > 1 else 0
    rows = [tensor.shape[:dim] + tensor.shape[dim + 1 :] for tensor in (given, changed)]
    if given.dim() != changed.dim() or rows[0] != rows[1] or changed.shape[dim] < given.shape[dim]:
        raise MisconfigurationException(
            f"Logits of shape {tuple(changed.shape)} cannot take the place of those of {call}, {tuple(given.shape)}:"
            " rows stay, and columns may only be added behind those that are there."
        )
    if changed.shape[dim] == given.shape[dim]:
        return
    reasons = {
        "probabilities as targets": _is_soft(arguments),
        "class weights": arguments.get("weight") is not None,
        "label smoothing": bool(arguments.get("label_smoothing", 0.0)),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise MisconfigurationException(
            f"A technique adds columns to the logits, and {call} has {found[0]}, for the given columns alone: what the"
            " new ones would count is not defined. Use class indices as targets, and leave `weight` and"
            " `label_smoothing` out."
        )


def element_mass(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Tensor | None:
    """What each element adds to the divisor of the function's own ``"mean"``.

    Args:
        function: One of :data:`LOSS_FUNCTIONS`.
        arguments: Its arguments by name.

    Returns:
        float32, in the shape of the elements; ``None`` where every element counts 1.

    """
    weight: Tensor | None = arguments.get("weight")
    if "ignore_index" in LOSS_FUNCTIONS[function]:
        if _is_soft(arguments):
            return None
        target: Tensor = arguments["target"]
        ignore_index = arguments.get("ignore_index", -100)
        counted = target != (-100 if ignore_index is None else ignore_index)
        if weight is None:
            return counted.float()
        return weight.float()[target * counted] * counted
    if weight is not None and function in (F.mse_loss, F.l1_loss):  # torch's huber_loss divides by the count
        return weight.float().expand_as(arguments["input"])  # torch takes no other shape than the input's
    return None
