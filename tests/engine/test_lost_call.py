"""A loss call that was seen and is seen no more."""

import warnings

import torch.nn.functional as F

from tests.toys import QUIET, Classifier, Term, fit, make_loader, same_weights

pytestmark = QUIET


def by_hand(logits, y):
    return -logits.log_softmax(1).gather(1, y[:, None]).mean()


def turns_by_hand(after, until=99):
    def step(module, batch):
        module.steps = getattr(module, "steps", 0) + 1
        x, y = batch
        return (by_hand if after < module.steps <= until else F.cross_entropy)(module(x), y)

    return step


def warnings_of(step, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Classifier(step=step)
        fit(module, Term(), loader=make_loader(), **options)
    return module, [str(w.message) for w in caught if "seen" in str(w.message)]


def test_is_said_when_it_happens_and_once_more_when_it_is_certain():
    _, said = warnings_of(turns_by_hand(after=2), max_steps=8)
    assert len(said) == 2
    assert "not seen in the step after global step 2" in said[0]
    assert said[1].startswith("Term: the step after global step 3 made a loss without a call that could be seen")


def test_is_taken_again_when_it_comes_back():
    def same_by_hand(module, batch):
        module.steps = getattr(module, "steps", 0) + 1
        logits = module(batch[0])
        term = 0 if module.steps in (3, 4) else 0.1 * logits.square().mean(1).mean()
        return F.cross_entropy(logits, batch[1]) + term

    module, said = warnings_of(turns_by_hand(after=2, until=4), max_steps=8)
    expected = Classifier(step=same_by_hand)
    fit(expected, loader=make_loader(), max_steps=8)
    assert len(said) == 2
    assert same_weights(module, expected, atol=1e-6)  # float32, another order of summation
