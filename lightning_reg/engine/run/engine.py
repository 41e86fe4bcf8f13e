"""The engine: stands around ``Strategy.training_step`` and lets its parts act on one batch after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_reg.engine.data.indices import check_has_indices
from lightning_reg.engine.data.loaders import TrainLoaders
from lightning_reg.engine.data.order import Reordered
from lightning_reg.engine.host import epochs
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.lookup import ENGINES
from lightning_reg.engine.loss.result import loss_of
from lightning_reg.engine.run import passes, report
from lightning_reg.engine.run.composition import check_composition
from lightning_reg.engine.run.draw_part import DrawPart
from lightning_reg.engine.run.hooks import FirstHooks, LastHooks
from lightning_reg.engine.run.part import Part, overriding
from lightning_reg.engine.run.parts import BatchPart, LossPart, make_parts
from lightning_reg.engine.run.phases import Member, OnBatch, OnDraws, draws_samples, taking_part
from lightning_reg.engine.run.watching import Watch
from lightning_reg.engine.step import Stage, Step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.host.owner import Owner

__all__ = ["Engine", "attached_engine"]


class Engine:
    """Attached to a Trainer while it fits; there is one, however many techniques.

    Args:
        trainer: The Trainer.
        module: The user's module.
        techniques: In the order of the Trainer's callbacks.

    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> None:
        self.trainer, self.module, self.techniques = trainer, module, list(techniques)
        drawers = [t for t in taking_part(techniques, OnDraws) if draws_samples(t)]
        self._drawer = drawers[0] if drawers else None
        self._loaders = TrainLoaders(trainer, techniques, self._drawer)
        self._loss = LossPart(module, techniques)
        drawn = [DrawPart(trainer, self._loaders, drawer) for drawer in drawers]
        self.parts: list[Part] = [*drawn, *make_parts(trainer, module, techniques), self._loss]
        self._begin_step, self._around = overriding(self.parts, "begin_step"), overriding(self.parts, "around")
        self._before_network = overriding(self.parts, "before_network")
        self._around_optimizer = overriding(self.parts, "around_optimizer")
        self._before_closure = overriding(self.parts[::-1], "before_closure")
        self._after_closure = overriding(self.parts, "after_closure")
        self._idle = host.IdleHooks(())
        self.watch = Watch(trainer, techniques)
        self._replaced = {"training_step": host.Replacement(trainer.strategy, "training_step", self.training_step)}
        self._preparing = [t for t in techniques if type(t).prepare_model is not Member.prepare_model]
        self._prepare_model = overriding(self.parts, "prepare_model")
        if self._preparing or self._prepare_model:
            self._replaced["setup"] = host.Replacement(trainer.strategy, "setup", self.set_up)

    @classmethod
    def attach(cls, trainer: "Trainer", module: "LightningModule", techniques: Sequence[Member]) -> None:
        """Attaches an engine for all techniques among the Trainer's callbacks, unless there is one."""
        if trainer in ENGINES:
            return
        check_composition(techniques, trainer, module)
        engine = ENGINES[trainer] = cls(trainer, module, techniques)
        # First the hooks, which detach on any exception. A new list leaves the one Lightning iterates over as it is.
        last = LastHooks(engine)
        after = [last] if last.have_something_to_do else []
        host.set_callbacks(trainer, [FirstHooks(engine), *host.callbacks(trainer), *after])
        engine._idle = host.IdleHooks(
            [callback for callback in host.callbacks(trainer) if isinstance(callback, Member)]
        )
        engine._loaders.attach()

    def detach(self) -> None:
        """Puts everything back as it was; may be called twice."""
        for part in reversed(self.parts):
            part.close()
        self._loaders.detach()
        self.watch.end()
        self._idle.undo()
        for replacement in self._replaced.values():
            replacement.undo()
        kept = [
            callback for callback in host.callbacks(self.trainer) if not isinstance(callback, FirstHooks | LastHooks)
        ]
        host.set_callbacks(self.trainer, kept)
        ENGINES.pop(self.trainer, None)

    def set_up(self, trainer: "Trainer") -> None:
        """What the Trainer calls in place of ``Strategy.setup``, which wraps the module and makes optimizers."""
        for technique in self._preparing:
            technique.prepare_model(self.module)
        for prepare in self._prepare_model:
            prepare()
        self._replaced["setup"].original(trainer)

    def prepare(self) -> None:
        """Finds the named layers and parameters, once ``configure_model`` has made them."""
        for part in sorted(self.parts, key=lambda part: not part.prepares_first):
            part.prepare()
        if self._around_optimizer or self._after_closure:
            stepping = host.Replacement(self.trainer.strategy, "optimizer_step", self.optimizer_step)
            self._replaced["optimizer_step"] = stepping

    def start(self) -> None:
        """Says what is attached to what, once the loaders are there; optimizers are there as well."""
        for part in self.parts:
            part.start()
        report.show_table(self.trainer, self.module, self.techniques, self._loaders.sizes())
        self.watch.begin()

    # -- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """What the Trainer calls in place of ``Strategy.training_step``."""
        followed = self._loaders.advance()
        for begin in self._begin_step:
            begin()
        step = Step(self.trainer, self.module, args[0] if args else None, followed, self._loaders.several, args[1:])
        step.active = [technique for technique in self.techniques if technique.is_active(step)]
        around = self._around
        if not step.active:
            if not self._loss.has_to_rehearse(step):
                return self._network(*args, **kwargs)
            around = [self._loss.around]
        step.network = lambda batch: self._network(batch, *args[1:], **kwargs)
        with around[0](step) if len(around) == 1 else _entered(around, step):
            step.output = step.network(step.given_batch)
        if step.scalars:
            report.log_scalars(self.module, step.scalars, sum(step.batch_sizes))
            self.watch.take(step.scalars)
        return step.output

    def _network(self, *args: Any, **kwargs: Any) -> Any:
        for before in self._before_network:
            before()
        return self._replaced["training_step"].original(*args, **kwargs)

    def run_alone(
        self, technique: Member, step: Step, layers: AbstractContextManager[None] | None = None
    ) -> Tensor | None:
        """A step of a network beside the user's (``step.module``), on which the one technique acts and no other.

        Args:
            technique: Whose network it is; its phases up to the loss act as they do on the user's.
            step: The step, with the batch on its device.
            layers: Around the network, where layers of it are edited by others.

        Returns:
            The loss, ``None`` if the network's ``training_step`` skips the batch.

        """
        step.active = [technique]
        if isinstance(technique, OnBatch):
            BatchPart([technique]).around(step)
        with layers or nullcontext(), self._loss.around(step):
            step.output = step.module.training_step(step.batch, *step.arguments)
        return loss_of(step.output)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """What the Trainer calls in place of ``Strategy.optimizer_step``."""
        with _entered(self._around_optimizer, optimizer):
            evaluate = partial(self._evaluate, closure)
            return self._replaced["optimizer_step"].original(optimizer, evaluate, *args, **kwargs)

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        for before in self._before_closure:  # an optimizer may ask several times, each time after a change of its own
            before()
        result = closure()
        for after in self._after_closure:
            after()
        return result

    def reduce_loss(
        self, per_sample: Tensor, logits: Tensor | None, targets: Tensor | None, indices: Tensor | None
    ) -> Tensor:
        """What :meth:`LossMixin.reduce_loss` returns."""
        return self._loss.reduce_loss(per_sample, logits, targets, indices)

    def log_own(self, technique: Member, scalars: Mapping[str, Tensor | float]) -> None:
        """Logs what a technique measured outside of the step, and shows it as what a step logs is shown.

        Args:
            technique: Whose they are.
            scalars: By name behind its log key; the same on all ranks, so that there is nothing to reduce.

        """
        named = {f"{technique.log_key}/{name}": value for name, value in scalars.items()}
        self.module.log_dict(named, on_step=True, on_epoch=False, batch_size=1)
        # As it is now: it may be counted further in place.
        self.watch.take({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in named.items()})

    # -- passes of its own --------------------------------------------------------------------------------------------

    @contextmanager
    def training_batches(self) -> Iterator[Iterator[Any]]:
        """A pass over the training batches that training does not notice: neither samplers nor indices nor draws."""
        with passes.training_batches(self.trainer, self._loaders.original) as batches:
            yield batches

    @contextmanager
    def training_steps(self) -> Iterator[Iterator[Step]]:
        """The same as steps, for a :class:`Peer` to see."""
        wanted = host.arguments_of_training_step(self.module) - 1
        with self.training_batches() as batches:
            yield (
                Step(self.trainer, self.module, batch, {}, self._loaders.several, (position,)[:wanted])
                for position, batch in enumerate(batches)
            )

    def reordered(self, technique: "Owner") -> Reordered:
        """The training loader in another order, chosen by the technique's seed, for a network of its own."""
        why = "trains a second network on the training loader in another order"
        if self._drawer is not None:
            raise MisconfigurationException(
                f"{type(technique).__name__} {why}, and {type(self._drawer).__name__} draws the samples of the epochs,"
                " which that order knows nothing of. Remove one of them."
            )
        return Reordered(self._loaders.the_only_one(technique, why), technique)

    def loader_for(self, owner: "Owner", stage: Stage) -> tuple[Any, float]:
        """The one loader of the training or of the validation, without a tap.

        Args:
            owner: Who asks what the network makes of its samples; its class is named in errors.
            stage: ``"train"`` or ``"validate"``.

        Returns:
            The loader, and how many of its batches count.

        Raises:
            MisconfigurationException: If there is none or several, or its batches have no sample indices.

        """
        what = "records what the network makes of each sample of the"
        if stage == "train":
            found: list[Any] = [self._loaders.the_only_one(owner, f"{what} training data")]
            limits: list[float] = [epochs.batches_of_loader(self.trainer, found[0])]
        else:
            found, limits = host.validation_loaders(self.trainer)
        if len(found) != 1:
            raise MisconfigurationException(
                f"{type(owner).__name__} {what} validation data, and there are {len(found)} validation loaders. Give"
                " the Trainer one DataLoader for it."
            )
        check_has_indices(found[0], owner)
        return found[0], limits[0]


@contextmanager
def _entered(contexts: Sequence[Callable[[Any], AbstractContextManager[Any]]], of: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context(of))
        yield


def attached_engine(trainer: "Trainer") -> Engine:
    """The engine of a Trainer that fits with techniques.

    Args:
        trainer: The Trainer.

    Returns:
        Its engine.

    Raises:
        RuntimeError: If there is none.

    """
    engine = ENGINES.get(trainer)
    if not isinstance(engine, Engine):
        raise RuntimeError("There is no engine: the Trainer does not fit, or has no technique among its callbacks.")
    return engine
