"""Procedures: null-text inversion, and sampling by what it has found."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_reg.diffusion._service import (
    Condition,
    Denoiser,
    Path,
    Prediction,
    can_join,
    count_of,
    guided_prediction,
    spread,
)
from lightning_reg.diffusion.null_text_inversion.core import ddim_invert, null_text_rate
from lightning_reg.diffusion.null_text_inversion.null_text_inversion import NullTextInversion
from lightning_reg.engine.host.procedures import procedure

__all__ = ["null_text_invert", "null_text_sample"]

Null: TypeAlias = dict[str, Tensor]
_ALONE = ""  # the name of an embedding that is a tensor, not a mapping


@procedure
def null_text_invert(
    module: Denoiser,
    x: Tensor,
    condition: Condition,
    null: Condition,
    guidance: float = 7.5,
    steps: int = 50,
    inner_steps: int = 10,
    lr: float = 1e-2,
    early_stop: tuple[float, float] = (1e-5, 2e-5),
    resume: NullTextInversion | None = None,
    stop_after: int | None = None,
    *,
    warm_start: bool = True,
    fixed_point_iterations: int = 0,
) -> NullTextInversion:
    r"""Finds noise, and what stands for no condition at each step, from which guided sampling gives samples again.

    The pivots are the samples inverted without guidance (:func:`ddim_invert`). From the last one down, at each step the
    null embedding U is moved by Adam until the guided step meets the next pivot:

    .. math:: \min_U \operatorname{mean}\bigl(z^*_{t-1} - D(z_t, e(z_t, U) + w (e(z_t, c) - e(z_t, U)))\bigr)^2

    and sampling goes on from where that step led. The weights and the condition stay, so that the sample can be edited
    by its condition: :func:`null_text_sample` with another one, or :func:`prompt_to_prompt`.

    Each sample of a batch has an embedding, a loss and an end of its own. Activations of one pass are held at a time,
    and what is found lies on the CPU: memory does not grow with the steps. Leave it at guidance 1, where inversion
    alone reconstructs; it lives on autograd through the denoiser, so a batch takes what a training step takes.

    Source:
        Mokady et al., "Null-text Inversion for Editing Real Images using Guided Diffusion Models", CVPR 2023, arXiv
        2211.09794, algorithm 1 and section 3.

    Differs:
        Any number of steps (the paper's rates are those of 50, see :func:`null_text_rate`), any guidance, predictions
        of noise, velocity, samples and flows; batches. The constants were read from copies of the authors' notebook.

    Args:
        module: The denoiser.
        x: Samples ``(B, ...)``; of latent models their latents.
        condition: A row for each, embeddings of the prompts.
        null: What stands for no condition, one row or one for each: embeddings ``(1, L, d)``, or several by name;
            masks and whole numbers among these stay as they are.
        guidance: w, at least 1. Paper: 7.5.
        steps: S, of the sampler. Paper: 50.
        inner_steps: Updates at each step, at most. Paper: 10. 0: guided sampling from inverted noise.
        lr: Of Adam at the first step, above 0. Paper: 0.01.
        early_stop: The loss below which a step ends, and by how much it rises at each of 50 steps; both at least 0.
            Paper: 1e-5 and 2e-5.
        resume: What a call with ``stop_after`` has given, for the same samples, steps, guidance and iterations.
        stop_after: Steps in this call, at most; ``None``: all.
        warm_start: Whether a step begins with the embedding of the one before, as in the paper, or with ``null``.
        fixed_point_iterations: Further passes at each step of the inversion, see :func:`ddim_invert`; at least 0.

    Returns:
        The inversion.

    Raises:
        ValueError: If an argument is outside its range, the conditions are no embeddings, or ``resume`` is of other
            samples, steps, guidance or iterations.

    Example:
        >>> from lightning_reg import NoiseSchedule
        >>> denoiser = Denoiser(lambda x, t, c: x.tanh() + c, NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
        >>> x, prompt, none = torch.ones(1, 2), torch.full((1, 2), 0.5), torch.zeros(1, 2)
        >>> plain, found = (null_text_invert(denoiser, x, prompt, none, steps=10, inner_steps=n) for n in (0, 50))
        >>> bool((found.current - x).norm() < 0.1 * (plain.current - x).norm())
        True

    """
    _check(guidance, steps, inner_steps, lr, early_stop, stop_after, fixed_point_iterations)
    leaves = _as_leaves(null, len(x), x.device)
    module.eval()
    module.requires_grad_(requires_grad=False)
    module.check_guidable()
    if resume is None:
        with torch.no_grad():
            pivots = ddim_invert(module, x, condition, steps, fixed_point_iterations)
        nothing = torch.zeros(len(x), 0)
        state = NullTextInversion(pivots, None, pivots[:, 0], nothing, nothing, guidance, fixed_point_iterations)
    else:
        state = _checked(resume, x, steps, guidance, fixed_point_iterations)
    last = state.done and _named(state.null_at(state.done - 1))
    current = last if last and warm_start else leaves
    rows: list[Null] = []
    z, losses, updates = state.current.to(x.device), [state.losses], [state.updates]
    path = module.path(steps, joined=True)
    end = steps if stop_after is None else min(steps, state.done + stop_after)
    for number in range(state.done, end):
        rate, threshold = null_text_rate(lr, early_stop, number, steps)
        step = _step_of(module, z, path, number, condition, guidance)
        pivot = state.pivots[:, number + 1].to(z)
        start = {
            name: value.to(z if _is_moved(name, value) else z.device)
            for name, value in (current if warm_start else leaves).items()
        }
        current, count = _searched(step, pivot, start, inner_steps, rate, threshold)
        with torch.no_grad():
            z = step(_plain(current))
        rows.append({name: value.cpu() for name, value in current.items()})
        losses.append(_distances(z, pivot)[:, None].cpu())
        updates.append(count[:, None].cpu())
    joined = torch.cat(losses, 1), torch.cat(updates, 1)
    return state._replace(null=_joined_steps(state, rows), current=z.cpu(), losses=joined[0], updates=joined[1])


def _step_of(
    denoiser: Denoiser, z: Tensor, path: Path, number: int, condition: Condition, guidance: float
) -> Callable[[Condition], Tensor]:
    """The guided step from z as a function of the null embedding; the conditional pass is made once."""
    time = path.times[number]
    with torch.no_grad():
        with_it = denoiser.predict(z, time, condition)

    def step(null: Condition) -> Tensor:
        made = guided_prediction(with_it, denoiser.predict(z, time, null), guidance)
        return made.at(float(path.alphas[number, 1]), float(path.sigmas[number, 1]))

    return step


def _searched(
    step: Callable[[Condition], Tensor], pivot: Tensor, start: Null, inner_steps: int, rate: float, threshold: float
) -> tuple[Null, Tensor]:
    """The embeddings that lead to the pivot, and the updates of each row; a row that is near enough stays."""
    fixed = {name: value for name, value in start.items() if not _is_moved(name, value)}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in start.items() if name not in fixed}
    optimizer = torch.optim.Adam(leaves.values(), rate)
    is_open = torch.ones(len(pivot), dtype=torch.bool, device=pivot.device)
    count = torch.zeros(len(pivot), device=pivot.device)
    for _ in range(inner_steps):
        distances = _distances(step(_plain(leaves | fixed)), pivot)  # summed, each row has its own gradient
        gradients = torch.autograd.grad(distances.sum(), list(leaves.values()))
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.grad = gradient
        before = [leaf.detach().clone() for leaf in leaves.values()]
        optimizer.step()
        with torch.no_grad():
            for leaf, value in zip(leaves.values(), before, strict=True):
                leaf.copy_(torch.where(is_open.reshape(-1, *[1] * (leaf.dim() - 1)), leaf, value))
        count += is_open
        is_open &= distances.detach() >= threshold
        if not bool(is_open.any()):
            break
    return {name: leaf.detach() for name, leaf in leaves.items()} | fixed, count


def _distances(one: Tensor, two: Tensor) -> Tensor:
    return (one - two).square().flatten(1).mean(1)


@procedure
def null_text_sample(module: Denoiser, inversion: NullTextInversion, condition: Condition) -> Tensor:
    """Samples from an inversion: under its own condition the reconstruction, under another one an edit.

    Source:
        Mokady et al., "Null-text Inversion for Editing Real Images using Guided Diffusion Models", CVPR 2023, arXiv
        2211.09794.

    Differs:
        Nothing.

    Args:
        module: The denoiser.
        inversion: What :func:`null_text_invert` has found, finished.
        condition: A row for each sample.

    Returns:
        Samples ``(B, ...)``, in float32 at least.

    Raises:
        ValueError: If the inversion is not finished.

    Example:
        >>> from lightning_reg import NoiseSchedule
        >>> denoiser = Denoiser(lambda x, t, c: x.tanh() + c, NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
        >>> prompt = torch.full((1, 2), 0.5)
        >>> found = null_text_invert(denoiser, torch.ones(1, 2), prompt, torch.zeros(1, 2), steps=10)
        >>> torch.allclose(null_text_sample(denoiser, found, prompt), found.current, atol=1e-5)
        True

    """
    check_finished("null_text_sample", inversion)
    module.eval()
    z, path = inversion.noise.to(device_of(condition, module)), module.path(inversion.steps, joined=True)
    condition = spread(condition, len(z))
    with torch.no_grad():
        for number in range(inversion.steps):
            z = sampled_step(module, z, path, number, condition, inversion)
    return z


def sampled_step(
    denoiser: Denoiser,
    z: Tensor,
    path: Path,
    number: int,
    condition: Condition,
    inversion: NullTextInversion,
    watch: AbstractContextManager[object] | None = None,
) -> Tensor:
    """One guided step; ``watch`` is around the pass that has the conditional rows, which come first in it."""
    null = _plain({name: value.to(z.device) for name, value in _named(inversion.null_at(number)).items()})
    time = path.times[number]
    is_one = can_join(condition, null)
    with watch or nullcontext():
        pair = denoiser.both(z, time, condition, null) if is_one else (denoiser.predict(z, time, condition), None)
    without = pair[1] or denoiser.predict(z, time, null)
    made: Prediction = guided_prediction(pair[0], without, inversion.guidance)
    return made.at(float(path.alphas[number, 1]), float(path.sigmas[number, 1]))


def device_of(condition: Condition, module: Denoiser) -> torch.device:
    """Where a condition lies; where there is none, the denoiser."""
    rows = [*_named(condition).values(), *module.parameters(), *module.buffers()]
    return rows[0].device


def check_finished(name: str, inversion: NullTextInversion) -> None:
    """Refuses an inversion that was stopped."""
    if not inversion.is_finished:
        raise ValueError(
            f"{name}: `inversion` must be finished, got {inversion.done} of {inversion.steps} steps. Hand it to"
            " `null_text_invert` as `resume` first."
        )


# -- arguments ---------------------------------------------------------------------------------------------------------


def _check(
    guidance: float,
    steps: int,
    inner_steps: int,
    lr: float,
    early_stop: tuple[float, float],
    stop_after: int | None,
    fixed_point_iterations: int,
) -> None:
    ranges = {
        "guidance": (guidance >= 1, "at least 1", guidance),
        "steps": (steps >= 1, "at least 1", steps),
        "inner_steps": (inner_steps >= 0, "at least 0", inner_steps),
        "lr": (lr > 0, "above 0", lr),
        "early_stop": (min(early_stop) >= 0, "two numbers of at least 0", early_stop),
        "stop_after": (stop_after is None or stop_after >= 1, "at least 1, or None", stop_after),
        "fixed_point_iterations": (fixed_point_iterations >= 0, "at least 0", fixed_point_iterations),
    }
    for name, (is_fine, wanted, value) in ranges.items():
        if not is_fine:
            raise ValueError(f"null_text_invert: `{name}` must be {wanted}, got {value!r}.")


def _as_leaves(null: Condition, count: int, device: torch.device) -> Null:
    """The embedding of each row by name, in float32 at least; masks and numbers beside it stay as they are."""
    rows = _named(spread(null, count))
    for name, value in rows.items():
        if not value.is_floating_point() and not any(_is_moved(*row) for row in rows.items()):
            where = f"of {name!r} " if name else ""
            raise ValueError(
                f"null_text_invert: `null` must be embeddings, which can be moved, got labels {where}({value.dtype})."
                " Hand over rows of the model's embedding table, and to the Denoiser a function (x, t, embedding)."
            )
    if not rows or count_of(null) is None:
        raise ValueError("null_text_invert: `null` must be embeddings with a row for each sample or one, got none.")
    wide = {
        name: torch.promote_types(value.dtype, torch.float32) if _is_moved(name, value) else value.dtype
        for name, value in rows.items()
    }
    return {name: value.detach().to(device, wide[name]).contiguous() for name, value in rows.items()}


def _is_moved(name: str, value: Tensor) -> bool:
    return value.is_floating_point() and "mask" not in name


def _checked(
    resume: NullTextInversion, x: Tensor, steps: int, guidance: float, fixed_point_iterations: int
) -> NullTextInversion:
    found = (resume.steps, resume.guidance)
    if found != (steps, guidance):
        raise ValueError(
            f"null_text_invert: `resume` must be of {steps} steps and guidance {guidance!r}, got {found[0]} and"
            f" {found[1]!r}."
        )
    if resume.fixed_point_iterations != fixed_point_iterations:
        raise ValueError(
            f"null_text_invert: `resume` must be of `fixed_point_iterations={fixed_point_iterations}`, got"
            f" {resume.fixed_point_iterations}."
        )
    if not torch.equal(resume.pivots[:, -1], x.cpu().to(resume.pivots)):
        raise ValueError("null_text_invert: `resume` must be of the samples `x`, got an inversion of other ones.")
    return resume


def _named(condition: Condition) -> Null:
    if isinstance(condition, Mapping):
        return dict(condition)
    return {} if condition is None else {_ALONE: condition}


def _plain(rows: Null) -> Condition:
    return rows.get(_ALONE, rows)


def _joined_steps(state: NullTextInversion, rows: list[Null]) -> Condition:
    """The embeddings of all steps, behind one another in dimension 1."""
    if not rows:
        return state.null
    new = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
    old = _named(state.null)
    return _plain({name: torch.cat([old[name], value], 1) if old else value for name, value in new.items()})
