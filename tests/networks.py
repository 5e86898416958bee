"""Tiny networks, each with one thing that ties channels together. Inputs: 3×8×8 images, or 5 tokens of 8 numbers."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nightpress.evaluators.apply import Compressor
from nightpress.spaces.policy import Policy
from strategies import CLASSES, Residual, compressor_of, images, seeded, space_of, task_of

Make = Callable[[], nn.Module]
DIM, HEADS, TOKENS = 8, 4, 5


def tokens(count: int, seed: int = 0) -> Tensor:
    """Standard normal inputs, shape (count, TOKENS, DIM)."""
    return torch.randn(count, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


class Between(nn.Module):
    """A first convolution of 3 → 8 channels, what a test is about, and a classifier over the mean of its channels."""

    def __init__(self, inner: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = inner
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(F.relu(self.stem(x))).mean((2, 3)))


class Dense(nn.Module):
    """A layer that adds its channels to those that it reads (Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.grow(x))], 1)


class Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018): widened, depthwise, narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class Excited(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Gated(nn.Module):
    """Half of a convolution's channels gate the other half (Dauphin et al. 2017)."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.both = nn.Conv2d(8, 16, 1)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.split(self.both(x))
        return value * torch.sigmoid(gate)


class Shuffled(nn.Module):
    """Two groups of channels dealt out like cards (Zhang et al. 2018), between plain convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.after = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(x)
        x = x.view(x.shape[0], 2, 4, 8, 8).transpose(1, 2).reshape(x.shape[0], 8, 8, 8)
        return self.last(F.relu(self.after(x)))


def _deal(x: Tensor) -> Tensor:
    """The channels of two halves in turn."""
    return x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


class Dealt(nn.Module):
    """Two units (Ma et al. 2018): half of the channels pass, the other half are convolved, both are dealt out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.one, self.two):
            passed, changed = x.chunk(2, 1)
            x = _deal(torch.cat([passed, F.relu(conv(changed))], 1))
        return x


class Shrunk(nn.Module):
    """A block with the option-A shortcut (He et al. 2016): every second pixel, and channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Projected(nn.Module):
    """A block with a convolution in its shortcut; ``stride`` 1 keeps the shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride=stride, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.shortcut(x))


class Twice(nn.Module):
    """One convolution that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.conv(F.relu(self.conv(x)))))


class Heard(nn.Module):
    """Convolutions over sequences with a residual one, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(DIM, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(8)
        self.depthwise, self.inner = nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 8, 1)
        self.pool, self.head = nn.MaxPool1d(2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x.transpose(1, 2)))))
        x = F.relu(x + self.inner(F.relu6(self.depthwise(x))))
        return self.head(x.mean(-1))


class Tied(nn.Module):
    """Two linear layers with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(DIM, 12), nn.Linear(DIM, 12), nn.Linear(12, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x)) + torch.tanh(self.second(x))).mean(1)


class Flattened(nn.Module):
    """A classifier over every pixel of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8 * 9, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(torch.flatten(F.relu(self.conv(x)), 1))))


# Attention


def _heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], TOKENS, HEADS, DIM // HEADS).transpose(1, 2)


class OfTorch(nn.Module):
    """``nn.MultiheadAttention``."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.mha(x, x, x, need_weights=False)[0]
        return x if self.batch_first else x.transpose(0, 1)


class Fused(nn.Module):
    """Queries, keys and values from one linear layer, told apart by an axis of three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = made.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(x.shape[0], TOKENS, DIM))


class Chunked(nn.Module):
    """Queries, keys and values from one linear layer, cut into three; products and softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        shares = torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1)
        return self.proj((shares @ v).transpose(1, 2).reshape(x.shape[0], TOKENS, DIM))


