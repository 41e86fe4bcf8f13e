"""The phases of a training step, by what they act on; which of them a technique takes part in."""

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

from torch import Tensor, nn

from lightning_reg.engine.step import Stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.data.mixing import Mixing
    from lightning_reg.engine.layers.edits import InputCall, LayerCall
    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.run.part import Part
    from lightning_reg.engine.run.periods import Period
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.weights.factors import Factors
    from lightning_reg.engine.weights.latents import Latents
    from lightning_reg.engine.weights.owned import OwnModules

__all__ = [
    "LOSS_PHASES",
    "PHASES",
    "Member",
    "Observer",
    "OnBatch",
    "OnDraws",
    "OnGradients",
    "OnLayers",
    "OnLoss",
    "OnModules",
    "OnParameters",
    "OnStep",
    "OnWeights",
    "ThroughMap",
    "draws_samples",
    "has_prompts",
    "needs_call",
    "phases_of",
    "taking_part",
]


class Member:
    """What the engine asks every technique."""

    # Whether it knows what to make of a batch whose samples were mixed (`step.mixing`); asked of those that look at
    # single samples: by their indices, by their targets, by a term of the step.
    takes_mixed: ClassVar[bool] = False
    # In which steps it changes batches and outputs of layers. In evaluation these are without gradient as a rule, and
    # there is no fit if the user calls `trainer.test` alone: what it needs then it has in its arguments or its state.
    stages: frozenset[Stage] = frozenset({"train"})  # instances may have their own, which stay as they are

    # Whether it runs `training_step` once more in a step, on another version of the batch (`run_step`).
    runs_again: ClassVar[bool] = False

    # Which of its scalars stand beside the progress bar, by their names behind the log key: none for the first logged.
    watched: ClassVar[tuple[str, ...]] = ()

    loss: int | str | None
    index_key: str | None
    dataloader: str | None
    name: str | None
    needs_indices: ClassVar[bool] = False

    @property
    def log_key(self) -> str:
        """What its scalars are logged under."""
        raise NotImplementedError

    def derived_seed(self, purpose: str) -> int:
        """A seed for one purpose."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for the table at the start of the fit: settings, sizes, schedule."""
        return ""

    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        """Refuses a setup that the technique cannot work in; called before anything is attached."""

    def conflict_with(self, other: "Member") -> str | None:
        """Why it cannot stand beside ``other`` in one Trainer, as a sentence; ``None`` if it can."""
        return None

    @property
    def mixes(self) -> Literal["none", "some", "all"]:
        """Which batches it mixes the samples of, over the whole training, see ``step.mixing``."""
        return "none"

    @property
    def copies_rows(self) -> bool:
        """Whether it passes several copies of a batch's rows through layers, or runs the step once for each."""
        return False

    @property
    def reorders_channels(self) -> bool:
        """Whether it puts channels of the module's layers in another order when a training begins."""
        return False

    @property
    def remembers_channels(self) -> bool:
        """Whether it holds, from an earlier fit, numbers that belong to single channels of the module's layers."""
        return False

    @property
    def trains_second(self) -> bool:
        """Whether it trains a second network beside the module's."""
        return False

    @property
    def periods(self) -> "Sequence[Period]":
        """Parts of the fit in which it freezes weights, or in which its own loss or the user's is alone."""
        return ()

    def meet_loader(self, trainer: "Trainer", loader: Any) -> None:
        """Sees each training loader as Lightning has made it ready, before its workers start and a batch is drawn.

        For techniques that need indices. Progress and the technique's state are those of the checkpoint, if there is
        one.
        """

    def prepare_model(self, module: "LightningModule") -> None:
        """Prepares the module before it is wrapped for several processes and before its optimizers are made.

        Its weights are those that the fit begins with, restored ones too: parameters can be frozen here. What this
        changes :meth:`teardown` puts back.
        """

    def is_active(self, step: "Step") -> bool:
        """Whether it takes part in this step; an inactive technique costs this call and nothing else."""
        return True

    def waits(self, step: "Step") -> bool:
        """Whether it waits for a later step of this fit (a warm-up, a first epoch): the first step checks its setup."""
        return False

    def parts(self, trainer: "Trainer", module: "LightningModule") -> "Sequence[Part]":
        """Parts of its own that the engine works with beside those that it has, see :class:`Part`; usually none."""
        raise NotImplementedError


