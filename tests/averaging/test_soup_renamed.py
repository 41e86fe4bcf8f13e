"""Averages of weights that others rename, mask or leave out: pruned and compiled ones, parts of no checkpoint."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch.utils.data import DataLoader

from lightning_reg import SoupAverager, TrainerEvaluation
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import load_averaged, make_soup
from tests.averaging.test_model_soups import User, data, ema_by_hand, fit, near, pytestmark, weights_of

__all__ = ["pytestmark"]


# -- pruned weights ---------------------------------------------------------------------------------------------------


class PassingPruned(Callback):
    """Notes the dense weights after every step, and the mask."""

    def __init__(self):
        self.steps, self.mask = [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = weights_of(pl_module)
        self.mask = state.pop("first.weight_mask", None)
        state["first.weight"] = state.pop("first.weight_orig", state.get("first.weight"))
        self.steps.append(state)


def pruning(model, **options):
    chosen = [(model.first, "weight")]
    rule = {"amount": 0.5, "apply_pruning": lambda epoch: epoch == 0, "use_lottery_ticket_hypothesis": False}
    return ModelPruning("l1_unstructured", parameters_to_prune=chosen, **(rule | options))


def pruned_by_hand(passing):
    expected = ema_by_hand(passing.steps, 0.8)
    return expected | {"first.weight": expected["first.weight"] * passing.mask}


SOUPS = [
    ({"method": "ema", "decay": 0.8}, lambda p: pruned_by_hand(p)["first.weight"]),
    (
        {"method": "swa"},
        lambda p: torch.stack([w["first.weight"].double() for w in p.steps]).mean(0) * p.mask,
    ),
    (
        {"method": "lawa", "last_k": 2, "every_n_steps": 3},
        lambda p: torch.stack([w["first.weight"].double() for w in p.steps[-4::3]]).mean(0) * p.mask,
    ),
]


@pytest.mark.parametrize("keep", ["cpu", "disk"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("options", "expected"), SOUPS)
def test_masks_hold_in_the_average_wherever_pruning_stands(options, expected, first, keep, tmp_path):
    model, passing = User(), PassingPruned()
    soup = SoupAverager(**options, keep=keep, dirpath=str(tmp_path))
    both = [pruning(model), soup] if first else [soup, pruning(model)]
    fit(*both, passing, model=model, validate=keep == "disk")
    assert passing.mask.eq(0).float().mean() == 0.5
    near({"w": model.first.weight}, {"w": expected(passing)}, rtol=1e-5, atol=1e-7)  # float32 updates
    assert model.first.weight[passing.mask == 0].eq(0).all()


def test_a_greedy_soup_scores_its_candidates_pruned():
    model = User()
    soup = SoupAverager(method="greedy", monitor="val_loss", mode="min", strict=False, min_delta=0.0)
    trainer, _ = fit(pruning(model), soup, model=model)
    scores = trainer.validate(model, DataLoader(data(), 12), verbose=False)
    assert scores[0]["val_loss"] == pytest.approx(soup.score, rel=1e-6)


@pytest.mark.parametrize("swap", [True, False])
def test_checkpoints_of_a_pruned_run_give_the_pruned_average(swap, tmp_path):
    model, passing = User(), PassingPruned()
    soup = SoupAverager(method="ema", decay=0.8, swap_for_validation=swap)
    saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=7, save_top_k=-1)
    fit(pruning(model), soup, passing, saver, model=model, max_steps=7)
    near(load_averaged(tmp_path / "last.ckpt"), pruned_by_hand(passing), ["first.weight"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", [True, False])
def test_files_of_a_pruned_run_give_the_pruned_average(first, tmp_path):
    def run(steps, passing, ckpt=None):
        model = User()
        soup = SoupAverager(method="uniform", every_n_steps=2, keep="disk", dirpath=str(tmp_path), keep_files=True)
        saver = ModelCheckpoint(tmp_path, f"{steps}", every_n_train_steps=8, save_top_k=-1)
        rule = pruning(model, apply_pruning=lambda epoch: epoch == 0 and ckpt is None)
        both = [rule, soup] if first else [soup, rule]
        fit(*both, passing, saver, model=model, max_steps=steps, ckpt=ckpt)
        return soup, model

    passing = PassingPruned()
    whole, _ = run(8, passing)  # the mask comes after the fourth step
    expected = torch.stack([w["first.weight"].double() for w in passing.steps[1:8:2]]).mean(0) * passing.mask
    assert (passing.mask == 0).float().mean() == 0.5
    loaded = load_averaged(tmp_path / "8.ckpt")["first.weight"]
    near({"w": loaded}, {"w": expected}, rtol=1e-5, atol=1e-7)
    assert loaded[passing.mask == 0].eq(0).all()
    soup, model = run(12, PassingPruned(), tmp_path / "8.ckpt")  # nobody prunes any more
    assert soup.ingredients[:4] == whole.ingredients
    assert model.first.weight[passing.mask == 0].eq(0).all()


def test_a_swap_that_pruning_would_undo_is_refused():
    model = User()
    with pytest.raises(MisconfigurationException, match="Put ModelPruning before SoupAverager"):
        fit(SoupAverager(method="ema", swap_for_validation=True), pruning(model), model=model)


# -- compiled models --------------------------------------------------------------------------------------------------


def compiled():
    model = User()
    model.first = torch.compile(model.first, backend="eager")
    return model


def test_the_average_of_a_compiled_run_is_for_models_that_are_not(tmp_path):
    trainer, model = fit(SoupAverager(method="ema", decay=0.8, load_at_end=False), model=compiled())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    plain = User()
    plain.load_state_dict(load_averaged(tmp_path / "x.ckpt"), strict=True)
    near(weights_of(plain), trainer.callbacks[0].averaged_weights(), ["first.weight", "first.bias", "last.weight"])
    assert not torch.equal(plain.first.weight, model.first.weight)


def test_a_greedy_soup_is_scored_by_a_compiled_model(tmp_path):
    for seed in (0, 1):
        trainer, _ = fit(model=compiled(), epochs=1 + seed)
        trainer.save_checkpoint(tmp_path / f"{seed}.ckpt")
    scorer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    files = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    results = [
        make_soup(files, "greedy", TrainerEvaluation(scorer, model, "val_loss", DataLoader(data(), 12)), mode="min")
        for model in (compiled(), User())
    ]
    assert results[0].score == results[1].score
    assert results[0].trace == results[1].trace


# -- parts that are in no checkpoint ----------------------------------------------------------------------------------


class Adapter(User):
    """Its first layer is frozen and not in its checkpoints."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        self.first.requires_grad_(False)

    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "first" not in key}


@pytest.mark.parametrize("swap", [True, False])
def test_what_the_users_state_dict_leaves_out_is_no_part_of_the_average_in_a_file(swap, tmp_path):
    model = Adapter()
    options = {"method": "ema", "decay": 0.8, "swap_for_validation": swap}
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(SoupAverager(**options), saver, model=model, epochs=2, shuffle=False)
    average = load_averaged(tmp_path / "epoch=1.ckpt")
    assert sorted(average) == sorted(model.state_dict())
    kept = ("last.weight", "last.bias", "tied.bias")
    near(average, weights_of(model), kept, rtol=1e-6, atol=1e-7)  # the fit ends with it
    resumed, whole = Adapter(), Adapter()
    fit(SoupAverager(**options), model=resumed, ckpt=tmp_path / "epoch=0.ckpt", shuffle=False)
    fit(SoupAverager(**options), model=whole, shuffle=False)
    near(weights_of(resumed), weights_of(whole), kept)
