"""Plans of many policies at once: what :func:`~nightpress.spaces.plan.plan` says of one, for a whole batch.

A yes-or-no about each policy of a batch is one integer whose bit ``i`` speaks of policy ``i``: logic over ten thousand
policies is a handful of operations on long integers, and over one policy it costs next to nothing too.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .anatomy import WEIGHTED, Anatomy, Op, kept_channels
from .plan import FOLLOWERS, FUSED_ACTIVATIONS, LINEAR_ACTIVATIONS, SAME_GRID
from .policy import FP32, LayerBits, Policy

Flags = int
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a batch of policies chooses that plans depend on: ``kept`` (n, groups) channels that stay, ``bits``
    (n, layers) as indices into ``pairs``, ``removed`` (n, blocks); in the anatomy's order."""

    kept: NDArray[np.int64]
    bits: NDArray[np.int64]
    removed: NDArray[np.bool_]
    pairs: tuple[LayerBits, ...]

    def __len__(self) -> int:
        return len(self.kept)


def choices_of(anatomy: Anatomy, policies: Sequence[Policy]) -> Choices:
    """The choices of policies that were checked against the anatomy."""
    pairs: dict[LayerBits, int] = {FP32: 0}
    bits = np.zeros((len(policies), len(anatomy.layers)), np.int64)
    kept = np.tile(np.array([g.channels for g in anatomy.groups], np.int64), (len(policies), 1))
    removed = np.zeros((len(policies), len(anatomy.blocks)), np.bool_)
    groups = {group.name: (i, group) for i, group in enumerate(anatomy.groups)}
    layers = {layer.name: i for i, layer in enumerate(anatomy.layers)}
    blocks = {block.name: i for i, block in enumerate(anatomy.blocks)}
    for row, policy in enumerate(policies):
        for name, ratio in policy.prune.items():
            column, group = groups[name]
            kept[row, column] = kept_channels(group, ratio)
        for name, pair in policy.bits.items():
            bits[row, layers[name]] = pairs.setdefault(pair, len(pairs))
        for name in policy.removed_blocks:
            removed[row, blocks[name]] = True
    return Choices(kept=kept, bits=bits, removed=removed, pairs=tuple(pairs))


def policy_at(anatomy: Anatomy, choices: Choices, row: int) -> Policy:
    """What :func:`choices_of` says of one policy as a policy."""
    kept = zip(anatomy.groups, choices.kept[row].tolist(), strict=True)
    bits = zip(anatomy.layers, choices.bits[row].tolist(), strict=True)
    return Policy(
        model=anatomy.digest,
        prune={group.name: 1 - count / group.channels for group, count in kept if count < group.channels},
        bits={layer.name: choices.pairs[code] for layer, code in bits if choices.pairs[code] != FP32},
        removed_blocks=tuple(
            block.name for block, gone in zip(anatomy.blocks, choices.removed[row], strict=True) if gone
        ),
    )


def chunks(choices: Choices, size: int) -> Iterator[Choices]:
    """The batch in parts of at most ``size`` policies."""
    for start in range(0, len(choices), size):
        part = slice(start, start + size)
        yield replace(choices, kept=choices.kept[part], bits=choices.bits[part], removed=choices.removed[part])


def pack(values: NDArray[np.bool_]) -> Flags:
    """Flags of shape (n,) as one integer."""
    return int.from_bytes(np.packbits(values, bitorder="little").tobytes(), "little")


def pack_rows(values: NDArray[np.bool_]) -> list[Flags]:
    """Flags of shape (rows, n), each row as one integer."""
    return [int.from_bytes(row.tobytes(), "little") for row in np.packbits(values, axis=1, bitorder="little")]


