"""Modalities left out of single samples, the contrastive loss and the scores of retrieval, for any training loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.loss.contrastive import info_nce, unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["analogy_prompt", "drop_rows", "exclusive_keep_masks", "retrieval_scores", "symmetric_infonce"]


def drop_rows(
    x: Tensor,
    p: float,
    null: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Rows of a batch replaced as a whole by the null state, each with probability p.

    .. math:: \tilde x_i = m_i\, x_i + (1 - m_i)\, e, \qquad m_i \sim \text{Bernoulli}(1 - p)

    What is kept is not rescaled: the null state is the input that stands for an absent modality in a test as well.

    Args:
        x: Rows ``(B, ...)``.
        p: Probability with which a row is dropped, in [0, 1].
        null: The null state ``e``, a number or a tensor that broadcasts to a row; it is cast to the type of ``x``.
        generator: Where masks are drawn from, on its device; the global one if ``None``.
        keep: Masks ``m`` that are drawn already, bool ``(B,)``; ``p`` does not count then.

    Returns:
        The rows, and the masks: bool ``(B,)``, True where a row is kept.

    Example:
        >>> rows, keep = drop_rows(torch.ones(3, 2), 0.5, keep=torch.tensor([True, False, True]))
        >>> rows[:, 0]
        tensor([1., 0., 1.])

    """
    if keep is None:
        keep = _draws(len(x), generator).to(x.device) >= p
    mask = keep.reshape(-1, *(1 for _ in x.shape[1:]))
    state = null.to(x) if isinstance(null, Tensor) else x.new_full((), null)
    return torch.where(mask, x, state), keep


def exclusive_keep_masks(
    batch_size: int,
    probs: Mapping[str, float],
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
) -> dict[str, Tensor]:
    """Which modalities of each sample are kept, where at most one of a sample is dropped.

    Args:
        batch_size: Number of samples B.
        probs: Probability with which each modality is dropped, at least 0; together at most 1.
        generator: Where they are drawn from, on its device; the global one if ``None``.
        draws: Numbers ``(B,)``, uniform in [0, 1), that are drawn already.

    Returns:
        By modality bool ``(B,)``, True where it is kept.

    Raises:
        ValueError: If the probabilities add up to more than 1.

    Example:
        >>> masks = exclusive_keep_masks(3, {"text": 0.5, "video": 0.25}, draws=torch.tensor([0.1, 0.6, 0.9]))
        >>> masks["text"], masks["video"]
        (tensor([False,  True,  True]), tensor([ True, False,  True]))

    """
    if min(probs.values(), default=0.0) < 0 or sum(probs.values()) > 1 + 1e-6:
        raise ValueError(f"exclusive_keep_masks: `probs` must be at least 0 and add up to at most 1, got {probs!r}.")
    draws = _draws(batch_size, generator) if draws is None else draws
    masks, low = {}, 0.0
    for name, p in probs.items():
        masks[name] = (draws < low) | (draws >= low + p)
        low += p
    return masks


def _draws(count: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.rand(count, generator=generator, device=device)


def symmetric_infonce(
    q: Tensor,
    b: Tensor,
    tau: float = 0.1,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> Tensor:
    r"""The contrastive loss of pairs in both directions, with the other pairs of the batch as negatives.

    .. math:: L = \frac12 \Bigl[\text{CE}\bigl(\hat q \hat b^T / \tau,\, (1 \dots B)\bigr) +
        \text{CE}\bigl(\hat b \hat q^T / \tau,\, (1 \dots B)\bigr)\Bigr]

    Args:
        q: Queries ``(B, D)``, normalised here.
        b: What is to be found for each, ``(B, D)``.
        tau: Temperature, above 0.
        group: Ranks whose pairs take part too, each with its own; ``None``: these pairs are all there are. The mean
            over the ranks is the loss of all pairs, and so is the mean of the gradients.
        capacity: Most pairs that a rank of the group can have, see ``all_gather_rows``.

    Returns:
        A scalar, float32 (float64 for such rows).

    Raises:
        ValueError: If ``tau`` is not above 0.

    Example:
        >>> symmetric_infonce(torch.eye(2), torch.eye(2), tau=1.0)
        tensor(0.3133)

    """
    if not tau > 0:
        raise ValueError(f"symmetric_infonce: `tau` must be above 0, got {tau!r}.")
    with torch.autocast(q.device.type, enabled=False):  # exp(1 / tau) can be beyond float16
        q, b = unit_rows(q), unit_rows(b)
        return (info_nce(q, b, tau, group, capacity) + info_nce(b, q, tau, group, capacity)) / 2


def retrieval_scores(q: Tensor, b: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """How well each query finds its own row among all: recall at k and the median rank.

    The rank of query i is 1 plus the number of other rows that are at least as similar to it (cosine) as row i: rows
    that cannot be told apart do not count as found.

    Args:
        q: Queries ``(N, D)``.
        b: What is to be found for each, ``(N, D)``, at least one row.
        ks: At which ranks, each at least 1.

    Returns:
        ``recall@k`` for each k, in [0, 1], and ``median_rank``, the mean of the middle two for an even N.

    Example:
        >>> retrieval_scores(torch.eye(3), torch.eye(3)[[0, 2, 1]], ks=[1])
        {'recall@1': tensor(0.3333), 'median_rank': tensor(3.)}

    """
    q, b = (F.normalize(rows.float(), dim=1) for rows in (q, b))
    parts, start = [], 0
    for some in torch.split(q, _CHUNK):  # no square table of all pairs
        similar = some @ b.T
        own = similar.gather(1, torch.arange(start, start + len(some), device=q.device)[:, None])
        parts.append((similar >= own).sum(1))  # with itself, which is the 1
        start += len(some)
    ranks = torch.cat(parts).sort().values.float()
    scores = {f"recall@{k}": (ranks <= k).float().mean() for k in ks}
    return scores | {"median_rank": (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2}


_CHUNK = 1024


def analogy_prompt(
    examples: Sequence[tuple[Sequence[str], str]],
    tags: Sequence[str],
    generate: Callable[[str], str] | None = None,
) -> str:
    r"""The prompt by which a language model writes a description for tags, by analogy with a few written by people.

    Args:
        examples: Tags of a recording, and the description of it that a person wrote; at least one.
        tags: Those of the recording that needs a description.
        generate: A language model, from the prompt to what follows it; its text is returned then.

    Returns:
        The prompt, which ends where the description is to be written; with ``generate`` the description.

    Raises:
        ValueError: If there are no examples or no tags.

    Example:
        >>> print(analogy_prompt([(["piano", "slow"], "A calm piano piece.")], ["drums"]))
        Tags: piano, slow
        Description: A calm piano piece.
        <BLANKLINE>
        Tags: drums
        Description:

    """
    for argument, value in (("examples", examples), ("tags", tags)):
        if not value or isinstance(value, str):
            raise ValueError(f"analogy_prompt: `{argument}` must be a list with at least one entry, got {value!r}.")
    shown = [f"Tags: {', '.join(words)}\nDescription: {text.strip()}" for words, text in examples]
    prompt = "\n\n".join([*shown, f"Tags: {', '.join(tags)}\nDescription:"])
    return prompt if generate is None else generate(prompt).strip()
