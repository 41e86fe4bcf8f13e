"""DECOR: exact properties of the projection, and words removed from prompts of the digits model."""

from functools import cache, partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg import AdaptiveGuidance, DecorProjection, DecorSampling, Denoiser, GuidedPredict
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.host.row_bits import normals
from lightning_reg.functional import (
    decor_condition,
    decor_project,
    embedding_components,
    guided_sample,
    keep_axes,
    token_rows,
    undesired_basis,
    undesired_rows,
)
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.kinds.network import NetworkCase
from tests.diffusion.digits import prompt, scheduler, style_model, styled_words, word_model, words
from tests.diffusion.test_diffusion_classifier import PROBLEM
from tests.toys import QUIET, make_trainer

pytestmark = QUIET


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


sampling = partial(DecorSampling, "net.body.weight", "net.act_body", 0.5, rank=2)


class ByHand(Hand):
    """In validation the output of a layer loses half of what lies along two axes of a weight."""

    def begin_evaluation(self, weights):
        undesired = weights["net.body.weight"].double()
        axes = torch.linalg.eigh(undesired.T @ undesired)[1][:, -2:]  # of the largest eigenvalues
        self.projector = axes @ axes.T

    def edit_evaluation(self, name, rows):
        return (rows - 0.5 * rows.double() @ self.projector).to(rows) if name == "net.act_body" else rows


CASE = (
    NetworkCase(
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
            ({"widths": [4, 4]}, "widths"),
            ({"widths": [9, 0]}, "widths"),
        ],
    ),
    Case(
        make=sampling,
        neutral=partial(DecorSampling, "net.body.weight", "net.act_body", 0.0),
        by_hand=ByHand,
        data=PROBLEM,
        says=(
            "net.act_body without 0.5 of net.body.weight (words), in validate, test, predict",
            "no strength or no mode: inactive",
        ),
        invalid=[
            ({"alpha": -0.1}, "alpha"),
            ({"alpha": 1.1}, "alpha"),
            ({"rows": []}, "rows"),
            ({"rows": ["style"]}, "rows"),
            ({"end": -1}, "end"),
            ({"start": -1}, "start"),
            ({"rank": 0}, "rank"),
            ({"widths": [0, 8]}, "widths"),
            ({"modes": ["train"]}, "modes"),
        ],
    ),
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


def test_two_concepts_are_removed_together_or_one_after_another():
    """At once nothing is left of either; in turn a part of the first one comes back, unless they are orthogonal."""
    one, two = UNDESIRED[:1], UNDESIRED[1:]
    together = DecorProjection(UNDESIRED)(X)
    assert float((together @ UNDESIRED.T).abs().max()) < 1e-12
    in_turn = DecorProjection(two)(DecorProjection(one)(X))
    assert float((in_turn @ two.T).abs().max()) < 1e-12 < 1e-3 < float((in_turn @ one.T).abs().max())
    apart = two - two @ one.T @ one / one.square().sum()  # of the second, what is orthogonal to the first
    in_turn = DecorProjection(apart, 0.5)(DecorProjection(one, 0.5)(X))
    torch.testing.assert_close(in_turn, DecorProjection(UNDESIRED, 0.5)(X))


def test_two_text_encoders_side_by_side_have_directions_of_their_own():
    two = UNDESIRED[:2]
    found = DecorProjection(two, 0.5, widths=[6, 10])(X)
    parts = [by_pseudo_inverse(X[..., part], two[:, part], 0.5) for part in (slice(6), slice(6, None))]
    torch.testing.assert_close(found, torch.cat(parts, -1), atol=1e-12, rtol=0)
    assert DecorProjection(UNDESIRED, widths=[16], rank=2).basis.shape == (16, 2)
    sets = undesired_basis(torch.stack([two, two.flip(1)]), widths=[6, 10])
    torch.testing.assert_close(decor_project(X[:1], sets[:1], 0.5), found[:1])
    with pytest.raises(ValueError, match=r"^undesired_basis: `widths` must be at least 1 and sum to 16, .* \[8, 9\]"):
        undesired_basis(UNDESIRED, widths=[8, 9])


def test_a_condition_with_a_pooled_vector():
    tokens, pooled = DecorProjection(UNDESIRED, 0.5), DecorProjection(vectors(1, 4, seed=3).double(), 1.0)
    given = {"encoder_hidden_states": X, "pooled_projections": vectors(2, 4, seed=4).double(), "other": X}
    mask = torch.tensor([[True, True, False, False, True]] * 2)
    found = decor_condition(given, tokens, pooled, mask)
    assert torch.equal(found["encoder_hidden_states"], tokens(X, mask))
    assert torch.equal(found["pooled_projections"], pooled(given["pooled_projections"]))
    assert found["other"] is X is given["encoder_hidden_states"]
    left = decor_condition({"encoder_hidden_states": X, "text_embeds": X[:, 0]}, tokens)
    assert torch.equal(left["text_embeds"], X[:, 0])
    assert torch.equal(decor_condition(X, tokens), tokens(X))
    with pytest.raises(ValueError, match=r"^decor_condition: `pooled` must be None"):
        decor_condition(X, tokens, pooled)
    for odd in (None, X[0], {"class_labels": X}):
        with pytest.raises(ValueError, match=r"^decor_condition: `condition` must have token vectors"):
            decor_condition(odd, tokens)


