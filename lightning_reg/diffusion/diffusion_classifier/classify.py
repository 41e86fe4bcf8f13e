"""Procedures: images classified by a denoiser, and pairs of images and captions matched."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.diffusion._service import Denoiser
from lightning_reg.diffusion.diffusion_classifier.core import condition_errors, stage_times
from lightning_reg.diffusion.diffusion_classifier.diffusion_classifier import DiffusionClassifier
from lightning_reg.engine.host.procedures import procedure

__all__ = ["Classified", "PairMatches", "classify_images", "match_pairs"]


class Classified(NamedTuple):
    """What a diffusion classifier says of images.

    Args:
        labels: The class of each, ``(B,)``.
        probabilities: Posterior ``(B, C)``; 0 for classes that were dropped.
        errors: Mean errors under each condition, ``(B, K)``; NaN for those that were dropped.

    """

    labels: Tensor
    probabilities: Tensor
    errors: Tensor


class PairMatches(NamedTuple):
    """Two images and two captions of each item, matched.

    Args:
        text: Whether each image has the smaller error under its own caption, ``(B,)``.
        image: Whether each caption lowers the error of its own image more than that of the other, ``(B,)``.
        group: Both.
        errors: Of image i under caption j, ``(B, 2, 2)``.

    """

    text: Tensor
    image: Tensor
    group: Tensor
    errors: Tensor


@procedure
def classify_images(
    module: DiffusionClassifier, x: Tensor, indices: Tensor | None = None, log_prior: Tensor | None = None
) -> Classified:
    """Classifies images by the condition under which the denoiser errs least, without gradients, in evaluation mode.

    Source:
        Li, Prabhudesai, Duggal, Brown and Pathak, "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV
        2023, arXiv 2303.16203.

    Differs:
        See :class:`DiffusionClassifier`; a prior over classes may be given.

    Args:
        module: The classifier.
        x: Clean images ``(B, ...)``.
        indices: A number for each, from which its noise is drawn; ``None``: all share one noise.
        log_prior: Of each class, ``(C,)``; ``None``: uniform.

    Returns:
        Labels, posterior and errors.

    Example:
        >>> from lightning_reg import Denoiser, DiffusionClassifier, NoiseSchedule
        >>> denoiser = Denoiser(lambda x, t, c: c[:, None] * x, NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
        >>> classifier = DiffusionClassifier(denoiser, torch.arange(3), n_samples=[10], keep=[1])
        >>> classify_images(classifier, torch.zeros(1, 2)).labels
        tensor([1])

    """
    module.eval()
    with torch.no_grad():
        logits = module(x, indices)
        if log_prior is not None:
            logits = logits + log_prior.to(logits)
        return Classified(logits.argmax(1), logits.softmax(1), module.errors(x, indices))


@procedure
def match_pairs(
    module: Denoiser,
    images: Tensor,
    captions: Tensor,
    null: Tensor,
    n_samples: int = 50,
    chunk: int = 512,
    seed: int = 0,
) -> PairMatches:
    """Matches two images with two captions of the same words, item by item: does the model understand composition?

    Text score: under the same noise each image has the smaller error with its own caption. Image score: each caption
    lowers the error, against that without a caption, of its own image more than that of the other, as images differ in
    how hard they are.

    Source:
        Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV 2023, arXiv 2303.16203, the text
        score; scores of Thrush et al., "Winoground", CVPR 2022, arXiv 2204.03162.

    Differs:
        The image score, which needs errors that can be compared between images, subtracts that without a caption.

    Args:
        module: The denoiser.
        images: Two of each item, ``(B, 2, ...)``.
        captions: The conditions that belong to them, ``(B, 2, ...)``.
        null: The condition without a caption, a row for each item or one for all, ``(B, ...)`` or ``(1, ...)``.
        n_samples: Times, evenly spaced.
        chunk: Rows that the denoiser gets at once.
        seed: Of the noise, which both images of an item share.

    Returns:
        The scores, and the errors.

    Raises:
        ValueError: If there are not two of each.

    Example:
        >>> from lightning_reg import Denoiser, NoiseSchedule
        >>> denoiser = Denoiser(lambda x, t, c: x - c, NoiseSchedule(torch.linspace(0.99, 0.01, 100)))
        >>> pair = torch.tensor([[[-1.0], [1.0]]])
        >>> match_pairs(denoiser, pair, pair, torch.zeros(1, 1)).group
        tensor([True])

    """
    for name, value in (("images", images), ("captions", captions)):
        if value.dim() < 2 or value.shape[1] != 2:
            raise ValueError(f"match_pairs: `{name}` must be two of each item, (B, 2, ...), got {tuple(value.shape)}.")
    total = int(module.scheduler.config.num_train_timesteps)
    if not 1 <= n_samples <= total:
        raise ValueError(f"match_pairs: `n_samples` must be in [1, {total}], got {n_samples!r}.")
    module.eval()
    count, device = len(images), images.device
    table = torch.cat([captions.flatten(0, 1), null.expand(count, *null.shape[1:])])
    item = torch.arange(count, device=device).repeat_interleave(2)
    candidates = torch.stack([2 * item, 2 * item + 1, 2 * count + item], 1)
    times = torch.tensor(stage_times(total, [n_samples])[0], device=device)
    with torch.no_grad():
        sums = condition_errors(
            module, images.flatten(0, 1), table, candidates, times, torch.zeros_like(item), chunk=chunk, seed=seed
        )
    errors = (sums / len(times)).reshape(count, 2, 3)
    own, gain = errors[..., :2], errors[..., :2] - errors[..., 2:]
    text = (own[:, 0, 0] < own[:, 0, 1]) & (own[:, 1, 1] < own[:, 1, 0])
    image = (gain[:, 0, 0] < gain[:, 1, 0]) & (gain[:, 1, 1] < gain[:, 0, 1])
    return PairMatches(text, image, text & image, own)
