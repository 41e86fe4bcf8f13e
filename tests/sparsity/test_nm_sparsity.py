"""Progressive N:M sparsity."""

import copy
import csv
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_reg import NMSparsity
from lightning_reg.engine.host.errors import MisconfigurationException
from lightning_reg.functional import (
    best_channel_permutation,
    check_nm,
    decay_factor,
    nm_mask,
    pack_mask,
    pattern_at,
    semi_structured_refusal,
    sparsify_weight,
    to_semi_structured,
    unpack_mask,
)
from lightning_reg.sparsity.nm_sparsity._graph import Chain
from lightning_reg.sparsity.nm_sparsity._network import SparseNetwork
from lightning_reg.sparsity.nm_sparsity._permute import permute_network_
from lightning_reg.sparsity.nm_sparsity.export import layers_and_refusals
from tests.conformance.by_hand import Hand
from tests.conformance.case import Case
from tests.conformance.harness import difference, fit
from tests.toys import QUIET, make_trainer

# D depends on the optimizer step by definition, so `make` has a constant one: the law of precision compares runs with
# different numbers of optimizer steps. The recipes that decay are among the variants.


class SparsityByHand(Hand):
    """Straight through masks of 1:4 in the middle layer, and a pull on what is pruned."""

    layer, pattern, pull = "net.body.", (1, 4), 0.1

    def mask(self, name, weight):
        is_sparse = name.startswith(self.layer) and weight.dim() > 1
        kept = torch.ones_like(weight, dtype=torch.bool)
        return reference_mask(weight.detach(), *self.pattern) if is_sparse else kept

    def used(self, name, weight):
        return weight - (weight * ~self.mask(name, weight)).detach()

    def penalty(self, weights):
        return sum(self.pull / 2 * (w * ~self.mask(name, w)).square().sum() for name, w in weights.items())


CASE = Case(
    make=partial(NMSparsity, 1, 4, recipe="srste", lambda_w=0.1, dense_fraction=0.0),
    neutral=partial(NMSparsity, 4, 4),
    by_hand=SparsityByHand,
    says=(
        "1:4 srste, layers auto, dim=in",
        "4:4 keeps all weights: inactive",
        "2:4 mdgf_exp, layers auto, dim=in",
        "1:4 mdgf_linear, layers ['*.body'], dim=in",
        "1:4 sdgf_stepwise, layers auto, dim=in",
        "1:2 sdgf_geometric, layers auto, dim=out",
        "1:8 one_shot, layers auto, dim=in",
        "1:8 ste, layers auto, dim=in",
        "2:4 mdgf_exp, layers ['*.body', '*.head'], dim=in",
    ),
    also=["regression"],
    variants=[
        partial(NMSparsity, 2, 4, recipe="mdgf_exp"),
        partial(NMSparsity, 1, 4, recipe="mdgf_linear", beta=0.04, dense_steps=1, finetune_steps=8, layers=["*.body"]),
        partial(NMSparsity, 1, 4, recipe="sdgf_stepwise", refresh_every=3, exclude="*.head"),
        partial(NMSparsity, 1, 2, recipe="sdgf_geometric", geometric_k=4, dense_steps=4, dim="out"),
        partial(NMSparsity, 1, 8, recipe="one_shot", dense_fraction=0.4, harden_at_end=False),
        partial(NMSparsity, 1, 8, recipe="ste", dense_fraction=0.6, on_indivisible="error"),
        partial(NMSparsity, 2, 4, layers=["*.body", "*.head"], patterns={"*.head": [1, 2]}, grad="masked"),
    ],
    invalid=[
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"m": 0}, "m"),
        ({"beta": 0.0}, "beta"),
        ({"dense_fraction": -0.1}, "dense_fraction"),
        ({"dense_fraction": 1.0}, "dense_fraction"),
        ({"finetune_fraction": -0.1}, "finetune_fraction"),
        ({"finetune_fraction": 1.0}, "finetune_fraction"),
        ({"dense_fraction": 0.5, "finetune_fraction": 0.5}, "finetune_fraction"),
        ({"lambda_w": -1e-4}, "lambda_w"),
        ({"geometric_k": 0}, "geometric_k"),
        ({"geometric_k": 6}, "geometric_k"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"finetune_steps": -1}, "finetune_steps"),
        ({"refresh_every": 0}, "refresh_every"),
        ({"patterns": {"fc": [2]}}, "patterns"),
        ({"patterns": {"fc": [4, 2]}}, "patterns"),
        ({"patterns": {"fc": [1, 0]}}, "patterns"),
        ({"n": 3, "m": 8, "recipe": "sdgf_stepwise"}, "n"),
        ({"recipe": "sdgf_stepwise", "patterns": {"fc": [1, 6]}}, "patterns"),
    ],
)

pytestmark = QUIET

# -- masks ------------------------------------------------------------------------------------------------------------


def reference_mask(weight, n, m, dim="in"):
    """The definition, in loops: kept if fewer than N others of the group are larger, or equal and before it."""
    moved = weight.double().movedim(1 if dim == "in" else 0, -1)
    rows = moved.reshape(-1, moved.shape[-1]).tolist()
    kept = []
    for row in rows:
        for start in range(0, len(row), m):
            group = [abs(v) for v in row[start : start + m]]
            before = [[w > v or (w == v and j < i) for j, w in enumerate(group)] for i, v in enumerate(group)]
            kept += [sum(larger) < n for larger in before]
    return torch.tensor(kept).view(moved.shape).movedim(-1, 1 if dim == "in" else 0)


def with_ties(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float() / 4


PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (2, 3), (1, 8), (3, 8), (7, 8), (2, 6), (1, 16), (4, 16), (1, 32), (5, 24)]


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (8, 64), (1, 64), (1, 128)])
def test_mask_is_the_definition_to_the_last_tie(n, m):
    for weight in (with_ties(5, 2 * m), torch.randn(3, 3 * m, generator=torch.Generator().manual_seed(1))):
        mask = nm_mask(weight, n, m)
        assert torch.equal(mask, reference_mask(weight, n, m))
        groups, kept = weight.abs().view(-1, m), mask.view(-1, m)
        assert kept.sum(1).eq(n).all()
        smallest_kept = groups.masked_fill(~kept, math.inf).amin(1)
        assert (smallest_kept >= groups.masked_fill(kept, -math.inf).amax(1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 8), (5, 24)])
def test_other_dtypes_are_ranked_exactly(n, m, dtype):
    weight = torch.randn(4, 2 * m, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    weight[0] = 1.0 + torch.arange(2 * m, dtype=torch.float64).to(dtype) * torch.finfo(dtype).eps
    assert torch.equal(nm_mask(weight, n, m), reference_mask(weight, n, m))


def test_all_equal_keeps_the_first_and_zeros_are_a_tie():
    for n, m in PATTERNS:
        first = torch.arange(m).expand(3, m) < n
        assert torch.equal(nm_mask(torch.zeros(3, m), n, m), first)
        assert torch.equal(nm_mask(-torch.ones(3, m), n, m), first)


def test_extreme_values():
    tiny, huge, nan = torch.finfo(torch.float32).smallest_normal / 8, torch.finfo(torch.float32).max, math.nan
    assert nm_mask(torch.tensor([[0.0, -tiny, huge, -huge]]), 2, 4).tolist() == [[False, False, True, True]]
    assert nm_mask(torch.tensor([[nan, math.inf, -nan, huge]]), 2, 4).tolist() == [[True, False, True, False]]
    assert nm_mask(torch.full((2, 8), nan), 3, 8).sum(1).tolist() == [3, 3]


def test_pieces_do_not_show(monkeypatch):
    weight = with_ties(7, 48)
    whole = [nm_mask(weight, n, m) for n, m in ((2, 4), (1, 8), (3, 8), (1, 16), (5, 24))]
    monkeypatch.setitem(nm_mask.__wrapped__.__globals__, "_PIECE", 40)
    assert all(
        torch.equal(nm_mask(weight, n, m), mask)
        for (n, m), mask in zip(((2, 4), (1, 8), (3, 8), (1, 16), (5, 24)), whole, strict=True)
    )


def test_no_rows_and_patterns_that_keep_all():
    assert nm_mask(torch.zeros(0, 8), 2, 4).shape == (0, 8)
    assert nm_mask(torch.randn(3, 8), 4, 4).all()


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 2, 3)])
def test_convolutions_group_channels_at_a_fixed_kernel_position(kernel):
    weight = with_ties(6, 8, *kernel)
    mask = nm_mask(weight, 2, 4)
    matrix = weight.movedim(1, -1).reshape(-1, 8)  # (K R S, C)
    assert torch.equal(mask.movedim(1, -1).reshape(-1, 8), nm_mask(matrix, 2, 4))
    assert torch.equal(mask, reference_mask(weight, 2, 4))
    assert torch.equal(nm_mask(weight, 1, 3, "out"), reference_mask(weight, 1, 3, "out"))
    assert mask.stride() == weight.stride()


