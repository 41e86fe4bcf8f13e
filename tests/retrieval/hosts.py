"""Modules that the tests of several units on search attach to."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.functional import mean_pooled
from tests.conformance.problems import Problem


class InBatch(nn.Module):
    """Scores of the rows of a batch among each other: documents are a layer of the queries."""

    def __init__(self):
        super().__init__()
        self.documents = nn.Linear(4, 4)

    def forward(self, q):
        return F.normalize(q) @ F.normalize(self.documents(q)).T


def in_batch(scores="scores"):
    """A network whose last layer has that name."""
    layers = {"first": nn.Linear(8, 16), "act": nn.Tanh(), "body": nn.Linear(16, 16), "act_body": nn.Tanh()}
    return nn.Sequential(OrderedDict(**layers, head=nn.Linear(16, 4), **{scores: InBatch()}))


def unlabelled(size):
    return torch.randn(size, 8).roll(6, 0), torch.zeros(size, dtype=torch.long)


def own_document(scores, y, reduction="mean"):
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction=reduction)


def in_batch_problem(scores="scores"):
    """Rows are to find themselves among all of their batch."""
    each = partial(own_document, reduction="none")
    return Problem(partial(in_batch, scores), unlabelled, own_document, each=each)


def bert_text():
    """A small encoder of transformers for texts, ``(B, T)`` padded with 0, with the mean over their tokens."""
    transformers = pytest.importorskip("transformers")

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            config = transformers.BertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
            self.bert = transformers.BertModel(config, add_pooling_layer=False)

        def forward(self, tokens):
            mask = (tokens > 0).long()
            return mean_pooled(self.bert(tokens, attention_mask=mask).last_hidden_state, mask)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Text()
