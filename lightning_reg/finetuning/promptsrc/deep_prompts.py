"""Deep prompts: trained tokens in both towers of a frozen CLIP."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.edits import LayerEdit, LayerEdits
from lightning_reg.engine.layers.named import named_layers
from lightning_reg.engine.run.phases import Member, phases_of
from lightning_reg.engine.technique import LayerTechnique, ModuleTechnique
from lightning_reg.finetuning.promptsrc._prompting import Prompting
from lightning_reg.finetuning.promptsrc._towers import find_towers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule

    from lightning_reg.engine.layers.edits import InputCall, LayerCall
    from lightning_reg.engine.step import Stage, Step

__all__ = ["DeepPrompts"]


class DeepPrompts(ModuleTechnique, LayerTechnique):
    r"""Trains tokens of its own in both towers of a CLIP, which stays as it is.

    In each of the first layers of a tower, n tokens are parameters: of images they are appended to the patches, of
    texts they take the place of the n words after the first token, so that "a photo of a cat" becomes
    :math:`v_1 v_2 v_3 v_4` "cat". In the next layer they are replaced by that layer's own::

        prompts = DeepPrompts("clip", text_init=[320, 1125, 539, 320])  # "a photo of a" of CLIP's tokenizer
        trainer = Trainer(callbacks=[prompts, FrozenTwinAgreement(...)])
        trainer.fit(model, few_shots)
        with prompts.used_in(clip):
            features = clip.encode_text(tokens_of_other_classes)

    The module is one that computes its loss with a CLIP of open_clip or transformers; freeze that by
    ``clip.requires_grad_(False)`` (under DDP leave one parameter, such as its logit scale). Texts must begin with n
    words that may be replaced. Prompts know no class: the same ones serve any list of names. They act in training with
    gradients recorded, in validation, test and prediction; in the module's own ``no_grad`` in training the CLIP is as
    it was.

    Use it for few labelled images, with ``FrozenTwinAgreement`` where classes without any must stay good. Leave it
    where there are many: training the towers is better then.

    Source:
        Khattak, Wasim et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", ICCV 2023,
        arXiv 2307.06948 (independent vision-language prompts); code: muzairkhattak/PromptSRC.

    Differs:
        Prompts are float32 whatever the CLIP is, where the authors' are float16. Theirs are in a copy of CLIP's code,
        and their files hold the names' embeddings as well; these are tokens alone.

    Memory: the towers' activations, as when they were trained; of texts those of two chunks, with ``class_chunk``, and
    a second forward pass of the tower of texts.

    Args:
        clip: Name of the CLIP as in ``named_modules()``; "" where the module itself is one.
        visual: Prompts for images in each layer, at least 0. Paper: 4. Neutral: 0.
        text: Prompts for texts in each layer, at least 0. Paper: 4. Neutral: 0.
        visual_depth: Layers of the tower of images that have them, at least 1. Paper: 9, across data sets 3.
        text_depth: Layers of the tower of texts, at least 1. Paper: as ``visual_depth``.
        text_init: Numbers of the words that the first layer's prompts for texts begin as, ``text`` of them. Paper: "a
            photo of a". ``None``: drawn.
        init_std: Standard deviation of what is drawn, at least 0. Paper: 0.02.
        class_chunk: How many texts run through their tower at a time, at least 1; others are computed again in the
            backward pass. ``None``: all at once.
        lr_factor: Learning rate of the prompts, as a multiple of that of the optimizer's first group, at least 0.
        weight_decay: Their weight decay, at least 0.
        own_optimizer: Position of the optimizer that trains them, if there are several.
        name: Tells several instances in one Trainer apart.
        seed: Seed of the first prompts.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> prompts = DeepPrompts("clip", visual=4, text=4, visual_depth=3, text_depth=3)
        >>> trainer = Trainer(max_epochs=20, callbacks=[prompts], logger=False, enable_checkpointing=False)

    """

    in_any_mode: ClassVar[bool] = True  # a frozen CLIP is in evaluation mode, as from_pretrained gives it
    stages: "frozenset[Stage]" = frozenset({"train", "validate", "test", "predict"})

    def __init__(
        self,
        clip: str = "clip",
        visual: int = 4,
        text: int = 4,
        visual_depth: int = 9,
        text_depth: int = 9,
        text_init: list[int] | None = None,
        init_std: float = 0.02,
        class_chunk: int | None = None,
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
        own_optimizer: int | None = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, seed=seed)
        least = {"visual": 0, "text": 0, "visual_depth": 1, "text_depth": 1, "class_chunk": 1}
        given = (visual, text, visual_depth, text_depth, class_chunk)
        for (argument, low), value in zip(least.items(), given, strict=True):
            check_number(self, argument, value, low=low, integer=True, optional=True)
        check_number(self, "init_std", init_std, low=0)
        self.train_own(lr_factor, weight_decay, own_optimizer)
        if text_init is not None and len(text_init) != text:
            raise ValueError(
                f"DeepPrompts: `text_init` must have a word for each of {text} prompts, got {text_init!r}."
            )
        for word in text_init or ():
            check_number(self, "text_init", word, low=0, integer=True)
        self.clip, self.visual, self.text, self.text_init = clip, visual, text, text_init
        self.visual_depth, self.text_depth, self.init_std = visual_depth, text_depth, init_std
        self.class_chunk, self.lr_factor, self.weight_decay = class_chunk, lr_factor, weight_decay
        self._prompting: Prompting | None = None

    @override
    def describe(self) -> str:
        if not self.visual and not self.text:
            return "no prompts: inactive"
        counts = {"images": (self.visual, self.visual_depth), "texts": (self.text, self.text_depth)}
        parts = [f"{n} for {what} in {depth} layers" for what, (n, depth) in counts.items() if n]
        chunk = f"; {self.class_chunk} texts at a time" if self.class_chunk else ""
        return f"prompts in {self.clip or 'the module'}: {', '.join(parts)}{chunk}"

    @override
    def conflict_with(self, other: Member) -> str | None:
        if (self.visual or self.text) and {"map_weights", "edit_weights"} & {*phases_of(other)}:
            return (
                f"prompts are trained for a CLIP that stays as it is, and {type(other).__name__} trains or changes its"
                " weights. Remove one of them."
            )
        if not isinstance(other, DeepPrompts) or self.clip != other.clip:
            return None
        if not (self.visual and other.visual) and not (self.text and other.text):
            return None
        return (
            "each puts its prompts into the same tower of one CLIP, where the second takes the place of the first. One"
            " of them with more prompts does what two would do."
        )

    @override
    def is_active(self, step: "Step") -> bool:
        return self.visual > 0 or self.text > 0

    @override
    def own_modules(self, module: "LightningModule") -> Mapping[str, nn.Module]:
        return self._new_prompts(module, self.clip)

    def _new_prompts(self, module: nn.Module, clip: str) -> dict[str, nn.Module]:
        made: dict[str, nn.Module] = {}
        for kind, tower in zip(("visual", "text"), find_towers(module, clip, "DeepPrompts"), strict=True):
            count, depth = getattr(self, kind), getattr(self, f"{kind}_depth")
            if not count:
                continue
            if depth > len(tower.blocks):
                raise MisconfigurationException(
                    f"DeepPrompts({kind}_depth={depth}): the tower {tower.inside!r} has {len(tower.blocks)} layers."
                )
            generator = torch.Generator().manual_seed(self.derived_seed(f"{kind} prompts"))
            first = self.init_std * torch.randn(depth, count, tower.width, generator=generator)
            if kind == "text" and self.text_init is not None:
                words: Any = named_layers(module)[tower.before].weight
                first[0] = words.detach()[self.text_init].float()
            made[kind] = nn.Module()
            made[kind].prompts = nn.Parameter(first)
        return made

    @override
    def inputs_to_edit(self, module: nn.Module) -> "Sequence[str]":
        return self._made(module).given

    @override
    def edit_inputs(self, call: "InputCall") -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        return self._made(call.step.module).edit_inputs(call)

    def _noted(self, call: "InputCall | LayerCall", kind: str, prompts: Tensor) -> Tensor:
        if call.step.stage == "train" and not call.again and call.step.is_logging:
            call.step.log(self, f"{kind}_length", prompts.detach().norm(dim=-1).mean())
        return prompts

    @override
    def features_to_edit(self, module: nn.Module) -> "Sequence[str]":
        return self._made(module).returning

    @override
    def edit_features(self, call: "LayerCall") -> Any:
        return self._made(call.step.module).edit_features(call)

    @override
    def teardown(self, trainer: Any, pl_module: "LightningModule", stage: str) -> None:
        self._prompting = None  # of another module the towers may be others

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prompting": None}

    @contextmanager
    def used_in(self, clip: nn.Module) -> Iterator[None]:
        """A CLIP runs with the prompts, without a Trainer, in any mode and on any texts.

        Args:
            clip: One with towers as the prompts were trained in.

        """
        prompting = self._of(clip, "")
        edits = [
            LayerEdit(self, prompting.given, prompting.edit_inputs, of_inputs=True, in_any_mode=True),
            LayerEdit(self, prompting.returning, prompting.edit_features, in_any_mode=True),
        ]
        layers = LayerEdits(clip, edits, training=False)
        try:
            layers.open(cast("Step", SimpleNamespace(active=[self], stage="predict", module=clip)))
            yield
        finally:
            layers.close()

    def _made(self, module: nn.Module) -> Prompting:
        if self._prompting is None:
            self._prompting = self._of(module, self.clip)
        return self._prompting

    def _of(self, module: nn.Module, clip: str) -> Prompting:
        depths = {"visual": self.visual_depth if self.visual else 0, "text": self.text_depth if self.text else 0}
        images, texts = find_towers(module, clip, "DeepPrompts")
        if any(depth > len(tower.blocks) for depth, tower in zip(depths.values(), (images, texts), strict=True)):
            self._new_prompts(module, clip)  # says so
        chunk = self.class_chunk if self.visual or self.text else None

        def prompts(kind: str, call: "InputCall | LayerCall") -> Tensor:
            return self._noted(call, kind, self._prompts(kind, call.step.module, clip))

        return Prompting(images, texts, depths, chunk, prompts)

    def _prompts(self, kind: str, module: nn.Module, clip: str) -> Tensor:
        new, device = partial(self._new_prompts, module, clip), next(module.parameters()).device
        trained = self.own.trained(kind, new, device, "DeepPrompts", "there are no trained prompts")
        return trained.get_parameter("prompts")
