"""Nothing of the engine is left: after a fit, a second one, and whatever may go wrong."""

import copy
import pickle
import signal

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from typing_extensions import override

from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.loss.lookup import ENGINES
from lightning_reg.engine.run.hooks import FirstHooks
from lightning_reg.engine.technique import BatchTechnique, LossTechnique, PenaltyTechnique
from tests.toys import (
    QUIET,
    BatchShift,
    Boom,
    BoomError,
    Classifier,
    Halve,
    IndexRecorder,
    Penalty,
    ShiftTargets,
    StepLosses,
    Term,
    Watch,
    WeightsByLabel,
    make_loader,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET
EVERYTHING = (IndexRecorder, Watch, Halve, WeightsByLabel, BatchShift, ShiftTargets, Term, Penalty)


def everything():
    return [kind() for kind in EVERYTHING]


class Watched(Classifier):
    """Validation and test steps beside the training step, and a place for what happened."""

    @override
    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    test_step = validation_step


class BoomAt(Callback):
    """Raises in one hook."""

    def __init__(self, hook):
        self.hook = hook
        setattr(self, hook, self._raise)

    def _raise(self, *args, **kwargs):
        raise BoomError(self.hook)


def traces(trainer, module):
    """Everything about module and Trainer that an engine could have changed and that is to be as without one."""
    hooks = {
        (name, attribute): len(getattr(layer, attribute))
        for name, layer in module.named_modules()
        for attribute in vars(layer)
        if attribute.endswith("_hooks")
    }
    return {
        "class": type(module),
        "dict": sorted(module.__dict__),
        "keys": list(module.state_dict()),
        "layers": [(name, type(layer)) for name, layer in module.named_modules()],
        "hooks": hooks,
        "strategy": sorted(trainer.strategy.__dict__),
        "trainer": sorted(trainer.__dict__),
        "grad": torch.is_grad_enabled(),
    }


def check_undone(trainer, module, callbacks, loader):
    """Compares with a fit of the same kind without techniques."""
    plain = make_trainer()
    other = type(module)()
    plain.fit(other, make_loader(), make_loader() if type(module) is Watched else None)
    expected, found = traces(plain, other), traces(trainer, module)
    assert found == expected
    assert trainer.callbacks[: len(callbacks)] == callbacks
    assert not any(isinstance(callback, FirstHooks) for callback in trainer.callbacks)
    assert len(trainer.callbacks) == len(callbacks)
    assert trainer not in ENGINES
    assert trainer.train_dataloader is loader
    assert type(loader) is torch.utils.data.DataLoader
    assert not {"index_tap", "index_source"} & loader.__dict__.keys()


def test_after_a_fit():
    module, callbacks, loader = Watched(), everything(), make_loader()
    trainer = make_trainer(callbacks=list(callbacks))
    trainer.fit(module, loader, make_loader())
    check_undone(trainer, module, callbacks, loader)


def test_after_an_exception_in_a_step():
    callbacks, loader = everything(), make_loader()
    module = Watched()
    module.step = Boom(at=3)
    trainer = make_trainer(callbacks=list(callbacks))
    with pytest.raises(BoomError, match="boom"):
        trainer.fit(module, loader, make_loader())
    check_undone(trainer, module, callbacks, loader)
    assert trainer.global_step == 2


def test_after_an_interrupt_in_a_step():
    callbacks, loader = everything(), make_loader()
    module = Watched()
    module.step = Boom(KeyboardInterrupt, at=3)
    trainer = make_trainer(callbacks=list(callbacks))
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(module, loader, make_loader())
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning turns it off
    check_undone(trainer, module, callbacks, loader)


@pytest.mark.parametrize(
    "hook",
    [
        "on_fit_start",
        "on_sanity_check_start",
        "on_train_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_train_end",
        "teardown",
    ],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_after_an_exception_in_another_callback(hook, place):
    module, loader, boom = Watched(), make_loader(), BoomAt(hook)
    before = weights_of(module)
    callbacks = [boom, *everything()] if place == "first" else [*everything(), boom]
    trainer = make_trainer(callbacks=list(callbacks), num_sanity_val_steps=1 if "sanity" in hook else 0)
    with pytest.raises(BoomError, match=hook):
        trainer.fit(module, loader, make_loader())
    assert trainer not in ENGINES
    assert not {"training_step", "process_dataloader"} & trainer.strategy.__dict__.keys()
    assert trainer.callbacks == callbacks
    assert not any(layer._forward_hooks for layer in module.modules())
    if trainer.global_step == 0:
        assert same_weights(module, before)
    if trainer.train_dataloader is not None:
        assert trainer.train_dataloader is loader


@pytest.mark.parametrize("place", ["first", "last"])
def test_after_an_exception_in_the_setup_of_another_callback(place):
    callbacks = [BoomAt("setup"), *everything()] if place == "first" else [*everything(), BoomAt("setup")]
    trainer = make_trainer(callbacks=list(callbacks))
    with pytest.raises(BoomError, match="setup"):
        trainer.fit(Classifier(), make_loader())
    assert trainer not in ENGINES
    assert not {"training_step", "process_dataloader"} & trainer.strategy.__dict__.keys()
    assert trainer.callbacks == callbacks


@pytest.mark.parametrize("phase", ["transform_batch", "edit_weights", "loss_term", "penalty", "is_active"])
def test_after_an_exception_in_a_technique(phase):
    class Broken(Halve, BatchTechnique, LossTechnique, PenaltyTechnique):
        pass

    def broken(self, *args):
        raise BoomError(phase)

    setattr(Broken, phase, broken)
    module, loader, callbacks = Classifier(), make_loader(), [IndexRecorder(), Halve(), Broken()]
    trainer = make_trainer(callbacks=list(callbacks))
    before = weights_of(module)
    with pytest.raises(BoomError, match=phase):
        trainer.fit(module, loader)
    assert same_weights(module, before)
    check_undone(trainer, module, callbacks, loader)


def test_edited_weights_are_put_back_after_an_exception():
    module = Classifier(step=Boom(at=1))
    before = weights_of(module)
    with pytest.raises(BoomError):
        make_trainer(callbacks=[Halve()]).fit(module, make_loader())
    assert same_weights(module, before)


def test_after_a_refused_setup():
    class Asking(Callback):
        @override
        def setup(self, trainer, pl_module, stage):
            assert trainer.estimated_stepping_batches == 8

    for callbacks in ([Term(), Term()], [Asking(), IndexRecorder()], [Watch("no.such")], [Halve(["no.such"])]):
        trainer = make_trainer(callbacks=list(callbacks))
        with pytest.raises(MisconfigurationException):
            trainer.fit(Classifier(), make_loader())
        assert trainer not in ENGINES
        assert not {"training_step", "process_dataloader"} & trainer.strategy.__dict__.keys()
        assert trainer.callbacks == callbacks


def test_a_second_fit_on_the_same_trainer():
    losses, recorder = StepLosses(), IndexRecorder()
    callbacks, loader = [recorder, Term(), Penalty(), Halve(), losses], make_loader()
    trainer = make_trainer(callbacks=list(callbacks), max_epochs=1)
    module = Watched()
    trainer.fit(module, loader, make_loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader, make_loader())
    check_undone(trainer, module, callbacks, loader)
    at_once = StepLosses()
    other = Watched()
    make_trainer(callbacks=[Term(), Penalty(), Halve(), at_once]).fit(other, make_loader(), make_loader())
    assert losses.losses == at_once.losses
    assert same_weights(module, other)
    assert recorder.indices == [list(range(start, start + 8)) for start in (0, 8, 16, 24)] * 2


def test_a_second_fit_after_an_exception_with_another_module():
    callbacks = everything()
    trainer = make_trainer(callbacks=list(callbacks), max_epochs=1)
    broken = Classifier(step=Boom(at=1))
    with pytest.raises(BoomError):
        trainer.fit(broken, make_loader())
    module, other = Classifier(), Classifier()
    trainer.fit(module, make_loader())
    make_trainer(callbacks=everything(), max_epochs=1).fit(other, make_loader())
    assert same_weights(module, other)
    assert not same_weights(module, Classifier(), atol=1e-3)


def test_fit_then_test_and_validate():
    module, callbacks = Watched(), everything()
    trainer = make_trainer(callbacks=list(callbacks))
    trainer.fit(module, make_loader(), make_loader())
    after = weights_of(module)
    trainer.test(module, make_loader(), verbose=False)
    trainer.validate(module, make_loader(), verbose=False)
    assert same_weights(module, after)
    assert trainer.callbacks == callbacks
    assert "training_step" not in trainer.strategy.__dict__


def test_an_earlier_replacement_by_the_user_stays():
    calls = []
    trainer = make_trainer(callbacks=[Term()], max_steps=3)
    original = trainer.strategy.training_step

    def own(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    trainer.strategy.training_step = own
    trainer.fit(Classifier(), make_loader())
    assert trainer.strategy.training_step is own
    assert len(calls) == 3


def test_functions_of_torch_are_their_own_after_each_step():
    had = F.has_torch_function_variadic, F.handle_torch_function
    seen = []

    class Look(Callback):
        @override
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append((F.has_torch_function_variadic, F.handle_torch_function) == had)

    make_trainer(callbacks=[Term(), Look()]).fit(Classifier(), make_loader())
    assert seen == [True] * 8


def test_callbacks_stay_plain_data_while_they_fit():
    copies = []

    class Copy(Callback):
        @override
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            term = trainer.callbacks[1]
            copies.append((copy.deepcopy(term), pickle.loads(pickle.dumps(term))))

    make_trainer(callbacks=[Term(0.25), Copy()], max_steps=2).fit(Classifier(), make_loader())
    assert [(type(a), a.factor, type(b), b.factor) for a, b in copies] == [(Term, 0.25, Term, 0.25)] * 2