def test_vectors_of_half_precision_are_projected_in_single():
    wanted = DecorProjection(UNDESIRED.float())(X.float())
    found = DecorProjection(UNDESIRED.bfloat16())(X.bfloat16())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DecorProjection(UNDESIRED.float())(X.float()), wanted)


def test_rows_of_an_undesired_prompt():
    ids, rows = torch.tensor([[7, 3, 4, 0, 0], [7, 5, 0, 0, 0]]), vectors(2, 5, 4)
    assert torch.equal(undesired_rows(rows, ids, 0, 7), rows[[0, 0, 1], [1, 2, 1]])
    assert torch.equal(undesired_rows(rows, ids, 0, 7, ["end"]), rows[[0, 1], [3, 2]])
    assert torch.equal(undesired_rows(rows[:1], ids[:1], 0, 7, ["words", "padding"]), rows[0, [1, 2, 4]])
    for kinds in ([], ["padding"]):
        with pytest.raises(ValueError, match=r"^undesired_rows: `kinds` must be of those that the prompts have"):
            undesired_rows(rows[:1, :4], ids[:1, :4], 0, 7, kinds)


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


@pytest.mark.parametrize(
    ("kinds", "alpha", "left"),
    [
        (None, 0.0, 1.0),
        (("end", "padding"), 1.0, 1.0),
        (("words",), 0.75, 0.0),
        (("words", "end", "padding"), 0.75, 0.0),
    ],
)
def test_a_style_is_gone_from_what_is_drawn_where_its_absence_has_a_word(kinds, alpha, left):
    """Of five styles, "plain" among them; removing the rows after the word alone leaves it."""
    network, encoder = style_model()
    ids = styled_words("a photo of d3 inverted", "a photo of digit inverted", "")
    with torch.no_grad():
        condition, reference, null = encoder(ids).last_hidden_state.split(1)
    rows = undesired_rows(reference, ids[1:2], 0, 1, kinds or ("words",))
    denoiser, policy = Denoiser(network, scheduler("v_prediction")), AdaptiveGuidance(2.0, 2.0)
    given = DecorProjection(rows, alpha)(condition)
    found = guided_sample(denoiser, vectors(10, 1, 8, 8), given, null, policy, 5).samples
    assert inverted_share(found) == pytest.approx(left, abs=0.05)


def test_guidance_stops_over_a_projected_condition_as_over_another():
    condition = DecorProjection(undesired(["style"]), 1.0)(encoded(prompt(3, inverted=True)))
    found = sampled(condition, AdaptiveGuidance(2.0, 0.9))
    assert bool((found.calls < 20).any())
    alone = sampled(condition)
    assert float((found.samples - alone.samples).square().mean()) < 0.1


# -- in a Trainer ------------------------------------------------------------------------------------------------------


class Drawing(GuidedPredict, LightningModule):
    """Samples for prompts; ``given`` keeps what its encoder gave."""

    sampling_steps = 5

    def __init__(self, policy=None):
        super().__init__()
        self.unet, self.text = word_model()
        self.policy, self.given = policy or AdaptiveGuidance(2.0, 2.0), []
        self.unwanted, self.vectors = words(prompt(None, inverted=True)), undesired(["style"])
        self.layer = nn.Linear(1, 1)

    def encode_prompt(self, ids):
        made = self.text(ids)
        self.given.append((made.last_hidden_state, made.pooler_output))
        return self.given[-1]

    def condition_of(self, batch):
        return self.encode_prompt(batch)[0]

    def null_condition(self):
        return self.encode_prompt(words(""))[0]

    def guided_denoiser(self):
        return Denoiser(self.unet, scheduler("v_prediction"))

    def guidance(self):
        return self.policy

    def sample_shape(self):
        return (1, 8, 8)

    def validation_step(self, batch, batch_idx):
        self.seen = self.encode_prompt(batch)

    test_step = validation_step


PROMPTS = words(prompt(3, inverted=True), "", prompt(5, inverted=True))
decor = partial(DecorSampling, undesired="unwanted", end=0, start=1, alpha=0.5)


def loader():
    return DataLoader(PROMPTS, batch_size=3)


