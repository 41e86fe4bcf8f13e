"""What the penalties need of a step: scores and targets of the samples, rows of all ranks, inputs of the head."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.distributed import all_gather_rows
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.edits import InputCall, LayerEdit, LayerEdits
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.run.part import Part

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.technique import Technique

__all__ = ["HeadInput", "global_rows", "scores_and_targets", "squared_scores"]

_BINARY = F.binary_cross_entropy_with_logits


def scores_and_targets(owner: str, call: "LossCall") -> tuple[Tensor, Tensor, bool]:
    """Logits and targets of a classification.

    Args:
        owner: Class to name in errors.
        call: The loss call.

    Returns:
        Logits ``(B, C)``, float32 at least, with gradient; probabilities that the loss compares them with, ``(B, C)``;
        and whether it is a binary loss of each of the C.

    Raises:
        MisconfigurationException: If it is no classification, or one whose classes count differently.

    """
    if call.function is _BINARY:
        weighted = [name for name in ("weight", "pos_weight") if call.arguments.get(name) is not None]
        if weighted:
            raise MisconfigurationException(
                f"{owner}: {call} has a `{weighted[0]}`, which this penalty does not know. Leave it out, or choose"
                ' method="vrex" or "iga".'
            )
        logits, target = call.input, call.arguments["target"]
        return _full(logits.reshape(call.batch_size, -1)), _full(target.reshape(call.batch_size, -1)), True
    logits, target = _full(call.logits), call.target
    if target is None:
        target = call.labels
    if target.is_floating_point():
        probabilities = target.reshape(logits.shape).to(logits.dtype)
    else:  # an ignored sample has a number that is no class, and is in no environment
        numbers = target.reshape(-1, 1).clamp(0, logits.shape[1] - 1)
        probabilities = torch.zeros_like(logits).scatter(1, numbers, 1.0)
    smoothing = float(call.arguments.get("label_smoothing", 0.0))
    return logits, probabilities * (1 - smoothing) + smoothing / logits.shape[1], False


def squared_scores(owner: str, call: "LossCall") -> Tensor:
    """Mean of the squared outputs of each sample ``(B,)``, with gradient."""
    if call.function is F.nll_loss:
        raise MisconfigurationException(
            f'{owner}: {call} gets log-probabilities, and method="sd" is about logits. Compute the loss with'
            " F.cross_entropy."
        )
    output = call.input if call.function is not None else call.logits
    return _full(output).square().reshape(call.batch_size, -1).mean(1)


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def global_rows(step: "Step", rows: Tensor, membership: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and groups of the samples of all ranks, dealt in turn as torch's sampler does.

    Args:
        step: The step.
        rows: ``(B, K)``, with gradient.
        membership: ``(B, E)``.

    Returns:
        ``(N, K)`` and ``(N, E)``; padding is in no group. Each rank computes the same value of them, and the mean of
        the ranks' gradients is the gradient of that value.

    """
    group = host.data_parallel_group(step.trainer)
    if group is None:
        return rows, membership
    both = torch.cat([rows, membership.to(rows)], 1)
    gathered, there, _ = all_gather_rows(both, group, step.capacity)
    gathered = torch.where(there[:, None], gathered, 0.0)
    gathered = gathered.reshape(group.size(), -1, both.shape[1]).transpose(0, 1).flatten(0, 1)
    return gathered[:, : rows.shape[1]], gathered[:, rows.shape[1] :].detach()


class HeadInput(Part):
    """Keeps what the linear head gets, after all edits of its input.

    Args:
        module: The user's module.
        owner: Whose part it is.
        head: Name of the head; ``None`` for the last linear layer.

    """

    def __init__(self, module: "LightningModule", owner: "Technique", head: str | None) -> None:
        self._module, self._owner, self._head = module, owner, head
        self._name = type(owner).__name__
        self._edits = LayerEdits(module, ())
        self._layer: nn.Linear | None = None
        self._given: list[Tensor] = []
        self._is_checked = False

    @property
    def classes(self) -> int:
        """Number of logits of the head."""
        return 0 if self._layer is None else self._layer.out_features

    @override
    def prepare(self) -> None:
        layers = named_layers(self._module)
        head = _last_linear(self._name, layers) if self._head is None else self._head
        layer = find_layer(layers, head, self._name)
        if not isinstance(layer, nn.Linear):
            raise MisconfigurationException(
                f"{self._name}(head={head!r}) must name the linear layer that puts out the logits, found {layer}."
            )
        self._head, self._layer = head, layer
        self._edits = LayerEdits(self._module, [LayerEdit(self._owner, [head], self._keep, of_inputs=True)])

    @override
    @contextmanager
    def around(self, step: "Step") -> Iterator[None]:
        self._edits.open(step)
        step.notes[self._owner] = self
        try:
            yield
        finally:
            self._edits.shut()
            self._given = []

    @override
    def rest(self) -> None:
        self._edits.rest()

    @override
    def close(self) -> None:
        self._edits.close()

    def _keep(self, call: InputCall) -> Any:
        if not call.again and isinstance(call.input, Tensor):
            self._given.append(call.input)

    def features(self, step: "Step", logits: Tensor) -> Tensor:
        """The inputs of the head for the samples, with a column of ones for its bias.

        Args:
            step: The step.
            logits: What the loss gets, ``(B, C)``; in the first step they are compared with those of the head.

        Returns:
            ``(B, D)``, float32 at least.

        Raises:
            MisconfigurationException: If the head has not run once for these samples, or the logits are not its own.

        """
        found = self._given[-1] if len(self._given) == 1 else None
        if found is not None and step.views is not None:
            found = step.views.own(found)
        if self._layer is None or found is None or found.dim() != 2 or len(found) != len(logits):
            shapes = ", ".join(str(tuple(given.shape)) for given in self._given) or "nothing"
            raise MisconfigurationException(
                f"{self._name}: the head {self._head!r} has got {shapes} in this step, where one row of features is"
                f" needed for each of {len(logits)} samples, (B, D), once. Name the layer that makes the logits with"
                " `head=...`."
            )
        features = _full(found)
        if not self._is_checked:  # once in a fit; after it nothing is read on the host
            self._check(self._layer, features, logits)
        self._is_checked = True
        ones = int(getattr(self._layer, "bias", None) is not None)
        return torch.cat([features, features.new_ones(len(features), ones)], 1)

    @torch.no_grad()
    def _check(self, layer: nn.Linear, features: Tensor, logits: Tensor) -> None:
        bias = getattr(layer, "bias", None)
        own = F.linear(features, layer.weight.to(features), None if bias is None else bias.to(features))
        # What the loss gets may be log-probabilities of them, and of half precision.
        alike = own.shape == logits.shape and any(
            torch.allclose(one, logits, rtol=0.02, atol=0.02 * float(logits.abs().amax().clamp(min=1)))
            for one in (own, own.log_softmax(1))
        )
        if not alike:
            raise MisconfigurationException(
                f"{self._name}: the loss does not get what the head {self._head!r} puts out, so gradients of its"
                " weights are not known sample by sample. Name the linear layer that makes the logits with"
                " `head=...`."
            )


def _last_linear(owner: str, layers: Mapping[str, nn.Module]) -> str:
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not linear:
        raise MisconfigurationException(
            f'{owner}: the module has no linear layer whose gradients method="fishr" could compare. Choose another'
            " method."
        )
    return linear[-1]
