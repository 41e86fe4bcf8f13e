"""Each procedure with each of the models for tests: it works or is refused as the table of the page says."""

import re
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_reg import (
    AdaptiveGuidance,
    AttentionMaps,
    DecorProjection,
    Denoiser,
    DenoiserFeatures,
    DiffusionClassifier,
    NullTextInversion,
)
from lightning_reg.functional import (
    classify_images,
    conditions_failed,
    failure_report,
    guided_sample,
    latent_search,
    null_text_invert,
    null_text_sample,
    prompt_search,
    prompt_to_prompt,
    random_failures,
    region_size,
    sample_support,
    token_search,
)
from tests.diffusion.digits import (
    class_model,
    flow_condition,
    flow_model,
    flow_scheduler,
    held_out,
    prompt,
    scheduler,
    word_model,
)
from tests.structure import ROOT
from tests.toys import QUIET, make_trainer

pytestmark = QUIET

PAGE = (ROOT / "docs" / "architecture" / "diffusion_edits.md").read_text()
X = held_out()[0][:2]
NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def conditions(kind, *digits):
    """The condition of digits; of none, what stands for no condition."""
    if kind == "class-conditional UNet":
        return torch.tensor(digits or [10])
    both = flow_condition(*map(prompt, digits)) if digits else flow_condition("")
    return both["encoder_hidden_states"] if kind == "word-conditioned UNet" else both


def denoiser(kind):
    if kind == "class-conditional UNet":
        return Denoiser(class_model(), scheduler())
    if kind == "word-conditioned UNet":
        return Denoiser(word_model()[0], scheduler("v_prediction"))
    return Denoiser(flow_model(), flow_scheduler())


def attention_maps(kind):
    is_label = kind == "class-conditional UNet"
    with torch.no_grad(), AttentionMaps(denoiser(kind), kind="self" if is_label else "cross") as maps:
        wanted = denoiser(kind).predict(X, torch.tensor(500), conditions(kind, 3, 5)).output
        found = maps.grid(8, 8)
    assert found.shape == (2, 16 if is_label else 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(denoiser(kind).predict(X, torch.tensor(500), conditions(kind, 3, 5)).output, wanted)


def classified(kind):
    judge = DiffusionClassifier(denoiser(kind), conditions(kind, *range(10)), n_samples=[4], keep=[1])
    return classify_images(judge, X).probabilities


def guided(kind):
    return guided_sample(
        denoiser(kind), NOISE, conditions(kind, 3, 5), conditions(kind), AdaptiveGuidance(2.0, 2.0), 3
    ).samples


def inverted(kind):
    options = {"guidance": 2.0, "steps": 2, "inner_steps": 1}
    return null_text_invert(denoiser(kind), X, conditions(kind, 3, 5), conditions(kind), **options)


def edited(kind):
    if kind == "class-conditional UNet":  # labels cannot be inverted: by hand
        pivots, rows = torch.stack([NOISE, NOISE, X], 1), torch.zeros(2, 2)
        found = NullTextInversion(pivots, conditions(kind).expand(2, 2), X, rows, rows, 2.0)
        assert null_text_sample(denoiser(kind), found, conditions(kind, 3, 5)).shape == X.shape
    else:
        found = inverted(kind)
    return prompt_to_prompt(denoiser(kind), found, conditions(kind, 3, 5), conditions(kind, 4, 6)).samples


def projected(kind):
    condition = conditions(kind, 3)
    states = condition["encoder_hidden_states"] if isinstance(condition, dict) else condition
    made = DecorProjection(states[0, 4:5] if states.is_floating_point() else states)(states)
    one = {**condition, "encoder_hidden_states": made} if isinstance(condition, dict) else made
    with torch.no_grad():
        return denoiser(kind).sample(NOISE, one, conditions(kind), 2.0, 2)


def supported(kind):
    is_word = torch.tensor([[False] * 4 + [True] + [False] * 3])
    return sample_support(denoiser(kind), NOISE, conditions(kind, 3), conditions(kind), is_word, 2.0, 2).maps


def featured(kind):
    layers = "transformer_blocks.1.ff" if kind == "flow transformer" else "mid_block"
    found = DenoiserFeatures(denoiser(kind), layers, 100, conditions(kind))(X)
    assert found.shape == (2, 4, 4, 64)
    return found


def judge(samples):
    """Class scores of two classes, by the pixels' sign."""
    return torch.stack([samples.flatten(1).mean(1), -samples.flatten(1).mean(1)], 1)


LABELS, FAST = torch.tensor([0, 1]), {"sampler_steps": 2}


def searched(kind, search, **options):
    return search(denoiser(kind), NOISE, conditions(kind, 3, 5), LABELS, [judge], **FAST, **options)


def others_failed(kind):
    return conditions_failed(denoiser(kind), NOISE, conditions(kind, 3, 5), LABELS, [judge], **FAST)


def reported(kind):
    ends = (NOISE, -NOISE, conditions(kind, 3, 5), LABELS)
    return failure_report(denoiser(kind), *ends, [judge], **FAST).scores


def token(kind):
    return token_search(denoiser(kind), NOISE, conditions(kind, 3, 5), 0, [judge], iterations=1, **FAST).token


def prompts(kind):
    embedding = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))

    def encode(embedded):
        if kind == "class-conditional UNet":
            return embedded.argmax(-1)[:, 0] % 10
        is_flow = kind == "flow transformer"
        return {**conditions(kind), "encoder_hidden_states": embedded} if is_flow else embedded

    ids = torch.arange(8)
    return prompt_search(denoiser(kind), NOISE, ids, [4], 0, [judge], encode, embedding, [8], **FAST).values


