"""Networks of open_clip, timm and torchvision as they are, small and with random weights, under all of fine-tuning."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg import ALLoRA, MaestroLowRank, MaskTuning, SaRA
from lightning_reg.functional import export_low_rank, reestimate_batchnorm
from tests.toys import QUIET, fit, weights_of

pytestmark = QUIET


def clip():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # some seconds, which no other test waits for

    vision = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=4, image_size=8)
    return CLIP(8, vision, CLIPTextCfg(context_length=6, vocab_size=20, width=16, heads=2, layers=1))


def vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=4, num_classes=4, embed_dim=16, depth=1, num_heads=2)


def resnet50():
    from torchvision.models import resnet50

    return resnet50(weights=None, num_classes=4, width_per_group=2)


class Attention(nn.Module):
    """Attention whose keys and values have widths of their own, behind one of a joined projection."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.joined = nn.MultiheadAttention(8, 2, batch_first=True)
        self.split = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)

    def forward(self, images):
        x = self.into(images.flatten(2).mT)
        x = self.joined(x, x, x)[0]
        return self.head(self.split(x, x[..., :5], x[..., :3])[0].mean(1))


PROJECTIONS = ["joined.in_proj_weight", *(f"split.{key}_proj_weight" for key in "qkv")]
# How it is made; patterns of layers; names of weights that are trained; how gradients of factors come from there.
HOSTS = {
    "open_clip CLIP": (
        clip,
        "auto",
        [
            "visual.conv1.weight",
            "visual.transformer.resblocks.0.attn.in_proj_weight",
            "transformer.resblocks.0.mlp.c_fc.weight",
            "transformer.resblocks.0.attn.out_proj.weight",
        ],
        {"at the layer": 5, "released": 4},
    ),
    "timm ViT": (
        vit,
        "auto",
        ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "head.weight"],
        {"at the layer": 6},
    ),
    "torchvision ResNet-50": (
        resnet50,
        ["*.layer[123].*.conv?", "*.conv1", "*.fc"],
        ["conv1.weight", "layer1.0.conv2.weight", "layer3.5.conv3.weight", "fc.weight"],
        {"at the layer": 44},
    ),
    "joined and split attention": (Attention, "auto", PROJECTIONS, {"at the layer": 2, "released": 6}),
    "in_proj alone": (Attention, ["*.in_proj_weight"], PROJECTIONS[:1], {"released": 1}),
    "own kdim alone": (Attention, ["*.k_proj_weight"], PROJECTIONS[2:3], {"released": 1}),
}
TECHNIQUES = {
    "ALLoRA": lambda layers: ALLoRA(layers, rank=2, rest_norms=True),
    "SaRA": lambda layers: SaRA(0.3, layers=layers, rank_weight=0.0, readjust_at=None, rest_norms=True),
    "MaskTuning": lambda layers: MaskTuning(layers, lr_factor=1e3, norm_weight=0.0),
    "MaestroLowRank": lambda layers: MaestroLowRank(layers, lasso_weight=0.0, sampler="none"),
}


class Tells(LightningModule):
    """Tells images apart, or which text belongs to which image."""

    def __init__(self, make):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = make()

    def logits(self, images, texts):
        if not hasattr(self.net, "visual"):
            return self.net(images)
        seen, read, scale = self.net(images, texts)
        return scale * seen @ read.mT

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(*batch), torch.arange(len(batch[0])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def batches():
    draw = torch.Generator().manual_seed(0)
    texts, images = torch.randint(19, (8, 6), generator=draw), torch.randn(8, 3, 8, 8, generator=draw)
    return DataLoader(list(zip(images, texts, strict=True)), 4)


@pytest.mark.parametrize("kind", TECHNIQUES)
@pytest.mark.parametrize("host", HOSTS)
def test_two_steps_in_a_network_of_another_library(host, kind):
    make, layers, names, ways = HOSTS[host]
    module, technique = Tells(make), TECHNIQUES[kind](layers)
    start = weights_of(module)
    fit(module, technique, loader=batches(), max_epochs=1)
    after, own = weights_of(module), technique.latents.own
    assert start.keys() == after.keys()
    assert {f"net.{name}" for name in names} <= own.keys()
    moved = {name for name in own if not torch.equal(start[name], after[name])}
    trained = set(dict(module.named_parameters()))
    others = {name for name in trained - own.keys() if not torch.equal(start[name], after[name])}
    if kind == "MaestroLowRank":  # all else is trained as it is
        assert others
    else:
        assert not others
    if kind == "MaskTuning":
        masks = {name: parts["mask"] for name, parts in own.items()}
        for name, mask in masks.items():
            assert torch.equal(after[name], torch.where(mask > technique.threshold, start[name], 0))
        assert moved or len(own) == 1  # some weights are off
        moved = {name for name, mask in masks.items() if (mask != technique.init).any()}
    assert moved >= {f"net.{name}" for name in names}
    norms = [name for name in start if name.endswith(("running_mean", "running_var"))]
    rest = {name for name in norms if torch.equal(start[name], after[name])}
    assert rest == (set() if kind == "MaestroLowRank" else set(norms))
    assert ("53 batch norms in evaluation mode" in technique.describe()) is (host.endswith("50") and rest == set(norms))
    found = [way.split(" (")[0] for way in technique.latents.ways.values()]
    assert {way: found.count(way) for way in found} == (ways if kind == "ALLoRA" else {"released": sum(ways.values())})
    if kind == "MaestroLowRank":
        _check_export(module, technique)


def _check_export(module, technique):
    small, layers = export_low_rank(technique, module)
    assert not layers  # of full rank no pair is less work
    names = {name: max(1, rank // 4) for name, rank in technique.ranks.items()}
    cut, layers = export_low_rank(technique, module, names)
    batch = next(iter(batches()))
    with torch.no_grad():
        before, same, less = (m.eval().logits(*batch) for m in (module, small, cut))
    torch.testing.assert_close(same, before, rtol=0, atol=1e-5)
    assert less.shape == before.shape
    plain = {name for name in names if not name.endswith(("_proj_weight", "out_proj.weight"))}
    assert {f"{name}.weight" for name in layers} == plain
    if any(isinstance(layer, nn.BatchNorm2d) for layer in cut.modules()):
        _check_statistics(cut.net)


def _check_statistics(net):
    """Those of a network with fewer columns, found anew over all batches."""
    images = [batch[0] for batch in batches()]
    reestimate_batchnorm(net, images)
    with torch.no_grad():
        put_out = torch.cat([net.conv1(batch) for batch in images])
    torch.testing.assert_close(net.bn1.running_mean, put_out.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rests", [True, False])
@pytest.mark.parametrize("kind", ["ALLoRA", "SaRA"])
def test_batch_norm_rests_unless_it_is_trained(kind, rests):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))

    for train in (None, "net.1"):
        module, technique = Tells(make), TECHNIQUES[kind]("auto")
        technique.rest_norms, technique.train = rests, train  # false unless it is written
        start, modes = weights_of(module), set()
        module.net[1].register_forward_hook(lambda layer, *_, modes=modes: modes.add(layer.training))
        fit(module, technique, loader=batches(), max_epochs=1)
        is_resting = rests and train is None
        assert modes == {not is_resting}
        assert torch.equal(module.net[1].running_mean, start["net.1.running_mean"]) is is_resting
        assert torch.equal(module.net[1].weight, start["net.1.weight"]) is (train is None)
        assert module.net[1].training
        assert ("1 batch norms in evaluation mode" in technique.describe()) is is_resting