class OnDraws(Member):
    """The phase on which samples of the training data an epoch is made of; the user's sampler rests meanwhile."""

    @property
    def draws_samples(self) -> bool:
        """Whether it draws with its present arguments; one technique of a Trainer may."""
        return True

    def draw_samples(self, epoch: int, size: int) -> Tensor | None:
        """Returns the samples of an epoch in the order of training; ``None`` for those of the loader's own sampler.

        Asked once, before the epoch's ``on_train_epoch_start``; of a training that is resumed within the epoch once
        more, with the state of the checkpoint, and must return the same then. The loader makes batches of its size of
        them, which the ranks take in turns; a sample may be drawn several times or not at all, and the number of
        samples may change from epoch to epoch.

        Args:
            epoch: Which epoch, counted from 0.
            size: Number of samples of the training dataset.

        Returns:
            Positions in the training dataset ``(M,)`` for all ranks together, the same on all of them.

        """
        raise NotImplementedError


class OnBatch(Member):
    """Phases on the batch, before the user's ``training_step`` gets it."""

    def transform_batch(self, batch: Any, step: "Step") -> Any:
        """Returns the batch that the user's ``training_step`` gets; the given one stays as it is.

        Called before ``validation_step``, ``test_step`` and ``predict_step`` as well, if :attr:`stages` says so.
        """
        raise NotImplementedError

    def rehearse(self, step: "Step") -> "Mixing | None":
        """Returns how it would mix ``step.batch``, with the inputs as they are; ``None`` if it does not mix.

        Asked once in a fit, when the first step's batch is left as it is and later ones are mixed: what it would refuse
        then it refuses now.
        """
        return None

    def observe_batch(self, step: "Step") -> None:
        """Sees ``step.batch`` as the user's ``training_step`` is about to get it; ``step.notes`` keeps what was seen.

        The global random state is the one that ``training_step`` starts from, and must stay so.
        """
        raise NotImplementedError

    def extra_views(self, batch: Any, step: "Step") -> "Sequence[Any]":
        """Returns further versions of the batch, of the same structure and size, that pass the network beside it.

        The user's loss stays that of the batch alone. What the network made of the views is in ``step.views`` and
        ``call.whole_output``, and the user's loss of each, with targets that it may have of its own, in
        ``call.of_views``.
        """
        raise NotImplementedError


class Observer(Member):
    """What reads the outputs of named layers."""

    @property
    def feature_layers(self) -> "Sequence[str]":
        """Layers whose outputs it reads from ``step.features``, named as in ``named_modules()``."""
        return ()


class OnLoss(Observer):
    """Phases on the loss call, and the layers' outputs that go with it.

    A call's value is handed to the user's code with what techniques made of it. What that code makes of it then is
    looked at in the first step of a fit and in steps that are logged: it must be linear in the value, and a technique
    that weights samples or changes losses needs all losses of ``reduction="none"`` to count alike. Not seen are a
    factor that the user's code computes from losses without gradient, and under manual optimization, where
    ``training_step`` returns nothing, whatever it makes of the value.
    """

    def check_call(self, call: "LossCall") -> None:
        """Refuses a loss call that it could not work on; asked in the first step of a fit if it waits."""
        call.batch_size  # noqa: B018 # refuses a call without a loss per sample

    def change_input(self, call: "LossCall") -> Tensor | None:
        """Returns logits that the loss is computed from in place of ``call.loss_input``; ``None`` to keep these.

        Rows, masses and targets stay; columns may be rescaled, masked by ``-inf``, or added behind those that are
        there. ``call.loss_input`` has what techniques before this one have made of them, while ``call.input`` and
        ``call.logits`` stay the given ones for all. Only ``F.cross_entropy`` has logits to change; columns are not
        added where it has probabilities as targets, class weights or label smoothing. Where a technique runs on several
        copies of the rows it is asked for each copy.
        """
        raise NotImplementedError

    def change_targets(self, call: "LossCall") -> Tensor | None:
        """Returns the targets for the loss function, ``None`` to keep the present ones."""
        raise NotImplementedError

    def change_losses(self, call: "LossCall") -> Tensor | None:
        """Returns losses of the samples ``(B,)`` in place of the call's own, ``None`` to keep these.

        They are per unit of mass (an ignored sample counts 0, a class weight counts), and reduced as the user's own.
        Where a technique runs on several copies of the rows it is asked for each copy, and their mean counts.
        """
        raise NotImplementedError

    def sample_weights(self, call: "LossCall") -> Tensor | None:
        """Returns a weight per sample ``(B,)``, or per element of the loss ``(E,)`` (token, pixel), neutral 1.

        No gradient flows through it. ``None``: no weighting.
        """
        raise NotImplementedError

    def loss_term(self, call: "LossCall") -> Tensor | None:
        """Returns a term that joins each sample's loss ``(B,)``, or the whole loss ``()``; ``None`` for none.

        Where a technique runs on several copies of the rows, ``call.logits`` are those of the mean prediction; a term
        that is to be the mean over the copies asks :meth:`LossCall.copies`.
        """
        raise NotImplementedError

    def term_of_step(self, step: "Step") -> Tensor:
        """Returns a scalar that joins the loss of a step in which no loss call could be seen, in place of the phases.

        Only a technique that needs nothing of the call has it; one that has not is refused there.
        """
        raise NotImplementedError


