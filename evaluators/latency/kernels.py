"""Which kernels ONNX Runtime's CPU provider makes of plans: layouts, fusions, and the conversions between them.

Read off optimised graphs. Integer convolutions run channels-last (NHWC), fp32 convolutions in blocks of channels
(NCHWc) where their channels lie on the grid; what only follows a layout keeps that of its inputs. Every change of
precision or layout is a kernel of its own. As in :mod:`~nightpress.spaces.plans`, a yes-or-no is one integer with a bit
a policy.
"""

from dataclasses import dataclass

import numpy as np

from ...spaces.anatomy import WEIGHTED, Op
from ...spaces.plan import FUSED_ACTIVATIONS
from ...spaces.plans import Flags, Planner, Plans, pack

# Keep blocks of channels where all inputs have them.
BLOCKED_TOO = FUSED_ACTIVATIONS | {"sigmoid", "silu", "max_pool", "avg_pool", "global_pool", "add", "cat", "tanh"}
# An fp32 convolution computes these itself when they alone read it.
FLOAT_FUSED = frozenset({"sigmoid", "tanh", "hardsigmoid", "leaky_relu"})
KEEP_LAST = frozenset({"silu", "sigmoid", "mul"})
POOLS = frozenset({"max_pool", "avg_pool", "global_pool"})
FREE = frozenset({"input", "param", "flatten", "reshape"})
CONVERSIONS = ("quantise", "dequantise", "transpose", "block", "unblock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Flags by the position of an operation. ``conversions`` by name: how a tensor is converted, once for each entry
    (a position may occur twice). ``absorbed``: an operation that a kernel before it computes, so has none itself."""

    blocked: list[Flags]
    stored: list[Flags]
    absorbed: list[Flags]
    split: list[Flags]
    """SiLUs that run as a sigmoid and a product, because their input is dequantised for each of the two."""
    sums: list[Flags]
    """Convolutions that add a second tensor to their result."""
    conversions: dict[str, list[tuple[int, Flags]]]


def kernels(planner: Planner, plans: Plans) -> Kernels:
    return _Layouts(planner, plans).run()


class _Layouts:
    def __init__(self, planner: Planner, plans: Plans) -> None:
        size = len(planner.anatomy.ops)
        self.planner, self.plans, self.full = planner, plans, plans.full
        self.blocked, self.stored, self.absorbed, self.sums = ([0] * size for _ in range(4))
        self.bytes_, self.last, self.block_kernel = ([0] * size for _ in range(3))
        self.read_float, self.read_float_twice, self.read_last, self.read_block, self.read_plain, self.read_first = (
            [0] * size for _ in range(6)
        )
        self.plain_conv = [0] * size
        self.early, self.fused_float = [0] * size, [0] * size
        self.leads, self.via, self.beside = ([0] * size for _ in range(3))

    def run(self) -> Kernels:
        for position, op in enumerate(self.planner.anatomy.ops):
            if op.kind not in {"input", "param"}:
                self._layout(position, op)
            for block, source in self.planner.aliases[position]:
                where = self.plans.removed[block]
                for facts in (self.blocked, self.bytes_, self.last, self.plain_conv):
                    facts[position] = facts[position] & ~where | facts[source] & where
        self._readers()
        return Kernels(
            split=[
                self.plans.quantised[inputs[0]] & there if op.kind == "silu" else 0
                for op, inputs, there in zip(
                    self.planner.anatomy.ops, self.planner.inputs, self.plans.alive, strict=True
                )
            ],
            blocked=self.block_kernel, stored=self.stored, absorbed=self.absorbed, sums=self.sums,
            conversions=self._conversions(),
        )  # fmt: skip

    def _layout(self, position: int, op: Op) -> None:
        inputs, there = self.planner.inputs[position], self.plans.alive[position]
        int8 = self.plans.int8[position]
        if op.kind in WEIGHTED:
            stored = self._weights(position, lambda width: width <= 8) & ~int8
            self.stored[position] = stored & there
            float_ = there & ~int8
            if op.kind == "conv":
                self.bytes_[position] = int8
                self.last[position] = int8
                block = float_ & ~stored & self._on_grid(position, op)
                self.blocked[position] = self.block_kernel[position] = block
                self.plain_conv[position] = float_ & ~block & self.plans.fused[position] * 0 | float_ & ~block
            else:
                self.bytes_[position] = int8 & self.plans.quantised[position] if len(op.shape) == 2 else 0
            return
        all_bytes = all_last = all_blocked = self.full
        for read in inputs:
            all_bytes &= self.bytes_[read] | self.plans.quantised[read]
            all_last &= self.last[read]
            all_blocked &= self.blocked[read] & ~self.plans.quantised[read]
        if op.kind in FUSED_ACTIVATIONS:
            source = inputs[0]
            behind = self.bytes_[source]
            self.bytes_[position] = behind & there
            self.last[position] = self.last[source] & there
            self.blocked[position] = all_blocked & there
            self.absorbed[position] = (behind | self.plans.fused[source] | self.plans.quantised[position]) & there
            self.plain_conv[position] = 0
            if self.planner.anatomy.ops[source].kind not in WEIGHTED:
                self.absorbed[position] = (behind | self.plans.quantised[position] | self.absorbed[source]) & there
            self.block_kernel[position] = self.blocked[position] & ~self.absorbed[position]
            return
        self.bytes_[position] = int8
        if op.kind in KEEP_LAST:
            self.last[position] = all_last & there & ~int8
            if len(inputs) == 1:
                self.last[position] &= self.plans.quantised[inputs[0]]
        if op.kind in FLOAT_FUSED and self.planner.anatomy.ops[inputs[0]].kind == "conv":
            made_float = (self.block_kernel[inputs[0]] | self.plain_conv[inputs[0]]) & ~self.plans.quantised[inputs[0]]
            self.absorbed[position] = made_float & self.plans.alone[inputs[0]] & there
            self.fused_float[inputs[0]] |= self.absorbed[position]
        self.last[position] |= int8 & all_last if op.kind not in {"flatten", "reshape"} else 0
        if op.kind in POOLS:
            # The quantiser of a maximum's result moves before it.
            early = self.plans.quantised[position] & ~int8 if op.kind == "max_pool" else 0
            grid = pack(self._channels(position) % 16 == 0) & there & ~int8 & ~early
            self.blocked[position] = grid & (all_blocked if op.kind == "global_pool" else self.full)
            self.early[position] = early
            self.bytes_[position] |= early
            self.block_kernel[position] = self.blocked[position]
        elif op.kind in BLOCKED_TOO:
            self.blocked[position] = all_blocked & there & ~int8
            self.block_kernel[position] = self.blocked[position] & ~self.absorbed[position]
        if op.kind == "add" and len(inputs) == 2:
            self._fuse_sum(position, inputs, there & ~int8)

    def _fuse_sum(self, position: int, inputs: tuple[int, ...], float_: Flags) -> None:
        """A convolution that only the addition reads adds the other tensor itself, when both have its layout."""
        left = float_
        both = self.blocked[position]
        for read in inputs:
            if self.planner.anatomy.ops[read].kind != "conv":
                continue
            alone = self.plans.alive[read] & self.plans.alone[read]
            can = (both & self.blocked[read] | self.plain_conv[read]) & alone & left & ~self.plans.quantised[read]
            self.sums[read] |= can
            self.absorbed[position] |= can
            left &= ~can
        self.block_kernel[position] &= ~self.absorbed[position]

    def _weights(self, position: int, wanted: "object") -> Flags:
        found = 0
        for pair, flags in self.plans.pairs[self.planner.layer_of[position]]:
            if wanted(pair.weights):  # type: ignore[operator]
                found |= flags
        return found

    def _on_grid(self, position: int, op: Op) -> Flags:
        """The blocked kernels take inputs in fours, or fewer than one block of 16; depthwise ones channels in fours."""
        source = self.planner.inputs[position][0]
        groups = op.attrs["groups"]
        if groups == 1:
            channels = self._channels(source)
            return pack((channels % 4 == 0) | (channels < 16))
        channels = self._channels(position)
        if groups == op.shape[1]:
            return pack(channels % 4 == 0)
        return 0

    def _channels(self, position: int):  # type: ignore[no-untyped-def]
        axis = self.planner.axis_of[position][1]
        if axis is None:
            return np.full(self.plans.count, self.planner.anatomy.ops[position].shape[1])
        return self.plans.axes[axis]

    def _readers(self) -> None:
        """Which layouts the readers of each tensor want."""
        ops = self.planner.anatomy.ops
        for position in range(len(ops) - 1, -1, -1):
            op = ops[position]
            for block, source in reversed(self.planner.aliases[position]):
                where = self.plans.removed[block]
                for facts in (self.read_float, self.read_last, self.read_block, self.read_plain, self.read_first, self.via, self.beside):
                    if facts is self.read_float:
                        self.read_float_twice[source] |= where & (
                            self.read_float_twice[position] | self.read_float[source] & self.read_float[position]
                        )
                        self.read_float_twice[position] &= ~where
                    facts[source] |= facts[position] & where
                    facts[position] &= ~where
            there = self.plans.alive[position]
            self.leads[position] = self.plans.quantised[position] & self.read_last[position] | self.via[position]
            if op.kind in BLOCKED_TOO:
                for read in self.planner.inputs[position]:
                    self.via[read] |= self.leads[position] & there & ~self.plans.int8[position] & ~self._keeps_last(position)
            if op.kind in FUSED_ACTIVATIONS:
                # A fused one reads nothing itself.
                there = there & ~self.absorbed[position]
            if op.kind in {"add"}:
                pass
            int8 = self.plans.int8[position]
            float_ = there & ~int8
            for number, read in enumerate(self.planner.inputs[position]):
                if op.kind in {"flatten", "reshape"}:
                    self.read_first[read] |= int8 & there
                elif op.kind == "conv" and number == 0:
                    self.read_last[read] |= int8 & there
                elif int8:
                    if op.kind == "linear":
                        self.read_first[read] |= int8 & there
                    else:
                        self.read_first[read] |= int8 & there & ~self.last[position]
                block = float_ & self.blocked[position] if op.kind != "conv" else float_ & self._reads_blocks(position)
                again = float_ if op.kind == "silu" else self.read_float[read] & float_
                self.read_float_twice[read] |= again
                self.read_float[read] |= float_
                self.read_block[read] |= block
                first = float_ & ~self._keeps_last(position)
                led = op.kind in BLOCKED_TOO and self.planner.anatomy.ops[read].kind not in KEEP_LAST
                self.beside[read] |= first & ~self.leads[position] if led else first
                self.read_plain[read] |= float_ & ~block

    def _keeps_last(self, position: int) -> Flags:
        keeps = self.planner.anatomy.ops[position].kind in KEEP_LAST
        return self.last[position] & ~self.plans.int8[position] if keeps else 0

    def _reads_blocks(self, position: int) -> Flags:
        op = self.planner.anatomy.ops[position]
        if op.attrs["groups"] > 1:
            return self.blocked[position]
        channels = self._channels(self.planner.inputs[position][0])
        return self.blocked[position] & pack(channels >= 16)

    def _conversions(self) -> dict[str, list[tuple[int, Flags]]]:
        found: dict[str, list[tuple[int, Flags]]] = {name: [] for name in CONVERSIONS}

        def add(name: str, position: int, flags: Flags) -> None:
            if flags:
                found[name].append((position, flags))

        for position in range(len(self.planner.anatomy.ops)):
            there = self.plans.alive[position]
            for block, _ in self.planner.aliases[position]:
                there &= ~self.plans.removed[block]
            quantised = self.plans.quantised[position] & there
            made = self.bytes_[position]
            last = self.last[position]
            blocked = self.blocked[position] & there
            floats = self.read_float[position]
            add("quantise", position, quantised & ~made)
            add("dequantise", position, quantised & floats)
            add("dequantise", position, quantised & self.read_float_twice[position])
            for read in self.planner.inputs[position]:
                add("quantise", read, self.early[position] & ~self.plans.quantised[read])
            again = quantised & last & floats & self.via[position]
            add("quantise", position, again)
            add("dequantise", position, again)
            add("transpose", position, quantised & ~last & self.read_last[position])
            add("transpose", position, again)
            add("transpose", position, quantised & last & (self.beside[position] | self.read_first[position]))
            add("transpose", position, there & last & ~quantised & ~made & self.beside[position])
            plain = self.read_plain[position] | self.plans.output[position] | self.plans.quantised[position]
            add("unblock", position, blocked & plain & ~self._taken(position))
            source = there & ~blocked & ~self._taken(position)
            add("block", position, source & self.read_block[position])
        return found

    def _taken(self, position: int) -> Flags:
        """Where the operation behind makes the result, in the layout that is its own."""
        return self.plans.fused[position] | self.sums[position] | self.fused_float[position]
