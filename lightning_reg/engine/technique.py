"""The base classes of all techniques: callbacks whose methods are the phases of a training step."""

import hashlib
from typing import TYPE_CHECKING, Any, final

import torch
from typing_extensions import override

from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.errors import reads_state
from lightning_reg.engine.run.delta_files import ReadsDeltas, strip_checkpoint_
from lightning_reg.engine.run.engine import Engine
from lightning_reg.engine.run.evaluation import AroundEvaluation
from lightning_reg.engine.run.phases import (
    PHASES,
    Member,
    Observer,
    OnBatch,
    OnDraws,
    OnGradients,
    OnLayers,
    OnLoss,
    OnModules,
    OnParameters,
    OnStep,
    OnWeights,
    ThroughMap,
)
from lightning_reg.engine.weights.owned import OwnModules

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = [
    "BatchTechnique",
    "DrawTechnique",
    "GradientTechnique",
    "LayerTechnique",
    "LossTechnique",
    "ModuleTechnique",
    "PenaltyTechnique",
    "StepTechnique",
    "Technique",
    "WeightMapTechnique",
    "WeightTechnique",
]

# What a technique may override only with the class that declares it.
_DECLARED_BY = {
    name: role for role in ({*PHASES.values()} | {Observer}) - {Member} for name in vars(role) if name[0] != "_"
}


class Technique(Member, host.Callback):
    """A training technique, attached to a Trainer as a callback.

    A technique takes part in a phase of the training step by overriding the phase's method. The methods are declared by
    subclasses, one for each thing that a technique can act on; it inherits from those that it needs::

        prepare_model, before optimizers are made            Technique
        own_modules, trained by the user's optimizer         ModuleTechnique
        draw_samples, in place of the batch sampler          DrawTechnique
        batch sampler draws ─► workers, collate, device
           ▼
        transform_batch   observe_batch   extra_views        BatchTechnique
        edit_weights                                         WeightTechnique
           ▼  the user's training_step
           │    edit_inputs, edit_features (`stages`)        LayerTechnique
           │    change_input ─► change_targets ─►
           │    change_losses ─► sample_weights ─► loss_term LossTechnique
        step_term                                            StepTechnique
           ▼  backward, gradients
        penalty                                              PenaltyTechnique
        change_gradients                                     GradientTechnique
        pull_back ─► optimizer step ─► map_weights           WeightMapTechnique
        after_step                                           GradientTechnique
           ▼
        on_train_batch_end and Lightning's other hooks       Technique

    What it leaves alone costs nothing. Within a phase techniques act in the order of the Trainer's callbacks. All other
    hooks of Lightning's callbacks may be overridden too, except :meth:`setup`, where the engine is attached.

    Args:
        loss: Which loss call of the training step it works on, if there are several: the position of the call in the
            step (``0`` is the first), ``"last"``, the name of the function (``"cross_entropy"``), or its place in the
            code (``"model.py:42"``). ``None``: there must be just one.
        index_key: Entry of the batch with the dataset index of each sample, a key or a position (``"index"``, ``"2"``).
            ``None``: the indices are followed from the training DataLoader.
        dataloader: With several training loaders in a CombinedLoader, the key or position of the one whose samples the
            technique counts. ``None``: there must be just one.
        name: Tells instances of the same class in one Trainer apart: part of the log keys and of the checkpoint key.
        seed: Seed of the technique's own random draws.

    """

    def __init__(
        self,
        *,
        loss: int | str | None = None,
        index_key: str | None = None,
        dataloader: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(loss, str | None):
            check_number(self, "loss", loss, low=0, integer=True)
        check_number(self, "seed", seed, low=0, integer=True)
        self.loss = loss
        self.index_key = index_key
        self.dataloader = dataloader
        self.name = name
        self.seed = seed

    @override
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "setup" in cls.__dict__:
            raise TypeError(f"{cls.__name__} must not override `setup`; use `on_fit_start` or `check`.")
        for name, role in _DECLARED_BY.items():
            if name in cls.__dict__ and not issubclass(cls, role):
                base = next(b for b in _BASES if issubclass(b, role))
                raise TypeError(f"{cls.__name__} overrides `{name}` of {base.__name__}: inherit from that.")
        if "load_state_dict" in cls.__dict__:  # a state of another kind is refused in one way for all
            cls.load_state_dict = reads_state(cls.load_state_dict)  # type: ignore[method-assign]  # the same, in words

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Lightning puts bound methods of the module on callbacks: a copy would carry the module and its Trainer.
        # Hooks that idle while it fits are no news.
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_FIT}

    # -- identity -----------------------------------------------------------------------------------------------------

    @classmethod
    def key(cls) -> str:
        """The technique's key: the name of its file."""
        return cls.__module__.rsplit(".", 1)[-1]

    @property
    @override
    def log_key(self) -> str:
        """What its scalars are logged under: ``reg/<key>``, and the instance's name if it has one."""
        return f"reg/{self.key()}" + (f"_{self.name}" if self.name else "")

    @property
    @override
    def state_key(self) -> str:
        """What its state is saved under; instances of one class need different names."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    # -- services -----------------------------------------------------------------------------------------------------

    @final
    @override
    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Attaches the engine to the Trainer, once for all techniques."""
        techniques = [callback for callback in host.callbacks(trainer) if isinstance(callback, Technique)]
        if stage == "fit":
            Engine.attach(trainer, pl_module, techniques)
        AroundEvaluation.attach(trainer, pl_module, techniques)
        ReadsDeltas.attach(trainer, pl_module, techniques)

    def generator(
        self, step: "Step", device: torch.device | str = "cpu", *, same_on_ranks: bool = False
    ) -> torch.Generator:
        """A random generator for this step's draws.

        Its state depends on nothing but the seed, the technique's name, the rank and the count of batches since the
        start of training. So the global random state is never touched, a resumed run draws what the uninterrupted
        one would have drawn, on every rank, and there is no state to save.

        Args:
            step: The present step.
            device: Device to draw on.
            same_on_ranks: Whether all ranks draw the same.

        Returns:
            A fresh generator; ask once per phase and draw from it in order.

        """
        where = 0 if same_on_ranks else distributed.rank()
        return torch.Generator(device).manual_seed(self.derived_seed(f"{where} {step.batches_so_far}{step.stream}"))

    @override
    def derived_seed(self, purpose: str) -> int:
        """A seed for one purpose: depends on it, the technique's seed and its name, and on nothing else."""
        text = f"{self.seed} {self.log_key} {purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class DrawTechnique(OnDraws, Technique):
    """A technique that says which samples of the training data an epoch is made of."""

    def draw_generator(self, epoch: int) -> torch.Generator:
        """A random generator for the draws of an epoch: by the seed, the name and the epoch, the same on all ranks."""
        return torch.Generator().manual_seed(self.derived_seed(f"draws {epoch}"))


