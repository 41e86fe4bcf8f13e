"""What a step costs with each technique: plain, written by hand in ``training_step``, and attached by the engine.

Arms take turns step by step in one process (see overhead.py); figures are medians over rounds of the ratio within a
round, with a 95 % bootstrap interval. Small transformer, batch 64; CutMix: ResNet-18, batch 8. ``elr_plus`` is one
network with an averaged teacher and no mixup: a second network costs what training it costs.

    python benchmarks/step_costs.py --steps 200 --save benchmarks/results/step_costs.txt
    python benchmarks/step_costs.py fisher --steps 5 --save benchmarks/results/step_costs.txt

The bar: engine / by hand <= 1.02. ``fisher``: EWC's squared gradients of one batch, from four samples at a time as it
takes them and from the whole batch at once, against the gradient of a training step.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from by_hand import (
    LAM,
    Averaged,
    Contrasted,
    Cut,
    Features,
    FirmlyTied,
    Numbers,
    Outputs,
    Plain,
    Tied,
    after_one_task,
    ewc,
)
from by_hand_prompts import (
    DEPTH,
    LENGTHS,
    PROMPTS,
    SCALE,
    SIDE,
    UNKNOWN,
    Clip,
    HeadOnly,
    Imagined,
    Prefixed,
    Prompted,
    Vit,
)
from by_hand_references import APART, BANK, WINDOW, Agreeing, Banked, Mined, Recent
from by_hand_search import (
    CHUNK,
    GAMMA,
    PAIRS,
    POOL,
    RAMP,
    TEMPERATURE,
    Bent,
    Catalogue,
    Chunked,
    Distilled,
    Encoder,
    Expander,
    Fewer,
    FewerClasses,
    Focal,
    Followed,
    ManyLabels,
    Masked,
    Mixed,
    Penalized,
    Ranked,
    RankedEncoder,
    Recognised,
    Search,
    SparseSearch,
)
from by_hand_terms import STEPS_APART, Clamped, Dropped, Margins, Matched, Repelled, Scored, WithCentres
from overhead import ResNet18, SmallTransformer, data, in_turns, quiet, show
from torch.utils.data import ConcatDataset, TensorDataset

from lightning_reg import (
    TCM,
    CandidateDropout,
    ClampedSelfDistillation,
    ClassDropout,
    ConR,
    ContrastiveDistillation,
    CoreTuning,
    CutMix,
    DeepPrompts,
    DRTune,
    ELRPlusCallback,
    EnsembleDistillation,
    FalseNegativeMask,
    FeatureDistillation,
    FocalContrastive,
    FrozenTwinAgreement,
    GradCache,
    HardNegativeMixing,
    IDFFlops,
    ItemSSL,
    L2ToStart,
    LocalMeanTeacher,
    Loki,
    MetricLoss,
    ModalityDropout,
    NonNegative,
    OnePrompt,
    PredictionDistillation,
    ProximalMatching,
    SyntheticUnknowns,
    VirtualOutliers,
    WeightRepulsion,
)
from lightning_reg.functional import fisher_diagonal, fisher_losses


class Pooled(SmallTransformer):
    """The mean over the tokens as a layer."""

    def __init__(self):
        super().__init__()
        self.pool = torch.nn.Identity()

    def body(self, x):
        return self.pool(super().body(x).mean(1))

    def top(self, features):
        return self.head(features)


def arms(key, samples):
    """Plain, by hand, by the engine: each a module and its callbacks."""
    net = {**NETS, **dict.fromkeys(POOLED, Pooled)}.get(key, SmallTransformer)()
    hand = {
        "l2_to_start": Tied,
        "ewc": FirmlyTied,
        "prediction_distillation": Outputs,
        "feature_distillation": Features,
        "conr": Contrasted,
        "cutmix": Cut,
        "tcm_loss": Margins,
        "metric_loss": WithCentres,
        "text_dropout": Dropped,
        "loki": Scored,
        "non_negative": Clamped,
        "proximal_matching": Matched,
        "weight_repulsion": Repelled,
        "frozen_twin": Agreeing,
        "dr_tune": Banked,
        "core_tuning": Mined,
        "local_mean_teacher": Recent,
        "deep_prompts": Prompted,
        "one_prompt": Prefixed,
        "virtual_outliers": HeadOnly,
        "synthetic_unknowns": Imagined,
        "idf_flops": Penalized,
        "focal_contrastive": Focal,
        "hard_negative_mixing": Mixed,
        "false_negative_mask": Masked,
        "grad_cache": Chunked,
        "item_ssl": Recognised,
        "ensemble_distillation": Distilled,
        "contrastive_distillation": Followed,
        "candidate_dropout": Fewer,
        "class_dropout": FewerClasses,
        "clamped_self_distillation": Bent,
    }.get(key)
    technique = {
        "l2_to_start": lambda: L2ToStart(LAM),
        "ewc": lambda: ewc(net),
        "prediction_distillation": lambda: after_one_task(PredictionDistillation(new_classes=[5, 5]), teacher={}),
        "feature_distillation": lambda: FeatureDistillation("net.layers", LAM, anchor="start_of_fit"),
        "conr": lambda: ConR("net.pool", window=0.1, augment="augment"),
        "cutmix": lambda: CutMix(prob=1.0),
        "elr_plus": lambda: ELRPlusCallback(networks=1, mixup_alpha=0.0, decay_rampup_steps=0),
        "tcm_loss": lambda: TCM("net.pool"),
        "metric_loss": lambda: MetricLoss("net.pool", "by_hand_terms.Centres"),
        "text_dropout": lambda: ModalityDropout(0.5, layer="net.pool", null_shape=[64]),
        "loki": lambda: Loki("net.head", STEPS_APART, modes=["train"]),
        "non_negative": lambda: NonNegative("net.head.weight"),
        "proximal_matching": lambda: ProximalMatching(0.1, pretrain=0),
        "weight_repulsion": WeightRepulsion,
        "frozen_twin": lambda: FrozenTwinAgreement({"net.pool": 10.0}),
        "dr_tune": lambda: DRTune("net.pool", "net.head", bank_size=BANK, warm_up=False),
        "core_tuning": lambda: CoreTuning("net.pool", "net.head"),
        "local_mean_teacher": lambda: LocalMeanTeacher(
            "net.pool", window_min=WINDOW, window_max=WINDOW, every_n_steps=APART, snapshots=1
        ),
        "deep_prompts": lambda: DeepPrompts("net.clip", PROMPTS, PROMPTS, DEPTH, DEPTH),
        "one_prompt": lambda: OnePrompt("net.head*", LENGTHS),
        "virtual_outliers": lambda: VirtualOutliers("net.head", epochs=EPOCHS),
        "synthetic_unknowns": lambda: SyntheticUnknowns(
            "net.pool", "net.head.weight", UNKNOWN, scale=SCALE, warmup=0.0
        ),
        "idf_flops": lambda: IDFFlops("net.sparse", ramp_steps=RAMP, position=1),
        "focal_contrastive": lambda: FocalContrastive(GAMMA),
        "hard_negative_mixing": lambda: HardNegativeMixing("net.unit", TEMPERATURE, num_pairs=PAIRS, pool=POOL),
        "false_negative_mask": lambda: FalseNegativeMask(ids="1"),
        "grad_cache": lambda: GradCache("encode", CHUNK),
        "item_ssl": lambda: ItemSSL("encode", "catalogue", missing=0, size=CHUNK),
        "ensemble_distillation": lambda: EnsembleDistillation("net.scores", scores={"one": "3", "two": "4"}),
        "contrastive_distillation": lambda: ContrastiveDistillation("net.unit", "3", "4"),
        "candidate_dropout": lambda: CandidateDropout({"0": 1}),
        "class_dropout": ClassDropout,
        "clamped_self_distillation": ClampedSelfDistillation,
    }[key]()
    plain = PLAIN.get(key, Plain)
    by_hand = Averaged(copy.deepcopy(net), samples) if key == "elr_plus" else hand(copy.deepcopy(net))
    return {"plain": (plain(copy.deepcopy(net)), []), "by hand": (by_hand, []), "engine": (plain(net), [technique])}


REFERENCES = ("frozen_twin", "dr_tune", "core_tuning", "local_mean_teacher")
PROMPTED = ("deep_prompts", "one_prompt")
HEADS = ("virtual_outliers", "synthetic_unknowns")
SEARCH = ("focal_contrastive", "hard_negative_mixing", "false_negative_mask", "grad_cache")
TAUGHT = ("ensemble_distillation", "contrastive_distillation")
DROPPED = ("candidate_dropout", "class_dropout", "clamped_self_distillation")
POOLED = ("conr", "tcm_loss", "metric_loss", "text_dropout", *REFERENCES, *HEADS)
NETS = {"cutmix": ResNet18, "deep_prompts": Clip, "one_prompt": Vit, "idf_flops": Expander}
NETS |= dict.fromkeys([*SEARCH, "item_ssl"], Encoder) | dict.fromkeys(TAUGHT, RankedEncoder)
PLAIN = {"conr": Numbers, "proximal_matching": Numbers, "idf_flops": SparseSearch, **dict.fromkeys(SEARCH, Search)}
PLAIN |= {"item_ssl": Catalogue, "clamped_self_distillation": ManyLabels, **dict.fromkeys(TAUGHT, Ranked)}
BATCHES = {"cutmix": 8, "deep_prompts": 16, "one_prompt": 4}  # else 64
EPOCHS = 1  # of VirtualOutliers, which counts them from the end: all rounds
NEW = ("tcm_loss", "metric_loss", "text_dropout", "loki", "non_negative", "proximal_matching", "weight_repulsion")
KEYS = (
    "l2_to_start",
    "ewc",
    "prediction_distillation",
    "feature_distillation",
    "conr",
    "cutmix",
    "elr_plus",
    *NEW,
    *REFERENCES,
    *PROMPTED,
    *HEADS,
    "idf_flops",
    *SEARCH,
    "item_ssl",
    *TAUGHT,
    *DROPPED,
)


def taught(batch, steps):
    """Texts with numbers of two teachers."""
    texts = data("transformer", batch, steps)
    return TensorDataset(*texts.tensors, *(torch.randn(len(texts), batch) for _ in range(2)))


def images(batch, steps):
    size = batch * min(steps, 50)
    return TensorDataset(torch.randn(size, 3, SIDE, SIDE), torch.randint(0, 10, (size,)), torch.arange(size))


def fisher_times(rounds, batch=64):
    """Seconds of a gradient, and of squared gradients of the samples of the same batch, in turns."""
    net, x = SmallTransformer().eval(), torch.randint(0, 256, (batch, 32))
    params = list(net.parameters())

    def squares(at_once):
        fisher_diagonal(params, (fisher_losses(net(part), None) for part in x.split(at_once)))

    work = {
        "gradient": lambda: torch.autograd.grad(fisher_losses(net(x), None).mean(), params),
        "four at a time": lambda: squares(4),
        "all at once": lambda: squares(batch),
    }
    times = {arm: [] for arm in work}
    for _ in range(rounds):
        for arm, run in work.items():
            start = time.perf_counter()
            run()
            times[arm].append(time.perf_counter() - start)
    return times


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help=f"techniques of {', '.join(KEYS)} (all by default), or fisher"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", type=Path, help="append the tables to this file")
    options = parser.parse_args(argv)
    quiet()
    if options.keys == ["fisher"]:
        pairs = [("four at a time", "gradient"), ("all at once", "gradient"), ("all at once", "four at a time")]
        show(fisher_times(options.steps), pairs, "fisher: transformer, batch 64", options.save, skip=0)
        return
    for key in options.keys or KEYS:
        model = {"cutmix": "resnet18", "deep_prompts": "CLIP", "one_prompt": "ViT-Ti"}.get(key, "transformer")
        batch = BATCHES.get(key, 64)
        dataset = data(model, batch, options.steps)
        if key in (*PROMPTED, *TAUGHT):
            dataset = (images if key in PROMPTED else taught)(batch, options.steps)
        epochs = {"max_epochs": EPOCHS, "max_steps": -1} if key == "virtual_outliers" else {}
        if epochs:  # one epoch of all rounds
            dataset = ConcatDataset([dataset] * -(-options.steps // (len(dataset) // batch)))
        times = in_turns(arms(key, len(dataset)), dataset, batch, options.steps, **epochs)
        pairs = [("engine", "by hand"), ("engine", "plain"), ("by hand", "plain")]
        show(times, pairs, f"{key}: {model}, batch {batch}, {options.steps} rounds", options.save)


if __name__ == "__main__":
    main()
