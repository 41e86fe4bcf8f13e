"""Every core makes its tensors where those are that it is given.

On a machine without a GPU this shows under ``torch.device("meta")``: what is made there without a device of its own
has no values, and goes together with no tensor that has.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg import ContinualMetrics
from lightning_reg import functional as f
from tests.conformance.harness import difference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws():
    return torch.Generator().manual_seed(3)


X, LOGITS, OTHERS, LABELS = draw(6, 3, 4, 4), draw(6, 5), draw(6, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
TABLE, INDEX = draw(9, 5).softmax(1), torch.tensor([3, 1, 8, 0, 5, 7])
FEATURES, NUMBERS = draw(6, 7), draw(6, 1)
LOSSES, COUNTED = draw(6).square(), torch.tensor([True, True, False, True, True, True])
WEIGHT, MASK = draw(8, 16), draw(8, 16) > 0
STATES = [{"w": draw(4, 3, seed=s), "b": draw(3, seed=9 + s)} for s in range(3)]
ORDER = torch.tensor([1, 0, 3, 2, 5, 4])
SYMMETRIES = f.draw_symmetries(6, draws())
PARAMETER = draw(5, 7).requires_grad_()


def fisher(per_sample):
    losses = f.fisher_losses(FEATURES @ PARAMETER.T, None, "sample", draws())
    return f.fisher_diagonal([PARAMETER], [losses], per_sample)


def batchnorm():
    return f.reestimate_batchnorm(NORM, [FEATURES]), NORM.running_mean.clone(), NORM.running_var.clone()


def metrics():
    METRICS.reset()
    METRICS.update(LOGITS, LABELS, after_task=2)
    return METRICS.compute()


METRICS = ContinualMetrics([2, 3])
NORM, HEAD, NET = nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Sequential(nn.Linear(7, 5))
GAN = nn.ModuleDict({"generator": nn.Linear(7, 3), "discriminator": nn.Linear(3, 1)})
SOUP = f.LearnedSoup(NET, [NET.state_dict()] * 2)
CALLS = {
    "ContinualMetrics": metrics,
    "cutmix": lambda: f.cutmix(X, alpha=0.5, generator=draws()),
    "cutmix per sample": lambda: f.cutmix(X, generator=draws(), per_sample=True),
    "cutmix_loss": lambda: f.cutmix_loss(F.cross_entropy, LOGITS, LABELS, ORDER, 0.3),
    "mix_targets": lambda: f.mix_targets(LABELS, ORDER, 0.3, 5),
    "mixup": lambda: f.mixup(X, alpha=0.5, generator=draws()),
    "paste_box": lambda: f.paste_box(X, ORDER, (1, 1, 3, 3)),
    "rand_box": lambda: f.rand_box(8, 9, 0.4, draws()),
    "ancestry": lambda: vars(f.ancestry(STATES, warn=False)),
    "LearnedSoup": lambda: SOUP(FEATURES),
    "average_state_dicts": lambda: f.average_state_dicts(STATES),
    "greedy_soup": lambda: f.greedy_soup(STATES, [1.0, 2.0, 3.0], lambda state: float(state["w"].sum())).state_dict,
    "reestimate_batchnorm": batchnorm,
    "dare_merge": lambda: f.dare_merge(STATES[0], STATES[1:], generator=draws()),
    "dare_merge by signs": lambda: f.dare_merge(STATES[0], STATES[1:], generator=draws(), elect_signs=True),
    "slerp_merge": lambda: f.slerp_merge(*STATES[:2], 0.3),
    "ties_merge": lambda: f.ties_merge(STATES[0], STATES[1:], 0.5),
    "wise_ft": lambda: f.wise_ft(*STATES[:2], 0.3),
    "bce_distillation_loss": lambda: f.bce_distillation_loss(LOGITS, OTHERS[:, :2], LABELS, 2),
    "feature_distillation_loss": lambda: f.feature_distillation_loss(LOGITS, OTHERS),
    "forgetting": lambda: f.forgetting(TABLE[:5], [1, 2, 3, 4, 5]),
    "softmax_distillation_loss": lambda: f.softmax_distillation_loss(LOGITS, OTHERS),
    "fisher_diagonal": lambda: fisher(per_sample=True),
    "fisher_diagonal of batches": lambda: fisher(per_sample=False),
    "quadratic_penalty": lambda: f.quadratic_penalty([LOGITS], [OTHERS]),
    "MultiSampleDropoutLayer": lambda: f.MultiSampleDropoutLayer(0.0, 2)(FEATURES),
    "dropout_copies": lambda: f.dropout_copies(WEIGHT, MASK[None].repeat(2, 1, 1), 0.5),
    "fold": lambda: f.fold(WEIGHT, 2),
    "multi_sample_dropout": lambda: f.multi_sample_dropout(FEATURES, 0.5, 3, draws()),
    "multi_sample_loss": lambda: f.multi_sample_loss(HEAD, FEATURES, LABELS, F.cross_entropy, 0.5, 3, draws()),
    "conr_loss": lambda: f.conr_loss(FEATURES, NUMBERS, NUMBERS.flip(0), 0.5),
    "inverse_density_weights by size": lambda: f.inverse_density_weights(LOSSES, 4, lds_sigma=1.0, lds_size=3),
    "inverse_density_weights": lambda: f.inverse_density_weights(NUMBERS[:, 0], 4, lds_sigma=1.0),
    "label_distance": lambda: f.label_distance(NUMBERS, NUMBERS.flip(0)),
    "pair_masks": lambda: f.pair_masks(NUMBERS, NUMBERS.flip(0), 0.5),
    "frechet_distance": lambda: f.frechet_distance(FEATURES, 2 * FEATURES),
    "generator_fisher": lambda: f.generator_fisher(GAN, FEATURES),
    "joint_reference": lambda: f.joint_reference([[LOGITS], [OTHERS]]),
    "repulsion": lambda: f.repulsion(f.weight_distance([LOGITS], [OTHERS]), "il2", 0.1),
    "split_pool": lambda: f.split_pool(lambda n: LOGITS[:n], lambda x: x[:, 0] > 0, 2, 2, 6),
    "weight_distance by tensor": lambda: f.weight_distance([LOGITS], [OTHERS], per_tensor_mean=True),
    "supervised_contrastive_loss": lambda: f.supervised_contrastive_loss(FEATURES, LABELS),
    "elr_loss": lambda: f.elr_loss(LOGITS, LABELS, INDEX, TABLE.clone(), 3.0, 0.7),
    "elr_regularizer": lambda: f.elr_regularizer(LOGITS, TABLE[:6]),
    "elr_targets": lambda: f.elr_targets(TABLE[:6], TABLE[3:], 0.7),
    "elr_update_targets": lambda: f.elr_update_targets(TABLE.clone(), INDEX, LOGITS, 0.7),
    "elr_plus_loss": lambda: f.elr_plus_loss(LOGITS, LABELS, TABLE[:6], 3.0),
    "elr_plus_targets": lambda: f.elr_plus_targets(TABLE[:6], OTHERS, 0.7),
    "refine_labels": lambda: f.refine_labels(TABLE[3:], TABLE[:6]),
    "adawac_loss": lambda: f.adawac_loss(LOSSES, LOSSES.flip(0), LOSSES.sigmoid()),
    "adawac_update": lambda: f.adawac_update(TABLE[:, 0].clone(), INDEX, LOSSES, LOSSES.flip(0)),
    "apply_symmetry": lambda: f.apply_symmetry(X, SYMMETRIES),
    "batch_dice_loss": lambda: f.batch_dice_loss(LOGITS, LABELS),
    "encoder_consistency": lambda: f.encoder_consistency(LOGITS, OTHERS),
    "multiscale_consistency": lambda: f.multiscale_consistency([LOGITS, OTHERS], 0.3),
    "resized": lambda: f.resized(X.long(), (3, 5)),
    "undo_symmetry": lambda: f.undo_symmetry(X, SYMMETRIES),
    "weight_ascent": lambda: f.weight_ascent(LOSSES, LOSSES.flip(0), LOSSES, 2.0),
    "compand": lambda: f.compand(WEIGHT, 2.0, 0.5),
    "compand_gradients": lambda: f.compand_gradients(WEIGHT, WEIGHT.flip(0), 2.0, 0.5),
    "expand": lambda: f.expand(WEIGHT.clamp(-1, 1), 2.0, 0.5),
    "weight_stats": lambda: f.weight_stats(NET),
    "apply_strategy": lambda: f.apply_strategy(LOSSES, "extremes"),
    "normalize_losses": lambda: f.normalize_losses(LOSSES, counted=COUNTED),
    "reweight": lambda: f.reweight(LOSSES, max_weight=1.5, counted=COUNTED),
    "sequence_losses": lambda: f.sequence_losses(LOGITS.reshape(2, 3, 5), LABELS.reshape(2, 3)),
    "weighted_loss": lambda: f.weighted_loss(LOSSES, LOSSES.softmax(0)),
    "best_channel_permutation": lambda: f.best_channel_permutation(WEIGHT),
    "check_nm": lambda: f.check_nm(WEIGHT, 2, 4),
    "nm_mask": lambda: f.nm_mask(WEIGHT, 2, 4),
    "pack_mask": lambda: f.pack_mask(MASK),
    "sparsify_weight": lambda: f.sparsify_weight(WEIGHT, MASK, 0.5),
    "unpack_mask": lambda: f.unpack_mask(PACKED, (8, 16)),
    "semi_structured_refusal": lambda: f.semi_structured_refusal(WEIGHT.half()),
}
PACKED = f.pack_mask(MASK)


@pytest.mark.parametrize("name", CALLS)
def test_a_core_makes_its_tensors_where_its_arguments_are(name):
    there = CALLS[name]()
    with torch.device("meta"):
        assert not difference(there, CALLS[name]())