def unpack(flags: Sequence[Flags], count: int) -> NDArray[np.bool_]:
    """The inverse of :func:`pack` for several flags: shape (flags, count)."""
    width = (count + 7) // 8
    packed = np.frombuffer(b"".join(f.to_bytes(width, "little") for f in flags), np.uint8).reshape(len(flags), width)
    return np.unpackbits(packed, axis=1, count=count, bitorder="little").view(np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """Flags by the position of an operation in the anatomy: whether it is there, runs on integers, has its result
    quantised; whether its result is the model's output or is made by the activation behind it (``fused``), which
    alone reads it. ``pairs`` by layer: for each pair of bit widths in use, which policies chose it."""

    count: int
    alive: list[Flags]
    int8: list[Flags]
    quantised: list[Flags]
    output: list[Flags]
    fused: list[Flags]
    alone: list[Flags]
    pairs: list[list[tuple[LayerBits, Flags]]]
    removed: list[Flags]
    axes: Array
    """Sizes of the axes that pruning changes, shape (axes + 1, n); the last row is 1."""

    @property
    def full(self) -> Flags:
        return (1 << self.count) - 1


class Planner:
    """Plans batches of policies of one anatomy."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.index = {op.name: i for i, op in enumerate(anatomy.ops)}
        self.inputs = [tuple(self.index[name] for name in op.inputs) for op in anatomy.ops]
        layers = {layer.name: i for i, layer in enumerate(anatomy.layers)}
        # By position: one that the model uses twice is two operations.
        self.layer_of = {i: layers[op.module or ""] for i, op in enumerate(anatomy.ops) if op.kind in WEIGHTED}
        self.in_blocks: list[list[int]] = [[] for _ in anatomy.ops]
        self.aliases: list[list[tuple[int, int]]] = [[] for _ in anatomy.ops]
        for number, block in enumerate(anatomy.blocks):
            for name in block.ops:
                self.in_blocks[self.index[name]].append(number)
            self.aliases[self.index[block.output]].append((number, self.index[block.source]))
        self._axes()
        self._last: tuple[Choices, Plans] | None = None

    def _axes(self) -> None:
        """Number the axes that pruning changes; axes that change alike share a number."""
        groups = {group.name: i for i, group in enumerate(self.anatomy.groups)}
        known: dict[tuple[int, tuple[tuple[str, int], ...]], int] = {}
        self.axis_of: list[tuple[int | None, ...]] = []
        for op in self.anatomy.ops:
            keys = [
                (size, tuple(sorted(lost.items()))) if lost else None
                for size, lost in zip(op.shape, op.lost or ({},) * len(op.shape), strict=True)
            ]
            self.axis_of.append(tuple(None if key is None else known.setdefault(key, len(known)) for key in keys))
        self._sizes = np.array([size for size, _ in known], np.float64)
        self._lost = np.zeros((len(known), len(groups)))
        for (_, lost), row in known.items():
            for name, times in lost:
                self._lost[row, groups[name]] = times
        self._widths = np.array([group.channels for group in self.anatomy.groups], np.float64)

    def axis_range(self) -> tuple[Array, Array, NDArray[np.int64]]:
        """The least size that each axis can take, the step between sizes, and how many there are; 1 size behind."""
        least, step, counts = self._sizes.copy(), np.ones(len(self._sizes)), np.ones(len(self._sizes), np.int64)
        for row, lost in enumerate(self._lost):
            gone = [(int(times), group) for times, group in zip(lost, self.anatomy.groups, strict=True) if times]
            # A group keeps a multiple of its step, or its whole width, which need not be one.
            steps = [times * size for times, g in gone for size in (g.step, g.channels % g.step) if size]
            step[row] = math.gcd(*steps) if steps else 1
            least[row] -= sum(times * (group.channels - min(group.step, group.channels)) for times, group in gone)
            counts[row] = round((self._sizes[row] - least[row]) / step[row]) + 1
        return np.append(least, 1.0), np.append(step, 1.0), np.append(counts, 1)

    def axes(self, kept: NDArray[np.int64]) -> Array:
        """Sizes of the axes where the groups keep so many channels, shape (n, groups); see :class:`Plans`."""
        gone = (self._widths - kept).T if self._widths.size else np.zeros((0, len(kept)))
        return np.vstack([self._sizes[:, None] - self._lost @ gone, np.ones((1, len(kept)))])

    def plans(self, choices: Choices) -> Plans:
        """The plans of a batch; those of the last one are kept, for its sizes are asked for after its latencies."""
        if self._last is None or self._last[0] is not choices:
            self._last = choices, self._plans(choices)
        return self._last[1]

    def _plans(self, choices: Choices) -> Plans:
        count, axes = len(choices), self.axes(choices.kept)
        removed = pack_rows(choices.removed.T)
        bits = np.ascontiguousarray(choices.bits.T)
        by_pair = [(pair, pack_rows(bits == code)) for code, pair in enumerate(choices.pairs)]
        pairs = [[(pair, rows[i]) for pair, rows in by_pair if rows[i]] for i in range(len(self.anatomy.layers))]
        full = (1 << count) - 1
        alive = [full & ~_any(removed[b] for b in blocks) for blocks in self.in_blocks]
        return _Flow(self, full, alive, removed, pairs).plans(count, axes)


class _Flow:
    """Which tensors are quantised and what runs on integers: ``plan._quantised`` over flags."""

    def __init__(
        self, planner: Planner, full: Flags, alive: list[Flags], removed: list[Flags],
        pairs: list[list[tuple[LayerBits, Flags]]],
    ) -> None:  # fmt: skip
        size = len(planner.anatomy.ops)
        self.planner, self.full, self.alive, self.removed, self.pairs = planner, full, alive, removed, pairs
        self.once, self.twice, self.activated, self.linear_activated = ([0] * size for _ in range(4))
        self.needed, self.output = [0] * size, [0] * size
        self.quantised, self.int8, self.carried = ([0] * size for _ in range(3))

    def plans(self, count: int, axes: Array) -> Plans:
        self._backward()
        self.fused = [
            a & ~b & c & ~d for a, b, c, d in zip(self.once, self.twice, self.activated, self.output, strict=True)
        ]
        for position, op in enumerate(self.planner.anatomy.ops):
            self._forward(position, op)
        return Plans(
            count=count, alive=self.alive, int8=self.int8, quantised=self.quantised, output=self.output,
            fused=self.fused, alone=[a & ~b & ~c for a, b, c in zip(self.once, self.twice, self.output, strict=True)],
            pairs=self.pairs, removed=self.removed, axes=axes,
        )  # fmt: skip

    def integer(self, position: int) -> Flags:
        """Where a layer's bits ask for integer kernels."""
        layer = self.planner.layer_of.get(position)
        return 0 if layer is None else _any(flags for pair, flags in self.pairs[layer] if pair.int8)

    def _backward(self) -> None:
        """What the readers of each tensor are; the readers of a removed block's result read its source."""
        ops = self.planner.anatomy.ops
        self.output[self.planner.index[self.planner.anatomy.output]] = self.full
        for position in range(len(ops) - 1, -1, -1):
            op = ops[position]
            # As in the plan, the last of several removed blocks with one output decides.
            for block, source in reversed(self.planner.aliases[position]):
                self._move(position, source, self.removed[block])
            there = self.alive[position]
            integer = self.integer(position) & there if op.kind in WEIGHTED else 0
            for number, read in enumerate(self.planner.inputs[position]):
                self.twice[read] |= self.once[read] & there
                self.once[read] |= there
                if op.kind in FUSED_ACTIVATIONS:
                    self.activated[read] |= there
                if op.kind in LINEAR_ACTIVATIONS:
                    self.linear_activated[read] |= there
                if number == 0:
                    self.needed[read] |= integer

    def _move(self, position: int, source: int, where: Flags) -> None:
        self.twice[source] |= (self.twice[position] | self.once[source] & self.once[position]) & where
        self.twice[position] &= ~where
        for facts in (self.once, self.activated, self.linear_activated, self.needed, self.output):
            facts[source] |= facts[position] & where
            facts[position] &= ~where

    def _forward(self, position: int, op: Op) -> None:
        inputs, there = self.planner.inputs[position], self.alive[position]
        fused, needed, wanted = self.fused[position], self.needed[position], 0
        all_quantised = self.full if inputs else 0
        for read in inputs:
            all_quantised &= self.quantised[read]
        follows = all_quantised if op.kind in FOLLOWERS and "constant" not in op.attrs else 0
        if op.kind in WEIGHTED:
            integer = self.integer(position)
            behind = self.linear_activated[position] if len(op.shape) == 2 else 0
            wanted = integer & (self.full if op.kind == "conv" else behind)
            self.int8[position] = integer & there
        else:
            self.int8[position] = follows & there
        if op.kind in FUSED_ACTIVATIONS:
            needed |= self.carried[inputs[0]]
        follows &= ~self.output[position]
        if op.kind in SAME_GRID:
            needed |= follows
        else:
            wanted |= follows
        self.quantised[position] = (needed | wanted & ~fused) & there
        self.carried[position] = wanted & fused & there
        for block, source in self.planner.aliases[position]:
            where = self.removed[block]
            for facts in (self.quantised, self.carried):
                facts[position] = facts[position] & ~where | facts[source] & where


def _any(flags: Iterable[Flags]) -> Flags:
    found = 0
    for each in flags:
        found |= each
    return found
