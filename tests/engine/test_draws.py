"""A technique draws the samples of the epochs: the loader, its dataset, workers and batch size stay the user's."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_reg import ELRPlusCallback
from lightning_reg.engine.data.draws import Draws
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.networks.records import Wanted, record
from lightning_reg.engine.run.engine import attached_engine
from lightning_reg.engine.technique import DrawTechnique
from tests.engine.test_loaders import Noting, marked
from tests.toys import QUIET, TWO_RANKS, Classifier, IndexRecorder, Pairs, fit, make_trainer, same_weights

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
]


class Drawing(DrawTechnique):
    """Draws as many samples as it is told for each epoch, ``None``: those of the loader."""

    def __init__(self, counts=(20, None, 44), name=None, seed=0):
        super().__init__(name=name, seed=seed)
        self.counts, self.asked = counts, []

    def draw_samples(self, epoch, size):
        self.asked.append((epoch, size))
        count = self.counts[epoch]
        return None if count is None else torch.randint(size, (count,), generator=self.draw_generator(epoch))

    def wanted(self, epoch, size=32):
        return torch.randint(size, (self.counts[epoch],), generator=self.draw_generator(epoch)).tolist()


class Seen(Callback):
    """Batch counts as Lightning has them when an epoch begins, and where it validates."""

    def __init__(self):
        self.counts, self.validated = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.counts.append(trainer.num_training_batches)

    def on_validation_start(self, trainer, pl_module):
        self.validated.append((trainer.current_epoch, trainer.fit_loop.batch_idx))


def batched(indices, size=8):
    return [indices[start : start + size] for start in range(0, len(indices), size)]


WORKERS = pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=["none", "new", "kept"]
)


@WORKERS
def test_the_loader_gives_what_was_drawn(options):
    module, recorder, drawing, seen = Noting(), IndexRecorder(), Drawing(), Seen()
    loader = marked(**options)
    trainer = fit(module, recorder, drawing, seen, loader=loader, max_epochs=3)
    expected = batched(drawing.wanted(0)) + batched(list(range(32))) + batched(drawing.wanted(2))
    assert module.marks == recorder.indices == expected
    assert drawing.asked == [(0, 32), (1, 32), (2, 32)]
    assert seen.counts == [3, 4, 6]
    assert trainer.global_step == 13
    assert len(loader) == 4
    assert "on_run_start" not in vars(trainer.fit_loop.epoch_loop)


def test_the_users_batch_sampler_says_the_size_of_batches():
    module, drawing = Noting(), Drawing((20,))
    fit(module, drawing, loader=marked(batch_size=6, drop_last=True, shuffle=True), max_epochs=1)
    assert module.marks == batched(drawing.wanted(0)[:18], 6)


def test_limits_and_validations_go_by_the_epochs_own_count():
    module, seen = Noting(), Seen()
    module.validation_step = lambda batch, batch_idx: None
    trainer = make_trainer(
        callbacks=[Drawing((32, 64, None)), seen], max_epochs=3, limit_train_batches=0.5, val_check_interval=0.5
    )
    trainer.fit(module, marked(), marked())
    assert seen.counts == [2, 4, 2]
    assert [v for v in seen.validated if v[1] >= 0] == [(0, 0), (0, 1), (1, 1), (1, 3), (2, 0), (2, 1)]
    module = Noting()
    fit(module, Drawing((20, 64)), loader=marked(), limit_train_batches=5)
    assert [len(marks) for marks in module.marks] == [8, 8, 4] + [8] * 5


def test_a_loader_that_is_made_anew():
    class Data(Noting):
        def train_dataloader(self):
            return marked()

    module, drawing = Data(), Drawing()
    trainer = make_trainer(callbacks=[drawing], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module)
    assert module.marks == batched(drawing.wanted(0)) + batched(list(range(32))) + batched(drawing.wanted(2))


class Saves(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"end{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_fit_goes_on_where_it_was(tmp_path, workers):
    def run(*callbacks, ckpt=None):
        module = Noting()
        trainer = make_trainer(callbacks=[Drawing((20, 70, 36)), *callbacks], max_epochs=3)
        trainer.fit(module, marked(num_workers=workers), ckpt_path=ckpt)
        return module, trainer.global_step

    whole, steps = run(Saves(tmp_path))
    assert steps == 3 + 9 + 5
    # The last batches of epochs (3, 12) and those before them: their counts are not those of the loader, which is 4.
    for stop in (1, 3, 5, 8, 11, 12, 15) if workers == 0 else (3, 5, 8):
        resumed, reached = run(ckpt=tmp_path / f"{stop}.ckpt")
        assert (resumed.marks, reached) == (whole.marks[stop:], steps), stop
        assert same_weights(whole, resumed)
    for epoch, stop in (0, 3), (1, 12):
        assert run(ckpt=tmp_path / f"end{epoch}.ckpt")[0].marks == whole.marks[stop:]


def test_as_many_batches_on_each_rank(two_processes):
    answers = two_processes.run(draw_on_ranks)
    wanted = Drawing((27,)).wanted(0)[:26]
    for rank, marks in enumerate(answers):
        assert marks == batched(wanted[rank::2])


def draw_on_ranks():
    module = Noting()
    fit(module, Drawing((27,)), loader=marked(), max_epochs=1, **TWO_RANKS)
    return module.marks


class Recording(Drawing):
    """Looks at all samples while an epoch is made of a few."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.recorded = [*getattr(self, "recorded", []), len(record(trainer, self, Wanted(["net.2"])).indices)]


