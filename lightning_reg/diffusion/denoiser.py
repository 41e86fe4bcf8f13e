"""One interface to denoisers: UNets, transformers, functions; noise, velocity, sample and flow predictions."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from typing_extensions import override

from lightning_reg.diffusion._conditions import Condition, can_join, joined, spread
from lightning_reg.diffusion._schedule import Path, Scheduler, flow_levels, path_of, prediction_of
from lightning_reg.engine.host.modules import uncompiled

__all__ = ["Denoiser", "NoiseSchedule", "Prediction"]

PredictionType = Literal["auto", "epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class Prediction:
    r"""What a denoiser says of noisy samples.

    Args:
        x: The noisy samples ``(B, ...)``, :math:`x_t = \alpha x_0 + \sigma e`, in float32 at least.
        output: What the model predicts, of their shape.
        alpha: Of the signal, ``(B, 1, ...)``.
        sigma: Of the noise, ``(B, 1, ...)``.
        kind: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow"``.

    """

    x: Tensor
    output: Tensor
    alpha: Tensor
    sigma: Tensor
    kind: str

    @property
    def clean(self) -> Tensor:
        """The sample :math:`x_0` that is predicted."""
        if self.kind == "sample":
            return self.output
        if self.kind == "epsilon":
            return (self.x - self.sigma * self.output) / self.alpha
        return (self.alpha * self.x if self.kind == "v_prediction" else self.x) - self.sigma * self.output

    @property
    def noise(self) -> Tensor:
        """The noise e that is predicted."""
        if self.kind == "epsilon":
            return self.output
        if self.kind == "sample":
            return (self.x - self.alpha * self.output) / self.sigma
        return self.alpha * self.output + (self.sigma * self.x if self.kind == "v_prediction" else self.x)

    def rows(self, rows: slice | Tensor) -> "Prediction":
        """That of some of the samples."""
        return Prediction(self.x[rows], self.output[rows], self.alpha[rows], self.sigma[rows], self.kind)

    def at(self, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        r"""The deterministic step to another level: :math:`\alpha' x_0 + \sigma' e`."""
        return alpha * self.clean + sigma * self.noise


class NoiseSchedule:
    """Noise levels of a model that was trained without diffusers, in the place of one of its schedulers.

    Steps of a sampler are evenly spaced, from the last time down, and end in a sample without noise.

    Args:
        alphas_cumprod: The share of signal at each of T times, falling, ``(T,)`` in [0, 1].
        prediction_type: What the model predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> NoiseSchedule(torch.linspace(0.999, 0.001, 1000)).set_timesteps(4).tolist()
        [999, 749, 499, 249]

    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    ) -> None:
        levels = alphas_cumprod.detach().double()
        if levels.dim() != 1 or not len(levels) or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(
                f"NoiseSchedule: `alphas_cumprod` must be numbers in [0, 1], one for each time, got shape"
                f" {tuple(alphas_cumprod.shape)}."
            )
        self.alphas_cumprod = levels
        self.config = SimpleNamespace(prediction_type=prediction_type, num_train_timesteps=len(levels))
        self.timesteps = torch.arange(len(levels)).flip(0)

    def set_timesteps(self, steps: int) -> Tensor:
        """Chooses the times of a sampler, ``(steps,)``, and returns them."""
        times = len(self.alphas_cumprod)
        self.timesteps = (times - torch.arange(steps, dtype=torch.double) * times / steps).round().long() - 1
        return self.timesteps


