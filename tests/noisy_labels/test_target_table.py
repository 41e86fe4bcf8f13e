"""The table of targets that ELR and ELR+ keep: rows of samples that occur twice, labels that are written later."""

import pytest
import torch

from lightning_reg.engine.step import Samples
from lightning_reg.noisy_labels import _target_table
from lightning_reg.noisy_labels._target_table import TargetTable

PROBABILITIES = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])


def samples(*indices: int, distinct: bool = False) -> Samples:
    return Samples(torch.tensor(indices), distinct, len(indices), 5)


def test_both_rows_of_a_sample_that_occurs_twice_are_those_of_its_last_prediction():
    table = TargetTable("Test", None, None, "float32")
    rows = table.update(samples(1, 3, 3), PROBABILITIES, torch.tensor([1, 0, 1]), beta=0.75)
    torch.testing.assert_close(rows, torch.tensor([[0.05, 0.2], [0.225, 0.025], [0.225, 0.025]]))
    targets, labels = table.all()
    torch.testing.assert_close(targets[3], torch.tensor([0.225, 0.025]))
    assert labels.tolist() == [-1, 1, -1, 1, -1]  # of both labels the last


def test_ignored_samples_leave_their_rows_and_labels_as_they_are():
    table = TargetTable("Test", None, None, "float32")
    mass = torch.tensor([1.0, 0.0, 1.0])
    table.update(samples(0, 1, 2, distinct=True), PROBABILITIES, torch.tensor([0, 1, 2]), 0.5, mass)
    targets, labels = table.all()
    assert targets[1].tolist() == [0.0, 0.0]
    assert labels.tolist() == [0, -1, 2, -1, -1]


@pytest.mark.parametrize("batches", [1, 3])
def test_labels_are_the_same_however_many_batches_are_written_at_once(monkeypatch, batches):
    monkeypatch.setattr(_target_table, "_BATCHES_AT_ONCE", batches)
    table = TargetTable("Test", None, None, "float32")
    for step in range(4):
        indices = samples(step, (step + 2) % 5, (step + 4) % 5, distinct=True)
        table.update(indices, PROBABILITIES, torch.tensor([step, 10 + step, 20 + step]), 0.5)
    saved = table.state_dict()["labels"]["values"][:, 0]
    assert saved.tolist() == table.all()[1].tolist() == [13, 22, 23, 3, 12]
