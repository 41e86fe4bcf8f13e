"""DECOR: exact properties of the projection, and words removed from prompts of the digits model."""

from functools import cache

import pytest
import torch

from lightning_reg import AdaptiveGuidance, DecorProjection, Denoiser
from lightning_reg.functional import (
    decor_project,
    embedding_components,
    guided_sample,
    keep_axes,
    token_rows,
    undesired_basis,
)
from tests.conformance.kinds.network import NetworkCase
from tests.diffusion.digits import prompt, scheduler, word_model, words


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASE = NetworkCase(
    make=lambda **options: DecorProjection(**{"undesired": vectors(2, 9), "alpha": 0.6, **options}),
    inputs=(vectors(2, 3, 9, seed=1), torch.tensor([[True, False, True], [True, True, True]])),
    invalid=[
        ({"undesired": torch.zeros(2, 9)}, "undesired"),
        ({"undesired": torch.ones(9), "rank": None}, "undesired"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"rank": 0}, "rank"),
        ({"rank": 3}, "rank"),
        ({"rtol": 1.0}, "rtol"),
    ],
)

UNDESIRED, X = vectors(3, 16).double(), vectors(2, 5, 16, seed=1).double()


def by_pseudo_inverse(x, undesired, alpha):
    """The projection onto the row space, written with the pseudo-inverse: X~^+ X~."""
    return x - alpha * x @ (torch.linalg.pinv(undesired) @ undesired)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_formula(alpha):
    found = DecorProjection(UNDESIRED, alpha)(X)
    torch.testing.assert_close(found, by_pseudo_inverse(X, UNDESIRED, alpha), atol=1e-12, rtol=0)
    assert alpha or torch.equal(found, X)
    assert float(found.norm()) <= float(X.norm())


def test_at_full_strength_nothing_of_it_is_left():
    basis = undesired_basis(UNDESIRED.float())
    once = decor_project(X.float(), basis)
    assert float((once @ UNDESIRED.float().T).abs().max()) < 1e-4
    torch.testing.assert_close(decor_project(once, basis), once, atol=1e-5, rtol=0)
    assert float(decor_project(X, undesired_basis(X.flatten(0, 1))).abs().max()) < 1e-12
    orthogonal = decor_project(X, undesired_basis(UNDESIRED))
    torch.testing.assert_close(decor_project(orthogonal, undesired_basis(UNDESIRED), 0.7), orthogonal)


def test_two_removals_after_one_another():
    twice = DecorProjection(UNDESIRED, 0.4)(DecorProjection(UNDESIRED, 0.7)(X))
    torch.testing.assert_close(twice, DecorProjection(UNDESIRED, 1 - 0.6 * 0.3)(X))


def test_order_size_and_repetition_of_rows_do_not_matter():
    other = torch.cat([2.5 * UNDESIRED.flip(0), UNDESIRED[:1], torch.zeros(1, 16).double()])
    torch.testing.assert_close(decor_project(X, undesired_basis(other)), decor_project(X, undesired_basis(UNDESIRED)))
    assert undesired_basis(other).shape == (16, 3)


def test_rows_outside_the_mask_are_the_same_to_the_last_bit():
    mask = torch.tensor([[True, False, True, False, False], [False] * 5])
    found = DecorProjection(UNDESIRED, 0.5)(X, mask)
    assert torch.equal(found[~mask], X[~mask])
    torch.testing.assert_close(found[mask], by_pseudo_inverse(X, UNDESIRED, 0.5)[mask])


def test_sets_for_each_prompt_and_pooled_vectors():
    sets = torch.stack([UNDESIRED, torch.cat([UNDESIRED[:1], torch.zeros(2, 16)])])
    found = DecorProjection(sets, 1.0)(X)
    for row in range(2):
        torch.testing.assert_close(found[row], by_pseudo_inverse(X[row], sets[row], 1.0), atol=1e-12, rtol=0)
    pooled = DecorProjection(UNDESIRED, 0.5)(X[:, 0])
    torch.testing.assert_close(pooled, by_pseudo_inverse(X[:, 0], UNDESIRED, 0.5))
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(
        decor_project(X, undesired_basis(UNDESIRED, mask=mask)), by_pseudo_inverse(X, UNDESIRED[mask], 1.0)
    )


