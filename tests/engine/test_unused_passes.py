"""What an unused pass over the loader took from the samplers comes back when an epoch is drawn by a technique."""

import warnings

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler

from tests.engine.test_draws import WORKERS, Drawing, Saves, batched
from tests.engine.test_loaders import Noting, marked
from tests.toys import QUIET, Pairs, fit, make_trainer

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Turning(Sampler):
    """Begins one sample later in each pass, or goes on in the middle of one."""

    def __init__(self):
        self.passes = self.position = 0

    def __iter__(self):
        if self.position in (0, 32):
            self.passes, self.position = self.passes + 1, 0
        while self.position < 32:
            self.position += 1
            yield (self.position - 1 + self.passes) % 32

    def __len__(self):
        return 32


class Resumable(Turning):
    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class ResumableLoader(DataLoader):
    """Lightning keeps its state in checkpoints."""

    def state_dict(self):
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state):
        self.sampler.load_state_dict(state["sampler"])


def turned(passes):
    return batched([(i + passes) % 32 for i in range(32)])


@WORKERS
@pytest.mark.parametrize("counts", [(20, None, None), (None, 20, None), (20, 36, None)])
@pytest.mark.parametrize("as_batches", [False, True])
def test_the_samplers_state_is_where_its_own_epochs_left_it(options, counts, as_batches):
    module, drawing = Noting(), Drawing(counts)
    if as_batches:
        options = options | {"batch_sampler": BatchSampler(Resumable(), 8, drop_last=False)}
    else:
        options = options | {"batch_size": 8, "sampler": Resumable()}
    fit(module, drawing, loader=DataLoader(Pairs(mark=True), **options), max_epochs=3)
    own = map(turned, (1, 2))
    assert module.marks == [
        b for e in range(3) for b in (next(own) if counts[e] is None else batched(drawing.wanted(e)))
    ]


@WORKERS
def test_a_generator_is_where_its_own_epochs_left_it(options):
    def shuffled(*drawing):
        module, generator = Noting(), torch.Generator().manual_seed(3)
        loader = marked(sampler=RandomSampler(range(32), generator=generator), **options)
        fit(module, *drawing, loader=loader, max_epochs=2)
        return module.marks

    assert shuffled(Drawing((20, None)))[3:] == shuffled()[:4]


@WORKERS
def test_a_resumable_loader_goes_on_after_an_epoch_that_was_not_drawn(tmp_path, options):
    def run(*callbacks, ckpt=None):
        module = Noting()
        trainer = make_trainer(callbacks=[Drawing((None, 20, None)), *callbacks], max_epochs=3)
        loader = ResumableLoader(Pairs(mark=True), 8, sampler=Resumable(), **options)
        trainer.fit(module, loader, ckpt_path=ckpt)
        return module.marks

    whole = run(Saves(tmp_path))
    assert (whole[:4], whole[7:]) == (turned(1), turned(2))
    for stop in (5, 6):  # at the end of an epoch Lightning does not go on with the loader's state
        assert run(ckpt=tmp_path / f"{stop}.ckpt") == whole[stop:], stop


def test_a_state_that_cannot_be_put_back_is_told():
    def marks(counts, workers):
        module = Noting()
        fit(module, Drawing(counts), loader=marked(sampler=Turning(), num_workers=workers))
        return module.marks

    changed = "Drawing draws the samples of this epoch, .* has changed `passes` of Turning, `position` of Turning"
    with pytest.warns(UserWarning, match=changed):
        assert marks((20, None), 2)[3:] != turned(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Drawing draws")
        assert marks((20, None), 0)[3:] == turned(1)
        assert marks((None, 20), 2)[:4] == turned(1)


class ReadFromOutside(ResumableLoader):
    """Its sampler has no ``state_dict`` of its own."""

    def state_dict(self):
        return dict(vars(self.sampler))

    def load_state_dict(self, state):
        vars(self.sampler).update(state)


def test_a_state_that_the_loader_alone_knows():
    module = Noting()
    loader = ReadFromOutside(Pairs(mark=True), 8, sampler=Turning(), num_workers=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Drawing draws")
        fit(module, Drawing((20, None)), loader=loader)
    assert module.marks[3:] == turned(1)


class Told(Resumable):
    """Is told epochs by Lightning."""

    def __init__(self):
        super().__init__()
        self.epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_a_sampler_knows_the_epoch_that_it_was_told():
    told, one = Told(), DistributedSampler(range(32), num_replicas=1, rank=0, shuffle=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Drawing draws")
        for sampler in told, one:
            fit(Noting(), Drawing((20,)), loader=marked(sampler=sampler, num_workers=2), max_epochs=1)
            assert sampler.epoch == 0