@pytest.mark.parametrize(("limit", "rows"), [(1.0, 32), (2, 16), (0.25, 8)])
def test_records_are_of_the_loaders_own_samples(limit, rows):
    recording = Recording((8, 44))
    fit(Classifier(), recording, limit_train_batches=limit)
    assert recording.recorded == [rows, rows]


def test_seeds_and_names_draw_differently():
    assert Drawing().wanted(0) == Drawing().wanted(0)
    others = [Drawing(seed=1), Drawing(name="other")]
    assert len({tuple(one.wanted(0)) for one in [Drawing(), *others]}) == 3


class Stream(IterableDataset):
    def __iter__(self):
        yield from Pairs()


class Odd(Sampler):
    def __iter__(self):
        yield from [[0, 1], [2]]

    def __len__(self):
        return 2


def draws(value):
    drawing = Drawing()
    drawing.draw_samples = lambda epoch, size: value
    return drawing


@pytest.mark.parametrize(
    ("technique", "loader", "sentence"),
    [
        (Drawing(), DataLoader(Stream(), 8), "Drawing draws the samples of the epochs, but Stream is an IterableData"),
        (Drawing(), [marked(), marked()], "Drawing draws the samples of the epochs, and there are 2 training loaders"),
        (Drawing(), DataLoader(Pairs(), batch_sampler=Odd()), "has a Odd without a `batch_size`, so the size of"),
        (Drawing(), DataLoader(Pairs(), batch_size=None), "batches no samples, so the size of a batch is not known"),
        (draws(torch.ones(3)), marked(), r"must return whole numbers \(M,\), got torch.float32 \(3,\)"),
        (draws(torch.ones(3, 1).long()), marked(), r"must return whole numbers \(M,\), got torch.int64 \(3, 1\)"),
        (draws([3, 32]), marked(), "must return indices of the 32 training samples, got 3 to 32"),
        (draws([-1, 2]), marked(), "must return indices of the 32 training samples, got -1 to 2"),
        (draws([1] * 7), marked(drop_last=True), "has drawn 7 samples for an epoch, which make no batch of 8 on 1 ran"),
        (draws(torch.ones(0).long()), marked(), "has drawn 0 samples for an epoch"),
    ],
)
def test_what_cannot_be_drawn(technique, loader, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Noting(), technique, loader=loader)


def test_who_cannot_stand_beside_it():
    with pytest.raises(MisconfigurationException, match="Drawing and Drawing cannot stand together: each draws"):
        fit(Classifier(), Drawing(), Drawing(name="two"))
    with pytest.raises(MisconfigurationException, match="Drawing draws the samples of the epochs, and the second netw"):
        fit(Classifier(), Drawing(), ELRPlusCallback(mixup_alpha=0.0))

    class Reorders(Callback):
        def on_train_start(self, trainer, pl_module):
            attached_engine(trainer).reordered(Drawing())

    with pytest.raises(MisconfigurationException, match="in another order, and Drawing draws the samples of the epoch"):
        fit(Classifier(), Drawing(), Reorders())

    class Fetches(Classifier):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(MisconfigurationException, match=r"Drawing draws the samples.*fetches batches itself"):
        fit(Fetches(), Drawing())

    class Estimates(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.fit_loop.setup_data()

    with pytest.raises(MisconfigurationException, match=r"Drawing draws the samples of the epochs, but .* made ready"):
        fit(Classifier(), Estimates(), Drawing())


def test_a_list_of_indices_is_enough():
    batches = Draws([3, 1, 2], marked(batch_size=2), Drawing())
    assert list(batches) == [[3, 1], [2]]
    batches.start = 1
    assert (list(batches), len(batches)) == ([[2]], 2)
