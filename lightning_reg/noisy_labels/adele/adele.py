"""ADELE: masks are corrected class by class, when the network begins to memorise their errors."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.data.entries import replace_entry
from lightning_reg.engine.data.maps import MapMemory
from lightning_reg.engine.host import distributed
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.noisy_labels._label_stores import LabelStore, adopted, store_of
from lightning_reg.noisy_labels._reports import MaskErrors
from lightning_reg.noisy_labels._scales import resized
from lightning_reg.noisy_labels.adele._curves import Curves
from lightning_reg.noisy_labels.adele._memory import memory_of, told
from lightning_reg.noisy_labels.adele._predictions import PredictsMasks, check_loader
from lightning_reg.noisy_labels.adele.core import confident_classes, corrected_masks, iou_counts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.step import Step

__all__ = ["ADELE"]


class ADELE(PredictsMasks):
    r"""Adaptive early-learning correction: wrong masks are corrected before the network memorises them.

    The IoU of each class between predictions and the given masks is followed while it trains. It grows fast while the
    network learns what masks have in common, and slowly when it begins to learn their errors: a curve
    :math:`f(t) = a\,(1 - e^{-t^b/c})` is fitted to it, and once its slope has fallen by more than the share r,
    :math:`|f'(t) - f'(1)| / |f'(1)| > r`, confident predictions of the class replace labels of the training masks.
    Classes are learned at different speeds, so each has its own moment.

    It changes the masks in the batch that ``training_step`` gets, so that every loss sees them (cross-entropy, Dice,
    both). Masks of validation and test are never touched. `MultiScaleConsistency` beside it is the other half of the
    paper.

    Use it for semantic segmentation with systematic errors of masks (dilated, eroded, made from weak labels). Leave it
    where whole objects have a wrong class, which the class constraint cannot repair. Images that the dataset crops,
    flips or scales at random are refused: pixels have to stay where they are. Let a
    :class:`~lightning_reg.LabelStore` be the dataset, which does that behind the corrected masks; curves are then
    against the masks as they are trained on. The effect depends on the data; see the page of measured effects, and look
    at :meth:`mask_errors` before you believe it.

    Source:
        Liu et al., "Adaptive Early-Learning Correction for Segmentation from Noisy Annotations", CVPR 2022, arXiv
        2110.03740; constants and rules are those of the authors' code. The defaults are those for PASCAL VOC; for
        organs in CT (SegTHOR) they are ``tau=0.7, correct_every=10, from_original=False, rule="both",
        shrink_guard=False, predict="train", flat_rise=0.1``.

    Differs:
        A point of a curve has the time at which it was taken; the authors' axis starts with 0 at the first point.
        Pixels of ``ignore_index`` are never replaced, which the authors' code does for VOC. No dense CRF. VOC's curve
        has a point every 100 steps, ours one an epoch unless ``every_n_steps``. A fit begins from ``min_points`` on.

    Memory: H x W bytes for a mask that was corrected, less with few classes, in host memory; 1,000 masks of 250 x 250
    take 63 MB. A correction is one pass over the training data without gradient at each of the scales. With
    ``predict="train"`` each step waits for the device once, and as much is kept again.

    On several ranks corrected masks are brought together at the ends of epochs: with ``predict="train"`` a checkpoint
    from within an epoch lacks what other ranks have corrected since, so write checkpoints at the ends of epochs there.

    Args:
        r: Share by which the slope has to fall, in (0, 1). Authors' code: 0.9.
        tau: Confidence that a prediction has to exceed, in (0, 1]. Authors' code: 0.8 (VOC), 0.7 (SegTHOR).
            Neutral: 1.
        tau_background: The same for predictions of the background; ``None`` for the same.
        correct_every: Epochs from one correction to the next, at least 0; 0: a class is corrected once. Authors' code:
            1 (VOC), 10 (SegTHOR).
        from_original: Whether a correction starts from the given masks, and the curves are against these (VOC), or from
            those corrected before (SegTHOR).
        rule: Which pixels are replaced: those where a triggered class or background is ``"predicted"`` (VOC), or where
            the label is of them as well (``"both"``, SegTHOR).
        class_constraint: Whether a mask gets no class that it has not.
        shrink_guard: Whether a mask stays as it is that would lose more than half of its foreground and be background
            to 95 % (VOC).
        predict: Whose predictions: those of one pass in eval mode (VOC), or those that were made while it
            trained, in train mode and at scale 1 (SegTHOR).
        scales: Factors of height and width of that pass, above 0; the mean of the scores counts. Authors' code: 0.75,
            1, 1.5.
        flip: Whether the mean takes in images flipped left to right.
        temperature: What the scores are divided by, above 0. Authors' code: 3 (VOC), where the loss is trained at that
            temperature too.
        start: Epoch after which all classes are corrected, whatever their curves; ``None`` for the curves.
        min_points: Points of a curve before it is fitted, at least 3.
        every_n_steps: Training steps for a point of the curves; ``None`` for one an epoch.
        flat_rise: A curve begins where it rises by this much for the first time (SegTHOR: 0.1); 0: at once.
        multiple_of: What height and width of resized images are multiples of, at least 1: 32 for many encoders.
        background: Class of the background, ``None`` for none.
        ignore_index: Label of pixels that do not count.
        layer: Layer that puts out the class scores ``(B, C, H, W)``, where the loss is none of
            ``torch.nn.functional`` (Dice); ``None`` for the input of the loss call.
        input_key: Entry of the batch with the images: keys and positions, separated by dots.
        target_key: Entry of the batch with the masks ``(B, H, W)``.
        num_samples: Number of training samples; ``None`` for the length of the training dataset.
        loss: Which loss call it reads the scores from, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``.
        dataloader: Key of the training loader in a CombinedLoader.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> adele = ADELE(tau=0.8)
        >>> trainer = Trainer(max_epochs=20, callbacks=[adele], logger=False, enable_checkpointing=False)

    """

    needs_indices: ClassVar[bool] = True
    watched = ("replaced",)

    def __init__(
        self,
        r: float = 0.9,
        tau: float = 0.8,
        tau_background: float | None = None,
        correct_every: int = 1,
        from_original: bool = True,
        rule: Literal["predicted", "both"] = "predicted",
        class_constraint: bool = True,
        shrink_guard: bool = True,
        predict: Literal["eval", "train"] = "eval",
        scales: Sequence[float] = (0.75, 1.0, 1.5),
        flip: bool = False,
        temperature: float = 1.0,
        start: int | None = None,
        min_points: int = 4,
        every_n_steps: int | None = None,
        flat_rise: float = 0.0,
        multiple_of: int = 1,
        background: int | None = 0,
        ignore_index: int = 255,
        layer: str | None = None,
        input_key: str = "0",
        target_key: str = "1",
        num_samples: int | None = None,
        loss: int | str | None = None,
        dataloader: str | None = None,
        name: str | None = None,
    ) -> None:
        keys = input_key, target_key
        super().__init__(
            scales, flip, temperature, multiple_of, layer, keys, loss=loss, dataloader=dataloader, name=name
        )
        check_number(self, "r", r, low=0, low_open=True, high=1, high_open=True)
        check_number(self, "tau", tau, low=0, low_open=True, high=1)
        check_number(self, "tau_background", tau_background, low=0, low_open=True, high=1, optional=True)
        check_number(self, "correct_every", correct_every, low=0, integer=True)
        check_bool(self, "from_original", from_original)
        check_choice(self, "rule", rule, ("predicted", "both"))
        check_bool(self, "class_constraint", class_constraint)
        check_bool(self, "shrink_guard", shrink_guard)
        check_choice(self, "predict", predict, ("eval", "train"))
        check_number(self, "start", start, low=1, integer=True, optional=True)
        check_number(self, "min_points", min_points, low=3, integer=True)
        check_number(self, "every_n_steps", every_n_steps, low=1, integer=True, optional=True)
        check_number(self, "flat_rise", flat_rise, low=0)
        check_number(self, "background", background, low=0, integer=True, optional=True)
        check_number(self, "ignore_index", ignore_index, integer=True)
        check_number(self, "num_samples", num_samples, low=1, integer=True, optional=True)
        self.r, self.tau, self.tau_background, self.correct_every = r, tau, tau_background, correct_every
        self.from_original, self.rule, self.class_constraint = from_original, rule, class_constraint
        self.shrink_guard, self.predict, self.start, self.min_points = shrink_guard, predict, start, min_points
        self.every_n_steps, self.flat_rise, self.background = every_n_steps, flat_rise, background
        self.ignore_index, self.num_samples = ignore_index, num_samples
        self._store: LabelStore | None = None  # the training dataset, which hands out corrected masks
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._curves = Curves(self.r, self.start, self.min_points, self.flat_rise, self.background)
        self._masks: MapMemory | None = None
        self._candidates: MapMemory | None = None
        self._due: Tensor | None = None  # classes that are corrected now, or while the next epoch trains
        self._ended, self._share = 0, 0.0  # share of pixels that the last pass has found to be replaced

    @override
    def describe(self) -> str:
        if self.tau == 1:
            return "tau=1: inactive"
        when = f"r={self.r:g}" if self.start is None else f"after epoch {self.start}"
        scales = f" at scales {', '.join(f'{scale:g}' for scale in self.scales)}" if self.predict == "eval" else ""
        origin = "given" if self.from_original else "corrected"
        return f"{when}, tau={self.tau:g}; predictions in {self.predict} mode{scales}; from {origin} masks"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if isinstance(other, ADELE) and other.target_key == self.target_key:
            return "both correct the same masks, the second those that the first has corrected. Remove one of them."
        if self.predict == "eval" and "edit_weights" in phases_of(other):
            return (
                f"{type(other).__name__} changes the module's weights in each step, and the pass over the training data"
                ' lacks that. Write predict="train".'
            )
        return super().conflict_with(other)

    @override
    def meet_loader(self, trainer: "Trainer", loader: Any) -> None:
        if host.batches_so_far(trainer) == 0:  # a new training, not a resumed or continued one
            self._begin_anew()
        self._store = self._store_of(loader) if self.tau < 1 else None
        if self._store is not None:
            self._masks = adopted(self._store, self._masks)

    def _store_of(self, loader: object) -> LabelStore | None:
        store, problem = store_of(loader), ""
        if self.predict == "train":
            problem = (
                'predict="train" predicts what it trains on, which a LabelStore may have cropped. Write predict="eval"'
            )
        elif self.num_samples is not None:
            problem = "a LabelStore knows its number of samples. Leave `num_samples` out"
        elif self.dataloader is not None:
            problem = "a LabelStore works with one training loader, and `dataloader` is for several. Leave it out"
        if store is not None and problem:
            raise MisconfigurationException(f"ADELE: {problem}.")
        return store

    @override
    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self.tau < 1:
            self._check_samples_stay(trainer, self._store)

    @override
    def is_active(self, step: "Step") -> bool:
        return self.tau < 1

    @override
    def transform_batch(self, batch: Any, step: "Step") -> Any:
        masks = self._masks_of(batch)
        samples = step.samples(self, torch.device("cpu"))
        present = masks
        if self._store is None:
            present = self._kept(samples.indices, masks)
            if self._candidates is not None and self._due is not None:  # predictions of the epoch before
                confident = self._candidates.read(samples.indices, torch.full_like(masks, len(self._due)))
                present = self._correct(samples.indices, masks, present, confident)
        step.notes[self] = masks, present, samples
        if step.is_logging:
            self._log_replaced(step, masks, present)
        return batch if present is masks else replace_entry(batch, self.target_key, present)

    def _kept(self, indices: Tensor, masks: Tensor) -> Tensor:
        with told(" Masks must stay as large as they are."):
            kept = masks if self._masks is None else self._masks.read(indices, masks)
        return torch.where(masks == self.ignore_index, masks, kept)

    def _correct(self, indices: Tensor, masks: Tensor, present: Tensor, confident: Tensor) -> Tensor:
        due, memory = self._due, self._masks
        if due is None or memory is None:
            return present
        base, classes = masks if self.from_original else present, due.to(masks.device)
        limits = self.class_constraint, self.rule == "both", self.shrink_guard
        new = corrected_masks(confident, base, classes, self.background, self.ignore_index, *limits)
        memory.write(indices, torch.where((new < 0) | (new >= len(due)), 0, new))  # no class: stays as it is
        return new

    def _log_replaced(self, step: "Step", masks: Tensor, present: Tensor) -> None:
        counted = masks != self.ignore_index
        share = ((masks != present) & counted).sum() / counted.sum().clamp(min=1)
        step.log(self, "replaced", share if self._store is None else share.new_tensor(self._share))

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        self._see(call.step, self._scores_of(call, call.step.features))
        return None

    @override
    def term_of_step(self, step: "Step") -> Tensor:
        scores = self._scores_of(None, step.features)
        self._see(step, scores)
        return scores.new_zeros(())

    @torch.no_grad()
    def _see(self, step: "Step", scores: Tensor) -> None:
        """Counts what was predicted; keeps it, if masks are corrected by it."""
        masks, present, samples = step.notes[self]
        scores = resized(scores[: len(masks)].float(), masks.shape[-2:])
        num_classes = scores.shape[1]
        with told():
            self._masks = self._masks or MapMemory(samples.total("ADELE", self.num_samples), num_classes)
            if self.predict == "train" and self._candidates is None:
                self._candidates = MapMemory(self._masks.num_samples, num_classes + 1)
        if self._masks.num_classes != num_classes:
            raise MisconfigurationException(
                f"ADELE: masks are kept of {self._masks.num_classes} classes, and the network scores {num_classes}."
                f" Write `LabelStore(num_classes={num_classes})`."
            )
        against = masks if self.from_original else present
        self._curves.count(iou_counts(scores.argmax(1), against, num_classes, self.ignore_index))
        if self._candidates is not None:
            self._candidates.write(samples.indices, self._confident((scores / self.temperature).softmax(1)))

    def _confident(self, probabilities: Tensor) -> Tensor:
        return confident_classes(probabilities, self.tau, self.tau_background, self.background)

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is not None and host.batches_so_far(trainer) % self.every_n_steps == 0:
            per_epoch = max(int(trainer.num_training_batches), 1)
            self._curves.add_point(host.batches_so_far(trainer) / per_epoch)

    @override
    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        # Of a checkpoint of an epoch's last batch, behind which Lightning leaves both hooks of the epochs out.
        self._end_epoch(trainer, pl_module, trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._end_epoch(trainer, pl_module, trainer.current_epoch + 1)

    def _end_epoch(self, trainer: "Trainer", module: "LightningModule", epoch: int) -> None:
        """Ends an epoch once: looks which classes are triggered, and corrects."""
        masks = self._masks
        if masks is None or epoch <= self._ended:
            return
        self._ended, group = epoch, host.data_parallel_group(trainer)
        if self.every_n_steps is None:
            self._curves.add_point(float(epoch))
        self._curves.reduce(group)
        values = {f"{self.log_key}/iou_{c}": value for c, value in enumerate(self._curves.iou[-1:].flatten().tolist())}
        host.log_beside(trainer, values, epoch - 1)  # which a resumed fit has left already
        new = self._curves.trigger(epoch)
        again = self.correct_every > 0 and epoch % self.correct_every == 0
        due = self._curves.triggered_classes(masks.num_classes) if again or self.from_original else new
        self._due = due if due.any() and (again or new.any()) else None
        if self._due is not None and self.predict == "eval":
            self._correct_all(trainer)
        for memory in (masks, self._candidates):
            if memory is not None:
                memory.gather(module.device, group)

    def _correct_all(self, trainer: "Trainer") -> None:
        replaced = torch.zeros(2, dtype=torch.int64, device=trainer.lightning_module.device)
        with closing(self._predictions(trainer, self._store)) as batches:
            for indices, given, probabilities in batches:
                new = self._correct(indices, given, self._kept(indices, given), self._confident(probabilities))
                replaced += torch.stack([(new != given).sum(), (given != self.ignore_index).sum()])
        changed, counted = distributed.all_reduce_sum(replaced, host.data_parallel_group(trainer)).tolist()
        self._due, self._share = None, changed / max(counted, 1)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    @property
    def triggered(self) -> dict[int, int]:
        """In which epoch, counted from 1, the correction of a class began."""
        return dict(self._curves.triggered)

    @property
    def curves(self) -> tuple[list[float], Tensor]:
        """Times in epochs, and the training IoU ``(T, C)`` at each."""
        return self._curves.times, self._curves.iou

    def corrected_mask(self, index: int, mask: Tensor) -> Tensor:
        """The mask of a training sample as it is trained on.

        Args:
            index: Its position in the training dataset.
            mask: As given, ``(H, W)``.

        Returns:
            ``(H, W)`` like the one given.

        """
        return self._kept(torch.tensor([index]), mask[None])[0]

    def mask_errors(self, masks: Iterable[Tensor]) -> MaskErrors:
        """What was replaced, by image and pair of classes.

        Args:
            masks: The given masks of the training dataset, ``(H, W)`` each, in its order.

        Returns:
            A report to print through rich or to write as CSV.

        Raises:
            RuntimeError: If nothing was trained yet.

        """
        if self._masks is None:
            raise RuntimeError("ADELE: there are no masks yet; fit first, or load a checkpoint.")
        pairs = ((index, mask, self.corrected_mask(index, mask)) for index, mask in enumerate(masks))
        return MaskErrors.between(pairs, self._masks.num_classes, self.ignore_index)

    def pred_probs(self, trainer: "Trainer", loader: "DataLoader[Any]") -> Iterator[tuple[Tensor, Tensor]]:
        """The class probabilities that masks are judged by, for tools that do so themselves (cleanlab).

        One more pass over whole images, as a correction is: at all ``scales``, with ``flip`` and ``temperature``, in
        eval mode and without gradient, by the weights that the module has now. These are the weights of the last
        correction where the last epoch of the fit ended with one. It runs on the Trainer's device.

        Cost: a forward pass at each of the scales, twice with ``flip``; a copy of the module; and 4 x C x H x W bytes
        for each image of **one batch**, whatever the number of images (on the device as much for each pass, until their
        mean is taken). All of them would take N times that: 1,000 images of 250 x 250 with 21 classes are 5.3 GB as
        float32, and 1.3 GB as bytes, ``(255 * probabilities).round().byte()``, which err by 0.002. Write them to a file
        as they come (``numpy.lib.format.open_memmap``); cleanlab reads it in parts.

        Args:
            trainer: The one that has fitted.
            loader: A DataLoader of the training dataset; shuffled or not, each sample that its sampler draws comes
                once. Of a :class:`~lightning_reg.LabelStore` the whole images behind it are seen.

        Returns:
            An iterator: of each batch the positions in the training dataset ``(B,)``, in their order, and probabilities
            ``(B, C, H, W)`` float32 that sum to 1 over the classes; both on the CPU. Random numbers that are drawn
            before it has ended come again afterwards.

        Raises:
            RuntimeError: If nothing was trained yet.
            TypeError: If the loader is no DataLoader that draws batches by index.
            ValueError: If its dataset has another number of samples than there are masks.
            MisconfigurationException: With ``predict="train"``, whose probabilities are those of the steps themselves
                and are not kept; or if the samples change from one time to the next.

        """
        if self._masks is None or trainer.lightning_module is None:
            raise RuntimeError("ADELE: there are no probabilities yet; fit first, with the Trainer that is given.")
        if self.predict == "train":
            raise MisconfigurationException(
                'ADELE: with predict="train" masks are judged by what the steps predict while they train, which is not'
                ' kept. Write predict="eval" to have probabilities.'
            )
        check_loader(loader, self._masks.num_samples if self.num_samples is None else None)
        batches = self._predictions(trainer, self._store_of(loader), loader)
        return map(_without_masks, batches)  # which holds none of a batch while the next one is made

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._masks is None:
            return {}
        return {
            "curves": self._curves.state_dict(),
            "masks": self._masks.state_dict(),
            "candidates": None if self._candidates is None else self._candidates.state_dict(),
            "due": self._due,
            "ended": self._ended,
            "share": self._share,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._curves.load_state_dict(state_dict["curves"])
        self._masks, self._candidates = memory_of(state_dict["masks"]), memory_of(state_dict["candidates"])
        self._due, self._ended, self._share = state_dict["due"], state_dict["ended"], state_dict.get("share", 0.0)


def _without_masks(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0], batch[2].cpu()
