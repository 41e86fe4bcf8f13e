"""Losses that a Hugging Face model computes inside its own ``forward``."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset

from lightning_reg import ELRCallback
from lightning_reg.engine.technique import LossTechnique
from lightning_reg.functional import elr_update_targets
from tests.toys import QUIET, fit

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Sentences(Dataset):
    """Batches with the model's own argument names."""

    def __init__(self, labels):
        generator = torch.Generator().manual_seed(4)
        self.tokens, self.labels = torch.randint(20, (len(labels), 7), generator=generator), labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


class Model(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def training_step(self, batch, batch_idx):
        output = self.net(**batch)
        self.seen.append(output.logits.detach())
        return output.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class PerSequence(LossTechnique):
    """Notes what a sample is and its loss."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def sample_weights(self, call):
        self.noted.append((call.kind, call.batch_size, call.losses, call.sample_mass))


def test_elr_attaches_to_a_classifier_called_with_labels():
    torch.manual_seed(0)
    model = Model(transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=3)))
    labels, elr = torch.arange(8) % 3, ELRCallback(beta=0.5)
    fit(model, elr, loader=DataLoader(Sentences(labels), 4), max_epochs=1)
    targets = torch.zeros(8, 3)
    for start, logits in zip((0, 4), model.seen, strict=True):
        elr_update_targets(targets, torch.arange(start, start + 4), logits, beta=0.5)
    assert torch.equal(elr._table.targets.all(), targets)


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_a_language_models_flat_loss_is_folded_back_to_sequences(kind):
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        net = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, max_position_embeddings=8)
        net = transformers.LlamaForCausalLM(config)
    labels = Sentences(range(4)).tokens.clone()
    labels[1, 3:] = -100
    model, technique = Model(net), PerSequence()
    fit(model, technique, loader=DataLoader(Sentences(labels), 4), max_epochs=1)
    ((kind, batch_size, losses, mass),) = technique.noted
    assert (kind, batch_size) == ("sequence", 4)
    assert mass.tolist() == [6, 2, 6, 6]  # shifted by one
    each = F.cross_entropy(model.seen[0][:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(losses, each.sum(1) / mass, atol=1e-6, rtol=1e-5)
