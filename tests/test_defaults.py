"""The documented defaults of all public cores: one table, so that none changes unnoticed.

Functions and classes stand by their names.
"""

import inspect

import pytest
import torch  # in the table

from lightning_reg import functional

DEFAULTS = {
    "Compander": {"fn": "arctan", "learn": False},
    "LearnedSoup": {"per": "tensor", "exclude": None},
    "MultiSampleDropoutLayer": {"p": 0.5, "num_samples": 8},
    "analogy_prompt": {"generate": None},
    "ancestry": {"start": None, "names": None, "max_distance": 0.5, "min_cosine": 0.5, "warn": True, "exclude": None},
    "applied": {"alpha": 1.0},
    "apply_delta_": {"alpha": 1.0},
    "apply_strategy": {"delta": 1.0},
    "average_state_dicts": {
        "weights": None,
        "accumulate_dtype": torch.float64,
        "include": None,
        "exclude": None,
        "names": None,
        "factors": "mean",
    },
    "bce_distillation_loss": {"num_seen": None, "reduction": "mean"},
    "best_channel_permutation": {"n": 2, "m": 4, "passes": 10},
    "check_nm": {"dim": "in"},
    "class_log_posterior": {"log_prior": None},
    "classify_images": {"indices": None, "log_prior": None},
    "compand": {"fn": "arctan"},
    "compand_gradients": {"fn": "arctan"},
    "condition_errors": {"loss": "l2", "n_trials": 1, "chunk": 512, "seed": 0},
    "conr_loss": {
        "temperature": 0.07,
        "eta": 0.01,
        "weights": None,
        "compat": False,
        "push": "exponential",
        "distance": "label_distance",
        "group": None,
        "capacity": None,
    },
    "cross_entropy_shift": {"label_smoothing": 0.0},
    "cutmix": {"lam": None, "alpha": 1.0, "generator": None, "per_sample": False, "correct_lam": True},
    "dare_merge": {
        "density": 0.5,
        "weights": None,
        "lam": 1.0,
        "rescale": "density",
        "elect_signs": False,
        "normalize": False,
        "generator": None,
        "masks": None,
        "exclude": None,
    },
    "decor_project": {"alpha": 1.0, "token_mask": None},
    "delta_applied": {"alpha": 1.0},
    "drop_rows": {"null": 0.0, "generator": None, "keep": None},
    "dropout_copies": {"layer": "Dropout", "copied": False},
    "elr_loss": {"clamp": 0.0001},
    "elr_plus_loss": {"clamp": 0.0001, "ramp": 1.0},
    "elr_regularizer": {"clamp": 0.0001, "reduction": "mean"},
    "elr_update_targets": {"clamp": 0.0001},
    "exclusive_keep_masks": {"generator": None, "draws": None},
    "expand": {"fn": "arctan"},
    "expected_distances": {"power": 2.0, "chunk": None},
    "feature_distillation_loss": {"reduction": "mean", "elements": "sum"},
    "fisher_diagonal": {"per_sample": True, "group": None},
    "fisher_losses": {"which": "argmax", "generator": None, "outputs": "classes", "variances": None},
    "fit_linear_ag": {"steps": 20, "ridge": 0.0, "every": 2, "guided_share": 0.5},
    "frechet_predict": {"power": 2.0, "chunk": None},
    "frechet_scores": {"power": 2.0, "chunk": None},
    "from_peft": {"prefix": ""},
    "generator_fisher": {"generator": "generator", "discriminator": "discriminator", "params": None},
    "greedy_soup": {
        "strict": True,
        "min_delta": 0.0,
        "mode": "max",
        "names": None,
        "max_ingredients": None,
        "exclude": None,
    },
    "guided_sample": {"steps": 20},
    "importance_curve": {"select": "smallest", "seed": 0},
    "inverse_density_weights": {"mode": "sqrt_inverse", "lds_sigma": None, "clip": None, "lds_size": None},
    "inverse_prox": {"iterations": 200, "tolerance": 0.0001},
    "joint_reference": {"per_tensor_mean": False},
    "label_distance": {"kind": "l1"},
    "largest_eigenvalues": {"iterations": 50},
    "learned_regularizer": {"iterations": 200, "tolerance": 0.0001},
    "linear_ag_coefficients": {"ridge": 0.0},
    "load_averaged": {"name": None},
    "low_rank_factor": {"alpha": None},
    "make_soup": {
        "method": "uniform",
        "evaluate": None,
        "out": None,
        "start": None,
        "key": None,
        "weights": None,
        "mode": "max",
        "strict": True,
        "min_delta": 0.0,
        "max_ingredients": None,
        "accumulate_dtype": torch.float64,
        "check_ancestry": True,
        "progress": False,
        "exclude": None,
        "factors": "mean",
    },
    "match_pairs": {"n_samples": 50, "chunk": 512, "seed": 0},
    "mix_targets": {"num_classes": None},
    "mixup": {"lam": None, "alpha": 1.0, "generator": None},
    "multi_sample_dropout": {"generator": None},
    "multi_sample_loss": {"generator": None},
    "new_low_rank": {"table": False},
    "next_class": {"candidates": None},
    "nm_mask": {"dim": "in"},
    "normalize_losses": {"delta": 1.0, "eps": 1e-06, "counted": None, "group": None},
    "opis": {
        "far_low": 0.01,
        "far_high": 0.1,
        "num_thresholds": 101,
        "sensitivity_weight": 1.0,
        "min_per_class": 2,
    },
    "pair_masks": {"distance": "label_distance"},
    "pairwise_locus": {"power": 2.0},
    "pattern_at": {"k": 16},
    "pgd": {"step": None, "iterations": 100, "check": True},
    "pnp_admm": {"penalty": None, "iterations": 50, "solver_iterations": 30, "check": True},
    "proximal_matching_gamma": {"steps": 40000, "pretrain_steps": 20000, "stages": 4},
    "proximal_matching_loss": {"elementwise": False, "reduction": "mean"},
    "quadratic_penalty": {"weights": None},
    "rand_box": {"generator": None},
    "reestimate_batchnorm": {"n": None, "forward": None},
    "repulsion": {"kind": "el2", "alpha": 1.0},
    "retrieval_scores": {"ks": (1, 5, 10)},
    "reweight": {
        "strategy": "linupper",
        "r": 0.4,
        "delta": 1.0,
        "eps": 1e-06,
        "max_weight": None,
        "counted": None,
        "group": None,
    },
    "search_guidance_policy": {"others": (), "steps": 20, "cost_weight": 0.1, "updates": 50, "lr": 0.3},
    "semi_structured_refusal": {"backend": "cusparselt"},
    "sequence_losses": {"ignore_index": -100, "shift": True},
    "slerp_merge": {"threshold": 0.9995, "exclude": None},
    "softmax_distillation_loss": {"temperature": 2.0, "reduction": "mean"},
    "sparse_delta": {"prefix": ""},
    "sparsify_weight": {"factor": 0.0, "lambda_w": 0.0},
    "split_pool": {"batch": 256, "most": 100000},
    "supervised_contrastive_loss": {"temperature": 0.1, "group": None, "capacity": None},
    "symmetric_infonce": {"tau": 0.1, "group": None, "capacity": None},
    "tcm_loss": {
        "margin_plus": 0.9,
        "margin_minus": 0.5,
        "lambda_plus": 1.0,
        "lambda_minus": 1.0,
        "reference": None,
        "reference_labels": None,
        "group": None,
        "capacity": None,
    },
    "ties_merge": {"density": 0.2, "weights": None, "lam": 1.0, "normalize": True, "exclude": None},
    "to_semi_structured": {"dtype": "bfloat16", "backend": "cusparselt", "rows": 4096, "only_faster": True},
    "token_rows": {"start": None},
    "tree_distances": {"labels": None},
    "undesired_basis": {"rank": None, "rtol": 1e-05, "mask": None},
    "weight_distance": {"per_tensor_mean": False},
    "weight_stats": {"near_zero": 0.01},
    "weighted_loss": {"counts": None, "world_size": 1},
    "wise_ft": {"extrapolate": False, "exclude": None},
}


def defaults_of(name):
    parameters = inspect.signature(getattr(functional, name)).parameters.values()
    return {p.name: getattr(p.default, "__name__", p.default) for p in parameters if p.default is not p.empty}


# What is no number and no word: lists that every instance gets anew.
CONTAINERS = ("SoupResult",)


@pytest.mark.parametrize("name", [name for name in functional.__all__ if name not in CONTAINERS])
def test_the_defaults_of_a_core_are_those_of_the_table(name):
    assert defaults_of(name) == DEFAULTS.get(name, {})


def test_the_table_names_what_there_is():
    assert set(DEFAULTS) <= set(functional.__all__)