def test_channels_last_gives_the_same_mask_in_its_own_layout():
    weight = with_ties(4, 8, 3, 3)
    mask = nm_mask(weight.to(memory_format=torch.channels_last), 1, 8)
    assert torch.equal(mask, nm_mask(weight, 1, 8))
    assert mask.is_contiguous(memory_format=torch.channels_last)


def test_groups_along_out_are_those_of_the_transpose():
    weight = with_ties(8, 5)
    assert torch.equal(nm_mask(weight, 2, 4, "out"), nm_mask(weight.T.contiguous(), 2, 4).T)


@pytest.mark.parametrize(
    ("shape", "n", "m", "dim", "sentence"),
    [
        ((4, 6), 2, 4, "in", 'Groups of 4 do not fit a weight of shape (4, 6) along dim="in"'),
        ((6, 4), 2, 4, "out", 'Groups of 4 do not fit a weight of shape (6, 4) along dim="out"'),
        ((8,), 2, 4, "in", "Groups of 4 do not fit a weight of shape (8,)"),
        ((4, 8), 0, 4, "in", "`n` must be in [1, m], got n=0, m=4."),
        ((4, 8), 5, 4, "in", "`n` must be in [1, m], got n=5, m=4."),
        ((4, 8), 2, 4, "row", "`dim` must be 'in' or 'out', got 'row'."),
    ],
)
def test_impossible_groups_are_refused_and_never_straddle_rows(shape, n, m, dim, sentence):
    for function in (nm_mask, check_nm):
        with pytest.raises(ValueError, match="must be") as raised:
            function(torch.zeros(shape), n, m, dim)
        assert sentence in str(raised.value)


def test_violations_are_counted_by_group():
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert check_nm(weight, 2, 4) == 2
    assert check_nm(weight, 3, 4) == 1
    assert check_nm(weight, 1, 2, "out") == 3
    assert check_nm(weight * nm_mask(weight, 2, 4), 2, 4) == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4, 3), (0, 4)])
def test_packed_masks_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_packed_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"2 bytes do not hold a mask of shape \(3, 7\)"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), (3, 7))


# -- decay and gradients ----------------------------------------------------------------------------------------------


def test_decay_by_hand():
    assert decay_factor("linear", 625, 8e-4) == 0.5
    assert decay_factor("linear", 2000, 8e-4) == 0.0
    assert decay_factor("exp", 10_000, 1e-4) == pytest.approx(math.exp(-1), rel=1e-12)
    assert decay_factor("linear", 0, 8e-4) == decay_factor("exp", 0, 1e-4) == 1.0


@pytest.mark.parametrize(("kind", "step", "beta"), [("cosine", 0, 0.1), ("exp", -1, 0.1), ("exp", 0, 0.0)])
def test_decay_refuses(kind, step, beta):
    with pytest.raises(ValueError, match="`kind` must be 'linear' or 'exp', `step` at least 0 and `beta` above 0"):
        decay_factor(kind, step, beta)


def test_frames_of_the_paper():
    frames = partial(pattern_at, "sdgf_stepwise")
    assert [frames(1, 8, i) for i in range(5)] == [(7, 8), (4, 8), (2, 8), (1, 8), (1, 8)]
    assert [frames(2, 4, i) for i in range(2)] == [(3, 4), (2, 4)]
    assert frames(1, 2, 0) == (1, 2)
    geometric = [pattern_at("sdgf_geometric", 1, 8, i) for i in range(6)]
    assert geometric == [(16, 128), (8, 64), (4, 32), (2, 16), (1, 8), (1, 8)]
    assert pattern_at("sdgf_geometric", 1, 8, 0, k=8) == (8, 64)
    assert pattern_at("srste", 1, 8, 0) == (1, 8)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.75, 1.0])
def test_effective_weight_and_its_gradient(factor):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    mask = nm_mask(weight, 2, 4)
    effective = sparsify_weight(weight, mask, factor)
    assert torch.equal(effective, torch.where(mask, weight, weight * factor))
    if factor == 1.0:
        assert torch.equal(effective, weight)
    upstream = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    (plain,) = torch.autograd.grad(effective, weight, upstream)
    assert torch.equal(plain, upstream)
    (pulled,) = torch.autograd.grad(sparsify_weight(weight, mask, factor, lambda_w=0.5), weight, upstream)
    torch.testing.assert_close(pulled - upstream, 0.5 * weight.detach() * ~mask)


