"""The work of plans, kernel by kernel: which units a batch of policies makes the runtime execute, with the amounts that
their time depends on.

A unit is a kernel as the runtime runs it: a layer with what is fused into it, the dequantisation of stored weights, an
operation between layers. Its kind says which implementation runs (``conv3x3.int8``, ``depthwise.blocked``, ``add.int8``).
Conversions of precision and layout are counted in total, because the runtime gives them names that say nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import WEIGHTED, Anatomy, Op
from ...spaces.plans import Choices, Planner, Plans, unpack
from .kernels import CONVERSIONS, Kernels, kernels

Array = NDArray[np.float64]
Index = NDArray[np.int64]
STREAM_MB = (0.5, 2.0, 8.0, 32.0)
"""Where the weights of a whole model begin to leave a cache; from each on a weight may cost more, up to four times on."""
_VARIANTS = (("int8", 1), ("blocked", 4), ("plain", 4), ("stored", 4))
_MILLION = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Units of one kind in a batch, each array of shape (m,): the operation's position, the policy's row, the sizes
    that prune ratios change (channels in and out of a layer; elements elsewhere); ``terms`` (m, terms) amounts of work
    for a non-negative sum, ``model_mb`` the weights of the whole model."""

    kind: str
    layer: bool
    site: Index
    row: Index
    size_in: Array
    size_out: Array
    model_mb: Array
    terms: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All units of a batch of ``count`` policies. ``conversions``: kernels of each and the elements that they convert,
    shape (count, 2); ``nodes`` (count,) kernels in all; ``model_mb`` (count,) weights as they lie in memory."""

    count: int
    units: tuple[Units, ...]
    conversions: dict[str, Array]
    nodes: Array
    model_mb: Array


class Worker:
    """Tells the work of batches of policies of one anatomy."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.planner = Planner(anatomy)
        ops = anatomy.ops
        self._layers = [i for i, op in enumerate(ops) if op.kind in WEIGHTED]
        self._others = [i for i, op in enumerate(ops) if op.kind not in WEIGHTED | {"input", "param"}]
        self._kinds = {i: _layer_kind(ops[i]) for i in self._layers}
        self._axis_in = self._rows([(self.planner.inputs[i][0], 1 if ops[i].kind == "conv" else -1) for i in self._layers])
        self._axis_out = self._rows([(i, ops[i].channel_axis) for i in self._layers])
        self._static = np.array([self._layer_constants(i) for i in self._layers], np.float64).reshape(-1, 3)
        self._elements = [self._element_axes(i) for i in range(len(ops))]

    def work(self, choices: Choices) -> Work:
        plans = self.planner.plans(choices)
        made = kernels(self.planner, plans)
        elements = self._all_elements(plans)
        units: list[Units] = []
        model_mb = np.zeros(plans.count)
        units += self._layer_units(plans, made, elements, model_mb)
        units += self._other_units(plans, made, elements, model_mb)
        conversions = {name: self._converted(made.conversions[name], elements, plans.count) for name in CONVERSIONS}
        nodes = np.zeros(plans.count)
        for unit in units:
            each = 2 if unit.kind.endswith(".split") else 1
            nodes += each * np.bincount(unit.row, minlength=plans.count)
        for amounts in conversions.values():
            nodes += amounts[:, 0]
        return Work(
            count=plans.count, units=tuple(u for u in units if len(u.row)), conversions=conversions, nodes=nodes,
            model_mb=model_mb,
        )  # fmt: skip

    def _rows(self, axes: Sequence[tuple[int, int]]) -> tuple[Index, Array]:
        """For each (operation, axis) the row of ``Plans.axes`` and a factor: a size that nothing changes is the factor
        and the last row, which is 1."""
        rows, factors = [], []
        for position, axis in axes:
            row = self.planner.axis_of[position][axis]
            rows.append(-1 if row is None else row)
            factors.append(self.anatomy.ops[position].shape[axis] if row is None else 1.0)
        return np.array(rows, np.int64), np.array(factors, np.float64)[:, None]

    def _layer_constants(self, position: int) -> tuple[float, float, float]:
        """Kernel positions, input channels a group where pruning does not change them (0 else), fused sums possible."""
        op = self.anatomy.ops[position]
        if op.kind == "linear":
            return 1.0, 0.0, 1.0
        groups = op.attrs["groups"]
        width = self.anatomy.ops[self.planner.inputs[position][0]].shape[1] / groups if groups > 1 else 0.0
        return float(math.prod(op.attrs["kernel"])), width, float(groups)

    def _element_axes(self, position: int) -> tuple[float, list[int]]:
        op = self.anatomy.ops[position]
        rows = self.planner.axis_of[position]
        fixed = math.prod(size for size, row in zip(op.shape, rows, strict=True) if row is None)
        return float(fixed), [row for row in rows if row is not None]

    def _all_elements(self, plans: Plans) -> Array:
        """Elements of each operation's tensor, shape (operations, n)."""
        found = np.empty((len(self._elements), plans.count))
        for position, (fixed, rows) in enumerate(self._elements):
            if not rows:
                found[position] = fixed
                continue
            np.multiply(plans.axes[rows[0]], fixed, out=found[position])
            for row in rows[1:]:
                found[position] *= plans.axes[row]
        return found

    def _layer_units(self, plans: Plans, made: Kernels, elements: Array, model_mb: Array) -> Iterator[Units]:
        """Units of layers, and of the dequantisation of their stored weights; fills ``model_mb``."""
        if not self._layers:
            return
        count, layers = plans.count, np.array(self._layers)
        channels_in = plans.axes[self._axis_in[0]] * self._axis_in[1]
        channels_out = plans.axes[self._axis_out[0]] * self._axis_out[1]
        kernel, width = self._static[:, :1], self._static[:, 1:2]
        weights = channels_out * np.where(width > 0, width, channels_in) * kernel
        int8 = unpack([plans.int8[i] for i in layers], count)
        blocked = unpack([made.blocked[i] for i in layers], count)
        stored = unpack([made.stored[i] for i in layers], count)
        alive = unpack([plans.alive[i] for i in layers], count)
        sums = unpack([made.sums[i] for i in layers], count)
        chosen = {"int8": int8 & alive, "blocked": blocked, "stored": stored, "plain": alive & ~int8 & ~blocked & ~stored}
        held = int8 * 1.0 + (alive & ~int8) * 4.0 + stored * 1.0
        model_mb += (weights * held).sum(axis=0) / 2**20 + 1e-3
        streams = _streams(model_mb)
        sources = elements[[self.planner.inputs[i][0] for i in layers]]
        results = elements[layers]
        kinds = np.array([self._kinds[i] for i in layers])
        for base in dict.fromkeys(self._kinds.values()):
            of_base = (kinds == base)[:, None]
            for variant, size in _VARIANTS:
                at, row = np.nonzero(chosen[variant] & of_base)
                if not len(row):
                    continue
                taken = _Layers(
                    channels_in[at, row], channels_out[at, row], sources[at, row], results[at, row], kernel[at, 0],
                    weights[at, row], sums[at, row], streams[:, row],
                )  # fmt: skip
                terms = taken.depthwise() if base == "depthwise" else taken.dense(variant, size)
                yield Units(
                    kind=f"{base}.{variant}", layer=True, site=layers[at], row=row, size_in=taken.channels_in,
                    size_out=taken.channels_out, model_mb=model_mb[row], terms=terms,
                )  # fmt: skip
        at, row = np.nonzero(stored)
        amount = weights[at, row] / _MILLION
        yield Units(
            kind="weights.dequantise", layer=False, site=layers[at], row=row, size_in=channels_in[at, row],
            size_out=channels_out[at, row], model_mb=model_mb[row],
            terms=np.stack([np.ones(len(row)), amount, channels_out[at, row] / 1e4, *(amount * streams[:, row])], 1),
        )  # fmt: skip

    def _other_units(self, plans: Plans, made: Kernels, elements: Array, model_mb: Array) -> Iterator[Units]:
        """Units of operations between layers."""
        count, others = plans.count, np.array(self._others, np.int64)
        there = unpack([plans.alive[i] & ~made.absorbed[i] for i in others], count)
        int8 = unpack([plans.int8[i] for i in others], count)
        blocked = unpack([made.blocked[i] for i in others], count)
        split = unpack([made.split[i] for i in others], count)
        kinds = np.array([self.anatomy.ops[i].kind for i in others])
        sources = np.stack([sum(elements[j] for j in self.planner.inputs[i]) + np.zeros(count) for i in others])
        for kind in dict.fromkeys(kinds):
            of_kind = (kinds == kind)[:, None] & there
            fp32 = ~int8 & ~blocked & ~split
            for name, mask in (("int8", int8), ("blocked", ~int8 & blocked), ("split", split), ("fp32", fp32)):
                at, row = np.nonzero(of_kind & mask)
                if not len(row):
                    continue
                size_in, size_out = sources[at, row], elements[others[at], row]
                yield Units(
                    kind=f"{kind}.{name}", layer=False, site=others[at], row=row, size_in=size_in, size_out=size_out,
                    model_mb=model_mb[row],
                    terms=np.stack([np.ones(len(row)), size_in / _MILLION, size_out / _MILLION], axis=1),
                )  # fmt: skip

    def _converted(self, found: list[tuple[int, int]], elements: Array, count: int) -> Array:
        if not found:
            return np.zeros((count, 2))
        flags = unpack([flags for _, flags in found], count)
        amounts = elements[[position for position, _ in found]]
        return np.stack([flags.sum(axis=0), (flags * amounts).sum(axis=0) / _MILLION], axis=1)


