"""The base class of all techniques: a callback whose methods are the phases of a training step."""

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine import distributed
from lightning_reg.engine.errors import check_number
from lightning_reg.engine.host import Callback

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.copies import CopyPlan
    from lightning_reg.engine.feature_edits import LayerCall
    from lightning_reg.engine.loss_call import LossCall
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.weight_maps import Latents

__all__ = ["PHASES", "Technique", "phases_of"]

# In the order of the step. Gradients and optimizer steps are Lightning's own hooks on_before_optimizer_step and
# on_train_batch_end.
PHASES = (
    "transform_batch",
    "observe_batch",
    "extra_views",
    "edit_weights",
    "edit_features",
    "change_targets",
    "change_losses",
    "sample_weights",
    "loss_term",
    "penalty",
    "map_weights",
)
LOSS_PHASES = frozenset(("change_targets", "change_losses", "sample_weights", "loss_term"))


class Technique(Callback):
    """A training technique, attached to a Trainer as a callback.

    A technique takes part in a phase of the training step by overriding the phase's method; what it leaves alone costs
    nothing. Within a phase techniques act in the order of the Trainer's callbacks. All other hooks of Lightning's
    callbacks may be overridden too, except :meth:`setup`, where the engine is attached.

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

    needs_indices: ClassVar[bool] = False
    # Whether it knows what to make of a batch whose samples were mixed (`step.mixing`); asked of those that look at
    # single samples: by their indices, by their targets.
    takes_mixed: ClassVar[bool] = False

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

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Lightning puts bound methods of the module on callbacks: a copy would carry the module and its Trainer.
        return {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}

    # -- identity -----------------------------------------------------------------------------------------------------

    @classmethod
    def key(cls) -> str:
        """The technique's key: the name of its file; a file with several techniques overrides it in each."""
        return cls.__module__.rsplit(".", 1)[-1]

    @property
    def log_key(self) -> str:
        """What its scalars are logged under: ``reg/<key>``, and the instance's name if it has one."""
        return f"reg/{self.key()}" + (f"_{self.name}" if self.name else "")

    @property
    @override
    def state_key(self) -> str:
        """What its state is saved under; instances of one class need different names."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    def describe(self) -> str:
        """One line for the table at the start of the fit: settings, sizes, schedule."""
        return ""

    # -- composition --------------------------------------------------------------------------------------------------

    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        """Refuses a setup that the technique cannot work in; called before anything is attached."""

    def conflict_with(self, other: "Technique") -> str | None:
        """Why it cannot stand beside ``other`` in one Trainer, as a sentence; ``None`` if it can."""
        return None

    @property
    def mixes(self) -> Literal["none", "some", "all"]:
        """Which batches it mixes the samples of, over the whole training, see ``step.mixing``."""
        return "none"

    @property
    def reorders_channels(self) -> bool:
        """Whether it puts channels of the module's layers in another order when a training begins."""
        return False

    @property
    def remembers_channels(self) -> bool:
        """Whether it holds, from an earlier fit, numbers that belong to single channels of the module's layers."""
        return False

    def is_active(self, step: "Step") -> bool:
        """Whether it takes part in this step; an inactive technique costs this call and nothing else."""
        return True

    # -- phases, in the order of the step -----------------------------------------------------------------------------

    @property
    def feature_layers(self) -> "Sequence[str]":
        """Layers whose outputs it reads from ``step.features``, named as in ``named_modules()``."""
        return ()

    def transform_batch(self, batch: Any, step: "Step") -> Any:
        """Returns the batch that the user's ``training_step`` gets; the given one stays as it is."""
        raise NotImplementedError

    def extra_views(self, batch: Any, step: "Step") -> "Sequence[Any]":
        """Returns further versions of the batch, of the same structure and size, that pass the network beside it.

        The user's loss stays that of the batch alone. What the network made of the views is in ``step.views`` and
        ``call.whole_output``.
        """
        raise NotImplementedError

    def observe_batch(self, step: "Step") -> None:
        """Sees ``step.batch`` as the user's ``training_step`` is about to get it; ``step.notes`` keeps what was seen.

        The global random state is the one that ``training_step`` starts from, and must stay so.
        """
        raise NotImplementedError

    def weights_to_edit(self, module: nn.Module) -> "Sequence[str]":
        """Names of the parameters that :meth:`edit_weights` changes, as in ``named_parameters()``."""
        return ()

    def needs_whole_parameters(self) -> str | None:
        """Why it cannot edit the rows that a process holds of a split parameter, as a clause; ``None`` if it can."""
        return f"{type(self).__name__} edits whole parameters"

    def edit_weights(self, weights: "Mapping[str, Tensor]") -> None:
        """Turns dense values into effective ones, in place, before the forward pass; the engine puts them back.

        Of parameters that are split over processes it gets the rows of this process.
        """
        raise NotImplementedError

    def features_to_edit(self, module: nn.Module) -> "Sequence[str]":
        """Names of the layers whose outputs :meth:`edit_features` changes, as in ``named_modules()``."""
        return ()

    def copy_plan(self) -> "CopyPlan | None":
        """How what follows an edited layer runs on several copies of the rows; ``None`` for once, as ever."""
        return None

    def edit_features(self, call: "LayerCall") -> Any:
        """Returns what a layer returns in its place, ``None`` for its own output.

        Called when the layer ran inside the user's ``training_step``, in training mode and with gradients recorded.
        """
        raise NotImplementedError

    def weights_to_save(self, trainer: "Trainer", module: "LightningModule") -> "AbstractContextManager[None] | None":
        """What exchanges the module's weights while a checkpoint with ``save_weights_only=True`` is written, if any."""
        return None

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

    def penalty(self, module: "LightningModule") -> Tensor | None:
        """Returns a scalar that depends on parameters only; ``None`` for none.

        Its gradient joins that of the loss just before the optimizer's step, once however many batches are accumulated.
        The weights in the module are dense then. It may be called more than once per step, without gradient too.
        """
        raise NotImplementedError

    # -- weights trained through a map w = f(v); every other phase and hook sees w, the optimizer alone sees v ---------

    latents: "Latents"  # what is trained in place of the weights; in the hands of techniques that map weights

    def weights_to_map(self, module: nn.Module) -> "Sequence[str]":
        """Names of the parameters that are trained through :meth:`map_weights`, as in ``named_parameters()``."""
        return ()

    def begin_map(self, weights: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Returns new latents for the weights that a training begins with, and fills ``latents.own``."""
        raise NotImplementedError

    def latents_of(self, weights: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Returns new latents for weights that somebody else wrote, under the map as it is."""
        raise NotImplementedError

    def map_weights(self, latents: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]") -> None:
        """Writes f(v) into ``weights``, after the optimizer has stepped the latents."""
        raise NotImplementedError

    def pull_back(
        self, latents: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]", gradients: "Mapping[str, Tensor]"
    ) -> None:
        """Turns gradients dL/dw into dL/dv, in place, and sets the gradients of ``latents.own``; once per step."""
        raise NotImplementedError

    # -- services -----------------------------------------------------------------------------------------------------

    @final
    @override
    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Attaches the engine to the Trainer, once for all techniques."""
        if stage == "fit":
            from lightning_reg.engine.engine import Engine  # the engine imports this module

            Engine.attach(trainer, pl_module)

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

    def derived_seed(self, purpose: str) -> int:
        """A seed for one purpose: depends on it, the technique's seed and its name, and on nothing else."""
        text = f"{self.seed} {self.log_key} {purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def phases_of(technique: Technique | type[Technique]) -> tuple[str, ...]:
    """Phases that a technique takes part in: those whose methods it overrides, in the order of the step."""
    cls = technique if isinstance(technique, type) else type(technique)
    return tuple(phase for phase in PHASES if getattr(cls, phase) is not getattr(Technique, phase))
