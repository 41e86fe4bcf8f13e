"""ResNet-50, ViT-B/16 and a 124M GPT in plain PyTorch, and small ones of the same kind.

All are ``head(drop(body(x)))``.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "Layers", "ResNet", "ViT", "compile_"]


class Net(nn.Module):
    """Features, dropout, and a linear layer."""

    def __init__(self, body: nn.Module, width: int, classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.body, self.drop, self.head = body, nn.Dropout(0.1), nn.Linear(width, classes, bias=bias)

    def top(self, features: Tensor) -> Tensor:
        return self.head(self.drop(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(x))


def compile_(net: nn.Module, backend: str) -> None:
    """Block by block, or as a whole where there are none; what is alike is compiled once."""
    blocks = [layer for layer in net.modules() if isinstance(layer, Block)]
    for unit in blocks or [net.body if isinstance(net, Net) else net]:
        unit.compile(backend=backend)


class Layers(nn.Sequential):
    """One after the other, in one graph when it is compiled: the compiler takes torch's own for a part of torch."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, the last with four times the width."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.reduce, self.bn1 = nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
        self.spatial, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.expand, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or into != out:
            self.skip = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.reduce(x)))
        y = F.relu(self.bn2(self.spatial(y)))
        return F.relu(self.bn3(self.expand(y)) + self.skip(x))


class ResNet(Net):
    """ResNet-50 as it stands, with its stride in the 3x3 convolution."""

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, 2, 1))
        into = width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                inner = width * 2**stage
                layers.append(Bottleneck(into, inner, 2 if stage and not number else 1))
                into = 4 * inner
        super().__init__(Layers(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), into, classes)
        self.to(memory_format=torch.channels_last)


class Block(nn.Module):
    """Self-attention and an MLP, each after a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        layers = {"fc1": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Patches of an image, with their places."""

    def __init__(self, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2) + self.places


class Mean(nn.Module):
    """Over the patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ViT(Net):
    """ViT-B/16, with the mean over the patches in place of a class token."""

    def __init__(
        self, side: int = 224, patch: int = 16, width: int = 768, depth: int = 12, classes: int = 1000
    ) -> None:
        blocks = [Block(width, max(1, width // 64), causal=False) for _ in range(depth)]
        super().__init__(
            nn.Sequential(Patches(side, patch, width), *blocks, nn.LayerNorm(width), Mean()), width, classes
        )


class Tokens(nn.Module):
    """Embeddings of tokens and of their places."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) + self.places[: tokens.shape[1]]


class GPT(Net):
    """GPT-2's 124M: 12 layers, d = 768, embedding and head share a matrix."""

    def __init__(self, vocabulary: int = 50257, length: int = 1024, width: int = 768, depth: int = 12) -> None:
        blocks = [Block(width, max(1, width // 64), causal=True) for _ in range(depth)]
        tokens = Tokens(vocabulary, length, width)
        super().__init__(nn.Sequential(tokens, *blocks, nn.LayerNorm(width)), width, vocabulary, bias=False)
        self.head.weight = tokens.embedding.weight
