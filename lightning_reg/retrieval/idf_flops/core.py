"""Inference-free learned sparse retrieval, for any training loop."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.host import distributed

__all__ = [
    "ensemble_scores",
    "flops_penalty",
    "idf_from_corpus",
    "quadratic_ramp",
    "ranking_scores",
    "score_distillation_loss",
    "splade_vectors",
]


def flops_penalty(
    vectors: Tensor,
    idf: Tensor | None = None,
    group_size: int = 1,
    threshold: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""The FLOPS penalty: how many products a query costs, smoothly, of the documents of all ranks together.

    .. math:: F = \sum_v \Bigl(\frac1N \sum_i |w_{iv}|\Bigr)^2, \qquad
        F_\text{idf} = \sum_v \Bigl(\frac1N \sum_i \frac{|w_{iv}|}{\text{idf}_v}\Bigr)^2

    The second is for weights that have the factor IDF in them, and so is the first of weights without it:
    ``flops_penalty(idf * w, idf) == flops_penalty(w)``. It is not linear in the batch: over several ranks the columns'
    sums are added up (one collective of V + 1 numbers, which every rank has to make), and each rank's value is the
    global one, with W times its rows' part of the gradient, so that the mean over ranks that DDP makes is the gradient
    of the global batch.

    Args:
        vectors: w, ``(N, V)``.
        idf: ``(V,)``; columns where it is not above 0 do not count. ``None``: 1.
        group_size: G documents of each query, in the order of the queries; then the penalty is the sum over the G
            positions of that of each position's documents, about G times as much. 1: one of all documents.
        threshold: Documents with no more active entries than this count as 0; ``None``: all count.
        group: The ranks, all without one.

    Returns:
        A scalar, float32 at least.

    Raises:
        ValueError: If N is no multiple of ``group_size``.

    Example:
        >>> flops_penalty(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor(2.)

    """
    if len(vectors) % group_size:
        raise ValueError(f"flops_penalty: {len(vectors)} documents are no multiple of `group_size`={group_size}.")
    with torch.autocast(vectors.device.type, enabled=False):
        weights = _wide(vectors).abs()
        if threshold is not None:
            weights = weights * ((vectors != 0).sum(1, keepdim=True) > threshold)
        if idf is not None:
            factors = idf.to(weights)
            weights = weights * torch.where(factors > 0, 1 / factors, 0.0)
        sums = weights.reshape(-1, group_size, weights.shape[1]).sum(0)
        local = torch.cat([sums.flatten(), sums.new_tensor([len(weights) / group_size])])
        total = distributed.all_reduce_sum(local, group)
        # The value is that of all ranks; rows of other ranks are constants here.
        moving = distributed.world_size(group) * (sums - sums.detach()) + total[:-1].view_as(sums)
        value: Tensor = (moving / total[-1].clamp(min=1)).square().sum()
    return value


def quadratic_ramp(step: int, steps: int) -> float:
    r"""The share of a weight that counts at an optimizer step: :math:`((t + 1) / T)^2`, 1 from step T - 1 on.

    Args:
        step: t, optimizer steps finished.
        steps: T, at least 1.

    Returns:
        In (0, 1].

    Example:
        >>> [quadratic_ramp(step, 2) for step in range(3)]
        [0.25, 1.0, 1.0]

    """
    return min((step + 1) / steps, 1.0) ** 2


def splade_vectors(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Sparse weights of a text from the logits of a masked language model.

    .. math:: w_v = \log\bigl(1 + \operatorname{relu}(\max_t a_t Y_{tv})\bigr)

    Args:
        logits: Y, ``(N, T, V)``.
        mask: a, ``(N, T)``: 1 for tokens, 0 for padding.

    Returns:
        ``(N, V)``, at least 0, float32 at least.

    """
    if mask is not None:
        logits = logits * mask[:, :, None].to(logits.dtype)
    return _wide(logits.amax(1)).relu().log1p()


def ensemble_scores(scores: Sequence[Tensor], scale: float = 30.0) -> Tensor:
    r"""One teacher of several that score in units of their own: rows are brought to [0, 1], and averaged.

    .. math:: \frac{\text{scale}}K \sum_k \frac{S_k - \min S_k}{\max S_k - \min S_k + 10^{-6}}

    Minimum and maximum are each query's own, so a teacher's row may be scaled and moved at will.

    Args:
        scores: K of ``(B, C)``.
        scale: Of the result.

    Returns:
        ``(B, C)``, float32 at least, without gradient.

    Example:
        >>> ensemble_scores([torch.tensor([[1.0, 3.0]]), torch.tensor([[0.2, 0.8]])], 1.0).round(decimals=3)
        tensor([[0., 1.]])

    """
    total = torch.zeros((), device=scores[0].device)
    for given in scores:
        rows = _wide(given.detach())
        low, high = rows.aminmax(dim=1, keepdim=True)
        total = total + (rows - low) / (high - low + 1e-6)
    return scale * total / len(scores)


def score_distillation_loss(
    student: Tensor, teacher: Tensor, kind: str = "kl", temperature: float = 1.0, positives: Tensor | None = None
) -> Tensor:
    r"""How far a student's scores of candidates are from a teacher's.

    ``"kl"``: :math:`\frac1B \sum \operatorname{KL}(\operatorname{softmax}(S / \tau) \,\|\, \operatorname{softmax}(s /
    \tau))`, not multiplied by :math:`\tau^2`. ``"margin_mse"``: the mean square of the difference between both margins
    :math:`(s_+ - s_j) / \tau`, over all candidates but the positive one.

    Args:
        student: s, ``(B, C)``.
        teacher: S, ``(B, C)``.
        kind: ``"kl"`` or ``"margin_mse"``.
        temperature: Tau, above 0.
        positives: Column of each query's positive, ``(B,)``, for margins; ``None``: the first.

    Returns:
        A scalar, float32 at least.

    Example:
        >>> score_distillation_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 1.0]]), "margin_mse")
        tensor(1.)

    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = _wide(student) / temperature, _wide(teacher) / temperature
        if kind == "kl":
            return F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)
        rows = torch.arange(len(s), device=s.device)
        columns = torch.zeros_like(rows) if positives is None else positives
        gaps = (s[rows, columns] - t[rows, columns])[:, None] - (s - t)  # 0 for the positive itself
        return gaps.square().sum() / (len(s) * max(s.shape[1] - 1, 1))


