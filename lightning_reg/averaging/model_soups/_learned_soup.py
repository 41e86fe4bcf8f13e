"""Learned soup: mixing weights by gradient descent on held-out data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_reg.averaging._factors import warn_of_factors
from lightning_reg.averaging._state_dicts import StateDict, accumulated, aligned, check_patterns, is_averaged
from lightning_reg.engine.host.names import Patterns, matches, plain_name

__all__ = ["LearnedSoup"]


class LearnedSoup(nn.Module):
    r"""A model whose parameters are a learned mix of those of several models, and an inverse temperature.

    .. math:: \beta\, f\Bigl(x, \textstyle\sum_i a_i \theta_i\Bigr), \qquad a = \operatorname{softmax}(r)

    with one :math:`r \in \mathbb{R}^k` for the model, or one for each parameter tensor. It starts as the uniform soup:
    r is 1 everywhere. Only r and :math:`\beta` are parameters; the model handed in is not changed.

    Source:
        Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, appendix I; settings of the released script (which
        learns per tensor): AdamW, learning rate 0.05, no weight decay, batch 256, 5 epochs.

    Differs:
        Tensors are matched by name, not by position. Floating-point buffers are the uniform mean; other buffers are the
        first model's. The settings of the paper's version with one weight per model are not known.

    Memory: all k models, stacked in their own type, on the device of this module.

    Args:
        module: Gives the forward pass. Its parameters must be among the keys of the state dicts.
        state_dicts: The k models.
        per: ``"tensor"`` for a mix per parameter tensor, ``"model"`` for one mix.
        exclude: Patterns of keys to leave as the first model has them. Those may differ, or be in one alone.

    Raises:
        ValueError: If ``per`` is something else, a parameter is missing or not finite, or the state dicts differ.

    Example:
        >>> module = nn.Linear(2, 2, bias=False)
        >>> soup = LearnedSoup(module, [{"weight": torch.zeros(2, 2)}, {"weight": torch.ones(2, 2)}])
        >>> soup(torch.ones(1, 2)), soup.mixing_weights()
        (tensor([[1., 1.]], grad_fn=<MulBackward0>), tensor([[0.5000, 0.5000]]))

    """

    def __init__(
        self,
        module: nn.Module,
        state_dicts: Sequence[StateDict],
        per: Literal["tensor", "model"] = "tensor",
        exclude: Patterns = None,
    ) -> None:
        super().__init__()
        if per not in ("tensor", "model"):
            raise ValueError(f"LearnedSoup: `per` must be 'tensor' or 'model', got {per!r}.")
        if not state_dicts:
            raise ValueError("LearnedSoup: `state_dicts` must hold at least one state dict, got none.")
        self.per = per
        members = aligned(state_dicts, None, exclude)
        check_patterns("LearnedSoup", "exclude", exclude, members)
        warn_of_factors("LearnedSoup", members, exclude)
        self._module = [module]  # in a list: its parameters are not this module's
        parameters = {name: plain_name(name) for name, _ in module.named_parameters()}
        missing = [key for key in parameters.values() if key not in members[0]]
        if missing:
            raise ValueError(f"LearnedSoup: the state dicts lack parameters of `module`: {missing[:5]}.")
        self._keys = {name: key for name, key in parameters.items() if not matches(key, exclude)}
        self._names = list(self._keys)
        self._fixed = [name for name in parameters if name not in self._keys]
        self._fixed += [name for name, _ in module.named_buffers()]
        learned = set(self._keys.values())
        self._first = {key: members[0][key] for key in members[0] if key not in learned}  # each is read once
        for position, name in enumerate(self._names):
            values = [member[self._keys[name]].detach() for member in members]
            bad = [position for position, value in enumerate(values) if not value.isfinite().all()]
            if bad:
                raise ValueError(
                    f"LearnedSoup: {name!r} is not finite in state dict {bad[0]}, and a mix with it has no loss to"
                    " learn from. Leave that one out."
                )
            stacked = torch.stack(values)
            self.register_buffer(f"stacked_{position}", stacked, persistent=False)
        for key, value in self._first.items():
            if is_averaged(value) and not matches(key, exclude):
                self._first[key] = torch.stack([accumulated(m[key]) for m in members]).mean(0).to(value.dtype)
        self._fixed = [name for name in self._fixed if plain_name(name) in self._first]
        for position, name in enumerate(self._fixed):  # as buffers, which move with this module
            self.register_buffer(f"fixed_{position}", self._first[plain_name(name)].detach(), persistent=False)
        rows = len(self._names) if per == "tensor" else 1
        self.raw = nn.Parameter(torch.ones(rows, len(state_dicts)))
        self.beta = nn.Parameter(torch.ones(()))

    def mixing_weights(self) -> Tensor:
        """The weights ``a``: ``(tensors, k)`` in the order of ``named_parameters()``, or ``(1, k)``; rows sum to 1."""
        return self.raw.detach().softmax(1)

    @override
    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """The module's output under the mixed parameters, times ``beta``; arguments go to the module."""
        output: Tensor = functional_call(self._module[0], {**self._mixed(), **self._rest_of_soup()}, args, kwargs)
        return self.beta * output

    def fit(
        self,
        batches: Iterable[Any],
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        lr: float = 0.05,
        epochs: int = 5,
    ) -> list[float]:
        """Learns the mixing weights and ``beta`` by AdamW without weight decay.

        Args:
            batches: Held-out pairs ``(inputs, targets)``, iterated once per epoch.
            loss: Of the outputs and the targets.
            lr: Learning rate, positive.
            epochs: Number of passes, at least 1.

        Returns:
            Mean loss of each epoch.

        Raises:
            ValueError: If ``lr`` or ``epochs`` are not positive.

        """
        if not lr > 0:
            raise ValueError(f"LearnedSoup: `lr` must be positive, got {lr!r}.")
        if epochs < 1:
            raise ValueError(f"LearnedSoup: `epochs` must be at least 1, got {epochs!r}.")
        optimizer = torch.optim.AdamW([self.raw, self.beta], lr=lr, weight_decay=0.0)
        history = []
        for _ in range(epochs):
            losses = []
            for inputs, targets, *_ in batches:
                value = loss(self(inputs.to(self.raw.device)), targets.to(self.raw.device))
                gradients = torch.autograd.grad(value, [self.raw, self.beta])
                self.raw.grad, self.beta.grad = gradients
                optimizer.step()
                losses.append(value.detach())
            history.append(float(torch.stack(losses).mean()))
        self.raw.grad = self.beta.grad = None
        return history

    def soup(self) -> dict[str, Any]:
        """State dict of the present mix, without ``beta``, which does not change which class is largest.

        Returns:
            A new state dict with the keys of the first model.

        """
        weights = self.mixing_weights().double()
        result: dict[str, Any] = {}
        by_key = {self._keys[name]: position for position, name in enumerate(self._names)}
        for key in (*by_key, *self._first):
            if key in by_key:
                stacked = self._stacked(by_key[key])
                row = weights[by_key[key] if self.per == "tensor" else 0]
                wide = accumulated(stacked)
                result[key] = torch.tensordot(row.to(wide.dtype), wide, 1).to(stacked.dtype)
            else:
                value = self._first[key]
                result[key] = value.clone() if isinstance(value, Tensor) else value
        return result

    def _mixed(self) -> dict[str, Tensor]:
        weights = self.raw.softmax(1)
        mixed = {}
        for position, name in enumerate(self._names):
            row = weights[position if self.per == "tensor" else 0]
            stacked = self._stacked(position)
            with torch.autocast(stacked.device.type, enabled=False):  # sums of weights keep the weights' precision
                mixed[name] = torch.tensordot(row.to(stacked.dtype), stacked, 1)
        return mixed

    def _rest_of_soup(self) -> dict[str, Tensor]:
        # Clones: in train mode batch norm would write into them.
        return {name: self.get_buffer(f"fixed_{n}").clone() for n, name in enumerate(self._fixed)}

    def _stacked(self, position: int) -> Tensor:
        return self.get_buffer(f"stacked_{position}")
