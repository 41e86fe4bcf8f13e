"""What a user is troubled by, in his words, for each purpose: the folders of the package."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_reg import registry


@dataclass(frozen=True)
class Trouble:
    """A row of the table that README and site have.

    Args:
        words: What is the matter.
        folders: Purposes that help.
        page: The page on it, below ``docs``; "" if there is none.

    """

    words: str
    folders: Sequence[str]
    page: str = ""


# A purpose that is not named here is a row of its own, with the words of its package.
TROUBLES = (
    Trouble("Some labels are wrong, or I want to find those that are", ["noisy_labels"], "how-to/clean-labels.md"),
    Trouble("Little data, the network overfits", ["augmentation", "dropout", "regularization"], "how-to/small-data.md"),
    Trouble(
        "Samples that should not count alike: redundant text, rare values, distances between labels",
        ["reweighting", "metric_learning"],
        "how-to/reweight.md",
    ),
    Trouble("The next task makes it forget the last one", ["continual"], "how-to/tasks.md"),
    Trouble("Many checkpoints, of which I want one good one", ["averaging"], "how-to/average-checkpoints.md"),
    Trouble("The network is too big to run", ["sparsity"], "how-to/sparsify.md"),
    Trouble("A big pretrained network, of which little can be trained", ["finetuning"], "how-to/fine-tune.md"),
    Trouble("An inverse problem: denoise, deblur, reconstruct", ["proximal"], "how-to/inverse-problems.md"),
    Trouble("A trained network knows something that it should forget", ["unlearning"], "how-to/unlearn.md"),
    Trouble("A network that memorises wrong labels before it learns the rule", ["diagnostics"]),
    Trouble("Queries, documents, items: which belong together", ["retrieval"], "how-to/search.md"),
    Trouble("A diffusion model, to be read, guided more cheaply, or probed", ["diffusion"], "how-to/diffusion.md"),
)


def title(folder: str) -> str:
    """A purpose's name as a heading."""
    return folder.replace("_", " ").capitalize()


def summary(folder: str) -> str:
    """What a purpose is, from its package's docstring."""
    return (importlib.import_module(f"lightning_reg.{folder}").__doc__ or "").strip().partition("\n")[0]


def units_by_folder() -> dict[str, list[registry.Unit]]:
    """The units with something to show, by purpose."""
    found: dict[str, list[registry.Unit]] = {}
    for unit in registry.units():
        if unit.members():
            found.setdefault(unit.folder, []).append(unit)
    return found


def rows() -> list[tuple[Trouble, list[registry.Public]]]:
    """Each trouble with what helps; purposes that no trouble names come last."""
    folders = units_by_folder()
    named = {folder for trouble in TROUBLES for folder in trouble.folders}
    rest = [Trouble(summary(folder), [folder]) for folder in folders if folder not in named]
    return [
        (trouble, [member for f in trouble.folders for unit in folders.get(f, ()) for member in unit.members()])
        for trouble in [*TROUBLES, *rest]
    ]


def path_of(folder: str, member: registry.Public) -> str:
    """Where the page of a member stands, below ``docs``; it is made when the site is built."""
    return f"techniques/{folder}/{member.name}.md"


def paths() -> dict[str, str]:
    """The pages that are made when the site is built, by the member's name."""
    folders = units_by_folder()
    return {m.name: path_of(f, m) for f in folders for unit in folders[f] for m in unit.members()}
