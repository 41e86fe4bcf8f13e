"""Averages of a fit in which something is not finite: weights of a step, snapshots, scores."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_reg import SoupAverager
from lightning_reg.averaging.model_soups._gathered import Ingredient, MovingAverage, RunningMean
from lightning_reg.engine.weights.finite import all_finite, chosen_if, chosen_on_device
from lightning_reg.functional import load_averaged, make_soup
from tests.averaging.test_model_soups import (
    PARAMETERS,
    Passing,
    Rows,
    User,
    ema_by_hand,
    fit,
    mean_of,
    near,
    pytestmark,
    weights_of,
)

__all__ = ["pytestmark"]

NAN = math.nan


class Spoil(Callback):
    """Weights are not finite between some steps; stands before the averager."""

    def __init__(self, steps, value=NAN, name="last.bias"):
        self.steps, self.value, self.name = steps, value, name
        self.before = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            weight = pl_module.get_parameter(self.name)
            self.before = weight.detach().clone()
            weight.data[0] = self.value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.before is not None:
            pl_module.get_parameter(self.name).data.copy_(self.before)
            self.before = None


def all_but(items, *numbers):
    return [item for number, item in enumerate(items, 1) if number not in numbers]


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("options", "bad", "expected"),
    [
        ({"method": "ema", "decay": 0.8}, (5, 6), lambda p: ema_by_hand(all_but(p.steps, 5, 6), 0.8)),
        ({"method": "ema", "decay": 0.8}, (1, 2), lambda p: ema_by_hand(p.steps[2:], 0.8)),
        (
            {"method": "ema", "decay": 0.9, "warmup_steps": 6},
            (3, 4, 8),
            lambda p: ema_by_hand(all_but(p.steps, 3, 4, 8), 0.9, 6),
        ),
        ({"method": "swa"}, (1, 7), lambda p: mean_of(all_but(p.steps, 1, 7))),
        ({"method": "uniform", "every_n_steps": 1}, (1, 7), lambda p: mean_of(all_but(p.steps, 1, 7))),
        ({"method": "lawa", "last_k": 3, "every_n_steps": 1}, (11,), lambda p: mean_of(all_but(p.steps, 11)[-3:])),
    ],
)
def test_updates_that_are_not_finite_are_left_out_and_counted(options, bad, expected, value):
    passing, rows, soup = Passing(), Rows(), SoupAverager(**options)
    with pytest.warns(UserWarning, match=r"SoupAverager: \d \w+ of the weights were not finite, and are left out") as w:
        _, model = fit(passing, Spoil(bad, value), soup, logger=rows)
    assert sum("not finite" in str(warning.message) for warning in w) == 1
    near(weights_of(model), expected(passing), PARAMETERS, rtol=1e-5, atol=1e-7)  # float32 updates
    assert soup._soup.gathered.left_out.read() == len(bad)
    logged = [row["reg/model_soups/not_finite"] for _, row in rows.rows if "reg/model_soups/not_finite" in row]
    assert logged == [float(sum(b <= step for b in bad)) for step in range(1, 13)]


def test_the_count_and_the_average_go_on_from_a_checkpoint(tmp_path):
    def make():
        return SoupAverager(method="ema", decay=0.9, warmup_steps=8)

    with pytest.warns(UserWarning, match="not finite"):
        trainer, _ = fit(Spoil((2, 3)), make(), epochs=1, shuffle=False)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, passing = make(), Passing()
    with pytest.warns(UserWarning, match="not finite"):
        _, model = fit(passing, resumed, ckpt=tmp_path / "one.ckpt", shuffle=False)
    with pytest.warns(UserWarning, match="not finite"):
        whole = fit(Spoil((2, 3)), make(), shuffle=False)[1]
    near(weights_of(model), weights_of(whole), PARAMETERS)
    assert resumed._soup.gathered.left_out.read() == 2
    assert resumed._soup.gathered.taken == 10


def test_a_fit_without_one_finite_snapshot_keeps_its_weights():
    soup = SoupAverager(method="uniform", every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, model = fit(Spoil(range(1, 13)), soup)
    assert any("ended before the first finite snapshot" in str(w.message) for w in caught)
    assert model.last.bias[0].isnan()
    assert soup.ingredients == []


class SpoilStatistics(Callback):
    """One batch overflows: running statistics are not finite any more, while weights go on."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            pl_module.norm.running_mean[0] = NAN


