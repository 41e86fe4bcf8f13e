"""Co-teaching: each of two networks is taught the samples of small loss that the other one picks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.distributed import all_gather_rows, world_size
from lightning_reg.engine.networks.trained import PeerInit
from lightning_reg.noisy_labels._target_table import TargetTable
from lightning_reg.noisy_labels._two_networks import TwoNetworks
from lightning_reg.noisy_labels.co_teaching._pair import Pair
from lightning_reg.noisy_labels.co_teaching.core import estimated_forget_rate, forget_rate_at, small_loss_weights

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["CoTeaching"]


class CoTeaching(TwoNetworks):
    r"""Trains each of two networks on the samples of small loss, which the other one picks.

    .. math:: L_k = \frac{1}{|S|} \sum_{i \in S} \ell(f_k(x_i), y_i), \quad S = \text{the }
        \lfloor (1 - R(T))\, B \rfloor \text{ smallest of } \ell(f_o(x_i), y_i), \quad
        R(T) = \tau \min(T^c / T_k, 1)

    with k one network, o the other one, and T the epochs finished. A network fits right labels before wrong ones, so a
    small loss speaks for a label; the two have other weights and see the data in another order, so each corrects what
    the other has taken for right. The second network is one of the module's class, trained beside it with its own
    weights, optimizer, schedulers and order of the data: an epoch of it follows each epoch of the module, before
    validation. Under DDP the picked samples are the smallest of the batches of all ranks together.

    The module stays network 1, in checkpoints too; :meth:`ensemble` gives the paper's predictor, the mean of the logits
    of both networks. Other techniques act on network 1 only, but for NestedDropout, whose cuts both networks have;
    where its K is chosen, or given, the picks are made by the first K features. Both in one fit::

        Trainer(callbacks=[NestedDropout("fc", eta=10), CoTeaching(0.2)]).fit(model, datamodule)

    or one after the other, as published: nested dropout alone for two networks of different seeds, then co-teaching
    from the two, with a smaller learning rate and the rate constant from the start::

        model = Model.load_from_checkpoint("one.ckpt", lr=1e-3)
        co_teaching = CoTeaching(0.2, gradual_epochs=0, second="two.ckpt")
        Trainer(callbacks=[NestedDropout("fc", eta=10, k=nested.chosen_k), co_teaching]).fit(model, datamodule)
        predictor = co_teaching.ensemble(model, prefix={"fc": nested.chosen_k})

    Use it for single-label classification with up to about half of the labels wrong, where double time is no obstacle.
    Leave it where classes are rare, or still to be learned when samples begin to be left out: theirs have large losses,
    and are never picked again. On digits with 36 % wrong labels the test accuracy of two networks went from 0.85 to
    0.94 (0.95 with the rate estimated, 0.44); with nested dropout of ``eta=10`` from the start it fell to 0.77, because
    whole classes were left out, and after nested dropout to 0.88, from 0.91 with that alone
    (``benchmarks/effects/co_teaching.py``). Beside nested dropout let ``gradual_epochs`` be many.

    Source:
        Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", NeurIPS 2018,
        arXiv 1804.06872; Chen et al., "Compressing Features for Learning with Noisy Labels", IEEE TNNLS 2022,
        arXiv 2206.13140, whose code picks in eval mode, on another batch for each network.

    Differs:
        The networks take turns by epochs and not by batches: in a module's epoch the second network picks as it was
        after the epoch before, and is then taught by the module as it has become. In the first one, unless ``second``
        names a file, its picks would be random, which is why R(0) = 0. Each network is taught whole batches of its own
        and not the other half of one. R reaches tau after T_k epochs, as in the paper; the authors' code, which
        interpolates to the last of them, is an epoch earlier. One sample at least is kept, and rounding takes none
        away: 0.2 of 10 are 2. The rate can be estimated; the papers take it as known.

    Memory: one more copy of parameters, gradients and optimizer state, two tables of N x C float32. Time: two training
    passes and two forward passes for each batch. The second network is not compiled.

    Args:
        forget_rate: Share that is left out (tau), in [0, 1), about the share of wrong labels. Papers: the noise rate;
            0.2, 0.3 (Clothing1M). ``None``: all samples are kept for ``gradual_epochs``, then the rate is estimated
            from their losses (:func:`~lightning_reg.functional.estimated_forget_rate`) and stays; the log says it. Of
            right labels alone some would be taken for wrong ones. Neutral: 0.
        gradual_epochs: Epochs until R has grown to tau (T_k), at least 0: the same R from the start. Papers: 10; 5, and
            0 from trained networks.
        exponent: c, above 0. Paper: 1.
        peer_init: First weights of network 2. ``"reset"``: drawn anew by the layers' own ``reset_parameters``, but for
            frozen ones. ``"copy"``: those of the module, for pretrained weights; only the order of the data and draws
            (augmentation, dropout) then tell the two apart.
        second: File with the first weights of network 2, a checkpoint or state dict of the same module from a training
            with another seed; those that a checkpoint of this technique holds have precedence. ``None``: ``peer_init``
            says it.
        logits_layer: Layer whose output are the logits, for :meth:`ensemble`, named as in ``named_modules()``; "" for
            ``forward`` of the module itself.
        num_samples: Number of training samples N; ``None`` for the length of the training dataset. Needed with
            ``index_key``.
        loss: Which loss call it works on, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        index_key: Batch entry with the sample indices; ``None`` to follow them from the DataLoader.
        name: Tells several instances in one Trainer apart.
        seed: Seed of network 2 and its order of the data.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CoTeaching(0.2)], logger=False, enable_checkpointing=False)

    """

    watched: ClassVar[tuple[str, ...]] = ("forget_rate",)

    _networks: Pair

    def __init__(
        self,
        forget_rate: float | None = None,
        gradual_epochs: int = 5,
        exponent: float = 1.0,
        peer_init: PeerInit = "reset",
        second: str | None = None,
        logits_layer: str = "",
        num_samples: int | None = None,
        loss: int | str | None = None,
        index_key: str | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(loss=loss, index_key=index_key, name=name, seed=seed)
        check_number(self, "forget_rate", forget_rate, low=0, high=1, high_open=True, optional=True)
        check_number(self, "gradual_epochs", gradual_epochs, low=0, integer=True)
        check_number(self, "exponent", exponent, low=0, low_open=True)
        check_choice(self, "peer_init", peer_init, ("reset", "copy"))
        check_number(self, "num_samples", num_samples, low=1, integer=True, optional=True)
        if index_key is not None and num_samples is None:
            raise ValueError("CoTeaching: `num_samples` must be given with `index_key`, got None.")
        if forget_rate is None and not gradual_epochs:
            raise ValueError(
                "CoTeaching: `gradual_epochs` must be at least 1 where the forget rate is estimated, got 0."
            )
        self.forget_rate, self.gradual_epochs, self.exponent = forget_rate, gradual_epochs, exponent
        self.peer_init, self.second, self.logits_layer, self.num_samples = peer_init, second, logits_layer, num_samples
        self.estimated_rate: float | None = None
        self._networks = Pair(peer_init, second)
        self._tables = [TargetTable(type(self).__name__, num_samples, None, "float32") for _ in range(2)]

    @override
    def describe(self) -> str:
        if self.forget_rate == 0:
            return "forget_rate=0: inactive"
        epochs = f"{self.gradual_epochs} epoch{'s' if self.gradual_epochs != 1 else ''}"
        if self.forget_rate is None:
            rate = f"forget rate estimated after {epochs}"
        else:
            rate = f"forget_rate={self.forget_rate:g}" + (f", reached after {epochs}" if self.gradual_epochs else "")
        start = {"reset": "initialized anew", "copy": "equal to the first at the start"}[self.peer_init]
        return f"{rate}; a second network, {start if self.second is None else f'from {self.second}'}"

    # -- the fit ------------------------------------------------------------------------------------------------------

    @override
    def _works(self) -> bool:
        return self.forget_rate != 0

    @override
    def _begin_anew(self) -> None:
        super()._begin_anew()
        self.estimated_rate = None

    @override
    def observe_batch(self, step: "Step") -> None:
        step.notes[self] = self._networks.ask_other(step, self)

    @override
    def sample_weights(self, call: "LossCall") -> Tensor | None:
        seen: LossCall | None = call.step.notes[self]
        if seen is None:
            return None
        samples, rate, mass = call.samples(self), self._rate(call.step.epoch), call.sample_mass
        predicted = seen.logits.float().softmax(1)
        self._tables[self._networks.number_of(call.step)].update(samples, predicted, call.labels, 0.0, mass)
        if call.step.is_logging:
            call.step.log(self, "forget_rate", torch.tensor(rate))
            self._log_networks(call)
        if rate == 0:
            return None
        if world_size() == 1:
            return small_loss_weights(seen.losses, rate, mass)
        own = torch.ones_like(seen.losses) if mass is None else mass
        rows, there, first = all_gather_rows(torch.stack([seen.losses, own], 1), capacity=samples.capacity)
        losses, mass = rows.unbind(1)
        return small_loss_weights(losses, rate, mass * there)[first : first + len(own)]

    def _rate(self, epoch: int) -> float:
        if self.forget_rate is None:
            return 0.0 if self.estimated_rate is None else self.estimated_rate
        return forget_rate_at(epoch, self.forget_rate, self.gradual_epochs, self.exponent)

    @override
    def _catch_up(self, trainer: "Trainer") -> None:
        super()._catch_up(trainer)
        waits = self.forget_rate is None and self.estimated_rate is None
        if waits and trainer.current_epoch + 1 >= self.gradual_epochs:
            targets, labels = self._targets_and_labels(None)
            seen = (targets.sum(1) > 0) & (labels >= 0)
            losses = F.nll_loss(targets[seen].clamp(min=1e-8).log(), labels[seen], reduction="none")
            self.estimated_rate = estimated_forget_rate(losses)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def ensemble(self, module: "LightningModule", prefix: Mapping[str, int] | None = None) -> nn.Module:
        """The papers' predictor: the mean of the logits of both networks.

        Args:
            module: The module, as it was trained or loaded from a checkpoint.
            prefix: How many of its features a linear layer sees, by the layer's name: the K of nested dropout.

        Returns:
            A module in eval mode with copies of both networks, called as ``logits_layer`` is.

        Raises:
            RuntimeError: If there is no second network.

        """
        return self._networks.ensemble(module, self, self.logits_layer, prefix or {})

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "estimated_rate": self.estimated_rate} if state else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict:
            self.estimated_rate = state_dict["estimated_rate"]