RUNS = {
    "AttentionMaps": attention_maps,
    "classify_images": classified,
    "guided_sample": guided,
    "null_text_invert": lambda kind: inverted(kind).current,
    "prompt_to_prompt": edited,
    "DecorProjection": projected,
    "sample_support": supported,
    "DenoiserFeatures": featured,
    "latent_search": lambda kind: searched(kind, latent_search, iterations=1).noise,
    "random_failures": lambda kind: searched(kind, random_failures),
    "region_size": lambda kind: searched(kind, region_size, draws=2),
    "conditions_failed": others_failed,
    "failure_report": reported,
    "token_search": token,
    "prompt_search": prompts,
}


def rows():
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    head, *body = ([cell.strip() for cell in line] for line in lines)
    for name, *cells in body:
        for kind, cell in zip(head[1:], cells, strict=True):
            yield pytest.param(name.strip("`"), kind, cell, id=f"{name.strip('`')}-{kind.partition(' ')[0]}")


def test_the_table_has_every_procedure():
    assert {param.values[0] for param in rows()} == set(RUNS)


@pytest.mark.parametrize(("name", "kind", "cell"), list(rows()))
def test_it_works_or_is_refused_as_the_page_says(name, kind, cell):
    run = partial(RUNS[name], kind)
    if cell.startswith("refused: "):
        with pytest.raises(ValueError, match=re.escape(cell.removeprefix("refused: "))):
            run()
    else:
        assert cell.startswith("works")
        made = run()
        assert made is None or bool(made.isfinite().all())


class Predicting(LightningModule):
    """A user's module with one line in its step."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def predict_step(self, batch, batch_idx):
        return RUNS[self.name]("word-conditioned UNet")  # its conditions and embeddings are made here


@pytest.mark.parametrize("name", sorted({*RUNS} - {"AttentionMaps"}))
def test_in_a_step_of_a_trainer_it_gives_the_same(name):
    """Lightning's steps of prediction are in inference mode, as those of validation are."""
    module, loader = Predicting(name), DataLoader(torch.zeros(1, 1))
    (predicted,) = make_trainer().predict(module, loader)
    wanted = RUNS[name]("word-conditioned UNet")
    torch.testing.assert_close(predicted, wanted, atol=1e-5, rtol=1e-5)
