"""A target task of linear ones when a budget goes to the sources alike, by squared relevance, or by SourceTasks.

40 inputs, 5 features, 60 sources with random heads of length 1, noise of standard deviation 1. 60 samples of each
source come first; features and heads are fitted on them by least squares in turns (15, from the leading directions of
each task alone), the target's head on 4000 samples of its own. Then samples are bought up to 9000 in all, these first
ones among them, everything is fitted anew, and so is the target's head. The error is the squared distance of the
target's 40 coefficients, in thousandths. "Known": the relevance is that of the true heads. One seed has the same
samples in all arms and columns.

Columns: "error", with the target's head random and of length 1. "Squared length 1.56": the same head, 1.25 long; the
error grows with the square of that length. Earlier figures of this experiment are of a target whose length was not
noted: 40.9 alike, and 0.54 and 0.46 of that by squares and by L1; 1.25 was chosen after looking, to have a column of
their size. "40 samples": of the target, of length 1; noise alone gives its head an error of 5 / (40 - 6) = 147
thousandths then. "Of the features with 40": the part of the coefficients outside the fitted features, which is all that
the draws can change.
"""

import torch
from _shared import Arm

from lightning_reg.functional import (
    allocate,
    head_noise,
    relevance_l1,
    relevance_l2,
    residual_lam,
    sampling_probs,
    target_head,
)

INPUTS, FEATURES, SOURCES, FIRST, TOTAL, TARGET = 40, 5, 60, 60, 9000, 4000
COLUMNS = {"error": (1.0, TARGET), "squared length 1.56": (1.25, TARGET), "40 samples": (1.0, 40)}
ARMS = {
    "alike": ("uniform", False),
    "by squares (L2)": ("l2", False),
    "SourceTasks (L1)": ("l1", False),
    "by squares, known": ("l2", True),
    "L1, known": ("l1", True),
}


def heads_on(basis, xx, xy):
    return torch.linalg.solve(basis.T @ xx @ basis, (xy @ basis)[..., None])[..., 0].T


def representation(data, turns=15):
    """Features and heads of all tasks, by least squares in turns, from the leading directions of each alone."""
    xx, xy = (torch.stack([x.T @ other for x, other in pairs]) for pairs in ([(x, x) for x, _ in data], data))
    n = torch.tensor([len(x) for x, _ in data], dtype=torch.float64)[:, None]
    eye = torch.eye(INPUTS, dtype=torch.float64)
    alone = torch.linalg.solve(xx + 1e-3 * n[..., None] * eye, xy[..., None])[..., 0] * n.sqrt()
    basis = torch.linalg.svd(alone.T)[0][:, :FEATURES]
    for _ in range(turns):
        heads = heads_on(basis, xx, xy)
        left = torch.einsum("km,lm,mij->kilj", heads, heads, xx).reshape(FEATURES * INPUTS, -1)
        basis = torch.linalg.qr(torch.linalg.solve(left, (heads @ xy).flatten()).view(FEATURES, INPUTS).T)[0]
    return basis, heads_on(basis, xx, xy)


def relevance(order, columns, target, lam):
    if order == "uniform":
        return torch.ones(SOURCES)
    return relevance_l2(columns, target) if order == "l2" else relevance_l1(columns, target, lam, scale=True)


def errors_of(seed):
    """By arm and column, in thousandths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def samples(head, count):
        x = draw(count, INPUTS)
        return x, x @ basis @ head + draw(count)

    basis, heads, head = torch.linalg.qr(draw(INPUTS, FEATURES))[0], draw(FEATURES, SOURCES), draw(FEATURES)
    heads, head = heads / heads.norm(dim=0), head / head.norm()
    first = [samples(one, FIRST) for one in heads.T]
    inputs, noise = draw(TARGET, INPUTS), draw(TARGET)
    found, columns = representation(first)
    counts = {}
    for column, (length, count) in COLUMNS.items():
        x = inputs[:count]
        y = x @ basis @ head * length + noise[:count]
        target = target_head(x @ found, y, 0.0)
        lam = residual_lam(columns, target, head_noise(x @ found, y, 0.0), scale=True)
        for arm, (order, known) in ARMS.items():
            nu = relevance(order, heads, head, 0.0) if known else relevance(order, columns, target, lam)
            counts[arm, column] = allocate(sampling_probs(nu, order), TOTAL, FIRST)
    most = torch.stack([*counts.values()]).amax(0).tolist()
    pools = [samples(one, count - FIRST) for one, count in zip(heads.T, most, strict=True)]
    pools = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(first, pools, strict=True)]
    errors = {arm: {} for arm in ARMS}
    for (arm, column), numbers in counts.items():
        new, _ = representation([(x[:n], y[:n]) for (x, y), n in zip(pools, numbers.tolist(), strict=True)])
        (length, count), truth = COLUMNS[column], basis @ head
        x = inputs[:count]
        fitted = new @ target_head(x @ new, x @ truth * length + noise[:count], 0.0)
        errors[arm][column] = 1000 * float((fitted - length * truth).square().sum())
        if count < TARGET:
            outside = (truth - new @ (new.T @ truth)) * length
            errors[arm]["of the features with 40"] = 1000 * float(outside.square().sum())
    return errors


def run(seeds):
    arms = {name: Arm(name) for name in ARMS}
    for seed in seeds:
        for name, errors in errors_of(seed).items():
            arms[name].add(**errors)
    return list(arms.values())
