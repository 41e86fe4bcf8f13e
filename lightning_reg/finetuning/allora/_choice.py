"""Which weights get factors, and how they lie."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.weights.factors import Layout
from lightning_reg.engine.weights.places import layouts_of, places_of
from lightning_reg.engine.weights.swap import named_weights
from lightning_reg.finetuning._choice import check_plain
from lightning_reg.finetuning.allora._peft_files import read_peft

__all__ = ["layouts_for", "starting_factors"]


def layouts_for(owner: object, module: nn.Module, names: Sequence[str]) -> tuple[dict[str, Layout], set[str]]:
    """How weights lie as matrices, and which of them are tables of embeddings.

    Args:
        owner: Who asks; its class is named in messages.
        module: The user's module.
        names: Names of the weights.

    Returns:
        Both, by name; a weight that no known layer multiplies by counts as ``(out, in)``, or as a stack of such.

    Raises:
        MisconfigurationException: If a weight is quantised.

    """
    weights, known, places = named_weights(module), layouts_of(module), places_of(module)
    check_plain(owner, module, names)
    layouts = {name: known.get(name, Layout(stacked=weights[name].dim() > 2)) for name in names}
    return layouts, {name for name in names if all(isinstance(p.layer, nn.Embedding) for p in places[name])}


def starting_factors(
    owner: object, folder: str, weights: Mapping[str, Tensor], factor: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of an adapter of PEFT's.

    Args:
        owner: Who asks; its class is named in messages.
        folder: The adapter's.
        weights: Those that are trained, by name; the adapter's names are an ending of these.
        factor: What the product of both will be multiplied by.

    Returns:
        B and A of each weight that the adapter has.

    Raises:
        MisconfigurationException: If a layer of it is not trained here.

    """
    found = {}
    for layer, (left, right, their) in read_peft(folder)[0].items():
        names = [name for name in weights if f".{name}".endswith(f".{layer}.weight")]
        if len(names) != 1:
            raise MisconfigurationException(
                f"{type(owner).__name__}(start={folder!r}): the adapter has factors of {layer!r}, and"
                f" {'no weight' if not names else 'more than one weight'} of such a name is trained here. Choose its"
                " layers: `from_peft` does."
            )
        found[names[0]] = (left if their == factor else left * (their / factor), right)
    return found
