"""A second network that trains as the user's does: its own weights, optimizer, schedulers and order of the data.

It is trained between the batches of the user's network, a part of an epoch at a time, so that no checkpoint is ever
written inside such a part: what a checkpoint holds is a whole number of its batches, and resume is exact.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric
from typing_extensions import override

from lightning_reg.engine.data.indices import BatchIndices, IndexSource
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.host.names import plain_name
from lightning_reg.engine.host.quiet import lent_trainer
from lightning_reg.engine.networks.edits_beside import EditsBeside
from lightning_reg.engine.networks.first_weights import reset_parameters_
from lightning_reg.engine.networks.followed import Follower, Source, TakenOver, regroup_
from lightning_reg.engine.networks.named_weights import load_weights_, weights_of
from lightning_reg.engine.networks.peer import copy_of
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.run.engine import Engine
    from lightning_reg.engine.run.phases import OnLayers

__all__ = ["PeerInit", "PeerStep", "TrainedPeer", "check_trainable"]

PeerInit = Literal["reset", "copy"]


def check_trainable(owner: Technique, trainer: "Trainer", module: "LightningModule") -> None:
    """Refuses setups in which a second network cannot be trained as the user's is.

    Args:
        owner: Whose network it would be.
        trainer: The Trainer that starts to fit.
        module: The user's module.

    Raises:
        MisconfigurationException: Under manual optimization, where ``optimizer_step`` is the user's own, and where a
            strategy splits parameters over processes.

    """
    name, strategy = type(owner).__name__, type(trainer.strategy).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} trains a second network as Lightning trains the module; with automatic_optimization=False only"
            " the module knows how. Use automatic optimization."
        )
    if not strategy.startswith(("SingleDevice", "DDP")):
        raise MisconfigurationException(
            f"{name} keeps a second network whole on every process, which {strategy} does not do. Use DDP or one"
            " device."
        )
    if type(module).optimizer_step is not _base_of(module).optimizer_step:
        raise MisconfigurationException(
            f"{name} trains a second network with the plain optimizer step; {type(module).__name__} overrides"
            " `optimizer_step`. Move what it does to a learning rate scheduler."
        )


class PeerStep(Step):
    """A step of a second network.

    Args:
        trainer: The Trainer of the user's module.
        module: The second network.
        batch: Its batch.
        source: The loader that the batch is from.
        indices: Dataset indices of the batch.
        batch_idx: Position in the epoch.
        begun: Batches of the second network since the start of training, this one included.
        steps: Its optimizer steps so far.

    """

    def __init__(
        self,
        trainer: "Trainer",
        module: "LightningModule",
        batch: Any,
        source: IndexSource,
        indices: BatchIndices,
        batch_idx: int,
        begun: int,
        steps: int,
    ) -> None:
        arguments = (batch_idx,)[: host.arguments_of_training_step(module) - 1]
        super().__init__(trainer, module, batch, {"": (source, indices)}, False, arguments)
        self._begun, self._steps = begun, steps
        self.is_logging = False

    @property
    @override
    def batches_so_far(self) -> int:
        """Batches of the second network begun since the start of training, this one included."""
        return self._begun

    @property
    @override
    def global_step(self) -> int:
        """Optimizer steps of the second network finished."""
        return self._steps

    @property
    @override
    def stream(self) -> str:
        """Its draws are not those of the user's network."""
        return " peer"


