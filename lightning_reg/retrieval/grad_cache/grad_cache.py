"""GradCache: a contrastive loss over batches that do not fit into memory."""

from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import Technique
from lightning_reg.engine.weights.strategies import check_whole
from lightning_reg.retrieval.grad_cache._chunked_calls import ChunkedCalls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.run.part import Part
    from lightning_reg.engine.step import Step

__all__ = ["GradCache"]


class GradCache(Technique):
    r"""Encoders run in chunks, and the loss is that of the whole batch: large batches in the memory of small ones.

    ``training_step`` stays as it is and calls its encoders for whole batches. Each call of a named one is made in
    chunks of which no graph is kept but for what the encoder returns. The loss sees the representations of all rows;
    their gradients then go through the encoder chunk by chunk, which runs once more for it with the same random numbers
    (dropout), so that memory for its activations is that of one chunk, whatever the batch:

    .. math:: \frac{\partial L}{\partial \theta} = \sum_k \sum_{x \in X_k} \frac{\partial L}{\partial f(x)}
        \frac{\partial f(x)}{\partial \theta}

    The gradient is exactly that of the loss over the whole batch. All of it is part of the user's own backward pass:
    accumulation, gradient scaling, manual optimization and DDP (one reduction in a step) are as without it, and
    techniques on the loss, on what the encoder returns or on what layers in it return see whole batches.

    Use it where the loss compares the rows of a batch, so that accumulated small batches are another loss, and the
    batch does not fit. Leave it where it fits: a step costs one more forward pass, and small chunks fill a device
    badly. For a small BERT on a CPU (``benchmarks/grad_cache.py``) it took 1.5 times as long in 2 chunks, and
    twice as long in 8; it was not measured on a GPU. Where the number of layers is the trouble, not that of rows,
    checkpoint the layers; both together work. Compile the encoder by itself (``encoder = torch.compile(encoder)``): in
    place, or with the whole module, it has the same values and runs uncompiled in chunks.

    Source:
        Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, arXiv
        2101.06983, section 3.2; code: github.com/luyug/GradCache.

    Differs:
        The computation is that of the authors' code, of which the gradients of tests are taken. There the
        representations are cut out of the graph and the gradients that are cached for them are handed in by a surrogate
        loss; here each chunk is under a checkpoint of torch that is not reentrant, which recomputes in the same order
        and lets the graph of the user's loss stand. Chunks are as equal as they can be (of 5 rows in chunks of 2 the
        authors make 2, 2, 1, here 1, 2, 2). Also replayed are the random numbers of numpy and Python, and those of
        devices whatever the encoder's inputs are nested in. With dropout the numbers are drawn chunk by chunk, so masks
        are others than those of one call.

    Memory: activations of one chunk, and all that the named call returns, for all rows: name one that pools, a row per
    text. What other techniques read of layers in it is kept too. Logged: the number of chunks of a step.

    Args:
        calls: Which calls: a layer or a method of the module (``"encoder"``, ``"model.encode"``), or several. It takes
            tensors with a row per sample, by position or name, nested or not, and returns such; of each call the first
            tensor says how many rows there are, and what has another number is given to each chunk as it is.
        chunk_size: Most rows of a chunk, at least 1; as many as fit. Neutral: ``None``, no chunks.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> technique = GradCache("encoder", chunk_size=32)
        >>> trainer = Trainer(max_epochs=10, callbacks=[technique], logger=False, enable_checkpointing=False)

    """

    def __init__(self, calls: list[str] | str, chunk_size: int | None, name: str | None = None) -> None:
        super().__init__(name=name)
        if not calls:
            raise ValueError(f"GradCache: `calls` must name at least one layer or method, got {calls!r}.")
        check_number(self, "chunk_size", chunk_size, low=1, integer=True, optional=True)
        self.calls, self.chunk_size = calls, chunk_size

    @override
    def describe(self) -> str:
        if self.chunk_size is None:
            return "chunk_size=None: inactive"
        return f"{', '.join(self._names)} in chunks of {self.chunk_size} rows"

    @override
    def is_active(self, step: "Step") -> bool:
        return self.chunk_size is not None

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        if self.chunk_size is not None:
            check_whole(self, trainer, "runs layers once more in the backward pass, with")

    @override
    def conflict_with(self, other: Member) -> str | None:
        if self.chunk_size is None or not isinstance(other, GradCache) or other.chunk_size is None:
            return None
        both = [one for one in self._names if any(f"{one}.".startswith(f"{name}.") for name in other._names)]
        if not both:
            return None
        return f"both run {both[0]!r} in chunks. Name each layer once, and none that lies in another."

    @override
    def parts(self, trainer: "Trainer", module: "LightningModule") -> "Sequence[Part]":
        if self.chunk_size is None:
            return ()
        return [ChunkedCalls(self, trainer, module, self._names, self.chunk_size)]

    @property
    def _names(self) -> list[str]:
        return [self.calls] if isinstance(self.calls, str) else [*dict.fromkeys(self.calls)]