@dataclass(frozen=True, slots=True)
class _Layers:
    """Sizes of units of layers, each of shape (m,); ``streams`` (caches, m)."""

    channels_in: Array
    channels_out: Array
    source: Array
    result: Array
    kernel: Array
    weights: Array
    sums: NDArray[np.bool_]
    streams: Array

    def dense(self, variant: str, weight_bytes: int) -> Array:
        """Convolutions and linear layers: multiply-accumulates as they are and on the kernel's grid, patches gathered
        for a product of matrices, tensors read and written, weights read, from further away the larger the model."""
        rows = self.result / self.channels_out
        inner = self.weights / self.channels_out
        grid_in = _up(inner, 4) if variant == "int8" else _up(inner, 16) if variant == "blocked" else inner
        grid = rows * _up(self.channels_out, 16) * grid_in / 1e7
        read = self.weights * weight_bytes / _MILLION
        return np.stack(
            [np.ones(len(rows)), grid, rows * self.weights / 1e7, rows * inner / _MILLION, self.result / _MILLION,
             self.source / _MILLION, read, *(read * self.streams), self.result * self.sums / _MILLION],
            axis=1,
        )  # fmt: skip

    def depthwise(self) -> Array:
        rows = self.result / self.channels_out
        return np.stack(
            [np.ones(len(rows)), rows * _up(self.channels_out, 16) * self.kernel / _MILLION, self.result / _MILLION,
             self.source / _MILLION, self.channels_out / 1e4],
            axis=1,
        )  # fmt: skip


def _streams(model_mb: Array) -> Array:
    """How far a model has outgrown each of :data:`STREAM_MB`, from 0 to 1, shape (caches, n)."""
    return np.stack([np.clip(np.log2(model_mb / size) / 2, 0, 1) for size in STREAM_MB])


def _up(values: Array, step: int) -> Array:
    return np.ceil(values / step) * step


def _layer_kind(op: Op) -> str:
    """Layers that share kernels: by the kernel's extent, depthwise and grouped ones apart."""
    if op.kind == "linear":
        return "linear" if len(op.shape) == 2 else "matmul"
    groups = op.attrs["groups"]
    if groups > 1:
        return "depthwise" if groups == op.shape[1] else "grouped"
    return "pointwise" if math.prod(op.attrs["kernel"]) == 1 else "conv"
