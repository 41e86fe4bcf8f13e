"""What is generated within pages that git keeps: ``python docs/_site/generated.py`` rewrites it.

A place is ``<!-- table: file; words above it -->...<!-- end -->``, ``<!-- cell: file; words; row; column -->``, or one
of the lists below. A test tells when one is stale, so that every figure on a page is that of the results.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from purposes import rows, summary, title, units_by_folder
from results import ROOT, cell, markdown_table, tables

from lightning_reg import registry

_PLACE = re.compile(r"<!-- (table|cell|troubles|measured|techniques)(?:: (.*?))? -->.*?<!-- end -->", re.DOTALL)


def pages() -> Iterator[Path]:
    """Pages with something generated in them."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if _PLACE.search(page.read_text()):
            yield page


def render(page: Path) -> str:
    """The text of a page as it should be."""
    up = "docs/" if page.parent == ROOT else ""
    lists: dict[str, Callable[[], str]] = {
        "troubles": lambda: _troubles(up),
        "measured": _measured,
        "techniques": _techniques,
        "table": lambda: "",
    }

    def filled(found: re.Match[str]) -> str:
        kind, words = found[1], [word.strip() for word in (found[2] or "").split(";")]
        opening = found[0].partition("-->")[0] + "-->"
        if kind == "cell":
            return f"{opening}{cell(*words)}<!-- end -->"
        text = _table(*words) if kind == "table" else lists[kind]()
        return f"{opening}\n\n{text}\n\n<!-- end -->"

    return _PLACE.sub(filled, page.read_text())


def _table(name: str, words: str = "") -> str:
    return markdown_table(next(rows for before, rows in tables(name) if words in " ".join(before.split())))


def _troubles(up: str) -> str:
    """A row for each trouble: its page, how much helps, by name."""
    lines = [["trouble", "what helps", "how many"]]
    for trouble, members in rows():
        kinds = Counter((member.kind or "").replace("_", " ") for member in members)
        names = [f"`{member.name}`" for member in members if member.kind == "technique" or not up]
        more = ", ..." if up and len(names) > 4 else ""
        words = f"[{trouble.words}]({up}{trouble.page})" if trouble.page else trouble.words
        counts = ", ".join(_counted(kind, kinds[kind]) for kind in sorted(kinds, key=lambda kind: kind != "technique"))
        lines.append([words, ", ".join(names[:4] if up else names) + more, counts])
    columns = 3 if up else 2
    return "\n".join(f"| {' | '.join(line[:columns])} |" for line in [lines[0], ["---"] * 3, *lines[1:]])


def _counted(kind: str, number: int) -> str:
    return f"{number} {kind}{'' if number == 1 else 'es' if kind.endswith('s') else 's'}"


def _measured() -> str:
    """Three rows for README, a null effect among them."""
    digits, cutmix, text = "noisy_labels_digits.txt", "effects_cutmix.md", "reweighting.txt"
    last, gpt = "Test accuracy, last", "byte-level GPT"
    gain = cell(cutmix, "Difference to", "CutMix(prob=1)", "test accuracy").partition(":")[0]
    lines = [
        ("what", "plain", "with it"),
        ("---", "---", "---"),
        (
            "`ELRCallback`: digits, 40 % of the labels redrawn, accuracy at the end, 3 seeds, ± sd (`make demo`)",
            cell(digits, "", last, "plain"),
            cell(digits, "", last, "with"),
        ),
        (
            "`CutMix`: 4,000 images of CIFAR-10, small network, accuracy in %, 3 seeds, ± 95 % interval",
            cell(cutmix, "", "plain", "test accuracy"),
            f"{cell(cutmix, '', 'CutMix(prob=1)', 'test accuracy')} ({gain} seed by seed)",
        ),
        (
            "`LossReweighting`: byte-level GPT on plain text, validation loss, 3 seeds, ± sd: no gain",
            cell(text, gpt, "text", "uniform"),
            f"{cell(text, gpt, 'text', 'linupper')} ({cell(text, gpt, 'text', 'difference')})",
        ),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _techniques() -> str:
    """All that there is, by purpose, and what it needs of a module."""
    from units import needs  # which asks the tests for the cases

    lines = list[str]()
    for folder, units in units_by_folder().items():
        lines += [f"## {title(folder)}", "", summary(folder), "", "| name | what it does | needs |", "|---|---|---|"]
        lines += [
            f"| `{member.name}` | {_plain(registry.summary(member.value))} | {needs(member)} |"
            for unit in units
            for member in unit.members()
        ]
        lines += [""]
    return "\n".join(lines).rstrip()


def _plain(words: str) -> str:
    from text import markdown

    return markdown(words)


if __name__ == "__main__":
    for page in pages():
        page.write_text(render(page))