def test_a_rank_takes_the_leading_directions():
    found = decor_project(X, undesired_basis(UNDESIRED, rank=1))
    leading = torch.linalg.eigh(UNDESIRED.T @ UNDESIRED)[1][:, -1:]
    torch.testing.assert_close(found, X - X @ leading @ leading.T)


def test_what_is_refused_or_told():
    for options, argument in (({"rank": 4}, "rank"), ({"rtol": -1.0}, "rtol")):
        with pytest.raises(ValueError, match=f"undesired_basis: `{argument}`"):
            undesired_basis(UNDESIRED, **options)
    with pytest.raises(ValueError, match="undesired_basis: `undesired`"):
        undesired_basis(torch.zeros(0, 4))
    with pytest.warns(UserWarning, match="DecorProjection: 3 of 4 directions are undesired"):
        DecorProjection(vectors(3, 4))


def test_axes_of_an_embedding():
    rows, is_word = vectors(6, 8).double(), torch.tensor([True, True, False, False, False, True])
    found = embedding_components(rows, is_word)
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    for kind, mask in ((found.words, is_word), (found.padding, ~is_word)):
        energy = [float(((rows[mask] @ axis) ** 2).sum()) for axis in right]
        assert kind.tolist() == pytest.approx([e / float(rows[mask].square().sum()) for e in energy])
    torch.testing.assert_close(keep_axes(rows, slice(2, None)), rows - sizes[0] * left[:, :1] * right[:1]
                               - sizes[1] * left[:, 1:2] * right[1:2])  # fmt: skip
    torch.testing.assert_close(keep_axes(rows, list(range(6))), rows)


# -- digits ------------------------------------------------------------------------------------------------------------


@cache
def encoded(*texts):
    with torch.no_grad():
        return word_model()[1](words(*texts)).last_hidden_state


def undesired(kinds):
    ids, rows = words(prompt(None, inverted=True)), encoded(prompt(None, inverted=True))[0]
    found = token_rows(ids, end=0, start=1)
    if kinds == ["style"]:
        return rows[(ids[0] == 6)]
    return rows[sum(found[kind][0] for kind in kinds).bool()]


def inverted_share(samples):
    """A digit is dark on its margins; an inverted one is bright there."""
    return float((samples[:, 0, :, [0, 7]].mean((1, 2)) > 0).double().mean())


def sampled(condition, guidance=None):
    denoiser = Denoiser(word_model()[0], scheduler("v_prediction"))
    noise = vectors(10, 1, 8, 8)
    policy = guidance or AdaptiveGuidance(2.0, 2.0)
    return guided_sample(denoiser, noise, condition, encoded(""), policy, 10)


def test_the_style_lies_in_the_rows_after_the_words():
    """A causal encoder copies it there: the rows of the word itself may stay. ``token_rows`` says which they are."""
    condition, upright = encoded(prompt(3, inverted=True)), encoded(prompt(3))
    rows = token_rows(words(prompt(3, inverted=True)), end=0, start=1)
    after = (rows["end"] | rows["padding"])[..., None]
    word = (words(prompt(3, inverted=True)) == words("inverted")[0, 1])[..., None]
    shares = [
        inverted_share(sampled(torch.where(taken, upright, condition)).samples)
        for taken in (torch.zeros_like(after), word, after | word)
    ]
    assert shares[0] == shares[1] == 1.0
    assert shares[2] < 0.1


def test_what_is_undesired_is_gone_from_a_prompt_of_the_model():
    rows, condition = undesired(["words", "end", "padding"]), encoded(prompt(3, inverted=True))
    assert float((DecorProjection(rows)(condition) @ rows.T).abs().max()) < 1e-3  # of products around 60


def test_guidance_stops_over_a_projected_condition_as_over_another():
    condition = DecorProjection(undesired(["style"]), 1.0)(encoded(prompt(3, inverted=True)))
    found = sampled(condition, AdaptiveGuidance(2.0, 0.9))
    assert bool((found.calls < 20).any())
    alone = sampled(condition)
    assert float((found.samples - alone.samples).square().mean()) < 0.1
