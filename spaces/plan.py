"""What a policy makes of a model: every operation with its channels and its precision.

The plan is the one meaning of a policy: the fake quantisers in training, the ONNX builder and the
latency predictor all follow it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .anatomy import WEIGHTED, Anatomy, Group, Op, kept_channels, op_macs
from .policy import FP32, LayerBits, Policy

# These run on integers when all their inputs are quantised (ONNX Runtime: QLinearAdd, QLinearMul,
# QLinearConcat, pooling on u8): the precision of the producers decides, the policy does not name them.
# Their output lies on the grid of their input: no quantiser of their own.
SAME_GRID = frozenset({"max_pool", "flatten", "reshape", "permute", "slice"})
FOLLOWERS = SAME_GRID | {"add", "mul", "cat", "avg_pool", "global_pool"}
# Fused into the integer kernel before them: the runtime drops a ReLU whose zero point is the lowest integer.
FUSED_ACTIVATIONS = frozenset({"relu", "relu6"})
# The runtime fuses an fp32 linear layer with these rather than run it on integers.
LINEAR_ACTIVATIONS = FUSED_ACTIVATIONS | {"sigmoid", "hardsigmoid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOp:
    """An operation as the policy leaves it. Shapes are those of one example, as in :class:`Op`.

    ``start`` is where a slice begins once the channels before it have gone; 0 for any other operation.
    """

    op: Op
    inputs: tuple[str, ...]
    in_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    groups: int
    bits: LayerBits
    int8: bool
    """Whether it runs on integer kernels."""
    start: int = 0

    @property
    def channels(self) -> int:
        """Output channels of a layer."""
        return self.shape[self.op.channel_axis]

    @property
    def run_time_shape(self) -> list[int]:
        """The shape of its tensor with −1 where the batch is."""
        return [-1 if axis == self.op.batch_axis else size for axis, size in enumerate(self.shape)]

    @property
    def int8_bias(self) -> bool:
        """Whether it is a layer whose kernel adds the bias to the integers' sum, as one of them."""
        return self.int8 and (self.op.kind == "conv" or (self.op.kind == "linear" and len(self.shape) == 2))

    @property
    def macs(self) -> int:
        return (
            op_macs(self.op.kind, {**self.op.attrs, "groups": self.groups}, self.in_shapes[0], self.shape)
            if self.in_shapes
            else 0
        )

    @property
    def weight_count(self) -> int:
        """Elements of the weight tensor; 0 for operations without one."""
        if self.op.kind == "conv":
            return self.shape[1] * (self.in_shapes[0][1] // self.groups) * math.prod(self.op.attrs["kernel"])
        if self.op.kind == "linear":
            return self.shape[-1] * self.in_shapes[0][-1]
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``quantised`` maps a tensor that is quantised to the tensor whose grid it uses (often itself);
    ``activation_bits`` says for each grid how wide it is: as its most demanding reader asks, 8 where no layer does."""

    ops: tuple[PlannedOp, ...]
    output: str
    quantised: dict[str, str]
    activation_bits: dict[str, int]

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)

    @property
    def params(self) -> int:
        """Weights and biases at inference, batch norms folded."""
        return sum(op.weight_count + op.channels for op in self.ops if op.weight_count)


def plan(anatomy: Anatomy, policy: Policy) -> Plan:
    """Apply a policy to the anatomy. The policy must have been checked against it."""
    removed_by_group = {g.name: g.channels - kept_channels(g, policy.prune.get(g.name, 0.0)) for g in anatomy.groups}
    alias, gone = _without_blocks(anatomy, policy.removed_blocks)
    live = [op for op in anatomy.ops if op.name not in gone]
    inputs = {op.name: tuple(_follow(alias, name) for name in op.inputs) for op in live}
    shapes = {op.name: _shape(op, removed_by_group) for op in live}
    output = _follow(alias, anatomy.output)
    bits = {op.name: policy.bits.get(op.module or "", FP32) for op in live if op.kind in WEIGHTED}
    quantised = _quantised(live, inputs, bits, output)
    return Plan(
        ops=tuple(
            PlannedOp(
                op=op,
                inputs=inputs[op.name],
                in_shapes=tuple(shapes[name] for name in inputs[op.name]),
                shape=shapes[op.name],
                groups=_conv_groups(op, shapes[op.name]),
                start=_start(op, removed_by_group),
                bits=bits.get(op.name, FP32),
                int8=_runs_int8(op, inputs[op.name], bits, quantised),
            )
            for op in live
        ),
        output=output,
        quantised=quantised,
        activation_bits=_activation_bits(live, inputs, bits, quantised),
    )


def bias_refinement(weights: int, activations: int) -> int:
    """By which power of two the file multiplies the integers of a layer's weight, and divides their scales.

    A bias lies on the grid of input scale · weight scale, which few bits make too coarse for it. Beside activations
    below 8 bits the product of two integers of 8 bits has room to spare: no more than 2 · 127 · 127 meets in the
    16-bit sums of CPUs without VNNI. Eight bits of activations have none (2 · 127 · 255), and need none.
    """
    return 2 ** (8 - weights) if activations < 8 else 1


def pruned_groups(anatomy: Anatomy, policy: Policy) -> list[tuple[Group, int]]:
    """Groups that lose channels, in the anatomy's order, with the number of channels that stay."""
    kept = ((g, kept_channels(g, policy.prune.get(g.name, 0.0))) for g in anatomy.groups)
    return [(group, count) for group, count in kept if count < group.channels]


def _without_blocks(anatomy: Anatomy, removed: tuple[str, ...]) -> tuple[dict[str, str], set[str]]:
    blocks = [block for block in anatomy.blocks if block.name in removed]
    return {b.output: b.source for b in blocks}, {name for b in blocks for name in b.ops}


def _follow(alias: dict[str, str], name: str) -> str:
    while name in alias:  # blocks in a row, all removed
        name = alias[name]
    return name


def _shape(op: Op, removed_by_group: dict[str, int]) -> tuple[int, ...]:
    if not op.lost:
        return op.shape
    return tuple(size - _gone(lost, removed_by_group) for size, lost in zip(op.shape, op.lost, strict=True))


def _gone(lost: Mapping[str, int], removed_by_group: Mapping[str, int]) -> int:
    return sum(times * removed_by_group[group] for group, times in lost.items())


def _start(op: Op, removed_by_group: Mapping[str, int]) -> int:
    return op.attrs["start"] - _gone(op.lost_before, removed_by_group) if op.kind == "slice" else 0


def _conv_groups(op: Op, shape: tuple[int, ...]) -> int:
    groups: int = op.attrs.get("groups", 1)
    # A grouped convolution loses whole groups, a depthwise one single channels: the width of a group never changes.
    return shape[1] * groups // op.shape[1] if groups > 1 else 1


def _quantised(
    live: list[Op], inputs: dict[str, tuple[str, ...]], bits: dict[str, LayerBits], output: str
) -> dict[str, str]:
    consumers: dict[str, list[Op]] = {op.name: [] for op in live}
    for op in live:
        for name in inputs[op.name]:
            consumers[name].append(op)

    def landing(name: str) -> str:
        """Where a producer's result is quantised: behind an activation that the kernel absorbs."""
        after = consumers[name]
        fused = len(after) == 1 and after[0].kind in FUSED_ACTIVATIONS and name != output
        return after[0].name if fused else name

    needed: set[str] = set()
    for op in live:
        if op.kind in WEIGHTED and bits[op.name].int8:
            needed.add(inputs[op.name][0])
            # An integer convolution must requantise; QGemm may return fp32, but not to such an activation.
            fused = op.kind == "linear" and len(op.shape) == 2
            if op.kind == "conv" or (fused and any(u.kind in LINEAR_ACTIVATIONS for u in consumers[op.name])):
                needed.add(landing(op.name))
    grids: dict[str, str] = {}
    for op in live:
        follows = _follows(op) and all(name in grids for name in inputs[op.name])
        if follows and op.name != output:
            if op.kind in SAME_GRID:
                grids[op.name] = grids[inputs[op.name][0]]
            else:
                needed.add(landing(op.name))
        if op.name in needed and op.name not in grids:
            grids[op.name] = op.name
    return grids


def _activation_bits(
    live: list[Op], inputs: dict[str, tuple[str, ...]], bits: dict[str, LayerBits], quantised: dict[str, str]
) -> dict[str, int]:
    widths: dict[str, int] = {}
    for op in live:
        if op.kind in WEIGHTED and bits[op.name].int8:
            site = quantised[inputs[op.name][0]]
            widths[site] = max(widths.get(site, 0), bits[op.name].activations)
    return {site: widths.get(site, 8) for site in set(quantised.values())}


def _runs_int8(op: Op, inputs: tuple[str, ...], bits: dict[str, LayerBits], quantised: dict[str, str]) -> bool:
    if op.kind in WEIGHTED:
        return bits[op.name].int8
    return _follows(op) and bool(inputs) and all(name in quantised for name in inputs)


def _follows(op: Op) -> bool:
    return op.kind in FOLLOWERS and "constant" not in op.attrs
