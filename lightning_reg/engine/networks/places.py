"""Where a network keeps its parameters and buffers, so that others stand there for the time of a pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_reg.engine.host.modules import own_buffers, own_parameters

__all__ = ["Places"]


class Places:
    """The places of one network's tensors, found once: ``functional_call`` looks for them in every pass.

    Args:
        module: The network; it gets no further layers.

    """

    def __init__(self, module: nn.Module) -> None:
        self._by_name: dict[str, list[tuple[dict[str, Tensor | None], str]]] = {}
        first_names: dict[int, str] = {}  # a tensor in several places has the name of the first, as in named_parameters
        for path, layer in module.named_modules():
            for own in (own_parameters(layer), own_buffers(layer)):
                for key, tensor in own.items():
                    if tensor is not None:
                        name = first_names.setdefault(id(tensor), f"{path}.{key}" if path else key)
                        self._by_name.setdefault(name, []).append((own, key))  # type: ignore[arg-type]  # others stand there

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """What stands there now, by the names of the module."""
        for name, (place, *_) in self._by_name.items():
            tensor = place[0][place[1]]
            if tensor is not None:
                yield name, tensor

    @contextmanager
    def taken_by(self, others: Mapping[str, Tensor]) -> Iterator[None]:
        """Others stand in these places, a tensor of several places in all of them.

        Args:
            others: By the names of the module.

        """
        places = [(*place, tensor) for name, tensor in others.items() for place in self._by_name[name]]
        before = [own[key] for own, key, _ in places]
        try:
            for own, key, tensor in places:
                own[key] = tensor
            yield
        finally:
            for (own, key, _), had in zip(places, before, strict=True):
                own[key] = had
