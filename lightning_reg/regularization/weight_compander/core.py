"""Companding functions of weights, their inverses and derivatives, for one weight and for many at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_reg.engine.host.modules import own_parameters

__all__ = [
    "Compander",
    "Companding",
    "bake_companders",
    "compand",
    "compand_gradients",
    "companding_refusal",
    "expand",
    "weight_stats",
]

Tensors = tuple[Tensor, ...] | list[Tensor]
Scales = Sequence[float | Tensor]


def compand(v: Tensor, a: float | Tensor, b: float | Tensor, fn: "str | Companding" = "arctan") -> Tensor:
    r"""The weight :math:`w = a\,\psi(v/b)`, differentiable in all three.

    Args:
        v: What is trained, any shape.
        a: Scale of the bound, above 0; the arctan's bound is :math:`a\pi/2`, the others' is a.
        b: Knee, above 0: larger magnitudes are compressed. The slope at 0 is a/b.
        fn: Name of :math:`\psi`, ``"arctan"``, ``"tanh"`` or ``"softsign"``; or one of your own, a :class:`Companding`.

    Returns:
        Of the shape of ``v``.

    Example:
        >>> compand(torch.tensor([-100.0, -0.1, 0.0, 0.1]), a=0.2, b=0.1)
        tensor([-0.3140, -0.1571,  0.0000,  0.1571])

    """
    return _function(fn).psi([v / b])[0] * a


def expand(w: Tensor, a: float, b: float, fn: "str | Companding" = "arctan") -> Tensor:
    r"""The inverse :math:`v = b\,\psi^{-1}(w/a)`, computed in float64.

    Args:
        w: Weights, any shape.
        a: Scale of the bound.
        b: Knee.
        fn: Name of :math:`\psi`, or a :class:`Companding`.

    Returns:
        Of the shape and type of ``w``.

    Raises:
        ValueError: If a weight lies at the bound or beyond.

    Example:
        >>> expand(torch.tensor([-0.1571, 0.0, 0.1571]), a=0.2, b=0.1)
        tensor([-0.1000,  0.0000,  0.1000])

    """
    bound, largest = a * _function(fn).bound, float(w.abs().max()) if w.numel() else 0.0
    if not largest < bound:
        name = fn if isinstance(fn, str) else "the function"
        raise ValueError(
            f"expand: {name} with a={a:g} reaches magnitudes below {bound:g}, and a weight has {largest:g}."
        )
    return (_function(fn).inverse([w.double() / a])[0] * b).to(w.dtype)


def compand_gradients(
    v: Tensor, gradient: Tensor, a: float | Tensor, b: float | Tensor, fn: "str | Companding" = "arctan"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients with respect to v, log a and log b, from that with respect to :math:`w = a\,\psi(v/b)`.

    .. math:: \partial_v = \tfrac ab\,\psi'(v/b)\,\partial_w, \quad
        \partial_{\log a} = \sum w\,\partial_w, \quad \partial_{\log b} = -\sum v\,\partial_v

    Args:
        v: What is trained, any shape.
        gradient: With respect to w, of the same shape.
        a: Scale of the bound.
        b: Knee.
        fn: Name of :math:`\psi`, or a :class:`Companding`.

    Returns:
        Gradients of v (its shape), of log a and of log b (scalars): sums over all entries, hence large.

    """
    at_v = gradient * _function(fn).slope([v / b])[0] * (a / b)
    return at_v, (gradient * compand(v, a, b, fn)).sum(), -(at_v * v).sum()


# -- the functions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Companding:
    r"""A function :math:`\psi` for weights :math:`w = a\,\psi(v/b)`.

    It has to be odd, strictly increasing, bounded, with a continuous derivative that is 1 at 0 and nowhere larger;
    :func:`companding_refusal` tries all of that. The functions take a list of tensors and return a new list of such;
    :meth:`of` makes them of functions of one tensor.

    Args:
        psi: The function.
        slope: Its derivative.
        inverse: Its inverse.
        bound: What its magnitude stays below, and comes near far out.

    """

    psi: Callable[[Tensors], Tensors]
    slope: Callable[[Tensors], Tensors]
    inverse: Callable[[Tensors], Tensors]
    bound: float

    @classmethod
    def of(
        cls,
        psi: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor],
        bound: float,
        slope: Callable[[Tensor], Tensor] | None = None,
    ) -> "Companding":
        r"""A companding of functions that take one tensor each.

        Args:
            psi: The function, of each element by itself.
            inverse: Its inverse.
            bound: What its magnitude stays below, and comes near far out.
            slope: Its derivative; ``None``: autograd's.

        Returns:
            The companding; it can be pickled if the functions can.

        Example:
            >>> algebraic = Companding.of(lambda x: x / (1 + x * x).sqrt(), lambda y: y / (1 - y * y).sqrt(), bound=1.0)
            >>> companding_refusal(algebraic)
            ''
            >>> compand(torch.tensor([-0.3, 0.0, 40.0]), a=0.2, b=0.1, fn=algebraic)
            tensor([-0.1897,  0.0000,  0.2000])

        """
        slopes = partial(_slope_of, psi) if slope is None else slope
        return cls(partial(_each, psi), partial(_each, slopes), partial(_each, inverse), bound)


