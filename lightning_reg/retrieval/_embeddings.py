"""Where the logits of a contrastive loss come from: rows of queries and documents that layers put out."""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import is_frozen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = [
    "Direction",
    "check_cosines",
    "check_trained",
    "embeddings_of",
    "embeddings_over_ranks",
    "rows_and_columns",
    "tensor_in",
]


Direction = Literal["query_to_doc", "doc_to_query"]


def rows_and_columns(
    call: "LossCall", layer: str, query_layer: str | None, direction: Direction, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """What layers put out for the rows and the columns of a call's logits, whichever of them are the queries.

    Args:
        call: Of logits ``(R, C)``.
        layer: Puts out the documents, and the queries before them if these have no layer of their own.
        query_layer: Puts out the queries.
        direction: Which of both are the rows.
        interleaved: Where documents that are rows have hard negatives, which are none: whether a document's own follow
            it. Else they follow all documents.

    Returns:
        Embeddings ``(R, D)`` and ``(C, D)``.

    Raises:
        MisconfigurationException: If there are not as many.

    """
    if direction == "query_to_doc":
        return embeddings_of(call, layer, query_layer)
    rows, columns = call.logits.shape
    documents = _rows(call, layer)
    if query_layer is not None:
        queries = _rows(call, query_layer)
    else:
        queries, documents = documents[:columns], documents[columns:]
    check_trained(call.step, [layer] if query_layer is None else [query_layer, layer], [queries, documents])
    each = max(len(documents) // max(rows, 1), 1)
    documents = documents[::each] if interleaved else documents[:rows]
    if (len(documents), len(queries)) != (rows, columns) or queries.shape[1] != documents.shape[1]:
        _refuse_rows(call, documents, queries, ("documents", "queries"))
    return documents, queries


def embeddings_of(call: "LossCall", layer: str, query_layer: str | None) -> tuple[Tensor, Tensor]:
    """What layers put out for the queries and the documents of a call in this step.

    Args:
        call: Of logits ``(B, N)``.
        layer: Puts out the documents, and the queries before them if these have no layer of their own.
        query_layer: Puts out the queries.

    Returns:
        Rows of queries ``(B, D)`` and of documents ``(N, D)``.

    Raises:
        MisconfigurationException: If there are not as many.

    """
    queries, documents, _ = embeddings_over_ranks(call, layer, query_layer, None)
    return queries, documents


def embeddings_over_ranks(
    call: "LossCall", layer: str, query_layer: str | None, group: "ProcessGroup | None"
) -> tuple[Tensor, Tensor, slice]:
    """The same where the user's code may have gathered the documents of all ranks; they are gathered here then, too.

    Args:
        call: Of logits ``(B, N)``, or ``(B, W * N)`` rank after rank.
        layer: Puts out the documents, and the queries before them if these have no layer of their own.
        query_layer: Puts out the queries.
        group: The ranks.

    Returns:
        Rows of queries and of the columns' documents, with gradient over the ranks, and which of them are this rank's.

    Raises:
        MisconfigurationException: If there are not as many.

    """
    rows, columns = call.logits.shape
    documents = _rows(call, layer)
    if query_layer is not None:
        queries = _rows(call, query_layer)
    else:
        queries, documents = documents[:rows], documents[rows:]
    check_trained(call.step, [layer] if query_layer is None else [query_layer, layer], [queries, documents])
    first, count = 0, len(documents)
    if group is not None and count * distributed.world_size(group) == columns > 0:
        documents, _, first = distributed.all_gather_rows(documents, group, count)
    if (len(queries), len(documents)) != (rows, columns) or queries.shape[1] != documents.shape[1]:
        _refuse_rows(call, queries, documents, ("queries", "candidates"))
    return queries, documents, slice(first, first + count)


def _refuse_rows(call: "LossCall", rows: Tensor, columns: Tensor, names: tuple[str, str]) -> NoReturn:
    counts = call.logits.shape
    raise MisconfigurationException(
        f"{call} has {counts[0]} {names[0]} and {counts[1]} {names[1]}, and the embeddings of this step are"
        f" {tuple(rows.shape)} and {tuple(columns.shape)}: a row of each is needed, the queries' first. Name"
        " the layers that put them out (`layer`, `query_layer`), once for each row; documents that your code has"
        " gathered from other ranks or keeps in a memory are not known."
    )


def check_trained(step: "Step", layers: Sequence[str], embeddings: Sequence[Tensor], who: str = "") -> None:
    """Refuses embeddings none of which has a gradient, although their layers are trained.

    Args:
        step: The step.
        layers: Those that put them out.
        embeddings: What they put out.
        who: Who asks, where the engine does not say it.

    Raises:
        MisconfigurationException: If nothing would train the layers.

    """
    if not torch.is_grad_enabled() or any(rows.requires_grad for rows in embeddings):
        return
    if all(is_frozen(step.module, layer) for layer in layers):
        return
    named, prefix = " and ".join(map(repr, layers)), f"{who}: " if who else ""
    raise MisconfigurationException(
        f"{prefix}The embeddings that {named} gave in this step have no gradient, so the loss would"
        " not train what makes them: `encode` of sentence-transformers runs without one, as does all under"
        ' `torch.no_grad`. Call the layer itself, as in `model(features)["sentence_embedding"]`.'
    )


def tensor_in(output: object, key: str = "sentence_embedding") -> object:
    """What counts of an output: of a mapping, as modules of sentence-transformers and transformers give, one entry.

    Args:
        output: Of a layer.
        key: The entry.

    Returns:
        The entry; the output itself if it is no mapping or has no such entry.

    """
    return output.get(key, output) if isinstance(output, Mapping) else output


def _rows(call: "LossCall", layer: str) -> Tensor:
    found: list[Any] = [tensor_in(output) for output in call.step.passes.get(layer, ())]
    if not found or not all(isinstance(output, Tensor) and output.dim() == 2 for output in found):
        shapes = ", ".join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in found)
        raise MisconfigurationException(
            f"Layer {layer!r} gave {shapes or 'nothing'} in this step, where embeddings (rows, D) are needed. Name a"
            " layer that puts out one row per text; pooling that your code does beside the layers has to be one"
            " (`mean_pooled` in an nn.Module, say)."
        )
    return torch.cat(found)


def check_cosines(
    call: "LossCall", queries: Tensor, documents: Tensor, temperature: float, dtypes: "Set[torch.dtype]"
) -> None:
    """Refuses a call whose logits are no cosines of these rows over the temperature; a host sync.

    Args:
        call: Of logits ``(B, N)``; those below any cosine were masked by the user's code.
        queries: Unit rows ``(B, D)``.
        documents: Unit rows ``(N, D)``.
        temperature: Above 0.
        dtypes: Those in which rows and logits were computed.

    Raises:
        MisconfigurationException: With the temperature that fits, if one does.

    """
    logits, cosines = call.logits.detach().float(), (queries @ documents.T).detach()
    masked = logits * temperature < -1.5
    logits, cosines = logits.masked_fill(masked, 0.0), cosines.masked_fill(masked, 0.0)
    tolerance = max(2e-3, *(4 * torch.finfo(dtype).eps for dtype in dtypes))
    if (logits * temperature - cosines).abs().max() <= tolerance:
        return
    fitting = float((cosines * logits).sum() / logits.square().sum())
    fits = fitting > 0 and bool((logits * fitting - cosines).abs().max() <= tolerance)
    what = f"cosines over {fitting:.3g}" if fits else "not the cosines of these rows over one temperature"
    advice = "Give that" if fits else "Name the layers whose rows, in this order, the logits are made of"
    raise MisconfigurationException(
        f"The logits of {call} are {what}, as far as the outputs of the layers say, and `temperature` is"
        f" {temperature:g}. {advice}."
    )