class OnStep(Observer):
    """The phase on what ``training_step`` has returned, whatever made the loss in it."""

    def step_term(self, step: "Step") -> Tensor | None:
        """Returns a scalar that joins the loss of the step; ``None`` for none.

        No loss call is needed: ``step.batch`` and ``step.features`` are what it has. The term joins before the loss is
        divided for accumulation and scaled, with gradient; under manual optimization it joins what
        ``LossMixin.reduce_loss`` returns. A step without a loss gets none.
        """
        raise NotImplementedError


class OnGradients(Member):
    """The phases at the optimizer's step.

    Attributes:
        only_follows: Whether :meth:`after_step` reads the new weights and changes none; such techniques come last.

    """

    only_follows: "ClassVar[bool]" = False

    def change_gradients(self, gradients: "Mapping[str, Tensor]") -> None:
        """Changes the gradients that an optimizer is about to use, in place.

        They are accumulated, averaged over the ranks and unscaled, with those of penalties, and not yet clipped; a
        weight that is trained through a map has the gradient of the weight. Not called where the scaler of half
        precision will skip the step.

        Args:
            gradients: By name as in ``named_parameters()``; those of the optimizer's parameters that have one.

        """
        raise NotImplementedError

    def after_step(self, module: "LightningModule", optimizer: "Optimizer") -> None:
        """Follows the step of an optimizer, without gradient; not one that the scaler of half precision has skipped.

        Args:
            module: The user's module, with its new weights.
            optimizer: Which has stepped.

        """
        raise NotImplementedError


class OnModules(Member):
    """Small modules that the technique trains beside the user's, with the user's optimizer."""

    own: "OwnModules"  # where they are; it is saved with the technique's state
    own_optimizer: int | None = None  # position of the optimizer that trains them, if there are several

    def own_modules(self, module: "LightningModule") -> "Mapping[str, nn.Module]":
        """Returns new modules for a training that begins, by name, if any; weights are drawn from its seed.

        They are float32, on the module's device, and take part in the loss by a term or an edited layer. They are in
        no key of the module's, and averages of its weights have them under names of their own; :attr:`own` has them,
        after the fit as well.
        """
        raise NotImplementedError


