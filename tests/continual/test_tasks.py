"""What counts as a task where the datamodule numbers its tasks: `current_task` decides, not the fit."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import EWC, FeatureDistillation, L2ToStart, PredictionDistillation
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.conformance.harness import difference
from tests.toys import BATCH, CLASSES, INPUTS, QUIET, Boom, BoomError, Callback, Classifier, make_trainer, same_weights

pytestmark = QUIET

NEW_CLASSES = [CLASSES, 0, 0]
WITHIN_A_FIT = {  # those that need no data of a task when it ends
    "L2 to the start": partial(L2ToStart, 0.3),
    "L2 to the end": partial(L2ToStart, 0.3, anchor="end_of_task"),
    "outputs, BCE": partial(PredictionDistillation, new_classes=NEW_CLASSES),
    "outputs, softmax": partial(PredictionDistillation, "softmax", new_classes=NEW_CLASSES),
    "features": partial(FeatureDistillation, "net.1", 0.3),
    "features at the start": partial(FeatureDistillation, "net.1", 0.3, anchor="start_of_fit"),
}
MAKES = {"EWC": partial(EWC, 4.0), "EWC, online": partial(EWC, 4.0, memory="online"), **WITHIN_A_FIT}
every = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
every_within = pytest.mark.parametrize("make", WITHIN_A_FIT.values(), ids=WITHIN_A_FIT.keys())


def task(number, size=24):
    x = torch.randn(size, INPUTS, generator=torch.Generator().manual_seed(number))
    return DataLoader(TensorDataset(x, (x[:, :CLASSES] + (number % 2) * x[:, 3:]).argmax(1)), BATCH)


class Tasks(LightningDataModule):
    def __init__(self, current_task=0):
        super().__init__()
        self.current_task = current_task

    def train_dataloader(self):
        return task(int(self.current_task))


def learn(module, technique, data, *callbacks, epochs=1, path=None, **options):
    trainer = make_trainer(callbacks=[*callbacks, technique], max_epochs=epochs, **options)
    resume = {} if path is None else {"ckpt_path": path, "weights_only": True}
    trainer.fit(module, **({"datamodule": data} if isinstance(data, Tasks) else {"train_dataloaders": data}), **resume)
    return trainer


def kept(technique):
    """What is kept of finished tasks, without the numbers of tasks."""
    state = technique.state_dict()
    left = state.pop("left", None)
    return state if left is None else left


def in_two_tasks(make):
    """Two fits of two epochs without numbers; other tests compare these with loops by hand."""
    module, technique = Classifier(), make()
    for number in (0, 1):
        learn(module, technique, task(number), epochs=2)
    return module, technique


def assert_same(one, two):
    (module, technique), (other, second) = one, two
    assert same_weights(module, other)
    assert technique.tasks == second.tasks == 2
    for name in ("slots", "teacher", "rows", "columns"):
        assert not difference(kept(technique).get(name), kept(second).get(name)), name


@every
def test_fits_of_the_same_number_are_one_task(make):
    module, technique = Classifier(), make()
    for number in (0, 0, 1, 1):
        learn(module, technique, Tasks(number))
        assert technique.tasks == number + 1
    assert_same((module, technique), in_two_tasks(make))


@every
def test_one_trainer_for_all_fits(make):
    module, technique, data = Classifier(), make(), Tasks()
    trainer = make_trainer(callbacks=[technique], max_epochs=0, reload_dataloaders_every_n_epochs=1)
    for number in (0, 0, 1, 1):
        data.current_task = number
        trainer.fit_loop.max_epochs += 1
        trainer.fit(module, datamodule=data)
    assert_same((module, technique), in_two_tasks(make))


class Number(Callback):
    """Sets the task's number when an epoch begins."""

    def __init__(self, numbers, path=None):
        self.numbers, self.path = numbers, path

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.datamodule.current_task = self.numbers[trainer.current_epoch]

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path is not None:
            trainer.save_checkpoint(self.path / f"{trainer.current_epoch}.ckpt")
        if trainer.current_epoch + 1 < len(self.numbers):  # the next epoch's loader is made before it begins
            trainer.datamodule.current_task = self.numbers[trainer.current_epoch + 1]


@every_within
def test_a_number_that_changes_between_epochs_is_a_new_task(make):
    module, technique = Classifier(), make()
    learn(module, technique, Tasks(), Number([0, 0, 1, 1]), epochs=4, reload_dataloaders_every_n_epochs=1)
    assert_same((module, technique), in_two_tasks(make))


@pytest.mark.parametrize("memory", ["separate", "online"])
def test_the_fisher_information_is_refused_a_number_that_changes_between_epochs(memory):
    module = Classifier()
    with pytest.raises(
        MisconfigurationException, match=r"^EWC: `datamodule.current_task` was 0 and is 1 within one fit.* Fit once for"
    ):
        learn(module, EWC(memory=memory), Tasks(), Number([0, 0, 1, 1]), epochs=4)
    assert module.trainer.global_step == 6  # in the first step that sees it


class Save(Callback):
    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("fits", [(0, 0), (0, 0, 1, 1)])
