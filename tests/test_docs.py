"""The pages: their links lead somewhere, and the files that they name are there."""

import re

import pytest

from tests.structure import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = {path.name for folder in ("lightning_reg", "tests", "examples") for path in (ROOT / folder).rglob("*.py")}
INVENTED = {"model.py", "_part.py"}  # a file of the user's, and one of any unit
WORDS = {"docs/architecture.md": 1150}  # of the other pages on the engine 750


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^):]*)\)", page.read_text())
    for place, _, anchor in (link.partition("#") for link in links):
        target = page.parent / place if place else page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), f"{place}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = {name for code in re.findall(r"`([^`\n]+)`", page.read_text()) for name in re.findall(r"\w+\.py\b", code)}
    assert sorted(name for name in named if name not in FILES | INVENTED) == []


@pytest.mark.parametrize("page", [p for p in PAGES if "architecture" in str(p)], ids=lambda page: page.name)
def test_a_page_on_the_engine_is_read_in_minutes(page):
    words = [word for word in page.read_text().split() if re.search(r"\w", word)]
    assert len(words) <= WORDS.get(str(page.relative_to(ROOT)), 750)
