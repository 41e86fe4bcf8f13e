"""Failures of a diffusion model, found by a search where random samples show none.

Run it with ``python examples/failures.py``; it takes a minute and downloads nothing. It is a notebook too:
``examples/notebooks/failures.ipynb``. It needs diffusers: ``pip install -e '.[examples,diffusion]'``.
"""

# %% [markdown]
# # Where does a generator fail?
#
# A model of digits draws the digit that it is asked for, again and again. `latent_search` moves the noise that it
# starts from, on the sphere where almost all noise lies, until classifiers no longer see the requested digit. A judge
# that the search has never seen says which of these are failures of the generator, and which of the classifiers.

# %%
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lightning_reg
from lightning_reg import Denoiser
from lightning_reg.functional import (
    failure_groups,
    failure_report,
    latent_search,
    non_gaussian,
    random_failures,
    region_size,
    to_sphere,
)

SHORT = "LIGHTNING_REG_SHORT" in os.environ  # the tests run it in seconds
STARTS, STEPS, ITERATIONS = (3, 2, 2) if SHORT else (20, 10, 20)
console = Console()

# %% [markdown]
# ## The model and its judges
#
# A `UNet2DModel` of diffusers, trained on 8 x 8 digits in two minutes by `tests/diffusion/digits.py` of this
# repository, and four small classifiers; the fourth takes no part in the search.

# %%
sys.path.insert(0, str(Path(lightning_reg.__file__).resolve().parents[1]))  # the checkout that is installed
from tests.diffusion.digits import NULL, class_model, scheduler, training_digits  # noqa: E402 # by the line above

denoiser = Denoiser(class_model(), scheduler())
images, digits = training_digits()


def judge(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images + 0.2 * torch.randn_like(images)), digits).backward()
        optimizer.step()
    return network


*three, held_out = (judge(seed) for seed in range(4))

# %% [markdown]
# ## Random draws, and searches
#
# The gradient of the search goes around the sampler (as in the paper, at a third of the time) or through it.

# %%
torch.manual_seed(0)
labels = torch.arange(STARTS) % 10
draws = [to_sphere(torch.randn(STARTS, 1, 8, 8)) for _ in range(ITERATIONS + 1)]
options = {"null": torch.tensor([NULL]), "scale": 1.5, "sampler_steps": STEPS}
at_random = torch.stack([random_failures(denoiser, z, labels, labels, three, **options) for z in draws]).any(0)
summary = Table("search", "found", "of these confirmed", "not Gaussian", "distinct", title=f"{STARTS} starts")
summary.add_row("random", f"{at_random.double().mean():.2f}", "", "", "")
for name, through in (("around the sampler", False), ("through the sampler", True)):
    found = latent_search(
        denoiser, draws[0], labels, labels, three, iterations=ITERATIONS, sampler_gradient=through, held_out=held_out,
        **options,
    )  # fmt: skip
    rates, kept = found.rates(), found.noise[found.found]
    odd = f"{non_gaussian(kept).double().mean():.2f}" if len(kept) else ""
    groups = failure_groups(found.samples[found.found])
    summary.add_row(name, f"{rates['found']:.2f}", f"{rates['confirmed']:.2f}", odd, str(len(groups.unique())))
console.print(summary)

# %% [markdown]
# ## What they look like
#
# Above, what the model makes of the noise where a search starts; below, of the noise where it ends. `failure_report`
# has both with what the judges say, and writes a page of them; its rates are those of the paper: what the judges take
# for failures (SSR(A)), what the held-out judge confirms in the place of people (SSR(H)), and how many of the failures
# come from noise that is no Gaussian noise any more (NGR).

# %%
report = failure_report(
    denoiser, draws[0], found.noise, labels, labels, three, held_out=held_out,
    prompts=[f"a {label}" for label in labels.tolist()], **options,
)  # fmt: skip
with TemporaryDirectory() as folder:  # where you keep it
    page = Path(folder) / "failures.html"
    report.save(page)
    console.print({name: round(rate, 2) for name, rate in report.rates().items()}, f"{page.stat().st_size} bytes")
count = min(STARTS, 8)
figure, axes = plt.subplots(2, count, figsize=(7.5, 2.4))
for column in range(count):
    for line, picture in enumerate((report.before, report.after)):
        axes[line, column].imshow(picture[column, 0].numpy(), cmap="gray_r")
        axes[line, column].set(xticks=(), yticks=())
    axes[0, column].set_title(f"asked: {int(labels[column])}", fontsize=8)
    axes[1, column].set_xlabel("confirmed" if bool(report.confirmed[column]) else "", fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## How large such regions are
#
# The share of noise at growing distances from a found failure that fails as well.

# %%
radii = [0.05, 0.1, 0.2, 0.4]
some = found.found.nonzero()[:4, 0]
if len(some):
    shares = region_size(
        denoiser, found.noise[some], labels[some], labels[some], three, radii, 2 if SHORT else 8, **options
    )
    regions = Table("distance, in norms of the noise", *(f"{radius:g}" for radius in radii))
    regions.add_row("share that fails too", *(f"{share:.2f}" for share in shares.mean(0).tolist()))
    console.print(regions)

# %% [markdown]
# In validation the same is one callback, `AdversarialSearch`, with the names of the judges; `report="failures.html"`
# writes the page there, and its `result` can be saved, so that each failure can be made again.
