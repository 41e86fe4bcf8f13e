"""The pages: their links lead somewhere, and the files that they name are there."""

import functools
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from lightning_reg import registry
from tests.structure import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = {
    path.name for folder in ("lightning_reg", "tests", "examples", "docs") for path in (ROOT / folder).rglob("*.py")
}
WITHOUT_A_PICTURE = {"Denoiser"}  # nothing was measured of it: it gives networks of others one form
INVENTED = {"model.py", "_part.py"}  # a file of the user's, and one of any unit
WORDS = {"docs/architecture.md": 1150}  # of the other pages on the engine 750

sys.path.insert(0, str(ROOT / "docs" / "_site"))
try:
    import effect_pictures
    import generated
    import results
    import units
finally:
    sys.path.pop(0)

UNITS = [unit for group in units.units_by_folder().values() for unit in group]
STUDENT = {3: 4.302653, 4: 3.182446, 5: 2.776445, 8: 2.364624}  # t(0.975) for so many seeds


@functools.cache
def made():
    return dict(units.pages())


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


@pytest.mark.parametrize("page", list(generated.pages()), ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_and_lists_on_pages_are_fresh(page):
    assert page.read_text() == generated.render(page), "run `make docs`"


def test_every_page_is_in_the_navigation_of_the_site():
    """Those on the rooms are put in by the site's hook, in the order in which the map links them."""
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    assert {page for page in pages if not page.startswith(("architecture/", "_site/"))} == named - {
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    }
    linked = re.findall(r"\]\((architecture/\w+\.md)\)", (ROOT / "docs" / "architecture.md").read_text())
    assert {page for page in pages if page.startswith("architecture/")} == {*linked}


def test_figures_are_found_by_words_and_not_by_place():
    assert results.cell("effects_cutmix.md", "Difference to", "CutMix(prob=1)", "test loss") == "-0.336 ± 0.038"
    assert results.cell("step_costs.txt", "ewc: transformer", "engine / by hand", "median") == "0.9805"
    for words in (("no such words", "plain", "1"), ("", "no such row", "1"), ("", "plain", "no such column")):
        with pytest.raises(LookupError):
            results.cell("effects_cutmix.md", *words)


def test_every_technique_has_a_page_with_all_sections():
    pages = made()
    for unit in UNITS:
        for member in unit.members():
            page = pages[f"techniques/{unit.folder}/{member.name}.md"]
            sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
            assert {"Source", "Where it differs from its source", "Arguments and methods"} <= set(sections), member.name
            if member.kind == "technique":
                assert {"What it does", "What it needs of your module", "What it goes with"} <= set(sections), (
                    member.name
                )
            assert not re.search(r"^(Memory|Cost): ", page, re.MULTILINE) or "What it costs" in sections


def test_every_technique_was_tried_on_the_models_that_people_have():
    tried = re.findall(r"^\| (\w+) \|", (ROOT / "benchmarks/results/models.md").read_text(), re.MULTILINE)[1:]
    everybody = {cls.__name__ for unit in registry.units() for cls in unit.techniques()}
    assert {*tried} == everybody, "run `python benchmarks/models.py --save benchmarks/results/models.md`"


def test_every_page_of_a_technique_shows_a_picture_that_is_there():
    drawn = {p for unit in UNITS for p in effect_pictures.paths(unit.key)}
    pages = made()
    without = set()
    for unit in UNITS:
        for member in unit.members():
            shown = re.findall(r"\]\(\.\./\.\./(assets/[^)]*)\)", pages[f"techniques/{unit.folder}/{member.name}.md"])
            assert all(path in drawn or (ROOT / "docs" / path).exists() for path in shown), member.name
            without |= {member.name} - ({member.name} if shown else set())
    assert without == WITHOUT_A_PICTURE


def test_pictures_show_the_seeds_their_mean_and_what_was_said_of_the_difference():
    """Read anew from the lines of the seeds, whose figures are rounded to three digits."""
    drawn = 0
    for unit in UNITS:
        for measure, rows in effect_pictures.measures(unit.key).items():
            first = rows[0].seeds
            for row in rows if first else ():
                spread = np.std(row.seeds, ddof=1) / len(row.seeds) ** 0.5
                assert row.mean == pytest.approx(np.mean(row.seeds), abs=1.1e-3), (measure, row)
                assert row.half == pytest.approx(STUDENT[len(row.seeds)] * spread, abs=5e-3), (measure, row)
                drawn += 1
            for row in rows[1:] if first else ():
                difference = np.subtract(row.seeds, first)
                half = STUDENT[len(difference)] * np.std(difference, ddof=1) / len(difference) ** 0.5
                if abs(abs(np.mean(difference)) - half) > 5e-3:
                    assert row.differs is bool(abs(np.mean(difference)) > half), (measure, row)
    assert drawn > 500


def test_a_picture_of_an_effect_tells_arms_apart_without_colour():
    row = functools.partial(effect_pictures.Row, half=0.5, seeds=[1.0, 2.0])
    rows = [row("plain", 1.5, differs=None), row("with", 2.5, differs=True), row("a third", 1.6, differs=False)]
    picture = effect_pictures.draw("accuracy (%)", rows).decode()
    assert picture == effect_pictures.draw("accuracy (%)", rows).decode()  # no date, no random name
    root = ElementTree.fromstring(picture)
    assert float(root.get("width").removesuffix("pt")) * 4 / 3 <= 340  # of the 358 that a phone has for text
    assert "stroke-dasharray" in picture
    assert [picture.count(f"<!-- {words} -->") for words in ("plain", "with", "a third", "accuracy (%)")] == [1] * 4
    assert picture.count("fill: #ffffff; stroke: #1f4e8c") == 1  # the open mark of the third


def test_arguments_that_people_had_to_guess_are_explained():
    guessed = {"loss", "index_key", "input_key", "layer", "head", "views", "augment", "monitor", "dataloader", "name"}
    assert guessed <= anchors(ROOT / "docs" / "arguments.md")
    assert "](docs/arguments.md)" in (ROOT / "README.md").read_text()
