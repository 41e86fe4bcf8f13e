"""Early-learning regularization."""

import csv
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_reg import ELRCallback
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import elr_loss, elr_regularizer, elr_update_targets
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case


class EarlyLearningByHand(Hand):
    """Targets move with unmixed batches only; a mixed sample has a share of two of them."""

    def begin(self, loop):
        self.targets = torch.zeros(len(loop.x), 4)

    def term(self, loop, moment):
        p = moment.probabilities.clamp(1e-4, 1 - 1e-4)
        if moment.partners is None:
            seen = (p / p.sum(1, keepdim=True)).detach()
            self.targets[moment.index] = 0.7 * self.targets[moment.index] + 0.3 * seen
        q = moment.mixed(self.targets[moment.index])
        return 3.0 * (1 - (q * p).sum(1)).log().mean()


CASE = Case(
    make=partial(ELRCallback, lam=3.0, beta=0.7),
    neutral=partial(ELRCallback, lam=0.0),
    by_hand=EarlyLearningByHand,
    says=(
        "lam=3, beta=0.7; targets float32",
        "lam=0: inactive",
        "lam=3, beta=0.7, from epoch 1; targets float32",
        "lam=3, beta=0.7; targets float16",
        "lam=3, beta=0.7; targets bfloat16, top 2",
        "lam=3, beta=0.7; targets float32",
        "lam=3, beta=0.7; targets float32",
    ),
    variants=[
        partial(ELRCallback, warmup_epochs=1),
        partial(ELRCallback, table_dtype="float16", table_device="cpu"),
        partial(ELRCallback, table_dtype="bfloat16", top_k=2, num_classes=4),
        partial(ELRCallback, index_key="2", num_samples=30, loss="cross_entropy"),
        partial(ELRCallback, sync="local", loss="last"),
    ],
    invalid=[
        ({"lam": -0.1}, "lam"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.0}, "beta"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": 0.5}, "clamp"),
        ({"clamp": 1e-7}, "clamp"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"warmup_epochs": 0.5}, "warmup_epochs"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_classes": 0}, "num_classes"),
        ({"top_k": 0}, "top_k"),
        ({"loss": -1}, "loss"),
        ({"index_key": "index"}, "num_samples"),
    ],
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# -- the functional core ----------------------------------------------------------------------------------------------

# shengliu66/ELR @ 934af53, ELR/model/loss.py, elr_loss.forward with beta 0.7 and lambda 3, run on the inputs of
# `authors_batch`: loss and gradient of each step, targets after the last.
AUTHORS_LOSSES = [4.7328901290893555, 1.1019456386566162, 2.7960445880889893]
AUTHORS_LAST_GRADIENT = [
    [0.192600951, 0.039157171, -0.231758118],
    [-0.01725368, 0.016360749, 0.000892974],
    [0.000315554, -0.249996498, 0.249680936],
    [1.7255e-05, -0.001545521, 0.001528289],
]
AUTHORS_TARGETS = [
    [0.29332742, 0.19762708, 0.16604552],
    [0.23798615, 0.26025912, 0.01175477],
    [0.16500537, 0.33603927, 0.00895535],
    [0.00332165, 0.50653231, 0.00014607],
    [0.00019172, 0.20988804, 0.29992029],
    [0.28509909, 0.01419425, 0.00070669],
]


def authors_batch(step):
    index = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 0], [1, 0, 4, 2]][step])
    labels = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 1]][step])
    logits = [[((7 * (step + 1) * (b + 1) * (c + 2)) % 11 - 5.0) * 1.5 for c in range(3)] for b in range(4)]
    return torch.tensor(logits, requires_grad=True), labels, index


def reference_step(targets, index, logits, labels, lam, beta, clamp):
    """The four steps of an update, in loops and double precision."""
    total = 0.0
    for i, z, y in zip(index, logits, labels, strict=True):
        exponentials = [math.exp(v - max(z)) for v in z]
        softmax = [e / sum(exponentials) for e in exponentials]
        p = [min(max(v, clamp), 1 - clamp) for v in softmax]
        targets[i] = [beta * t + (1 - beta) * v / sum(p) for t, v in zip(targets[i], p, strict=True)]
        total += -math.log(softmax[y]) + lam * math.log(1 - sum(t * v for t, v in zip(targets[i], p, strict=True)))
    return total / len(index)