class BatchTechnique(OnBatch, Technique):
    """A technique on the batch, before ``training_step`` gets it."""


class LossTechnique(OnLoss, Technique):
    """A technique on the loss call: its logits, its targets, its losses, their weights, terms beside them."""


class StepTechnique(OnStep, Technique):
    """A technique that adds a term to the loss of a step, whatever made that loss."""


class GradientTechnique(OnGradients, Technique):
    """A technique on the gradients that an optimizer is about to use, and on what follows its step."""


class LayerTechnique(OnLayers, Technique):
    """A technique on the inputs and outputs of named layers."""


class WeightTechnique(OnWeights, Technique):
    """A technique on the weights that the forward pass runs with."""


class ModuleTechnique(OnModules, Technique):
    """A technique with small trained modules of its own; they are its state, unless it has more."""

    def train_own(self, lr_factor: float = 1.0, weight_decay: float = 0.0, own_optimizer: int | None = None) -> None:
        """Says at construction how the modules are trained.

        Args:
            lr_factor: Learning rate, as a multiple of that of the optimizer's first group.
            weight_decay: Weight decay, where the optimizer has one.
            own_optimizer: Position of the optimizer, if there are several.

        Raises:
            ValueError: If an argument is below 0, or a position is not whole.

        """
        check_number(self, "lr_factor", lr_factor, low=0)
        check_number(self, "weight_decay", weight_decay, low=0)
        check_number(self, "own_optimizer", own_optimizer, low=0, integer=True, optional=True)
        self.own, self.own_optimizer = OwnModules(lr_factor, weight_decay), own_optimizer

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.own.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.own.load_state_dict(state_dict)


class PenaltyTechnique(OnParameters, Technique):
    """A technique that adds a penalty on parameters."""


class WeightMapTechnique(ThroughMap, Technique):
    """A technique that trains weights through a map."""

    @override
    def is_active(self, step: "Step") -> bool:
        return False  # nothing happens in the forward pass

    @override
    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        if self.saves_delta:
            strip_checkpoint_(trainer, pl_module, checkpoint)


_OF_A_FIT = ("log", "log_dict", *host.STEP_HOOKS)
_BASES = (
    DrawTechnique,
    BatchTechnique,
    LossTechnique,
    StepTechnique,
    LayerTechnique,
    ModuleTechnique,
    WeightTechnique,
    PenaltyTechnique,
    GradientTechnique,
    WeightMapTechnique,
)
