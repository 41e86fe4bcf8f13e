"""Second networks: copies that know nothing of the Trainer, and what they make of a batch."""

import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import FeatureDistillation, LossMixin
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.engine.layers.named import FeatureTap
from lightning_reg.engine.networks.named_weights import load_weights_, weights_of
from lightning_reg.engine.networks.peer import Peer, copy_of, update_average_
from lightning_reg.engine.technique import BatchTechnique, LossTechnique
from tests.toys import (
    BATCH,
    CLASSES,
    INPUTS,
    QUIET,
    BatchShift,
    Classifier,
    StepLosses,
    _Toy,
    fit,
    make_loader,
    same_weights,
)

pytestmark = QUIET


class Teach(_Toy, BatchTechnique, LossTechnique):
    """Lets a copy of the first weights see every batch, and notes what it made of it; changes nothing."""

    def __init__(self, layers=(), training=False, asks=True, **kwargs):
        super().__init__(**kwargs)
        self.layers, self.training, self.asks = layers, training, asks
        self.peer, self.sights, self.students = None, [], []

    def on_train_start(self, trainer, pl_module):
        self.peer = Peer(pl_module, layers=self.layers, training=self.training, owner=self)

    def observe_batch(self, step):
        step.notes[self] = self.peer.see(step, self if self.asks else None)

    def loss_term(self, call):
        self.sights.append(call.step.notes[self])
        self.students.append((call.name, call.input.detach().clone(), call.step.batch))