# -- layers -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding, an attention, convolutions, a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.wide = nn.Linear(8, 12)
        self.odd = nn.Linear(6, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.twin = nn.Linear(8, 12)
        self.twin.weight = self.wide.weight
        self.tied = nn.Linear(8, 16)
        self.tied.weight = self.embedding.weight
        self.lazy = nn.LazyLinear(8)
        self.head = nn.Linear(8, 4)


def decisions(net, **kwargs):
    sparse = NMSparsity(**kwargs)
    sparse.weights_to_edit(net)
    return {w.name: w.why_dense or f"{w.n}:{w.m}" for w in sparse._network.weights}


def test_what_becomes_of_every_weight():
    assert decisions(Net()) == {
        "attention.in_proj_weight": "2:4",
        "attention.out_proj.weight": "2:4",
        "wide.weight": "2:4",
        "odd.weight": "not divisible: 6 in by 4",
        "depthwise.weight": "too small: 1 in for groups of 4",
        "frozen.weight": "frozen",
        "normed.weight": "computed from other parameters",
        "twin.weight": "same weight as wide.weight",
        "tied.weight": "shared with embedding",
        "lazy.weight": "has no shape yet",
        "head.weight": "head",
    }


def test_first_layer_and_head_are_left_out_by_auto_only():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    assert decisions(net) == {"0.weight": "first layer", "2.weight": "2:4", "3.weight": "head"}
    assert decisions(net, layers=["0", "3"]) == {"0.weight": "2:4", "2.weight": "not in `layers`", "3.weight": "2:4"}
    assert decisions(net, exclude=["2"], layers=["*"])["2.weight"] == "excluded"
    assert decisions(net, layers="*", patterns={"3": [1, 8], "[03]": [4, 4]}) == {
        "0.weight": "the pattern keeps all weights",
        "2.weight": "2:4",
        "3.weight": "1:8",
    }


class OwnLinear(nn.Module):
    """As torch_geometric has it: a Linear of its own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    """As transformers has it: a linear layer whose weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf, self.weight, self.bias = (
            outputs,
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.bias = nn.Parameter(torch.randn(2, 8, 16)), nn.Parameter(torch.zeros(16))


def foreign():
    torch.manual_seed(0)
    parts = {"first": OwnLinear(8, 8), "own": OwnLinear(8, 8), "conv": Conv1D(8, 6), "experts": Experts()}
    return nn.ModuleDict(parts | {"lstm": nn.LSTM(8, 4), "up": nn.ConvTranspose1d(8, 8, 3), "head": OwnLinear(6, 4)})


def test_layers_of_other_libraries_become_sparse_and_what_is_left_out_is_said():
    left_out = {
        "experts.gate_up_proj": "of Experts, which is no linear layer known",
        "lstm.weight_ih_l0": "of LSTM, which is no linear layer known",
        "lstm.weight_hh_l0": "of LSTM, which is no linear layer known",
        "up.weight": "of ConvTranspose1d, which is no linear layer known",
    }
    assert decisions(foreign()) == {
        "first.weight": "first layer", "own.weight": "2:4", "conv.weight": "2:4", **left_out, "head.weight": "head",
    }  # fmt: skip
    assert decisions(foreign(), layers="conv")["conv.weight"] == "2:4"
    assert decisions(foreign(), layers="conv", dim="out", m=3)["conv.weight"] == "2:3"
    assert decisions(foreign(), patterns={"conv": [2, 16]})["conv.weight"] == "too small: 8 in for groups of 16"
    with pytest.raises(MisconfigurationException, match=r"experts.gate_up_proj: of Experts, which is no linear layer"):
        decisions(foreign(), layers="experts")
    rows = {row.name: row for row in NMSparsity().report(foreign()).rows}
    assert {name: rows[name].why_dense for name in left_out} == left_out
    assert all((rows[name].pattern, rows[name].flops_dense) == ("dense", 0) for name in left_out)
    assert (rows["conv.weight"].shape, rows["conv.weight"].flops_dense) == ("8x6", 96)


class Mixture(nn.Module):
    """Two experts, of which the router chooses one for each sample."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.gate = nn.Linear(8, 2)

    def forward(self, x):
        weight, expert = self.gate(x).softmax(-1).max(-1, keepdim=True)
        return weight * torch.where(expert == 0, self.experts[0](x), self.experts[1](x))


def test_routers_of_experts_are_left_out_by_auto_and_are_no_head():
    net = nn.ModuleDict({"first": nn.Linear(4, 8), "moe": Mixture()})
    assert decisions(net) == {
        "first.weight": "first layer", "moe.experts.0.weight": "2:4", "moe.experts.1.weight": "head",
        "moe.gate.weight": "router",
    }  # fmt: skip
    assert decisions(net, layers="moe")["moe.gate.weight"] == "2:4"
    assert decisions(net, layers="*.gate")["moe.gate.weight"] == "2:4"


def test_a_transposed_weight_has_its_groups_along_its_inputs():
    net = foreign()
    conv, own = net["conv"].weight.detach().clone(), net["own"].weight.detach().clone()
    sparse = NMSparsity(2, 4)
    sparse.harden(net)
    assert torch.equal(net["conv"].weight, (conv.t() * reference_mask(conv.t(), 2, 4)).t())
    assert torch.equal(net["own"].weight, own * reference_mask(own, 2, 4))
    assert sparse.verify(net) == {"own.weight": (0.5, 0), "conv.weight": (0.5, 0)}
    other = NMSparsity(2, 3, dim="out", layers="conv")
    other.harden(net := foreign())
    assert torch.equal(net["conv"].weight, (conv.t() * reference_mask(conv.t(), 2, 3, "out")).t())


def test_a_transposed_weight_trains_with_the_pattern():
    class Foreign(Digits):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(OwnLinear(64, 8), nn.ReLU(), Conv1D(8, 8), nn.ReLU(), OwnLinear(8, 10))

    module, _ = train(NMSparsity(1, 4, recipe="ste", layers="net.2", dense_fraction=0.0), module=Foreign(), epochs=1)
    assert module.net[2].weight.view(2, 4, 8).count_nonzero(1).max() == 1


def test_split_rows_of_a_transposed_weight_are_refused():
    sparse = NMSparsity()
    sparse.weights_to_edit(foreign())
    assert sparse.needs_whole_parameters() == (
        "groups along the inputs of 'conv.weight', a weight of shape (in, out), reach over many rows"
    )


def test_the_report_lists_weights_under_all_their_names_and_computed_ones():
    rows = {row.name: row for row in NMSparsity().report(Net()).rows}
    assert list(rows) == list(decisions(Net()))
    assert (rows["twin.weight"].why_dense, rows["twin.weight"].shape) == ("same weight as wide.weight", "12x8")
    assert (rows["tied.weight"].why_dense, rows["tied.weight"].flops_dense) == ("shared with embedding", 256)
    assert (rows["normed.weight"].why_dense, rows["normed.weight"].shape) == ("computed from other parameters", "")


def test_groups_along_out_do_not_reach_from_one_projection_into_the_next():
    attention = nn.ModuleDict({"a": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2), "z": nn.Linear(4, 4)})
    # 12 rows are a multiple of 6, the 4 of each projection are not.
    with pytest.raises(MisconfigurationException, match=r"in_proj_weight: too small: 4 out for groups of 6"):
        decisions(attention, n=1, m=6, dim="out")


def test_attention_with_other_key_sizes_has_three_weights():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4, vdim=12)})
    found = decisions(net, layers="attention.?_proj_weight")
    assert found == {
        "attention.q_proj_weight": "2:4",
        "attention.k_proj_weight": "2:4",
        "attention.v_proj_weight": "2:4",
        "attention.out_proj.weight": "not in `layers`",
    }


def test_patterns_match_weights_layers_and_modules_around_them_by_their_whole_names():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "ab": nn.MultiheadAttention(8, 2)})
    names = ["a.0.weight", "a.1.weight", "ab.in_proj_weight", "ab.out_proj.weight"]

    def chosen(layers, **kwargs):
        return [name for name, said in decisions(net, layers=layers, **kwargs).items() if said == "2:4"]

    assert chosen("*") == names
    assert chosen("a") == names[:2]
    assert chosen("a.1") == chosen("a.1.weight") == chosen("?.1.*") == names[1:2]
    assert chosen("ab") == names[2:]
    assert chosen("ab.out_proj") == names[3:]
    assert chosen("*weight", exclude="ab") == names[:2]  # a string is one pattern, and not one for each letter
    assert chosen("*", exclude=["a.0", "ab.out*"]) == names[1:3]
    assert chosen(["a", "ab"], patterns={"ab.*": [1, 4], "ab": [1, 2]}) == names[:2]
    with pytest.raises(MisconfigurationException, match=r"\(layers=\['b'\]\)"):
        chosen("b")


def test_geometric_frames_shrink_to_what_fits():
    net = nn.Sequential(nn.Linear(24, 8))
    sparse = NMSparsity(1, 2, recipe="sdgf_geometric", geometric_k=16, layers="0")
    sparse.weights_to_edit(net)
    (weight,) = sparse._network.weights
    assert weight.patterns == ((4, 8), (4, 8), (4, 8), (2, 4), (1, 2))  # 24 is no multiple of 16


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"layers": "hed"}, "(layers=['hed']): no linear, convolution or attention layer has such a name. Near"),
        ({"exclude": ["hed"]}, "(exclude=['hed']): no linear, convolution or attention layer has such a name."),
        ({"patterns": {"hed": [1, 4]}}, "(patterns=['hed']): no linear, convolution or attention layer has such a"),
        ({"layers": "odd"}, ": no weight can become sparse."),
        ({"layers": "odd", "on_indivisible": "error"}, ": 'odd.weight' of shape (8, 6) is not divisible: 6 in by 4."),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit_are_refused_by_name(kwargs, sentence):
    with pytest.raises(MisconfigurationException) as raised:
        NMSparsity(**kwargs).weights_to_edit(Net())
    assert str(raised.value).startswith(f"NMSparsity{sentence}")


def test_a_network_without_layers_is_refused():
    with pytest.raises(MisconfigurationException, match="There is no linear or convolution layer"):
        NMSparsity().weights_to_edit(nn.LayerNorm(4))


# -- phases -----------------------------------------------------------------------------------------------------------


class Digits(LightningModule):
    """A net whose body is sparse by default; AdamW, whose momentum and decay keep moving pruned weights."""

    def __init__(self, lr=2e-3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
            self.net = nn.Sequential(*layers, nn.Linear(64, 10))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)


BODY = ("net.2.weight", "net.4.weight")


def digits(start=0, stop=640):
    data = load_digits()
    x = torch.tensor(data.data[start:stop], dtype=torch.float32) / 16
    return TensorDataset(x, torch.tensor(data.target[start:stop]))


def train(sparse, epochs=2, module=None, callbacks=(), ckpt=None, size=640, **kwargs):
    """640 digits in batches of 64: 10 steps per epoch, in order."""
    seed_everything(0, verbose=False)
    module = module or Digits()
    before = [sparse] if sparse is not None else []
    trainer = make_trainer(max_epochs=epochs, callbacks=[*before, *callbacks], **kwargs)
    trainer.fit(module, DataLoader(digits(stop=size), 64), ckpt_path=ckpt)
    return module, trainer


class Watch(Callback):
    """Notes what the forward pass of every step sees of one weight, and the dense weight after it."""

    def __init__(self, name="net.2.weight"):
        self.name, self.effective, self.dense, self.gradients = name, [], [], []

    def on_fit_start(self, trainer, pl_module):
        self.module = pl_module
        self.handle = pl_module.net.register_forward_pre_hook(self.note)

    def note(self, layer, args):  # a method: a copy of the module has a watch of its own
        self.effective.append(dict(self.module.named_parameters())[self.name].detach().clone())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        weight = dict(pl_module.named_parameters())[self.name]
        self.dense.append(weight.detach().clone())
        self.gradients.append(weight.grad.clone())

    def on_fit_end(self, trainer, pl_module):
        self.handle.remove()

    def factors(self, n, m):
        """D of each step, read off the weights themselves; 1 where nothing was pruned."""
        pruned = [~nm_mask(w, n, m) for w in self.dense]
        return [float((e[p] / w[p]).mean()) for e, w, p in zip(self.effective, self.dense, pruned, strict=True)]


def by_the_formula(recipe, steps, dense, final, beta):
    def factor(j):
        if j < dense:
            return 1.0
        if j >= final:
            return 0.0
        return max(1 - beta * (j - dense), 0.0) if recipe == "mdgf_linear" else math.exp(-beta * (j - dense))

    return [factor(j) for j in range(steps)]


@pytest.mark.parametrize(
    ("recipe", "beta", "kwargs", "dense", "final", "solved"),
    [
        ("mdgf_linear", 0.05, {"dense_steps": 3, "finetune_steps": 4}, 3, 16, 0.05),
        ("mdgf_exp", 0.2, {"dense_steps": 0, "finetune_steps": 1}, 0, 19, 0.2),
        ("mdgf_linear", None, {"dense_fraction": 0.1, "finetune_fraction": 0.2}, 2, 16, 1 / 12),
        ("mdgf_exp", None, {"dense_fraction": 0.1, "finetune_fraction": 0.2}, 2, 16, math.log(1000) / 12),
        ("mdgf_exp", None, {"dense_fraction": 0.1, "finetune_fraction": 0.5}, 2, 10, math.log(1000) / 8),
    ],
)
def test_phases_begin_and_end_on_time(recipe, beta, kwargs, dense, final, solved):
    watch = Watch()
    train(NMSparsity(1, 8, recipe=recipe, beta=beta, **kwargs), callbacks=[watch])
    assert watch.factors(1, 8) == pytest.approx(by_the_formula(recipe, 20, dense, final, solved), abs=1e-6)


def test_solved_linear_decay_is_zero_at_seventy_percent_and_exactly_so():
    watch = Watch()
    train(NMSparsity(1, 8, recipe="mdgf_linear", dense_fraction=0.0, finetune_fraction=0.0), callbacks=[watch])
    assert [check_nm(w, 1, 8) == 0 for w in watch.effective] == 14 * [False] + 6 * [True]


@pytest.mark.parametrize(
    ("recipe", "k", "frames"),
    [
        ("sdgf_stepwise", 16, [(7, 8), (4, 8), (2, 8), (1, 8)]),
        ("sdgf_geometric", 8, [(8, 64), (4, 32), (2, 16), (1, 8)]),
    ],
)
def test_frames_are_equally_long_between_the_dense_phase_and_fine_tuning(recipe, k, frames):
    watch = Watch()
    sparse = NMSparsity(1, 8, recipe=recipe, geometric_k=k, dense_steps=2, finetune_steps=4)
    train(sparse, callbacks=[watch])
    starts = [2 + int(i * 14 / 4) for i in range(4)] + [20]
    assert torch.equal(watch.effective[1], watch.dense[1])
    for (n, m), start, stop in zip(frames, starts, starts[1:], strict=False):
        for step in range(start, stop):
            assert torch.equal(watch.effective[step], watch.dense[step] * nm_mask(watch.dense[step], n, m)), step


@pytest.mark.parametrize("recipe", ["ste", "srste", "one_shot"])
def test_recipes_without_a_decay_are_sparse_from_the_end_of_the_dense_phase(recipe):
    watch = Watch()
    train(NMSparsity(1, 8, recipe=recipe, dense_steps=7), callbacks=[watch])
    assert [check_nm(w, 1, 8) == 0 for w in watch.effective] == 7 * [False] + 13 * [True]


def test_accumulation_counts_optimizer_steps():
    watch = Watch()
    train(NMSparsity(1, 8, recipe="mdgf_linear", beta=0.1, dense_steps=1, finetune_steps=1), callbacks=[watch],
          accumulate_grad_batches=5, epochs=4)  # fmt: skip
    effective = watch.effective[::5]
    assert len(effective) == 8
    pruned = ~nm_mask(watch.dense[3], 1, 8)
    assert float((effective[3][pruned] / watch.dense[3][pruned]).mean()) == pytest.approx(0.8, abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(watch.effective[15:19], watch.effective[16:20], strict=True))


def test_lengths_that_are_not_known_or_not_enough_are_refused():
    with pytest.raises(MisconfigurationException, match="counts its phases from the length of the training"):
        train(NMSparsity(), epochs=-1)
    with pytest.raises(MisconfigurationException, match="15 dense steps and 6 of fine-tuning are more than the 20"):
        train(NMSparsity(dense_steps=15, finetune_steps=6))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "pull"), [("mdgf_linear", 0.0), ("srste", 0.3)])
def test_training_is_that_of_a_loop_written_by_hand(recipe, pull):
    sparse = NMSparsity(
        1, 4, recipe=recipe, lambda_w=0.3, dense_steps=4, finetune_steps=6, beta=0.15, harden_at_end=False
    )
    module, _ = train(sparse)
    other = Digits()
    optimizer, batches = other.configure_optimizers(), list(DataLoader(digits(), 64))
    for step in range(20):
        x, y = batches[step % 10]
        factor = 1.0 if step < 4 else 0.0 if step >= 14 or recipe == "srste" else max(1 - 0.15 * (step - 4), 0.0)
        weights = dict(other.named_parameters())
        masks = {name: reference_mask(weights[name].detach(), 1, 4) for name in BODY}
        effective = {name: weights[name].detach() * torch.where(mask, 1.0, factor) for name, mask in masks.items()}
        effective = {name: value.requires_grad_() for name, value in effective.items()}
        rest = {name: value for name, value in weights.items() if name not in BODY}
        optimizer.zero_grad()
        stripped = {name.removeprefix("net."): value for name, value in (rest | effective).items()}
        F.cross_entropy(torch.func.functional_call(other.net, stripped, (x,)), y).backward()
        for name in BODY:
            weights[name].grad = effective[name].grad
            if pull and factor == 0.0:
                weights[name].grad = weights[name].grad + pull * weights[name].detach() * ~masks[name]
        optimizer.step()
    for name, value in other.named_parameters():
        torch.testing.assert_close(dict(module.named_parameters())[name], value, atol=1e-6, rtol=1e-5)


def test_pruned_weights_of_one_shot_never_come_back_and_get_no_gradient():
    watch = Watch()
    sparse = NMSparsity(1, 8, recipe="one_shot", dense_steps=5)
    module, _ = train(sparse, callbacks=[watch], epochs=4)
    mask = nm_mask(watch.dense[5], 1, 8)
    assert all(torch.equal(w != 0, mask) for w in watch.effective[5:])
    assert all(not g[~mask].any() for g in watch.gradients[5:])
    assert torch.equal(module.net[2].weight != 0, mask)


def test_masked_gradients_are_multiplied_by_what_the_weights_are():
    watch = Watch()
    train(NMSparsity(1, 8, recipe="mdgf_linear", beta=0.25, dense_steps=0, grad="masked"), callbacks=[watch], epochs=1)
    plain = Watch()
    train(NMSparsity(1, 8, recipe="mdgf_linear", beta=0.25, dense_steps=0), callbacks=[plain], epochs=1)
    assert torch.equal(watch.gradients[0], plain.gradients[0])
    mask = nm_mask(watch.dense[1], 1, 8)
    assert not watch.gradients[-1][~nm_mask(watch.dense[-1], 1, 8)].any()
    assert watch.gradients[1][~mask].any()


def test_masks_are_kept_for_as_many_steps_as_asked():
    watch = Watch()
    train(NMSparsity(1, 8, recipe="ste", dense_steps=0, refresh_every=4), callbacks=[watch])
    chosen = [torch.equal(e != 0, nm_mask(w, 1, 8)) for e, w in zip(watch.effective, watch.dense, strict=True)]
    assert chosen[::4] == [True] * 5
    assert not all(chosen)
    for start in range(0, 20, 4):
        assert all(torch.equal(w != 0, watch.effective[start] != 0) for w in watch.effective[start : start + 4])


def test_biases_stay():
    module = Digits()
    with torch.no_grad():
        for layer in module.net[::2]:
            layer.bias.fill_(0.5)
    x = digits().tensors[0][:5]
    NMSparsity(1, 8, layers=["*"]).harden(module)
    by_hand = x
    for layer in module.net[:-1:2]:
        by_hand = (by_hand @ layer.weight.T + 0.5).relu()
    torch.testing.assert_close(module.net(x), by_hand @ module.net[-1].weight.T + 0.5)
    assert all(bool((layer.bias == 0.5).all()) for layer in module.net[::2])


def test_hardening_does_not_change_a_network_whose_mask_is_final():
    seen = []

    class Outputs(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(pl_module.net[2].weight.detach().clone())

    sparse = NMSparsity(1, 8, finetune_fraction=0.3)
    module, _ = train(sparse, callbacks=[Outputs()])
    assert torch.equal(seen[0], module.net[2].weight)
    before = module.net(digits().tensors[0])
    sparse.harden(module)
    assert torch.equal(module.net(digits().tensors[0]), before)
    assert sparse.verify(module) == dict.fromkeys(BODY, (1 / 8, 0))


def test_without_hardening_the_dense_weights_stay():
    module, _ = train(NMSparsity(1, 8, harden_at_end=False))
    assert check_nm(module.net[2].weight, 1, 8) > 0


@pytest.mark.parametrize("first", [True, False], ids=["average first", "sparsity first"])
def test_the_dense_weights_are_averaged_and_masked_anew(first):
    class Dense(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights.append(pl_module.net[2].weight.detach().clone())

    dense, sparse = Dense(), NMSparsity(1, 8, recipe="srste")
    dense.weights = []
    callbacks = [WeightAveraging(), dense, sparse] if first else [sparse, dense, WeightAveraging()]
    module, _ = train(None, callbacks=callbacks)
    mean = torch.stack(dense.weights).mean(0)
    torch.testing.assert_close(module.net[2].weight, mean * nm_mask(mean, 1, 8))
    assert sparse.verify(module) == dict.fromkeys(BODY, (1 / 8, 0))


def test_an_early_end_is_not_passed_over_in_silence():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 4

    with pytest.warns(UserWarning, match=r"training ended after 5 steps, before the final mask was in force \(D = "):
        train(NMSparsity(1, 8), callbacks=[Stop()])


# -- checkpoints ------------------------------------------------------------------------------------------------------


PHASES = {"dense": 3, "sparsify": 11, "finetune": 19}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recipe", ["mdgf_exp", "sdgf_stepwise", "one_shot"])
def test_resume_in_every_phase_is_exact_and_in_the_middle_of_a_frame(tmp_path, recipe, phase):
    make = partial(NMSparsity, 1, 4, recipe=recipe, dense_steps=5, finetune_steps=7)
    options = {"max_epochs": 4, "log_every_n_steps": 1}
    whole = fit([make()], CASE.problem, folder=tmp_path, mid_epoch=PHASES[phase], **options)
    resumed = fit([make()], CASE.problem, ckpt=tmp_path / "mid_epoch.ckpt", seed=1, **options)
    assert resumed.techniques[0]._schedule.phase(PHASES[phase] - 1) == phase
    assert not difference(resumed.logged, whole.logged[-len(resumed.logged) :])
    assert not difference(resumed.weights, whole.weights)
    if recipe == "sdgf_stepwise" and phase == "sparsify":  # frames 3:4 from 5, 2:4 from 9, 1:4 from 13
        first = resumed.logged[0][1]
        assert [first[f"reg/nm_sparsity/{key}"] for key in ("n", "m", "kept")] == [2, 4, 0.5]


def test_checkpoints_of_the_final_phase_hold_the_pattern_and_load_anywhere(tmp_path):
    sparse = NMSparsity(1, 4, recipe="mdgf_linear", dense_steps=5, finetune_steps=7, harden_at_end=False)
    for step, is_final in ((10, False), (18, True)):
        run = fit([sparse], CASE.problem, folder=tmp_path, mid_epoch=step, max_epochs=3)
        weights = torch.load(tmp_path / "mid_epoch.ckpt", weights_only=True)["state_dict"]
        assert (check_nm(weights["net.body.weight"], 1, 4) == 0) is is_final
        run.model.load_state_dict(weights, strict=True)
        # Saving leaves the weights that are trained as they are.
        assert check_nm(run.watch.weights[step - 1]["net.body.weight"], 1, 4) > 0
    weights = run.watch.weights[17]
    masked = weights["net.body.weight"] * nm_mask(weights["net.body.weight"], 1, 4)
    assert torch.equal(run.model.net.body.weight, masked)


@pytest.mark.parametrize("first", [True, False], ids=["average first", "sparsity first"])
def test_resume_beside_an_average_is_exact(tmp_path, first):
    def callbacks():
        sparse = NMSparsity(1, 4, recipe="srste", dense_steps=5)
        return [WeightAveraging(), sparse] if first else [sparse, WeightAveraging()]

    whole = fit(callbacks(), CASE.problem, folder=tmp_path, mid_epoch=19, max_epochs=4)
    resumed = fit(callbacks(), CASE.problem, ckpt=tmp_path / "mid_epoch.ckpt", seed=1, max_epochs=4)
    assert not difference(resumed.watch.weights, whole.watch.weights[19:])
    assert not difference(resumed.weights, whole.weights)
    assert check_nm(whole.weights["net.body.weight"], 1, 4) == 0


def test_whoever_only_tests_gets_the_sparse_weights(tmp_path):
    class Tested(Digits):
        def test_step(self, batch, batch_idx):
            self.violations = check_nm(self.net[2].weight, 1, 8)

    sparse = NMSparsity(1, 8, recipe="ste", dense_steps=0, harden_at_end=False)
    module, trainer = train(sparse, module=Tested())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert check_nm(module.net[2].weight, 1, 8) > 0
    other = make_trainer(callbacks=[NMSparsity(1, 8, recipe="ste", dense_steps=0)])
    other.test(module, DataLoader(digits(), 64), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert module.violations == 0


def test_files_of_weights_alone_hold_the_pattern_from_the_final_phase_on_and_training_goes_on_dense(tmp_path):
    def saves():
        return ModelCheckpoint(
            tmp_path / str(len(list(tmp_path.iterdir()))),
            "{step}",
            save_weights_only=True,
            every_n_train_steps=4,
            save_top_k=-1,
        )

    sparse, watch = NMSparsity(1, 8, dense_steps=3, finetune_steps=9, harden_at_end=False), Watch()
    with pytest.warns(UserWarning, match="save_weights_only=True. Files written before the final mask is in force"):
        module, trainer = train(sparse, callbacks=[watch, saves()], enable_checkpointing=True)
    assert check_nm(module.net[2].weight, 1, 8) > 0
    for step in (4, 8, 12, 16, 20):
        state = torch.load(tmp_path / "0" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert (check_nm(state["net.2.weight"], 1, 8) == 0) is (step >= 12), step
        if 12 <= step < 20:  # what is saved after a step is what the next one computes with
            assert torch.equal(state["net.2.weight"], watch.effective[step])
        module.load_state_dict(state, strict=True)
    assert "save_checkpoint" not in vars(trainer)
    plain, _ = train(NMSparsity(1, 8, dense_steps=3, finetune_steps=9, harden_at_end=False))
    sparse = NMSparsity(1, 8, dense_steps=3, finetune_steps=9)
    with pytest.warns(UserWarning, match="save_weights_only=True"):
        again, _ = train(sparse, callbacks=[saves()], enable_checkpointing=True)
    plain_masked = plain.net[2].weight * nm_mask(plain.net[2].weight, 1, 8)
    assert torch.equal(again.net[2].weight, plain_masked)


def test_packed_masks_of_a_trained_network():
    sparse = NMSparsity(1, 8)
    module, _ = train(sparse)
    packed = sparse.packed_masks(module)
    assert list(packed) == list(BODY)
    assert packed[BODY[0]]["bits"].numel() == 64 * 64 // 8
    mask = unpack_mask(packed[BODY[0]]["bits"], packed[BODY[0]]["shape"])
    assert torch.equal(mask & (module.net[2].weight != 0), module.net[2].weight != 0)


# -- what it says -----------------------------------------------------------------------------------------------------


class Logged(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = trainer.logged_metrics
        self.rows.append(
            {k.rsplit("/", 1)[-1]: float(v) for k, v in metrics.items() if k.startswith("reg/nm_sparsity/")}
        )


def test_logged_values_by_hand():
    logged, watch = Logged(), Watch()
    sparse = NMSparsity(1, 8, recipe="sdgf_stepwise", dense_steps=4, finetune_steps=4, exclude=["net.4"])
    train(sparse, callbacks=[watch, logged])
    rows = logged.rows
    assert [row["factor"] for row in rows] == 4 * [1.0] + 16 * [0.0]
    assert [(row["n"], row["kept"]) for row in rows[4:]] == 3 * [(7, 7 / 8)] + 3 * [(4, 0.5)] + 3 * [(2, 0.25)] + 7 * [
        (1, 0.125)
    ]
    flips = [int(((a != 0) ^ (b != 0)).sum()) for a, b in zip(watch.effective[13:], watch.effective[14:], strict=False)]
    assert [row["flips"] for row in rows[14:]] == flips


class LayersByHand(Callback):
    """Flips and kept magnitude of two weights, from what the forward pass saw and what the optimizer left."""

    def __init__(self):
        self.before, self.rows, self.logged = {}, [], []
        self.watches = [Watch(name) for name in BODY]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        row = {}
        for watch in self.watches:
            seen = watch.effective[-1] != 0
            if seen.all():
                continue  # dense
            if watch.name in self.before:
                row[f"flipped/{watch.name}"] = float((seen ^ self.before[watch.name]).float().mean())
            weight = dict(pl_module.named_parameters())[watch.name].detach().abs()
            row[f"kept_magnitude/{watch.name}"] = float((weight * seen).sum() / weight.sum())
            self.before[watch.name] = seen
        self.rows.append(row)
        metrics = {k.removeprefix("reg/nm_sparsity/"): float(v) for k, v in trainer.logged_metrics.items()}
        self.logged.append({k: v for k, v in metrics.items() if k.startswith(("flipped", "kept_magnitude"))})


def test_every_layer_is_logged_by_hand():
    by_hand = LayersByHand()
    sparse = NMSparsity(1, 8, recipe="sdgf_stepwise", dense_steps=4, finetune_steps=4, log_layers=True)
    train(sparse, callbacks=[*by_hand.watches, by_hand])
    assert by_hand.rows[:4] == [{}] * 4
    assert len(by_hand.rows[-1]) == 4
    for logged, expected in zip(by_hand.logged, by_hand.rows, strict=True):
        assert logged == pytest.approx(expected, rel=1e-5)
    assert any(row[f"flipped/{BODY[1]}"] > 0 for row in by_hand.rows[5:])


def test_flips_of_layers_are_in_the_checkpoint_and_come_back():
    sparse, other = (NMSparsity(1, 8, recipe="sdgf_stepwise", dense_steps=4, log_layers=True) for _ in range(2))
    train(sparse)
    state = sparse.state_dict()
    assert list(state["layer_flips"]) == list(BODY)
    assert sum(state["layer_flips"].values()) == state["flips"] > 0
    other.load_state_dict(state)
    assert other.state_dict()["layer_flips"] == state["layer_flips"]
    del state["layer_flips"]  # as a file of an older version
    other.load_state_dict(state)
    assert other.state_dict()["flips"] == state["flips"]


def test_layers_are_looked_at_on_logging_steps_alone(monkeypatch):
    asked, scalars = [], SparseNetwork.layer_scalars
    monkeypatch.setattr(SparseNetwork, "layer_scalars", lambda self, module: asked.append(1) or scalars(self, module))
    train(NMSparsity(1, 8, log_layers=True), epochs=1, log_every_n_steps=5)
    assert len(asked) == 2  # of 10 steps
    train(NMSparsity(1, 8), epochs=1, log_every_n_steps=5)
    assert len(asked) == 2


def test_a_weight_of_zeros_has_lost_nothing():
    module = Digits()
    torch.nn.init.zeros_(module.net[2].weight)
    module.net[2].weight.register_hook(torch.zeros_like)
    logged = LayersByHand()
    train(
        NMSparsity(1, 8, recipe="ste", dense_fraction=0.0, log_layers=True),
        module=module,
        epochs=1,
        callbacks=[*logged.watches, logged],
    )
    assert logged.logged[-1][f"kept_magnitude/{BODY[0]}"] == 1.0


# Between an epoch's last batch and the next one stands a validation, and in the second case a new pattern.
@pytest.mark.parametrize(("every", "options"), [(3, {}), (2, {"recipe": "sdgf_geometric", "geometric_k": 4})])
def test_flips_after_a_resume_are_those_of_the_whole_run(tmp_path, every, options):
    options = {"dense_steps": 4, "dim": "out", "log_layers": True, **options}
    make, setup = partial(NMSparsity, 1, 4, **options), {"log_every_n_steps": every}
    whole = fit([make()], CASE.problem, folder=tmp_path, mid_epoch=3, max_epochs=3, **setup)
    resumed = fit([make()], CASE.problem, ckpt=tmp_path / "last_batch.ckpt", seed=1, max_epochs=3, **setup)
    assert not difference(resumed.logged, whole.logged[-len(resumed.logged) :])


def test_settings_in_one_line():
    sparse = NMSparsity(1, 8, recipe="mdgf_linear", beta=0.05, dense_steps=3, finetune_steps=4)
    assert sparse.describe() == "1:8 mdgf_linear, layers auto, dim=in"
    train(sparse)
    assert sparse.describe() == (
        "1:8 mdgf_linear, layers auto, dim=in; 2 of 4 weights; dense until step 3, final mask from step 16, beta=0.05"
    )
    assert NMSparsity(4, 4).describe() == "4:4 keeps all weights: inactive"


def test_the_table_says_what_becomes_of_every_layer(capsys):
    train(NMSparsity(1, 8, recipe="sdgf_stepwise"), epochs=1, enable_model_summary=True)
    printed = capsys.readouterr().out
    assert "N:M sparsity: 2 of 4 weights" in printed
    assert "7:8 > 4:8 > 2:8 > 1:8" in printed
    assert "dense (first layer)" in printed
    assert "dense (head)" in printed


def test_report_by_hand(tmp_path):
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, -1.0, 1.0]]))
    sparse = NMSparsity(2, 4, layers="0")
    for kept in ("75.0 %", "75.0 %"):  # before and after hardening: (4 + 3 + 1 + 1) of 12
        report = sparse.report(net)
        console = Console(file=io.StringIO(), width=200)
        console.print(report)
        assert kept in console.file.getvalue()
        sparse.harden(net)
    report.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first == {
        "name": "0.weight", "shape": "2x4", "pattern": "2:4", "why_dense": "", "kept_magnitude": "0.75",
        "zeros": "0.5", "flops_dense": "16", "flops": "8",
    }  # fmt: skip
    assert (second["pattern"], second["why_dense"], second["flops"]) == ("dense", "not in `layers`", "8")
    assert len(report) == 2
    assert report.flops_share == 16 / 24


def test_two_instances_share_no_layer():
    one, two = NMSparsity(1, 8, layers="net.2", name="one"), NMSparsity(2, 4, layers="net.4", name="two")
    module, _ = train(one, callbacks=[two])
    assert one.verify(module) == {BODY[0]: (1 / 8, 0)}
    assert two.verify(module) == {BODY[1]: (1 / 2, 0)}
    with pytest.raises(MisconfigurationException, match="NMSparsity and NMSparsity cannot stand together: both make"):
        train(NMSparsity(1, 8, name="one"), callbacks=[NMSparsity(2, 4, layers="net.4", name="two")])


def test_a_trained_technique_hardens_and_verifies_another_module():
    sparse = NMSparsity(1, 8)
    module, _ = train(sparse)
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    sparse.harden(other)
    assert sparse.verify(other) == {"1.weight": (1 / 8, 0)}
    assert all(violations == 0 for _, violations in copy.deepcopy(sparse).verify(module).values())


# -- validation with the hard mask ------------------------------------------------------------------------------------


class Validated(Digits):
    """Logs the loss and a metric object; has layers that behave otherwise in training."""

    def __init__(self):
        super().__init__()
        self.net.append(nn.Dropout(0.0))  # Lightning does not keep random states
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.modes = []

    def on_train_batch_start(self, batch, batch_idx):
        self.modes.append(self.net.training)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.log("loss", F.cross_entropy(logits, y))


class Scores(Callback):
    """What callbacks after the technique are told, and the same by hand on a copy."""

    def __init__(self):
        self.told, self.hard = [], []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        self.told.append({k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("reg/loss")})
        twin = copy.deepcopy(pl_module).eval()
        with torch.no_grad():
            for name in BODY:
                weight = dict(twin.named_parameters())[name]
                weight.mul_(nm_mask(weight, 1, 8))
            x, y = digits(stop=100).tensors
            logits = twin.net(x)
        self.hard.append((float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())))


def train_validated(validate, callbacks=(), ckpt=None, **kwargs):
    sparse = NMSparsity(1, 8, dense_steps=12, validate_hard_mask=validate)
    seed_everything(0, verbose=False)
    module, scores = Validated(), Scores()
    trainer = make_trainer(max_epochs=3, callbacks=[sparse, scores, *callbacks], **kwargs)
    # Both batches of the validation are as long, so that the mean over batches is that over samples.
    trainer.fit(module, DataLoader(digits(), 64), DataLoader(digits(stop=100), 50), ckpt_path=ckpt)
    return module, scores


def test_each_validation_is_followed_by_one_with_the_hard_mask(tmp_path):
    module, scores = train_validated(True, val_check_interval=5, logger=CSVLogger(tmp_path))
    assert len(scores.told) == 6
    for told, (loss, accuracy) in zip(scores.told, scores.hard, strict=True):
        assert told["reg/nm_sparsity/hard/loss"] == pytest.approx(loss, rel=1e-5)
        assert told["reg/nm_sparsity/hard/accuracy"] == pytest.approx(accuracy)
    first, last = scores.told[0], scores.told[-1]
    assert first["loss"] < first["reg/nm_sparsity/hard/loss"]  # the dense phase
    assert (last["loss"], last["accuracy"]) == (
        last["reg/nm_sparsity/hard/loss"], last["reg/nm_sparsity/hard/accuracy"]
    )  # fmt: skip
    assert all(module.modes)
    assert module.training
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        written = [row["reg/nm_sparsity/hard/loss"] for row in csv.DictReader(file)]
    assert [float(value) for value in written if value] == [
        pytest.approx(told["reg/nm_sparsity/hard/loss"]) for told in scores.told
    ]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_training_and_the_soft_metric_do_not_notice_it_and_resume_neither(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    plain, soft = train_validated(False)
    best = ModelCheckpoint(tmp_path, monitor="reg/nm_sparsity/hard/loss")
    module, scores = train_validated(True, callbacks=[Save(), best], enable_checkpointing=True)
    assert float(best.best_model_score) == min(told["reg/nm_sparsity/hard/loss"] for told in scores.told)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), module.parameters(), strict=True))
    assert [{k: v for k, v in told.items() if "/hard/" not in k} for told in scores.told] == soft.told
    best = ModelCheckpoint(tmp_path / "again", monitor="reg/nm_sparsity/hard/loss")
    resumed, later = train_validated(
        True, callbacks=[Save(), best], enable_checkpointing=True, ckpt=tmp_path / "0.ckpt"
    )
    assert all(torch.equal(one, other) for one, other in zip(resumed.parameters(), module.parameters(), strict=True))
    assert later.told == scores.told[1:]


# -- effect -----------------------------------------------------------------------------------------------------------


def test_digits_learned_under_the_constraint_survive_it_and_dense_ones_do_not():
    def accuracy(module):
        x, y = digits(1000, 1797).tensors
        return float((module.net(x).argmax(1) == y).float().mean())

    dense, _ = train(None, epochs=15, size=1000)
    sparse = NMSparsity(1, 32)
    pruned = copy.deepcopy(dense)
    sparse.harden(pruned)
    module, _ = train(sparse, epochs=15, size=1000)
    assert sparse.verify(module) == dict.fromkeys(BODY, (1 / 32, 0))
    # Measured 0.91, 0.25 and 0.82; the last 797 digits are by other writers.
    assert accuracy(dense) > 0.88
    assert accuracy(pruned) < 0.4
    assert accuracy(module) > 0.75


# -- permutation ------------------------------------------------------------------------------------------------------


def kept(weight, n, m):
    return float((weight.detach().abs() * nm_mask(weight, n, m)).sum())


def test_a_permutation_keeps_what_the_best_order_keeps():
    weight = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]])
    order = best_channel_permutation(weight)
    assert sorted(order.tolist()) == list(range(8))
    assert kept(weight, 2, 4) == 19.0
    assert kept(weight[:, order], 2, 4) == 30.0


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
def test_a_permutation_closes_a_part_of_the_gap_and_the_last_one_is_a_local_optimum(n, m):
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    permuted = weight[:, best_channel_permutation(weight, n, m)]
    per_row = float(weight.abs().topk(64 * n // m, dim=1).values.sum())
    assert (kept(permuted, n, m) - kept(weight, n, m)) / (per_row - kept(weight, n, m)) > 0.15
    for _ in range(20):
        i, j = torch.randint(64, (2,)).tolist()
        other = permuted.clone()
        other[:, [i, j]] = other[:, [j, i]]
        assert kept(other, n, m) <= kept(permuted, n, m) * (1 + 1e-6)


def permutable():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
        ends = [nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 8)]
        net = nn.Sequential(*convs, *ends)
        for norm in (net[1], net[7]):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.data.uniform_(0.5, 1.5)
    return net


def test_permuted_networks_compute_the_same():
    net, x = permutable(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    sparse = NMSparsity(1, 4, layers="*", exclude=["0"])
    sparse.weights_to_edit(net)
    before, weights = net.eval()(x), [net[4].weight.clone(), net[6].weight.clone(), net[9].weight.clone()]
    gains = permute_network_(net, sparse._network.sparse, "NMSparsity")
    torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-5)
    assert list(gains) == ["4.weight", "6.weight", "9.weight"]
    assert all(gain.after > gain.before for gain in gains.values())
    for new, old, n in ((net[4].weight, weights[0], 4), (net[6].weight, weights[1], 4), (net[9].weight, weights[2], 4)):
        assert kept(new, 1, n) > kept(old, 1, n)


def test_feed_forward_blocks_of_torch_are_permuted():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        x = torch.randn(2, 5, 8)
    sparse = NMSparsity(1, 8, layers="*.linear2")
    sparse.weights_to_edit(nn.ModuleDict({"layer": layer}))
    before = layer(x)
    gains = permute_network_(nn.ModuleDict({"layer": layer}), sparse._network.sparse, "NMSparsity")
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
    assert gains["layer.linear2.weight"].after > gains["layer.linear2.weight"].before


class Mlp(nn.Module):
    """As timm writes it: no Sequential, a norm between."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.drop = nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5)
        self.norm, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.drop(self.act(self.fc1(x)))
        return self.fc2(self.norm(x * 0.5))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(F.relu(self.b(F.relu(self.norm(self.a(x)), inplace=False)))), 1))


