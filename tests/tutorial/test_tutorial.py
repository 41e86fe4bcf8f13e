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


@pytest.mark.parametrize("file", ["label_smoothing.py", "test_label_smoothing.py"])
def test_the_page_shows_the_file(file):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    text = (Path(__file__).parent / file).read_text()
    shown = text.replace("tests.tutorial.label_smoothing", "lightning_reg.noisy_labels.label_smoothing")
    assert shown in blocks, f"docs/tutorial.md must show tests/tutorial/{file} as it is"