class OnLayers(Member):
    """The phases on what named layers are given and what they return.

    Called when a layer runs inside the user's ``training_step``, in training mode and with gradients recorded; and in
    evaluation mode inside ``validation_step``, ``test_step`` and ``predict_step``, if :attr:`stages` says so.
    """

    # Whether it changes layers in evaluation mode in a training step as well: those of a network that is frozen.
    in_any_mode: ClassVar[bool] = False
    # Whether its edits are of the method that the networks are trained by, and not of the user's network alone: they
    # act on a second network too, where another technique trains one; at stage "predict" where that one is asked.
    edits_second: ClassVar[bool] = False

    def inputs_to_edit(self, module: nn.Module) -> "Sequence[str]":
        """Names of the layers whose inputs :meth:`edit_inputs` changes, as in ``named_modules()``."""
        return ()

    def edit_inputs(self, call: "InputCall") -> "tuple[tuple[Any, ...], Mapping[str, Any]] | None":
        """Returns what a layer gets in place of its arguments, by position and by name; ``None`` for the same.

        ``call.with_input(x)`` has another first argument and all others as they are. What is given stays as it is.
        """
        raise NotImplementedError

    def features_to_edit(self, module: nn.Module) -> "Sequence[str]":
        """Names of the layers whose outputs :meth:`edit_features` changes, as in ``named_modules()``."""
        return ()

    def edit_features(self, call: "LayerCall") -> Any:
        """Returns what a layer returns in its place, ``None`` for its own output."""
        raise NotImplementedError


class OnWeights(Member):
    """The phase on the weights that the forward pass runs with, while the optimizer sees the dense ones."""

    def weights_to_edit(self, module: nn.Module) -> "Sequence[str]":
        """Names of the parameters that :meth:`edit_weights` changes, as in ``named_parameters()``."""
        return ()

    def needs_whole_parameters(self) -> str | None:
        """Why it cannot edit the rows that a process holds of a split parameter, as a clause; ``None`` if it can."""
        return "it edits whole parameters"

    def edit_weights(self, weights: "Mapping[str, Tensor]") -> None:
        """Turns dense values into effective ones, in place, before the forward pass; the engine puts them back.

        Of parameters that are split over processes it gets the rows of this process.
        """
        raise NotImplementedError

    def weights_to_save(self, trainer: "Trainer", module: "LightningModule") -> "AbstractContextManager[None] | None":
        """What exchanges the module's weights while a checkpoint with ``save_weights_only=True`` is written, if any."""
        return None


class OnParameters(Member):
    """The phase on the parameters alone, before the optimizer's step."""

    optimizer: int | None = None  # position of the one in whose steps it counts; ``None`` for all

    def penalty(self, module: "LightningModule") -> Tensor | None:
        """Returns a scalar that depends on parameters only; ``None`` for none.

        Its gradient joins that of the loss just before the optimizer's step, once however many batches are accumulated.
        The weights in the module are dense then. It may be called more than once per step, without gradient too.
        One that trains own parts of a map with frozen latents penalizes these parts.
        """
        raise NotImplementedError


class ThroughMap(Member):
    """Weights trained through a map w = f(v): every other phase and hook sees w, the optimizer alone sees v.

    Where the latents are frozen, v stays as it is, and the optimizer sees the map's own parts alone.
    """

    # Whether f(v) is v and a product of two factors, which `factors_of` gives; latents are frozen then.
    is_product: ClassVar[bool] = False
    # Whether it edits weights that it maps: a training step runs with other values of the map, of which the gradient is
    # pulled back at once (`pull_back_step`). They are put in before others edit the weights, and not in validation.
    maps_steps: ClassVar[bool] = False

    latents: "Latents"  # what is trained in place of the weights

    @property
    def norms_rest(self) -> bool:
        """Whether batch norm that has nothing to train is in evaluation mode meanwhile; where latents are frozen."""
        return False

    @property
    def saves_delta(self) -> bool:
        """Whether checkpoints leave out what was not trained, and hold its hash; where latents are frozen."""
        return False

    def weights_to_map(self, module: nn.Module) -> "Sequence[str]":
        """Names of the parameters that are trained through :meth:`map_weights`, as in ``named_parameters()``."""
        return ()

    def weights_to_freeze(self, module: nn.Module) -> "Sequence[str]":
        """Returns names of further parameters that are not trained meanwhile; asked where latents are frozen.

        Of several techniques that name any, all must name a parameter, and none may map it.
        """
        return ()

    def begin_map(self, weights: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Returns new latents for the weights that a training begins with, and fills ``latents.own``."""
        raise NotImplementedError

    def latents_of(self, weights: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Returns new latents for weights that somebody else wrote, under the map as it is."""
        raise NotImplementedError

    def map_weights(self, latents: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]") -> None:
        """Writes f(v) into ``weights``, after the optimizer has stepped the latents.

        Where a latent has some entries alone (:meth:`Latents.take`), these: the others are in ``weights`` already.
        """
        raise NotImplementedError

    def factors_of(self, name: str) -> "Factors":
        """Returns the factors of a weight as they are; asked when the map begins and after it was written."""
        raise NotImplementedError

    def pull_back(
        self, latents: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]", gradients: "Mapping[str, Tensor]"
    ) -> None:
        """Turns gradients dL/dw into dL/dv, in place, and adds to those of ``latents.own``; once per step.

        Frozen latents get none; there it is called as often as there are gradients.
        """
        raise NotImplementedError

    def change_part_gradients(self, names: "Sequence[str]") -> None:
        """Changes the gradients of the own parts of these weights, by replacing them or in place; nothing as a rule.

        An optimizer is about to use them: they are accumulated, averaged over the ranks, unscaled, with those of
        penalties, and not yet clipped; and so are those of a second loss in ``latents.second``, if there are any.
        """

    def pull_back_step(
        self, latents: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]", gradients: "Mapping[str, Tensor]"
    ) -> None:
        """The same for gradients that come from the loss of a step; another where the step has other values of the map.

        Asked where latents are frozen and the gradient is pulled back as soon as it is there.
        """
        self.pull_back(latents, weights, gradients)

    def follow_step(self, names: "Sequence[str]") -> None:
        """An optimizer has stepped the own parts of these weights, which are made of them next."""