class Tangled(nn.Module):
    """Every consumer has a reason why it cannot be permuted."""

    def __init__(self):
        super().__init__()
        layers = {f"{kind}{end}": nn.Linear(8, 8) for kind in ("residual", "twice", "mixed", "first") for end in "ab"}
        self.layers = nn.ModuleDict(layers)
        self.flat = nn.Sequential(nn.Conv1d(8, 4, 1), nn.Flatten(), nn.Linear(32, 8))
        self.attention, self.grouped = nn.MultiheadAttention(8, 2), nn.Conv1d(8, 16, 1, groups=2)

    def forward(self, x):
        layers = self.layers
        h = layers["residuala"](x)
        x = layers["residualb"](h) + h
        x = layers["twiceb"](layers["twicea"](layers["twicea"](x)))
        x = layers["mixedb"](layers["mixeda"](x).cumsum(-1))
        return layers["firstb"](layers["firsta"](x) + x)


def permuted(net, x, pattern, n=1, m=4, exclude=None):
    sparse = NMSparsity(n, m, layers=pattern, exclude=exclude)
    sparse.weights_to_edit(net)
    before, modes = net.eval()(x), [module.training for module in net.modules()]
    found = permute_network_(net, sparse._network.sparse, "NMSparsity")
    assert [module.training for module in net.modules()] == modes
    torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-5)
    return found


