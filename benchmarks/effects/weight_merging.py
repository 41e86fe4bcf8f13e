"""Few-shot tuning of a small CLIP and WiSEFT: accuracy on the digits tuned on and on the others, over alpha.

The digit CLIP of the tests sees 8 shifted images of each of the digits 0 to 4; the image tower and its projection are
trained, by SGD 0.003 with momentum 0.9 and batches of 8 for 24 epochs. Each mix is of one and the same fit. Test: 200
other images of that domain, in per cent; digits 0 to 4 are told apart among themselves, and so are 5 to 9.
"""

import sys

from _few_shot_clip import Tuned, accuracies, loader_of
from _shared import Arm, fit
from lightning.pytorch import seed_everything

from lightning_reg import WiSEFT

ALPHAS = [1.0, 0.75, 0.5, 0.25, 0.0]


def run(seeds):
    arms = [
        Arm(f"alpha={alpha:g}{' (plain)' if alpha == 1 else ' (no tuning)' if not alpha else ''}") for alpha in ALPHAS
    ]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        model, technique = Tuned(0.003, ["vision_model", "visual_projection"]), WiSEFT(1.0)
        fit(model, [technique], loader_of(seed), max_epochs=24)
        curve = technique.curve(model, lambda model=model: accuracies(model), ALPHAS)
        for place, arm in enumerate(arms):
            arm.add(**{name: values[place] for name, values in curve.items() if name != "alpha"})
            print(f"seed {seed}, {arm.name}: {[v[-1] for v in arm.values.values()]}", file=sys.stderr, flush=True)
    return arms
