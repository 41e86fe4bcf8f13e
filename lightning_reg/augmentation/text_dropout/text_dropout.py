"""Modality dropout: whole inputs of single samples are left out, so that the others are learned from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from lightning_reg.augmentation.text_dropout._modalities import by_name, names_of, new_state
from lightning_reg.augmentation.text_dropout.core import drop_rows, exclusive_keep_masks
from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.row_bits import global_rows, uniforms
from lightning_reg.engine.technique import BatchTechnique, LayerTechnique, ModuleTechnique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_reg.engine.layers.edits import LayerCall
    from lightning_reg.engine.step import Stage, Step

__all__ = ["ModalityDropout"]


class ModalityDropout(ModuleTechnique, LayerTechnique, BatchTechnique):
    r"""Leaves a whole modality out of some samples, so that the network learns from the others as well.

    .. math:: \tilde z_i = m_i\, z_i + (1 - m_i)\, e, \qquad m_i \sim \text{Bernoulli}(1 - p)

    with one draw per sample for the whole output of an encoder (``layer``) or entry of the batch (``batch_key``).
    Nothing is rescaled: the null state ``e`` is the input that stands for an absent modality in a test, too::

        dropout = ModalityDropout(0.5, layer="text_encoder", null_shape=[256])
        trainer = Trainer(callbacks=[dropout])
        trainer.fit(model, loader)
        with dropout.absent("text_encoder"):
            trainer.validate(model, loader)  # by video alone

    Use it where one of several inputs is so easy that the others are not learned from, and may be missing later. Leave
    it where all inputs are always there: the result with all of them is a little worse. Report the result with all and
    without each; choose ``p`` by the one that counts.

    Where the output of a layer is no tensor, all floating-point tensors in it are replaced. Samples are the first
    dimension. Of a multiple of the batch's samples (copies, views, a joined batch) row ``j B + i`` is taken for sample
    i. A layer that runs several times in a step, for query and target or under a checkpoint, drops the same samples
    each time. So an encoder that both sides share is dropped on both: name a layer that only the query passes
    (an ``nn.Identity`` before the fusion will do). A zero state is unlike all outputs of a normalised layer: name the
    layer before, or let the state be learned. Where the fusion attends to tokens, a dropped token still takes part:
    name the attention mask in ``attention_masks``.

    Source:
        McKee et al., "Language-Guided Music Recommendation for Video via Prompt Analogies", CVPR 2023, arXiv
        2306.09327.

    Differs:
        Reconstruction: that text is dropped as a whole is published; the probability, the null state and the loss's
        temperature were not read in the paper. The masks belong to the rows of the global batch, so W ranks of batch b
        train as one process of batch W b does.

    Args:
        p: Probability with which a modality is dropped, in [0, 1], or one for each by its name. Paper: not read; 0.3 to
            0.8 is sensible, 1 removes it. Neutral: 0.
        layer: Names of layers whose outputs are modalities, as in ``named_modules()``.
        batch_key: Entries of the batch that are modalities, keys or positions (``"text"``, ``"1"``); rows of dropped
            samples become ``fill``.
        null: State that stands for an absent output of a layer: ``"learned"``, a vector that the module's optimizer
            trains, or ``"zero"``.
        null_shape: Shape of the learned state, which broadcasts to a row of the layer's output (``[256]`` for
            ``(B, T, 256)``), or one for each layer by its name.
        exclusive: Whether at most one modality of a sample is dropped; the probabilities then add up to at most 1.
        per_sample: Whether each sample has a draw of its own; else one draw is for the whole batch.
        fill: What a row of an entry of the batch becomes, by its key: one number, or as many as a row has last, such as
            padding or the tokens of the empty prompt. 0 where it is not given. Use the same in a test.
        attention_masks: Entry of the batch with the attention mask of a modality, by the modality's name: of a dropped
            sample it is 0 but for the first token.
        start_epoch: First epoch, from 0, in which anything is dropped.
        ramp_epochs: Number of epochs from there on in which the probability grows, in equal steps, up to ``p``.
        own_optimizer: Position of the optimizer that trains the learned state, if there are several.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the masks.

    Raises:
        ValueError: If an argument is outside its range, no modality is named, or one that is not there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> dropout = ModalityDropout(0.5, layer="text_encoder", null_shape=[256])
        >>> trainer = Trainer(max_epochs=30, callbacks=[dropout], logger=False, enable_checkpointing=False)

    """

    stages: frozenset["Stage"] = frozenset({"train", "validate", "test", "predict"})

    def __init__(
        self,
        p: float | dict[str, float] = 0.5,
        layer: str | list[str] | None = None,
        batch_key: str | list[str] | None = None,
        null: Literal["learned", "zero"] = "learned",
        null_shape: Sequence[int] | dict[str, Sequence[int]] | None = None,
        exclusive: bool = True,
        per_sample: bool = True,
        fill: dict[str, list[float]] | None = None,
        attention_masks: dict[str, str] | None = None,
        start_epoch: int = 0,
        ramp_epochs: int = 0,
        own_optimizer: int | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        self.layer, self.batch_key, self.p, self.null, self.null_shape = layer, batch_key, p, null, null_shape
        self.exclusive, self.per_sample, self.fill, self.attention_masks = exclusive, per_sample, fill, attention_masks
        self.start_epoch, self.ramp_epochs = start_epoch, ramp_epochs
        for value in p.values() if isinstance(p, dict) else [p]:
            check_number(self, "p", value, low=0, high=1)
        check_choice(self, "null", null, ("learned", "zero"))
        check_bool(self, "exclusive", exclusive)
        check_bool(self, "per_sample", per_sample)
        check_number(self, "start_epoch", start_epoch, low=0, integer=True)
        check_number(self, "ramp_epochs", ramp_epochs, low=0, integer=True)
        self.train_own(own_optimizer=own_optimizer)
        self._layers, self._keys = names_of(layer), names_of(batch_key)
        self._check_names()
        self._probs = by_name(p, self._layers + self._keys)
        self._shapes = {} if null == "zero" or null_shape is None else by_name(null_shape, self._layers)
        self._check_values()
        self._absent: frozenset[str] = frozenset()

    def _check_names(self) -> None:
        names = self._layers + self._keys
        if not names or len(set(names)) < len(names):
            self._refuse("layer", "name modalities, or `batch_key`, at least one and none twice", names)
        for argument, known in (("p", names), ("attention_masks", names), ("fill", self._keys)):
            given = getattr(self, argument)
            if isinstance(given, dict) and (
                not set(given) <= set(known) or (argument == "p" and len(given) < len(known))
            ):
                self._refuse(argument, f"be given by the names {known}", given)
        missing = self.null_shape is None or (
            isinstance(self.null_shape, dict) and set(self.null_shape) != set(self._layers)
        )
        if self.null == "learned" and self._layers and missing:
            advice = 'be the shape of a row that the layer returns, such as [256], with null="learned"'
            self._refuse("null_shape", f"{advice} (by the names {self._layers}, where they differ)", self.null_shape)

    def _check_values(self) -> None:
        if self.exclusive and sum(self._probs.values()) > 1 + 1e-6:
            advice = (
                "add up to at most 1 where one modality of a sample is dropped at most (`exclusive=False` lifts that)"
            )
            self._refuse("p", advice, self._probs)
        for shape in self._shapes.values():
            if min(shape, default=1) < 1:
                self._refuse("null_shape", "hold whole numbers of at least 1", self.null_shape)

    def _refuse(self, argument: str, must: str, value: object) -> None:
        raise ValueError(f"ModalityDropout: `{argument}` must {must}, got {value!r}.")

    @contextmanager
    def absent(self, *names: str) -> Iterator[None]:
        """Validation, test and prediction run without modalities; used around ``trainer.validate`` and its like.

        Args:
            *names: Their names; none is needed if there is one.

        Raises:
            ValueError: If there is no such modality, or none is named of several.

        """
        known = self._layers + self._keys
        if not set(names) <= set(known) or (not names and len(known) > 1):
            raise ValueError(f"ModalityDropout.absent: `names` must be among {known}, got {names!r}.")
        before, self._absent = self._absent, frozenset(names or known)
        try:
            yield
        finally:
            self._absent = before

    @override
    def describe(self) -> str:
        if not any(self._probs.values()):
            return "p=0: inactive"
        shares = ", ".join(f"{name} {p:g}" for name, p in self._probs.items())
        state = f"; {self.null} state" if self._layers else ""
        whole = "" if self.per_sample else "; whole batches"
        start = f"; from epoch {self.start_epoch}" if self.start_epoch else ""
        return f"drops {shares}{state}{whole}{start}{f', ramp of {self.ramp_epochs}' if self.ramp_epochs else ''}"

    @override
    def is_active(self, step: "Step") -> bool:
        if step.stage != "train":
            return bool(self._absent)
        return any(self._probs.values()) and step.epoch >= self.start_epoch

    @override
    def waits(self, step: "Step") -> bool:
        return any(self._probs.values()) and step.epoch < self.start_epoch

    @override
    def own_modules(self, module: "LightningModule") -> "Mapping[str, nn.Module]":
        return {name: new_state(shape, self.derived_seed(f"null {name}")) for name, shape in self._shapes.items()}

    @override
    def transform_batch(self, batch: Any, step: "Step") -> Any:
        masks = self.attention_masks or {}
        for name in [name for name in self._keys if self._drops(name, step)]:
            rows = self._entry(batch, name, "batch_key")
            given = (self.fill or {}).get(name, [0.0])
            if len(given) > 1 and rows.shape[-1:] != (len(given),):
                raise MisconfigurationException(
                    f"ModalityDropout: `fill` has {len(given)} numbers for the entry {name!r}, whose rows have shape"
                    f" {tuple(rows.shape[1:])}. Give one number, or as many as a row has last."
                )
            fill = given[0] if len(given) == 1 else torch.tensor(given).to(rows.device, non_blocking=True)
            batch = replace_entry(batch, name, drop_rows(rows, 1, fill, keep=self._keep(step, name, rows))[0])
        for name in [name for name in masks if self._drops(name, step)]:
            mask = self._entry(batch, masks[name], "attention_masks")
            first = torch.zeros_like(mask[:1])
            first[:, :1] = 1
            batch = replace_entry(batch, masks[name], drop_rows(mask, 1, first, keep=self._keep(step, name, mask))[0])
        return batch

    def _entry(self, batch: object, key: str, argument: str) -> Tensor:
        entry = find_entry(batch, key, f"ModalityDropout: {argument}")
        if not isinstance(entry, Tensor) or entry.dim() < (2 if argument == "attention_masks" else 1):
            raise MisconfigurationException(
                f"ModalityDropout: the entry {key!r} of the batch must be a tensor with a row per sample, found"
                f" {type(entry).__name__}. Name another one in `{argument}`."
            )
        return entry

    @override
    def features_to_edit(self, module: nn.Module) -> "Sequence[str]":
        return self._layers

    @override
    def edit_features(self, call: "LayerCall") -> Any:
        if not self._drops(call.name, call.step):
            return None
        leaves, structure = tree_flatten(call.output)
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        heads = {leaves[place].shape[:1] for place in places}
        if len(heads) != 1 or not next(iter(heads)):
            shapes = [tuple(leaves[place].shape) for place in places]
            raise MisconfigurationException(
                f"ModalityDropout: {call.name!r} returns a {type(call.output).__name__} with tensors {shapes};"
                " all must have a row for each sample first. Name a layer that returns such."
            )
        for place in places:
            state = self._null_state(call, leaves[place])
            keep = self._keep(call.step, call.name, leaves[place])
            leaves[place] = drop_rows(leaves[place], 1, state, keep=keep)[0]
        return tree_unflatten(leaves, structure)

    def _null_state(self, call: "LayerCall", rows: Tensor) -> float | Tensor:
        name = call.name
        if self.null == "zero":
            return 0.0
        missing = f"the state that stands for an absent {name!r} was not trained"
        new = partial(self.own_modules, call.step.module)
        state = self.own.trained(name, new, rows.device, "ModalityDropout", missing).get_parameter("state")
        # As many dimensions as a row at most, each of its size or 1.
        sizes = zip(reversed(state.shape), reversed(rows.shape[1:]), strict=False)
        if state.dim() >= rows.dim() or any(size not in (1, wanted) for size, wanted in sizes):
            raise MisconfigurationException(
                f"ModalityDropout: `null_shape` is {list(state.shape)} for {name!r}, whose rows have shape"
                f" {list(rows.shape[1:])}. Give a shape that broadcasts to it, [{rows.shape[-1]}] for one."
            )
        return state

    def _drops(self, name: str, step: "Step") -> bool:
        return name in self._absent if step.stage != "train" else self._probs[name] > 0

    def _keep(self, step: "Step", name: str, rows: Tensor) -> Tensor:
        """Which rows keep a modality, bool ``(n,)``; the same in each call of a step."""
        if step.stage != "train":
            return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        sizes = step.batch_sizes
        count = sizes[0] if len(sizes) == 1 and sizes[0] and len(rows) % sizes[0] == 0 else len(rows)
        drawn = step.notes.setdefault(self, {})
        if (count, rows.device) not in drawn:
            drawn[count, rows.device] = self._draw(step, count, rows.device)
        keep: Tensor = drawn[count, rows.device][name]
        return keep.repeat(len(rows) // count) if count else keep

    def _draw(self, step: "Step", count: int, device: torch.device) -> dict[str, Tensor]:
        share = min((step.epoch - self.start_epoch + 1) / (self.ramp_epochs + 1), 1.0)
        probs = {name: p * share for name, p in self._probs.items()}
        rows = global_rows(count, device, host.data_parallel_group(step.trainer))
        rows = rows if self.per_sample else torch.zeros_like(rows)
        base = self.generator(step, same_on_ranks=True).initial_seed()
        if self.exclusive:
            keep = exclusive_keep_masks(count, probs, draws=uniforms(self.derived_seed(f"{base}"), rows))
        else:
            keep = {name: uniforms(self.derived_seed(f"{base} {name}"), rows) >= p for name, p in probs.items()}
        if step.is_logging:
            for name, mask in keep.items():
                step.log(self, "dropped" if len(keep) == 1 else f"dropped_{name}", 1 - mask.float().mean())
        return keep