class Separate(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(_heads(self.q(x)), _heads(self.k(x)), _heads(self.v(x)))
        return self.proj(x.transpose(1, 2).flatten(2))


class Windowed(nn.Module):
    """Attention within the four 4×4 windows of an 8×8 image of DIM channels (Liu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2))
        x = x.view(b, 2, 4, 2, 4, DIM).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, DIM)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, DIM))
        x = x.view(-1, 2, 2, 4, 4, DIM).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, DIM)
        return torch.roll(x, (2, 2), (1, 2)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """A transformer's layer, norms first: attention and an MLP, each with a sum around it."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(DIM), attention or Fused()
        self.norm2, self.mlp = nn.LayerNorm(DIM), nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class OverTokens(nn.Module):
    """A linear layer, what a test is about, and a classifier over the mean of the tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(DIM, DIM), inner, nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)).mean(1))


class Vision(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) of two layers: patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(torch.randn(1, TOKENS, DIM))
        self.layers = nn.Sequential(Encoder(), Encoder())
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


ATTENTIONS: dict[str, Make] = {
    "nn.MultiheadAttention": lambda: OfTorch(batch_first=True),
    "nn.MultiheadAttention, tokens first": lambda: OfTorch(batch_first=False),
    "qkv.reshape.permute": Fused,
    "qkv.chunk": Chunked,
    "q, k, v": Separate,
}

ON_IMAGES: dict[str, Make] = {
    "residual": lambda: Between(Residual(8, 6)),
    "dense": lambda: Between(nn.Sequential(Dense(), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1))),
    "inverted": lambda: Between(Inverted()),
    "grouped": lambda: Between(nn.Conv2d(8, 12, 3, padding=1, groups=4), width=12),
    "excited": lambda: Between(Excited()),
    "gated": lambda: Between(Gated(lambda x: x.chunk(2, 1))),
    "shuffled": lambda: Between(Shuffled()),
    "dealt": lambda: Between(Dealt()),
    "option A": lambda: Between(Shrunk(), width=16),
    "twice": lambda: Between(Twice()),
    "flattened": Flattened,
    "windowed": lambda: Between(Windowed()),
    "vision": Vision,
    "group norm": lambda: Between(
        nn.Sequential(
            nn.GroupNorm(4, 8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.InstanceNorm2d(12, affine=True),
            nn.PReLU(12),
            nn.Conv2d(12, 8, 1),
            nn.GroupNorm(1, 8),
        )
    ),
    "pixel shuffle": lambda: Between(
        nn.Sequential(nn.Conv2d(8, 16, 1), nn.PixelShuffle(2), nn.PReLU(), nn.Conv2d(4, 8, 2, stride=2))
    ),
    "up": lambda: Between(nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 8, 2, stride=2))),
}
ON_TOKENS: dict[str, Make] = {
    "tied": Tied,
    "heard": Heard,
    **{name: (lambda make=make: OverTokens(Encoder(make()))) for name, make in ATTENTIONS.items()},
}


def inputs_for(name: str, count: int = 2) -> Tensor:
    """Inputs for the network of that name."""
    return images(count) if name in ON_IMAGES else tokens(count)


NETWORKS = {**ON_IMAGES, **ON_TOKENS}


@cache
def made_of(name: str) -> Compressor:
    """A network, inspected with steps of one channel."""
    return compressor_of(task_of(seeded(NETWORKS[name]), inputs_for(name)), step=1)


def random(made: Compressor, seed: int) -> Policy:
    """Ratios and blocks at random, without quantisers."""
    policy = space_of(made.anatomy).random(np.random.default_rng(seed))
    return Policy(
        model=policy.model, prune=policy.prune, removed_blocks=policy.removed_blocks, importance="l2",
    )  # fmt: skip


def state_of(name: str, seed: int) -> dict[str, NDArray[np.float32]]:
    """What a policy leaves; a spawned process can import it from here."""
    made = made_of(name)
    return {key: value.numpy() for key, value in made.apply(random(made, seed))[0].state_dict().items()}
