"""Resume of SoupAverager where Lightning leaves out the end of an epoch or gives it twice, and from files on disk."""

import shutil
from itertools import product

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_reg import SoupAverager
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.averaging.test_model_soups import PARAMETERS, LossOnly, Passing, fit, mean_of, near, pytestmark, weights_of

__all__ = ["pytestmark"]

pytestmark = [*pytestmark, pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")]


class SaveAt(Callback):
    """Saves a checkpoint in one hook of one epoch, after all callbacks that stand before it."""

    def __init__(self, path, hook, epoch=1):
        self.path, self.hook, self.epoch = path, hook, epoch

    def _save(self, trainer, hook):
        if hook == self.hook and trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            self._save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, "epoch")


_BY_EPOCH = [
    {"method": "uniform"},
    {"method": "lawa", "last_k": 3},
    {"method": "ema", "decay": 0.5, "every_n_epochs": 1},
    {"method": "uniform", "every_n_epochs": 2},
]
_BY_SCORE = [
    {"monitor": "val_loss", "mode": "min"},
    {"monitor": "val_loss", "mode": "min", "greedy_at": "snapshot"},
]
_EPOCHS, _STEPS = {"epochs": 4}, {"epochs": -1, "max_steps": 16}
_CASES = [
    *product(_BY_EPOCH + _BY_SCORE, [True], ["batch", "validation", "epoch"], [_EPOCHS, _STEPS]),
    *product(_BY_EPOCH, [False], ["batch"], [_EPOCHS, _STEPS]),
    # With steps and no validation Lightning itself resumes with an epoch of one batch.
    *product(_BY_EPOCH, [False], ["epoch"], [_EPOCHS]),
]


@pytest.mark.parametrize(("options", "validate", "hook", "until"), _CASES)
def test_every_epoch_is_taken_once_wherever_the_checkpoint_was_written(options, validate, hook, until, tmp_path):
    path = tmp_path / "stop.ckpt"
    # The same batches in every epoch: what a resumed loader draws is not tested here.
    fixed = {"validate": validate, "shuffle": False, **until}
    whole, resumed = SoupAverager(**options), SoupAverager(**options)
    _, model = fit(whole, SaveAt(path, hook), **fixed)
    _, again = fit(resumed, ckpt=path, **fixed)
    assert resumed.ingredients == whole.ingredients
    assert resumed._soup.gathered.taken == whole._soup.gathered.taken
    assert resumed.trace == whole.trace
    near(weights_of(again), weights_of(model), PARAMETERS)


def test_the_metric_that_it_has_chosen_itself_counts_after_a_resume(tmp_path):
    """A full soup is not scored again before it decides."""
    whole, resumed = (SoupAverager(greedy_at="snapshot", max_ingredients=1) for _ in range(2))
    _, model = fit(whole, SaveAt(tmp_path / "stop.ckpt", "validation"), model=LossOnly(), epochs=4, shuffle=False)
    _, again = fit(resumed, model=LossOnly(), ckpt=tmp_path / "stop.ckpt", epochs=4, shuffle=False)
    assert [candidate.accepted for candidate in whole.trace[:2]] == [True, True]
    assert resumed.trace == whole.trace
    near(weights_of(again), weights_of(model), PARAMETERS)


def test_a_checkpoint_on_the_last_batch_of_all_gives_the_last_epoch(tmp_path):
    path, passing = tmp_path / "stop.ckpt", Passing()
    fit(passing, SoupAverager(method="uniform"), SaveAt(path, "batch", epoch=2))
    soup = SoupAverager(method="uniform")
    _, model = fit(soup, ckpt=path)
    assert [name[:9] for name in soup.ingredients] == ["epoch=000", "epoch=001", "epoch=002"]
    near(weights_of(model), mean_of(passing.epochs), PARAMETERS)


def test_a_fit_of_a_trainer_that_has_trained_before_makes_up_for_nothing():
    soup = SoupAverager(method="uniform")
    trainer, model = fit(soup, epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, trainer.train_dataloader, trainer.val_dataloaders)
    assert [name[:9] for name in soup.ingredients] == ["epoch=002"]


class KilledError(Exception):
    pass


class Kill(Callback):
    """Ends the fit in an epoch, after its snapshot and before its checkpoint; keeps a copy of all files."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KilledError


def on_disk(folder, **options):
    return SoupAverager(method="lawa", last_k=2, keep="disk", dirpath=str(folder / "soups"), **options)


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_snapshots_on_disk(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, passing = on_disk(tmp_path), Passing()
    fit(passing, whole, epochs=6, shuffle=False)
    with pytest.raises(KilledError):
        fit(on_disk(tmp_path), Kill(4), saver, epochs=6, shuffle=False)
    (files,) = (tmp_path / "soups").iterdir()
    # Those of the last two checkpoints, and what was taken after them.
    assert sorted(file.name[:9] for file in files.iterdir()) == ["epoch=001", "epoch=002", "epoch=003", "epoch=004"]
    resumed = on_disk(tmp_path)
    _, model = fit(resumed, ckpt=tmp_path / "epoch=3.ckpt", epochs=6, shuffle=False)
    assert resumed.ingredients == whole.ingredients
    near(weights_of(model), mean_of(passing.epochs[-2:]), PARAMETERS)
    assert list((tmp_path / "soups").iterdir()) == []


def test_a_resumed_run_that_is_killed_before_its_own_checkpoint_can_be_resumed_again(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.raises(KilledError):
        fit(on_disk(tmp_path), Kill(2), saver, epochs=6, shuffle=False)
    for _ in range(2):
        with pytest.raises(KilledError):
            fit(on_disk(tmp_path), Kill(3), ckpt=tmp_path / "epoch=1.ckpt", epochs=6, shuffle=False)


def test_keep_files_keeps_all_as_the_message_says(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(on_disk(tmp_path), saver, epochs=5)
    with pytest.raises(MisconfigurationException, match=r"`keep_files=True` leaves all"):
        fit(on_disk(tmp_path), ckpt=tmp_path / "epoch=1.ckpt", epochs=5)
    shutil.rmtree(tmp_path / "soups")
    passing = Passing()
    fit(passing, on_disk(tmp_path, keep_files=True), saver, epochs=5, shuffle=False)
    (files,) = (tmp_path / "soups").iterdir()
    assert len(list(files.iterdir())) == 5
    resumed = on_disk(tmp_path)
    _, model = fit(resumed, ckpt=tmp_path / "epoch=1-v1.ckpt", epochs=5, shuffle=False)
    near(weights_of(model), mean_of(passing.epochs[-2:]), PARAMETERS)


def test_snapshots_that_no_checkpoint_names_go_at_once(tmp_path):
    counts = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(len(list((tmp_path / "soups").rglob("*.safetensors"))))

    fit(on_disk(tmp_path), Look(), epochs=5)
    assert counts == [1, 2, 2, 2, 2]
