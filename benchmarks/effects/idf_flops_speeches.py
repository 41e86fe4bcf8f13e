"""Lines of a play: queries with and without IDF under the same FLOPS penalty, at three weights of it.

Speeches of Tiny Shakespeare with at least 25 words (2,266; 800 are kept for the test). The first two thirds of a speech
are the document; the query is 8 words drawn from the whole speech. Vocabulary: the 3,000 most frequent words. A
document is encoded by one layer: with x its words (0 or 1), e the mean of their embeddings of 128 numbers, and f
linear, log(1 + relu(x + f(e))). Queries are never encoded: a bag of words, with a weight of 1 or of the IDF from the
trained documents. Cross-entropy over the documents of the batch, Adam 1e-3, batch 64, 250 steps, no ramp. For each
weight: MRR (in per cent) among the documents of the test, active entries of a document, and of the 50 most frequent
words the share (in per cent) that is active in a document. The last row is not trained: the words that query and
document share, with IDF.
"""

import re
import sys
from collections import Counter
from functools import cache

import torch
from _shared import Arm, data_folder, fit
from idf_flops import Search
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_reg import IDFFlops, QueryIDF, RetrievalMetrics
from lightning_reg.functional import idf_from_corpus

VOCABULARY, TESTED, STEPS, FREQUENT = 3000, 800, 250, 50
WEIGHTS = (0.05, 0.5, 2.0)


@cache
def speeches():
    text = (data_folder("tinyshakespeare") / "input.txt").read_text()
    spoken = (block.partition("\n")[2] for block in text.split("\n\n"))  # without the speaker's name
    words = (re.findall(r"[a-z']+", speech.lower()) for speech in spoken)
    return [speech for speech in words if len(speech) >= 25]


@cache
def data(seed):
    generator, given = torch.Generator().manual_seed(seed), speeches()
    chosen = [given[n] for n in torch.randperm(len(given), generator=generator)]
    counts = Counter(word for speech in chosen[TESTED:] for word in speech)
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY))}
    queries, documents = torch.zeros(2, len(chosen), VOCABULARY)
    for row, speech in enumerate(chosen):
        said = [numbers[word] for word in speech if word in numbers]
        documents[row, [numbers[word] for word in speech[: len(speech) * 2 // 3] if word in numbers]] = 1.0
        queries[row, [said[n] for n in torch.randperm(len(said), generator=generator)[:8]]] = 1.0
    return queries, documents, idf_from_corpus((row.nonzero()[:, 0].tolist() for row in documents[TESTED:]), VOCABULARY)


class Documents(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedded, self.expand = nn.Embedding(VOCABULARY, 128), nn.Linear(128, VOCABULARY)

    def forward(self, words):
        mean = words @ self.embedded.weight / words.sum(1, keepdim=True).clamp(min=1)
        return (words + self.expand(mean)).relu().log1p()


@torch.no_grad()
def scored(queries, documents, weight):
    metric = RetrievalMetrics()
    metric.update(queries @ documents.T, torch.eye(len(queries), dtype=torch.bool))
    active = documents > 0
    found = {"MRR": 100 * metric.compute()["mrr"], "entries": active.sum(1).float().mean()}
    found["frequent"] = 100 * active[:, :FREQUENT].float().mean()
    return {f"{name}, {weight:g}": value for name, value in found.items()}


def run(seeds):
    arms, plain = [Arm("plain FLOPS"), Arm("IDF-FLOPS")], Arm("shared words with IDF, not trained")
    for seed in seeds:
        queries, documents, idf = data(seed)
        trained = TensorDataset(queries[TESTED:], documents[TESTED:])
        for weight in WEIGHTS:
            for arm in arms:
                factors = QueryIDF(idf if arm.name == "IDF-FLOPS" else torch.ones(VOCABULARY)).idf
                seed_everything(seed, verbose=False)
                module = Search(factors, Documents, 1e-3)
                batches = BatchSampler(RandomSampler(trained), 64, drop_last=True)
                loader = DataLoader(trained, batch_size=None, sampler=batches)
                flops = IDFFlops("documents", weight=weight, ramp_steps=1)
                fit(module, [flops], loader, max_steps=STEPS, max_epochs=-1)
                with torch.no_grad():
                    encoded = module.documents(documents[:TESTED])
                arm.add(**scored(queries[:TESTED] * factors, encoded, weight))
                print(f"seed {seed}, {arm.name}, weight {weight:g}", file=sys.stderr, flush=True)
            plain.add(**scored(queries[:TESTED] * idf, documents[:TESTED], weight))
    return [*arms, plain]
