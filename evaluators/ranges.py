"""The range of values that a grid covers, found after training: everything (min-max), all but the rarest
(percentile), or what loses least (MSE). The range of activations always contains 0, which has to be exact.

MSE is the clipping with the least squared error of quantisation among shares of the largest magnitude (as in Nagel
et al. 2021, "A White Paper on Neural Network Quantization", section 3.1).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .fake_quantise import LEAST_SCALE

RANGES = ("minmax", "percentile", "mse")
PERCENTILE = 99.99
"""Per cent of the values that a percentile range leaves unclipped at each of its two ends."""
SAMPLE = {"percentile": 1 << 17, "mse": 1 << 15}
"""Most values of one batch that a range is found from; min-max sees all."""
QUICK_SAMPLE = 1 << 13
"""The same while training, when ranges are followed and not found once."""
_GOLDEN = (math.sqrt(5) - 1) / 2
_SHARES = tuple(step / 40 for step in range(40, 3, -1))

Range = tuple[Tensor, Tensor]


def edges(value: Tensor) -> Range:
    """The least and the largest value, and 0. Scalars in fp32."""
    # Two reductions: on a CPU they take a seventh of the time of torch.aminmax.
    return value.amin().float().clamp_max(0), value.amax().float().clamp_min(0)


def sample(value: Tensor, count: int) -> Tensor:
    """At most ``count`` of the values in fp32, evenly spread; the same places for tensors of the same size."""
    flat = value.detach().reshape(-1)
    size = flat.numel()
    if size <= count:
        return flat.float()
    stride = int(size * _GOLDEN)  # multiples of it spread over the whole before they come close to one another
    while math.gcd(stride, size) > 1:
        stride += 1
    return flat[torch.arange(count, device=flat.device) * stride % size].float()


def percentile_range(values: Tensor, levels: int) -> Range:
    """All but the rarest 0.01 % at either end."""
    del levels
    tail = (100 - PERCENTILE) / 100
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], device=values.device)).unbind()
    return low.clamp_max(0), high.clamp_min(0)


def mse_range(values: Tensor, levels: int) -> Range:
    """The share of the whole range with the least squared error on a grid of ``levels`` + 1 points."""
    low, high = edges(values)
    shares = torch.tensor(_SHARES, device=values.device)
    scales = ((high - low) * shares / levels).clamp_min(LEAST_SCALE)
    errors = torch.stack([_error(values, scale, low, levels) for scale in zip(shares, scales, strict=True)])
    best = torch.take(shares, errors.argmin())  # indexing would read the place, and wait for the device
    return low * best, high * best


def _error(values: Tensor, candidate: tuple[Tensor, Tensor], low: Tensor, levels: int) -> Tensor:
    share, scale = candidate
    zero_point = torch.round(-low * share / scale)
    rounded = torch.div(values, scale).round_().clamp_(-zero_point, levels - zero_point).mul_(scale)
    return rounded.sub_(values).square_().sum()


FINDERS: dict[str, Callable[[Tensor, int], Range]] = {"percentile": percentile_range, "mse": mse_range}
"""Ranges that need the values themselves, from a sample and the largest integer of the grid."""


def mse_shares(weight: Tensor, top: int) -> Tensor:
    """For each output channel, the share of its largest magnitude that its grid of ±``top`` should reach to lose
    least; shape (cout,)."""
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for share in _SHARES:  # one at a time: all at once would hold the weight forty times
        scale = (largest * share / top).clamp_min(LEAST_SCALE)
        error = torch.div(rows, scale).round_().clamp_(-top, top).mul_(scale).sub_(rows).square_()
        error = error.sum(dim=1, keepdim=True)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best.flatten()