def test_loss_gradient_and_targets_are_those_of_the_authors_code():
    targets = torch.zeros(6, 3)
    for step in range(3):
        logits, labels, index = authors_batch(step)
        loss = elr_loss(logits, labels, index, targets, lam=3.0, beta=0.7)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(AUTHORS_LOSSES[step], abs=1e-6)  # float32, another order of summation
    torch.testing.assert_close(gradient, torch.tensor(AUTHORS_LAST_GRADIENT), atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(targets, torch.tensor(AUTHORS_TARGETS), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("beta", "clamp"), [(0.7, 1e-4), (0.0, 1e-4), (0.9, 1e-2)])
def test_formulas_against_loops_in_double_precision(beta, clamp):
    generator = torch.Generator().manual_seed(1)
    targets, expected = torch.zeros(5, 4), [[0.0] * 4 for _ in range(5)]
    for _ in range(6):
        logits = 4 * torch.randn(3, 4, generator=generator)
        labels = torch.randint(4, (3,), generator=generator)
        index = torch.randperm(5, generator=generator)[:3]
        loss = elr_loss(logits, labels, index, targets, lam=2.0, beta=beta, clamp=clamp)
        reference = reference_step(
            expected, index.tolist(), logits.double().tolist(), labels.tolist(), 2.0, beta, clamp
        )
        assert loss.item() == pytest.approx(reference, rel=2e-5)  # float32 near log(1 - 0.99...)
    torch.testing.assert_close(targets, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_target_rows_sum_to_one_minus_beta_to_the_visits_and_others_stay():
    targets = torch.zeros(4, 3)
    for visits in range(1, 6):
        rows = elr_update_targets(targets, torch.tensor([1]), torch.randn(1, 3), beta=0.7)
        assert rows.sum().item() == pytest.approx(1 - 0.7**visits, abs=1e-6)
    assert torch.equal(targets[[0, 2, 3]], torch.zeros(3, 3))
    assert torch.equal(targets[1], rows[0])


def test_last_of_several_rows_for_one_sample_counts_everywhere():
    targets, logits = torch.zeros(3, 2), torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    rows = elr_update_targets(targets, torch.tensor([1, 0, 1]), logits, beta=0.5)
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(targets[1], rows[2])
    assert rows[2, 1] > 0.49


def test_regularizer_is_zero_for_no_targets_never_positive_and_bounded_by_the_clamp():
    logits = torch.randn(8, 3)
    assert elr_regularizer(logits, torch.zeros(8, 3)).item() == 0
    assert (elr_regularizer(logits, torch.rand(8, 3).softmax(1), reduction="none") <= 0).all()
    saturated = torch.tensor([[50.0, 0.0, 0.0]])
    rows = elr_update_targets(torch.zeros(1, 3), torch.tensor([0]), saturated, beta=0.0)
    assert elr_regularizer(saturated, rows).item() == pytest.approx(-8.11, abs=0.01)  # the floor for C = 3


def test_gradient_is_the_papers_lemma_where_nothing_is_clamped_and_zero_where_all_is():
    logits = torch.randn(5, 4, dtype=torch.float64).float().requires_grad_()
    t = 0.6 * torch.rand(5, 4).softmax(1)
    (gradient,) = torch.autograd.grad(elr_regularizer(logits, t, clamp=1e-9, reduction="none").sum(), logits)
    p = logits.detach().double().softmax(1)
    tt = t.double()
    lemma = (
        p / (1 - (p * tt).sum(1, keepdim=True)) * torch.stack([((tt - tt[:, [c]]) * p).sum(1) for c in range(4)], dim=1)
    )
    torch.testing.assert_close(gradient.double(), lemma, atol=1e-6, rtol=1e-5)  # float32 softmax
    saturated = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    elr_regularizer(saturated, torch.tensor([[0.5, 0.2, 0.1]])).backward()
    assert torch.equal(saturated.grad, torch.zeros(1, 3))


def test_gradient_agrees_with_finite_differences():
    logits, t, step = torch.randn(2, 3), 0.5 * torch.rand(2, 3), 1e-2
    variable = logits.clone().requires_grad_()
    elr_regularizer(variable, t).backward()
    for position in [(0, 0), (0, 2), (1, 1)]:
        nudge = torch.zeros(2, 3)
        nudge[position] = step
        slope = (elr_regularizer(logits + nudge, t) - elr_regularizer(logits - nudge, t)) / (2 * step)
        assert slope.item() == pytest.approx(variable.grad[position].item(), abs=2e-4)  # error of order step ** 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_under_autocast_stay_finite(dtype):
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=dtype, requires_grad=True)
    targets = torch.zeros(2, 3)
    with torch.autocast("cpu", dtype=dtype):
        for _ in range(40):
            rows = elr_update_targets(targets, torch.tensor([0, 1]), logits, beta=0.7)
            term = elr_regularizer(logits, rows)
    assert term.dtype == targets.dtype == torch.float32
    assert term.item() == pytest.approx(elr_regularizer(logits.float(), rows).item(), abs=1e-6)
    term.backward()
    assert logits.grad.isfinite().all()


# -- the callback -----------------------------------------------------------------------------------------------------


class Classifier(LightningModule):
    """What a user has; nothing in it knows of ELR."""

    def __init__(self, loss=F.cross_entropy, features=6, classes=3):
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, classes)), loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def blobs(size=20):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))