# In the order of the step, each with the class that declares it.
PHASES: dict[str, type[Member]] = {
    "own_modules": OnModules,
    "draw_samples": OnDraws,
    "transform_batch": OnBatch,
    "observe_batch": OnBatch,
    "extra_views": OnBatch,
    "edit_weights": OnWeights,
    "edit_inputs": OnLayers,
    "edit_features": OnLayers,
    "parts": Member,
    "change_input": OnLoss,
    "change_targets": OnLoss,
    "change_losses": OnLoss,
    "sample_weights": OnLoss,
    "loss_term": OnLoss,
    "step_term": OnStep,
    "penalty": OnParameters,
    "change_gradients": OnGradients,
    "after_step": OnGradients,
    "map_weights": ThroughMap,
}
LOSS_PHASES = frozenset(phase for phase, role in PHASES.items() if role is OnLoss)

_PHASES_OF_ROLE = {role: tuple(p for p, declared in PHASES.items() if declared is role) for role in PHASES.values()}


def needs_call(technique: Member) -> bool:
    """Whether a technique on the loss can do nothing with a step in which no loss call could be seen."""
    return getattr(type(technique), "term_of_step", None) in (None, OnLoss.term_of_step)


Role = TypeVar("Role", bound=Member)


def phases_of(technique: Member | type[Member]) -> tuple[str, ...]:
    """Phases that a technique takes part in: those whose methods it overrides, in the order of the step."""
    cls: Any = technique if isinstance(technique, type) else type(technique)
    return _phases_of_class(cls)


@cache
def _phases_of_class(cls: type[Any]) -> tuple[str, ...]:
    return tuple(p for p, role in PHASES.items() if issubclass(cls, role) and getattr(cls, p) is not getattr(role, p))


def taking_part(techniques: "Sequence[Member]", role: type[Role], *phases: str) -> list[Role]:
    """Those of the techniques that take part in one of the phases of a role, in order; in any of it if none is named.

    Args:
        techniques: In the order of the Trainer's callbacks.
        role: The class that declares the phases.
        *phases: Names of phases.

    Returns:
        The techniques.

    """
    named = phases or _PHASES_OF_ROLE[role]
    return [cast("Role", t) for t in techniques if any(phase in named for phase in phases_of(t))]


def draws_samples(technique: Member) -> bool:
    """Whether it draws the samples of the epochs in place of the user's sampler."""
    return isinstance(technique, OnDraws) and technique.draws_samples


def has_prompts(technique: Member) -> bool:
    """Whether it trains inputs of layers beside a frozen module, which no other network of the same weights has."""
    return isinstance(technique, OnModules) and isinstance(technique, OnLayers) and technique.in_any_mode