def initialised(cls):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = cls()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                for value in (*module.parameters(), *(b for b in module.buffers() if b.dim())):
                    value.data.uniform_(0.5, 1.5)
    return net


def test_layers_of_the_users_own_modules_are_permuted():
    mlps = nn.ModuleDict({"net": nn.Sequential(initialised(Mlp), initialised(Mlp))})
    mlps.forward = mlps["net"].forward
    found = permuted(mlps, torch.randn(2, 5, 8), "*.fc2")
    assert [name for name, gain in found.items() if gain.after > gain.before] == [
        "net.0.fc2.weight",
        "net.1.fc2.weight",
    ]
    net = nn.ModuleDict({"net": initialised(Convolutions)})
    net.forward = net["net"].forward
    found = permuted(net, torch.randn(2, 3, 9, 9), ["net.b", "net.head"])
    assert {name: gain.why_not for name, gain in found.items()} == {"net.b.weight": "", "net.head.weight": ""}
    assert all(gain.after > gain.before for gain in found.values())


def test_what_cannot_be_permuted_is_said_by_name_and_why():
    net = nn.ModuleDict({"net": initialised(Tangled), "mlp": initialised(Mlp)})
    net.forward = lambda x: net["mlp"](net["net"](x))
    found = permuted(net, torch.randn(2, 8), ["*layers.*b", "mlp.fc2", "net.attention.in*", "net.grouped", "*.flat.2"])
    assert {name: gain.why_not for name, gain in found.items()} == {
        "net.layers.residualb.weight": "the output of 'layers.residuala' is used elsewhere, too (in 'net')",
        "net.layers.twiceb.weight": "'layers.twicea' is called more than once (in 'net')",
        "net.layers.mixedb.weight": "'cumsum' is not known to work on each channel by itself (in 'net')",
        "net.layers.firstb.weight": "'add' joins several inputs (in 'net')",
        "net.flat.2.weight": "its input channels are not those of the layer before it (in 'net.flat')",
        "net.attention.in_proj_weight": "it is a projection of an attention",
        "net.grouped.weight": "it is a convolution in groups",
        "mlp.fc2.weight": "",
    }


