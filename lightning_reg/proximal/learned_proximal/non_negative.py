"""Weights that are not negative after any step of the optimizer."""

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.errors import MisconfigurationException, check_patterns
from lightning_reg.engine.host.names import matches, plain_name
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.run.phases import ThroughMap
from lightning_reg.engine.technique import GradientTechnique
from lightning_reg.engine.weights import shards
from lightning_reg.engine.weights.strategies import check_editable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["NonNegative"]


class NonNegative(GradientTechnique):
    r"""Puts weights back to at least zero after each step of the optimizer, by projection.

    .. math:: W \leftarrow \max(W, 0)

    It follows real steps alone: once however many batches are accumulated, not where the scaler of half precision skips
    a step, and before anybody else looks at the weights (averages, checkpoints, validation). So input-convex and
    monotone networks stay so. It projects once when the fit starts, too, so that the first step is one of such a
    network already.

    Leave these weights out of weight decay: it pulls them to the bound, where depth is lost. Under ``fully_shard`` each
    process projects its own part.

    Source:
        Fang, Buchanan and Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024, arXiv
        2310.14344; ``wclip`` of the released code.

    Differs:
        It projects at the start as well; the bound can be another one.

    Args:
        params: Patterns of parameter names as in ``named_parameters()``, each of which must match: those of a
            :class:`LPN` that is ``self.net`` are ``["net.inner.*", "net.last.*"]``.
        minimum: The bound. Paper: 0. Neutral: one below all weights.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If ``minimum`` is no number.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> projection = NonNegative(["net.inner.*", "net.last.*"])
        >>> trainer = Trainer(max_steps=40_000, callbacks=[projection], logger=False, enable_checkpointing=False)

    """

    def __init__(self, params: list[str] | str, minimum: float = 0.0, name: str | None = None) -> None:
        super().__init__(name=name)
        check_number(self, "minimum", minimum)
        self.params, self.minimum = params, minimum
        self._names: list[str] = []

    @override
    def describe(self) -> str:
        weights = f"; {len(self._names)} weights" if self._names else ""
        return f"{self.params} at least {self.minimum:g}{weights}"

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        check_editable(self, trainer)
        names = [name for name, _ in pl_module.named_parameters()]
        check_patterns(self, "params", self.params, map(plain_name, names), "parameter")
        self._names = [name for name in names if matches(plain_name(name), self.params)]
        chosen = {plain_name(name) for name in self._names}
        for other in host.callbacks(trainer):
            both = chosen.intersection(other.weights_to_map(pl_module)) if isinstance(other, ThroughMap) else ()
            if both:
                raise MisconfigurationException(
                    f"NonNegative and {type(other).__name__} cannot stand together on {sorted(both)[0]!r}:"
                    f" {type(other).__name__} trains it through a map, which a projection behind it would undo in each"
                    " step. Take it out of one of them."
                )

        self._project_(pl_module)

    def _project_(self, module: "LightningModule") -> None:
        here = [shards.local(module.get_parameter(name)) for name in self._names]  # without gradient
        torch._foreach_clamp_min_(here, self.minimum)

    @override
    def after_step(self, module: "LightningModule", optimizer: "Optimizer") -> None:
        self._project_(module)

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if host.is_logging_step(trainer):
            params = {name: pl_module.get_parameter(name) for name in self._names}
            at_bound = {name: (shards.local(p) <= self.minimum).sum() for name, p in params.items()}
            share = shards.total(at_bound, params) / sum(p.numel() for p in params.values())
            attached_engine(trainer).log_own(self, {"share_at_minimum": share})