def fit(elr, model=None, data=None, epochs=2, batch_size=6, validate=False, **options):
    seed_everything(7, verbose=False)
    model = model or Classifier()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[elr],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = data or blobs()
    loader = DataLoader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))
    trainer.fit(model, loader, DataLoader(data, batch_size) if validate else None)
    return trainer, model


class Indexed(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return (*self.data[i], i)


def by_hand(lam, beta, epochs=2, batch_size=6, warmup_epochs=0, loss=F.cross_entropy):
    seed_everything(7, verbose=False)
    model, data = Classifier(), Indexed(blobs())
    targets, optimizer = torch.zeros(len(data), 3), model.configure_optimizers()
    loader = DataLoader(data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))
    for epoch in range(epochs):
        for x, y, index in loader:
            optimizer.zero_grad()
            logits = model.net(x)
            rows = elr_update_targets(targets, index, logits, beta)
            weight = lam if epoch >= warmup_epochs else 0.0
            (loss(logits, y) + weight * elr_regularizer(logits, rows)).backward()
            optimizer.step()
    return model, targets


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_trains_as_the_loop_by_hand_does(warmup_epochs):
    elr = ELRCallback(lam=2.0, beta=0.6, warmup_epochs=warmup_epochs)
    _, model = fit(elr)
    expected, targets = by_hand(2.0, 0.6, warmup_epochs=warmup_epochs)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)  # float32, lam before the mean or after
    torch.testing.assert_close(elr._table.targets.all(), targets, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_term_joins_each_samples_loss_under_the_users_reduction(reduction):
    def loss(logits, y):
        value = F.cross_entropy(logits, y, reduction=reduction)
        return value / len(y) if reduction == "sum" else value.mean()

    seed_everything(7, verbose=False)
    _, model = fit(ELRCallback(lam=2.0, beta=0.6), Classifier(loss))
    _, plain = fit(ELRCallback(lam=2.0, beta=0.6))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_validation_leaves_the_targets_alone():
    one, two = ELRCallback(), ELRCallback()
    fit(one, validate=True)
    fit(two)
    assert torch.equal(one._table.targets.all(), two._table.targets.all())


def test_ignored_samples_take_no_part():
    x, y = blobs().tensors
    y = torch.where(torch.arange(20) % 4 == 0, -100, y)
    elr = ELRCallback()
    fit(elr, data=TensorDataset(x, y))
    visited = elr._table.targets.all().sum(1) > 0
    assert torch.equal(visited, y >= 0)
    assert not elr.suspected_label_errors()[y < 0].any()


def test_a_new_training_starts_with_new_targets_and_a_continued_one_goes_on():
    elr = ELRCallback(beta=0.5)
    trainer, model = fit(elr, epochs=1)
    assert elr._table.targets.all().sum(1).tolist() == pytest.approx([0.5] * 20)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, DataLoader(blobs(), 6))
    assert elr._table.targets.all().sum(1).tolist() == pytest.approx([1 - 0.5**3] * 20)
    fit(elr, epochs=1)
    assert elr._table.targets.all().sum(1).tolist() == pytest.approx([0.5] * 20)


