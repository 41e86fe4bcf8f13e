"""The tutorial's technique keeps every law, and the page shows the files that are tested."""

import re
from pathlib import Path

import pytest

from tests.conformance.laws import LAWS, NEED_TWO_PROCESSES
from tests.tutorial.test_label_smoothing import CASE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.mark.parametrize("law", LAWS)
def test_law(law, request):
    LAWS[law](CASE, *([request.getfixturevalue("two_processes")] if law in NEED_TWO_PROCESSES else []))


def as_shown(text):
    """A file as it reads in the package, where its imports stand in another order."""
    own = ("from lightning_reg.", "from tests.")
    lines = text.replace("tests.tutorial.label_smoothing", "lightning_reg.noisy_labels.label_smoothing").splitlines()
    imports = iter(sorted(line for line in lines if line.startswith(own)))
    return "".join(f"{next(imports) if line.startswith(own) else line}\n" for line in lines)


@pytest.mark.parametrize(
    "file",
    [
        "label_smoothing/__init__.py",
        "label_smoothing/core.py",
        "label_smoothing/label_smoothing.py",
        "test_label_smoothing.py",
    ],
)
def test_the_page_shows_the_file(file):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    shown = as_shown((Path(__file__).parent / file).read_text())
    assert shown in blocks, f"docs/tutorial.md must show tests/tutorial/{file} as it is"
