"""The supervised contrastive loss, for any training loop."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.loss.contrastive import supervised_contrastive, unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["supervised_contrastive_loss"]


def supervised_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    group: "ProcessGroup | None" = None,
    capacity: int | None = None,
) -> Tensor:
    r"""Each row is to find those of its class among all others.

    .. math:: \frac1{|A|} \sum_{i \in A} \frac1{|P_i|} \sum_{p \in P_i} -\log
        \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \ne i} e^{z_i \cdot z_a / \tau}}

    with :math:`P_i` the other rows of its class and :math:`A` the rows that have such; the others are among the
    :math:`a` alone.

    Args:
        embeddings: Rows ``(n, ...)``, flattened and normalised; the gradient flows through both ends of a pair.
        labels: Class numbers ``(n,)``, whole numbers of any size.
        temperature: ``tau``, above 0.
        group: Ranks whose rows take part too, each with its own; ``None``: these rows are all there are. With ranks,
            the mean over the ranks is the loss of all rows, and so is the mean of the gradients.
        capacity: Most rows that a rank of the group can have, see ``all_gather_rows``.

    Returns:
        A scalar, float32 (float64 for such embeddings); 0 where every row is alone in its class.

    Raises:
        ValueError: If ``temperature`` is not above 0.

    Example:
        >>> embeddings = torch.tensor([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
        >>> supervised_contrastive_loss(embeddings, torch.tensor([0, 0, 1]), temperature=1.0)
        tensor(0.4846)

    """
    if not temperature > 0:
        raise ValueError(f"supervised_contrastive_loss: `temperature` must be above 0, got {temperature!r}.")
    with torch.autocast(embeddings.device.type, enabled=False):  # exp(1 / 0.07) is beyond float16
        return supervised_contrastive(unit_rows(embeddings), labels, temperature, group, capacity)
