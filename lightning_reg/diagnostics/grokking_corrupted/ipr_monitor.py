"""IPRMonitor: while a network learns, which of its neurons have become periodic, and what it remembers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.diagnostics.grokking_corrupted._layers import check_shapes, input_view, weight_of
from lightning_reg.diagnostics.grokking_corrupted.core import (
    discrete_logarithm_order,
    gain_correlation,
    neuron_participation_ratios,
    peak_frequencies,
)
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.modules import own_parameters
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.technique import Technique
from lightning_reg.engine.weights import shards
from lightning_reg.engine.weights.strategies import check_editable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["IPRMonitor"]


class IPRMonitor(Technique):
    r"""Logs the inverse participation ratio of neurons while a network learns to calculate with residues.

    A neuron that generalises has weights that are periodic in the residue, with a ratio near 1; one that memorises has
    all frequencies, with a ratio near :math:`1/(\lfloor p/2 \rfloor + 1)`. Training is left alone, to the last bit.
    On the steps on which Lightning logs, after the optimizer's, it logs

    - ``mean_ratio``, and the shares of neurons ``share_low`` below ``low`` and ``share_high`` of ``high`` at least;
    - ``share_constant``, of neurons that peak at frequency 0: all their weights are alike (or zero), and they compute
      nothing, though the ratio of those alike is high;
    - with a ``norm_layer``, ``gain_correlation``: batch normalisation does not raise the ratio of neurons that
      memorise, it makes their gains small, and then this is positive;
    - where the datamodule has a method ``accuracies(module)``, as :class:`CorruptedModularArithmetic` has, each of the
      numbers that it gives, by name: ``train_accuracy``, ``corrupted_accuracy``, ``clean_accuracy``,
      ``test_accuracy``. NaN is left out.

    Use it where a weight has an axis of residues: one-hot inputs, or an embedding. Leave it elsewhere: the spectrum of
    features without a cyclic order says nothing. Of weights that are split over processes the named ones are gathered.

    Source:
        Doshi, Das, He and Gromov, "To Grok or not to Grok: Disentangling Generalization and Memorization on Corrupted
        Algorithmic Datasets", ICLR 2024, arXiv 2310.13061; ``calculate_ipr`` of d-doshi/Grokking.

    Differs:
        The paper looks at histograms; two bounds in place of them, the share of constant neurons and the correlation as
        one number are ours. So is the order of residues for multiplication.

    Args:
        input_layer: Name of the layer that reads the residues: a Linear, weight ``(N, blocks * p)``, or an Embedding,
            ``(p, N)``, whose columns are neurons.
        output_layer: Name of the last layer, a Linear of weight ``(p, N)``; ``None``: the inputs' weights alone.
        blocks: Numbers that the input layer reads; 1 for an embedding. Paper: 2.
        low: Ratio below which a neuron counts as memorising, in (0, 1), at most ``high``. Paper: none.
        high: Ratio from which one counts as periodic, in (0, 1). Paper: none.
        operation: ``"add"``: the residues in their order; ``"multiply"``: those other than 0 by discrete logarithm,
            p a prime.
        norm_layer: Name of a normalisation of the neurons, with a gain for each; ``None``: none.
        network: Name of the module that the accuracies are of; ``None``: the LightningModule's ``forward``.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = IPRMonitor("net.hidden", "net.head", network="net")
        >>> trainer = Trainer(max_steps=500, callbacks=[monitor], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        input_layer: str,
        output_layer: str | None = None,
        blocks: int = 2,
        low: float = 0.2,
        high: float = 0.5,
        operation: Literal["add", "multiply"] = "add",
        norm_layer: str | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_number(self, "blocks", blocks, low=1, integer=True)
        check_number(self, "high", high, low=0, low_open=True, high=1, high_open=True)
        check_number(self, "low", low, low=0, low_open=True, high=high)
        check_choice(self, "operation", operation, ("add", "multiply"))
        self.input_layer, self.output_layer, self.blocks = input_layer, output_layer, blocks
        self.low, self.high, self.operation = low, high, operation
        self.norm_layer, self.network = norm_layer, network
        self._last_step = 0

    @override
    def describe(self) -> str:
        layers = self.input_layer if self.output_layer is None else f"{self.input_layer} and {self.output_layer}"
        return f"watches {layers}: low below {self.low:g}, high from {self.high:g}"

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: LightningModule) -> None:
        check_editable(self, trainer, "reads")
        try:
            inputs, outputs = self._weights(pl_module)
            check_shapes("IPRMonitor", (self.input_layer, self.output_layer), inputs, outputs, self.blocks)
            self._order(inputs)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._gains(pl_module, len(inputs))
        if self._measure(trainer) is not None:
            self._measured(pl_module)

    def _weights(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """As they stand in the module: a row for each neuron, a column for each."""
        inputs = input_view(*weight_of(module, self.input_layer, "IPRMonitor"))
        outputs = None if self.output_layer is None else weight_of(module, self.output_layer, "IPRMonitor")[1]
        return inputs, outputs

    def _order(self, inputs: Tensor) -> Tensor | None:
        return None if self.operation == "add" else discrete_logarithm_order(inputs.shape[1] // self.blocks)

    def _gains(self, module: nn.Module, neurons: int) -> Tensor | None:
        if self.norm_layer is None:
            return None
        layers = {plain_name(path): layer for path, layer in module.named_modules()}
        gains = own_parameters(layers[self.norm_layer]).get("weight") if self.norm_layer in layers else None
        if gains is None or tuple(gains.shape) != (neurons,):
            found = "there is no such layer" if self.norm_layer not in layers else "found none"
            found = found if gains is None else f"found a weight {tuple(gains.shape)}"
            raise MisconfigurationException(
                f"IPRMonitor: norm_layer={self.norm_layer!r} must name a normalisation with a gain for each of"
                f" {neurons} neurons, {found}."
            )
        return shards.whole(gains)

    def _measure(self, trainer: "Trainer") -> Callable[[nn.Module], Any] | None:
        measure = getattr(getattr(trainer, "datamodule", None), "accuracies", None)
        return measure if callable(measure) else None

    def _measured(self, module: LightningModule) -> nn.Module:
        """Whose accuracies are measured."""
        if self.network is None:
            if getattr(module.forward, "__func__", None) is LightningModule.forward:
                raise MisconfigurationException(
                    "IPRMonitor: the datamodule measures accuracies of what `forward` returns, and the module has no"
                    " `forward`. Name the network in it: network='net'."
                )
            return module
        networks: dict[str, nn.Module] = {plain_name(path): layer for path, layer in module.named_modules()}
        if self.network not in networks:
            raise MisconfigurationException(
                f"IPRMonitor: there is no network {self.network!r}; there are {', '.join(filter(None, networks))}."
            )
        return networks[self.network]

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # gradients are being accumulated
        self._last_step = trainer.global_step
        if host.is_logging_step(trainer):
            scalars = self._of_neurons(pl_module) | self._accuracies(trainer, pl_module)
            attached_engine(trainer).log_own(self, scalars)

    def _of_neurons(self, module: LightningModule) -> dict[str, Tensor | float]:
        parts = self._weights(module)
        inputs, outputs = shards.whole(parts[0]), None if parts[1] is None else shards.whole(parts[1])
        order = self._order(inputs)
        ratios = neuron_participation_ratios(inputs, outputs, self.blocks, order)
        peaks = peak_frequencies(inputs, outputs, self.blocks, order)
        scalars: dict[str, Tensor | float] = {
            "mean_ratio": ratios.mean(),
            "share_low": (ratios < self.low).float().mean(),
            "share_high": (ratios >= self.high).float().mean(),
            "share_constant": (peaks == 0).float().mean(),
        }
        gains = self._gains(module, len(ratios))
        return scalars if gains is None else scalars | {"gain_correlation": gain_correlation(gains, ratios)}

    def _accuracies(self, trainer: "Trainer", module: LightningModule) -> dict[str, Tensor | float]:
        measure = self._measure(trainer)
        if measure is None:
            return {}
        found = measure(self._measured(module))
        shards.reshard_(module)  # others may look at the weights behind this pass
        named = found._asdict() if hasattr(found, "_asdict") else found
        if not isinstance(named, Mapping):
            raise MisconfigurationException(
                "IPRMonitor: `accuracies` of the datamodule must return numbers by name, a NamedTuple or a mapping, got"
                f" {type(found).__name__}."
            )
        accuracies = {f"{name}_accuracy": torch.as_tensor(value) for name, value in named.items()}
        return {name: value for name, value in accuracies.items() if not bool(value.isnan())}