@every
def test_a_fit_of_a_numbered_task_resumes_exactly(make, fits, tmp_path):
    path, module, technique = tmp_path / "half.ckpt", Classifier(), make()
    for number in fits[:-1]:
        learn(module, technique, Tasks(number))
    learn(module, technique, Tasks(fits[-1]), Save(path, 3), epochs=2)
    other, resumed = Classifier(seed=4), make()
    learn(other, resumed, Tasks(fits[-1]), epochs=2, path=path)
    assert same_weights(other, module)
    assert resumed.tasks == technique.tasks == fits[-1] + 1
    assert not difference(resumed.state_dict(), technique.state_dict())
    for net, tie in ((module, technique), (other, resumed)):
        learn(net, tie, Tasks(fits[-1]))
        learn(net, tie, Tasks(2))
    assert same_weights(other, module)


@pytest.mark.parametrize("epoch", [1, 2])
@every_within
def test_a_fit_with_tasks_in_it_resumes_exactly(make, epoch, tmp_path):
    options = {"epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    module, technique = Classifier(), make()
    learn(module, technique, Tasks(), Number([0, 0, 1, 1], tmp_path), **options)
    other, resumed, numbers = Classifier(seed=4), make(), [0, 0, 1, 1]
    data = Tasks(numbers[epoch + 1])
    learn(other, resumed, data, Number(numbers), path=tmp_path / f"{epoch}.ckpt", **options)
    assert_same((module, technique), (other, resumed))


def test_a_fit_of_a_numbered_task_resumes_with_a_loader_alone(tmp_path):
    path, module, tie = tmp_path / "half.ckpt", Classifier(), L2ToStart(0.3)
    learn(module, tie, Tasks())
    learn(module, tie, Tasks(), Save(path, 3), epochs=2)
    other, resumed = Classifier(seed=4), L2ToStart(0.3)
    learn(other, resumed, task(0), epochs=2, path=path)
    assert same_weights(other, module)
    assert resumed.tasks == tie.tasks == 1


def test_the_fisher_information_is_refused_a_task_that_a_checkpoint_leaves_open(tmp_path):
    learn(Classifier(), EWC(), Tasks(), Save(tmp_path / "open.ckpt", 3))
    with pytest.raises(MisconfigurationException, match=r"EWC: `datamodule.current_task` was 0 and is 1"):
        learn(Classifier(), EWC(), Tasks(1), epochs=2, path=tmp_path / "open.ckpt")


@every
def test_a_further_fit_that_fails_leaves_what_the_one_before_left(make):
    module, technique = Classifier(), make()
    learn(module, technique, Tasks())
    before = copy.deepcopy(technique.state_dict())
    with pytest.raises(BoomError):
        learn(Classifier(step=Boom()), technique, Tasks())
    learn(module, technique, Tasks(), fast_dev_run=True)
    learn(module, technique, Tasks(), epochs=0)
    assert technique.tasks == 1
    assert not difference(technique.state_dict(), before)


def test_without_a_number_a_fit_is_a_task():
    tie, module, data = L2ToStart(0.3, anchor="end_of_task"), Classifier(), Tasks()
    trainer = make_trainer(callbacks=[tie], max_epochs=1)
    trainer.fit(module, datamodule=data)
    for finished in (2, 3):
        trainer.fit_loop.max_epochs += 1
        trainer.fit(module, task(0))  # `trainer.datamodule` is that of the first fit still
        assert tie.tasks == finished


@pytest.mark.parametrize(
    ("same", "finished"),
    [
        ((1, np.int64(1)), 1),
        ((1, torch.tensor(1)), 1),
        (("1", np.str_("1")), 1),
        ((1, 2), 2),
        ((None, None), 2),
        ((lambda: 1, [1]), 2),  # neither a number nor a name
    ],
)
def test_what_a_number_is(same, finished):
    class Same(Tasks):
        def train_dataloader(self):
            return task(0)

    tie = L2ToStart(0.3)
    for number in same:
        learn(Classifier(), tie, Same(number))
    assert tie.tasks == finished


def test_the_table_says_the_number():
    said = []

    class Table(Callback):
        def on_train_start(self, trainer, pl_module):
            said.extend(c.describe() for c in trainer.callbacks if isinstance(c, EWC))

    ewc = EWC(1.0)
    for number in (0, 0, 1):
        learn(Classifier(), ewc, Tasks(number), Table())
    assert [text.split("; ")[-1] for text in said] == [
        "nothing to tie to in the first task",
        "nothing to tie to in the first task",
        "tasks before: 1, current_task=1",
    ]


@pytest.mark.parametrize(
    "make", [partial(L2ToStart, 0.3), partial(FeatureDistillation, "net.1", 0.3, anchor="start_of_fit")]
)
def test_a_start_that_a_further_fit_goes_on_from_is_of_an_earlier_fit(make):
    technique = make()
    learn(Classifier(), technique, task(0))
    assert not technique.remembers_channels
    learn(Classifier(), technique, Tasks())
    assert technique.remembers_channels
