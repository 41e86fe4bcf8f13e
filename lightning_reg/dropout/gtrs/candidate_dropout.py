"""CandidateDropout: each step sees a random subset of the candidates that a network chooses among."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.dropout.gtrs.core import candidate_subset, positions_in_subset, subset_size, take
from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host.arguments import check_bool, check_list, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import BatchTechnique, LayerTechnique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.layers.edits import InputCall
    from lightning_reg.engine.step import Step

__all__ = ["CandidateDropout"]


class CandidateDropout(BatchTechnique, LayerTechnique):
    r"""Shows a scorer of candidates a random subset of them in each training step, and all of them afterwards.

    A network that scores a set of candidates (trajectories, anchors, passages to rank again, prototypes) and lets them
    attend to each other, or takes a softmax over them, comes to depend on the very set that it is trained with. Here
    a step sees

    .. math:: I = \{\pi_1, \dots, \pi_{\lfloor \kappa L \rfloor}\}, \qquad \pi \text{ a random permutation of } L

    of the L candidates, the same for all samples of the batch, and another in the next step. Candidates and all that
    belongs to them, entries of the batch with a candidate axis each, are cut alike, so that a column of scores stays
    that of its candidate; distributions over the candidates sum to 1 again. Validation, test and prediction see the
    batch as it is, with any set.

    Where the candidates are the model's own, a buffer that it hands to a layer, that layer's argument is cut, and what
    belongs to them in the batch by the same positions::

        dropout = CandidateDropout({"scores": 1}, layer="scorer.embedding")  # candidates (L, D) are its first argument

    :attr:`indices` are the positions of the step for a loss that needs them. It needs less compute, not more: that of
    the candidates falls to :math:`\kappa`, attention among them to :math:`\kappa^2`.

    Use it for a dense set of candidates, to train with it and to work with smaller or other sets. Leave it where each
    candidate is scored by itself, without a softmax over all: then it leaves out terms of the loss and regularizes
    nothing. On synthetic trajectories (``benchmarks/effects/gtrs.py``), after as many steps, five seeds showed no gain
    on the set trained with, smaller ones, unseen ones and proposals of diffusion models. Quality was 0.002 to 0.019 of
    0.2 to 0.3 lower, beyond the noise on an unseen set of the same size (0.016) and on proposals (0.009): compare.

    :func:`~lightning_reg.functional.best_candidates` chooses from another set, and from candidates that are proposed
    for each sample. That helped there: half of the set with 32 proposals gave 0.33, the whole set 0.29.

    Source:
        Li et al., "Generalized Trajectory Scoring for End-to-end Multimodal Planning", 2025, arXiv 2506.06664; the
        authors' code, NVlabs/GTRS, ``gtrs_dense``.

    Differs:
        The technique and not the driving system: no camera network, no simulated driving scores, no trained proposals.
        The paper's gain (37.5 to 41.7 on Navhard) is not that of the dropout alone. Candidates stay in the order that
        they have; the authors' code shuffles them. While it trains that code looks the chosen trajectory up in the full
        set by its position in the subset; here positions are mapped back by :attr:`indices`. ``positive_key``,
        ``always_keep`` and ``normalise`` are ours.

    Args:
        candidate_axes: Entries of the batch that have a value for each candidate, and the axis that candidates lie
            along: ``{"candidates": 0, "scores": 1}``. Keys and positions, separated by dots. May be empty with
            ``layer``.
        keep: Share :math:`\kappa` of the candidates that a step sees, in (0, 1]. Paper: 0.5; sensible: 0.25 to 0.9.
            Neutral: 1.
        positive_key: Entry of the batch with positions of candidates, such as each sample's right one, ``(B,)``: they
            are always kept, and become positions in the subset. Negative positions are left as they are. As many
            candidates as it has positions must be kept. Right ones that all stand first need ``always_keep=[0]`` alone,
            and stay first.
        always_keep: Positions of further candidates that are always kept, such as ``[0]``.
        normalise: Those of ``candidate_axes`` that are distributions over the candidates.
        layer: Layer that is given the model's own candidates, as in ``named_modules()``; ``None``: there are none.
        argument: Which of its arguments, a position or a name.
        axis: The candidate axis of that argument.
        num_candidates: L; needed with ``positive_key`` if ``candidate_axes`` is empty.
        same_on_ranks: Whether all ranks see one subset, for losses over several ranks; the authors' code draws one for
            each.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> dropout = CandidateDropout({"candidates": 0, "scores": 1}, keep=0.5)
        >>> trainer = Trainer(max_epochs=20, callbacks=[dropout], logger=False, enable_checkpointing=False)

    """

    in_any_mode: ClassVar[bool] = True

    def __init__(
        self,
        candidate_axes: Mapping[str, int],
        keep: float = 0.5,
        positive_key: str | None = None,
        always_keep: Sequence[int] = (),
        normalise: Sequence[str] = (),
        layer: str | None = None,
        argument: int | str = 0,
        axis: int = 0,
        num_candidates: int | None = None,
        same_on_ranks: bool = False,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        given: object = candidate_axes
        if not isinstance(given, Mapping) or not (given or layer):
            raise ValueError(
                "CandidateDropout: `candidate_axes` must map entries of the batch to their candidate axis, as in"
                f' {{"candidates": 0}}, or `layer` name a layer, got {candidate_axes!r}.'
            )
        for value in candidate_axes.values():
            check_number(self, "candidate_axes", value, low=-64, high=63, integer=True)
        check_number(self, "keep", keep, low=0, low_open=True, high=1)
        check_list(self, "always_keep", always_keep)
        check_list(self, "normalise", normalise)
        for value in always_keep:
            check_number(self, "always_keep", value, low=0, integer=True)
        if unknown := [key for key in normalise if key not in candidate_axes]:
            raise ValueError(
                f"CandidateDropout: `normalise` must name entries of `candidate_axes`, got {unknown[0]!r}."
            )
        if not isinstance(argument, str):
            check_number(self, "argument", argument, low=0, integer=True)
        check_number(self, "axis", axis, low=-64, high=63, integer=True)
        if num_candidates is not None:
            check_number(self, "num_candidates", num_candidates, low=1, integer=True)
        elif positive_key is not None and not candidate_axes:
            raise ValueError(
                "CandidateDropout: `num_candidates` must be given with `positive_key` where `candidate_axes` is empty,"
                " got None."
            )
        check_bool(self, "same_on_ranks", same_on_ranks)
        self.candidate_axes, self.keep, self.positive_key = dict(candidate_axes), keep, positive_key
        self.always_keep, self.normalise = list(always_keep), list(normalise)
        self.layer, self.argument, self.axis, self.num_candidates = layer, argument, axis, num_candidates
        self.same_on_ranks = same_on_ranks
        self._indices: Tensor | None = None

    @property
    def indices(self) -> Tensor | None:
        """Positions of the candidates of the present training step, rising; ``None`` outside of one: all."""
        return self._indices

    @override
    def describe(self) -> str:
        if self.keep == 1:
            return "keep=1: inactive"
        parts = [f"{key} along {axis}" for key, axis in self.candidate_axes.items()]
        parts += [] if self.layer is None else [f"argument {self.argument} of {self.layer} along {self.axis}"]
        always = [] if self.positive_key is None else [self.positive_key]
        always += [f"{len(self.always_keep)} more"] if self.always_keep else []
        kept = f"; always {' and '.join(always)}" if always else ""
        return f"keep={self.keep:g} of {', '.join(parts)}{kept}; " + (
            "one subset for all ranks" if self.same_on_ranks else "a subset for each rank"
        )

    @override
    def is_active(self, step: "Step") -> bool:
        return self.keep < 1

    @override
    def transform_batch(self, batch: Any, step: "Step") -> Any:
        entries = {key: find_entry(batch, key, "CandidateDropout: candidate_axes") for key in self.candidate_axes}
        sizes = {key: self._size(entries[key], axis, f"entry {key!r}") for key, axis in self.candidate_axes.items()}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{key!r} has {size} along {self.candidate_axes[key]}" for key, size in sizes.items())
            raise MisconfigurationException(f"CandidateDropout: entries differ in their number of candidates: {found}.")
        size = next(iter(sizes.values()), self.num_candidates)
        if size is None:
            return batch
        positive = self._positive(batch)
        indices = self._draw(step, size, positive)
        for key, value in take(entries, self.candidate_axes, indices, self.normalise).items():
            batch = replace_entry(batch, key, value)
        if positive is not None and self.positive_key is not None:
            batch = replace_entry(batch, self.positive_key, positions_in_subset(positive, indices, size))
        return batch

    @override
    def inputs_to_edit(self, module: nn.Module) -> Sequence[str]:
        return [] if self.layer is None or self.keep == 1 else [self.layer]

    @override
    def edit_inputs(self, call: "InputCall") -> "tuple[tuple[Any, ...], Mapping[str, Any]] | None":
        where: Any = call.named if isinstance(self.argument, str) else dict(enumerate(call.args))
        if self.argument not in where:
            raise MisconfigurationException(
                f"CandidateDropout: layer {call.name!r} is given no argument {self.argument!r}, but"
                f" {len(call.args)} by position and {list(call.named)} by name. Write the candidates' into `argument`."
            )
        candidates, given = where[self.argument], call.step.notes.get(self)
        size = self._size(candidates, self.axis, f"argument {self.argument!r} of layer {call.name!r}")
        if given is not None and given[0] != size:
            raise MisconfigurationException(
                f"CandidateDropout: layer {call.name!r} is given {size} candidates, and {given[0]} were found before."
            )
        indices = self._draw(call.step, size, None) if given is None else given[1]
        cut = candidates.index_select(self.axis, indices.to(candidates.device, non_blocking=True))
        if isinstance(self.argument, str):
            return call.args, {**call.named, self.argument: cut}
        return (*call.args[: self.argument], cut, *call.args[self.argument + 1 :]), call.named

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._indices = None

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._indices = None

    def _draw(self, step: "Step", size: int, positive: Tensor | None) -> Tensor:
        always = [] if positive is None else [positive.flatten()]
        if self.always_keep:
            if max(self.always_keep) >= size:
                raise MisconfigurationException(
                    f"CandidateDropout(always_keep={self.always_keep}): there are {size} candidates."
                )
            always.append(torch.tensor(self.always_keep, device=always[0].device if always else None))
        wanted, count = sum(map(len, always)), subset_size(size, self.keep)
        if wanted > count:
            raise MisconfigurationException(
                f"CandidateDropout: {wanted} candidates are to be kept always, and keep={self.keep:g} keeps {count} of"
                f" {size}. Raise `keep`, or make batches smaller."
            )
        generator = self.generator(step, same_on_ranks=self.same_on_ranks)
        indices = candidate_subset(size, self.keep, generator, torch.cat(always) if always else None)
        step.notes[self], self._indices = (size, indices), indices
        if step.is_logging:
            step.log(self, "kept", torch.tensor(float(count)))
        return indices

    def _positive(self, batch: object) -> Tensor | None:
        if self.positive_key is None:
            return None
        positive = find_entry(batch, self.positive_key, "CandidateDropout: positive_key")
        if not isinstance(positive, Tensor) or positive.is_floating_point():
            found = positive.dtype if isinstance(positive, Tensor) else type(positive).__name__
            raise MisconfigurationException(
                f"CandidateDropout(positive_key={self.positive_key!r}) must name positions of candidates, whole numbers"
                f" in a tensor, found {found}."
            )
        return positive

    def _size(self, value: object, axis: int, what: str) -> int:
        if not isinstance(value, Tensor) or not -value.dim() <= axis < value.dim():
            found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MisconfigurationException(
                f"CandidateDropout: {what} must be a tensor with the candidates along axis {axis}, found {found}."
            )
        return value.shape[axis]
