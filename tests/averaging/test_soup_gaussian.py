"""SoupAverager(method="gaussian"): epochs around one of them, what is trained beside the module as well."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_reg import MetricLoss, NMSparsity, SoupAverager
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import gaussian_epoch_weights, load_averaged
from tests.toys import QUIET, Callback, Classifier, fit, make_loader, make_trainer, same_weights, weights_of

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]


class Ends(Callback):
    """The weights at the end of each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({name: value.double() for name, value in weights_of(pl_module).items()})


def mean_by_hand(ends, mean, std):
    shares = [math.exp(-((t - mean) ** 2) / (2 * std**2)) for t in range(1, len(ends) + 1)]
    return {
        name: (sum(s * end[name] for s, end in zip(shares, ends, strict=True)) / sum(shares)).float()
        for name in ends[0]
    }


def averager(mean=3.0, std=1.0, **options):
    return SoupAverager(method="gaussian", mean_epoch=mean, std_epochs=std, **options)


# -- the weights ------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_paper():
    narrow = gaussian_epoch_weights(20, 15, 1)
    assert narrow.sum().item() == pytest.approx(1.0)
    assert narrow[14].item() == pytest.approx(0.3989, abs=1e-4)  # 1 / sqrt(2 pi)
    assert narrow[19].item() == pytest.approx(1.5e-6, abs=1e-7)

    def effective(*arguments):
        return 1 / gaussian_epoch_weights(*arguments).square().sum().item()

    settings = ((20, 15, 1), (20, 6, 10), (50, 30, 30), (50, 45, 5))
    assert [round(effective(*setting), 1) for setting in settings] == [3.5, 18.8, 49.3, 14.1]


def test_in_the_limits_it_is_one_epoch_or_the_mean():
    assert gaussian_epoch_weights(5, 2, 1e-3).tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(gaussian_epoch_weights(5, 2, 1e6), torch.full((5,), 0.2, dtype=torch.float64))
    for arguments, name in (((0, 1, 1), "epochs"), ((3, 1, 0), "std")):
        with pytest.raises(ValueError, match=f"gaussian_epoch_weights: `{name}` must be"):
            gaussian_epoch_weights(*arguments)


# -- in a fit ---------------------------------------------------------------------------------------------------------


def test_the_module_ends_with_the_weighted_mean_of_its_epochs():
    model, ends, soup = Classifier(), Ends(), averager()
    fit(model, ends, soup, max_epochs=4)
    torch.testing.assert_close(weights_of(model), mean_by_hand(ends.weights, 3, 1), atol=1e-7, rtol=0.0)
    assert len(soup.ingredients) == 4
    assert same_weights({n: w.double() for n, w in soup.raw_weights.items()}, ends.weights[-1])


class Stop(Callback):
    """Ends a fit after two epochs."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1


def test_a_fit_that_ends_early_has_the_mean_of_what_there_was():
    model, ends = Classifier(), Ends()
    fit(model, ends, averager(), Stop(), max_epochs=4)
    torch.testing.assert_close(weights_of(model), mean_by_hand(ends.weights, 3, 1), atol=1e-7, rtol=0.0)
    assert len(ends.weights) == 2
    model, ends = Classifier(), Ends()
    with pytest.warns(UserWarning, match="the fit ended after epoch 2, and epochs around 15 .*: the module keeps"):
        fit(model, ends, averager(15.0), Stop(), max_epochs=20)
    assert same_weights({n: w.double() for n, w in weights_of(model).items()}, ends.weights[-1])


def test_a_resumed_fit_is_the_uninterrupted_one_and_its_checkpoint_gives_the_average(tmp_path):
    whole, ends = Classifier(), Ends()
    fit(whole, ends, averager(), max_epochs=4)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Classifier(), averager(), saving, Stop(), max_epochs=4, enable_checkpointing=True)
    resumed = Classifier(seed=5)
    trainer = make_trainer(callbacks=[averager()], max_epochs=4)
    trainer.fit(resumed, make_loader(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=False)
    assert same_weights(whole, resumed)
    found = load_averaged(tmp_path / "epoch=1.ckpt")
    torch.testing.assert_close(found, mean_by_hand(ends.weights[:2], 3, 1), atol=1e-7, rtol=0.0)


def test_half_precision_weights_are_averaged_in_more():
    class Half(Classifier):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Parameter(torch.randn(1000).half(), requires_grad=False)

    model = Half()
    first = model.frozen.clone()
    fit(model, averager(), max_epochs=4)
    assert torch.equal(model.frozen, first)


def test_beside_sparsity_the_average_is_of_dense_weights_and_sparse_at_the_end():
    model, ends, soup = Classifier(), Ends(), averager()
    fit(model, NMSparsity(2, 4, layers=["net.3"]), ends, soup, max_epochs=4)
    dense = mean_by_hand(ends.weights, 3, 1)
    kept = model.state_dict()["net.3.weight"] != 0
    assert kept.sum() == kept.numel() / 2
    torch.testing.assert_close(weights_of(model)["net.3.weight"], dense["net.3.weight"] * kept, atol=1e-7, rtol=0.0)
    torch.testing.assert_close(weights_of(model)["net.0.weight"], dense["net.0.weight"], atol=1e-7, rtol=0.0)


class Proxies(nn.Module):
    """A metric loss with weights of its own."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 8))

    def forward(self, embeddings, labels):
        return F.cross_entropy(embeddings @ self.rows.T, labels)


def test_what_is_trained_beside_the_module_is_averaged_with_it(tmp_path):
    class Watched(Ends):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            self.weights[-1]["own"] = metric.own["criterion"].rows.detach().double().clone()

    metric = MetricLoss("net.0", f"{__name__}.Proxies")
    ends, soup, model = Watched(), averager(), Classifier()
    trainer = fit(model, metric, ends, soup, max_epochs=4)
    wanted = mean_by_hand(ends.weights, 3, 1)
    torch.testing.assert_close(metric.own["criterion"].rows.detach(), wanted.pop("own"), atol=1e-7, rtol=0.0)
    torch.testing.assert_close(weights_of(model), wanted, atol=1e-7, rtol=0.0)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert load_averaged(tmp_path / "end.ckpt").keys() == wanted.keys()
    assert "MetricLoss/criterion.rows" in soup.raw_weights


def test_it_is_refused_where_it_would_average_nothing():
    with pytest.raises(MisconfigurationException, match=r"mean_epoch=9\) lies beyond the last epoch .*max_epochs=2"):
        fit(Classifier(), averager(9.0))
    for options, words in (
        ({"method": "gaussian"}, "needs `mean_epoch` and `std_epochs`"),
        ({"method": "ema", "mean_epoch": 3.0}, "for method='gaussian' only"),
        ({"method": "gaussian", "mean_epoch": 3.0, "std_epochs": 0.0}, "`std_epochs` must be"),
        ({"method": "gaussian", "mean_epoch": 0.5, "std_epochs": 1.0}, "`mean_epoch` must be"),
        ({"method": "gaussian", "mean_epoch": 3.0, "std_epochs": 1.0, "every_n_steps": 2}, "`every_n_steps` is not"),
    ):
        with pytest.raises(ValueError, match=words):
            SoupAverager(**options)
    assert averager().describe() == "gaussian: every epoch, around epoch 3 (std 1), loaded at the end"