def test_smaller_stores_hold_what_they_promise():
    full, half, top, cpu = (
        ELRCallback(beta=0.5),
        ELRCallback(beta=0.5, table_dtype="float16"),
        ELRCallback(beta=0.5, top_k=1),
        ELRCallback(beta=0.5, table_device="cpu"),
    )
    for elr in (full, half, top, cpu):
        fit(elr, epochs=1)
    reference = full._table.targets.all()
    assert torch.equal(cpu._table.targets.all(), reference)
    torch.testing.assert_close(half._table.targets.all(), reference, atol=1e-3, rtol=1e-3)
    assert half._table.targets.nbytes * 2 == full._table.targets.nbytes
    best, where = reference.max(1)
    expected = torch.zeros_like(reference).scatter(1, where[:, None], best[:, None])
    torch.testing.assert_close(top._table.targets.all(), expected)
    assert top._table.targets.nbytes == 21 * (4 + 2)


def test_suspects_are_the_samples_whose_target_contradicts_the_label(tmp_path):
    elr = ELRCallback(beta=0.5)
    fit(elr, epochs=1)
    targets, (_, labels) = elr._table.targets.all(), blobs().tensors
    suspects = elr.suspected_label_errors()
    assert torch.equal(suspects, targets.argmax(1) != labels)
    assert torch.equal(elr.suspected_label_errors(targets.argmax(1)), torch.zeros(20, dtype=torch.bool))
    report = elr.label_errors()
    assert sorted(report.index.tolist()) == suspects.nonzero()[:, 0].tolist()
    assert report.confidence.tolist() == sorted(report.confidence.tolist(), reverse=True)
    report.to_csv(tmp_path / "errors.csv")
    with (tmp_path / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = report.index[0].item()
    assert rows[0] == {
        "index": str(first),
        "given": str(labels[first].item()),
        "suggested": str(targets[first].argmax().item()),
        "confidence": f"{targets[first].max() / targets[first].sum():.4f}",
    }
    assert len(rows) == len(report) == int(suspects.sum())
    console = Console(file=io.StringIO())
    console.print(report)
    assert f"{len(report)} suspected label errors" in console.file.getvalue()
    with pytest.raises(ValueError, match=r"ELRCallback: `labels` must have shape \(20,\), got \(3,\)"):
        elr.suspected_label_errors(torch.zeros(3))
    with pytest.raises(RuntimeError, match="no targets yet"):
        ELRCallback().label_errors()


def test_logs_term_agreement_and_suspects():
    elr = ELRCallback(lam=2.0, beta=0.0)
    trainer, _ = fit(elr, epochs=1, batch_size=20, log_every_n_steps=1)
    logged, targets, labels = trainer.callback_metrics, elr._table.targets.all(), blobs().tensors[1]
    assert logged["reg/elr/suspects"].item() == pytest.approx((targets.argmax(1) != labels).float().mean().item())
    agreement = targets.gather(1, labels[:, None]).mean()
    assert logged["reg/elr/agreement"].item() == pytest.approx(agreement.item(), abs=1e-6)
    assert logged["reg/elr/term"].item() == pytest.approx(2 * (1 - (targets**2).sum(1)).log().mean().item(), abs=1e-5)
    difference = logged["reg/loss/total"] - logged["reg/loss/base"]
    assert difference.item() == pytest.approx(logged["reg/elr/term"].item(), abs=1e-6)


def test_checkpoint_survives_weights_only_loading_and_another_shape_is_refused():
    elr = ELRCallback()
    fit(elr, epochs=1)
    other = ELRCallback()
    other.load_state_dict(elr.state_dict())
    assert torch.equal(other._table.targets.all(), elr._table.targets.all())
    assert torch.equal(other.suspected_label_errors(), elr.suspected_label_errors())
    with pytest.raises(ValueError, match="`top_k` changed"):
        ELRCallback(top_k=2).load_state_dict(elr.state_dict())
    trainer, model = fit(other, epochs=1)
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(
        MisconfigurationException,
        match=r"targets are for 20 samples of 3 classes, the data now has 9 .*`ELRCallback\(num_samples=...\)`",
    ):
        trainer.fit(model, DataLoader(blobs(9), 3))


@pytest.mark.parametrize(
    ("loss", "shape", "words"),
    [
        (lambda z, y: F.cross_entropy(z.reshape(-1, 3, 2, 2), y[:, None, None].expand(-1, 2, 2)), 12, "per pixel"),
        (lambda z, y: F.cross_entropy(z.reshape(-1, 3), y.repeat_interleave(4)), 12, "one row of logits per sample"),
        (lambda z, y: F.mse_loss(z[:, 0], y.float()), 3, "single-label classification"),
        (lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 0).float()), 3, "single-label classification"),
    ],
)
def test_losses_that_it_is_not_for_are_refused_in_words(loss, shape, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(ELRCallback(), Classifier(loss, classes=shape))


def test_arguments_that_contradict_the_data_are_refused():
    with pytest.raises(MisconfigurationException, match=r"ELRCallback\(num_classes=5\): the logits have 3"):
        fit(ELRCallback(num_classes=5))
    with pytest.raises(MisconfigurationException, match=r"ELRCallback\(num_samples=5\): the training dataset has 20"):
        fit(ELRCallback(num_samples=5))
    with pytest.raises(ValueError, match="`num_samples` must be given with `index_key`"):
        ELRCallback(index_key="index")


def test_index_key_reads_the_indices_from_the_batch():
    followed, named = ELRCallback(), ELRCallback(index_key="2", num_samples=20)
    fit(followed)
    fit(named, data=Indexed(blobs()))
    assert torch.equal(named._table.targets.all(), followed._table.targets.all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI, of jsonargparse
def test_yaml_reaches_every_argument(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_reg.ELRCallback\n"
        "      init_args: {lam: 7, beta: 0.9}\n"
    )

    def run(*arguments):
        options = {"run": False, "save_config_callback": None, "seed_everything_default": 1}
        return LightningCLI(BoringModel, args=list(arguments), **options)

    elr = run("--config", str(config)).trainer.callbacks[0]
    assert (type(elr), elr.lam, elr.beta, elr.clamp) == (ELRCallback, 7.0, 0.9, 1e-4)
    with pytest.raises(SystemExit):
        run("--config", str(config), "--print_config")
    printed = capsys.readouterr().out
    assert "beta: 0.9" in printed
    assert "table_dtype: float32" in printed
    with pytest.raises(SystemExit):
        run("--trainer.callbacks.help", "lightning_reg.ELRCallback")
    assert "Weight of the regularizer (lambda)" in capsys.readouterr().out


def test_keeps_digits_from_being_memorised_and_finds_the_wrong_labels():
    digits = load_digits()
    x, clean = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:1200], order[1200:]
    redrawn = torch.rand(1200, generator=generator) < 0.4
    labels = torch.where(redrawn, torch.randint(10, (1200,), generator=generator), clean[train])
    accuracy = {}
    for lam in (0.0, 7.0):
        elr = ELRCallback(lam=lam, beta=0.9)
        seed_everything(0, verbose=False)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        model = Classifier()
        model.net = net
        model.configure_optimizers = lambda net=net: torch.optim.SGD(
            net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3
        )
        fit(elr, model, TensorDataset(x[train], labels), epochs=45, batch_size=64)
        accuracy[lam] = (net(x[test]).argmax(1) == clean[test]).float().mean().item()
    wrong, suspects = labels != clean[train], elr.suspected_label_errors()
    assert accuracy[7.0] > 0.95  # 0.970 after 120 epochs
    assert accuracy[7.0] - accuracy[0.0] > 0.12  # 0.15 after 120 epochs
    assert (suspects & wrong).sum() / suspects.sum() > 0.95
    assert (suspects & wrong).sum() / wrong.sum() > 0.95
