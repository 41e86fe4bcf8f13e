"""Prompts put among the tokens of two towers, and a tower of texts that runs on a few texts at a time."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.finetuning.promptsrc._towers import Tower
from lightning_reg.finetuning.promptsrc.core import prompted_tokens

if TYPE_CHECKING:
    from lightning_reg.engine.layers.edits import InputCall, LayerCall

__all__ = ["Prompting"]

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class Prompting:
    """What is changed in which layers of a CLIP.

    Args:
        images: The tower of images.
        texts: The tower of texts.
        depths: In how many layers of each tower there are prompts, by ``"visual"`` and ``"text"``.
        chunk: How many texts run at a time; ``None`` for all.
        prompts: Gives the prompts of a tower ``(depth, n, D)``, for tokens.

    """

    def __init__(
        self,
        images: Tower,
        texts: Tower,
        depths: Mapping[str, int],
        chunk: int | None,
        prompts: Callable[[str, "InputCall | LayerCall"], Tensor],
    ) -> None:
        self._texts, self._chunk, self._prompts = texts, chunk, prompts
        self._inputs: dict[str, tuple[str, Tower, int]] = {}
        self._words: tuple[str, ...] = (texts.before,) if depths["text"] else ()
        if depths["visual"]:
            self._inputs[images.before] = "visual", images, 0
        for kind, tower in (("visual", images), ("text", texts)):
            self._inputs |= {name: (kind, tower, i) for i, name in enumerate(tower.blocks[: depths[kind]]) if i}
        self._chunked: tuple[str, ...] = (texts.inside,) if chunk else ()
        self._left: tuple[Arguments, int] | None = None
        self._seen: set[torch.Size] = set()

    @property
    def given(self) -> list[str]:
        """Layers whose inputs change."""
        return [*self._inputs, *self._chunked]

    @property
    def returning(self) -> list[str]:
        """Layers whose outputs change."""
        return [*self._words, *self._chunked]

    def edit_inputs(self, call: "InputCall") -> Arguments | None:
        """Prompts among tokens; the first texts alone, where they do not run all at once."""
        if call.name in self._chunked:
            return self._first_texts(call)
        kind, tower, layer = self._inputs[call.name]
        prompts = self._prompts(kind, call)[layer]
        if kind == "text":
            return call.with_input(prompted_tokens(call.input, prompts, 1, tower.dim))
        # Before the first layer the tokens come after the rows, in every library.
        start, dim = (-len(prompts), tower.dim) if layer else (None, 1)
        return call.with_input(prompted_tokens(call.input, prompts, start, dim))

    def edit_features(self, call: "LayerCall") -> Any:
        """Prompts in place of words; the outputs of all texts."""
        if call.name in self._chunked:
            return self._of_all_texts(call)
        prompts = self._prompts("text", call)[0]
        self._check(call.input, len(prompts))
        return prompted_tokens(call.output, prompts, 1)

    def _check(self, texts: Tensor, count: int) -> None:
        if texts.shape in self._seen:  # a host sync
            return
        self._seen.add(texts.shape)
        last = int(self._texts.ends(texts).min()) if texts.numel() else count + 1
        if last <= count:
            raise MisconfigurationException(
                f"DeepPrompts: {count} prompts take the place of the {count} words after the first token of a text, and"
                f" the shortest one ends at position {last}. Begin all texts with {count} words to replace, such as"
                ' "a photo of a" for 4.'
            )

    def _first_texts(self, call: "InputCall") -> Arguments | None:
        count = call.input.shape[self._texts.rows]
        self._left = None
        if self._chunk is None or count <= self._chunk:
            return None
        self._left = (call.args, call.named), count
        return self._part(0)

    def _part(self, start: int) -> Arguments:
        """The arguments for some of the texts."""
        if self._left is None or self._chunk is None:
            raise RuntimeError("no texts are left")
        arguments, count = self._left
        stop, rows = min(start + self._chunk, count), self._texts.rows

        def part(value: Any) -> Any:
            # A mask of all texts has two dimensions and stays; one with rows for each has as many for all of them.
            if not isinstance(value, Tensor) or value.dim() < 3 or value.shape[rows] % count:
                return value
            each = value.shape[rows] // count
            return value.narrow(rows, start * each, (stop - start) * each)

        args, named = arguments
        return tuple(map(part, args)), {name: part(value) for name, value in named.items()}

    def _of_all_texts(self, call: "LayerCall") -> Any:
        if self._left is None or self._chunk is None:
            return None
        outputs, forward = [call.output], call.layer.forward  # its own hooks have run, or will
        for start in range(self._chunk, self._left[1], self._chunk):
            args, named = self._part(start)
            if torch.is_grad_enabled():
                outputs.append(checkpoint(forward, *args, use_reentrant=False, **named))
            else:
                outputs.append(forward(*args, **named))
        self._left = None
        return tree_map(self._joined, *outputs)

    def _joined(self, *parts: Any) -> Any:
        return torch.cat(parts, self._texts.rows) if isinstance(parts[0], Tensor) else parts[0]