class TrainedPeer:
    """A second network with its own optimizer, schedulers, scaler and order of the data; made for one fit.

    Of the module's methods it calls ``training_step``, ``configure_optimizers``, ``backward``,
    ``configure_gradient_clipping`` and ``lr_scheduler_step``, and the transfer hooks of the user's module for its
    batches; other hooks (``on_train_batch_end`` and so on) and what is logged are the user's network's alone. What
    hooks and callbacks set on the user's network it takes over, position by position in the epoch: the mode of each
    layer, which parameters get gradients, and the groups that they add to the optimizer, with learning rate and the
    like. What they do to gradients, to weights, or to the learning rate of the configured groups it does not.
    Precision, gradient clipping and accumulation are the Trainer's. Under DDP gradients are averaged over the ranks
    after the last backward pass of an optimizer step, in one collective, and buffers are those of the first rank at the
    end.

    Memory: parameters, buffers, gradients and optimizer state of the module once more.

    Args:
        trainer: The Trainer that fits.
        module: The user's module.
        owner: Whose it is; its seed chooses weights and order.
        init: ``"reset"``: weights drawn anew by the layers' own ``reset_parameters``. ``"copy"``: those of the module.
        beside: Other techniques, whose edits of layers act on this network as on the user's; see
            :attr:`~lightning_reg.engine.run.phases.OnLayers.edits_second`.
        start: First weights by name, which replace those that ``init`` gave.

    Raises:
        MisconfigurationException: If ``configure_optimizers`` gives several optimizers, one over other parameters than
            the copy's, or a scheduler that waits for a metric.

    Attributes:
        module: The network.
        settings: What it has taken over from the user's network for its present step, ``None`` before the first one.
        steps: Optimizer steps so far.
        loss: Mean loss of the part of an epoch that was trained last, a scalar; ``None`` before.

    """

    def __init__(
        self,
        trainer: "Trainer",
        module: "LightningModule",
        owner: Technique,
        init: PeerInit,
        beside: "Sequence[OnLayers]" = (),
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._trainer, self._owner = trainer, owner
        self.module = copy_of(module)
        reset = init == "reset" and start is None
        kept = reset_parameters_(self.module, owner.derived_seed("weights")) if reset else []
        load_weights_(self.module, start or {}, owner)
        self._edits = EditsBeside(self.module, beside)
        if kept:
            host.rank_zero_warn(
                f"{type(owner).__name__}: the second network starts with the first one's values for {', '.join(kept)}:"
                " their layers have no `reset_parameters`. Define it on the module to draw them anew."
            )
        with lent_trainer(self.module, trainer), isolated_randomness():
            optimizers, self._schedulers = host.optimizers_of(self.module)
        _check_optimizers(owner, self.module, optimizers, self._schedulers)
        self._optimizer: torch.optim.Optimizer = optimizers[0]
        self._scaler = host.new_scaler(trainer)
        self._configured = len(self._optimizer.param_groups)
        self._source = Source(module, trainer.optimizers[0], self._configured)
        self._follower = Follower(self.module)
        self._settings: dict[int, TakenOver] = {}  # by position in the epoch, where they changed
        self._says_rate = True
        self.settings: TakenOver | None = None
        self.steps = self._batches = self._epoch = self._position = 0
        self._scheduled = -1
        self.loss: Tensor | None = None
        self._shared: list[nn.Parameter] | None = None

    # -- training -----------------------------------------------------------------------------------------------------

    def note(self) -> TakenOver:
        """To be called at each step's start of the user's network: what it is set to then, for the step of this one."""
        settings = self._source.now()
        last = self._settings[max(self._settings)] if self._settings else None
        if settings is not last and settings != last:
            self._settings[host.batches_of_epoch(self._trainer) - 1] = settings
        return settings

    def train(self, engine: "Engine", until: int, after_step: Callable[[], None]) -> None:
        """Trains the part of the present epoch that is not trained yet.

        Args:
            engine: The engine of the Trainer.
            until: Position after the last batch: as many as the user's network has had in this epoch.
            after_step: Called after each optimizer step.

        """
        epoch = self._trainer.current_epoch
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0
        if self._position >= until:
            return
        loader = engine.reordered(self._owner)
        draws, losses = loader.draws(epoch)[:until], []
        before = [position for position in self._settings if position < self._position]
        self._take_over(self._settings[max(before)] if before else None)
        with lent_trainer(self.module, self._trainer), torch.enable_grad():
            for position, indices, batch in loader.batches(draws, epoch, self._position):
                self._take_over(self._settings.get(position))
                loss = self._batch(engine, loader.source, indices, batch, position)
                losses += [] if loss is None else [loss.detach().float()]
                if (position + 1) % self._trainer.accumulate_grad_batches == 0 or position + 1 == len(draws):
                    self._optimize(position)
                    after_step()
                self._position = position + 1
        self._position = until
        self._settings = {0: self._settings[max(self._settings)]} if self._settings else {}
        for metric in (layer for layer in self.module.modules() if isinstance(layer, Metric)):
            metric.reset()  # nobody logs it, so nobody else would
        group = host.data_parallel_group(self._trainer)
        self.loss = torch.stack(losses).mean() if losses else self.loss
        if self.loss is not None and group is not None:
            self.loss = distributed.all_reduce_sum(self.loss, group) / distributed.world_size(group)
        distributed.broadcast_(list(self.module.buffers()), group)

    def _take_over(self, settings: TakenOver | None) -> None:
        if settings is None:
            return
        before, self.settings = self.settings, settings
        self._follower.take_over(settings)
        groups = self._optimizer.param_groups
        if before is None or settings.groups != before.groups:
            regroup_(self._optimizer, self.module, settings.groups)
        for group, options in zip(groups[self._configured :], settings.options, strict=True):
            group.update(options)
        if before is not None and settings.is_trained != before.is_trained:
            self._shared = None

    def _check_rates(self) -> None:
        """Says once that something else than a scheduler of both networks sets the learning rate of the user's."""
        other = self._other_rates()
        if other and self._says_rate:
            self._says_rate = False
            host.rank_zero_warn(
                f"{type(self._owner).__name__}: the learning rate of the module's optimizer is {other[0][0]:g}, that of"
                f" the second network's {other[0][1]:g}: a hook or callback sets the former. Set it by a scheduler in"
                " `configure_optimizers`, which both networks have."
            )

    def _other_rates(self) -> list[tuple[float, float]]:
        pairs = zip(self._trainer.optimizers[0].param_groups, self._optimizer.param_groups, strict=False)
        rates = [(first["lr"], second["lr"]) for first, second in pairs if "lr" in first and "lr" in second]
        return [(a, b) for a, b in rates[: self._configured] if not isinstance(a, Tensor) and a != b]

    def end_epoch(self) -> None:
        """Moves the schedulers that count epochs, once in each."""
        epoch = self._trainer.current_epoch
        if self._scheduled < epoch:
            self._scheduled = epoch
            with lent_trainer(self.module, self._trainer):
                self._schedule("epoch", epoch + 1)
            self._check_rates()

    def _batch(
        self, engine: "Engine", source: IndexSource, indices: BatchIndices, batch: Any, position: int
    ) -> Tensor | None:
        trainer = self._trainer
        self._batches += 1
        step = PeerStep(
            trainer,
            self.module,
            host.batch_on_device(trainer, batch),
            source,
            indices,
            position,
            self._batches,
            self.steps,
        )
        with trainer.precision_plugin.train_step_context():
            loss = engine.run_alone(self._owner, step, self._edits.around(step))
        if loss is not None:
            part = loss / trainer.accumulate_grad_batches
            self.module.backward(part if self._scaler is None else self._scaler.scale(part))
        self._edits.rest()
        return loss

    def _optimize(self, position: int) -> None:
        self._average_gradients()
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        self.module.configure_gradient_clipping(
            self._optimizer,
            gradient_clip_val=self._trainer.gradient_clip_val,
            gradient_clip_algorithm=self._trainer.gradient_clip_algorithm,
        )
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad()
        self.steps += 1
        self._schedule("step", position + 1)

    def _schedule(self, interval: str, count: int) -> None:
        for config in self._schedulers:
            if config.interval == interval and count % config.frequency == 0:
                self.module.lr_scheduler_step(config.scheduler, None)

    def _average_gradients(self) -> None:
        group = host.data_parallel_group(self._trainer)
        if group is None:
            return
        params = [p for p in self.module.parameters() if p.requires_grad]
        if self._shared is None:  # agreed on once: which parameters take part in the loss on some rank
            flags = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
            used = distributed.all_reduce_max(flags, group).tolist()
            self._shared = [p for p, is_used in zip(params, used, strict=True) if is_used]
        for p in self._shared:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if sum(p.grad is not None for p in params) != len(self._shared):
            raise MisconfigurationException(
                f"{type(self._owner).__name__}: parameters of the second network have gradients that had none in its"
                " first step, so the ranks do not know which to average. Let every parameter take part in every step."
            )
        distributed.average_([p.grad for p in self._shared if p.grad is not None], group)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that it goes on from, on the CPU: weights, optimizer, schedulers, scaler, and its place."""
        state = {
            "weights": weights_of(self.module),
            "optimizer": self._optimizer.state_dict(),
            "groups": self._names_by_group(),
            "settings": {position: settings.as_state() for position, settings in self._settings.items()},
            "schedulers": [config.scheduler.state_dict() for config in self._schedulers],
            "scaler": {} if self._scaler is None else self._scaler.state_dict(),
            "loss": self.loss,
            **{name: getattr(self, name) for name in _PLACE},
        }
        copied: dict[str, Any] = tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), state)
        return copied

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        here, there = len(self._schedulers), len(state["schedulers"])
        if here != there:
            raise MisconfigurationException(
                f"{type(self._owner).__name__}: the second network was trained with {there} learning-rate schedulers,"
                f" and `configure_optimizers` gives {here} now. Go on with those, or train without `ckpt_path`."
            )
        load_weights_(self.module, state["weights"], self._owner)
        regroup_(self._optimizer, self.module, state["groups"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._settings = {position: TakenOver(**settings) for position, settings in state["settings"].items()}
        for config, own in zip(self._schedulers, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(own)
        self._says_rate = not self._other_rates()  # in a further fit the user's starts anew
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self.loss = state["loss"]
        for name in _PLACE:
            setattr(self, name, state[name])

    def _names_by_group(self) -> list[list[str]]:
        names = {id(p): plain_name(name) for name, p in self.module.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self._optimizer.param_groups]


_PLACE = ("steps", "_batches", "_epoch", "_position", "_scheduled")


def _base_of(module: "LightningModule") -> type[Any]:
    return next(cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule")  # of either twin


def _check_optimizers(
    owner: Technique, module: "LightningModule", optimizers: Sequence[Any], schedulers: Sequence[Any]
) -> None:
    name, found = type(owner).__name__, ""
    params = {id(p) for p in module.parameters()}
    if len(optimizers) != 1:
        found = f"{len(optimizers)} optimizers; it takes one"
    elif isinstance(optimizers[0], torch.optim.LBFGS):
        found = "LBFGS, which evaluates the loss several times per step; use another optimizer"
    elif any(id(p) not in params for group in optimizers[0].param_groups for p in group["params"]):
        found = "an optimizer over parameters that are not the copy's; use `self.parameters()` in it"
    elif any(config.reduce_on_plateau for config in schedulers):
        found = "a scheduler that waits for a metric, and the second network is not validated; use another scheduler"
    if found:
        raise MisconfigurationException(
            f"{name} trains a second network with what `configure_optimizers` of a copy of the module returns, and"
            f" that is {found}."
        )