def test_a_permutation_that_would_change_the_function_is_undone(monkeypatch):
    net = nn.ModuleDict({"net": initialised(Mlp), "other": initialised(Mlp)})
    sparse = NMSparsity(1, 4, layers=["net.fc2", "other.fc2"])
    sparse.weights_to_edit(net)
    before = copy.deepcopy(net.state_dict())
    # As if the norm between were not known for one.
    monkeypatch.setattr(Chain, "norms", property(lambda chain: []))
    with pytest.raises(MisconfigurationException, match=r"net\.fc2\.weight: it would compute something else, by 0"):
        permute_network_(net, sparse._network.sparse, "NMSparsity")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_table_says_which_layers_were_permuted(capsys):
    train(NMSparsity(1, 8, permute=True, layers=["net.[02]"]), epochs=1, enable_model_summary=True)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "input channels" in printed
    assert "not permuted" in printed
    assert "keeps" in printed


def test_training_permutes_once_at_its_start_or_refuses_by_name():
    plain, permuted = Watch(), Watch()
    train(NMSparsity(1, 8), callbacks=[plain])
    train(NMSparsity(1, 8, permute=True), callbacks=[permuted])
    assert kept(permuted.effective[0], 1, 8) > kept(plain.effective[0], 1, 8)
    assert torch.equal(permuted.effective[0].abs().sum((0, 1)).round(decimals=3),
                       plain.effective[0].abs().sum((0, 1)).round(decimals=3))  # fmt: skip

    class Alone(Digits):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleList(self.net)

        def training_step(self, batch, batch_idx):
            x, y = batch
            for layer in self.net:
                x = layer(x)
            return F.cross_entropy(x, y)

    with pytest.raises(
        MisconfigurationException, match=r"NMSparsity\(permute=True\): of net.2.weight, net.4.weight none"
    ):
        train(NMSparsity(1, 8, permute=True), module=Alone())
    with pytest.raises(ValueError, match='`permute` must be False with dim="out"'):
        NMSparsity(permute=True, dim="out")


