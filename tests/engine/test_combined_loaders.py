"""Sample indices through several training loaders at once."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import QUIET, Classifier, IndexRecorder, Pairs, WeightsByPosition, fit, make_loader, same_weights

pytestmark = QUIET


def marked(samples, **kwargs):
    return make_loader(Pairs(samples=samples, mark=True), shuffle=True, **kwargs)


class TwoLoaders(Classifier):
    """A loss on each of two loaders."""

    def __init__(self, by_hand=None):
        super().__init__(lr=0.1)
        self.marks, self.by_hand = {"a": [], "b": []}, by_hand

    @override
    def training_step(self, batch, batch_idx):
        if not isinstance(batch, dict):
            batch = dict(zip("ab", batch, strict=True))
        for key, (x, _) in batch.items():
            self.marks[key].append(x[:, 0].long().tolist())
        x, y = batch["a"]
        if self.by_hand is not None:
            first = self.by_hand(F.cross_entropy(self(x / 100), y, reduction="none"))
        else:
            first = F.cross_entropy(self(x / 100), y)
        x, y = batch["b"]
        return first + F.nll_loss(self(x / 100).log_softmax(1), y)


def two_loaders(mode="max_size_cycle", sequence=False):
    loaders = {"a": marked(32), "b": marked(10, batch_size=4)}
    return CombinedLoader(list(loaders.values()) if sequence else loaders, mode)


@pytest.mark.parametrize(("mode", "steps"), [("min_size", 3), ("max_size_cycle", 4)])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("asked", ["a", "b", "ab"])
def test_combined_loaders(mode, steps, sequence, asked):
    recorders = {
        key: IndexRecorder(loss="ab".index(key), dataloader=str("ab".index(key)) if sequence else key, name=key)
        for key in asked
    }
    module = TwoLoaders()
    fit(module, *recorders.values(), loader=two_loaders(mode, sequence), max_epochs=3)
    for key, recorder in recorders.items():
        assert recorder.indices == module.marks[key]
        assert len(recorder.indices) == 3 * steps
        assert set(recorder.sizes) == {{"a": 32, "b": 10}[key]}


@pytest.mark.parametrize("given", [None, "c"])
def test_combined_loaders_need_a_choice(given):
    with pytest.raises(MisconfigurationException) as caught:
        fit(TwoLoaders(), IndexRecorder(dataloader=given, loss=0), loader=two_loaders())
    assert str(caught.value) == (
        f"IndexRecorder counts the samples of one training loader, and dataloader={given!r} is none of the 2 there are:"
        " 'a', 'b'. Write `IndexRecorder(dataloader=\"...\")`."
    )


def test_the_other_loader_does_not_say_how_large_a_batch_is():
    # The recorder follows the batches of 4, the weights are for the 8 samples of the other loader.
    def weighted(losses):
        return (losses * (1 + torch.arange(8) / 8)).mean()

    ours, hand = TwoLoaders(), TwoLoaders(by_hand=weighted)
    for module, techniques in ((ours, [WeightsByPosition(loss=0), IndexRecorder(loss=1, dataloader="b")]), (hand, [])):
        fit(module, *techniques, loader=two_loaders("min_size"))
    assert ours.marks == hand.marks
    assert same_weights(ours, hand, atol=1e-6)  # float32, few steps
