"""Rounding to a grid with a gradient: value → (clamp(round(value / scale) + zero point) − zero point) · scale.

The gradient of the value passes straight through where the grid reaches (Jacob et al. 2018, "Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference"); scale and offset learn by Esser et al. 2020,
"Learned Step Size Quantization", eq. 3, and Bhalgat et al. 2020, "LSQ+", eq. 4–5.

On a CPU this takes a quarter of the time of torch's own fake-quantise operations, whose loops are scalar. And it
divides as ONNX Runtime does, where they multiply by the reciprocal: the integers are the runtime's, to the last one.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

Number = float | Tensor
"""A Python number on a CPU, where reading one costs nothing and every operation is quicker with it; else a tensor,
because reading would wait for the device."""

LEAST_SCALE = 1e-8
HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The points ``scale`` · i for whole numbers ``low`` ≤ i ≤ ``high``; 0 is one of them.

    ``scale`` broadcasts against the value: a number, or (cout, 1, …) for one scale a channel.
    """

    scale: Number
    low: Number
    high: Number


def number(value: Tensor) -> Number:
    """A scalar as :data:`Number`."""
    return value.item() if value.device.type == "cpu" else value


def integers(value: Tensor, grid: Grid) -> Tensor:
    """The grid's whole numbers nearest to a value, in fp32; halves go to the even one."""
    low, high = cast("Any", grid.low), cast("Any", grid.high)
    value = value.detach()
    steps = value.div(grid.scale) if value.dtype == torch.float32 else value.float().div_(grid.scale)
    return steps.round_().clamp_(low, high)


def fake_quantise(value: Tensor, grid: Grid, *, clips: bool = True) -> Tensor:
    """The value on the grid. Its gradient passes where the grid reaches; everywhere unless the grid ``clips``."""
    return _Fixed.apply(value, grid, clips)  # type: ignore[no-any-return]


def learned_quantise(value: Tensor, grid: Grid, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """As :func:`fake_quantise`, and ``scale`` and ``offset`` learn.

    ``grid`` is what they amount to once bounded and rounded: its scale is that of ``scale``, its ``low`` · scale the
    ``offset``. Their gradients are divided by √(n · levels) (Esser et al. 2020, section 2.2), n being the values of
    one item, or of one channel where there is a scale a channel.
    """
    return _Learned.apply(value, grid, scale, offset)  # type: ignore[no-any-return]


def round_to_half(value: Tensor) -> Tensor:
    """The nearest number of 16 bits, in the value's dtype; the gradient passes straight through."""
    return _Half.apply(value)  # type: ignore[no-any-return]


def as_half(value: Tensor) -> Tensor:
    """The nearest finite fp16 number, in the value's dtype."""
    return value.detach().clamp(-HALF, HALF).half().to(value.dtype)


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: Grid, clips: bool) -> Tensor:
        ctx.grid = grid
        if clips:
            ctx.save_for_backward(value)
        return integers(value, grid).mul_(grid.scale).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        inside = _where_it_reaches(grads[0], ctx.saved_tensors[0], ctx.grid) if ctx.saved_tensors else grads[0]
        return inside, None, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: Grid, scale: Tensor, offset: Tensor | None) -> Tensor:
        ctx.grid, ctx.has_offset = grid, offset is not None
        result = integers(value, grid).mul_(grid.scale).to(value.dtype)
        ctx.save_for_backward(value, result, scale)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
        value, result, scale = ctx.saved_tensors
        grid, grad = ctx.grid, grads[0]
        inside = _where_it_reaches(grad, value, grid)
        # In units of one step: inside the grid round(v) − v, above it the steps from the offset to the top, below 0.
        step = _per_step(grad, result, inside, value, grid, scale)
        levels = grid.high - grid.low if scale.dim() == 0 else grid.high
        factor = (value[0].numel() * levels) ** -0.5
        if not ctx.has_offset:
            return inside, None, step * factor, None
        outside = (grad - inside).sum().float()
        return inside, None, (step - outside * grid.low) * factor, outside * factor


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return as_half(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _where_it_reaches(grad: Tensor, value: Tensor, grid: Grid) -> Tensor:
    """The gradient of the values that are not clipped, else 0."""
    low, high = (grid.low - 0.5) * grid.scale, (grid.high + 0.5) * grid.scale
    if isinstance(low, float) and isinstance(high, float):
        return torch.ops.aten.hardtanh_backward(grad, value, low, high)  # one pass, the quickest there is
    return torch.where((value > low) & (value < high), grad, 0)


def _per_step(grad: Tensor, result: Tensor, inside: Tensor, value: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """Σ (grad · result − inside · value) / scale over everything that shares a scale, in fp32 and the scale's shape."""
    if isinstance(grid.scale, Tensor):
        steps = (grad * torch.round(result.float() / grid.scale)).addcmul_(inside, value / grid.scale, value=-1)
        return steps.flatten(1).sum(dim=1) if scale.dim() else steps.sum()
    if value.dtype == torch.float32:
        return (_inner(grad, result) - _inner(inside, value)) / grid.scale
    # Results were rounded to 16 bits, whole numbers of up to 8 bits are exact in them. Conversions to fp32 would take
    # longer than all the rest; sums are taken in fp32 anyway.
    whole = torch.div(result, grid.scale).round_()
    return whole.mul_(grad).addcmul_(inside, value, value=-1 / grid.scale).sum().float()


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """The sum of all products, in one pass."""
    if other.is_contiguous(memory_format=torch.channels_last):
        one, other = one.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)  # in the order of memory: nothing is copied
    return torch.dot(one.reshape(-1), other.reshape(-1))
