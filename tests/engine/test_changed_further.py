"""What the user's code makes of a loss call's value: right where it is linear, refused in the first step where not."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_reg import ELRCallback, LossMixin, LossReweighting, Mixup, MultiSampleDropout, PredictionDistillation
from lightning_reg.engine.host.errors import MisconfigurationException
from tests.engine.test_views import Shifted
from tests.toys import (
    CLASSES,
    QUIET,
    Classifier,
    ShiftTargets,
    StepLosses,
    Term,
    WeightsByPosition,
    fit,
    make_tensors,
    same_weights,
    weights_of,
)

pytestmark = QUIET

WEIGHT = torch.tensor([1.0, 0.5, 2.0])


def each(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def focal(module, batch):
    losses = each(module, batch)
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def sigmoid_focal(module, batch):
    """As torchvision's: the factor comes from the logits."""
    logits, target = module(batch[0]), F.one_hot(batch[1], CLASSES).float()
    losses, p = F.binary_cross_entropy_with_logits(logits, target, reduction="none"), logits.sigmoid()
    return (losses * (1 - p * target - (1 - p) * (1 - target)) ** 2).mean()


def softmax_of_losses(module, batch):
    return each(module, batch).logsumexp(0)


def heteroscedastic(module, batch):
    logits = module(batch[0])
    return (F.cross_entropy(logits, batch[1], reduction="none") * (-logits[:, 0]).exp() + logits[:, 0]).mean()


def root(module, batch):
    return {"loss": F.cross_entropy(module(batch[0]), batch[1]).sqrt()}


def focal_of_the_mean(module, batch):
    loss = F.cross_entropy(module(batch[0]), batch[1])
    return (1 - torch.exp(-loss)) ** 2 * loss + 0.1 * module(batch[0]).square().mean()


BENT = [focal, softmax_of_losses, heteroscedastic, root, focal_of_the_mean]


def masked(module, batch):
    mask = (batch[1] != 2).float()
    return (each(module, batch) * mask).sum() / mask.sum()


def masked_in_place(module, batch):
    losses = each(module, batch)
    losses[batch[1] == 2] = 0
    return losses.mean()


def weighted(module, batch):
    return (each(module, batch) * WEIGHT[batch[1]]).mean()


def reweighting():
    return LossReweighting(warmup_steps=3)


UNEQUAL = [masked, masked_in_place, weighted]


def summed(module, batch):
    return each(module, batch).sum() / len(batch[1])


def scaled(module, batch):
    return 2 * each(module, batch).view(2, -1).mean(1).mean() + module(batch[0]).square().mean()


def counted_alike(module, batch):
    losses = F.cross_entropy(module(batch[0]), batch[1].where(batch[1] != 2, -100), reduction="none")
    mask = (batch[1] != 2).float()
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("step", BENT)
@pytest.mark.parametrize("kind", [Term, WeightsByPosition, ShiftTargets, ELRCallback, Mixup, PredictionDistillation])
def test_a_loss_that_is_not_linear_in_the_call_is_refused_in_the_first_step(kind, step):
    losses = StepLosses()
    sentence = rf"^{kind.__name__}: the code after F.cross_entropy.* at test_changed_further.py:\d+ changes its value"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Classifier(step=step), kind(), losses)
    assert losses.losses == []


@pytest.mark.parametrize("kind", [WeightsByPosition, Mixup])
def test_a_factor_made_of_predictions_is_refused(kind):
    with pytest.raises(MisconfigurationException, match="is not linear in it"):
        fit(Classifier(step=sigmoid_focal), kind(loss=0))


def test_several_techniques_are_named_and_the_last_call_is_looked_at():
    with pytest.raises(MisconfigurationException, match=r"^Term, WeightsByPosition: the code after F.cross_entropy"):
        fit(Classifier(step=focal), Term(), WeightsByPosition(loss="last"))


def test_a_loss_with_copies_is_looked_at():
    model = Classifier(step=focal, dropout=0.5)
    with pytest.raises(MisconfigurationException, match=r"^MultiSampleDropout: .*is not linear in it"):
        fit(model, MultiSampleDropout("net.2", num_samples=2))


def test_a_loss_with_views_is_looked_at():
    with pytest.raises(MisconfigurationException, match=r"^Shifted: the code after F.cross_entropy"):
        fit(Classifier(step=focal), Shifted())


def test_losses_that_nobody_works_on_may_be_changed():
    def step(module, batch):
        return focal(module, batch) + F.nll_loss(module(batch[0]).log_softmax(1), batch[1])

    fit(Classifier(step=step), Term(loss="nll_loss"))
    fit(Classifier(step=step), WeightsByPosition(loss=1))


@pytest.mark.parametrize("step", UNEQUAL)
@pytest.mark.parametrize("kind", [WeightsByPosition, reweighting, PredictionDistillation])
def test_losses_that_count_unequally_are_refused_where_their_weights_matter(kind, step):
    losses = StepLosses()
    technique = kind()
    sentence = f"^{type(technique).__name__}: the code after .* counts its losses unequally"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(Classifier(step=step), technique, Term(), losses)
    assert losses.losses == []


def test_a_mask_that_comes_later_is_told_in_the_next_step_that_is_logged():
    x, y = make_tensors()
    y[:8] = y[:8] % 2  # nothing is masked in the first batch
    losses = StepLosses()
    with pytest.raises(MisconfigurationException, match="counts its losses unequally"):
        fit(
            Classifier(step=masked),
            WeightsByPosition(),
            losses,
            loader=DataLoader(TensorDataset(x, y), 8),
            log_every_n_steps=3,
        )
    assert len(losses.losses) == 2