def test_prompts_are_encoded_without_it_and_the_null_prompt_as_ever():
    module = Drawing()
    before = vars(module).copy().keys()
    clean = decor(rows=["words", "end", "padding"], pooled_entry="1")
    (logged,) = make_trainer(callbacks=[clean]).validate(module, loader(), verbose=False)
    with torch.no_grad():
        made, unwanted = (module.text(ids) for ids in (PROMPTS, module.unwanted))
    tokens = by_pseudo_inverse(made.last_hidden_state.double(), unwanted.last_hidden_state[0, 1:].double(), 0.5)
    pooled = by_pseudo_inverse(made.pooler_output.double(), unwanted.pooler_output.double(), 0.5)
    for row in (0, 2):
        torch.testing.assert_close(module.seen[0][row], tokens[row].float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(module.seen[1][row], pooled[row].float(), atol=1e-4, rtol=1e-4)
    change = (made.last_hidden_state - tokens)[[0, 2]].square().sum() / made.last_hidden_state.square().sum()
    assert logged["reg/decor_sampling/removed"] == pytest.approx(float(change), rel=1e-3)
    assert torch.equal(module.seen[0][1], made.last_hidden_state[1])
    assert torch.equal(module.seen[1][1], made.pooler_output[1])
    assert "encode_prompt" not in vars(module)
    assert vars(module).keys() - before <= {"seen", "_trainer", "_hparams"}


def test_a_network_strings_vectors_and_the_modes():
    module = Drawing()
    make_trainer(callbacks=[decor(encode="text", modes=["test"])]).test(module, loader(), verbose=False)
    basis = undesired_basis(undesired(["words"]))
    torch.testing.assert_close(module.seen[0][0], decor_project(encoded(prompt(3, inverted=True)), basis, 0.5)[0])
    assert "forward" not in vars(module.text)
    make_trainer(callbacks=[decor(modes=["test"])]).validate(module, loader(), verbose=False)
    torch.testing.assert_close(module.seen[0][:1], encoded(prompt(3, inverted=True)))
    module.encode_prompt = lambda texts: {"encoder_hidden_states": encoded(*texts)}
    both = [decor(undesired="vectors"), decor(undesired="texts", rows=["words", "end", "padding"], name="b", rank=2)]
    module.texts = [prompt(None, inverted=True)]
    make_trainer(callbacks=both).validate(
        module, DataLoader([prompt(3, inverted=True), ""], batch_size=2), verbose=False
    )
    first, second = undesired_basis(module.vectors), undesired_basis(encoded(*module.texts)[0], rank=2)
    wanted = decor_project(decor_project(encoded(prompt(3, inverted=True)), first, 0.5), second, 0.5)
    torch.testing.assert_close(module.seen["encoder_hidden_states"][:1], wanted)
    torch.testing.assert_close(module.seen["encoder_hidden_states"][1:], encoded(""))


def test_adaptive_guidance_samples_over_it_in_predictions():
    """As over a condition that is projected by hand; rows stop on their own."""
    module = Drawing(AdaptiveGuidance(2.0, 0.9))
    (found,) = make_trainer(callbacks=[decor()]).predict(module, DataLoader(PROMPTS[[0, 2]], batch_size=2))
    condition = DecorProjection(undesired(["words"]), 0.5)(encoded(prompt(3, inverted=True), prompt(5, inverted=True)))
    noise = normals(0, torch.arange(2), (1, 8, 8))
    wanted = guided_sample(module.guided_denoiser(), noise, condition, encoded(""), module.policy, 5)
    torch.testing.assert_close(found.samples, wanted.samples, atol=1e-4, rtol=1e-4)
    assert found.calls.tolist() == wanted.calls.tolist()
    assert "encode_prompt" not in vars(module)


def test_what_a_run_is_told():
    def run(**options):
        module = Drawing()
        module.numbers = words("inverted")
        module.texts = "inverted"
        try:
            make_trainer(callbacks=[decor(**options)]).validate(module, loader(), verbose=False)
        finally:
            assert "encode_prompt" not in vars(module)

    for options, message in (
        ({"encode": "encode_prompts"}, "encode='encode_prompts' names nothing in Drawing"),
        ({"end": None}, "undesired='unwanted' names token numbers: give `end`"),
        ({"undesired": "texts", "encode": "text"}, "which rows of undesired='texts' are words is not known"),
        ({"undesired": "vectors", "pooled_entry": "1"}, "must name a prompt that `encode` takes"),
    ):
        with pytest.raises(MisconfigurationException, match=f"^DecorSampling: .*{message}"):
            run(**options)
    with pytest.warns(UserWarning, match=r"^DecorSampling: nothing was removed, since 'guidance' was not called"):
        run(encode="guidance")