# -- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "reason"),
    [
        ((32, 64), torch.float16, "cusparselt", ""),
        ((16, 16), torch.bfloat16, "cusparselt", ""),
        ((24, 64), torch.float16, "cusparselt", "shape (24, 64): must be multiples of 16 and 16"),
        ((32, 64), torch.float32, "cusparselt", "cusparselt does not take float32"),
        ((32, 64), torch.float16, "cutlass", ""),
        ((32, 32), torch.float16, "cutlass", "shape (32, 32): must be multiples of 32 and 64"),
        ((32, 32), torch.float64, "cutlass", "cutlass does not take float64"),
        ((32, 64, 3), torch.float16, "cutlass", "3 dimensions"),
        ((32, 64), torch.int8, "cusparselt", ""),
        ((16, 64), torch.float8_e4m3fn, "cusparselt", "shape (16, 64): must be multiples of 32 and 32"),
        ((16, 128), torch.int8, "cutlass", ""),
        ((32, 64), torch.float8_e4m3fn, "cutlass", "cutlass does not take float8_e4m3fn"),
    ],
)
def test_what_can_be_compressed(shape, dtype, backend, reason):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = (weight * nm_mask(weight, 2, 4)).to(dtype)
    assert semi_structured_refusal(weight, backend) == reason


@pytest.mark.parametrize(
    ("backend", "dtype", "rows", "columns"),
    [
        ("cusparselt", torch.float16, 16, 16),
        ("cusparselt", torch.bfloat16, 16, 16),
        ("cusparselt", torch.int8, 32, 32),
        ("cusparselt", torch.float8_e4m3fn, 32, 32),
        ("cutlass", torch.float16, 32, 64),
        ("cutlass", torch.bfloat16, 32, 64),
        ("cutlass", torch.float32, 32, 32),
        ("cutlass", torch.int8, 16, 128),
    ],
)
def test_multiples_of_each_backend_and_type(backend, dtype, rows, columns):
    assert semi_structured_refusal(torch.zeros(3 * rows, 3 * columns).to(dtype), backend) == ""
    for shape in ((rows // 2, columns), (rows, columns // 2), (0, columns), (3 * rows // 2, columns)):
        refusal = f"shape {shape}: must be multiples of {rows} and {columns}"
        assert semi_structured_refusal(torch.zeros(shape).to(dtype), backend) == refusal


def test_a_wrong_pattern_is_refused_and_sparser_aligned_ones_are_not():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).half()
    assert semi_structured_refusal(weight) == "not 2:4: 512 of 512 groups have more"
    for n, m in ((1, 4), (1, 8), (2, 8), (1, 16)):
        assert semi_structured_refusal(weight * nm_mask(weight, n, m)) == ""
    assert semi_structured_refusal(weight * nm_mask(weight, 4, 8)).startswith("not 2:4")
    single = weight.float() * nm_mask(weight, 2, 4)
    assert semi_structured_refusal(single, "cutlass").startswith("not 1:2")
    assert semi_structured_refusal(single * nm_mask(single, 1, 2), "cutlass") == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8), (2, 8), (1, 16), (4, 8)])
