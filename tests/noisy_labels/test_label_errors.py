"""The report of suspected label errors, as it is printed."""

import io

import pytest
import torch
from rich.console import Console

from lightning_reg.noisy_labels.label_errors import LabelErrors


@pytest.mark.parametrize("number", [20, 21])
def test_the_twenty_most_confident_are_printed_and_that_there_are_more(number):
    index = torch.arange(number)
    report = LabelErrors(index + 100, index % 3, index % 3 + 4, 1 - index / 64)
    console = Console(file=io.StringIO(), width=60)
    console.print(report)
    title, _, head, _, *lines, _ = console.file.getvalue().splitlines()
    assert title.strip() == f"{number} suspected label errors"
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in (head, *lines)]
    assert cells[0] == ["index", "given", "suggested", "confidence"]
    assert cells[1:21] == [[str(100 + i), str(i % 3), str(i % 3 + 4), f"{1 - i / 64:.2f}"] for i in range(20)]
    assert cells[21:] == ([["…", "", "", ""]] if number > 20 else [])
