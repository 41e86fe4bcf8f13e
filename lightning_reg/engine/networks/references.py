"""References: the module as it was at another time, frozen, shared by all techniques that ask for the same one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_choice
from lightning_reg.engine.networks.foreign import ForeignNetwork, MadeNetwork, stored_at
from lightning_reg.engine.networks.named_weights import fill_, weights_of
from lightning_reg.engine.networks.peer import Peer, Sight, check_runs_on_copy
from lightning_reg.engine.run.engine import Engine, attached_engine
from lightning_reg.engine.run.phases import Member, has_prompts
from lightning_reg.engine.technique import BatchTechnique
from lightning_reg.engine.weights.strategies import check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.step import Step

__all__ = ["PLACES", "Reference", "ReferenceTechnique"]

PLACES = ("device", "cpu", "bfloat16", "cpu_bfloat16")


class Reference:
    """Weights of the module at an earlier time, and what of a frozen network with them is asked for.

    Without weights of its own it takes those of the first batch that it is asked about, after every load: all
    parameters and buffers, the head's too. It keeps them from fit to fit, and a resumed fit has those that were saved.

    Args:
        layers: Layers whose outputs are wanted, named as in ``named_modules()``; without any the loss call is wanted,
            the one that the technique's ``loss`` chooses.
        place: Where the weights lie: ``"device"`` beside the module's, as they are; ``"cpu"``, from where they are
            copied in each step; ``"bfloat16"``, half as many bytes, rounded to 8 bits; ``"cpu_bfloat16"`` both.

    Attributes:
        weights: By the names of the module; ``None`` before they are taken. Never written to.
        outputs: What layers put out in place of their own, by name; without their pass. Not saved.

    """

    def __init__(self, layers: Sequence[str] = (), place: str = "device") -> None:
        check_choice(self, "place", place, PLACES)
        self.layers, self.place = tuple(layers), place
        self.weights: dict[str, Tensor] | None = None
        self.outputs: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory of the weights; 0 before they are taken."""
        return sum(value.nbytes for value in (self.weights or {}).values())

    def describe(self) -> str:
        """For the table at the start of a fit."""
        where = (" on the CPU" if "cpu" in self.place else "") + (" in bfloat16" if "bfloat16" in self.place else "")
        if self.weights is None:
            return f"first weights{where}, taken at the first batch"
        return f"first weights{where}, {self.bytes / 2**20:.1f} MiB"

    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of weights as they lie here."""
        return stored_at(self.place, weights)

    @property
    def written_by(self) -> object:
        """What tells references apart that may not be one memory although they are equal; ``None``: never written."""
        return None

    def begin_step(self, step: "Step", taken: "Callable[[Reference], dict[str, Tensor]]") -> None:
        """Comes before it is looked through in a step; references that move can take weights here.

        Args:
            step: The step, with its final batch.
            taken: Gives the module's present weights as they lie here; equal ones of a step are one memory.

        """

    def state_dict(self) -> dict[str, Any]:
        """The weights; techniques that share them save one memory, which a file holds once."""
        return {} if self.weights is None else dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.weights = dict(state) or None


class ReferenceTechnique(BatchTechnique):
    """A technique that compares the network with references; those that ask for the same weights share one pass."""

    # Whether it means the network as it was, without what others train beside the module's weights.
    without_prompts: ClassVar[bool] = False

    @override
    def conflict_with(self, other: Member) -> str | None:
        # Prompts of a frozen network; what is drawn in training alone, such as dropped modalities, no reference has.
        if self.without_prompts or not has_prompts(other):
            return None
        return (
            f"what it compares with is made of the module's weights, and what {type(other).__name__} trains beside them"
            " is in none: that would be the network without it. Remove one of them; FrozenTwinAgreement compares with"
            " the network as it was."
        )

    @property
    def references(self) -> Sequence[Reference | ForeignNetwork]:
        """What it asks for, the same objects in every step."""
        raise NotImplementedError

    def reference_batch(self, step: "Step") -> Any:
        """What its references see, but for those of another make, which name an entry of ``step.batch``.

        Args:
            step: The step, with its final batch.

        Returns:
            A batch of the structure and size of ``step.batch``, which it is without more said.

        """
        return step.batch

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        check_whole(self, trainer, "keeps")
        check_runs_on_copy(module, self)

    @override
    def observe_batch(self, step: "Step") -> None:
        _network_of(step).look(step)

    def sight(self, step: "Step", reference: Reference | ForeignNetwork) -> Sight:
        """What a reference made of the step's batch.

        Args:
            step: The step, after its batch was observed.
            reference: One of :attr:`references`.

        Returns:
            Outputs of its layers, or the loss call, without gradient; of a foreign network its output is under "".

        """
        found: Sight = step.notes[self][id(reference)]
        return found


class _Network:
    """One skeleton of the module for a fit, which is seen through the weights of each reference.

    It has no memory of its own: its parameters are the module's, and never used.
    """

    def __init__(self, module: "LightningModule", techniques: Sequence[ReferenceTechnique]) -> None:
        self._module, self._techniques = module, techniques
        self._peer, self._layers = self._skeleton([])
        self._made: dict[str, MadeNetwork] = {}
        self._ready: dict[int, dict[str, Tensor]] = {}  # by the reference, the weights that it had then

    def _skeleton(self, layers: Sequence[str]) -> tuple[Peer, set[str]]:
        peer = Peer(self._module, layers=layers, owner=self._techniques[0])
        peer.share_memory_with(self._module)
        return peer, {*layers}

    def _check_skeleton(self, layers: set[str]) -> None:
        """Makes it anew where further layers are asked for, or a task within the fit has let the module grow."""
        shapes, now = (
            {name: value.shape for name, value in weights_of(m).items()} for m in (self._peer.module, self._module)
        )
        if not layers <= self._layers or shapes != now:
            self._peer, self._layers = self._skeleton(sorted(layers | self._layers))

    def look(self, step: "Step") -> None:
        """Sees the batch through all references of the step's active techniques, unless that was done."""
        asking = [t for t in step.active if isinstance(t, ReferenceTechnique)]
        if asking[0] in step.notes:
            return
        everything = [(t, reference) for t in asking for reference in t.references]
        asked = [(t, reference) for t, reference in everything if isinstance(reference, Reference)]
        taken: dict[str, dict[str, Tensor]] = {}
        for _, reference in asked:
            reference.begin_step(step, partial(self._taken, taken))
        for technique, reference in asked:
            self._make_ready(technique, reference, [other for _, other in asked])
        for technique in asking:
            step.notes[technique] = {}
        self._see_foreign(step, [(t, other) for t, other in everything if isinstance(other, ForeignNetwork)])
        groups: dict[object, list[tuple[ReferenceTechnique, Reference]]] = {}
        batches = {technique: technique.reference_batch(step) for technique in asking}
        for pair in asked:
            given = frozenset((layer, id(rows)) for layer, rows in pair[1].outputs.items())
            groups.setdefault((id(pair[1].weights), given, id(batches[pair[0]])), []).append(pair)
        for group in groups.values():
            with _shown(step, batches[group[0][0]]):
                self._see(step, group)

    def _taken(self, taken: dict[str, dict[str, Tensor]], reference: Reference) -> dict[str, Tensor]:
        if reference.place not in taken:
            taken[reference.place] = reference.stored(weights_of(self._module))
        return taken[reference.place]

    def _see(self, step: "Step", group: list[tuple[ReferenceTechnique, Reference]]) -> None:
        """One pass for all that want features, joined with the first of those that want a loss call."""
        callers = {t.loss: t for t, reference in group[::-1] if not reference.layers}
        as_then: dict[str, Any] = {"weights": group[0][1].weights, "outputs": group[0][1].outputs}
        sights = {loss: self._peer.see(step, t, **as_then) for loss, t in callers.items()}
        if not sights:
            sights = {None: self._peer.see(step, **as_then)}
        any_of_them = next(iter(sights.values()))
        for technique, reference in group:
            step.notes[technique][id(reference)] = any_of_them if reference.layers else sights[technique.loss]

    def _see_foreign(self, step: "Step", asked: Sequence[tuple[ReferenceTechnique, ForeignNetwork]]) -> None:
        """One pass of each network for all that want the same of it."""
        seen: dict[tuple[str, str, tuple[str, ...]], Sight] = {}
        for technique, foreign in asked:
            if foreign.key not in self._made:
                self._made[foreign.key] = MadeNetwork(foreign, step, technique)
            made, what = self._made[foreign.key], (foreign.key, foreign.entry, foreign.layers)
            made.check(foreign)
            if what not in seen:
                seen[what] = made.see(foreign, step)
            step.notes[technique][id(foreign)] = seen[what]

    def _make_ready(self, technique: ReferenceTechnique, reference: Reference, others: Sequence[Reference]) -> None:
        """Weights with the shapes that the module has now, in one memory where they are equal."""
        if reference.weights is not None and self._ready.get(id(reference)) is reference.weights:
            return
        self._check_skeleton({*reference.layers})
        full = reference.stored(weights_of(self._module))
        if reference.weights is not None:
            fill_(full, reference.weights, technique)
        alike = [o for o in others if o.written_by == reference.written_by]
        ready = [o.weights for o in alike if o.weights is not None and self._ready.get(id(o)) is o.weights]
        reference.weights = next((weights for weights in ready if _are_equal(weights, full)), full)
        self._ready[id(reference)] = reference.weights


@contextmanager
def _shown(step: "Step", batch: Any) -> Iterator[None]:
    """For a while the step's batch is another one."""
    own, step.batch = step.batch, batch
    try:
        yield
    finally:
        step.batch = own


def _are_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(one.values(), two.values(), strict=True)
    )


_NETWORKS: WeakKeyDictionary[Engine, _Network] = WeakKeyDictionary()


def _network_of(step: "Step") -> _Network:
    engine = attached_engine(step.trainer)
    if engine not in _NETWORKS:
        # Not those of the Trainer, which has none while it looks for a learning rate.
        everybody = [t for t in engine.techniques if isinstance(t, ReferenceTechnique)]
        _NETWORKS[engine] = _Network(step.module, everybody)
    return _NETWORKS[engine]
