"""Hooks of mkdocs: generated pages, figures from results, formulas as MathML."""

import re
from collections.abc import Iterator
from typing import Any

import results
import text
import units
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from purposes import rows, title, units_by_folder

from lightning_reg import registry

_PAGES_OF_THE_REPOSITORY = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the generated pages into the navigation."""
    folders = units_by_folder()
    by_title: dict[str, Any] = {name: part for entry in config.nav or [] for name, part in entry.items()}
    by_title["Techniques"] += [
        {title(f): [f"techniques/{f}/index.md", *(units.path_of(u, m) for u in folders[f] for m in u.members())]}
        for f in folders
    ]
    by_title["Functions"] += [{title(folder): f"functions/{folder}.md"} for folder in folders]
    by_title["Measured"] += [f"measured/{path.stem}.md" for path in results.files()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie in no file below ``docs``."""
    for path, content in _generated():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in figures, ``{{ file | section | row | column }}``, and what the registry knows, ``{{ troubles }}``."""
    markdown = re.sub(r"\{\{ *troubles *\}\}", lambda _: _troubles(), markdown)
    markdown = re.sub(r"\{\{ *table: ([^|}]*?) *(?:\| *(.*?) *)?\}\}", _table, markdown)
    markdown = re.sub(r"\{\{ *([^|{}]*?) *\| *([^|{}]*?) *\| *([^|{}]*?) *\| *([^|{}]*?) *\}\}", _cell, markdown)
    # Files of the repository outside of `docs` have no page here, but for these.
    markdown = re.sub(r"\]\((?:\.\./)+(CONTRIBUTING|CHANGELOG)\.md", r"](/\1.md", markdown)
    return re.sub(
        r"\[`?([^\]`]*)`?\]\((?:\.\./)+(?:benchmarks|lightning_reg|tests|examples|README)[^)]*\)", r"`\1`", markdown
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas, and tables that a phone can push sideways."""
    return text.mathml(html)


def _generated() -> Iterator[tuple[str, str]]:
    yield from units.pages()
    for path in results.files():
        yield f"measured/{path.stem}.md", results.page_of(path)
    for name in _PAGES_OF_THE_REPOSITORY:
        yield name, (results.ROOT / name).read_text()


def _troubles() -> str:
    lines = ["| trouble | what helps |", "|---|---|"]
    paths = {m.name: units.path_of(u, m) for group in units_by_folder().values() for u in group for m in u.members()}
    for trouble, members in rows():
        words = f"[{trouble.words}]({trouble.page})" if trouble.page else trouble.words
        names = [f"[{member.name}]({paths[member.name]})" for member in members if _helps(member)]
        lines.append(f"| {words} | {', '.join(names)} |")
    return "\n".join(lines)


def _helps(member: registry.Public) -> bool:
    return member.kind not in ("metric",)


def _cell(found: re.Match[str]) -> str:
    return results.cell(found[1], found[2], found[3], found[4])


def _table(found: re.Match[str]) -> str:
    tables = results.tables(found[1])
    words = found[2] or ""
    return results.markdown_table(next(rows for before, rows in tables if words in " ".join(before.split())))
