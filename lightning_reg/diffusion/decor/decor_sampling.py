"""DecorSampling: outside training, undesired directions are taken out of what the module's text encoder gives."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.diffusion._named import attribute_of
from lightning_reg.diffusion.decor.core import TokenKind, token_rows, undesired_rows
from lightning_reg.diffusion.decor.decor_projection import DecorProjection
from lightning_reg.engine.data.entries import find_entry, replace_entry
from lightning_reg.engine.host import lightning as host
from lightning_reg.engine.host.arguments import check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.generators import isolated_randomness
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["DecorSampling"]

Mode: TypeAlias = Literal["validate", "test", "predict"]
_MODES: tuple[Mode, ...] = ("validate", "test", "predict")
_KINDS = ("words", "end", "padding")
_TOKENS = ("last_hidden_state", "encoder_hidden_states")  # where token vectors are, if they are not alone or first


class DecorSampling(Technique):
    r"""In validation, test and prediction, prompts are encoded without what they share with an undesired prompt.

    .. math:: X' = X - \alpha X V V^T, \qquad \tilde X = U S V^T

    Training is left alone, to the last bit. While it acts, the module's own ``encode`` gives :math:`X'` in place of X,
    see :class:`DecorProjection`; the undesired prompt is encoded once for each run, with the weights that the run has.
    The null prompt stays as it is, so that guidance does not cancel the removal: rows of token numbers without a word,
    and empty strings. Negative prompts are to be encoded by another method. After validations and tests ``removed`` is
    logged, the share of the prompts' energy that was taken out.

    Several of them act one after another, in the order of the callbacks; together in one projection, concepts are
    removed by one callback with all their prompts.

    Use it on samples that are drawn in validation while a customised model is trained, and in ``trainer.predict``
    (:class:`GuidedPredict`). Leave it where the desired and the undesired words share their directions: see
    :class:`DecorProjection` for what was measured.

    Source:
        Jang et al., "DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization", arXiv
        2412.09169, 2024.

    Differs:
        Reconstruction, see :class:`DecorProjection`: which rows of the undesired prompt the paper takes is not known.
        Those of its words are the default; causal encoders copy the meaning of words to what follows, which
        ``["words", "end", "padding"]`` removes as well.

    Args:
        undesired: Name in the module of what is undesired: token numbers ``(n, l)``, or whatever else ``encode`` takes,
            or vectors ``(m, d)``, which are taken as they are.
        encode: Name in the module of the method, or the network, that encodes prompts.
        alpha: Strength, in [0, 1]. Neutral: 0.
        rows: Which vectors of the undesired prompt count: of ``"words"``, ``"end"`` and ``"padding"``. Where it is not
            given by token numbers, all of them must.
        end: Number of the token that ends a text (CLIP: 49407), needed with token numbers.
        start: Number of the token that starts one (CLIP: 49406), whose vector is never undesired.
        rank: Leading directions that are taken; ``None``: all.
        widths: Lengths of the vectors of several text encoders side by side, see :class:`DecorProjection`.
        entry: Entry of what ``encode`` gives with the token vectors, a key or a position; ``None``: it is these
            vectors, or has them as ``"last_hidden_state"``, ``"encoder_hidden_states"`` or first.
        pooled_entry: Entry with the pooled vectors ``(B, d)``, from which those of the undesired prompt are removed;
            ``None``: pooled vectors stay.
        modes: In which runs it acts, of ``"validate"``, ``"test"``, ``"predict"``.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> clean = DecorSampling("undesired_ids", encode="text_encoder", alpha=0.5, end=49407, start=49406)
        >>> trainer = Trainer(callbacks=[clean], logger=False, enable_checkpointing=False)

    """

    def __init__(
        self,
        undesired: str,
        encode: str = "encode_prompt",
        alpha: float = 0.5,
        rows: Sequence[TokenKind] = ("words",),
        end: int | None = None,
        start: int | None = None,
        rank: int | None = None,
        widths: list[int] | None = None,
        entry: str | None = None,
        pooled_entry: str | None = None,
        modes: Sequence[Mode] = _MODES,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_number(self, "alpha", alpha, low=0, high=1)
        if not rows:
            raise ValueError("DecorSampling: `rows` must have at least one kind of rows, got [].")
        for argument, given, known in (("rows", rows, _KINDS), ("modes", modes, _MODES)):
            for one in given:
                check_choice(self, argument, one, known)
        for argument, number in (("end", end), ("start", start)):
            check_number(self, argument, number, low=0, integer=True, optional=True)
        for argument, number in (("rank", rank), *(("widths", width) for width in widths or ())):
            check_number(self, argument, number, low=1, integer=True, optional=True)
        self.undesired, self.encode, self.alpha, self.rows = undesired, encode, alpha, rows
        self.end, self.start, self.rank, self.widths = end, start, rank, widths
        self.entry, self.pooled_entry, self.modes = entry, pooled_entry, modes
        self.stages = frozenset(modes)
        self._encoding: _Encoding | None = None
        self._removed: dict[str, DecorProjection] | None = None
        self._is_unused = False
        self._energy: Tensor | None = None  # of the prompts, and of what was taken out

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_encoding": None, "_removed": None, "_energy": None}

    @override
    def describe(self) -> str:
        if not self.alpha or not self.modes:
            return "no strength or no mode: inactive"
        what = f"{self.alpha:g} of {self.undesired} ({', '.join(self.rows)})"
        return f"{self.encode} without {what}, in {', '.join(self.modes)}"

    # -- when ---------------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        attribute_of(self, pl_module, "encode", self.encode)  # with alpha=0 too, a wrong name is told
        attribute_of(self, pl_module, "undesired", self.undesired)

    @override
    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._begin(pl_module, "validate")

    @override
    def on_test_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._begin(pl_module, "test")

    @override
    def on_predict_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._begin(pl_module, "predict")

    def _begin(self, module: "LightningModule", mode: Mode) -> None:
        if self.alpha and mode in self.modes:
            attribute_of(self, module, "encode", self.encode)
            self._encoding = _Encoding.of(module, self.encode)
            self._encoding.removals.append(self)
            self._removed, self._is_unused, self._energy = None, True, torch.zeros(2, device=module.device)

    @override
    def on_validation_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._log(pl_module)

    @override
    def on_test_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._log(pl_module)

    def _log(self, module: "LightningModule") -> None:
        if self._encoding is not None and self._energy is not None:
            share = self._energy[1] / self._energy[0].clamp(min=1e-12)
            module.log(f"{self.log_key}/removed", share, on_step=False, on_epoch=True, sync_dist=True)

    @override
    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._end()

    @override
    def on_test_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._end()

    @override
    def on_predict_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._end()

    @override
    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._encoding is not None:
            self._encoding.leave(self)
        self._encoding = self._removed = self._energy = None

    @override
    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        self._end()
        if self._is_unused:
            host.rank_zero_warn(
                f"DecorSampling: nothing was removed, since {self.encode!r} was not called in the last run. Write the"
                " name of what your validation_step, test_step or predict_step encodes prompts with as `encode`."
            )
        self._is_unused = False

    # -- what ---------------------------------------------------------------------------------------------------------

    def changed(self, encoded: Any, prompts: Any, original: Callable[..., Any], module: nn.Module) -> Any:  # noqa: ANN401 # the user's
        """What the module's ``encode`` has given for prompts, without the undesired directions."""
        key = _token_entry(encoded) if self.entry is None else self.entry
        if self._removed is None:
            with isolated_randomness(), torch.no_grad():
                self._removed = self._projections(attrgetter(self.undesired)(module), original, key)
        self._is_unused = False
        is_null = self._nulls(prompts)
        for where, projection in self._removed.items():
            before = find_entry(encoded, where, "DecorSampling: entry")
            after = projection(before)
            if is_null is not None and len(before) % len(is_null) == 0:  # several images of a prompt stand together
                kept = is_null.to(before.device).repeat_interleave(len(before) // len(is_null))
                after = torch.where(kept.view(-1, *[1] * (before.dim() - 1)), before, after)
            if where == key and self._energy is not None:
                change = (before - after).detach(), before.detach()
                self._energy += torch.stack([one.float().square().sum() for one in change[::-1]]).to(self._energy)
            encoded = replace_entry(encoded, where, after)
        return encoded

    def _projections(self, found: Any, original: Callable[..., Any], key: str) -> dict[str, DecorProjection]:  # noqa: ANN401 # the user's
        if isinstance(found, Tensor) and found.is_floating_point():
            if self.pooled_entry is not None:
                raise MisconfigurationException(
                    f"DecorSampling: with pooled_entry={self.pooled_entry!r}, undesired={self.undesired!r} must name a"
                    " prompt that `encode` takes, found vectors of tokens, which say nothing of pooled ones."
                )
            return {key: self._projection(found.detach())}
        self._check_rows(found)
        encoded = original(found)
        vectors = find_entry(encoded, key, "DecorSampling: entry")
        if self.end is not None and _is_numbers(found):
            made = {key: self._projection(undesired_rows(vectors, found, self.end, self.start, self.rows))}
        else:
            made = {key: self._projection(vectors.flatten(0, -2))}
        if self.pooled_entry is not None:
            pooled = find_entry(encoded, self.pooled_entry, "DecorSampling: pooled_entry")
            made[self.pooled_entry] = DecorProjection(pooled, self.alpha)
        return made

    def _projection(self, vectors: Tensor) -> DecorProjection:
        return DecorProjection(vectors, self.alpha, self.rank, widths=self.widths)

    def _check_rows(self, prompts: Any) -> None:  # noqa: ANN401 # the user's
        """Refuses an undesired prompt of which it is not known which rows count."""
        if _is_numbers(prompts):
            if self.end is None:
                raise MisconfigurationException(
                    f"DecorSampling: undesired={self.undesired!r} names token numbers: give `end`, the number that ends"
                    " a text (`tokenizer.eos_token_id`)."
                )
        elif {*self.rows} != {*_KINDS}:
            raise MisconfigurationException(
                f"DecorSampling: which rows of undesired={self.undesired!r} are {' and '.join(self.rows)} is not known,"
                f" since it is no token numbers but a {type(prompts).__name__}. Write rows={list(_KINDS)}, or name"
                " vectors (m, d)."
            )

    def _nulls(self, prompts: Any) -> Tensor | None:  # noqa: ANN401 # the user's
        """Which prompts have no word, ``(B,)``; ``None`` where that cannot be told."""
        if isinstance(prompts, str):
            return torch.tensor([not prompts])
        if isinstance(prompts, list | tuple) and all(isinstance(text, str) for text in prompts):
            return torch.tensor([not text for text in prompts])
        if _is_numbers(prompts) and prompts.dim() == 2 and self.end is not None:
            return ~token_rows(prompts, self.end, self.start)["words"].any(1)
        return None


class _Encoding:
    """The user's encoder while something is removed from what it gives, in the order in which that was asked for."""

    def __init__(self, module: nn.Module, name: str) -> None:
        found = attrgetter(name)(module)
        path = f"{name}.forward" if isinstance(found, nn.Module) else name
        owner, _, method = path.rpartition(".")
        self.module, self.removals = module, list[DecorSampling]()
        self._replaced = host.Replacement(attrgetter(owner)(module) if owner else module, method, self)

    @classmethod
    def of(cls, module: nn.Module, name: str) -> "_Encoding":
        """That of a module, which several callbacks may share."""
        found = attrgetter(name)(module)
        present = found.forward if isinstance(found, nn.Module) else found
        return present if isinstance(present, cls) else cls(module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 # the user's
        encoded = self._replaced.original(*args, **kwargs)
        prompts = next(iter([*args, *kwargs.values()]), None)
        for removal in self.removals:
            encoded = removal.changed(encoded, prompts, self._replaced.original, self.module)
        return encoded

    def leave(self, removal: DecorSampling) -> None:
        """One callback has ended; after the last one the encoder is the user's again."""
        self.removals.remove(removal)
        if not self.removals:
            self._replaced.undo()


def _is_numbers(prompts: Any) -> TypeGuard[Tensor]:  # noqa: ANN401 # the user's
    return isinstance(prompts, Tensor) and not prompts.is_floating_point()


def _token_entry(encoded: Any) -> str:  # noqa: ANN401 # the user's
    """Where the token vectors are in what an encoder gives, as far as that can be told."""
    if isinstance(encoded, Tensor):
        return ""
    return next((name for name in _TOKENS if isinstance(encoded, Mapping) and name in encoded), "0")
