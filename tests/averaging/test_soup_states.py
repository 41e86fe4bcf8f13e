"""States that give no average of these weights: of another technique, of other shapes, not finite, none at all."""

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_reg import ELRCallback, SoupAverager
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import load_averaged
from tests.averaging.test_model_soups import fit, pytestmark

__all__ = ["pytestmark"]

EMA = {"method": "ema", "soup": {}}
BROKEN = [
    (None, "it is no state of a SoupAverager"),
    (3, "it is no state of a SoupAverager"),
    ({"targets": torch.ones(3)}, "it is no state of a SoupAverager"),
    ({**EMA, "gathered": 3}, "it is no state of a SoupAverager"),
    ({**EMA, "gathered": {"average": [1]}}, "it holds a list in place of weights"),
    ({**EMA, "gathered": {"average": {"w": 3}}}, "'w' in it is no tensor that can be averaged"),
    ({**EMA, "gathered": {"average": {"w": torch.ones(2, dtype=torch.long)}}}, "'w' in it is no tensor that can"),
    ({**EMA, "gathered": {"average": {"w": torch.ones(3)}}}, r"'w' in it has the shape \(3,\), and the weight has \(2"),
    ({**EMA, "gathered": {"average": {"w": torch.tensor([1.0, math.nan])}}}, "'w' in it is not finite"),
    ({**EMA, "soup": {"w": torch.tensor([1.0, math.inf])}, "gathered": {}}, "'w' in it is not finite"),
    ({**EMA, "gathered": {"average": {"v": torch.ones(2)}}}, r"none of its weights is in the file: \['v'\]"),
    ({**EMA, "gathered": {"sums": {"w": torch.ones(2)}, "count": -1}}, "it counts -1 weights"),
    ({**EMA, "gathered": {"sums": {"w": torch.ones(2)}}}, "is broken: KeyError: 'count'"),
    ({**EMA, "gathered": {"ingredients": [3], "folder": None, "weights": []}}, "is broken: TypeError"),
    ({**EMA, "gathered": {"weights": [{"w": torch.ones(3)}]}}, r"'w' in it has the shape \(3,\)"),
]


@pytest.mark.parametrize(("state", "sentence"), BROKEN)
def test_a_state_that_gives_no_average_is_refused_by_name(state, sentence, tmp_path):
    content = {"state_dict": {"w": torch.zeros(2)}, "callbacks": {"SoupAverager": state}}
    torch.save({**content, "lightning_reg": {"SoupAverager": {"averaged": False}}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=rf"x.ckpt: the state of SoupAverager .*{sentence}"):
        load_averaged(tmp_path / "x.ckpt")


@pytest.mark.parametrize("record", [3, "x", [1], {"SoupAverager": 3}, {"SoupAverager": {}}])
def test_a_broken_record_is_no_average(record, tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(2)}, "lightning_reg": record}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x.ckpt: what it says of an average is broken"):
        load_averaged(tmp_path / "x.ckpt")


def test_a_checkpoint_without_callbacks_gives_no_average(tmp_path):
    content = {"state_dict": {"w": torch.zeros(2)}, "lightning_reg": {"SoupAverager": {"averaged": False}}}
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="the state of SoupAverager gives no average: it is no state of a"):
        load_averaged(tmp_path / "x.ckpt")


# -- at resume --------------------------------------------------------------------------------------------------------


def saved(folder, *callbacks, change=lambda checkpoint: None):
    trainer, _ = fit(*callbacks, epochs=1)
    trainer.save_checkpoint(folder / "x.ckpt")
    checkpoint = torch.load(folder / "x.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "x.ckpt")
    return folder / "x.ckpt"


def put(name, value):
    def change(checkpoint):
        checkpoint["callbacks"]["SoupAverager"]["gathered"]["average"][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("last.bias", torch.full((3,), math.nan)), "'last.bias' in it is not finite"),
        (put("last.bias", torch.ones(4)), r"'last.bias' in it has the shape \(4,\), and the weight has \(3,\)"),
        (put("other.bias", torch.ones(4)), "'other.bias' is held in it, and not averaged here"),
        (lambda c: c["callbacks"].update(SoupAverager={"targets": torch.ones(2)}), "it is no state of a SoupAverager"),
    ],
)
def test_a_state_that_cannot_be_gone_on_with_is_refused(change, sentence, tmp_path):
    path = saved(tmp_path, SoupAverager(method="ema", decay=0.8), change=change)
    with pytest.raises(MisconfigurationException, match=f"the checkpoint's state cannot be gone on with: {sentence}"):
        fit(SoupAverager(method="ema", decay=0.8), ckpt=path)


def test_another_choice_of_weights_at_resume_is_refused(tmp_path):
    path = saved(tmp_path, SoupAverager(method="ema", decay=0.8, exclude="last.*"))
    with pytest.raises(MisconfigurationException, match=r"'last.bias' is averaged here, and not held in it\. Are"):
        fit(SoupAverager(method="ema", decay=0.8), ckpt=path)


def test_what_starts_anew_in_the_middle_is_said(tmp_path):
    path = saved(tmp_path, SoupAverager(method="ema", decay=0.8, name="one"))
    sentence = (
        r"SoupAverager and ELRCallback start anew in the middle of this training: the checkpoint, of step 4, holds"
        r" nothing of their state, but of \['SoupAverager\[one\]'\]"
    )
    with pytest.warns(UserWarning, match=sentence):
        fit(SoupAverager(method="ema", decay=0.8), ELRCallback(num_classes=3), ckpt=path, epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* anew in the middle")
        fit(SoupAverager(method="ema", decay=0.8, name="one"), ckpt=path, epochs=2)


class Late(SoupAverager):
    """Has no state in its first epoch."""

    def state_dict(self):
        return super().state_dict() if self._steps > 4 else {}


def test_a_state_that_was_empty_is_none_that_is_missing(tmp_path):
    path = tmp_path / "epoch=0.ckpt"
    fit(Late(method="ema", decay=0.8), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), epochs=1)
    assert torch.load(path, weights_only=True)["callbacks"]["Late"] == {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* anew in the middle")
        fit(Late(method="ema", decay=0.8), ckpt=path, epochs=2)


def test_before_the_first_step_nothing_starts_anew(tmp_path):
    trainer, _ = fit(epochs=0)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* anew in the middle")
        fit(SoupAverager(method="ema", decay=0.8), ckpt=tmp_path / "x.ckpt", epochs=1)