class Denoiser(nn.Module):
    r"""A trained denoiser as procedures see it, whatever it predicts: :math:`x_t = \alpha_t x_0 + \sigma_t e`.

    It wraps ``UNet2DModel``, ``UNet2DConditionModel`` and transformers of diffusers, and any function of ``(x, t)`` or
    ``(x, t, condition)``, with the scheduler that it was trained for; the scheduler is read and never changed. A
    condition is a tensor with a row for each sample (labels, embeddings of a prompt), or a mapping of such tensors by
    the model's own argument names (``{"encoder_hidden_states": ..., "pooled_projections": ...}``).

    Schedulers with ``alphas_cumprod`` and flow-matching ones (``FlowMatchEulerDiscreteScheduler``, where
    :math:`\alpha = 1 - \sigma`) are read, with zero terminal signal and every spacing of times. Predicted variances
    beside the prediction (twice the channels) are dropped. The model runs in its own type; what is computed from it is
    float32 at least. Calling it gives the noise that it predicts.

    Source:
        Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv 2006.11239; deterministic
        steps: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv 2010.02502, equation 12;
        guidance: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598.

    Differs:
        Steps are those of DDIM, or of Euler for flows, whatever solver the scheduler stands for: of other schedulers
        the levels and times alone are used, times rounded. Samples are never cut.

    Args:
        model: The network, or a function of x ``(B, ...)``, t ``(B,)`` and the condition.
        scheduler: Of diffusers, or a :class:`NoiseSchedule`.
        prediction: What the model predicts; ``"auto"``: what the scheduler says.
        mu: Shift of times, where the scheduler shifts them dynamically.
        weights: Parameters by name that stand in for the model's own, averaged ones for example.

    Raises:
        ValueError: If an argument is not of these, or a noise prediction ends in pure noise.

    Example:
        >>> schedule = NoiseSchedule(torch.linspace(0.999, 0.001, 1000))
        >>> denoiser = Denoiser(lambda x, t: torch.zeros_like(x), schedule)
        >>> denoiser.sample(torch.ones(1, 1, 2, 2), steps=10).shape
        torch.Size([1, 1, 2, 2])

    """

    level_bits: Tensor | None

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        scheduler: Scheduler,
        prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow"] = "auto",
        mu: float | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if weights is not None and not isinstance(model, nn.Module):
            raise ValueError("Denoiser: `weights` must be None where the model is a function, which has no parameters.")
        if not callable(model):
            raise ValueError(f"Denoiser: `model` must be a network or a function, got {model!r:.80}.")
        self.prediction = prediction_of(scheduler, prediction)
        self.scheduler, self.mu, self.weights = scheduler, mu, None if weights is None else dict(weights)
        self.model = model
        self._names = _argument_names(model)
        levels = getattr(scheduler, "alphas_cumprod", None)
        # Their bits: a network that is moved to half precision keeps its levels.
        bits = None if levels is None else levels.detach().double().view(torch.int64)
        self.register_buffer("level_bits", bits, persistent=False)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at times ``(N,)``, in float64."""
        bits = self.level_bits
        if bits is None:
            return flow_levels(times, self.scheduler)
        signal = bits.view(torch.float64)[times]
        return signal.sqrt(), (1 - signal).sqrt()

    def noised(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        r"""Samples with noise, :math:`\alpha_t x + \sigma_t e`, in float32 at least; times ``(B,)``."""
        x = _wide(x)
        alpha, sigma = self._columns(times, x)
        return alpha * x + sigma * noise.to(x.dtype)

    def _columns(self, times: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (level.to(x.device, x.dtype) for level in self.levels(times))
        shape = (-1, *[1] * (x.dim() - 1))
        return alpha.reshape(shape), sigma.reshape(shape)

    def predict(self, x: Tensor, times: Tensor, condition: Condition = None) -> Prediction:
        """What the model says of noisy samples ``(B, ...)`` at times ``(B,)`` or ``()``."""
        times = times.to(x.device).expand(len(x))
        x = _wide(x)
        output = self._run(x, times, spread(condition, len(x)))
        return Prediction(x, output, *self._columns(times, x), self.prediction)

    def _run(self, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
        param = next(iter([*self.parameters(), x]))  # in a form that torch 2.7 compiles, too
        dtype = param.dtype if param.is_floating_point() else x.dtype

        def cast(value: Tensor) -> Tensor:
            return value.to(dtype) if value.is_floating_point() else value

        arguments: dict[str, Any] = {}
        extra: list[Any] = []
        if isinstance(condition, Mapping):
            arguments = {name: cast(value) for name, value in condition.items()}
        elif condition is not None:
            wanted = "encoder_hidden_states" if condition.is_floating_point() else "class_labels"
            if wanted in self._names:
                arguments[wanted] = cast(condition)
            else:
                extra.append(cast(condition))
        if "timestep" in self._names:
            arguments["timestep"] = times
        else:
            extra.insert(0, times)
        if self.weights is not None and isinstance(self.model, nn.Module):
            weights = {name: value.to(x.device) for name, value in self.weights.items()}
            result = torch.func.functional_call(self.model, weights, (cast(x), *extra), arguments)
        else:
            result = self.model(cast(x), *extra, **arguments)
        output = _wide(_first(result)).to(x.dtype)
        is_split = output.dim() > 1 and output.shape[1] == 2 * x.shape[1]
        return output.chunk(2, 1)[0] if is_split else output

    @override
    def forward(self, x: Tensor, times: Tensor, condition: Condition = None) -> Tensor:
        """The noise that is predicted, ``(B, ...)``."""
        return self.predict(x, times, condition).noise

    # -- guidance and sampling ----------------------------------------------------------------------------------------

    def both(
        self, x: Tensor, times: Tensor, condition: Condition, null: Condition, *, batched: bool = True
    ) -> tuple[Prediction, Prediction]:
        """The predictions under a condition and without one (or under a negative one), in one pass of 2 B rows.

        Args:
            x: Noisy samples ``(B, ...)``.
            times: Of each, ``(B,)``, or one.
            condition: A row for each.
            null: A row for each, or one for all.
            batched: Whether both are one pass; prompts of different lengths are two.

        Returns:
            Both.

        """
        count = len(x)
        condition, null = spread(condition, count), spread(null, count)
        if not batched or not can_join(condition, null):
            return self.predict(x, times, condition), self.predict(x, times, null)
        two = self.predict(torch.cat([x, x]), times.expand(count).repeat(2), joined([condition, null]))
        return two.rows(slice(count)), two.rows(slice(count, None))

    def guided(
        self,
        x: Tensor,
        times: Tensor,
        condition: Condition,
        null: Condition,
        scale: float,
        rescale: float = 0.0,
        *,
        batched: bool = True,
    ) -> Prediction:
        """The prediction with guidance, :math:`o_n + s (o_c - o_n)`; at scale 1 the conditional one alone is asked for.

        Args:
            x: Noisy samples ``(B, ...)``.
            times: Of each, ``(B,)``, or one.
            condition: A row for each.
            null: What stands for no condition, or a negative prompt.
            scale: s, of diffusers' ``guidance_scale``.
            rescale: diffusers' ``guidance_rescale``, in [0, 1].
            batched: Whether both passes are one.

        Returns:
            The prediction.

        """
        if scale == 1:
            return self.predict(x, times, condition)
        self.check_guidable()
        with_it, without = self.both(x, times, condition, null, batched=batched)
        return guided_prediction(with_it, without, scale, rescale)

    def check_guidable(self) -> None:
        """Refuses models whose guidance is built in.

        Raises:
            ValueError: If the model takes the scale of guidance as an input.

        """
        config = getattr(self.model, "config", None)
        for name in ("guidance_embeds", "time_cond_proj_dim"):
            if getattr(config, name, None):
                raise ValueError(
                    f"Denoiser: {type(self.model).__name__} was distilled with guidance ({name} in its config): it"
                    " takes the scale as an input, and its passes without a condition mean nothing. Hand the scale"
                    " over by the condition's mapping, and leave guidance out (`scale=1`)."
                )

    def path(self, steps: int, *, joined: bool = False) -> Path:
        """The steps of the scheduler, see :func:`~lightning_reg.diffusion._schedule.path_of`."""
        return path_of(self.scheduler, steps, self.mu, joined=joined)

    def sample(
        self,
        noise: Tensor,
        condition: Condition = None,
        null: Condition = None,
        scale: float = 1.0,
        steps: int = 50,
        rescale: float = 0.0,
        guide: Callable[[Tensor, Tensor, int], Prediction] | None = None,
        *,
        joined: bool = False,
        checkpoint: bool = False,
    ) -> Tensor:
        """Samples by deterministic steps, differentiable in the noise, the conditions and the weights.

        Args:
            noise: Where it starts, ``(B, ...)``.
            condition: A row for each sample.
            null: What stands for no condition, where ``scale`` is not 1.
            scale: Of the guidance.
            steps: How many.
            rescale: diffusers' ``guidance_rescale``.
            guide: Makes the prediction of a step in place of guidance, from x, the time and the number of the step.
            joined: Whether each step ends at the level where the next one starts; the schedulers of diffusers differ
                in that by their spacing.
            checkpoint: Whether a step's activations are computed again in the backward pass, so that memory does not
                grow with the steps.

        Returns:
            Samples of the noise's shape, in float32 at least.

        """
        path = self.path(steps, joined=joined)
        x = _wide(noise)

        def step(x: Tensor, number: int) -> Tensor:
            time = path.times[number].to(x.device)
            made = guide(x, time, number) if guide else self.guided(x, time, condition, null, scale, rescale)
            return made.at(float(path.alphas[number, 1]), float(path.sigmas[number, 1]))

        for number in range(len(path)):
            is_kept = checkpoint and torch.is_grad_enabled()
            x = recomputed(step, x, number, use_reentrant=False) if is_kept else step(x, number)
        return x


def guided_prediction(
    with_it: Prediction, without: Prediction, scale: float | Tensor, rescale: float = 0.0
) -> Prediction:
    """Guidance of two predictions; ``rescale`` moves the standard deviation of each row towards the conditional one."""
    output = without.output + scale * (with_it.output - without.output)
    if rescale:
        dims = list(range(1, output.dim()))
        ratio = with_it.output.std(dims, keepdim=True) / output.std(dims, keepdim=True)
        output = rescale * output * ratio + (1 - rescale) * output
    return replace(with_it, output=output)


def _argument_names(model: nn.Module | Callable[..., Any]) -> frozenset[str]:
    function = (uncompiled(model) or model).forward if isinstance(model, nn.Module) else model
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of C
        return frozenset()


def _first(result: Any) -> Tensor:  # noqa: ANN401 # the model's own
    output = result if isinstance(result, Tensor) else getattr(result, "sample", None)
    output = result[0] if output is None else output
    if not isinstance(output, Tensor):
        raise TypeError(f"Denoiser: the model must return a tensor or an output of diffusers, got {type(result)}.")
    return output


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
