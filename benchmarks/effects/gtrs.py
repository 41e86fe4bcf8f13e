"""A scorer of trajectories, trained on all candidates or on a random half: how good is what it chooses from other sets?

A transformer layer (width 48) lets 256 candidates attend to each other: arcs of 8 poses in 4 seconds with a drift. A
context is a goal and three obstacles. Targets are a softmax over the distances to the best of 1024 other arcs
(imitation), whether a candidate keeps 2 m from the obstacles, and exp(-distance to the goal / 5 m); Adam 2e-3, batches
of 16 of 800 contexts, 10 epochs. Chosen is the best score; its quality, safety times progress, is averaged over 300
further contexts (random ones have about 0.04).

"Proposals": 32 trajectories for each context by a small diffusion model of the best ones, of their steps from pose to
pose as in the authors' code, with diffusers' DDIM: an MLP, and diffusers' UNet1DModel. Both were chosen on two other
seeds, before any scorer was looked at. There a proposal of the MLP had 0.18 and 0.17, the best of 32 0.68 and 0.68; of
the U-Net 0.19 and 0.21, the best 0.63 and 0.65, for fifteen times the time. On the poses themselves both had about 0.10
and 0.52. No driving data, no camera and no simulator: the technique and not the system of the paper.
"""

import sys

import torch
import torch.nn.functional as F
from _shared import Arm, fit
from diffusers import DDIMScheduler, UNet1DModel
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg import CandidateDropout
from lightning_reg.functional import best_candidates

POSES, WIDTH, CONTEXTS, TESTS = 8, 48, 800, 300
SCALE = 10.0  # metres that count 1 as inputs


def arcs(count):
    """Poses (count, 8, 2) of arcs with random speed, acceleration and curvature, and a drift to one side."""
    t = torch.linspace(0.5, 4.0, POSES)
    speed, acceleration, curvature, drift = torch.rand(4, count, 1)
    s = (2 + 8 * speed) * t + (acceleration - 0.5) * t**2 / 2
    bend = 0.5 * (curvature - 0.5)
    bend = torch.where(bend.abs() < 1e-3, 1e-3, bend)
    sideways = (1 - torch.cos(bend * s)) / bend + 0.2 * (drift - 0.5) * t**2
    return torch.stack([torch.sin(bend * s) / bend, sideways], -1)


def contexts(count):
    """A goal and three obstacles (count, 4, 2)."""
    goal = arcs(count)[:, -1:]
    share = 0.2 + 0.7 * torch.rand(count, 3, 1)
    return torch.cat([goal, goal * share + 3 * torch.randn(count, 3, 2)], 1)


def safety_and_progress(context, trajectories):
    """Of trajectories (L, 8, 2) for all contexts, or (B, L, 8, 2): both (B, L)."""
    own = trajectories if trajectories.dim() == 4 else trajectories.expand(len(context), -1, -1, -1)
    near = torch.stack([(own - o[:, None, None]).norm(dim=-1).amin(-1) for o in context[:, 1:].unbind(1)]).amin(0)
    return (near > 2).float(), (-(own[:, :, -1] - context[:, None, 0]).norm(dim=-1) / 5).exp()


def experts(context):
    """The best of 1024 arcs for each context (B, 8, 2)."""
    many = arcs(1024)
    best = [torch.mul(*safety_and_progress(some, many)).argmax(1) for some in context.split(100)]
    return many[torch.cat(best)]