def _each(function: Callable[[Tensor], Tensor], tensors: Tensors) -> list[Tensor]:
    return [function(tensor) for tensor in tensors]


def _slope_of(psi: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value, pull_back, *_ = torch.func.vjp(psi, x)
    slope: Tensor = pull_back(torch.ones_like(value))[0]
    return slope


def companding_refusal(function: Companding) -> str:
    """What keeps a function from being a companding: it is tried in float64 at 162 points up to 1e4, and far out.

    Args:
        function: The function.

    Returns:
        The reason, as a clause; "" if nothing was found.

    Example:
        >>> companding_refusal(Companding.of(torch.tanh, torch.atanh, bound=2.0))
        'its magnitude grows to 1, and `bound` is 2.0'

    """
    positive = torch.logspace(-3, 4, 81, dtype=torch.double)
    x = torch.cat([-positive.flip(0), positive])
    for name in ("psi", "slope", "inverse"):
        given = [x.clamp(-0.1, 0.1), torch.tensor([[0.05]])]
        kept = [tensor.clone() for tensor in given]
        try:
            got = getattr(function, name)(given)
        except Exception as error:  # noqa: BLE001 # a function of anybody's
            return f"`{name}` of a list of tensors ends in {type(error).__name__}: {error}"
        alike = len(got) == 2 and all(isinstance(t, Tensor) for t in got)
        if not alike or [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in given]:
            return f"`{name}` of a list of tensors does not give a list of tensors of their shapes and types"
        if not all(torch.equal(one, two) for one, two in zip(given, kept, strict=True)):
            return f"`{name}` changes the tensors that it is given"
    return _numbers_refusal(function, x)


def _numbers_refusal(function: Companding, x: Tensor) -> str:
    zero, far, bound = x.new_zeros(1), float(function.psi([x.new_full((1,), 1e12)])[0]), function.bound
    y, slopes = function.psi([x])[0], function.slope([x])[0]
    if not (y.isfinite().all() and slopes.isfinite().all()):
        return "it or its slope is not finite everywhere"
    if (y + y.flip(0)).abs().max() > 1e-9 or function.psi([zero])[0].abs().max() > 1e-12:
        return "it is not odd"
    if not (isfinite(bound) and 0.999 * bound <= far <= (1 + 1e-9) * bound and y.max() <= (1 + 1e-9) * bound):
        return f"its magnitude grows to {max(far, float(y.max())):g}, and `bound` is {bound}"
    near = y.abs() < 0.99 * bound  # beyond, neighbours may be rounded to the same number
    if (y[near].diff() <= 0).any() or (y.diff() < 0).any():
        return "it is not strictly increasing"
    if abs(float(function.slope([zero])[0]) - 1) > 1e-6 or slopes.max() > 1 + 1e-6:
        at_zero, largest = float(function.slope([zero])[0]), float(slopes.max())
        return f"its slope, which must be 1 at 0 and nowhere larger, is {at_zero:g} at 0 and reaches {largest:g}"
    step = 1e-5 * x.abs().clamp(min=1e-2)
    difference = (function.psi([x + step])[0] - function.psi([x - step])[0]) / (2 * step)
    if (difference - slopes).abs().max() > 1e-4:
        return "`slope` is not its derivative"
    back = function.inverse([y[near]])[0]
    return "" if torch.allclose(back, x[near], rtol=1e-6, atol=0) else "`inverse` is not its inverse"


def _arctan_slope(x: Tensors) -> Tensors:
    return torch._foreach_reciprocal(torch._foreach_add(torch._foreach_mul(x, x), 1.0))


def _tanh_slope(x: Tensors) -> Tensors:
    y = torch._foreach_tanh(x)
    return torch._foreach_add(torch._foreach_neg(torch._foreach_mul(y, y)), 1.0)


def _softsign(x: Tensors) -> Tensors:
    return torch._foreach_div(x, torch._foreach_add(torch._foreach_abs(x), 1.0))


def _softsign_slope(x: Tensors) -> Tensors:
    one = torch._foreach_add(torch._foreach_abs(x), 1.0)
    return torch._foreach_reciprocal(torch._foreach_mul(one, one))


def _softsign_inverse(y: Tensors) -> Tensors:
    return torch._foreach_div(y, torch._foreach_add(torch._foreach_neg(torch._foreach_abs(y)), 1.0))


COMPANDINGS = {
    "arctan": Companding(torch._foreach_atan, _arctan_slope, torch._foreach_tan, pi / 2),
    "tanh": Companding(torch._foreach_tanh, _tanh_slope, lambda y: [t.atanh() for t in y], 1.0),
    "softsign": Companding(_softsign, _softsign_slope, _softsign_inverse, 1.0),
    "identity": Companding(list, lambda x: [torch.ones_like(t) for t in x], list, inf),
}


def _function(fn: str | Companding) -> Companding:
    return COMPANDINGS[fn] if isinstance(fn, str) else fn


# -- many weights -----------------------------------------------------------------------------------------------------


def compand_all(latents: Tensors, a: Scales, b: Scales, fn: str | Companding) -> list[Tensor]:
    """The same as :func:`compand` for many weights in a few fused passes, in float32 at least.

    Args:
        latents: What is trained.
        a: A number or a scalar tensor for each.
        b: The same.
        fn: Name of the function, or a :class:`Companding`.

    Returns:
        The weights, each of the type of its latent.

    """
    weights = _times(_function(fn).psi(_scaled(latents, b)), a)
    return [weight.to(v.dtype) for weight, v in zip(weights, latents, strict=True)]


def pull_back_all_(
    latents: Tensors, weights: Tensors, gradients: Tensors, a: Scales, b: Scales, fn: str | Companding, *, learned: bool
) -> list[Tensor]:
    """The same as :func:`compand_gradients` for many weights in a few fused passes.

    Args:
        latents: What is trained.
        weights: What it is mapped to.
        gradients: With respect to the weights; turned into those of the latents, in place.
        a: A number or a scalar tensor for each.
        b: The same.
        fn: Name of the function, or a :class:`Companding`.
        learned: Whether gradients of the shapes are wanted.

    Returns:
        If so, for each weight the gradients of log a and log b, ``(2,)`` float32; else nothing.

    """
    of_a = [_dot(g, w) for g, w in zip(gradients, weights, strict=True)] if learned else []
    slopes = _times(_function(fn).slope(_scaled(latents, b)), [one / two for one, two in zip(a, b, strict=True)])
    torch._foreach_mul_(gradients, slopes)
    return [torch.stack([da, -_dot(g, v)]) for da, g, v in zip(of_a, gradients, latents, strict=learned)]


def _scaled(latents: Tensors, b: Scales) -> Tensors:
    return _times([v.to(torch.promote_types(v.dtype, torch.float32)) for v in latents], [1 / knee for knee in b])


def _times(tensors: Tensors, factors: Scales) -> Tensors:
    numbers = [factor for factor in factors if not isinstance(factor, Tensor)]
    if len(numbers) == len(tensors):
        return torch._foreach_mul(tensors, numbers)
    return [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return (one.float() * two.float()).sum()


# Where the bound of a layer lies when nothing is said: the bound should be near the scale of the weights.
_BOUND_OF_RMS = 4.0
# And no nearer to the largest weight than this: at 0.8 of the bound the arctan's inverse is three times the weight.
_BOUND_OF_LARGEST = 1.25


@torch.no_grad()
def shapes_for(
    weights: Tensors, a: float | None, b: float | None, fn: str | Companding = "arctan"
) -> tuple[list[float], list[float]]:
    """Shapes of the function for weights as they are: the bound at four times their root mean square, the slope 2.

    Args:
        weights: Initial weights of the layers.
        a: Scale of the bound for all of them; ``None``: of each layer its own, and a bound that is at least 1.25 times
            its largest weight. A layer of zeros counts as one of torch's default initialization.
        b: Knee for all of them; ``None``: a/2.
        fn: Name of the function, or a :class:`Companding`.

    Returns:
        a and b of each.

    """
    if a is not None:
        return [a] * len(weights), [a / 2 if b is None else b] * len(weights)
    figures = [torch.stack([w.float().square().mean().sqrt(), w.float().abs().max()]) for w in weights]
    scales = []
    for w, (rms, largest) in zip(weights, torch.stack(figures).tolist(), strict=True):
        usual = (3 * w.numel() / w.shape[0]) ** -0.5  # uniform in +-1/sqrt(fan_in)
        bound = max(_BOUND_OF_RMS * (rms or usual), _BOUND_OF_LARGEST * largest)
        scales.append(bound / _function(fn).bound)
    return scales, [scale / 2 if b is None else b for scale in scales]


def figures(latents: Tensors, weights: Tensors, a: Scales, b: Scales) -> dict[str, Any]:
    """What is told of the weights in the course of a training.

    Args:
        latents: What is trained.
        weights: What it is mapped to.
        a: A number or a scalar tensor for each.
        b: The same.

    Returns:
        ``max``, the largest magnitude of a weight; ``saturated``, the share of latents beyond their knee; the means of
        ``a`` and of ``b``.

    """
    largest = torch.stack([w.float().abs().max() for w in weights]).max()
    beyond = torch.stack([(v.abs() > knee).sum() for v, knee in zip(latents, b, strict=True)]).sum()
    saturated = beyond / sum(v.numel() for v in latents)
    return {"max": largest, "saturated": saturated, "a": sum(a) / len(a), "b": sum(b) / len(b)}


# -- loops without Lightning ------------------------------------------------------------------------------------------


class Compander(nn.Module):
    """The function as a parametrization, for a training loop of one's own.

    ``parametrize.register_parametrization(layer, "weight", Compander(a, b))`` leaves the layer's output as it is;
    :func:`bake_companders` makes plain layers again. The callback works without it.

    Source:
        Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", 2023,
        arXiv 2306.16993.

    Differs:
        The paper's text was not at hand: the function is a reconstruction, see :class:`WeightCompander`.

    Args:
        a: Scale of the bound, above 0.
        b: Knee, above 0.
        fn: Name of the function, or a :class:`Companding`.
        learn: Whether ``log_a`` and ``log_b`` are parameters. Give them a learning rate of about a hundredth, and no
            weight decay.

    Raises:
        ValueError: If ``a`` or ``b`` is not above 0, there is no such function, or yours is none.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> _ = parametrize.register_parametrization(layer, "weight", Compander(1.0, 0.5))
        >>> bool(layer.weight.abs().max() < torch.pi / 2)
        True

    """

    def __init__(self, a: float, b: float, fn: str | Companding = "arctan", *, learn: bool = False) -> None:
        super().__init__()
        wrong = companding_refusal(fn) if isinstance(fn, Companding) else ""
        if wrong:
            raise ValueError(f"Compander: `fn` cannot compand: {wrong}.")
        if not (a > 0 and b > 0 and (isinstance(fn, Companding) or fn in COMPANDINGS)):
            raise ValueError(f"Compander: `a` and `b` must be above 0, `fn` one of {list(COMPANDINGS)}: {a}, {b}, {fn}")
        self.fn = fn
        self.log_a = nn.Parameter(torch.tensor(a).log(), requires_grad=learn)
        self.log_b = nn.Parameter(torch.tensor(b).log(), requires_grad=learn)

    @override
    def forward(self, v: Tensor) -> Tensor:
        """The weight."""
        return compand(v, self.log_a.exp(), self.log_b.exp(), self.fn)

    def right_inverse(self, w: Tensor) -> Tensor:
        """What the weight is made of."""
        return expand(w, float(self.log_a.exp()), float(self.log_b.exp()), self.fn)


def bake_companders(module: nn.Module) -> nn.Module:
    """Makes plain layers of those with a :class:`Compander`, in place; their weights stay what they are.

    Args:
        module: A network.

    Returns:
        The same.

    """
    for layer in list(module.modules()):
        held = getattr(layer, "parametrizations", {})
        for name in [name for name, maps in held.items() if any(isinstance(m, Compander) for m in maps)]:
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return module


@torch.no_grad()
def weight_stats(module: nn.Module, near_zero: float = 1e-2) -> dict[str, float]:
    """How the weights of a network are distributed: all of two dimensions and more, together, tied ones once.

    Args:
        module: A network.
        near_zero: What counts as near zero, as a share of the largest magnitude.

    Returns:
        ``max``, the largest magnitude; ``std``; ``kurtosis``, 3 for a normal distribution, smaller for a flat one;
        ``near_zero``, the share of such weights.

    """
    found = {}
    for layer in module.modules():
        if not isinstance(layer, parametrize.ParametrizationList):
            for name in (*own_parameters(layer), *getattr(layer, "parametrizations", ())):
                weight = getattr(layer, name)
                if weight is not None and weight.dim() > 1:
                    found[id(own_parameters(layer).get(name, weight))] = weight
    weights = torch.cat([weight.flatten().double() for weight in found.values()])
    centred, largest = weights - weights.mean(), weights.abs().max()
    variance = centred.square().mean()
    return {
        "max": float(largest),
        "std": float(variance.sqrt()),
        "kurtosis": float(centred.pow(4).mean() / variance.square()),
        "near_zero": float((weights.abs() < near_zero * largest).double().mean()),
    }
