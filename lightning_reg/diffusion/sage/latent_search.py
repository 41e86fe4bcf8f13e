"""Procedures: noise is searched from which a model makes something else, and what was found is examined."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_reg.diffusion._service import Condition, Denoiser, repeated, rows_of, spread
from lightning_reg.diffusion.sage._judged import Judge, JudgedSampler, check_search, frozen
from lightning_reg.diffusion.sage.core import ensemble_prob, is_failure, sphere_step, to_sphere
from lightning_reg.engine.host.procedures import procedure

__all__ = ["SearchResult", "conditions_failed", "latent_search", "random_failures", "region_size"]


class SearchResult(NamedTuple):
    """What a search has found, a row for each start.

    Args:
        noise: Where samples start now, ``(B, ...)``.
        samples: What is made of it, ``(B, ...)``.
        found: Whether that is a failure, bool ``(B,)``.
        iteration: At which step it became one, ``(B,)``; -1 for none.
        history: q at each step, ``(B, iterations + 1)``; from a failure on it stays.
        confirmed: Whether the held-out judge does not see the class either, bool ``(B,)``; all ``False`` without one.

    """

    noise: Tensor
    samples: Tensor
    found: Tensor
    iteration: Tensor
    history: Tensor
    confirmed: Tensor

    def rates(self) -> dict[str, float]:
        """Share of starts that fail by the judges (SSR(A)), and of these the share that is confirmed."""
        count = int(self.found.sum())
        confirmed = int((self.found & self.confirmed).sum())
        return {"found": count / len(self.found), "confirmed": confirmed / count if count else 0.0}

    def save(self, path: str | Path) -> None:
        """Writes everything as safetensors, so that failures can be made again."""
        save_file({name: value.contiguous().cpu() for name, value in self._asdict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "SearchResult":
        """Reads what :meth:`save` has written."""
        return cls(**load_file(path))


@procedure
def latent_search(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    labels: Tensor,
    judges: Sequence[Judge],
    null: Condition = None,
    scale: float = 1.0,
    sampler_steps: int = 20,
    iterations: int = 25,
    step: float = 0.045,
    residual: float = 1.0,
    sampler_gradient: bool = False,
    threshold: float = 0.5,
    held_out: Judge | None = None,
) -> SearchResult:
    r"""Moves noise on its sphere until the model makes of it what judges do not take for the requested class.

    .. math:: z \leftarrow \Pi\Bigl(z - a \|z\| \frac{g}{\|g\|}\Bigr), \qquad
        g = \nabla_z\, q\bigl(G(z) + \lambda (z - \mathrm{sg}(z))\bigr)

    By default the gradient goes around the sampler alone, as in the paper, whose residual connection spares the
    backward pass through all steps. With ``sampler_gradient=True`` it goes through the sampler as well, at three times
    the time and the memory of one step. A row that fails stays as it is.

    Judges err too: failures are the generator's where different judges agree, and where ``held_out``, which the search
    has never seen, confirms them. Compare with :func:`random_failures` at the same number of samples.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        A reconstruction: no code was released, the paper was read in parts. The gradient through the sampler, the
        sphere in place of a bound on the noise, step, threshold and the rule "no judge sees it" are ours.

    Args:
        module: The denoiser.
        noise: Where samples start, ``(B, ...)``; see :func:`to_sphere`.
        condition: A row for each.
        labels: The class that each is to show, ``(B,)``.
        judges: Classifiers: functions or networks that give samples class scores ``(B, C)``, differentiable.
        null: What stands for no condition, where ``scale`` is not 1.
        scale: Of the guidance.
        sampler_steps: Of the deterministic sampler, at least 1.
        iterations: Steps of the search, at least 1.
        step: a, in the unit of the noise's norm, above 0.
        residual: :math:`\lambda`, at least 0, above it without ``sampler_gradient``; alone its size does not matter.
        sampler_gradient: Whether the gradient goes through the sampler.
        threshold: Of q, in [0, 1], below which a sample is a failure.
        held_out: A judge that takes no part in the search.

    Returns:
        What was found.

    Raises:
        ValueError: If an argument is outside its range.

    """
    counts = {"sampler_steps": sampler_steps, "iterations": iterations}
    check_search("latent_search", judges, counts, {"step": step}, threshold)
    if not residual >= 0 or (residual == 0 and not sampler_gradient):
        least = "at least 0" if sampler_gradient else "above 0 where `sampler_gradient` is False"
        raise ValueError(f"latent_search: `residual` must be {least}, got {residual!r}.")
    module.eval()
    sampler = JudgedSampler(module, judges, null, scale, sampler_steps)
    count = len(noise)
    z = noise.detach().to(torch.promote_types(noise.dtype, torch.float32)).clone()
    condition, labels = spread(condition, count), labels.expand(count)
    samples, history = torch.empty_like(z), z.new_empty(count, iterations + 1)
    iteration, active = torch.full((count,), -1, device=z.device), torch.arange(count, device=z.device)
    with frozen([*judges, *([held_out] if held_out else [])]):
        for number in range(iterations + 1):
            start = z[active].requires_grad_()
            made = sampler.samples(start, rows_of(condition, active), residual, through=sampler_gradient)
            logits, wanted = sampler.logits(made), labels[active]
            q, failed = ensemble_prob(logits, wanted), is_failure(logits, wanted, threshold)
            samples[active], history[active, number:] = made.detach(), q.detach()[:, None].to(z.dtype)
            iteration[active[failed]] = number
            if number == iterations or bool(failed.all()):
                break
            # The sum: each row's gradient is its own.
            (gradient,) = torch.autograd.grad(q[~failed].sum(), start)
            active = active[~failed]
            z[active] = sphere_step(z[active], gradient[~failed], step)
        found = iteration >= 0
        with torch.no_grad():
            confirmed = found & (held_out(samples).argmax(1) != labels) if held_out else torch.zeros_like(found)
    return SearchResult(z, samples, found, iteration, history, confirmed)


@procedure
def random_failures(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    labels: Tensor,
    judges: Sequence[Judge],
    null: Condition = None,
    scale: float = 1.0,
    sampler_steps: int = 20,
    threshold: float = 0.5,
) -> Tensor:
    """Which samples of given noise are failures: what a search is compared with.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        A reconstruction, see :func:`latent_search`.

    Args:
        module: The denoiser.
        noise: ``(B, ...)``.
        condition: A row for each.
        labels: ``(B,)``.
        judges: As for :func:`latent_search`.
        null: What stands for no condition.
        scale: Of the guidance.
        sampler_steps: At least 1.
        threshold: Of q, in [0, 1].

    Returns:
        bool ``(B,)``.

    Raises:
        ValueError: If an argument is outside its range.

    """
    check_search("random_failures", judges, {"sampler_steps": sampler_steps}, {}, threshold)
    module.eval()
    sampler = JudgedSampler(module, judges, null, scale, sampler_steps)
    with torch.no_grad(), frozen(judges):
        return is_failure(sampler.logits(sampler.samples(noise, condition)), labels.expand(len(noise)), threshold)


@procedure
def region_size(
    module: Denoiser,
    noise: Tensor,
    condition: Condition,
    labels: Tensor,
    judges: Sequence[Judge],
    radii: Sequence[float] = (0.1, 0.2, 0.4),
    draws: int = 16,
    null: Condition = None,
    scale: float = 1.0,
    sampler_steps: int = 20,
    threshold: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """The share of noise around each row that fails as well, at growing distances on the sphere.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        A reconstruction: the paper estimates the size of connected regions by a sampling that was not read.

    Args:
        module: The denoiser.
        noise: Found noise, ``(B, ...)``.
        condition: A row for each.
        labels: ``(B,)``.
        judges: As for :func:`latent_search`.
        radii: Lengths of the steps away, in the unit of the noise's norm.
        draws: Directions, at least 1; the same for all rows.
        null: What stands for no condition.
        scale: Of the guidance.
        sampler_steps: At least 1.
        threshold: Of q, in [0, 1].
        seed: Of the directions.

    Returns:
        Shares ``(B, R)``.

    Raises:
        ValueError: If an argument is outside its range.

    """
    counts = {"sampler_steps": sampler_steps, "draws": draws}
    check_search("region_size", judges, counts, {"radii": min(radii, default=0.0)}, threshold)
    count, generator = len(noise), torch.Generator().manual_seed(seed)
    directions = torch.randn(draws, *noise.shape[1:], generator=generator).to(noise.device)
    many, wanted = repeated(spread(condition, count), draws), labels.expand(count).repeat_interleave(draws)
    starts, away = to_sphere(noise.float()).repeat_interleave(draws, 0), torch.cat([directions] * count)
    shares = []
    for radius in radii:
        moved = sphere_step(starts, away, radius)
        failed = random_failures(module, moved, many, wanted, judges, null, scale, sampler_steps, threshold)
        shares.append(failed.view(count, draws).double().mean(1))
    return torch.stack(shares, 1)


@procedure
def conditions_failed(
    module: Denoiser,
    noise: Tensor,
    conditions: Condition,
    labels: Tensor,
    judges: Sequence[Judge],
    null: Condition = None,
    scale: float = 1.0,
    sampler_steps: int = 20,
    threshold: float = 0.5,
) -> Tensor:
    """For how large a share of conditions noise fails: near 1 it distorts images whatever is asked for.

    Near 0 the found image is a natural one that has nothing to do with its own condition.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        A reconstruction, see :func:`latent_search`; the share is ours.

    Args:
        module: The denoiser.
        noise: ``(B, ...)``.
        conditions: Other conditions than the one it was found for, a row for each of m.
        labels: Of these conditions, ``(m,)``.
        judges: As for :func:`latent_search`.
        null: What stands for no condition.
        scale: Of the guidance.
        sampler_steps: At least 1.
        threshold: Of q, in [0, 1].

    Returns:
        Shares ``(B,)``.

    Raises:
        ValueError: If an argument is outside its range.

    """
    check_search("conditions_failed", judges, {"sampler_steps": sampler_steps}, {}, threshold)
    count = len(labels)
    many = rows_of(spread(conditions, count), torch.arange(count, device=noise.device).repeat(len(noise)))
    failed = random_failures(
        module,
        noise.repeat_interleave(count, 0),
        many,
        labels.repeat(len(noise)),
        judges,
        null,
        scale,
        sampler_steps,
        threshold,
    )
    return failed.view(len(noise), count).double().mean(1)
