"""LabelStore: corrected masks are handed out before crops and flips."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ADELE, LabelStore
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import confident_classes, corrected_masks
from tests.conformance.problems import KINDS
from tests.toys import QUIET, TWO_RANKS, fit, make_trainer, weights_of

pytestmark = QUIET

MAPS = KINDS["maps"]
adele = partial(ADELE, start=1, tau=0.4, scales=[1])


class Segmenter(LightningModule):
    """Keeps the batches that it was trained on."""

    def __init__(self):
        super().__init__()
        self.seen = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = MAPS.net()

    def training_step(self, batch, batch_idx):
        if self.training:
            self.seen.append(batch)
        return F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=255)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def images(n=8):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x, y = MAPS.data(n)
    y[0, 0] = 255
    return x, y


def crop(sample):
    """A random crop of 4 x 4, flipped half of the time; it says where it was taken."""
    x, y = sample
    down, right, flipped = [*torch.randint(3, (2,)).tolist(), bool(torch.rand(()) < 0.5)]
    x, y = x[:, down : down + 4, right : right + 4], y[down : down + 4, right : right + 4]
    return (x.flip(-1), y.flip(-1)) if flipped else (x, y)


def found_in(whole, cut):
    """Where a crop was taken from, and whether it was flipped: by its image."""
    return next(
        (down, right, flipped)
        for down in range(3)
        for right in range(3)
        for flipped in (False, True)
        if torch.equal(whole[:, down : down + 4, right : right + 4], cut.flip(-1) if flipped else cut)
    )


def pairs(batches):
    return [pair for batch in batches for pair in zip(*batch, strict=True)]


def of_mask(mask, place):
    down, right, flipped = place
    cut = mask[down : down + 4, right : right + 4]
    return cut.flip(-1) if flipped else cut


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "worker"])
def test_the_epoch_after_trains_on_crops_of_what_the_pass_over_whole_images_corrected(workers):
    x, y = images()
    store, module, technique = LabelStore(TensorDataset(x, y), 3, crop), Segmenter(), adele(correct_every=0)
    weights = []

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    fit(module, Keep(), technique, loader=DataLoader(store, 4, **workers), max_epochs=2)
    twin = Segmenter()
    twin.load_state_dict(weights[0])
    with torch.no_grad():
        confident = confident_classes(twin.eval().net(x).softmax(1), 0.4)
    corrected = corrected_masks(confident, y, torch.tensor([False, True, True]))
    assert not torch.equal(corrected, y)
    for (image, mask), whole, given in zip(pairs(module.seen[:2]), x, y, strict=True):
        assert torch.equal(mask, of_mask(given, found_in(whole, image)))
    for (image, mask), whole, new in zip(pairs(module.seen[2:]), x, corrected, strict=True):
        assert torch.equal(mask, of_mask(new, found_in(whole, image)))


def test_without_a_transform_it_is_as_if_adele_had_kept_the_masks():
    x, y = images()
    plain, stored = Segmenter(), Segmenter()
    kept, keeps = adele(from_original=False), adele(from_original=False)
    fit(plain, kept, loader=DataLoader(TensorDataset(x, y), 4), max_epochs=3)
    fit(stored, keeps, loader=DataLoader(LabelStore(TensorDataset(x, y), 3), 4), max_epochs=3)
    assert all(torch.equal(one[1], two[1]) for one, two in zip(plain.seen, stored.seen, strict=True))
    assert all(map(torch.equal, weights_of(plain).values(), weights_of(stored).values()))
    assert torch.equal(kept.curves[1], keeps.curves[1])
    assert list(kept.mask_errors(y).rows()) == list(keeps.mask_errors(y).rows())


def test_a_new_fit_begins_with_the_masks_as_given():
    x, y = images()
    loader = DataLoader(LabelStore(TensorDataset(x, y), 3), 4)
    for technique in (adele(), adele()):
        module = Segmenter()
        fit(module, technique, loader=loader, max_epochs=2)
        assert torch.equal(torch.cat([masks for _, masks in module.seen[:2]]), y)
        assert not torch.equal(torch.cat([masks for _, masks in module.seen[2:]]), y)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}], ids=["here", "worker"])
def test_resumed_with_corrected_masks(tmp_path, workers):
    x, y = images()
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole = Segmenter()
    store = LabelStore(TensorDataset(x, y), 3)
    fit(whole, adele(), keep, loader=DataLoader(store, 4, **workers), max_epochs=4, enable_checkpointing=True)
    resumed = Segmenter()
    seed_everything(1, verbose=False)
    again = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    technique, loader = adele(), DataLoader(LabelStore(TensorDataset(x, y), 3), 4, **workers)
    trainer = make_trainer(callbacks=[technique, again], max_epochs=4, enable_checkpointing=True)
    trainer.fit(resumed, loader, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert not torch.equal(resumed.seen[0][1], y[:4])
    assert all(torch.equal(one[1], two[1]) for one, two in zip(whole.seen[4:], resumed.seen, strict=True))
    assert all(map(torch.equal, weights_of(whole).values(), weights_of(resumed).values()))


def test_images_of_different_sizes_are_cropped_to_one():
    x, y = images(4)
    rows = [(x[i], y[i]) if i < 2 else (x[i, :, :4], y[i, :4]) for i in range(4)]
    store = LabelStore(rows, 3, lambda sample: [entry[..., :4, :4] for entry in sample], size=[6, 6])
    module, technique = Segmenter(), adele()
    fit(module, technique, loader=DataLoader(store, 4), max_epochs=2)
    assert [tuple(masks.shape) for _, masks in module.seen] == [(4, 4, 4)] * 2
    assert not torch.equal(module.seen[0][1], module.seen[1][1])
    assert len(technique.mask_errors(mask for _, mask in rows)) > 0


def test_arrays_and_masks_with_a_channel():
    mask = np.array([[[0, 1], [1, 255]]], dtype=np.uint8)
    store = LabelStore([{"mask": mask, "name": "a"}, {"mask": mask, "name": "b"}], 2, target_key="mask")
    store.maps().write(torch.tensor([1]), torch.tensor([[[1, 0], [1, 0]]]))
    assert store[0]["mask"] is mask
    assert store[1]["mask"].tolist() == [[[1, 0], [1, 255]]]
    assert store[1]["mask"].dtype == np.uint8
    assert mask.tolist() == [[[0, 1], [1, 255]]]
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    store = LabelStore([(0, tv_tensors.Mask(torch.from_numpy(mask)))], 2)
    store.maps().write(torch.tensor([0]), torch.tensor([[[1, 0], [1, 0]]]))
    assert type(store[0][1]) is tv_tensors.Mask  # the transforms of torchvision go by the class
    assert store[0][1].tolist() == [[[1, 0], [1, 255]]]
    assert len(store) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 1}, r"`num_classes` must be .*, got 1\."),
        ({"num_classes": 257}, r"`num_classes` must be .*, got 257\."),
        ({"size": [4]}, r"`size` must be a height and a width, got \[4\]"),
        ({"size": [4, 0]}, r"`size` must be .*, got 0\."),
        ({"dataset": []}, "`dataset` must have a length above 0, got list"),
    ],
)
def test_arguments_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        LabelStore(**({"dataset": TensorDataset(*images(2)), "num_classes": 3} | options))


@pytest.mark.parametrize("mask", [torch.zeros(2, 2), torch.zeros(4, dtype=torch.long), torch.ones(2, 2, 2).long(), "a"])
def test_other_masks_are_refused(mask):
    with pytest.raises(MisconfigurationException, match=r"keeps masks .H, W. of whole numbers, and the entry '1' of a"):
        LabelStore([(0, mask)], 3)


def test_a_mask_that_changes_its_size_is_refused():
    rows = [(0, torch.zeros(2, 2, dtype=torch.long))]
    store = LabelStore(rows, 3)
    store.maps().write(torch.tensor([0]), torch.ones(1, 2, 2))
    rows[0] = (0, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(MisconfigurationException, match=r"mask of sample 0 was \(2, 2\) and is \(1, 2\) now"):
        store[0]


class Cropped(TensorDataset):
    def __getitem__(self, index):
        return crop(super().__getitem__(index))


@pytest.mark.parametrize(
    ("technique", "wrapped", "words"),
    [
        (adele(predict="train"), True, 'predict="train" predicts what it trains on, which a LabelStore may have crop'),
        (adele(num_samples=8), True, "a LabelStore knows its number of samples. Leave `num_samples` out"),
        (adele(dataloader="0"), True, "a LabelStore works with one training loader"),
        (adele(), 4, r"masks are kept of 4 classes, and the network scores 3. Write `LabelStore\(num_classes=3\)`"),
        (adele(), False, r"`LabelStore\(whole_images, num_classes=..., transform=...\)` as the dataset"),
        (adele(), "random", r"a batch that was fetched twice was another one the second time"),
    ],
)
def test_misuse_is_told(technique, wrapped, words):
    data = (Cropped if wrapped in (False, "random") else TensorDataset)(*images())
    store = data if wrapped is False else LabelStore(data, 4 if wrapped == 4 else 3)
    with pytest.raises(MisconfigurationException, match=words):
        fit(Segmenter(), technique, loader=DataLoader(store, 4), max_epochs=2)


def corrected_on_two(store):
    _, y = images()
    module, technique = Segmenter(), adele()
    fit(module, technique, loader=DataLoader(store, 4), max_epochs=2, **TWO_RANKS)
    return [technique.corrected_mask(i, mask) for i, mask in enumerate(y)], [store[i][1] for i in range(len(y))]


def test_ranks_that_were_given_one_store_hand_out_the_same_masks(two_processes):
    x, y = images()
    one, two = two_processes.run(corrected_on_two, LabelStore(TensorDataset(x, y), 3))
    assert not torch.equal(torch.stack(one[0]), y)
    for other in (one[1], *two):
        assert all(map(torch.equal, one[0], other))
