"""What the techniques on search say of embeddings that have no gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import (
    ContrastiveDistillation,
    FocalContrastive,
    GatheredNegatives,
    GradCache,
    HardNegativeMixing,
    IDFFlops,
)
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import QUIET, Classifier, fit, same_weights

pytestmark = QUIET


class Sentences(nn.Module):
    """Calls and encodes as sentence-transformers 6 does; older ones encode under ``torch.no_grad``."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Linear(6, 3)

    def forward(self, features):
        return {"sentence_embedding": self.words(features["input"])}

    @torch.inference_mode()
    def encode(self, x):
        return self({"input": x})["sentence_embedding"]

    def encode_before(self, x):
        with torch.no_grad():
            return self({"input": x})["sentence_embedding"]

    def embed(self, x):
        return self({"input": x})["sentence_embedding"]


class Search(Classifier):
    def __init__(self, by="embed", of="both", learned=True, frozen=False):
        super().__init__(lr=0.1)
        self.model, self.by, self.of = Sentences().requires_grad_(not frozen), by, of
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=learned)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        by = getattr(self.model, self.by)
        q, d = (by if self.of == "both" else self.model.embed)(x), by(x + 0.1)
        return F.cross_entropy(F.normalize(q) @ F.normalize(d).T * self.scale.exp(), torch.arange(len(x)))


TEMPERATURE = torch.tensor(-2.0).exp().item()
WATCHING = {
    "mixing": partial(HardNegativeMixing, "model", TEMPERATURE),
    "gathering": partial(GatheredNegatives, "model"),
    "one teacher": partial(ContrastiveDistillation, "model", "0", "0"),
    "sparse": partial(IDFFlops, "model.words", weight=1.0),
}


def trained(technique, **options):
    module = Search(**options)
    fit(module, *([] if technique is None else [technique]), max_steps=1)
    return module


@pytest.mark.parametrize("by", ["encode", "encode_before"])
@pytest.mark.parametrize("way", ["mixing", "gathering", "one teacher", "sparse"])
def test_an_encoder_that_nothing_would_train_is_told(way, by):
    technique = WATCHING[way]()
    said = rf"^{type(technique).__name__}: The embeddings that 'model(\.words)?' gave in this step have no gradient, so"
    said += r" the loss would not train .* `model\(features\)\[.sentence_embedding.\]`\.$"
    with pytest.raises(MisconfigurationException, match=said):
        trained(technique, by=by)


def test_embeddings_with_gradient_and_those_of_a_layer_that_rests_are_taken():
    for way in ("mixing", "gathering"):
        assert not same_weights(trained(WATCHING[way]()).model, Sentences(), atol=1e-4)
        assert same_weights(trained(WATCHING[way](), by="encode_before", frozen=True).model, Sentences())
    one = trained(WATCHING["mixing"](), by="encode_before", of="documents")  # constant, and the queries learn
    assert not same_weights(one.model, Sentences(), atol=1e-4)


@pytest.mark.parametrize("technique", [FocalContrastive(), WATCHING["mixing"](), WATCHING["gathering"]()])
@pytest.mark.parametrize("by", ["encode", "encode_before"])
def test_a_loss_without_gradient_is_told_before_torch_says_it_of_element_0(technique, by):
    said = (
        r"the loss that `training_step` at test_embeddings.py:\d+ returned has no gradient, so it would train nothing"
    )
    said += r".*`encode` of sentence-transformers does\. Call the model itself, as in `model\(features\)\["
    with pytest.raises(MisconfigurationException, match=f"^{type(technique).__name__}: {said}"):
        trained(technique, by=by, learned=False)


def test_grad_cache_says_it_of_its_layer():
    said = r"'model' was not called with gradient.*; `encode` of sentence-transformers runs without gradient: call the"
    with pytest.raises(MisconfigurationException, match=said):
        trained(GradCache("model", 4), by="encode")
