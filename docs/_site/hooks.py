"""Hooks of mkdocs: generated pages, links to them, formulas as MathML."""

import re
from collections.abc import Iterator
from typing import Any

import effect_pictures
import results
import text
import units
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from purposes import path_of, paths, title, units_by_folder

_PATHS = paths()
_NAMES = re.compile(rf"(?<!\[)`({'|'.join(_PATHS)})`")
_PAGES_OF_THE_REPOSITORY = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the generated pages into the navigation."""
    folders = units_by_folder()
    by_title: dict[str, Any] = {name: part for entry in config.nav or [] for name, part in entry.items()}
    by_title["Techniques"] += [
        {title(f): [f"techniques/{f}/index.md", *(path_of(f, m) for u in folders[f] for m in u.members())]}
        for f in folders
    ]
    # In the order in which the map links them; one that it does not link comes last.
    links = re.findall(r"\]\((architecture/\w+\.md)\)", (results.ROOT / "docs" / "architecture.md").read_text())
    found = sorted(str(page.relative_to(results.ROOT / "docs")) for page in results.ROOT.glob("docs/architecture/*.md"))
    by_title["Architecture"][1:1] = [*dict.fromkeys([*(link for link in links if link in found), *found])]
    by_title["Functions"] += [{title(folder): f"functions/{folder}.md"} for folder in folders]
    by_title["Measured"] += [f"measured/{path.stem}.md" for path in results.files()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie in no file below ``docs``."""
    for path, content in _generated():
        files.append(File.generated(config, path, content=content))
    for folder in units_by_folder().values():
        for unit in folder:
            for path, picture in effect_pictures.pictures(unit.key).items():
                files.append(File.generated(config, path, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links names of techniques to their pages, and files of the repository where they have one."""
    parts = re.split(r"(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\))", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [_NAMES.sub(lambda found: _link(found[1], page), part) for part in parts[::2]]
    markdown = "".join(parts)
    markdown = re.sub(r"\]\((?:\.\./)+(CONTRIBUTING|CHANGELOG)\.md", r"](/\1.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+benchmarks/results/(\w+)\.(?:md|txt)", r"](/measured/\1.md", markdown)
    return re.sub(
        r"\[`?([^\]`]*)`?\]\((?:\.\./)+(?:benchmarks|lightning_reg|tests|examples|README)[^)]*\)", r"`\1`", markdown
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML."""
    return text.mathml(html)


def _generated() -> Iterator[tuple[str, str]]:
    yield from units.pages()
    for path in results.files():
        yield f"measured/{path.stem}.md", results.page_of(path)
    for name in _PAGES_OF_THE_REPOSITORY:
        yield name, (results.ROOT / name).read_text()


def _link(name: str, page: Page) -> str:
    return f"`{name}`" if page.file.src_uri == _PATHS[name] else f"[`{name}`](/{_PATHS[name]})"
