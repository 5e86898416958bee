"""Which kernels ONNX Runtime's CPU provider makes of plans: layouts, fusions, and the conversions between them.

Read off optimised graphs. Integer convolutions run channels-last (NHWC), fp32 convolutions in blocks of 16 channels
(NCHWc, where the machine has AVX-512) if their channels lie on the grid; what only follows a layout keeps that of its
inputs. Every change of precision or layout is a kernel of its own. As in :mod:`~nightpress.spaces.plans`, a yes-or-no
is one integer with a bit for each policy.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...spaces.anatomy import WEIGHTED, Op
from ...spaces.plan import FUSED_ACTIVATIONS
from ...spaces.plans import Flags, Planner, Plans, pack_rows

CONVERSIONS = ("quantise", "dequantise", "transpose", "block", "unblock")
POOLS = frozenset({"max_pool", "avg_pool", "global_pool"})
# Computed in blocks of channels where all inputs come in them.
BLOCKED_TOO = FUSED_ACTIVATIONS | POOLS | {"sigmoid", "silu", "add", "cat", "tanh"}
# An fp32 convolution computes these itself when they alone read it.
FLOAT_FUSED = frozenset({"sigmoid", "tanh", "hardsigmoid", "leaky_relu"})
# Computed channels-last behind dequantised results of integer convolutions.
KEEP_LAST = frozenset({"silu", "sigmoid", "mul"})
FLAT = frozenset({"flatten", "reshape"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Flags by the position of an operation: it runs on integers; it runs on blocks of channels; its weights are
    dequantised in each run; a kernel before it computes it, so it has none of its own; a SiLU is two kernels, because
    its input is dequantised for each; a maximum runs on what was quantised before it; a product runs channels-last; a
    convolution adds a second tensor. ``conversions`` by name: tensors that are converted, a position once for each
    kernel."""

    int8: list[Flags]
    blocked: list[Flags]
    stored: list[Flags]
    absorbed: list[Flags]
    split: list[Flags]
    early: list[Flags]
    last: list[Flags]
    sums: list[Flags]
    conversions: dict[str, list[tuple[int, Flags]]]


def kernels(planner: Planner, plans: Plans) -> Kernels:
    layouts = _Layouts(planner, plans)
    readers = _Readers(layouts)
    conversions: dict[str, list[tuple[int, Flags]]] = {name: [] for name in CONVERSIONS}
    for position in range(len(planner.anatomy.ops)):
        for name, tensor, flags in readers.conversions(position):
            if flags:
                conversions[name].append((tensor, flags))
    return Kernels(
        int8=plans.int8, blocked=layouts.block_kernel, stored=layouts.stored, absorbed=layouts.absorbed,
        split=layouts.split, early=layouts.early, last=layouts.product_last, sums=layouts.sums, conversions=conversions,
    )  # fmt: skip


def integer_weights(planner: Planner, plans: Plans, position: int) -> Flags:
    """Where a layer's weights are stored as integers, whatever it runs on."""
    found = 0
    for pair, flags in plans.pairs[planner.layer_of[position]]:
        found |= flags if pair.weights <= 8 else 0
    return found


