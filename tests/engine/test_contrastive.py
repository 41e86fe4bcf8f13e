"""What contrastive losses share."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine.loss.contrastive import contrastive_losses, info_nce, supervised_contrastive


def rows(count=7, width=3):
    generator = torch.Generator().manual_seed(5)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64)), torch.tensor(
        [0, 1, 0, 2, 1, 0, 9]
    )[:count]


def test_attraction_and_repulsion_by_loops():
    s = torch.tensor([[0.3, -1.0, 0.8], [1.0, 0.0, 2.0], [0.5, 0.1, 0.2]], dtype=torch.float64).requires_grad_()
    positive = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    negative = torch.tensor([[False, False, True], [True, True, False], [False, False, False]])
    push, more = torch.full((3, 3), 0.7, dtype=torch.float64), torch.tensor([0.1, 0.2, -math.inf], dtype=torch.float64)
    losses = contrastive_losses(s, positive, negative, push, more)
    bottom = math.exp(0.3) + math.exp(-1.0) + math.exp(0.8 + 0.7) + math.exp(0.1)
    first = -(math.log(math.exp(0.3) / bottom) + math.log(math.exp(-1.0) / bottom)) / 2
    assert losses.tolist() == pytest.approx([first, 0.0, 0.0])
    losses.sum().backward()
    assert s.grad.isfinite().all()
    assert (s.grad[1] == 0).all()
    anchors = torch.tensor([False, False, True])
    assert contrastive_losses(s, positive, negative, push, more, anchors).tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert contrastive_losses(s, positive, negative)[0].item() == pytest.approx(
        math.log(math.exp(0.3) + math.exp(-1.0) + math.exp(0.8)) + 0.35
    )


def by_loops(z, labels, temperature):
    """The supervised contrastive loss, one pair after the other."""
    total = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        bottom = sum(torch.exp(z[i] @ z[j] / temperature) for j in others)
        own = [-(torch.exp(z[i] @ z[j] / temperature) / bottom).log() for j in others if labels[j] == labels[i]]
        total += [sum(own) / len(own)] if own else []
    return sum(total) / len(total)


def test_supervised_contrast_by_loops():
    z, labels = rows()
    z.requires_grad_()
    value = supervised_contrastive(z, labels, 0.2)
    expected = by_loops(z, labels.tolist(), 0.2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)  # float64
    (one,), (two,) = torch.autograd.grad(value, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_where_every_row_is_alone_it_is_zero_with_a_gradient_of_zero():
    z, _ = rows()
    z.requires_grad_()
    value = supervised_contrastive(z, torch.arange(7), 0.2)
    value.backward()
    assert value.item() == 0.0
    assert (z.grad == 0).all()


def on_rank(first):
    import torch.distributed as dist

    mine = slice(0, first) if dist.get_rank() == 0 else slice(first, 7)
    theta = torch.eye(3, dtype=torch.float64).add(0.3).requires_grad_()
    z, labels = rows()
    z = F.normalize(z @ theta)[mine]
    group = dist.group.WORLD
    labels, keys = labels[mine], z.flip(1)
    values = [supervised_contrastive(z, labels, 0.2, group), info_nce(z, keys, 0.2, group)]
    values.append(info_nce(z, keys, 0.2, group, labels=labels))
    sum(values).backward()
    return *(value.item() for value in values), theta.grad


@pytest.mark.parametrize("first", [4, 2])
def test_the_mean_over_ranks_is_the_loss_of_all_rows_and_so_are_the_gradients(two_processes, first):
    theta = torch.eye(3, dtype=torch.float64).add(0.3).requires_grad_()
    z, labels = rows()
    z = F.normalize(z @ theta)
    scores, own = z @ z.flip(1).T / 0.2, torch.arange(7)
    same = (labels[:, None] == labels) & (own[:, None] != own)
    assert same.any()
    whole = [by_loops(z, labels.tolist(), 0.2), F.cross_entropy(scores, own)]
    whole.append(F.cross_entropy(scores.masked_fill(same, -torch.inf), own))
    sum(whole).backward()
    one, two = two_processes.run(on_rank, first)
    for part in (0, 1, 2):
        # float64, sums in another order
        assert (one[part] + two[part]) / 2 == pytest.approx(whole[part].item(), rel=1e-12)
    torch.testing.assert_close((one[3] + two[3]) / 2, theta.grad, rtol=1e-9, atol=1e-12)
