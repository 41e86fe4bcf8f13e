"""Few-shot tuning of a small CLIP: accuracy on the digits tuned on, and on those known by name alone, with OGEN.

The digit CLIP of the tests sees 8 shifted images of each of the digits 0 to 4; what is trained is the embeddings of the
words (the context of the prompt, and the names), by SGD 0.05 with momentum 0.9 and batches of 8. Plain tuning has 24
epochs and OGEN 30, the first 6 of which train its generator alone. Test: 200 other images of that domain, in per cent;
digits 0 to 4 are told apart among themselves, and so are 5 to 9.
"""

import sys

from _few_shot_clip import TEXTS, Tuned, accuracies, loader_of
from _shared import Arm, fit
from lightning.pytorch import seed_everything

from lightning_reg import LocalMeanTeacher, SyntheticUnknowns

CONTEXT = ["text_model.embeddings.token_embedding"]
MAKES = {"layer": "clip.visual_projection", "known": "clip.text_projection", "encoder": "clip.get_text_features"}
MAKES |= {"unknown_tokens": TEXTS[5:].tolist(), "scale": 13.9}
ARMS = {
    "plain": None,
    "first weights (no tuning)": None,
    "SyntheticUnknowns": MAKES,
    "SyntheticUnknowns, unknown_weight=0": MAKES | {"unknown_weight": 0.0},
    "LocalMeanTeacher on the text features": {"layer": "clip.text_projection", "weight": 100.0},
}


def run(seeds):
    arms = [Arm(name) for name in ARMS]
    for seed in seeds:
        for arm in arms:
            seed_everything(seed, verbose=False)
            model, arguments = Tuned(0.05, CONTEXT), ARMS[arm.name]
            teaches = arm.name.startswith("LocalMeanTeacher")
            made = [] if arguments is None else [(LocalMeanTeacher if teaches else SyntheticUnknowns)(**arguments)]
            if not arm.name.startswith("first"):
                fit(model, made, loader_of(seed), max_epochs=24 if teaches or not made else 30)
            arm.add(**accuracies(model))
            print(f"seed {seed}, {arm.name}: {[v[-1] for v in arm.values.values()]}", file=sys.stderr, flush=True)
    return arms
