"""Copies that end at a residual connection, over tokens, where any number of rows may be a multiple of anything."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import MultiSampleDropout
from lightning_reg.engine.host.autograd import descends
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import QUIET, StepLosses, fit

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
B, WORDS, H = 8, 20, 16
ONE_MASK = "no loss function of torch got the output of the layers after .* so it has one mask"


def sentences(length):
    x = torch.randint(WORDS, (B, length), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), B)


class LanguageModel(LightningModule):
    """A block of layers over tokens, with a residual connection around it or without."""

    def __init__(self, residual=True, frozen=False, late=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.residual = residual
        self.words = nn.Embedding(WORDS, H)
        self.mlp = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Dropout(0.5), nn.Linear(H, H))
        self.late, self.out = nn.Dropout(late), nn.Linear(H, WORDS)
        self.words.requires_grad_(not frozen)
        self.mlp[0].requires_grad_(not frozen)
        self.widths = []

    def training_step(self, batch, batch_idx):
        h = self.words(batch[0])
        h = h + self.mlp(h) if self.residual else self.mlp(h)
        z = self.out(self.late(h.flatten(0, 1)))
        self.widths.append(len(z))
        return F.cross_entropy(z, batch[0].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("length", [16, 15])
@pytest.mark.parametrize("number", [2, 4, 16])
@pytest.mark.parametrize("head", ["mlp", None])
def test_one_copy_in_a_residual_stream_is_refused_at_any_length(head, number, length, frozen):
    technique = MultiSampleDropout("mlp.2", num_samples=number, head=head)
    with pytest.raises(MisconfigurationException, match=ONE_MASK) as raised:
        fit(LanguageModel(frozen=frozen), technique, loader=sentences(length), max_epochs=1)
    assert '(a residual connection), pass `MultiSampleDropout(mode="replay", backbone="...")`' in str(raised.value)


def test_what_the_refusal_says_is_taken():
    technique = MultiSampleDropout("mlp.2", num_samples=4, mode="replay", backbone="words")
    trainer = fit(LanguageModel(), technique, loader=sentences(16), max_epochs=1, log_every_n_steps=1)
    assert trainer.logged_metrics["reg/multi_sample_dropout/spread"] > 0


def test_a_dropout_layer_in_the_stream_behind_is_the_users_own():
    """With as many rows as copies would have: it draws from the global generator, one mask."""
    states = []
    for techniques in ([], [MultiSampleDropout("mlp.2", num_samples=2, head="mlp")]):
        model = LanguageModel(late=0.5)
        model.late.register_forward_hook(lambda layer, args, output: states.append(output != 0))
        torch.manual_seed(3)
        try:
            fit(model, *techniques, loader=sentences(16), max_epochs=1)
        except MisconfigurationException:
            assert techniques
    assert torch.equal(*states)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("number", [2, 16])
def test_without_a_residual_connection_all_copies_reach_the_loss(number, frozen):
    """Of a rate of 0 the copies are alike, so the loss is the plain one."""
    losses, widths = [], []
    for techniques in ([], [MultiSampleDropout("mlp.2", num_samples=number, head="out")]):
        model, note = LanguageModel(residual=False, frozen=frozen), StepLosses()
        model.mlp[2].p = 0.0
        model.out.register_forward_pre_hook(lambda layer, args: widths.append(len(args[0])))
        fit(model, *techniques, note, loader=sentences(16), max_epochs=1)
        losses.append(note.losses)
    assert widths == [B * 16, number * B * 16]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_language_model_of_hugging_face_is_refused():
    transformers = pytest.importorskip("transformers")

    class Wrapped(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=WORDS, n_positions=16, n_embd=H, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
                )
            )

        def training_step(self, batch, batch_idx):
            return self.net(input_ids=batch[0], labels=batch[0]).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    technique = MultiSampleDropout("net.transformer.h.0.mlp.dropout", num_samples=4, head="net.transformer.h.0.mlp")
    with pytest.raises(MisconfigurationException, match=ONE_MASK):
        fit(Wrapped(), technique, loader=sentences(16), max_epochs=1)


def test_what_comes_through_some_nodes_alone_does_not_descend():
    start = torch.ones(3, requires_grad=True) * 2
    first = start[:1]
    assert descends(first + 1, start.grad_fn)
    assert not descends(first + 1, start.grad_fn, but_through=[first.grad_fn])
    assert descends(first + start, start.grad_fn, but_through=[first.grad_fn])
