"""Terms that join what a step returned, gradients changed before an optimizer's step, and what follows it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import LossMixin, Mixup
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.technique import GradientTechnique, StepTechnique
from tests.toys import (
    QUIET,
    TWO_RANKS,
    Classifier,
    Penalty,
    StepLosses,
    fit,
    make_loader,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = QUIET


class Norms(StepTechnique):
    """Half the squared norm of a layer's output, a mean over the batch."""

    def __init__(self, weight=0.5, layer="net.0", **options):
        super().__init__(**options)
        self.weight, self.layer, self.asked = weight, layer, 0

    @property
    def feature_layers(self):
        return [self.layer]

    def is_active(self, step):
        return self.weight > 0

    def step_term(self, step):
        self.asked += 1
        return self.weight * step.features[self.layer].square().sum(1).mean()


class ByHand(Classifier):
    """The same term in the user's own code; and a loss of its own, which no function of torch makes."""

    def __init__(self, weight=0.5, form=lambda loss: loss, own=False, **options):
        super().__init__(**options)
        self.weight, self.form, self.own = weight, form, own

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[0](x)
        logits = self.net[1:](hidden)
        picked = logits.gather(1, y[:, None])[:, 0]
        loss = (logits.logsumexp(1) - picked).square().mean() if self.own else F.cross_entropy(logits, y)
        return self.form(loss + self.weight * hidden.square().sum(1).mean())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("form", [lambda loss: loss, lambda loss: {"loss": loss, "kept": 3}])
def test_a_term_joins_whatever_the_step_returned(form, own):
    plain, hand = ByHand(0.0, form, own), ByHand(0.5, form, own)
    fit(plain, Norms(), max_epochs=2)
    fit(hand, max_epochs=2)
    assert same_weights(plain, hand, atol=1e-6)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_it_joins_before_accumulation_and_clipping(options):
    plain, hand = ByHand(0.0), ByHand(0.5)
    fit(plain, Norms(), max_epochs=2, **options)
    fit(hand, max_epochs=2, **options)
    assert same_weights(plain, hand, atol=1e-6)


def test_its_value_and_the_sums_are_logged():
    losses = StepLosses()
    trainer = fit(ByHand(0.0), Norms(), losses, max_epochs=1, log_every_n_steps=1)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged["reg/test_step_terms/term"] > 0
    total = logged["reg/loss/base"] + logged["reg/test_step_terms/term"]
    assert logged["reg/loss/total"] == pytest.approx(total)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_step_and_an_inactive_technique_get_none():
    fit(Classifier(step=lambda module, batch: None), skipped := Norms(), max_epochs=1)
    assert skipped.asked == 0
    plain, off = ByHand(0.0), ByHand(0.0)
    fit(plain, max_epochs=1)
    fit(off, idle := Norms(0.0), max_epochs=1)
    assert same_weights(plain, off)
    assert idle.asked == 0


class Manual(LossMixin, Classifier):
    """Hands over one loss or two, and takes the gradients itself."""

    def __init__(self, weight=0.0, handed=1):
        super().__init__()
        self.automatic_optimization = False
        self.weight, self.handed = weight, handed

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[0](x)
        losses = F.cross_entropy(self.net[1:](hidden), y, reduction="none")
        loss = self.reduce_loss(losses) + self.weight * hidden.square().sum(1).mean()
        for _ in range(self.handed - 1):
            loss = loss + self.reduce_loss(losses)
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()


@pytest.mark.parametrize("first", [True, False])
def test_layers_that_a_term_runs_are_not_what_others_see_of_the_step(first):
    class Runs(StepTechnique):
        def is_active(self, step):
            return True

        def step_term(self, step):
            return 0.0 * step.module.net(7.0 * step.batch[0]).sum()

    alone, beside = Classifier(), Classifier()
    fit(alone, Norms())
    runs = Runs(name="runs")
    fit(beside, *([runs, Norms()] if first else [Norms(), runs]))
    assert same_weights(alone, beside)


def test_under_manual_optimization_it_joins_the_loss_that_is_handed_over():
    technique, hand = Manual(), Manual(0.5)
    fit(technique, Norms(), max_epochs=2)
    fit(hand, max_epochs=2)
    assert same_weights(technique, hand, atol=1e-6)
    first, second, hand = Manual(handed=2), Manual(handed=2), Manual(0.5, handed=2)
    for model, callbacks in ((first, [Norms(loss=0)]), (second, [Norms(loss=1)]), (hand, [])):
        fit(model, *callbacks, max_epochs=2)
    assert same_weights(first, hand, atol=1e-6)
    assert same_weights(second, hand, atol=1e-6)
    with pytest.raises(MisconfigurationException, match=r"^Norms: the step hands over several losses"):
        fit(Manual(handed=2), Norms(), max_epochs=1)


def test_without_a_loss_to_join_manual_optimization_is_refused():
    class Own(Classifier):
        automatic_optimization = False

    with pytest.raises(
        MisconfigurationException, match=r"^Norms adds a term .* Own takes the gradient itself\. Inherit"
    ):
        fit(Own(), Norms(), max_epochs=1)