class _Layouts:
    """Forward: how each result lies in memory. ``bytes_``: made as integers; ``last``: channels-last; ``blocked``: in
    blocks of channels; ``plain_conv``: made by an fp32 convolution that keeps the usual layout."""

    def __init__(self, planner: Planner, plans: Plans) -> None:
        size = len(planner.anatomy.ops)
        self.planner, self.plans, self.ops = planner, plans, planner.anatomy.ops
        self.blocked, self.bytes_, self.last, self.plain_conv = ([0] * size for _ in range(4))
        self.block_kernel, self.stored, self.absorbed, self.split, self.sums = ([0] * size for _ in range(5))
        self.early, self.fused_float, self.product_last = ([0] * size for _ in range(3))
        sizes = plans.axes.astype(np.int32)
        grids = (sizes & 3 == 0, sizes & 15 == 0, sizes >= 16)
        self._fours, self._blocks, self._wide = (pack_rows(grid) for grid in grids)
        for position, op in enumerate(self.ops):
            self._lay_out(position, op)
            for block, source in planner.aliases[position]:
                where = plans.removed[block]
                for facts in (self.blocked, self.bytes_, self.last, self.plain_conv):
                    facts[position] = facts[position] & ~where | facts[source] & where

    def _lay_out(self, position: int, op: Op) -> None:
        if op.kind in WEIGHTED:
            self._layer(position, op)
        elif op.kind in FUSED_ACTIVATIONS:
            self._activation(position)
        elif op.kind not in {"input", "param"}:
            self._other(position, op)

    def _layer(self, position: int, op: Op) -> None:
        int8, there = self.plans.int8[position], self.plans.alive[position]
        stored = integer_weights(self.planner, self.plans, position)
        self.stored[position] = stored & ~int8 & there
        if op.kind == "linear":
            # Over tokens its sum is not requantised, because the bias is added in fp32.
            requantised = self.plans.quantised[position] | self.plans.fused[position]
            self.bytes_[position] = int8 & requantised if len(op.shape) == 2 else 0
            return
        self.bytes_[position] = self.last[position] = int8
        blocked = there & ~int8 & ~stored & self._on_grid(position, op)
        self.blocked[position] = self.block_kernel[position] = blocked
        self.plain_conv[position] = there & ~int8 & ~blocked

    def _on_grid(self, position: int, op: Op) -> Flags:
        """Blocked kernels take inputs in fours, or fewer than one block; depthwise ones channels in fours."""
        if op.attrs["groups"] == 1:
            source = self.planner.inputs[position][0]
            return self._channels(self._fours, source, 4) | ~self.wide(source) & self.plans.full
        return self._channels(self._fours, position, 4) if op.attrs["groups"] == op.shape[1] else 0

    def wide(self, position: int) -> Flags:
        """Whether a tensor has a whole block of channels."""
        axis = self.planner.axis_of[position][1]
        return self._wide[axis] if axis is not None else self.plans.full * (self.ops[position].shape[1] >= 16)

    def _channels(self, grid: list[Flags], position: int, step: int) -> Flags:
        axis = self.planner.axis_of[position][1]
        return grid[axis] if axis is not None else self.plans.full * (self.ops[position].shape[1] % step == 0)

    def _activation(self, position: int) -> None:
        """A ReLU: part of the kernel before it, or of the quantiser behind it, whose grid begins at zero."""
        [source], there = self.planner.inputs[position], self.plans.alive[position]
        quantised = self.plans.quantised
        self.bytes_[position] = self.bytes_[source] & there
        self.last[position] = self.last[source] & there
        self.blocked[position] = self.blocked[source] & ~quantised[source] & there
        before = self._takes_activation(source)
        for block, alias in self.planner.aliases[source]:
            where = self.plans.removed[block]
            before = before & ~where | self._takes_activation(alias) & where
        self.absorbed[position] = (self.bytes_[source] | before | quantised[position]) & there
        self.block_kernel[position] = self.blocked[position] & ~self.absorbed[position]

    def _takes_activation(self, position: int) -> Flags:
        return self.plans.fused[position] if self.ops[position].kind in WEIGHTED else self.absorbed[position]

    def _other(self, position: int, op: Op) -> None:
        inputs, there, int8 = self.planner.inputs[position], self.plans.alive[position], self.plans.int8[position]
        quantised = self.plans.quantised
        all_last = all_blocked = self.plans.full
        for read in inputs:
            all_last &= self.last[read]
            all_blocked &= self.blocked[read] & ~quantised[read]
        self.bytes_[position] = int8
        self.last[position] = 0 if op.kind in FLAT else int8 & all_last
        if op.kind in KEEP_LAST:
            dequantised = quantised[inputs[0]] if len(inputs) == 1 else self.plans.full
            self.last[position] |= all_last & dequantised & there & ~int8
        if op.kind == "mul":
            # Its inner loop is over what the narrower tensor repeats: a picture, or channels-last the channels.
            self.product_last[position] = self.last[position] & ~int8
        if op.kind == "silu":
            self.split[position] = quantised[inputs[0]] & there
        if op.kind in POOLS:
            self._pool(position, op, all_blocked)
        elif op.kind in BLOCKED_TOO:
            self.blocked[position] = all_blocked & there & ~int8
        if op.kind in FLOAT_FUSED and self.ops[inputs[0]].kind == "conv":
            made = (self.block_kernel[inputs[0]] | self.plain_conv[inputs[0]]) & ~quantised[inputs[0]]
            self.fused_float[inputs[0]] |= made & self.plans.alone[inputs[0]] & there
            self.absorbed[position] = made & self.plans.alone[inputs[0]] & there
        elif op.kind == "add" and len(inputs) == 2:
            self._sum(position, inputs, there & ~int8)
        self.block_kernel[position] = self.blocked[position] & ~self.absorbed[position]

    def _pool(self, position: int, op: Op, all_blocked: Flags) -> None:
        """Pools want whole blocks. The quantiser of a maximum moves before it."""
        float_ = self.plans.alive[position] & ~self.plans.int8[position]
        self.early[position] = self.plans.quantised[position] & float_ if op.kind == "max_pool" else 0
        self.bytes_[position] |= self.early[position]
        follows = all_blocked if op.kind == "global_pool" else self.plans.full
        grid = self._channels(self._blocks, position, 16)
        self.blocked[position] = grid & float_ & ~self.early[position] & follows

    def _sum(self, position: int, inputs: tuple[int, ...], left: Flags) -> None:
        """A convolution that only the addition reads adds the other tensor itself, when both have its layout."""
        for read in inputs:
            if self.ops[read].kind != "conv":
                continue
            fits = self.blocked[position] & self.blocked[read] | self.plain_conv[read]
            fused = fits & self.plans.alive[read] & self.plans.alone[read] & left & ~self.plans.quantised[read]
            self.sums[read] |= fused
            self.absorbed[position] |= fused
            left &= ~fused