def term_of(module, x):
    return 0.1 * module(x).square().mean(1)


@pytest.mark.parametrize(
    ("step", "hand"),
    [
        (
            masked,
            lambda m, b: ((each(m, b) + term_of(m, b[0])) * (b[1] != 2)).sum() / (b[1] != 2).sum(),
        ),
        (masked_in_place, lambda m, b: ((each(m, b) + term_of(m, b[0])) * (b[1] != 2)).mean()),
        (weighted, lambda m, b: ((each(m, b) + term_of(m, b[0])) * WEIGHT[b[1]]).mean()),
        (summed, lambda m, b: (each(m, b) + term_of(m, b[0])).mean()),
        (scaled, lambda m, b: 2 * (each(m, b) + term_of(m, b[0])).mean() + m(b[0]).square().mean()),
    ],
)
def test_a_term_joins_each_loss_with_the_mass_that_the_users_code_gives_it(step, hand):
    ours, by_hand = Classifier(step=step), Classifier(step=hand)
    fit(ours, Term())
    fit(by_hand)
    assert same_weights(ours, by_hand, atol=1e-6)  # float32, 8 steps


@pytest.mark.parametrize(
    ("step", "hand"),
    [
        (summed, lambda m, b, w: (each(m, b) * w).mean()),
        (scaled, lambda m, b, w: 2 * (each(m, b) * w).mean() + m(b[0]).square().mean()),
        (counted_alike, lambda m, b, w: (each(m, b) * w * (b[1] != 2)).sum() / (b[1] != 2).sum()),
    ],
)
def test_weights_act_on_losses_that_count_alike(step, hand):
    weights = 1 + torch.arange(8) / 8
    ours, by_hand = Classifier(step=step), Classifier(step=lambda m, b: hand(m, b, weights))
    fit(ours, WeightsByPosition())
    fit(by_hand)
    assert same_weights(ours, by_hand, atol=1e-6)  # float32, 8 steps


class Balanced(Classifier):
    """A learned factor of the whole loss, as in multi-task learning by uncertainty."""

    def __init__(self, reduction, by_hand=False):
        super().__init__()
        self.log_scale, self.reduction, self.by_hand = nn.Parameter(torch.zeros(())), reduction, by_hand

    @override
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1], reduction=self.reduction).mean()
        if self.by_hand:
            loss = loss + term_of(self, batch[0]).mean()
        return (-self.log_scale).exp() * loss + self.log_scale


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_learned_factor_of_the_whole_loss_is_no_obstacle(reduction):
    ours, hand = Balanced(reduction), Balanced(reduction, by_hand=True)
    fit(ours, Term())
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_a_focal_loss_that_is_handed_over_gets_its_term():
    class Focal(LossMixin, Classifier):
        @override
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            losses = F.cross_entropy(logits, batch[1], reduction="none")
            return self.reduce_loss((1 - torch.exp(-losses)) ** 2 * losses, logits=logits, targets=batch[1])

    ours, hand = Focal(), Classifier(step=lambda m, b: focal(m, b) + term_of(m, b[0]).mean())
    fit(ours, Term())
    fit(hand)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 8 steps


def test_a_handed_over_loss_that_is_changed_further_is_refused():
    class Root(LossMixin, Classifier):
        @override
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return self.reduce_loss(F.cross_entropy(logits, batch[1], reduction="none"), logits=logits).sqrt()

    with pytest.raises(MisconfigurationException, match=r"^Term: the code after reduce_loss\(\(8,\)\).* not linear"):
        fit(Root(), Term())


def test_a_call_that_is_only_logged_is_refused():
    def step(module, batch):
        logits = module(batch[0])
        F.cross_entropy(logits, batch[1])
        return -logits.log_softmax(1).gather(1, batch[1][:, None]).mean()

    with pytest.raises(MisconfigurationException, match=r"^Term: F.cross_entropy.* does not contribute to the loss"):
        fit(Classifier(step=step), Term())


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_compiled_reduction_is_no_obstacle():
    reduce = torch.compile(lambda losses: 2 * losses.mean(), backend="aot_eager")
    ours, hand = Classifier(step=lambda m, b: reduce(each(m, b))), Classifier(step=lambda m, b: 2 * each(m, b).mean())
    fit(ours, Term(), max_steps=2)
    fit(hand, Term(), max_steps=2)
    assert same_weights(ours, hand, atol=1e-6)  # float32, 2 steps


@pytest.mark.usefixtures("dynamo")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_compiled_focal_loss_is_refused():
    reduce = torch.compile(lambda losses: ((1 - torch.exp(-losses)) ** 2 * losses).mean(), backend="aot_eager")
    with pytest.raises(MisconfigurationException, match="is not linear in it"):
        fit(Classifier(step=lambda m, b: reduce(each(m, b))), Term())


def fit_on_ranks(loss):
    runs = []
    for static in (True, False):
        module = Classifier(step=lambda m, b: 2 * each(m, b).mean())
        fit(module, Term(loss=loss), strategy=DDPStrategy(static_graph=static), devices=2)
        runs.append(weights_of(module))
    return runs


@pytest.mark.parametrize("loss", [None, "last"])
def test_gradients_are_averaged_where_ddp_counts_the_passes(two_processes, loss):
    (one, plainly), (two, _) = two_processes.run(fit_on_ranks, loss)
    assert same_weights(one, two)
    assert same_weights(one, plainly)