def idf_from_corpus(
    documents: Iterable[Sequence[int]],
    vocab_size: int,
    special_token_ids: Sequence[int] = (),
    unseen: float | None = None,
) -> Tensor:
    r"""Inverse document frequencies, as BM25 has them.

    .. math:: \text{idf}_v = \log\Bigl(1 + \frac{N - n_v + 1/2}{n_v + 1/2}\Bigr)

    with the N documents that have a token which is not special, of which :math:`n_v` have the token v.

    Args:
        documents: Token ids of each, by the tokenizer that documents and queries will have.
        vocab_size: V.
        special_token_ids: Tokens that are in no document, padding among them; their IDF is 0.
        unseen: IDF of tokens that are in no document; ``None``: the formula's, the largest of all. Authors' code: 1.

    Returns:
        ``(V,)`` float32.

    Raises:
        ValueError: If a token id is outside the vocabulary, or there is no document.

    Example:
        >>> idf_from_corpus([[0, 1, 1], [0]], 2).round(decimals=3)
        tensor([0.1820, 0.6930])

    """
    special, counts, total = {*special_token_ids}, torch.zeros(vocab_size, dtype=torch.float64), 0
    for document in documents:
        tokens = sorted({int(token) for token in document} - special)
        if tokens and not 0 <= tokens[0] <= tokens[-1] < vocab_size:
            raise ValueError(
                f"idf_from_corpus: token ids must be in [0, {vocab_size}), got {tokens[0]} to {tokens[-1]}."
            )
        counts[tokens] += 1
        total += bool(tokens)
    if not total:
        raise ValueError("idf_from_corpus: `documents` must have at least one with a token that is not special.")
    idf = (1 + (total - counts + 0.5) / (counts + 0.5)).log()
    if unseen is not None:
        idf[counts == 0] = unseen
    idf[sorted(special)] = 0.0
    return idf.float()


def ranking_scores(scores: Tensor, relevant: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    r"""How high relevant documents stand: reciprocal rank of the first, and NDCG at k, for each query.

    .. math:: \text{NDCG} = \sum_{r \le k} \frac{y_r}{\log_2(r + 1)} \Big/ \sum_{r \le \min(k, n)} \frac1{\log_2(r + 1)}

    Of equal scores the irrelevant documents count as found first, so a model that scores all alike gains nothing; a
    score that is no number is the lowest.

    Args:
        scores: ``(Q, N)``.
        relevant: Bool ``(Q, N)``, y.
        k: Ranks that count for NDCG, at least 1.

    Returns:
        Both ``(Q,)``, 0 for a query without a relevant document.

    Example:
        >>> rank, ndcg = ranking_scores(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[False, True, False]]))
        >>> rank.item(), round(ndcg.item(), 4)
        (0.5, 0.6309)

    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf)  # which would be sorted before all numbers
    worst = relevant.byte().argsort(dim=1, stable=True)
    order = worst.gather(1, scores.gather(1, worst).argsort(dim=1, descending=True, stable=True))
    hits = relevant.gather(1, order).float()
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    gains = 1 / (ranks[:k] + 1).log2()
    ideal = (gains * (ranks[:k] <= relevant.sum(1, keepdim=True))).sum(1)
    ndcg = (hits[:, :k] * gains).sum(1) / ideal.clamp(min=1e-9)
    return (hits / ranks).amax(1), ndcg


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
