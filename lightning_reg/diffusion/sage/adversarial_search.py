"""AdversarialSearch: in validation, how often a search finds noise at which the trained generator fails."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.diffusion._in_validation import TriedInValidation
from lightning_reg.diffusion._named import attribute_of, denoiser_of
from lightning_reg.diffusion.sage._judged import Judge
from lightning_reg.diffusion.sage.core import LEAST_OF_TEST, failure_groups, non_gaussian, to_sphere
from lightning_reg.diffusion.sage.failure_report import failure_report
from lightning_reg.diffusion.sage.latent_search import SearchResult, latent_search, random_failures
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.names import as_patterns
from lightning_reg.engine.host.row_bits import normals
from lightning_reg.engine.host.user_functions import user_function

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["AdversarialSearch"]


class AdversarialSearch(TriedInValidation):
    r"""In validations, searches noise from which the denoiser in training makes something else than it was asked.

    Training is left alone, to the last bit. Weights are those that validation runs with, averaged ones where a callback
    puts them in: the search follows the first batch of the first loader. Logged are ``found``, the share of starts at
    which :func:`latent_search` finds a failure; ``random``, the share at which as many random draws do; ``confirmed``,
    the share of found ones that ``held_out`` does not take for the requested class either; ``distinct``, the share of
    found ones that look unlike the others; ``non_gaussian``, the share of found ones whose noise fails a test of
    normality (the paper's NGR; from 20 numbers in a sample on). ``result`` holds what was found last
    (``result.save("failures.safetensors")``), ``labels`` the classes that were asked for.

    Use it where random samples show no failures any more. Leave it where the rate of failures in use is asked for: a
    search is no sample. A start costs ``2 (iterations + 1)`` samples of ``sampler_steps`` steps each, half of them
    without ``baseline``.

    Source:
        Liu et al., "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial Search", ICLR 2024,
        arXiv 2306.00974.

    Differs:
        A reconstruction, see :func:`latent_search`; in validation it is ours.

    Args:
        shape: Of a sample without the batch, for example ``[3, 32, 32]``.
        classes: Number of classes, at least 2; starts ask for them in turn.
        judges: Names of classifiers that give class scores: attributes or methods of the module, or import paths.
        held_out: Name of a classifier that the search does not see; ``None``: nothing is confirmed.
        denoiser: Name in the module of the denoiser: a :class:`Denoiser`, a network, or a method of x, t and condition.
        scheduler: Name in the module of the scheduler it is trained with.
        conditions: Name in the module of a tensor with a row for each class (embeddings of prompts); ``None``: labels.
        null: Name in the module of what stands for no condition, where ``scale`` is not 1.
        alphas_cumprod: The noise levels ``(T,)`` where the module has no scheduler.
        prediction: What the model predicts; ``"auto"``: what the scheduler says.
        starts: How many, on all ranks together. Neutral: 0.
        every_n_epochs: Of a fit, in which it searches after every n-th epoch; outside of one it always does.
        scale: Of the guidance.
        sampler_steps: At least 1.
        iterations: Steps of the search, at least 1.
        step: In the unit of the noise's norm, above 0.
        sampler_gradient: Whether the gradient goes through the sampler, not only around it.
        threshold: Of the judges' probability, in [0, 1].
        baseline: Whether as many random draws are tried.
        report: Where each search writes a page with its pictures, see :func:`failure_report`; in several processes that
            of the first one's starts. ``None``: nowhere.
        prompts: What each class is asked for with, in words, for the report; ``None``: its number.
        seed: Of the starts.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> search = AdversarialSearch([1, 8, 8], 10, ["judge_a", "judge_b"], denoiser="unet", every_n_epochs=5)
        >>> trainer = Trainer(callbacks=[search], logger=False, enable_checkpointing=False)

    """

    done = "searched"

    def __init__(
        self,
        shape: list[int],
        classes: int,
        judges: list[str] | str,
        held_out: str | None = None,
        denoiser: str = "denoiser",
        scheduler: str = "scheduler",
        conditions: str | None = None,
        null: str | None = None,
        alphas_cumprod: Tensor | list[float] | None = None,
        prediction: Literal["auto", "epsilon", "v_prediction", "sample", "flow"] = "auto",
        starts: int = 64,
        every_n_epochs: int = 1,
        scale: float = 1.0,
        sampler_steps: int = 20,
        iterations: int = 25,
        step: float = 0.045,
        sampler_gradient: bool = False,
        threshold: float = 0.5,
        baseline: bool = True,
        report: str | None = None,
        prompts: list[str] | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_epochs, name, seed)
        for argument, count, low in (
            ("classes", classes, 2),
            ("starts", starts, 0),
            ("sampler_steps", sampler_steps, 1),
            ("iterations", iterations, 1),
        ):
            check_number(self, argument, count, low=low, integer=True)
        check_number(self, "step", step, low=0, low_open=True)
        check_number(self, "scale", scale)
        check_number(self, "threshold", threshold, low=0, high=1)
        check_bool(self, "sampler_gradient", sampler_gradient)
        check_bool(self, "baseline", baseline)
        check_choice(self, "prediction", prediction, ("auto", "epsilon", "v_prediction", "sample", "flow"))
        sizes: Any = shape
        if not isinstance(sizes, list | tuple) or not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(f"AdversarialSearch: `shape` must be whole numbers of at least 1, got {shape!r}.")
        if not as_patterns(judges):
            raise ValueError("AdversarialSearch: `judges` must name at least one classifier, got [].")
        if scale != 1 and null is None:
            raise ValueError(f"AdversarialSearch: `null` must be given where `scale` is not 1, got scale={scale!r}.")
        self.shape, self.classes, self.judges, self.held_out = list(shape), classes, as_patterns(judges), held_out
        self.denoiser, self.scheduler, self.conditions, self.null = denoiser, scheduler, conditions, null
        self.alphas_cumprod, self.prediction, self.starts = alphas_cumprod, prediction, starts
        self.scale, self.sampler_steps = scale, sampler_steps
        self.iterations, self.step, self.sampler_gradient = iterations, step, sampler_gradient
        if prompts is not None and len(prompts) != classes:
            raise ValueError(f"AdversarialSearch: `prompts` must be {classes} texts, got {len(prompts)}.")
        self.threshold, self.baseline, self.report, self.prompts = threshold, baseline, report, prompts
        self.result: SearchResult | None = None
        self.labels: Tensor | None = None

    @override
    def describe(self) -> str:
        if not self.starts:
            return "no starts: inactive"
        return f"{self.denoiser}, {self.starts} starts, {self.iterations} steps, judges {', '.join(self.judges)}"

    @property
    @override
    def works(self) -> bool:
        return bool(self.starts)

    @override
    def work(self, trainer: "Trainer", module: "LightningModule") -> dict[str, float]:
        count, device = -(-self.starts // trainer.world_size), module.device
        places = torch.arange(count, device=device) * trainer.world_size + trainer.global_rank
        self.labels = labels = places % self.classes
        rows = torch.arange(self.classes, device=device)
        if self.conditions is not None:
            rows = attribute_of(self, module, "conditions", self.conditions)
        null = None if self.null is None else attribute_of(self, module, "null", self.null)
        denoiser = denoiser_of(self, module, self.denoiser, self.scheduler, self.prediction, self.alphas_cumprod)
        judges = [self._judge(name, trainer, module) for name in self.judges]
        held_out = None if self.held_out is None else self._judge(self.held_out, trainer, module)
        fixed = (rows[labels], labels, judges, null, self.scale, self.sampler_steps)
        options = (self.step, 1.0, self.sampler_gradient, self.threshold, held_out)
        start = self._noise(places, 0)
        found = self.result = latent_search(denoiser, start, *fixed, self.iterations, *options)
        scalars = found.rates()
        if self.baseline:
            failed = torch.zeros_like(found.found)
            for draw in range(self.iterations + 1):
                failed |= random_failures(denoiser, self._noise(places, draw), *fixed, self.threshold)
            scalars["random"] = float(failed.double().mean())
        groups = failure_groups(found.samples[found.found])
        firsts = int((groups == torch.arange(len(groups), device=groups.device)).sum())
        scalars["distinct"] = firsts / max(len(groups), 1)
        if found.noise[0].numel() >= LEAST_OF_TEST:
            scalars["non_gaussian"] = int(non_gaussian(found.noise[found.found]).sum()) / max(len(groups), 1)
        if self.report is not None and trainer.is_global_zero:
            words = None if self.prompts is None else [self.prompts[label] for label in labels.tolist()]
            failure_report(denoiser, start, found.noise, *fixed, self.threshold, held_out, words).save(self.report)
        return scalars

    def _noise(self, places: Tensor, draw: int) -> Tensor:
        """Noise of each start, the same on however many ranks."""
        return to_sphere(normals(self.seed + draw, places, self.shape))

    def _judge(self, name: str, trainer: "Trainer", module: "LightningModule") -> Judge:
        try:
            found: Any = attribute_of(self, module, "judges", name)
        except MisconfigurationException:
            found = user_function(name, trainer, module, "AdversarialSearch(judges=...)")
        judge: Judge = found
        return judge
