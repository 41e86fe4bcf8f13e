"""How far a student's ranking of a batch's candidates is from a teacher's."""

import torch
from torch import Tensor

__all__ = ["ranking_distillation_losses"]


def ranking_distillation_losses(student: Tensor, teacher: Tensor, temperature: float = 0.05) -> Tensor:
    r"""How far a student's distribution over the candidates of each query is from a teacher's.

    .. math:: \ell_i = \operatorname{KL}\bigl(\operatorname{softmax}(t_i / \tau) \,\big\|\,
        \operatorname{softmax}(s_i / \tau)\bigr)

    not multiplied by :math:`\tau^2`.

    Args:
        student: Cosines of queries and candidates s, ``(B, N)``.
        teacher: The teacher's t, ``(B, N)``.
        temperature: :math:`\tau` of both, above 0.

    Returns:
        ``(B,)``, float32 at least.

    Example:
        >>> cosines = torch.tensor([[0.9, 0.1]])
        >>> ranking_distillation_losses(cosines, cosines)
        tensor([0.])

    """
    wanted, found = (
        (each.to(torch.promote_types(each.dtype, torch.float32)) / temperature).log_softmax(1)
        for each in (teacher.detach(), student)
    )
    return (wanted.exp() * (wanted - found)).sum(1)