class WithBatchNorm(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(kwargs.get("seed", 0))
            self.net = nn.Sequential(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def is_tensor_in(module, tensor):
    return any(tensor is t for t in (*module.parameters(), *module.buffers()))


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_weights_and_nothing_else():
    module = WithBatchNorm()
    trainer = fit(module)
    F.cross_entropy(module(torch.ones(4, INPUTS)), torch.zeros(4, dtype=torch.long)).backward()
    tap = FeatureTap(module, ["net.0"])
    noted = []
    module.net[1].register_forward_hook(lambda *args: noted.append(1))  # the user's own: a part of the network
    twin = copy_of(module)
    assert same_weights(twin, module)
    assert not any(is_tensor_in(module, t) for t in (*twin.parameters(), *twin.buffers()))
    assert all(p.grad is None for p in twin.parameters())
    assert module.trainer is trainer
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        twin.trainer  # noqa: B018 # the property raises
    assert (len(twin.net[0]._forward_hooks), len(module.net[0]._forward_hooks)) == (0, 1)
    twin.eval()(torch.ones(4, INPUTS))
    assert noted == [1]
    tap.close()


@pytest.mark.parametrize("how", ["network", "network in place", "module"])
def test_compiled_parts_are_copied_as_they_were_before(how):
    module, x = Classifier(), torch.rand(4, INPUTS)
    expected = module(x)
    if how == "network":
        module.net = torch.compile(module.net, backend="eager")
    elif how == "network in place":
        module.net.compile(backend="eager")
    else:
        from lightning.pytorch.utilities.compile import from_compiled

        module = from_compiled(torch.compile(module, backend="eager"))
    compiled_step = module.training_step
    twin = copy_of(module)
    assert module.training_step == compiled_step
    assert type(twin.net) is nn.Sequential
    assert getattr(twin.net, "_compiled_call_impl", None) is None
    assert twin._compiler_ctx is None
    assert list(weights_of(twin)) == list(weights_of(module)) == [n for n, _ in Classifier().named_parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert torch.equal(twin(x), expected)
    assert twin.training_step((x, torch.zeros(4, dtype=torch.long)), 0) > 0.5


def test_tensors_with_a_history_are_copied_without_it():
    module = Classifier()
    module.last = {"logits": [module(torch.ones(1, INPUTS))]}
    twin = copy_of(module)
    assert torch.equal(twin.last["logits"][0], module.last["logits"][0])
    assert not twin.last["logits"][0].requires_grad
    assert twin.last["logits"][0] is not module.last["logits"][0]


def test_what_cannot_be_copied_is_refused():
    module = Classifier()
    module.lock = threading.Lock()
    with pytest.raises(MisconfigurationException, match=r"Classifier cannot be copied: cannot pickle '_thread.lock'"):
        copy_of(module)


class Keeps(Classifier):
    """Reads its hidden layer through a hook."""

    def __init__(self, hook, **kwargs):
        super().__init__(**kwargs)
        self.hidden = None
        hook(self)

    def keep(self, layer, args, output):
        self.hidden = output

    def forward(self, x):
        self.net[:2](x)
        return self.net[3](self.hidden)


def keep_by_closure(module):
    def keep(layer, args, output):
        module.hidden = output

    module.net[1].register_forward_hook(keep)


def keep_before(module):
    module.net[2].register_forward_pre_hook(lambda layer, args, owner=module: owner.keep(layer, args, args[0]))


def replace_forward(module):
    forward = module.net[0].forward
    module.net[0].forward = lambda x: 2 * forward(x)


def hold_a_function(module):
    layers = [module.net[3]]

    def score(x, scale):
        return scale * layers[0](x)

    module.score = partial(score, scale=2.0)


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        (keep_by_closure, "the layer 'net.1' has a function of its own that holds the module"),
        (keep_before, "the layer 'net.2' has a function of its own that holds the module"),
        (replace_forward, "the layer 'net.0' has a function of its own that holds the layer 'net.0'"),
        (hold_a_function, "the module has a function of its own that holds the layer 'net.3'"),
    ],
)
def test_functions_that_hold_a_layer_are_refused(hook, sentence):
    with pytest.raises(MisconfigurationException, match=f"Keeps cannot be copied: {sentence}, .* Write a method"):
        copy_of(Keeps(hook))


def keep_by_method(module):
    module.net[1].register_forward_hook(module.keep)


def keep_by_argument(module):
    module.net[1].register_forward_hook(partial(Keeps.keep, module))


@pytest.mark.parametrize("hook", [keep_by_method, keep_by_argument])
def test_hooks_of_a_copy_are_its_own(hook):
    module, x = Keeps(hook), torch.rand(4, INPUTS)
    module.accuracy = MulticlassAccuracy(CLASSES)  # torchmetrics wraps methods in closures
    module.last = lambda x: x[-1]
    twin = copy_of(module)
    expected = module(x).detach()
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    module(x)
    assert torch.equal(twin(x), expected)
    assert twin.hidden is not module.hidden


def test_weights_are_loaded_by_name_into_a_head_that_may_have_grown():
    kept = {name: value.clone() for name, value in weights_of(WithBatchNorm(seed=1)).items()}
    assert "net.1.running_mean" in kept
    module = WithBatchNorm(seed=2)
    module.net[3] = nn.Linear(8, CLASSES + 2)
    module.more = nn.Linear(2, 2)
    new, more = module.net[3].weight[CLASSES:].clone(), module.more.weight.clone()
    load_weights_(module, kept, Teach())
    assert torch.equal(module.net[3].weight, torch.cat([kept["net.3.weight"], new]))
    assert torch.equal(module.net[1].num_batches_tracked, kept["net.1.num_batches_tracked"])
    assert torch.equal(module.more.weight, more)
    for change, sentence in (
        (nn.Linear(8, CLASSES - 1), r"Teach: 'net.3.weight' had shape \(3, 8\) .* has shape \(2, 8\) now"),
        (nn.Linear(9, CLASSES), r"has shape \(3, 9\) now"),
        (nn.Identity(), "is not there now"),
    ):
        module.net[3] = change
        with pytest.raises(MisconfigurationException, match=sentence):
            load_weights_(module, kept, Teach())


def test_moving_average_of_parameters_only():
    average, params = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 6.0])]
    update_average_(average, params, 0.75)
    assert average[0].tolist() == [1.5, 3.0]
    module = WithBatchNorm()
    peer = Peer(module, owner=module)
    before, buffers = weights_of(copy_of(module)), {n: b.clone() for n, b in peer.module.named_buffers()}
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
        module.net[1].running_mean.add_(1.0)
    peer.update_average_(0.75)
    for name, p in peer.module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] + 0.25)
    assert all(torch.equal(b, buffers[n]) for n, b in peer.module.named_buffers())


