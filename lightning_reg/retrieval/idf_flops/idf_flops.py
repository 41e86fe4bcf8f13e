"""IDFFlops: documents' sparse vectors are kept sparse, most of all in tokens that say little."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.entries import find_entry
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import StepTechnique
from lightning_reg.retrieval._embeddings import check_trained, tensor_in
from lightning_reg.retrieval.idf_flops.core import flops_penalty, quadratic_ramp, splade_vectors

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step

__all__ = ["IDFFlops"]


class IDFFlops(StepTechnique):
    r"""Adds the FLOPS penalty of a layer's sparse vectors, with a quadratic ramp, of the batch of all ranks.

    .. math:: \ell + \lambda_t \sum_v \Bigl(\frac1N \sum_i \frac{|w_{iv}|}{\text{idf}_v}\Bigr)^2, \qquad
        \lambda_t = \lambda \min\Bigl(\frac{t + 1}T, 1\Bigr)^2

    There are two ways to the same penalty. Where queries have the IDF (:class:`QueryIDF`) and the layer puts out plain
    weights w, leave ``idf`` out: the ranking loss sees idf times w and the penalty w. Where the layer's output has the
    factor IDF in it, give ``idf``, which is divided out. Frequent tokens become sparse first, rare ones stay.

    Logged beside the term on logging steps, of the documents of all ranks: ``nnz`` (active entries of a document),
    ``empty`` (share of documents without any) and ``flops``. Once more than half of the documents are empty, a
    warning says so: an empty document gets no gradient from behind its relu.

    Use it for retrieval by an inverted index. Leave it where the vectors are dense by design, or where no document
    frequencies are to be had for the serving corpus. On docstrings of the standard library and on lines of a play
    queries with IDF found more with fewer active entries (``benchmarks/effects/idf_flops.py``,
    ``idf_flops_speeches.py``).

    Source:
        Geng, Wang, Ru, Yang, "Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers", 2024,
        arXiv 2411.04403; code: zhichao-aws/opensearch-sparse-model-tuning-sample. FLOPS: Paria et al., "Minimizing
        FLOPs to Learn Efficient Sparse Representations", ICLR 2020, arXiv 2004.05665. ``threshold``: arXiv 2504.14839.

    Differs:
        Reconstruction: whether the first version of the paper writes its loss as a division by IDF was not read; the
        code multiplies queries by IDF alone, to which that is equal. Of all ranks' documents the columns' sums are
        added, without a copy of every document on each rank. With accumulation the penalty is that of each batch, which
        for small batches is larger.

    Under DDP one collective of V + 1 numbers per step; every rank must make a loss in every step.

    Args:
        layer: Layer whose output is the documents' vectors ``(N, V)``, or logits of tokens ``(N, T, V)``, as in
            ``named_modules()`` (``"cls"`` of a ``BertForMaskedLM`` that is the module itself: ``"model.cls"``). A
            mapping counts by its ``"sentence_embedding"``, or with ``"splade"`` by its ``"logits"``.
        idf: IDF of each of the V columns that the output has as a factor (a tensor's ``tolist()``), at least 0; columns
            with 0 do not count. ``None``: it has none.
        weight: lambda, at least 0. Neutral: 0. Authors' code: 0.05 beside InfoNCE, 0.002 beside distillation; tune it
            to the number of active entries that you want.
        ramp_steps: T, optimizer steps until the whole weight counts, at least 1. 1: no ramp. Authors' code: 200 to
            40,000; sensible: 5 to 40 % of training.
        group_size: G documents of each query; the penalty is the sum of one for each of the G positions, as in the
            authors' code. 1: one of all documents.
        threshold: Documents with no more active entries than this, at least 0, are left alone. ``None``: none is.
        pooling: ``"given"``: the output is the vectors; ``"splade"``: it is logits ``(N, T, V)``, of which
            ``log(1 + relu(max))`` over the tokens is taken.
        mask_key: Entry of the batch with 1 for tokens and 0 for padding ``(N, T)``, for ``"splade"``: keys and
            positions, separated by dots. ``None``: all count.
        position: Which pass of the layer in a step counts, where it encodes queries as well: 0 is the first. ``None``:
            the documents of all passes.
        loss: Under manual optimization, which of several losses that are handed over it joins: the position.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> sparse = IDFFlops("model.cls", weight=2e-3, ramp_steps=200, pooling="splade", mask_key="attention_mask")
        >>> trainer = Trainer(callbacks=[sparse], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layer: str,
        idf: Sequence[float] | None = None,
        weight: float = 1e-3,
        ramp_steps: int = 10_000,
        group_size: int = 1,
        threshold: int | None = None,
        pooling: Literal["given", "splade"] = "given",
        mask_key: str | None = None,
        position: int | None = None,
        loss: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        check_number(self, "weight", weight, low=0)
        check_number(self, "ramp_steps", ramp_steps, low=1, integer=True)
        check_number(self, "group_size", group_size, low=1, integer=True)
        check_choice(self, "pooling", pooling, ("given", "splade"))
        for argument, value in (("threshold", threshold), ("position", position), ("loss", loss)):
            check_number(self, argument, value, low=0, integer=True, optional=True)
        for factor in () if idf is None else idf:
            check_number(self, "idf", factor, low=0)
        self.layer, self.idf, self.weight, self.ramp_steps = layer, idf, weight, ramp_steps
        self.group_size, self.threshold, self.pooling = group_size, threshold, pooling
        self.mask_key, self.position = mask_key, position
        self._idf = None if idf is None else torch.tensor([float(factor) for factor in idf])
        self._warned = False

    @override
    def describe(self) -> str:
        if not self.weight:
            return "weight=0: inactive"
        divided = ", divided by IDF" if self.idf is not None else ""
        return f"{self.layer}, weight={self.weight:g} after {self.ramp_steps} steps{divided}"

    @override
    def is_active(self, step: "Step") -> bool:
        return self.weight > 0

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return [self.layer]

    @override
    def step_term(self, step: "Step") -> Tensor | None:
        vectors, group = self._vectors(step), host.data_parallel_group(step.trainer)
        if self._idf is not None:
            self._idf = self._idf.to(vectors.device)
        value = flops_penalty(vectors, self._idf, self.group_size, self.threshold, group)
        if step.is_logging:
            step.log(self, "flops", value)
            self._watch(step, (vectors.detach() != 0).sum(1), group)
        return self.weight * quadratic_ramp(step.global_step, self.ramp_steps) * value

    def _watch(self, step: "Step", active: Tensor, group: "torch.distributed.ProcessGroup | None") -> None:
        counts = torch.stack([active.sum(), (active == 0).sum(), active.new_tensor(len(active))]).float()
        entries, empty, documents = distributed.all_reduce_sum(counts, group)
        step.log(self, "nnz", entries / documents)
        step.log(self, "empty", empty / documents)
        if not self._warned and bool(empty > documents / 2):  # a host sync, on logging steps until it is told
            self._warned = True
            host.rank_zero_warn(
                f"IDFFlops: {int(empty)} of {int(documents)} documents have no active entry in {self.layer!r}: the"
                f" vectors collapse, and nothing trains what is behind a dead relu. Lower `weight` ({self.weight:g}) or"
                f" raise `ramp_steps` ({self.ramp_steps})."
            )

    def _vectors(self, step: "Step") -> Tensor:
        key = "logits" if self.pooling == "splade" else "sentence_embedding"
        given = [tensor_in(output, key) for output in step.passes.get(self.layer, [])]
        own = given if step.views is None else [step.views.own(features) for features in given]
        chosen = own if self.position is None else own[self.position : self.position + 1]
        rank = 3 if self.pooling == "splade" else 2
        fine = [f for f in chosen if isinstance(f, Tensor) and f.dim() == rank]
        if fine:
            check_trained(step, [self.layer], fine, "IDFFlops")
        columns = {f.shape[-1] for f in fine} | ({len(self._idf)} if self._idf is not None else set())
        if not fine or len(fine) < len(chosen) or len(columns) > 1:
            self._refuse(own, rank)
        if rank == 2:
            vectors = torch.cat(fine)
        else:
            vectors = torch.cat([splade_vectors(logits, self._mask(step, logits)) for logits in fine])
        if len(vectors) % self.group_size:
            raise MisconfigurationException(
                f"IDFFlops: {self.layer!r} gave {len(vectors)} documents in this step, which is no multiple of"
                f" group_size={self.group_size}. Give as many documents for each query, in the order of the queries."
            )
        return vectors

    def _refuse(self, found: "Sequence[object]", rank: int) -> NoReturn:
        shapes = ", ".join(
            f"{tuple(f.shape)}{'' if f.requires_grad else ' without gradient'}"
            if isinstance(f, Tensor)
            else type(f).__name__
            for f in found
        )
        wanted = "logits (N, T, V)" if rank == 3 else "vectors (N, V)"
        other = "given" if rank == 3 else "splade"
        columns = "" if self._idf is None else f" with V={len(self._idf)}, the length of `idf`,"
        raise MisconfigurationException(
            f"IDFFlops: layer {self.layer!r} gave {shapes or 'no tensor'} in this step, where trained {wanted}{columns}"
            f" are needed. Name the layer that puts them out, say which pass in `position`, or write"
            f' pooling="{other}".'
        )

    def _mask(self, step: "Step", logits: Tensor) -> Tensor | None:
        if self.mask_key is None:
            return None
        mask = find_entry(step.batch, self.mask_key, "IDFFlops: mask_key")
        if not isinstance(mask, Tensor) or mask.shape != logits.shape[:2]:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise MisconfigurationException(
                f"IDFFlops(mask_key={self.mask_key!r}) must name the mask {tuple(logits.shape[:2])} of the tokens whose"
                f" logits {self.layer!r} gives, found {found}. Where queries pass the layer too, say in `position`"
                " which pass has the documents."
            )
        return mask
