"""Quantisers in a module: the grids that the exported integers will lie on, simulated in training and evaluation.

Weights are symmetric per output channel, activations asymmetric per tensor on unsigned integers. Scales follow the
ranges of what is seen, or are learned. docs/quantisation.md says what each choice means and what is exact.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from ..spaces.errors import InputError
from ..spaces.plan import Plan, PlannedOp
from .fake_quantise import LEAST_SCALE, Grid, fake_quantise, learned_quantise, number
from .quantised_layers import (
    QuantConv2d,
    QuantisedWeight,
    QuantLinear,
    weight_grid,
    weight_integers,
    weight_scales,
    with_quantised_weight,
)
from .ranges import FINDERS, QUICK_SAMPLE, RANGES, SAMPLE, Range, edges, sample

__all__ = [
    "ActivationQuantiser", "LearnedActivationQuantiser", "QuantConv2d", "QuantLinear", "QuantisedWeight",
    "end_observation", "quantise", "quantiser_path", "quantisers", "weight_grid",
    "weight_integers", "weight_scales",
]  # fmt: skip

SCALES = ("fixed", "learned")
WEIGHT_BITS = (*range(2, 9), 16, 32)
ACTIVATION_BITS = (*range(2, 9), 16, 32)
_GRID_BITS = range(2, 9)
_MOMENTUM = 0.2
_OBSERVE_EVERY = 8
# What they return is never negative, and the runtime drops them if the grid's lowest integer stands for 0.
_UNSIGNED = frozenset({"relu", "relu6"})


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


def quantise(traced: fx.GraphModule, plan: Plan, *, ranges: str = "minmax", scales: str = "fixed") -> None:
    """Put the plan's quantisers into a traced, pruned module, in place.

    Weights of every layer below 32 bits; activations where the runtime quantises them. ``ranges`` (one of ``RANGES``)
    says how ranges are found after training, ``scales`` whether they stay ``"fixed"`` to the ranges or are
    ``"learned"``. Raises InputError for anything else and for layers and widths without quantiser.
    """
    _check("ranges", ranges, RANGES)
    _check("scales", scales, SCALES)
    for planned in plan.ops:
        if planned.weight_count and planned.op.module:
            _swap_layer(traced, planned, ranges, scales)
    kinds = {planned.op.name: planned.op.kind for planned in plan.ops}
    by_name = {node.name: node for node in traced.graph.nodes}
    for name, site in plan.quantised.items():
        if name != site:  # on the grid of its input already
            continue
        path = quantiser_path(name)
        traced.add_submodule(path, _activation_quantiser(kinds[name], plan.activation_bits[name], ranges, scales))
        node = by_name[name]
        with traced.graph.inserting_after(node):
            inserted = traced.graph.call_module(path, args=(node,))
        node.replace_all_uses_with(inserted, delete_user_cb=lambda user, new=inserted: user is not new)
    traced.graph.lint()
    traced.recompile()


def end_observation(module: nn.Module) -> None:
    """Call it once after the forward passes in which the quantisers were ``observing``."""
    for quantiser in quantisers(module).values():
        quantiser.end_observation()


def quantiser_path(tensor: str) -> str:
    """The submodule that quantises a tensor."""
    return f"quantiser_{tensor}"


def quantisers(module: nn.Module) -> dict[str, ActivationQuantiser]:
    """Activation quantisers by the tensor that they quantise."""
    prefix = quantiser_path("")
    return {
        name.removeprefix(prefix): child
        for name, child in module.named_modules()
        if isinstance(child, ActivationQuantiser)
    }


def _activation_quantiser(kind: str, bits: int, ranges: str, scales: str) -> ActivationQuantiser:
    if bits not in _GRID_BITS:
        raise InputError(f"The activations behind {kind} cannot lie on a grid of {bits} bits; it must be 2 to 8.")
    ceiling = 6.0 if kind == "relu6" else None
    if scales == "learned":
        return LearnedActivationQuantiser(bits, ceiling=ceiling, ranges=ranges, unsigned=kind in _UNSIGNED)
    return ActivationQuantiser(bits, ceiling=ceiling, ranges=ranges)


def _swap_layer(root: nn.Module, planned: PlannedOp, ranges: str, scales: str) -> None:
    path, bits = planned.op.module or "", planned.bits
    _check(f"bits.{path}.weights", bits.weights, WEIGHT_BITS)
    _check(f"bits.{path}.activations", bits.activations, ACTIVATION_BITS)
    if bits.weights == 32:
        return
    layer = root.get_submodule(path)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = type(layer).__name__
        raise InputError(f"The layer {path} is a {kind}; only Conv2d and Linear can be quantised: set its bits to 32.")
    parent, _, name = path.rpartition(".")
    quantised = with_quantised_weight(layer, bits.weights, ranges=ranges, scales=scales)
    setattr(root.get_submodule(parent), name, quantised)


def _check(key: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed:
        raise InputError(f"{key} must be one of {', '.join(map(str, allowed))}, but got {value!r}.")