def test_a_term_that_is_no_scalar_and_a_layer_that_is_not_there_are_refused():
    class Rows(Norms):
        def step_term(self, step):
            return step.features[self.layer].square().sum(1)

    with pytest.raises(MisconfigurationException, match=r"^Rows: `step_term` must return a scalar, got .* \(8,\)"):
        fit(ByHand(0.0), Rows(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"net\.00"):
        fit(ByHand(0.0), Norms(layer="net.00"), max_epochs=1)


def test_mixed_samples_are_refused_unless_it_knows_what_to_make_of_them():
    with pytest.raises(MisconfigurationException, match="Norms has no rule for a sample with two owners"):
        fit(Classifier(), Mixup(), Norms(), max_epochs=1)
    fit(Classifier(), Mixup(), type("Knows", (Norms,), {"takes_mixed": True})(), max_epochs=1)


def test_a_model_of_transformers_with_a_loss_of_its_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16, image_size=8,
        patch_size=4,
    )  # fmt: skip

    class MAE(Classifier):
        def __init__(self, weight=0.0):
            super().__init__(lr=0.01)
            self.weight = weight
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = transformers.ViTMAEForPreTraining(config)

        def training_step(self, batch, batch_idx):
            seen = []
            handle = self.net.vit.layernorm.register_forward_hook(lambda layer, args, output: seen.append(output))
            loss = self.net(batch[0], noise=torch.linspace(0, 1, 4).expand(len(batch[0]), 4)).loss
            handle.remove()
            return loss + self.weight * seen[0].square().sum((1, 2)).mean() if self.weight else loss

    class Tokens(Norms):
        def step_term(self, step):
            return self.weight * step.features[self.layer].square().sum((1, 2)).mean()

    images = torch.utils.data.TensorDataset(torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    technique, hand = MAE(), MAE(0.5)
    fit(technique, Tokens(layer="net.vit.layernorm"), loader=make_loader(images), max_epochs=2)
    fit(hand, loader=make_loader(images), max_epochs=2)
    assert same_weights(technique, hand, atol=1e-6)


# -- gradients and what follows the step ------------------------------------------------------------------------------


class Signs(GradientTechnique):
    """The sign of the gradient in its place, and weights that are not negative afterwards."""

    def __init__(self):
        super().__init__()
        self.seen, self.followed = [], 0

    def change_gradients(self, gradients):
        self.seen.append({name: gradient.clone() for name, gradient in gradients.items()})
        for gradient in gradients.values():
            gradient.sign_()

    def after_step(self, module, optimizer):
        self.followed += 1
        assert not torch.is_grad_enabled()
        module.net[0].weight.clamp_(min=0.0)


def signed_by_hand(model, batches, every=1, clip=None, penalty=0.0):
    weights = list(model.net.parameters())
    for position, (x, y) in enumerate(batches):
        (F.cross_entropy(model.net(x), y) / every).backward()
        if (position + 1) % every:
            continue
        (penalty * sum(w.square().sum() for w in weights)).backward() if penalty else None
        for weight in weights:
            weight.grad.sign_()
        if clip is not None:
            nn.utils.clip_grad_norm_(weights, clip)
        with torch.no_grad():
            for weight in weights:
                weight.sub_(model.lr * weight.grad)
                weight.grad = None
            weights[0].clamp_(min=0.0)
    return model


@pytest.mark.parametrize(("every", "clip"), [(1, None), (2, None), (1, 0.3), (2, 0.3)])
def test_gradients_are_changed_after_accumulation_and_before_clipping(every, clip):
    model, technique = Classifier(), Signs()
    fit(model, technique, max_epochs=1, accumulate_grad_batches=every, gradient_clip_val=clip)
    hand = signed_by_hand(Classifier(), make_loader(), every, clip)
    assert same_weights(model, hand, atol=1e-6)
    assert technique.followed == len(technique.seen) == 4 // every
    assert list(technique.seen[0]) == [name for name, _ in model.named_parameters()]


def test_gradients_of_penalties_are_in_them():
    class Squares(Penalty):
        def penalty(self, module):
            return 0.1 * sum(w.square().sum() for w in module.parameters())

    model = Classifier()
    fit(model, Squares(), Signs(), max_epochs=1)
    assert same_weights(model, signed_by_hand(Classifier(), make_loader(), penalty=0.1), atol=1e-6)


def _scaled(technique, broken=()):
    """A fit with the scaler of half precision; in some batches the loss is infinite."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx in broken else loss

    model = Breaks()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    fit(model, technique, max_epochs=1, plugins=[plugin])
    return model


def test_gradients_are_unscaled_and_a_step_that_the_scaler_skips_has_neither_phase():
    plain, half, broken = Signs(), Signs(), Signs()
    fit(Classifier(), plain, max_epochs=1)
    _scaled(half)
    for one, two in zip(plain.seen[0].values(), half.seen[0].values(), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-3)  # float16
    _scaled(broken, broken={1, 2})
    assert (len(broken.seen), broken.followed) == (2, 2)


def test_two_optimizers_by_hand_each_have_their_own():
    class Two(Classifier):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[at].parameters(), lr=self.lr) for at in (0, 3)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    technique = Signs()
    fit(Two(), technique, max_epochs=1)
    assert [sorted({name.split(".")[1] for name in seen}) for seen in technique.seen[:2]] == [["0"], ["3"]]
    assert technique.followed == 8


def _on_ranks(rank_of_batches):
    model, technique = Classifier(), Signs()
    loader = make_loader(batch_size=4)
    trainer = make_trainer(callbacks=[technique], max_epochs=1, **TWO_RANKS)
    trainer.fit(model, loader)
    return weights_of(model), technique.seen[0]


def test_gradients_are_averaged_over_ranks(two_processes):
    (one, first), (two, second) = two_processes.run(_on_ranks, None)
    assert same_weights(one, two)
    assert same_weights(first, second)


def test_hooks_on_optimizers_are_gone_after_the_fit():
    trainer = fit(Classifier(), Signs(), max_epochs=1)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
