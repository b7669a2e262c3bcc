"""The small networks of E2, E3, E6, E7 and E8, and the digits. No biases: every parameter is a matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from muon_dist.errors import DataError

Init = Literal["he", "default"]


@dataclass(frozen=True)
class Digits:
    """8x8 handwritten digits (UCI, in scikit-learn): train and test pixels (n, 64) and labels (n,)."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@functools.cache
def _raw_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the experiments on digits need scikit-learn: pip install scikit-learn") from error
    raw = load_digits()
    return torch.tensor(raw.data, dtype=torch.float32), torch.tensor(raw.target)


def digits(seed: int = 0, scale: float = 1.0, centred: bool = False, test: int = 360) -> Digits:
    """A random split of the 1797 digits; pixels in [0, scale], or minus the training mean of each pixel."""
    x, y = _raw_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))
    x, y = x[order] * (scale / 16), y[order]
    if centred:
        x = x - x[test:].mean(0)
    return Digits(x[test:], y[test:], x[:test], y[:test])


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches; the last partial batch of an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - size + 1, size):
            rows = order[start : start + size]
            yield x[rows], y[rows]


def cross_entropy(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module with torch's default initialisation under its own seed, without changing the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def mlp(widths: tuple[int, ...] = (64, 128, 128, 10), init: Init = "he") -> nn.Module:
    """ReLU MLP without biases, from He's initialisation (arXiv 1502.01852) or torch's default."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layer = nn.Linear(widths[i], widths[i + 1], bias=False)
        if init == "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Two 3x3 convolutions and a linear layer on 8x8 images."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10, bias=False),
    )


def depthwise_cnn() -> nn.Module:
    """A depthwise 3x3 convolution in the middle: its curvature is block-diagonal over channels, not Kronecker."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10, bias=False),
    )


class TiedRNN(nn.Module):
    """Reads a digit row by row with one recurrent matrix: its curvature is a sum of Kronecker products, not one."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inward = nn.Linear(8, width, bias=False)
        self.recurrent = nn.Linear(width, width, bias=False)
        self.outward = nn.Linear(width, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.recurrent.in_features)
        for row in x.view(-1, 8, 8).unbind(1):
            h = torch.tanh(self.inward(row) + self.recurrent(h))
        return self.outward(h)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:]))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, x.shape[-1:]))))


class TinyGPT(nn.Module):
    """A pre-norm transformer on characters: learned positions, untied head, norms without parameters."""

    def __init__(self, vocabulary: int, context: int, width: int = 48, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(F.rms_norm(x, x.shape[-1:]))

    def matrices(self) -> list[nn.Parameter]:
        """The hidden matrices, which Muon trains: (48, 48), (192, 48) or (48, 192) each."""
        return list(self.blocks.parameters())

    def others(self) -> list[nn.Parameter]:
        """Embeddings and head, which every arm trains with the same AdamW."""
        return [*self.tokens.parameters(), self.positions, *self.head.parameters()]
