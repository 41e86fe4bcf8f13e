"""Hooks of the step that a technique does not override are not called."""

from lightning.pytorch import Callback

from lightning_reg.engine.host.lightning import STEP_HOOKS, IdleHooks


class Ends(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


def test_only_what_is_overridden_is_called_until_it_is_undone():
    ends, plain = Ends(), Callback()
    idle = IdleHooks([ends, plain])
    again = IdleHooks([ends])  # as for a second fit while the first is on: there is nothing left to do
    assert [hook for hook in STEP_HOOKS if getattr(ends, hook) is not None] == ["on_train_batch_end"]
    assert not any(getattr(plain, hook) for hook in STEP_HOOKS)
    assert callable(plain.on_train_start)
    again.undo()
    assert ends.on_before_backward is None
    for _ in range(2):
        idle.undo()
        assert all(callable(getattr(callback, hook)) for callback in (ends, plain) for hook in STEP_HOOKS)
        assert not vars(ends)
        assert not vars(plain)
