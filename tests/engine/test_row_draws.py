"""Draws that belong to rows: the generator against integers of Python, and what a mask has to be."""

import math

import pytest
import torch

from lightning_reg.engine.host.row_bits import global_rows, keep_mask, normals, uniforms

WORD = 2**64


def splitmix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def by_hand(seed, row, copy, count, p):
    """One row of one copy: 32 bits of a word for each draw, the low ones first."""
    golden, words = 0x9E3779B97F4A7C15, (count + 1) // 2
    key = splitmix((row * golden + seed) % WORD)
    drawn = []
    for draw in range(count):
        word = splitmix((key + golden * (copy * words + draw // 2 + 1)) % WORD)
        bits = (word >> 32 if draw % 2 else word) % 2**32
        signed = bits - 2**32 if bits >= 2**31 else bits
        drawn.append(signed >= round(p * 2**32) - 2**31)
    return drawn


def test_splitmix_gives_the_published_sequence():
    # The first numbers of splitmix64 from state 0, as in the reference implementation of Vigna.
    assert [hex(splitmix(n * 0x9E3779B97F4A7C15 % WORD)) for n in (1, 2)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
    ]


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("seed", [0, 12345678901234567, 2**63 - 1])
def test_masks_are_those_of_the_integers(seed, count):
    rows = torch.tensor([0, 3, 1_000_000])
    mask = keep_mask(seed, rows, range(0, 3, 2), (count,), 0.3)
    expected = [[by_hand(seed, int(row), copy, count, 0.3) for row in rows] for copy in (0, 2)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("seed", [0, 12345678901234567, 2**63 - 1])
def test_numbers_of_rows_are_those_of_the_integers(seed):
    golden, rows = 0x9E3779B97F4A7C15, torch.tensor([0, 3, 1_000_000])
    words = [splitmix((splitmix((int(row) * golden + seed) % WORD) + golden) % WORD) for row in rows]
    assert uniforms(seed, rows).tolist() == [(word >> 40) / 2**24 for word in words]


def test_numbers_of_rows_are_uniform():
    shares = torch.histc(uniforms(3, torch.arange(40_000)), 10, 0, 1) / 40_000
    assert (shares - 0.1).abs().max() < 4 * (0.1 * 0.9 / 40_000) ** 0.5  # four standard deviations


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_of_what_is_dropped(p):
    kept = keep_mask(7, torch.arange(64), range(8), (250,), p).double().mean().item()
    assert kept == pytest.approx(1 - p, abs=4 * (p * (1 - p) / 128_000) ** 0.5)  # four standard deviations
    assert p > 0 or kept == 1


def test_rows_copies_positions_and_seeds_are_independent():
    first, second = (keep_mask(seed, torch.arange(40), range(6), (200,), 0.5) for seed in (1, 2))
    signs = torch.stack([first, second]).double() * 2 - 1
    pairs = {
        "seeds": (signs[0] * signs[1]).mean(),
        "copies": (signs[:, 1:] * signs[:, :-1]).mean(),
        "rows": (signs[:, :, 1:] * signs[:, :, :-1]).mean(),
        "positions": (signs[..., 1:] * signs[..., :-1]).mean(),
        "words": (signs[..., 2:] * signs[..., :-2]).mean(),
    }
    for name, mean in pairs.items():
        assert abs(mean) < 4 / 48_000**0.5, name  # four standard deviations of the smallest mean


def test_shapes_of_no_row_and_of_one_number():
    assert keep_mask(0, torch.arange(0), range(3), (4, 2), 0.5).shape == (3, 0, 4, 2)
    assert keep_mask(0, torch.arange(2), range(3), (), 0.5).shape == (3, 2)


def test_rows_of_one_process_are_counted_from_zero():
    assert global_rows(3, torch.device("cpu")).tolist() == [0, 1, 2]


def on_a_rank():
    return global_rows(3, torch.device("cpu"), torch.distributed.group.WORLD).tolist()


def test_ranks_rows_lie_in_turns(two_processes):
    assert two_processes.run(on_a_rank) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("seed", [0, 12345678901234567])
def test_normal_draws_are_those_of_the_integers(seed):
    golden, rows = 0x9E3779B97F4A7C15, [0, 3, 1_000_000]
    found = normals(seed, torch.tensor(rows), (3,), torch.double)
    for row, drawn in zip(rows, found.tolist(), strict=True):
        wanted = []
        for counter in (1, 2):
            word = splitmix((splitmix((row * golden + seed) % WORD) + counter * golden) % WORD)
            high, low = (word >> 32) / 2**32 + 2**-33, word % 2**32 / 2**32 + 2**-33
            radius = math.sqrt(-2 * math.log(high))
            wanted += [radius * math.cos(2 * math.pi * low), radius * math.sin(2 * math.pi * low)]
        assert drawn == pytest.approx(wanted[:3], rel=1e-12)


def test_normal_draws_are_normal():
    found = normals(1, torch.arange(200), (20, 10))
    assert (found.dtype, found.shape) == (torch.float32, (200, 20, 10))
    moments = [float((found.double() ** power).mean()) for power in (1, 2, 3, 4)]
    # four standard deviations of each mean of 40,000
    for moment, wanted, deviation in zip(moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5), strict=True):
        assert abs(moment - wanted) < 4 * deviation / 200