@pytest.mark.parametrize("method", ["ema", "swa", "uniform"])
def test_batch_statistics_that_are_spoiled_for_good_stop_no_average(method):
    passing, soup = Passing(), SoupAverager(method=method, every_n_steps=1)
    _, model = fit(SpoilStatistics(), passing, soup, model=User(norm=True), validate=False)
    expected = ema_by_hand(passing.steps, 0.999) if method == "ema" else mean_of(passing.steps)
    near(weights_of(model), expected, PARAMETERS, rtol=1e-5, atol=1e-7)
    assert model.norm.running_mean.isfinite().all()
    assert soup._soup.gathered.taken == 12


# -- complex parameters -----------------------------------------------------------------------------------------------


class Spectral(User):
    """With a complex parameter."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(4, dtype=torch.cfloat))

    def forward(self, x):
        return super().forward(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6))


@pytest.mark.parametrize("method", ["swa", "uniform", "ema", "lawa"])
def test_complex_parameters_keep_their_imaginary_part(method):
    passing = Passing()
    _, model = fit(
        passing, SoupAverager(method=method, every_n_steps=1, last_k=12 if method == "lawa" else None), model=Spectral()
    )
    values = [w["filter"].to(torch.complex128) for w in passing.steps]
    expected = torch.stack(values).mean(0)
    if method == "ema":
        expected = values[0]
        for value in values[1:]:
            expected = 0.999 * expected + 0.001 * value
    assert expected.imag.abs().max() > 1e-6
    torch.testing.assert_close(model.filter.detach(), expected, check_dtype=False, rtol=1e-5, atol=1e-7)


# -- without a host sync ----------------------------------------------------------------------------------------------


def awkward_tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 4, generator=generator).T,
        torch.randn((), generator=generator),
        torch.zeros(0, 3),
        torch.randn(3, generator=generator).half(),
        torch.randn(3, generator=generator).bfloat16(),
        torch.randn(3, generator=generator).double(),
        torch.complex(torch.randn(3, generator=generator), -torch.zeros(3)),
        torch.tensor([-0.0, 1e-45, 3e38]),
    ]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).tolist() if tensor.dim() else tensor.item()


@pytest.mark.parametrize("function", [chosen_if, chosen_on_device])
def test_the_choice_is_to_the_last_bit_and_nan_leaves_no_trace(function):
    good = awkward_tensors()
    bad = [torch.full_like(tensor, NAN) for tensor in good]
    zeros = [torch.zeros_like(tensor) for tensor in good]
    for values, others, holds, wanted in [
        (good, bad, True, good),
        (bad, good, False, good),
        (bad, None, False, zeros),
        (good, None, True, good),
    ]:
        chosen = function(torch.tensor(holds), values, others)
        assert [c.dtype for c in chosen] == [w.dtype for w in wanted]
        assert [bits(c) for c in chosen] == [bits(w) for w in wanted]


def test_finite_is_asked_of_all_types_and_large_halves():
    assert all_finite(awkward_tensors()[:-1])
    assert all_finite([torch.full((100,), 6e4, dtype=torch.float16)])  # their norm is beyond float16
    assert all_finite([])
    for position, tensor in enumerate(awkward_tensors()):
        if tensor.numel():
            spoiled = awkward_tensors()
            spoiled[position] = torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 0, math.inf, tensor)
            assert not all_finite(spoiled[: max(position + 1, 3)])


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_the_way_without_a_host_sync_is_that_with_one(warmup_steps, monkeypatch):
    def run():
        generator, average, mean = (
            torch.Generator().manual_seed(0),
            MovingAverage(0.9, warmup_steps),
            RunningMean(on_cpu=False, with_names=False),
        )
        for step in range(10):
            weights = {"w": torch.randn(4, generator=generator), "h": torch.randn(3, generator=generator).half()}
            if step in (2, 4):
                weights["h"][1] = NAN
            for collector in (average, mean):
                collector.take(Ingredient("", step), weights)
        return [{**c.average()} for c in (average, mean)], average.taken, mean.taken

    here = run()
    monkeypatch.setattr("lightning_reg.averaging.model_soups._gathered.chosen_if", chosen_on_device)
    there = run()
    assert here[1:] == there[1:] == (8, 8)
    for one, two in zip(here[0], there[0], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


# -- scores -----------------------------------------------------------------------------------------------------------


class WithNaN(User):
    """The metric is NaN in some epochs."""

    def __init__(self, bad, lr=0.5):
        super().__init__(lr)
        self.bad = bad

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.trainer.current_epoch in self.bad:
            self.log("score", NAN)
        else:
            self.log("score", self.val_losses[-1])


@pytest.mark.parametrize("greedy_at", ["end", "snapshot"])
@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1), (3,)])
def test_a_snapshot_with_nan_for_a_score_ranks_last_and_is_never_taken(greedy_at, bad):
    passing, soup = Passing(), SoupAverager(monitor="score", mode="min", greedy_at=greedy_at)
    with pytest.warns(UserWarning, match=r"SoupAverager: the score of epoch=00\d.* is NaN, which ranks last"):
        fit(passing, soup, model=WithNaN(bad), epochs=4)
    assert soup.score == soup.score
    good = [w for epoch, w in enumerate(passing.epochs) if epoch not in bad]
    assert not {f"epoch={epoch:03d}" for epoch in bad} & {name[:9] for name in soup.ingredients}
    assert len(soup.trace) == 4
    refused = [c.name[:9] for c in soup.trace if c.own_score != c.own_score]
    assert refused == [f"epoch={epoch:03d}" for epoch in bad]
    assert not any(c.accepted for c in soup.trace if c.own_score != c.own_score)
    assert soup.ingredients
    assert len(good) == 4 - len(bad)


@pytest.mark.parametrize("greedy_at", ["end", "snapshot"])
def test_a_fit_whose_scores_are_all_nan_ends_with_its_own_weights(greedy_at, tmp_path):
    passing = Passing()
    soup = SoupAverager(
        monitor="score",
        mode="min",
        greedy_at=greedy_at,
        **({} if greedy_at == "snapshot" else {"keep": "disk", "dirpath": str(tmp_path)}),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, model = fit(passing, soup, model=WithNaN(range(9)))
    said = [str(w.message) for w in caught]
    assert any("no snapshot has a score that is a number: the module keeps its weights" in text for text in said)
    assert sum("is NaN, which ranks last" in text for text in said) == 1
    near(weights_of(model), passing.steps[-1])
    assert soup.score is None
    assert soup.ingredients == [] or greedy_at == "end"
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_nan_for_a_score_is_not_taken(tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        torch.save({"w": torch.tensor([value, 0.0])}, tmp_path / f"{name}.pt")
    paths = [str(tmp_path / f"{name}.pt") for name in "abc"]
    score = lambda state: NAN if float(state["w"][0]) == 1.0 else -abs(float(state["w"][0]) - 2.6)  # noqa: E731
    with pytest.warns(UserWarning, match=r"make_soup: the score of .*a.pt is NaN"):
        soup = make_soup(paths, "greedy", score, out=tmp_path / "soup.ckpt", check_ancestry=False)
    assert soup.ingredients == [paths[1], paths[2]]
    assert soup.state_dict["w"].tolist() == [2.5, 0.0]
    assert [(c.name, c.accepted) for c in soup.trace] == [(paths[1], True), (paths[2], True), (paths[0], False)]
    assert load_averaged(tmp_path / "soup.ckpt")["w"].tolist() == [2.5, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="no file has a score that is a number"):
            make_soup(paths, "greedy", lambda state: NAN, check_ancestry=False)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_record_that_counts_nothing_is_no_average(tmp_path):
    state = {"method": "uniform", "soup": {}, "gathered": {"count": 0, "sums": {"w": torch.ones(2)}, "ingredients": []}}
    content = {"state_dict": {"w": torch.ones(2)}, "callbacks": {"SoupAverager": state}}
    torch.save({**content, "lightning_reg": {"SoupAverager": {"averaged": False}}}, tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError) as raised:
        load_averaged(tmp_path / "x.ckpt")
    assert str(raised.value) == f"{tmp_path / 'x.ckpt'}: SoupAverager: there is no average yet."
