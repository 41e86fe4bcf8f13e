"""DiffusionClassifier: a denoiser as a classifier, with nothing trained."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.diffusion._service import Condition, Denoiser, count_of
from lightning_reg.diffusion.diffusion_classifier.core import LOSSES, ErrorLoss, condition_errors, stage_times
from lightning_reg.engine.host.arguments import check_choice, check_number

__all__ = ["DiffusionClassifier"]


class DiffusionClassifier(nn.Module):
    r"""Makes a conditional denoiser a classifier: the class under whose condition it errs least in predicting noise.

    .. math:: \arg\min_j e_j, \qquad e_j = \frac1N \sum_i \operatorname{mean} \bigl(e_i - e_\theta(x_{t_i}, t_i,
              c_j)\bigr)^2

    Times are evenly spaced, and the noise is the same for every class, so that differences vary less. In stages, all
    classes are tried at a few times, and those with the least errors so far at more. Calling it gives logits ``(B,
    C)``, the negative summed errors, -inf for classes that were dropped; their softmax is the posterior under a uniform
    prior.

    Use it as a classifier without training, or to see whether a model heeds its condition. Leave it where latency
    matters: :meth:`calls` says how many rows the denoiser sees for one image. Guidance is off, as it must be.

    Source:
        Li, Prabhudesai, Duggal, Brown and Pathak, "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV
        2023, arXiv 2303.16203.

    Differs:
        The noise is drawn from a number of each sample in place of a saved file, and shared by all samples unless they
        are numbered. Errors are summed in float64. Time grids are those of the released code.

    Args:
        denoiser: The denoiser, with the encoded image's mean times its factor where it works on latents.
        conditions: A row for each class (labels, embeddings of prompts), or a mapping of such tensors.
        n_samples: Times of each stage, rising, each at most the number of times of the process. Paper: 25 and 250, or
            50 and 500 (CIFAR-10).
        keep: Classes that are left after each stage, falling, the last 1. Paper: 5 and 1.
        loss: ``"l2"``, ``"l1"`` (paper: CIFAR-10, Pets, Flowers) or ``"huber"``. Posteriors are those of ``"l2"``.
        class_of: The class of each condition, where a class has several prompts: the best one counts. ``None``: each is
            a class.
        n_trials: Noises for each time, 1 to 8. Paper: 1.
        chunk: Rows that the denoiser gets at once, at least 1.
        seed: Of the noise.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_reg import Denoiser, NoiseSchedule
        >>> schedule = NoiseSchedule(torch.linspace(0.999, 0.001, 1000))
        >>> def denoise(x, t, label):  # samples of class c are 2 c - 1 everywhere
        ...     alpha, sigma = (level.float()[:, None] for level in (schedule.alphas_cumprod[t].sqrt(), (1 -
        ...         schedule.alphas_cumprod[t]).sqrt()))
        ...     return (x - alpha * (2 * label[:, None] - 1)) / sigma
        >>> classifier = DiffusionClassifier(Denoiser(denoise, schedule), torch.arange(2), n_samples=[10], keep=[1])
        >>> classifier(torch.tensor([[0.9, 0.8], [-1.1, -0.7]])).argmax(1), classifier.calls()
        (tensor([1, 0]), 20)

    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditions: Tensor | Mapping[str, Tensor],
        n_samples: Sequence[int] = (10, 50),
        keep: Sequence[int] = (5, 1),
        loss: ErrorLoss = "l2",
        class_of: Sequence[int] | None = None,
        n_trials: int = 1,
        chunk: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._table: Condition = conditions
        rows = count_of(conditions)
        if not rows:
            raise ValueError("DiffusionClassifier: `conditions` must have a row for each class, got none.")
        check_choice(self, "loss", loss, tuple(LOSSES))
        check_number(self, "n_trials", n_trials, low=1, high=8, integer=True)
        check_number(self, "chunk", chunk, low=1, integer=True)
        check_number(self, "seed", seed, low=0, integer=True)
        check_stages(self, n_samples, keep, int(denoiser.scheduler.config.num_train_timesteps))
        if class_of is not None and (len(class_of) != rows or set(class_of) != set(range(max(class_of) + 1))):
            raise ValueError(
                f"DiffusionClassifier: `class_of` must give each of {rows} conditions a class, 0 to the last with none"
                f" left out, got {list(class_of)}."
            )
        self.denoiser, self.n_samples, self.keep, self.loss = denoiser, tuple(n_samples), tuple(keep), loss
        self.class_of, self.n_trials, self.chunk, self.seed = class_of, n_trials, chunk, seed
        self._rows = rows

    def _plan(self) -> list[tuple[list[int], int]]:
        """The new times of each stage, and how many conditions are left after it."""
        total = int(self.denoiser.scheduler.config.num_train_timesteps)
        left = [min(count, self._rows) for count in self.keep]
        return list(zip(stage_times(total, self.n_samples), left, strict=True))

    def calls(self) -> int:
        """Rows that the denoiser sees for one image: the sum over stages of classes that are left and new times."""
        total, left = 0, self._rows
        for times, keep in self._plan():
            total, left = total + left * len(times) * self.n_trials, keep
        return total

    def errors(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Mean errors under each condition, over all times tried.

        Args:
            x: Clean samples ``(B, ...)``.
            indices: A number for each sample ``(B,)``, from which its noise is drawn; ``None``: all share one noise.

        Returns:
            ``(B, K)`` in float64, NaN for conditions that were dropped before the last stage.

        """
        device = x.device
        numbers = torch.zeros(len(x), dtype=torch.long, device=device) if indices is None else indices.to(device)
        table = _to(self._table, device)
        alive = torch.arange(self._rows, device=device).expand(len(x), -1)
        sums = torch.zeros(alive.shape, dtype=torch.float64, device=device)
        tried = 0
        options = {"loss": self.loss, "n_trials": self.n_trials, "chunk": self.chunk, "seed": self.seed}
        plan = self._plan()
        for stage, (new, keep) in enumerate(plan):
            if new:
                times = torch.tensor(new, device=device)
                more = condition_errors(self.denoiser, x, table, alive, times, numbers, **options)  # type: ignore[arg-type]
                sums, tried = sums + more, tried + len(new) * self.n_trials
            if stage < len(plan) - 1:
                order = sums.topk(keep, 1, largest=False).indices
                sums, alive = sums.gather(1, order), alive.gather(1, order)
        return sums.new_full((len(x), self._rows), torch.nan).scatter(1, alive, sums / tried)

    @override
    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Logits ``(B, C)`` in float32 at least: negative summed errors, -inf for what was dropped."""
        errors = self.errors(x, indices)
        logits = (-x[0].numel() * errors).masked_fill(errors.isnan(), -torch.inf)
        if self.class_of is not None:
            classes = torch.tensor(self.class_of, device=x.device).expand(len(x), -1)
            empty = logits.new_full((len(x), max(self.class_of) + 1), -torch.inf)
            logits = empty.scatter_reduce(1, classes, logits, "amax")
        return logits.to(torch.promote_types(x.dtype, torch.float32))


def check_stages(owner: object, n_samples: Sequence[int], keep: Sequence[int], most: int | None = None) -> None:
    """Raises ``ValueError`` unless samples rise, what is kept falls to 1, and there are as many of both."""
    name = type(owner).__name__
    given: dict[str, object] = {"n_samples": n_samples, "keep": keep}
    for argument, numbers in given.items():
        if not isinstance(numbers, Sequence) or not all(isinstance(n, int) for n in numbers):
            raise ValueError(f"{name}: `{argument}` must be whole numbers, one for each stage, got {numbers!r}.")
    risen = all(a < b for a, b in pairwise(n_samples))
    if not n_samples or not risen or n_samples[0] < 1 or (most is not None and n_samples[-1] > most):
        limit = "" if most is None else f", at most {most}"
        raise ValueError(f"{name}: `n_samples` must be rising whole numbers from 1{limit}, got {list(n_samples)}.")
    fallen = all(a > b for a, b in pairwise(keep))
    if len(keep) != len(n_samples) or not fallen or keep[-1] != 1:
        raise ValueError(
            f"{name}: `keep` must fall to 1, a number for each of {len(n_samples)} stages, got {list(keep)}."
        )


def _to(condition: Condition, device: torch.device) -> Condition:
    if isinstance(condition, Mapping):
        return {name: value.to(device) for name, value in condition.items()}
    return None if condition is None else condition.to(device)
