"""Rich features, second part: one network of the features of all rounds."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_choice
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import find_layer, named_layers
from lightning_reg.engine.run.period_part import resting
from lightning_reg.engine.run.phases import Member
from lightning_reg.engine.technique import DrawTechnique, GradientTechnique, LossTechnique, ModuleTechnique
from lightning_reg.engine.weights.strategies import check_whole
from lightning_reg.reweighting.rich_features._rounds import check_paths, read_rounds
from lightning_reg.reweighting.rich_features.core import mean_head_, round_losses, synthesis_draws

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_reg.engine.loss.call import LossCall

__all__ = ["FeatureSynthesis"]


class FeatureSynthesis(DrawTechnique, ModuleTechnique, LossTechnique, GradientTechnique):
    r"""Distils the networks of all rounds of :class:`RichFeatures` into one, which keeps the features of each.

    .. math:: \min_{\varphi, h} \frac1R \sum_r \frac1n \sum_i
        \operatorname{CE}(h_r(\varphi(x_i)), \arg\max f_r(x_i))

    with one linear head for each round on the shared features, and half of the samples drawn among those on which the
    rounds differ. It takes the place of your own loss. After each step your head is the mean of the heads; with it and
    the features, fine-tuned or frozen, the method proper starts (load the checkpoint in the next fit). No other
    technique stands beside it.

    Source:
        Zhang et al., "Rich Feature Construction for the Optimization-Generalization Dilemma", ICML 2022, arXiv
        2203.15516, section 4.2 and algorithm 1.

    Differs:
        Samples are drawn anew in each epoch; in the authors' ColoredMNIST once. Heads begin as torch's linear layers
        do, theirs by Glorot's rule with biases of 0. Classes are those of a cross-entropy, where theirs is a binary one
        of a single logit.

    Memory: R heads, and R numbers per sample.

    Args:
        layer: Layer whose output is the features, ``(B, D)``, as in ``named_modules()``.
        head: The linear layer that gets them.
        rounds: Files of all rounds, of :class:`RichFeatures`; at least 1.
        balance: What the half of the draws on which rounds do not differ is: ``"agree"``: all right or all wrong
            (ColoredMNIST). ``"all_right"``: all right, and the other half is of all other samples (Camelyon17).
            ``None``: your own sampler draws.
        lr_factor: Learning rate of the heads, as a multiple of that of the optimizer's first group.
        weight_decay: Weight decay of the heads, where the optimizer has one.
        own_optimizer: Position of the optimizer that trains the heads, if there are several.
        loss: Which loss call it replaces, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        index_key: Batch entry with the positions of the samples in the dataset; ``None`` to follow them from the
            DataLoader.
        dataloader: Key of the training loader in a CombinedLoader.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws and of the heads.

    Raises:
        ValueError: If an argument is outside its range, or ``rounds`` is no list of files.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> synthesis = FeatureSynthesis("encoder", "head", rounds=["rich/0.pt", "rich/1.pt"])
        >>> trainer = Trainer(callbacks=[synthesis], logger=False, enable_checkpointing=False)

    """

    needs_indices = True

    def __init__(
        self,
        layer: str,
        head: str,
        rounds: list[str],
        balance: Literal["agree", "all_right"] | None = "agree",
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
        own_optimizer: int | None = None,
        loss: int | str | None = None,
        index_key: str | None = None,
        dataloader: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, index_key=index_key, dataloader=dataloader, name=name, seed=seed)
        self.rounds = check_paths(self, rounds)
        if not self.rounds:
            raise ValueError(f"FeatureSynthesis: `rounds` must name at least one file, got {rounds!r}.")
        check_choice(self, "balance", balance, ("agree", "all_right", None))
        self.train_own(lr_factor, weight_decay, own_optimizer)
        self.layer, self.head, self.balance = layer, head, balance
        self.lr_factor, self.weight_decay = lr_factor, weight_decay
        self._correct: Tensor | None = None
        self._predictions: Tensor | None = None

    @property
    @override
    def draws_samples(self) -> bool:
        return self.balance is not None

    @override
    def describe(self) -> str:
        drawn = {None: "your own draws", "agree": "half where all agree", "all_right": "half where all are right"}
        return f"{len(self.rounds)} rounds on {self.layer}, mean head in {self.head}, {drawn[self.balance]}"

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        check_whole(self, trainer, "gives a head the mean of others")
        self._correct, self._predictions = read_rounds(self, self.rounds)

    @override
    def conflict_with(self, other: Member) -> str | None:
        return (
            f"the synthesis is a fit of its own, by a loss of its own and with a head that it makes, in which"
            f" {type(other).__name__} would have no effect or another than it should. Use that one in the rounds, or in"
            " the fit that follows."
        )

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return (self.layer,)

    @override
    def own_modules(self, module: "LightningModule") -> "Mapping[str, nn.Module]":
        head = self._head_of(module)
        classes = 0 if self._predictions is None else int(self._predictions.max()) + 1
        if head.out_features < classes:
            raise MisconfigurationException(
                f"FeatureSynthesis: the rounds predict {classes} classes, and {self.head!r} has {head.out_features}"
                " outputs. Give the module as many as theirs had."
            )
        has_bias = head.bias is not None
        return {f"head_{r}": nn.Linear(head.in_features, head.out_features, has_bias) for r in range(len(self.rounds))}

    @override
    def draw_samples(self, epoch: int, size: int) -> Tensor | None:
        if self.balance is None or self._correct is None:
            return None
        self._check_size(size)
        try:
            return synthesis_draws(self._correct, self.draw_generator(epoch), self.balance)
        except ValueError as error:
            raise MisconfigurationException(
                f"FeatureSynthesis: {error}, so half of the draws would be of none. Write `balance=None`, or train the"
                " rounds otherwise."
            ) from error

    @override
    def change_losses(self, call: "LossCall") -> Tensor | None:
        step = call.step
        features, width = step.features[self.layer], self._head_of(step.module).in_features
        if features.dim() != 2 or features.shape[1] != width:
            raise MisconfigurationException(
                f"FeatureSynthesis(layer={self.layer!r}) puts out {tuple(features.shape)}, and {self.head!r} gets"
                f" (B, {width}). Name the layer whose output the head gets as it is."
            )
        samples = call.samples(self)
        if samples.size is not None:
            self._check_size(samples.size)
        predictions = self._table(features.device)[samples.indices]
        logits = [self.own[f"head_{r}"](features) for r in range(len(self.rounds))]
        if step.is_logging:
            for r, one in enumerate(logits):
                step.log(self, f"agreement_{r}", (one.argmax(1) == predictions[:, r]).float().mean())
        # The user's own has gradients of 0, which DDP waits for.
        return round_losses(logits, predictions) + resting(call.learned_losses)

    @override
    def after_step(self, module: "LightningModule", optimizer: "Optimizer") -> None:
        heads = [self.own[f"head_{r}"] for r in range(len(self.rounds))]
        mean_head_(self._head_of(module), [head for head in heads if isinstance(head, nn.Linear)])

    def _head_of(self, module: nn.Module) -> nn.Linear:
        found = find_layer(named_layers(module), self.head)
        if not isinstance(found, nn.Linear):
            raise MisconfigurationException(
                f"FeatureSynthesis(head={self.head!r}) must name a linear layer, found {found}."
            )
        return found

    def _table(self, device: torch.device) -> Tensor:
        if self._predictions is None:
            raise RuntimeError("The rounds are read when the fit starts.")
        self._predictions = self._predictions.to(device)
        return self._predictions

    def _check_size(self, size: int) -> None:
        if self._correct is not None and self._correct.shape[1] != size:
            raise MisconfigurationException(
                f"FeatureSynthesis: the rounds are records of {self._correct.shape[1]} samples, and the training"
                f" dataset has {size}. Record all rounds on the dataset that is trained on."
            )

    @override
    def __getstate__(self) -> "dict[str, object]":
        return super().__getstate__() | {"_correct": None, "_predictions": None}  # read again at each fit
