"""Sample indices through every kind of loader: each sample carries its index in its first input."""

import gc
import multiprocessing
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from tests.toys import (
    CLASSES,
    QUIET,
    Classifier,
    IndexRecorder,
    Pair,
    Pairs,
    Term,
    fit,
    make_loader,
    make_trainer,
)

pytestmark = QUIET


class Noting(Classifier):
    """Notes the marks of the samples that its ``training_step`` gets."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.marks = []

    @override
    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            x, y = batch["x"], batch["y"]
        elif isinstance(batch, Pair):
            x, y = batch.x, batch.y
        elif isinstance(batch, torch.Tensor):
            x, y = batch, None
        else:
            x, y = batch[:2]
        self.marks.append(x[:, 0].long().tolist())
        if y is None:
            return F.mse_loss(self(x / 100), x[:, :CLASSES] / 100)
        return F.cross_entropy(self(x / 100), y)


def record(loader, module=None, recorder=None, **kwargs):
    module, recorder = module or Noting(), recorder or IndexRecorder()
    fit(module, recorder, loader=loader, **kwargs)
    assert recorder.indices
    assert recorder.indices == module.marks
    return recorder.indices


def marked(samples=32, form="tuple", **kwargs):
    return make_loader(Pairs(form, samples, mark=True), **kwargs)


def epochs(indices, batches):
    return [list(chain(*indices[start : start + batches])) for start in range(0, len(indices), batches)]


def collate_pairs(samples):
    return Pair(*default_collate([(sample.x, sample.y) for sample in samples]))


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass", "tensor"])
def test_forms_of_samples(form):
    options = {"collate_fn": collate_pairs} if form == "dataclass" else {}
    indices = record(marked(form=form, shuffle=True, **options))
    assert [sorted(epoch) for epoch in epochs(indices, 4)] == [list(range(32))] * 2
    assert indices[:4] != indices[4:]


def test_a_loader_in_order():
    assert record(marked(20)) == [list(range(8)), list(range(8, 16)), list(range(16, 20))] * 2


def test_drop_last():
    assert record(marked(20, drop_last=True)) == [list(range(8)), list(range(8, 16))] * 2


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes(persistent):
    indices = record(marked(20, shuffle=True, num_workers=2, persistent_workers=persistent))
    assert [sorted(epoch) for epoch in epochs(indices, 3)] == [list(range(20))] * 2
    assert indices[:3] != indices[3:]


def test_worker_processes_end_with_the_fit():
    """Not in a collection of garbage, some time later, which would wait ten seconds for them."""
    gc.collect()
    before = {process.pid for process in multiprocessing.active_children()}
    gc.disable()
    try:
        record(marked(20, num_workers=1))
        left = {process.pid for process in multiprocessing.active_children()} - before
    finally:
        gc.enable()
    assert not left


def test_a_sampler_that_repeats_samples():
    weights = [1.0] * 4 + [0.0] * 28
    indices = record(marked(sampler=WeightedRandomSampler(weights, 24)))
    assert [len(batch) for batch in indices] == [8] * 6
    assert set(chain(*indices)) == {0, 1, 2, 3}


def test_a_subset_has_indices_of_its_own():
    module, recorder = Noting(), IndexRecorder()
    positions = [5, 3, 30, 31, 7, 0]
    fit(module, recorder, loader=make_loader(Subset(Pairs(mark=True), positions), batch_size=4, shuffle=True))
    assert set(recorder.sizes) == {6}
    assert [[positions[i] for i in batch] for batch in recorder.indices] == module.marks
    assert sorted(chain(*recorder.indices[:2])) == list(range(6))


def test_batch_samplers():
    dataset = Pairs(mark=True)
    sampler = BatchSampler(RandomSampler(dataset), batch_size=5, drop_last=False)
    indices = record(DataLoader(dataset, batch_sampler=sampler))
    assert [sorted(epoch) for epoch in epochs(indices, 7)] == [list(range(32))] * 2
    uneven = [[3], [1, 2], [31, 0, 5]]
    assert record(DataLoader(dataset, batch_sampler=uneven)) == uneven * 2


def test_a_sampler_of_batches_without_collation():
    dataset = Pairs(mark=True)
    batches = [[4, 2], [0], [9, 9, 1]]
    assert record(DataLoader(dataset, batch_size=None, sampler=batches)) == batches * 2


def test_a_loader_class_of_the_user():
    class Mine(DataLoader):
        def __init__(self, samples, *, tag):
            super().__init__(Pairs(samples=samples, mark=True), batch_size=8, shuffle=True)
            self.tag = tag

    loader = Mine(16, tag="mine")
    indices = record(loader)
    assert [sorted(epoch) for epoch in epochs(indices, 2)] == [list(range(16))] * 2
    assert (type(loader), loader.tag) == (Mine, "mine")


def test_the_order_of_a_shuffling_loader_is_the_users():
    def loader():
        return marked(shuffle=True, generator=torch.Generator().manual_seed(3))

    plain = Noting()
    fit(plain, loader=loader())
    assert record(loader()) == plain.marks


# -- options of the Trainer -------------------------------------------------------------------------------------------


def test_limit_train_batches():
    assert record(marked(), limit_train_batches=2) == [list(range(8)), list(range(8, 16))] * 2
    indices = record(marked(shuffle=True), limit_train_batches=3, max_epochs=3)
    assert [len(set(epoch)) for epoch in epochs(indices, 3)] == [24] * 3


def test_max_steps_in_the_middle_of_an_epoch():
    assert len(record(marked(shuffle=True), max_steps=6, max_epochs=-1)) == 6


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.parametrize("shuffle", [False, True])
def test_overfit_batches(shuffle):
    indices = record(marked(shuffle=shuffle), overfit_batches=2, max_epochs=3)
    assert indices == [list(range(8)), list(range(8, 16))] * 3


def test_accumulation():
    assert len(record(marked(20, shuffle=True), accumulate_grad_batches=4)) == 6


def test_reload_dataloaders_every_n_epochs():
    class Growing(Noting):
        sizes = ()

        @override
        def train_dataloader(self):
            self.sizes += (8 * (1 + len(self.sizes)),)
            return marked(self.sizes[-1], shuffle=True)

    module, recorder = Growing(), IndexRecorder()
    make_trainer(callbacks=[recorder], max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    assert module.sizes == (8, 16, 24)
    assert recorder.indices == module.marks
    assert recorder.sizes == [8, 16, 16, 24, 24, 24]


def test_validation_in_between():
    class Validating(Noting):
        @override
        def validation_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0] / 100), batch[1])

    module, recorder = Validating(), IndexRecorder()
    make_trainer(callbacks=[recorder], val_check_interval=1).fit(module, marked(shuffle=True), marked(12))
    assert recorder.indices == module.marks
    assert len(recorder.indices) == 8


def test_a_data_module():
    class Data(LightningDataModule):
        @override
        def train_dataloader(self):
            return marked(20, shuffle=True)

    module, recorder = Noting(), IndexRecorder()
    make_trainer(callbacks=[recorder]).fit(module, datamodule=Data())
    assert recorder.indices == module.marks
    assert [len(batch) for batch in recorder.indices] == [8, 8, 4] * 2


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_batch_that_is_none_is_passed_over():
    def collate(samples):
        return None if any(x[0] == 9 for x, _ in samples) else default_collate(samples)

    assert record(marked(collate_fn=collate), max_epochs=1) == [
        list(range(8)),
        *map(list, (range(16, 24), range(24, 32))),
    ]


@pytest.mark.filterwarnings("ignore:The strategy is not")
def test_the_number_of_optimizer_steps_may_be_asked_for():
    class Scheduled(Noting):
        @override
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = self.trainer.estimated_stepping_batches
            assert steps == 8
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)]

    assert len(record(marked(shuffle=True), Scheduled())) == 8


class AsksForSteps(Callback):
    @override
    def setup(self, trainer, pl_module, stage):
        assert trainer.estimated_stepping_batches == 8


def test_a_later_callback_may_ask_for_the_steps_and_an_earlier_one_not():
    module, recorder = Noting(), IndexRecorder()
    fit(module, recorder, AsksForSteps(), loader=marked(shuffle=True))
    assert recorder.indices == module.marks
    with pytest.raises(MisconfigurationException) as caught:
        fit(Noting(), AsksForSteps(), IndexRecorder(), loader=marked())
    assert "IndexRecorder needs sample indices" in str(caught.value)
    assert "trainer.estimated_stepping_batches" in str(caught.value)
    assert "Put the technique first in `Trainer(callbacks=[...])`" in str(caught.value)


class Unsized:
    """Batches of unknown number, so that Lightning fetches one ahead."""

    def __iter__(self):
        return iter(torch.randperm(32).view(8, 4).tolist())


def test_an_epoch_left_early_with_a_batch_fetched_ahead():
    class Leaving(Noting):
        @override
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    indices = record(DataLoader(Pairs(mark=True), batch_sampler=Unsized()), Leaving(), max_epochs=3)
    assert [len(batch) for batch in indices] == [4] * 6


# -- indices in the batch ---------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((*sample, 100 + index) for index, sample in enumerate(Pairs(samples=12, mark=True)))


def test_index_key_names_an_entry_of_the_batch():
    recorder = IndexRecorder(index_key="index")
    assert len(record(marked(form="dict", shuffle=True), recorder=recorder)) == 8
    assert set(recorder.sizes) == {None}


def test_index_key_as_a_position_in_an_iterable_dataset():
    module, recorder = Noting(), IndexRecorder(index_key="2")
    fit(module, recorder, loader=DataLoader(Stream(), batch_size=8))
    assert recorder.indices == [[100 + mark for mark in batch] for batch in module.marks]
    assert len(recorder.indices) == 4


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("idx", r"index_key='idx' names nothing in the batch, which is keys \['x', 'y', 'index'\]"),
        ("x", r"index_key='x' must name a tensor of whole numbers \(B,\), found a tensor of torch.float32, \(8, 6\)"),
    ],
)
def test_a_wrong_index_key(key, text):
    with pytest.raises(MisconfigurationException, match=text):
        fit(Noting(), IndexRecorder(index_key=key), loader=marked(form="dict"))


class OwnOrder(DataLoader):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Batches:
    def __iter__(self):
        return iter(marked())

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "Stream is an IterableDataset and has no sample indices"),
        (Batches, "a Batches is no torch DataLoader"),
        (lambda: OwnOrder(Pairs(), batch_size=8), "OwnOrder iterates in its own way"),
        (lambda: marked(in_order=False), "the DataLoader has in_order=False"),
    ],
)
def test_a_loader_without_indices_is_refused_when_the_fit_starts(loader, text):
    module = Noting()
    with pytest.raises(MisconfigurationException, match=text) as caught:
        fit(module, IndexRecorder(), loader=loader())
    assert "index_key" in str(caught.value)
    assert module.marks == []
    # A technique that needs no indices does not mind.
    fit(module, Term(), loader=loader(), max_epochs=1)
    assert module.marks


class FetchesItself(Noting):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_fetches_its_own_batches_has_no_indices():
    with pytest.raises(MisconfigurationException, match=r"IndexRecorder needs the indices .* fetches batches itself"):
        fit(FetchesItself(), IndexRecorder(), loader=marked())