def test_what_is_not_refused_is_compressed_without_loss(n, m, dtype):
    weight = (10 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))).to(dtype)
    weight = weight * nm_mask(weight.float(), n, m)
    # The layout of CUTLASS, which torch makes on a CPU as well.
    again = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert torch.equal(again, weight) == (semi_structured_refusal(weight, "cutlass") == "")
    assert torch.equal(again, weight) == ((n, m) != (4, 8))


def test_what_stays_dense_is_listed_with_the_reason():
    net = nn.ModuleDict({
        "fits": nn.Linear(64, 32), "dense": nn.Linear(64, 32), "small": nn.Linear(8, 8), "table": nn.Embedding(64, 32),
        "tied": nn.Linear(32, 64), "conv": nn.Conv1d(4, 4, 3),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 32)),
        "gpt": Conv1D(64, 32), "attention": nn.MultiheadAttention(32, 2), "experts": Experts(), "norm": nn.LayerNorm(4),
        "none": nn.Sequential(nn.ReLU()),
    }).half()  # fmt: skip
    net["tied"].weight = net["table"].weight
    with torch.no_grad():
        net["fits"].weight.mul_(nm_mask(net["fits"].weight, 2, 4))
    found = layers_and_refusals(net, "cusparselt")
    only = "only plain nn.Linear layers are converted"
    assert {name: why for name, _, why in found} == {
        "fits": "", "dense": "not 2:4: 512 of 512 groups have more",
        "small": "shape (8, 8): must be multiples of 16 and 16", "tied": "shared with table",
        "normed": "computed from other parameters", "conv": f"of Conv1d: {only}", "gpt": f"of Conv1D: {only}",
        "attention": f"of MultiheadAttention: {only}",
        "attention.out_proj": f"of NonDynamicallyQuantizableLinear: {only}", "experts": f"of Experts: {only}",
    }  # fmt: skip
    assert [layer for _, layer, _ in found if layer is not None] == [net["fits"]]


def test_compression_is_refused_on_a_cpu_and_changes_nothing():
    net = nn.Sequential(nn.Linear(64, 64))
    before = net[0].weight.clone()
    with pytest.raises(RuntimeError, match="the model is on cpu; compressed 2:4 weights exist on CUDA devices only"):
        to_semi_structured(net)
    assert torch.equal(net[0].weight, before)
    assert net[0].weight.dtype is torch.float32
    with pytest.raises(ValueError, match="no such `dtype` or `backend`: 'int8', 'cusparselt'"):
        to_semi_structured(net, dtype="int8")
