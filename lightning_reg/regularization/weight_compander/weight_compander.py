"""Weight Compander: weights as a bounded function of what is trained, so that no few of them decide."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.technique import WeightMapTechnique
from lightning_reg.engine.weights.latents import Latents
from lightning_reg.engine.weights.summed import names_said, summed_weights
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.regularization.weight_compander._choice import companding
from lightning_reg.regularization.weight_compander.core import (
    Companding,
    compand_all,
    expand,
    figures,
    pull_back_all_,
    shapes_for,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["WeightCompander"]


class WeightCompander(WeightMapTechnique):
    r"""Weights as an odd, bounded function of what is trained: large ones are compressed, small ones pushed off zero.

    Each chosen weight is :math:`w = a\,\psi(v/b)`, with :math:`\psi` the arctan (:math:`|w| < a\pi/2`), tanh or
    softsign (:math:`|w| < a`), and the optimizer trains v: :math:`\partial_v = \tfrac ab \psi'(v/b)\,\partial_w`. Plain
    SGD then moves w at an effective learning rate of :math:`\psi'(v/b)^2\,(a/b)^2` times its own: four times at zero
    for a/b = 2, next to nothing for saturated weights. There is no extra loss term. Weight decay acts on v, so it is
    weaker on saturated weights than decay of w. Optimizers that scale each parameter (Adam) cancel a part of the
    effect.

    The module holds w at all times, in validation, checkpoints (``save_weights_only=True`` too), averages and after the
    fit, under its own keys; v takes its place for the optimizer's step alone. So averages and other techniques see w,
    an exported file is an ordinary network, and there is nothing to fold in at the end. What somebody else writes into
    a weight in place is mapped back to v; what is written through ``.data`` while training runs is noticed on logging
    steps only, with a warning.

    Use it beside weight decay and dropout on linear and convolution layers. Leave it where the aim is zeros (pruning),
    and expect less of it under a normalization that makes the weights' scale irrelevant.

    Source:
        Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", 2023,
        arXiv 2306.16993.

    Differs:
        The paper's text was not at hand: that the function is an arctan with a scale and a knee is recollection, which
        is why there are others to choose from; defaults of ``a``, ``b`` and the learning rate of the shape are ours.
        Networks start as they are (by the inverse), so pretrained ones keep their function; shapes are learned as
        log a and log b of each layer, without weight decay. Biases, norms and embeddings are left alone.

    Gradients of log a and log b are sums over a layer, hence large, and clipping by the norm counts them in; that is
    why their learning rate is a fraction of the weights' (on digits the same rate did no harm, and no good). They form
    a group of the optimizer for the time of its step, at the end of its groups; schedulers never meet it, and its
    learning rate is always ``shape_lr_factor`` times that of the layer's own group. The optimizer in a checkpoint is
    therefore the plain model's; their state and v lie in the callback's, which adds one copy of these weights to the
    file. A resumed training keeps its shapes.

    Memory: one copy of the companded weights, three more while the optimizer steps. No communication: with gradients
    averaged over ranks, all of this is the same on each.

    Args:
        layers: Patterns of names, of layers as in ``named_modules()`` (``"net.head"``, ``"*.mlp.*"``) or of weights
            themselves (``"*.in_proj_weight"``). ``"auto"``: all linear, convolution and attention layers, and layers of
            other libraries whose 2-D ``weight`` multiplies the input (``Conv1D`` of transformers), without weights
            shared with a layer of another kind and without routers of experts (named ``router``, or ``gate`` with fewer
            outputs than inputs). The table at the start lists what of two dimensions and more is left alone.
        fn: The function: ``"arctan"``, ``"tanh"``, ``"softsign"``; ``"identity"`` leaves all as it is, for comparisons.
            One of your own by its import path, ``"my_project.functions.algebraic"`` (``"__main__.algebraic"`` of the
            running script): a :class:`Companding`, which is tried at once. Paper: the arctan, as far as known. Neutral:
            ``"identity"``.
        a: Scale of the bound, above 0, in the weights' unit. ``None``: for each layer so that the bound is four times
            the root mean square of its initial weights, and at least 1.25 times the largest. As it grows with ``b``
            equal to it, the function nears the identity.
        b: Knee, above 0. ``None``: a/2, a slope of 2 at zero.
        learn: Whether a and b are trained, for each layer its own.
        shape_lr_factor: Learning rate of log a and log b as a multiple of that of the layer's weights, at least 0.
        preserve_init: Whether v begins so that the weights are the initial ones. ``False``: v begins as these, which
            changes the network before the first step.
        exclude: Patterns of names of layers and weights to leave alone (``"*head*"``).
        name: Tells several instances in one Trainer apart; they must not share a weight.

    Raises:
        ValueError: If an argument is outside its range, or ``fn`` is no companding.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> compander = WeightCompander(a=0.2, b=0.1, exclude=["*head*"])
        >>> trainer = Trainer(max_epochs=200, callbacks=[compander], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        layers: list[str] | str = "auto",
        fn: str = "arctan",
        a: float | None = None,
        b: float | None = None,
        learn: bool = False,
        shape_lr_factor: float = 0.01,
        preserve_init: bool = True,
        exclude: list[str] | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        companding(self, fn)
        for argument, value in (("a", a), ("b", b)):
            check_number(self, argument, value, low=0, low_open=True, optional=True)
        check_number(self, "shape_lr_factor", shape_lr_factor, low=0)
        check_bool(self, "learn", learn)
        check_bool(self, "preserve_init", preserve_init)
        self.layers, self.fn, self.a, self.b, self.learn = layers, fn, a, b, learn
        self.shape_lr_factor, self.preserve_init, self.exclude = shape_lr_factor, preserve_init, exclude
        self.latents = Latents(lr_factor=shape_lr_factor)
        self._shapes: dict[str, list[float]] = {}
        self._chosen: list[str] = []
        self._left: dict[str, list[str]] = {}

    @override
    def describe(self) -> str:
        if self.fn == "identity":
            return "identity: inactive"
        shape = ", ".join(f"{k}={'from the weights' if v is None else f'{v:g}'}" for k, v in self._given())
        learned = f"learned at {self.shape_lr_factor:g} of the learning rate" if self.learn else "fixed"
        weights = f"; {len(self._chosen)} weights" if self._chosen else ""
        left = "".join(f"; left alone, {why}: {names_said(names)}" for why, names in self._left.items())
        return f"{self.fn}, {shape}, {learned}, layers {self.layers}{weights}{left}"

    def _given(self) -> list[tuple[str, float | None]]:
        return [("a", self.a), ("b", self.a / 2 if self.b is None and self.a is not None else self.b)]

    @property
    def _function(self) -> Companding:
        return companding(self, self.fn, tried=True)  # looked up, so that a copy has nothing of the user's

    @override
    def is_active(self, step: "Step") -> bool:
        return False  # nothing happens in the forward pass

    # -- the map ------------------------------------------------------------------------------------------------------

    @override
    def weights_to_map(self, module: nn.Module) -> list[str]:
        self._chosen, self._left = [], {}
        if self.fn != "identity":
            self._chosen, self._left = summed_weights(self, module, self.layers, self.exclude, "compand")
        return self._chosen

    @override
    def begin_map(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        scales, knees = shapes_for(list(weights.values()), self.a, self.b, self._function)
        self._shapes = {name: [a, b] for name, a, b in zip(weights, scales, knees, strict=True)}
        if self.learn:
            for name, weight in weights.items():
                shape = torch.tensor(self._shapes[name], dtype=torch.float32, device=weight.device)
                self.latents.own[name] = {"shape": shape.log().requires_grad_()}
        return self.latents_of(weights) if self.preserve_init else {n: w.clone() for n, w in weights.items()}

    @override
    def latents_of(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        latents = {}
        for name, weight in weights.items():
            a, b = (
                (float(x.exp()) for x in self.latents.own[name]["shape"].detach()) if self.learn else self._shapes[name]
            )
            try:
                latents[name] = expand(weight, a, b, self._function)
            except ValueError as error:
                raise MisconfigurationException(
                    f"WeightCompander: {name!r} cannot be the value of the function. {error} Give a larger `a`, or"
                    " preserve_init=False if these are initial weights."
                ) from error
        return latents

    @override
    def map_weights(self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        mapped = compand_all(list(latents.values()), *self._shapes_of(latents), self._function)
        torch._foreach_copy_(list(weights.values()), mapped)

    @override
    def pull_back(
        self, latents: Mapping[str, Tensor], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> None:
        of_shapes = pull_back_all_(
            list(latents.values()),
            list(weights.values()),
            list(gradients.values()),
            *self._shapes_of(latents),
            self._function,
            learned=self.learn,
        )
        for name, gradient in zip(latents, of_shapes, strict=False):  # none if the shapes are fixed
            self.latents.add_gradients(name, {"shape": gradient})

    def _shapes_of(self, names: Iterable[str]) -> tuple[Any, Any]:
        if not self.learn:
            shapes = [self._shapes[name] for name in names]
            return [a for a, _ in shapes], [b for _, b in shapes]
        learned = [shape.detach() for shape in torch._foreach_exp([self.latents.own[name]["shape"] for name in names])]
        return [shape[0] for shape in learned], [shape[1] for shape in learned]

    # -- what is logged, and state ------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not host.is_logging_step(trainer) or not self.latents.values:
            return
        parameters, latents = named_weights(pl_module), self.latents.values
        weights = [parameters[name].detach() for name in latents]
        scalars = figures(list(latents.values()), weights, *self._shapes_of(latents))
        attached_engine(trainer).log_own(self, scalars)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = self.latents.state_dict()
        learned = {key: {name: parts["shape"] for name, parts in state[key].items()} for key in ("own", "moments")}
        return {"shapes": {name: list(shape) for name, shape in self._shapes.items()}, **state, **learned}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["values"] and self.learn != bool(state_dict["own"]):
            raise MisconfigurationException(
                f"WeightCompander(learn={self.learn}): the checkpoint is of a training with learn={not self.learn}. Go"
                " on with that, or train without `ckpt_path` from its weights."
            )
        self._shapes = dict(state_dict["shapes"])
        learned = {key: {name: {"shape": part} for name, part in state_dict[key].items()} for key in ("own", "moments")}
        self.latents.load_state_dict({**state_dict, **learned})
