"""The inverse participation ratio of neurons, what it says of a network, and the network that has it in closed form."""

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "analytic_weights",
    "discrete_logarithm_order",
    "gain_correlation",
    "inverse_participation_ratio",
    "modular_table",
    "neuron_participation_ratios",
    "neurons_by_ratio",
    "peak_frequencies",
    "training_phase",
]


def inverse_participation_ratio(values: Tensor, power: int = 2) -> Tensor:
    r"""How few frequencies a periodic sequence is made of: 1 for a single one.

    .. math:: A = |\text{rfft}(x)|, \qquad \sum_j \left(\frac{A_j}{\|A\|_2}\right)^{2r}

    The spectrum has the :math:`F = \lfloor p/2 \rfloor + 1` frequencies of a real sequence, the constant among them, so
    that a cosine has 1 and a single one among zeros has :math:`1/F`, the least there is (r = 2). Neither scale nor a
    cyclic shift matters. Zeros have 0. Computed in float32 at least.

    Source:
        Doshi, Das, He and Gromov, "To Grok or not to Grok: Disentangling Generalization and Memorization on Corrupted
        Algorithmic Datasets", ICLR 2024, arXiv 2310.13061; ``calculate_ipr`` of d-doshi/Grokking.

    Differs:
        The paper prints the sum over all p complex frequencies, in which a cosine has 1/2; its code and its figures
        take those of a real sequence, as here. Zeros are 0 and not NaN.

    Args:
        values: ``(..., p)``, floating.
        power: The paper's r, at least 2. Paper: 2.

    Returns:
        ``(...)``, in [0, 1].

    Raises:
        ValueError: If ``power`` is below 2.

    Example:
        >>> angle = 2 * torch.pi * torch.arange(7) / 7
        >>> inverse_participation_ratio(torch.stack([(3 * angle).cos(), torch.eye(7)[0]]))
        tensor([1.0000, 0.2500])

    """
    if power < 2:
        raise ValueError(f"inverse_participation_ratio: `power` must be at least 2, got {power!r}.")
    amplitudes = _amplitudes(values)
    # Of what is divided by its largest nothing overflows when it is squared.
    amplitudes = amplitudes / amplitudes.amax(-1, keepdim=True).clamp(min=torch.finfo(amplitudes.dtype).tiny)
    energy = amplitudes.square()
    shares = energy / energy.sum(-1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    return shares.pow(power).sum(-1)


def _amplitudes(values: Tensor) -> Tensor:
    precise = values if values.dtype is torch.float64 else values.float()  # there is no transform in half precision
    amplitudes: Tensor = torch.fft.rfft(precise, dim=-1).abs()
    return amplitudes


def neuron_participation_ratios(
    input_weight: Tensor, output_weight: Tensor | None = None, blocks: int = 2, order: Tensor | None = None
) -> Tensor:
    r"""The inverse participation ratio of each neuron: the mean over the sequences that its weights are.

    .. math:: \tfrac13 \left(\text{IPR}(U_{k\cdot}) + \text{IPR}(V_{k\cdot}) + \text{IPR}(W_{\cdot k})\right)

    Args:
        input_weight: ``(N, blocks * p)``, of each neuron the weights of its inputs, one block for each number (U, V).
        output_weight: ``(p, N)``, of each neuron the weights to the outputs, W; ``None``: inputs alone.
        blocks: Numbers that the input has. Paper: 2.
        order: ``(q,)``, the residues in the order in which their weights are periodic, see
            :func:`discrete_logarithm_order`; ``None``: 0 to p - 1, that of addition.

    Returns:
        ``(N,)``, in [0, 1].

    """
    sequences = _sequences(input_weight, output_weight, blocks, order)
    return inverse_participation_ratio(sequences).mean(0)


def peak_frequencies(
    input_weight: Tensor, output_weight: Tensor | None = None, blocks: int = 2, order: Tensor | None = None
) -> Tensor:
    """The frequency at which each neuron's sequences have most of their energy, all together.

    A neuron whose weights are all alike peaks at 0: its inverse participation ratio is 1, and it computes nothing.

    Args:
        input_weight: See :func:`neuron_participation_ratios`.
        output_weight: The same.
        blocks: The same.
        order: The same.

    Returns:
        ``(N,)``, int64, from 0 to p // 2.

    """
    energy = _amplitudes(_sequences(input_weight, output_weight, blocks, order)).square()
    shares = energy / energy.sum(-1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    return shares.sum(0).argmax(-1)


def _sequences(input_weight: Tensor, output_weight: Tensor | None, blocks: int, order: Tensor | None) -> Tensor:
    """``(blocks + 1, N, p)``."""
    parts = list(input_weight.chunk(blocks, 1))
    parts += [] if output_weight is None else [output_weight.T]
    stacked = torch.stack(parts)
    return stacked if order is None else stacked.index_select(-1, order.to(stacked.device))


def neurons_by_ratio(
    ratios: Tensor, order: Literal["lowest", "highest", "random"] = "lowest", generator: torch.Generator | None = None
) -> Tensor:
    """Neurons in the order in which they are pruned; of equal ones the first comes first.

    Args:
        ratios: ``(N,)``.
        order: ``"lowest"`` first, those that memorise; ``"highest"``; or ``"random"``, to compare with.
        generator: Of the random order, on the CPU.

    Returns:
        Their indices ``(N,)``.

    Raises:
        ValueError: If the order is unknown.

    Example:
        >>> neurons_by_ratio(torch.tensor([0.5, 0.1, 0.9]))
        tensor([1, 0, 2])

    """
    if order == "random":
        return torch.randperm(len(ratios), generator=generator).to(ratios.device)
    if order not in ("lowest", "highest"):
        raise ValueError(f"neurons_by_ratio: `order` must be 'lowest', 'highest' or 'random', got {order!r}.")
    return ratios.argsort(descending=order == "highest", stable=True)


def gain_correlation(gains: Tensor, ratios: Tensor) -> Tensor:
    r"""Correlation over neurons of the size of their gains with their inverse participation ratio.

    Batch normalisation does not raise the ratio of neurons that memorise; it makes their gains small. Then this is
    positive. It is 0 while all gains, or all ratios, are alike.

    Args:
        gains: ``(N,)``, the weight of a batch normalisation of the neurons.
        ratios: ``(N,)``.

    Returns:
        Pearson's correlation of their absolute value with the ratios, in [-1, 1].

    Example:
        >>> gain_correlation(torch.tensor([0.1, -0.5]), torch.tensor([0.2, 0.9]))
        tensor(1.)

    """
    one, two = (v.float() - v.float().mean() for v in (gains.abs(), ratios))
    size = one.norm() * two.norm()
    return torch.where(size > 0, one @ two / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0).clamp(-1, 1)


def training_phase(train_accuracy: float, test_accuracy: float, corruption: float) -> str:
    """Which of the paper's phases a network trained on wrong labels is in.

    Args:
        train_accuracy: On the training labels, wrong ones included, in [0, 1].
        test_accuracy: On the test pairs, in [0, 1].
        corruption: Share of training labels that were redrawn, the paper's xi, in [0, 1).

    Returns:
        With a test accuracy of 0.9 or more: ``"coexistence"`` where the training accuracy is 0.9 or more, too, ``"full
        inversion"`` where it is below 1.05 - xi, as of one who unlearned all wrong labels, and ``"partial inversion"``
        between. Otherwise ``"memorisation"`` with a training accuracy of 0.9 or more, and ``"confusion"`` below.

    Example:
        >>> training_phase(0.97, 0.99, 0.2), training_phase(0.805, 1.0, 0.2)
        ('coexistence', 'full inversion')

    """
    if test_accuracy < 0.9:
        return "memorisation" if train_accuracy >= 0.9 else "confusion"
    if train_accuracy >= 0.9:
        return "coexistence"
    return "partial inversion" if train_accuracy >= 1.05 - corruption else "full inversion"


def modular_table(p: int, operation: Literal["add", "multiply"] = "add") -> tuple[Tensor, Tensor]:
    """All pairs of residues and what they give.

    Args:
        p: Modulus.
        operation: ``"add"`` or ``"multiply"``.

    Returns:
        The pairs ``(p * p, 2)`` and the results ``(p * p,)``, int64.

    Example:
        >>> pairs, results = modular_table(3)
        >>> pairs[5].tolist(), int(results[5])
        ([1, 2], 0)

    """
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    return pairs, (pairs.sum(1) if operation == "add" else pairs.prod(1)) % p


def discrete_logarithm_order(p: int) -> Tensor:
    """The residues other than 0 as powers of a generator: in this order multiplication is addition of exponents.

    Args:
        p: A prime.

    Returns:
        ``(p - 1,)``: 1, g, g², ... modulo p, g the least number whose powers are all of them.

    Raises:
        ValueError: If there is none, p being no prime (or 4, or such).

    Example:
        >>> discrete_logarithm_order(5)
        tensor([1, 2, 4, 3])

    """
    for root in range(2, p):
        powers = [1]
        # Modulo a composite p powers may go round without coming to 0 or 1.
        while len(powers) < p and (power := powers[-1] * root % p) not in (0, 1):
            powers.append(power)
        if len(powers) == p - 1:
            return torch.tensor(powers)
    raise ValueError(f"discrete_logarithm_order: `p` must be a prime above 2, got {p!r}.")


def analytic_weights(p: int, width: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    r"""Weights with which a network of squares, :math:`W (U e_m + V e_n)^2`, adds modulo p: nothing is trained.

    .. math:: U_{ki} = s \cos(2\pi \sigma_k i / p + \phi_k), \quad V_{kj} = s \cos(2\pi \sigma_k j / p + \psi_k), \quad
        W_{qk} = s \cos(2\pi \sigma_k q / p + \phi_k + \psi_k)

    The phases are random, and the frequencies :math:`\sigma` a permutation. With :math:`s = (2/N)^{1/3}` the right
    output is about 1 and the others about 0: one-hot targets. With p = 97 all pairs
    are added rightly from about N = 2p on; where p is small the random phases cancel less well, and N must be larger.

    Source:
        Gromov, "Grokking modular arithmetic", 2023, arXiv 2301.02679; equation of the analytic solution in arXiv
        2310.13061.

    Differs:
        The exponent of the printed scale has the other sign, which makes the outputs :math:`N^2/4` times as large; the
        largest output, and so the accuracy, is the same.

    Args:
        p: Modulus.
        width: Number of neurons, N.
        generator: Of phases and frequencies, on the CPU; ``None``: the global one.

    Returns:
        The input weights ``(N, 2p)``, U beside V, and the output weights ``(p, N)``, float32.

    """
    frequencies = (torch.randperm(width, generator=generator) + 1).double()[:, None]
    first, second = (2 * math.pi * torch.rand(2, width, 1, generator=generator, dtype=torch.double)).unbind()
    turns = 2 * math.pi * frequencies * torch.arange(p) / p  # (N, p)
    scale = (2 / width) ** (1 / 3)
    inputs = torch.cat([(turns + first).cos(), (turns + second).cos()], 1)
    return (scale * inputs).float(), (scale * (turns + first + second).cos().T).float()