class Scorer(LightningModule):
    def __init__(self, vocabulary):
        super().__init__()
        self.register_buffer("vocabulary", vocabulary)
        self.embed = nn.Sequential(nn.Linear(2 * POSES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.context = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.decoder = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.heads = nn.Linear(WIDTH, 3)

    def forward(self, context, trajectories):
        candidates = self.embed(trajectories.flatten(-2) / SCALE)
        rows = candidates + self.context(context.flatten(1) / SCALE)[:, None]
        return self.heads(self.decoder(rows)).unbind(-1)

    def training_step(self, batch, batch_idx):
        imitation, safe, progress = self(batch["context"], self.vocabulary)
        loss = F.cross_entropy(imitation, batch["imitation"])
        loss = loss + 3 * F.binary_cross_entropy_with_logits(safe, batch["safe"])
        return loss + 2 * F.binary_cross_entropy_with_logits(progress, batch["progress"])

    def score(self, context, trajectories):
        imitation, safe, progress = self(context, trajectories)
        return 0.1 * imitation.log_softmax(1) + F.logsigmoid(safe) + F.logsigmoid(progress)

    def quality(self, context, trajectories, proposals=None):
        """Mean quality of what it chooses from (L, 8, 2), and from proposals (B, N, 8, 2)."""
        total = 0.0
        for rows in torch.arange(len(context)).split(50):
            further = None if proposals is None else lambda _, rows=rows: proposals[rows]
            chosen = best_candidates(self.score, context[rows], trajectories, further)
            total += torch.mul(*safety_and_progress(context[rows], chosen)).sum().item()
        return total / len(context)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


class MLP(nn.Module):
    """Predicts the noise of trajectories (B, 8, 2)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * POSES + 9, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2 * POSES)
        )

    def forward(self, x, context, t):
        return self.net(torch.cat([x.flatten(1), context.flatten(1) / SCALE, t[:, None] / 100], 1)).view_as(x)


class UNet(nn.Module):
    """The same by convolutions along the poses; the context is eight further channels."""

    def __init__(self):
        super().__init__()
        blocks = {"down_block_types": ["DownResnetBlock1D"] * 2, "up_block_types": ["UpResnetBlock1D"]}
        blocks |= {"mid_block_type": "MidResTemporalBlock1D", "out_block_type": "OutConv1DBlock"}
        time = {"time_embedding_type": "positional", "use_timestep_embedding": True, "freq_shift": 1.0}
        sizes = {"in_channels": 10, "out_channels": 10, "block_out_channels": (32, 64)}
        self.net = UNet1DModel(POSES, flip_sin_to_cos=False, act_fn="mish", **blocks, **time, **sizes)

    def forward(self, x, context, t):
        channels = (context.flatten(1) / SCALE)[:, :, None].expand(-1, -1, POSES)
        return self.net(torch.cat([x.mT, channels], 1), t).sample[:, :2].mT


class Proposals(nn.Module):
    """A diffusion model of trajectories."""

    def __init__(self, noise, steps=1500):
        super().__init__()
        self.noise, self.steps = noise, steps
        self.scheduler = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2")

    def train_on(self, context, trajectories):
        optimizer = torch.optim.Adam(self.parameters(), 2e-3)
        moves = trajectories.diff(dim=1, prepend=torch.zeros_like(trajectories[:, :1]))
        self.mean = moves.mean((0, 1))
        self.largest = (moves - self.mean).abs().amax((0, 1))
        for _ in range(self.steps):
            rows, t = torch.randint(len(context), (64,)), torch.randint(100, (64,))
            clean = (moves[rows] - self.mean) / self.largest
            noise = torch.randn_like(clean)
            noisy = self.scheduler.add_noise(clean, noise, t)
            optimizer.zero_grad()
            F.mse_loss(self.noise(noisy, context[rows], t), noise).backward()
            optimizer.step()

    @torch.no_grad()
    def sample(self, context, count):
        """Trajectories (B, count, 8, 2)."""
        rows = context.repeat_interleave(count, 0)
        x = torch.randn(len(rows), POSES, 2)
        self.scheduler.set_timesteps(20)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.noise(x, rows, t.expand(len(rows))), t, x).prev_sample
        return (x * self.largest + self.mean).cumsum(1).unflatten(0, (len(context), count))


def batches(context, vocabulary):
    expert = experts(context)
    safe, progress = safety_and_progress(context, vocabulary)
    far = (expert[:, None] - vocabulary).square().sum((2, 3))
    rows = {"context": context, "imitation": (-far / 8).softmax(1), "safe": safe, "progress": progress}
    data = [{name: values[i] for name, values in rows.items()} for i in range(len(context))]
    return DataLoader(data, 16, shuffle=True), expert


def run(seeds):
    arms = [Arm("all 256 candidates"), Arm("CandidateDropout, keep=0.5")]
    for seed in seeds:
        seed_everything(seed, verbose=False)
        vocabulary, unseen, context, tests = arcs(256), arcs(256), contexts(CONTEXTS), contexts(TESTS)
        loader, expert = batches(context, vocabulary)
        proposals = []
        for noise in (MLP, UNet):
            seed_everything(seed, verbose=False)
            diffusion = Proposals(noise())
            diffusion.train_on(context, expert)
            proposals.append(diffusion.sample(tests, 32))
        sets = {
            "all_256": (vocabulary,),
            "128_of_them": (vocabulary[::2],),
            "32_of_them": (vocabulary[::8],),
            "256_unseen": (unseen,),
            "64_unseen": (unseen[::4],),
            "proposals": (vocabulary[:0], proposals[0]),
            "128_and_proposals": (vocabulary[::2], proposals[0]),
            "U-Net's": (vocabulary[:0], proposals[1]),
            "128_and_U-Net's": (vocabulary[::2], proposals[1]),
        }
        for arm in arms:
            seed_everything(seed, verbose=False)
            model, distributions = Scorer(vocabulary), {"imitation": 1, "safe": 1, "progress": 1}
            dropout = [CandidateDropout(distributions, layer="embed", normalise=["imitation"], seed=seed)]
            fit(model, dropout if arm is arms[1] else [], loader, max_epochs=10)
            arm.add(**{name: model.quality(tests, *candidates) for name, candidates in sets.items()})
            print(f"seed {seed}, {arm.name}: {[v[-1] for v in arm.values.values()]}", file=sys.stderr, flush=True)
    return arms
