"""Weights of samples: the cap, and the figures to log."""

import pytest
import torch

from lightning_reg.reweighting.loss_reweighting._weights import cap_weights, weight_statistics


def by_hand(weights, cap):
    """The scale found by bisection, in float64."""
    low, high = 1.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(middle * w, cap) for w in weights) < 1 else (low, middle)
    return [min(low * w, cap) for w in weights]


@pytest.mark.parametrize("max_weight", [1.0, 1.05, 1.5, 2.0, 4.0, 50.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_the_cap_is_that_of_bisection(max_weight, spread):
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(spread * torch.rand(20, generator=generator).round(decimals=1), 0)  # with ties
    capped = cap_weights(weights, max_weight)
    assert capped.tolist() == pytest.approx(by_hand(weights.tolist(), max_weight / 20), rel=1e-4)
    assert capped.sum().item() == pytest.approx(1, abs=1e-5)
    assert capped.max() <= max_weight / 20 * (1 + 1e-6)
    below = capped < max_weight / 20 * (1 - 1e-5)
    if below.sum() > 1:
        ratios = capped[below] / weights[below]
        torch.testing.assert_close(ratios, ratios[0].expand_as(ratios), rtol=1e-5, atol=0.0)


def test_limits():
    weights = torch.tensor([0.7, 0.2, 0.1])
    assert cap_weights(weights, 1.0).tolist() == pytest.approx([1 / 3] * 3)
    assert cap_weights(weights, 3.0).tolist() == pytest.approx(weights.tolist())
    assert cap_weights(torch.tensor([1.0]), 1.0).tolist() == [1.0]
    # Only one of three has a weight at all: there is nobody to share with.
    assert cap_weights(torch.tensor([1.0, 0.0, 0.0]), 1.5).tolist() == pytest.approx([0.5, 0.0, 0.0])
    counted = torch.tensor([True, True, False])
    assert cap_weights(torch.tensor([0.9, 0.1, 0.0]), 1.5, counted).tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert cap_weights(torch.zeros(3), 2.0, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_statistics():
    weights, losses = torch.tensor([0.5, 0.48, 0.02, 0.0]), torch.tensor([1.0, 2.0, 3.0, 9.0])
    counted = torch.tensor([True, True, True, False])
    figures = {name: value.item() for name, value in weight_statistics(weights, losses, counted).items()}
    assert figures == pytest.approx(
        {
            "samples": 3,
            "effective_samples": 1 / (0.25 + 0.2304 + 0.0004),
            "max_weight": 1.5,
            "small_weights": 1 / 3,
            "loss_weighted": 0.5 + 0.96 + 0.06,
            "loss_unweighted": 2.0,
        }
    )
    assert weight_statistics(weights, losses)["small_weights"].item() == pytest.approx(0.5)
