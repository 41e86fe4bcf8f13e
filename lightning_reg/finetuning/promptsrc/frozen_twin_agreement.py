"""Agreement with the frozen twin: features and logits stay near those of the network as it was."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_reg.engine.host.arguments import check_bool, check_choice, check_number
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.procedures import left_as_found
from lightning_reg.engine.host.user_functions import user_function
from lightning_reg.engine.networks.references import PLACES, Reference, ReferenceTechnique
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.finetuning.promptsrc.core import class_template_mean, feature_l1, logit_agreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.engine.loss.call import LossCall
    from lightning_reg.engine.run.phases import Member
    from lightning_reg.engine.step import Step

__all__ = ["FrozenTwinAgreement"]


class FrozenTwinAgreement(ReferenceTechnique, LossTechnique):
    r"""Keeps what a network says of its batches near what it said before it was trained.

    .. math:: \sum_k \lambda_k \frac{1}{n_k D_k} \lVert \hat f_k - \hat f^0_k \rVert_1
        + \frac{\mu}{B C} \sum_b \operatorname{KL}\bigl(\operatorname{softmax}(l^0_b)
        \,\Vert\, \operatorname{softmax}(l_b)\bigr)

    over layers k, of images (``n_k`` = B) or of names (``n_k`` = C), with the network's first weights in
    :math:`f^0` and :math:`l^0`::

        agreement = FrozenTwinAgreement({"clip.visual_projection": 10.0, "clip.text_projection": 25.0})

    Classes and domains that the few labelled samples do not show keep much of their accuracy. Use it to adapt a
    pretrained network, a CLIP above all, to few samples. Leave it where the new domain is so far from the old one that
    the first features are wrong targets. With ``DeepPrompts`` the twin is the network without prompts; together with
    ``SoupAverager(method="gaussian")`` the three are PromptSRC.

    Source:
        Khattak, Wasim et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", ICCV 2023,
        arXiv 2307.06948; code: muzairkhattak/PromptSRC.

    Differs:
        Nothing of the mathematics: the divergence is that of the authors' code, from the frozen distribution, divided
        by B C. The frozen tower sees the batch in float32 or the Trainer's precision, where theirs is in float16.

    Memory: the module's parameters and buffers once more (see ``reference``), and a forward pass of the first network
    per step. Of a text tower that is named in ``templates`` itself, no pass.

    Args:
        features: Layers whose outputs are compared, named as in ``named_modules()``, each with its weight, at least 0.
            The last dimension of an output is that of the features. Paper, for 512 of them: 10 for images and 25 for
            names; for D features times :math:`\sqrt{D / 512}`. open_clip has a layer for texts in its
            ``CustomTextCLIP`` (``force_custom_text=True``); else let them pass an ``nn.Identity`` of yours.
        logit_weight: mu, at least 0. Paper: 1. The logits are those of the loss call.
        logit_reduction: What the divergence is divided by: ``"numel"``, B C (authors' code), or ``"batchmean"``, B.
        normalize: Whether features are brought to length 1 first, as in the paper.
        templates: By layer of texts, what gives the features that the twin has there in place of its own: a method of
            the module, or an import path of a function that gets the module. It returns ``(N, C, D)``, or gives
            ``(C, D)`` for one phrasing after the other, as the tower makes them; asked once, before the first step,
            in evaluation mode. Their mean over the N phrasings counts, for features and logits (paper: 60 phrasings).
        reference: Where the first weights lie: ``"device"``, ``"cpu"`` (copied there in each step), ``"bfloat16"``
            (half the bytes, rounded) or ``"cpu_bfloat16"``.
        loss: Which loss call has the logits, if there are several: position, ``"last"``, function name, or
            ``"model.py:42"``. With ``logit_weight=0`` no loss call is needed.
        name: Tells several instances in one Trainer apart.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> agreement = FrozenTwinAgreement({"encoder": 10.0}, logit_weight=1.0)
        >>> trainer = Trainer(max_epochs=20, callbacks=[agreement], logger=False, enable_checkpointing=False)

    """

    without_prompts = True

    takes_mixed = True  # features of a mixed sample are compared; logits are a conflict

    def __init__(
        self,
        features: dict[str, float],
        logit_weight: float = 1.0,
        logit_reduction: Literal["numel", "batchmean"] = "numel",
        normalize: bool = True,
        templates: dict[str, str] | None = None,
        reference: str = "device",
        loss: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(loss=loss, name=name)
        if not isinstance(features, dict):
            raise ValueError(
                f"FrozenTwinAgreement: `features` must be names of layers with a weight each, got {features!r}."
            )
        for weight in features.values():
            check_number(self, "features", weight, low=0)
        check_number(self, "logit_weight", logit_weight, low=0)
        check_choice(self, "logit_reduction", logit_reduction, ("numel", "batchmean"))
        check_bool(self, "normalize", normalize)
        check_choice(self, "reference", reference, PLACES)
        for layer in templates or {}:
            if layer not in features:
                raise ValueError(
                    f"FrozenTwinAgreement: `templates` must name layers of `features`, {sorted(features)}, got"
                    f" {layer!r}."
                )
        self.features, self.logit_weight, self.logit_reduction = features, logit_weight, logit_reduction
        self.normalize, self.templates, self.reference = normalize, templates, reference
        self._of_features = Reference([layer for layer, weight in features.items() if weight], reference)
        self._of_call = Reference((), reference)

    @override
    def describe(self) -> str:
        if not self.references:
            return "all weights 0: inactive"
        parts = [f"{layer} {weight:g}" for layer, weight in self.features.items() if weight]
        parts += [f"logits {self.logit_weight:g}"] if self.logit_weight else []
        means = f", means over phrasings at {', '.join(self.templates)}" if self.templates else ""
        return f"{', '.join(parts)}{means}; {self.references[0].describe()}"

    @override
    def conflict_with(self, other: "Member") -> str | None:
        if other.mixes == "none" or not self.logit_weight:
            return None
        return (
            "what the frozen network says of a mixed sample is no word about one class, and the logits would be held to"
            " it. Write `logit_weight=0`: features of mixed samples can be compared."
        )

    @override
    def check(self, trainer: "Trainer", module: "LightningModule") -> None:
        super().check(trainer, module)
        for function in (self.templates or {}).values():
            user_function(function, trainer, module, "FrozenTwinAgreement(templates=...)")

    @override
    def is_active(self, step: "Step") -> bool:
        return bool(self.references)

    @property
    @override
    def feature_layers(self) -> "Sequence[str]":
        return self._of_features.layers

    @property
    @override
    def references(self) -> "Sequence[Reference]":
        asked = [self._of_features] if self._of_features.layers else []
        return [*asked, self._of_call] if self.logit_weight else asked

    @override
    def observe_batch(self, step: "Step") -> None:
        for layer, function in (self.templates or {}).items():
            if layer not in self._of_features.outputs:
                self._of_features.outputs[layer] = self._mean_of_phrasings(step, function)
        self._of_call.outputs = self._of_features.outputs
        super().observe_batch(step)

    @override
    def loss_term(self, call: "LossCall") -> Tensor | None:
        term = self._distance(call.step)
        if not self.logit_weight:
            return term
        seen = self.sight(call.step, self._of_call).call
        if seen is None:
            raise MisconfigurationException(
                "FrozenTwinAgreement: on a copy of the module `training_step` called no loss with a gradient, so the"
                " frozen network's logits are not known. Let it call the same loss, or write `logit_weight=0`."
            )
        found = [logit_agreement(copy.logits, seen.logits, self.logit_reduction) for copy in call.copies()]
        divergence = torch.stack(found).mean()
        if call.step.is_logging:
            call.step.log(self, "logits", divergence)
        return term + self.logit_weight * divergence

    @override
    def term_of_step(self, step: "Step") -> Tensor:
        if self.logit_weight:
            raise MisconfigurationException(
                "FrozenTwinAgreement compares the logits of a loss call of torch, and `training_step` makes none that"
                " can be seen. Write `logit_weight=0`, or compute the loss with `torch.nn.functional.cross_entropy`."
            )
        return self._distance(step)

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = next((r for r in self.references if r.weights is not None), self._of_call)
        outputs = {layer: rows.clone() for layer, rows in self._of_features.outputs.items()}
        return {"reference": kept.state_dict(), "templates": outputs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for reference in (self._of_features, self._of_call):
            reference.load_state_dict(state_dict["reference"])
        self._of_features.outputs = dict(state_dict["templates"])

    def _distance(self, step: "Step") -> Tensor:
        term = torch.zeros((), device=step.module.device)
        if not self._of_features.layers:
            return term
        frozen = self.sight(step, self._of_features).features
        for layer in self._of_features.layers:
            theirs = frozen.get(layer)
            term = term + self.features[layer] * feature_l1(*self._pair(step, layer, theirs), self.normalize)
        if step.is_logging:
            step.log(self, "features", term)
        return term

    def _pair(self, step: "Step", layer: str, theirs: object) -> tuple[Tensor, Tensor]:
        # Names have as many rows in every pass; where a pass has views or copies, images of the batch's own rows count.
        own = [step.features.get(layer), *step.passes.get(layer, ())[-1:]]
        shapes = [tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__ for rows in (*own[:1], theirs)]
        for rows in own:
            if isinstance(rows, Tensor) and isinstance(theirs, Tensor) and rows.shape == theirs.shape:
                return rows, theirs
        frozen = (
            f"{shapes[1]} for the mean over phrasings" if layer in (self.templates or {}) else f"{shapes[1]} before"
        )
        raise MisconfigurationException(
            f"FrozenTwinAgreement: layer {layer!r} puts out {shapes[0]}, and {frozen}. Name a layer that puts out one"
            " tensor, with the same rows in both."
        )

    def _mean_of_phrasings(self, step: "Step", name: str) -> Tensor:
        module = step.module
        function = user_function(name, step.trainer, module, "FrozenTwinAgreement(templates=...)")
        with left_as_found(module), torch.no_grad():
            module.eval()
            found = function(module) if "." in name else function()
            rows = found if isinstance(found, Tensor) else torch.stack(list(found))
        if rows.dim() != 3:
            raise MisconfigurationException(
                f"FrozenTwinAgreement: {name!r} must give features (N, C, D) of N phrasings, found {tuple(rows.shape)}."
            )
        return class_template_mean(rows).detach()
