"""The report of suspected label errors, as it is printed."""

import io

import pytest
import torch
from rich.console import Console

from lightning_reg import ELRCallback, ELRPlusCallback
from lightning_reg.noisy_labels._reports import ReportsLabelErrors
from lightning_reg.noisy_labels.label_errors import LabelErrors, MaskErrors
from tests.toys import QUIET, Classifier, fit

pytestmark = QUIET


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


class Believes(ReportsLabelErrors):
    """Four samples, the last of which was never seen."""

    def _targets_and_labels(self, labels):
        targets = torch.tensor([[0.1, 0.3, 0.0], [0.2, 0.0, 0.2], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
        return targets, torch.tensor([0, 0, 1, -1]) if labels is None else labels


def test_what_is_believed_of_samples_sums_to_one():
    wanted = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(Believes().pred_probs(), wanted)


def test_errors_are_counted_by_class():
    errors = Believes().label_errors()
    assert errors.index.tolist() == [2, 0]
    assert errors.by_class(3).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert Believes().suspected_label_errors(torch.tensor([1, 0, 2, 0])).tolist() == [False] * 4


@pytest.mark.parametrize("cls", [ELRCallback, ELRPlusCallback])
def test_probabilities_of_a_technique_are_its_targets(cls):
    technique = cls(warmup_epochs=0) if cls is ELRCallback else cls(networks=1, mixup_alpha=0.0)
    fit(Classifier(), technique)
    targets = technique._targets_and_labels(None)[0]
    torch.testing.assert_close(technique.pred_probs(), targets / targets.sum(1, keepdim=True))
    assert torch.equal(technique.pred_probs().argmax(1), targets.argmax(1))


def test_replaced_pixels_are_counted_by_image_and_pair_of_classes(tmp_path):
    before = torch.tensor([[0, 1], [1, 255]])
    after = torch.tensor([[0, 0], [0, 255]])
    errors = MaskErrors.between([(0, before, before), (5, before, after), (7, before, after.T + 0)], 3)
    assert list(errors.rows()) == [(5, 1, 0, 2, pytest.approx(2 / 3)), (7, 1, 0, 2, pytest.approx(2 / 3))]
    assert errors.by_class(3).tolist() == [[0, 0, 0], [4, 0, 0], [0, 0, 0]]
    errors.to_csv(tmp_path / "errors.csv")
    assert (tmp_path / "errors.csv").read_text().split() == [
        "index,given,replaced_by,pixels,share",
        "5,1,0,2,0.6667",
        "7,1,0,2,0.6667",
    ]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(MaskErrors.between([(i, before, after) for i in range(21)], 3))
    text = capture.get()
    assert "42 replaced pixels in 21 masks" in text
    assert "66.7%" in text
    assert "…" in text
    assert len(MaskErrors.between([], 3)) == 0