class _Readers:
    """Backward: in which form the readers of each tensor want it.

    ``floats``, ``floats_again``: once and a second time in fp32; ``last``: channels-last integers; ``first``: integers
    in the usual layout; ``block``, ``plain``: fp32 in blocks or not; ``led``: by an operation through which a
    transposition moves on to an integer convolution; ``beside``: by another, in the usual layout.
    """

    def __init__(self, layouts: _Layouts) -> None:
        size = len(layouts.ops)
        self.layouts, self.plans, self.planner = layouts, layouts.plans, layouts.planner
        self.floats, self.floats_again, self.last, self.first = ([0] * size for _ in range(4))
        self.block, self.plain, self.led, self.beside = ([0] * size for _ in range(4))
        for position in range(size - 1, -1, -1):
            for block, source in reversed(self.planner.aliases[position]):
                self._move(position, source, self.plans.removed[block])
            self._read(position, layouts.ops[position])

    def _move(self, position: int, source: int, where: Flags) -> None:
        self.floats_again[source] |= self.floats[source] & self.floats[position] & where
        for facts in (
            self.floats, self.floats_again, self.last, self.first, self.block, self.plain, self.led, self.beside
        ):  # fmt: skip
            facts[source] |= facts[position] & where
            facts[position] &= ~where

    def _read(self, position: int, op: Op) -> None:
        layouts, ops = self.layouts, self.layouts.ops
        int8, there = self.plans.int8[position], self.plans.alive[position]
        leads = self.plans.quantised[position] & self.last[position] | self.led[position]
        keeps = layouts.last[position] & ~int8 if op.kind in KEEP_LAST else 0
        moves = op.kind in BLOCKED_TOO
        reads = there & ~layouts.absorbed[position] if op.kind in FUSED_ACTIVATIONS else there
        float_ = reads & ~int8
        blocked = float_ & self._wants_blocks(position, op)
        for number, read in enumerate(self.planner.inputs[position]):
            if op.kind == "conv" and number == 0:
                self.last[read] |= int8
            elif op.kind in FLAT or op.kind == "linear":
                self.first[read] |= int8
            else:
                self.first[read] |= int8 & ~layouts.last[position]
            self.floats_again[read] |= float_ if op.kind == "silu" else self.floats[read] & float_
            self.floats[read] |= float_
            self.block[read] |= blocked
            self.plain[read] |= float_ & ~blocked
            if moves:
                self.led[read] |= leads & there & ~int8 & ~keeps
            through = leads if moves and ops[read].kind not in KEEP_LAST else 0
            self.beside[read] |= float_ & ~keeps & ~through

    def _wants_blocks(self, position: int, op: Op) -> Flags:
        """Convolutions of fewer channels than a block read them in the usual layout."""
        blocked = self.layouts.blocked[position]
        dense = op.kind == "conv" and op.attrs["groups"] == 1
        return blocked & self.layouts.wide(self.planner.inputs[position][0]) if dense else blocked

    def conversions(self, position: int) -> Iterator[tuple[str, int, Flags]]:
        """Name, tensor and flags of the kernels that convert an operation's result."""
        layouts, there = self.layouts, self.plans.alive[position]
        for block, _ in self.planner.aliases[position]:
            there &= ~self.plans.removed[block]
        quantised, floats = self.plans.quantised[position] & there, self.floats[position]
        made, last, blocked = layouts.bytes_[position], layouts.last[position], layouts.blocked[position] & there
        yield "quantise", position, quantised & ~made
        for read in self.planner.inputs[position]:
            yield "quantise", read, layouts.early[position] & ~self.plans.quantised[read]
        yield "dequantise", position, quantised & floats
        yield "dequantise", position, quantised & self.floats_again[position]
        # A transposition that moved behind the dequantiser leaves a pair of converters behind itself.
        moved = quantised & last & floats & self.led[position]
        for name in ("quantise", "dequantise", "transpose"):
            yield name, position, moved
        yield "transpose", position, quantised & ~last & self.last[position]
        yield "transpose", position, quantised & last & (self.beside[position] | self.first[position])
        yield "transpose", position, there & last & ~quantised & ~made & self.beside[position]
        taken = self.plans.fused[position] | layouts.sums[position] | layouts.fused_float[position]
        plain = self.plain[position] | self.plans.output[position] | self.plans.quantised[position]
        yield "unblock", position, blocked & plain & ~taken
        yield "block", position, there & ~blocked & ~taken & self.block[position]