# -- what a copy makes of a batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sees_the_transformed_batch_with_its_own_weights_and_no_gradient(precision):
    module, teach = Classifier(), Teach(layers=["net.1"])
    twin = copy_of(module).eval()
    fit(module, teach, BatchShift(), max_epochs=1, precision=precision)
    assert len(teach.sights) == 4
    for sight, (_, _, (x, y)) in zip(teach.sights, teach.students, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            logits, hidden = twin(x), twin.net[:2](x)
        assert torch.equal(sight.call.logits, logits)
        assert torch.equal(sight.features["net.1"], hidden)
        assert torch.equal(sight.call.labels, y)
        assert sight.call.batch_size == BATCH
        assert not sight.call.input.requires_grad
        assert not sight.features["net.1"].requires_grad
    assert not torch.equal(teach.sights[-1].call.logits, teach.students[-1][1].to(logits))


def test_nobody_notices():
    class Talkative(WithBatchNorm):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(CLASSES)

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x + 0.1 * torch.rand_like(x) + random.random() + np.random.rand()  # noqa: NPY002 # a user may
            loss = F.cross_entropy(self(x), y)
            self.log("loss", loss)
            self.accuracy(torch.zeros(len(y), CLASSES), y)
            self.logger.log_metrics({"by hand": loss.item()}, self.trainer.global_step)
            return loss

    from tests.conformance.harness import _Recorder

    runs = []
    for techniques in ([], [Teach()], [Teach(training=True)]):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 # as above
        module, losses, logger = Talkative(), StepLosses(), _Recorder()
        fit(module, *techniques, losses, logger=logger)
        rows = [(s, {k: v for k, v in row.items() if not k.startswith("reg/")}) for s, row in logger.rows]
        runs.append((losses.losses, [row for row in rows if row[1]], weights_of(module), module.accuracy._update_count))
        if techniques:
            peer = techniques[0].peer
            buffers = [b for _, b in peer.module.named_buffers()]
            assert all(torch.equal(a, b) for a, b in zip(buffers, Talkative().buffers(), strict=True))
            assert peer.module.accuracy._update_count == 0
    assert runs[0][:2] == runs[1][:2] == runs[2][:2]
    assert runs[0][3] == runs[1][3] == runs[2][3]
    for run in runs[1:]:
        assert same_weights(run[2], runs[0][2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_buffers_that_the_step_moves_stay(in_place, training):
    class Centred(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.ones(INPUTS))
            self.register_buffer("seen", None)

        def training_step(self, batch, batch_idx):
            if in_place:
                self.center.mul_(0.5)
            else:
                self.center, self.seen = 0.5 * self.center, batch[0]
            return F.cross_entropy(self(batch[0] - self.center), batch[1])

    module, teach = Centred(), Teach(training=training)
    fit(module, teach, max_epochs=1)
    assert module.center.tolist() == [0.5**4] * INPUTS
    assert teach.peer.module.center.tolist() == [1.0] * INPUTS
    assert teach.peer.module.seen is None


def test_draws_what_the_users_module_draws():
    seen = []

    def step(module, batch):
        x = batch[0] + torch.rand_like(batch[0])
        seen.append(x)
        return F.cross_entropy(module(x), batch[1])

    fit(Classifier(step), Teach(), max_epochs=1)
    assert len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_train_mode_is_a_choice():
    for training in (False, True):
        teach = Teach(training=training)
        fit(Classifier(dropout=0.9, lr=0.0), teach, max_epochs=1)
        same = [torch.equal(s.call.input, z) for s, (_, z, _) in zip(teach.sights, teach.students, strict=True)]
        # In train mode it drops the same units, as it draws the same numbers.
        assert same == [training] * 4


def two_losses(module, batch):
    x, y = batch
    logits = module(x)
    with torch.no_grad():
        F.cross_entropy(2 * logits, y)
    F.cross_entropy(3 * logits.detach(), y)  # a metric, in the student too
    return F.cross_entropy(logits, y) + F.mse_loss(logits, F.one_hot(y, CLASSES).float())


@pytest.mark.parametrize(
    ("loss", "function"), [(0, "cross_entropy"), (1, "mse_loss"), ("mse_loss",) * 2, ("last", "mse_loss")]
)
def test_the_same_call_as_the_students(loss, function):
    teach = Teach(loss=loss)
    fit(Classifier(two_losses, lr=0.0), teach)
    assert [s.call.name for s in teach.sights] == [name for name, *_ in teach.students] == [function] * 8
    for sight, (_, logits, _) in zip(teach.sights, teach.students, strict=True):
        assert torch.equal(sight.call.input, logits)


def test_a_choice_that_is_not_certain_is_refused_as_it_is_for_the_student():
    with pytest.raises(MisconfigurationException, match=r"Teach: the training step calls 2 losses.*\n.*cross_entropy"):
        fit(Classifier(two_losses), Teach())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_loss_has_no_call():
    class Skip(Teach):
        def observe_batch(self, step):
            super().observe_batch(step)
            self.calls.append(step.notes[self].call is not None)

    def step(module, batch):
        return None if batch[1][0] == 0 else F.cross_entropy(module(batch[0]), batch[1])

    teach, losses = Skip(), StepLosses()
    teach.calls = []
    fit(Classifier(step), teach, losses)
    assert len(teach.students) == sum(loss is not None for loss in losses.losses) < 8
    assert teach.calls == [loss is not None for loss in losses.losses]


def test_a_loss_by_hand():
    class ByHand(LossMixin, Classifier):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            per_sample = -logits.log_softmax(1).gather(1, batch[1][:, None])[:, 0]
            return self.reduce_loss(per_sample, logits=logits, targets=batch[1])

    module, teach = ByHand(lr=0.0), Teach()
    fit(module, teach)
    for sight, (_, losses, (x, y)) in zip(teach.sights, teach.students, strict=True):
        assert torch.equal(sight.call.input, losses)
        assert torch.equal(sight.call.logits, module(x))
        assert torch.equal(sight.call.labels, y)
    assert "reduce_loss" not in vars(teach.peer.module)


def test_features_without_a_loss_call():
    teach = Teach(layers=["net.0", "net.1"], asks=False, loss=0)
    fit(Classifier(two_losses, lr=0.0), teach, max_epochs=1)
    assert all(sight.call is None and list(sight.features) == ["net.0", "net.1"] for sight in teach.sights)
    with pytest.raises(MisconfigurationException, match=r"No layer is named 'net.9'"):
        fit(Classifier(), Teach(layers=["net.9"]))


def test_activations_are_not_kept():
    alive = []

    class Deep(Classifier):
        def forward(self, x):
            hidden = self.net[0](x).exp()
            storage = StorageWeakRef(hidden.untyped_storage())
            out = self.net[3](hidden.tanh())
            del hidden
            alive.append(not storage.expired())
            return out

    fit(Deep(), Teach(), max_epochs=1)
    assert alive == [False, True] * 4  # the copy, then the module itself, which needs them for the gradient


def test_a_batch_changed_in_place_is_refused():
    def step(module, batch):
        return F.cross_entropy(module(batch[0].mul_(2)), batch[1])

    with pytest.raises(MisconfigurationException, match=r"training_step changes its batch in place.*x \+= noise"):
        fit(Classifier(step), Teach())


def test_gradients_inside_the_step_are_refused():
    def step(module, batch):
        x = batch[0].clone().requires_grad_()
        logits = module(x)
        (slope,) = torch.autograd.grad(logits.exp().sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + slope.square().mean()

    for technique in (Teach(), FeatureDistillation("net.0", anchor="start_of_fit")):
        with pytest.raises(RuntimeError, match="`training_step` asks for gradients itself"):
            fit(Classifier(step), technique)


def test_a_step_that_fetches_batches_itself_is_refused():
    class Fetches(Classifier):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(MisconfigurationException, match=r"Teach runs .* would fetch another batch"):
        Peer(Fetches(), owner=Teach())


def test_manual_optimization_is_refused():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"Teach runs .* which would train there under automatic_optim"):
        Peer(module, owner=Teach())


def test_an_exception_leaves_nothing_behind():
    def step(module, batch):
        raise ZeroDivisionError

    teach = Teach()
    with pytest.raises(ZeroDivisionError):
        fit(Classifier(step), teach, loader=make_loader())
    twin = teach.peer.module
    assert twin._trainer is None
    assert not {"log", "log_dict"} & vars(twin).keys()
    assert [len(layer._forward_hooks) for layer in twin.modules()] == [0] * 6
