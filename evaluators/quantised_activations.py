"""Quantisers of activations: one grid for a tensor, from ranges that were observed and are followed, or learned."""

import torch
from torch import Tensor, nn

from .fake_quantise import LEAST_SCALE, Grid, fake_quantise, learned_quantise, number
from .ranges import FINDERS, QUICK_SAMPLE, SAMPLE, Range, edges, sample

_MOMENTUM = 0.2
_OBSERVE_EVERY = 8


class ActivationQuantiser(nn.Module):
    """Per-tensor quantiser on the integers 0 … ``levels``.

    ``observing``, it takes in all that it sees, and :meth:`end_observation` makes a range of it. In training it
    follows the range once every few steps, because ranges move slowly; else it holds it. While ``bypassed`` it does
    nothing.

    Buffers ``low`` and ``high`` (scalars): the range, which always contains 0; ``seen``: how often it was looked at.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, bits: int = 8, *, ceiling: float | None = None, ranges: str = "minmax") -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.levels = 2**bits - 1
        self.ceiling = ceiling
        self.ranges = ranges
        self.observing = False
        self.bypassed = False
        self._samples: list[Tensor] = []
        self._steps = 0

    def forward(self, value: Tensor) -> Tensor:
        if self.bypassed:
            return value
        if self.observing:
            self._observe(value.detach())
        elif self.training:
            if self._steps % _OBSERVE_EVERY == 0:
                self._follow(value.detach())
            self._steps += 1
        scale, zero_point = self.grid()
        low = -zero_point.float()
        return self._round(value, Grid(scale=number(scale), low=number(low), high=number(low + self.levels)))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale (fp32 scalar) and zero point (int32 scalar in [0, ``levels``])."""
        scale, low = self._scale_and_low()
        scale = scale.clamp_min(LEAST_SCALE)
        if self.ceiling is not None:  # the runtime absorbs a clip only if no grid point lies above it
            scale = scale.clamp_max(self.ceiling / self.levels * (1 - 1e-6))
        zero_point = torch.round(-low / scale).clamp(0, self.levels)
        return scale, zero_point.to(torch.int32)

    @torch.no_grad()
    def end_observation(self) -> None:
        """Make the range, and with it the grid, of what was observed."""
        self.observing = False
        if self._samples:
            self._move(FINDERS[self.ranges](torch.cat(self._samples), self.levels), 1.0)
            self._samples = []

    def _scale_and_low(self) -> Range:
        return (self.high - self.low) / self.levels, self.low

    def _round(self, value: Tensor, grid: Grid) -> Tensor:
        return fake_quantise(value, grid)

    def _observe(self, value: Tensor) -> None:
        """Widen the range to what was seen, and keep a sample where the range will be another."""
        low, high = edges(value)
        known = self.seen > 0
        low, high = torch.where(known, low.minimum(self.low), low), torch.where(known, high.maximum(self.high), high)
        self._move((low, high), 1.0)
        self.seen.add_(1)
        if self.ranges in FINDERS:
            self._samples.append(sample(value, SAMPLE[self.ranges]))

    def _follow(self, value: Tensor) -> None:
        """Move the range some way to that of the value; all the way if it is the first."""
        if self.ranges in FINDERS:
            found = FINDERS[self.ranges](sample(value, QUICK_SAMPLE), self.levels)
        else:
            found = edges(value)
        first = (self.seen == 0).float()
        self._move(found, first + (1 - first) * _MOMENTUM)
        self.seen.add_(1)

    def _move(self, to: Range, weight: float | Tensor) -> None:
        self.low.lerp_(to[0], weight)
        self.high.lerp_(to[1], weight)


class LearnedActivationQuantiser(ActivationQuantiser):
    """A quantiser whose scale, and unless ``unsigned`` its offset, learn, from the range that was observed.

    Parameters ``scale`` and ``offset`` (scalars): the grid reaches from the offset over ``levels`` steps of the scale.
    """

    def __init__(
        self, bits: int = 8, *, ceiling: float | None = None, ranges: str = "minmax", unsigned: bool = False
    ) -> None:
        super().__init__(bits, ceiling=ceiling, ranges=ranges)
        self.scale = nn.Parameter(torch.zeros(()))
        self.offset = None if unsigned else nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def end_observation(self) -> None:
        super().end_observation()
        self.scale.copy_((self.high - self.low) / self.levels)
        if self.offset is not None:
            self.offset.copy_(self.low)

    def _scale_and_low(self) -> Range:
        if self.observing:  # the parameters are not set yet, and what follows has to see something
            return super()._scale_and_low()
        scale = self.scale.detach()
        return scale, torch.zeros_like(scale) if self.offset is None else self.offset.detach()

    def _round(self, value: Tensor, grid: Grid) -> Tensor:
        return learned_quantise(value, grid, self.scale, self.offset)

    def _follow(self, value: Tensor) -> None:
        if self._steps == 0 and int(self.seen) == 0:  # nobody observed: the first batch has to do
            self._observe(value)
            self.end_observation()
