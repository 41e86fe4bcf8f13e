"""Errors of a denoiser under several conditions, with the same noise for all, for any loop."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.diffusion._service import Condition, Denoiser, rows_of
from lightning_reg.engine.host.row_bits import normals

__all__ = ["class_log_posterior", "condition_errors", "stage_times"]

ErrorLoss = Literal["l2", "l1", "huber"]
LOSSES: dict[str, Callable[..., Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def class_log_posterior(errors: Tensor, elements: int, log_prior: Tensor | None = None) -> Tensor:
    r"""Log-probabilities of classes from the errors under each.

    .. math:: \log p(c_j | x) = \operatorname{log\,softmax}_j\bigl(\log p(c_j) - D e_j\bigr)

    Args:
        errors: Mean squared errors per element ``(B, K)``; NaN for classes that were dropped, whose probability is 0.
        elements: D, elements of a sample: the bound is of the **summed** error.
        log_prior: ``(K,)``; ``None`` for a uniform one.

    Returns:
        ``(B, K)``.

    Example:
        >>> class_log_posterior(torch.tensor([[0.0, 0.25, float("nan")]]), elements=4).exp()
        tensor([[0.7311, 0.2689, 0.0000]])

    """
    logits = -elements * errors if log_prior is None else log_prior.to(errors) - elements * errors
    return torch.log_softmax(logits.masked_fill(errors.isnan(), -torch.inf), 1)


def stage_times(total: int, n_samples: Sequence[int]) -> list[list[int]]:
    """Evenly spaced times of each stage, those of earlier stages left out.

    Args:
        total: T, times of the process.
        n_samples: Times on the grid of each stage, rising, at most T. The grids need not be nested.

    Returns:
        The new times of each stage.

    Example:
        >>> stage_times(1000, [2, 4])
        [[375, 875], [125, 625]]

    """
    most = max(n_samples)
    apart = total // most
    grid = list(range(apart // 2, total, apart))[:most]
    stages: list[list[int]] = []
    used: set[int] = set()
    for count in n_samples:
        step = len(grid) // count
        stages.append([time for time in grid[step // 2 :: step][:count] if time not in used])
        used.update(stages[-1])
    return stages


def condition_errors(
    denoiser: Denoiser,
    x: Tensor,
    conditions: Condition,
    candidates: Tensor,
    times: Tensor,
    indices: Tensor,
    loss: ErrorLoss = "l2",
    n_trials: int = 1,
    chunk: int = 512,
    seed: int = 0,
) -> Tensor:
    r"""Errors of the noise that is predicted, under each condition, summed over times and trials.

    .. math:: \sum_i \operatorname{mean} \ell\bigl(e_i, e_\theta(x_{t_i}, t_i, c_j)\bigr)

    The noise depends on the seed, the sample's number, the time and the trial, and on nothing else: it is the same for
    all conditions, so that errors that have nothing to do with the condition cancel in differences.

    Args:
        denoiser: The denoiser; it runs once over ``B K N n_trials`` rows.
        x: Clean samples ``(B, ...)``.
        conditions: A table of conditions, a row for each.
        candidates: Rows of it to be tried for each sample, ``(B, K)``.
        times: ``(N,)`` whole numbers.
        indices: A number for each sample ``(B,)``, which its noise is drawn from; samples with the same one share it.
        loss: ``"l2"``, ``"l1"`` or ``"huber"`` (of width 1).
        n_trials: Noises for each time.
        chunk: Rows that the denoiser gets at once.
        seed: Of the noise.

    Returns:
        ``(B, K)`` in float64.

    """
    count, classes = candidates.shape
    trials = len(times) * n_trials
    draws = torch.arange(count * trials, device=x.device)  # one for each sample, time and trial, in this order
    per_call = max(1, chunk // classes)
    parts = [
        _errors(
            denoiser, x, conditions, candidates, times, indices, loss, n_trials, chunk, seed, draws[at : at + per_call]
        )
        for at in range(0, len(draws), per_call)
    ]
    return torch.cat(parts).reshape(count, trials, classes).sum(1)


def _errors(
    denoiser: Denoiser,
    x: Tensor,
    conditions: Condition,
    candidates: Tensor,
    times: Tensor,
    indices: Tensor,
    loss: ErrorLoss,
    n_trials: int,
    chunk: int,
    seed: int,
    draws: Tensor,
) -> Tensor:
    trials, classes = len(times) * n_trials, candidates.shape[1]
    sample = draws // trials
    at = times[draws % trials // n_trials]
    # The noise is that of a sample, a time and a trial, whatever else is in the batch.
    keys = (indices[sample] * 2**20 + at) * 8 + draws % n_trials
    dtype = torch.promote_types(x.dtype, torch.float32)
    noise = normals(seed, keys, x.shape[1:], dtype)
    noisy = denoiser.noised(x[sample], noise, at).repeat_interleave(classes, 0)
    wanted, asked = candidates[sample].flatten(), at.repeat_interleave(classes)
    predicted = [
        denoiser(noisy[n : n + chunk], asked[n : n + chunk], rows_of(conditions, wanted[n : n + chunk]))
        for n in range(0, len(noisy), chunk)
    ]
    target = noise.repeat_interleave(classes, 0)
    errors = LOSSES[loss](torch.cat(predicted), target, reduction="none")
    return errors.flatten(1).double().mean(1).reshape(-1, classes)
