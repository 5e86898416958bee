"""The work of plans, kernel by kernel: which units a batch of policies makes the runtime execute, with the amounts
that their time depends on.

A unit is a kernel as the runtime runs it: a layer with what is fused into it, the dequantisation of stored weights, an
operation between layers. Its kind says which implementation runs (``conv.int8``, ``depthwise.blocked``, ``add.fp32``).
Conversions of precision and layout are counted in total, because the runtime gives them names that say nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import WEIGHTED, Anatomy, Op
from ...spaces.plans import Choices, Flags, Planner, Plans, unpack
from . import kernels_openvino
from .kernels import Kernels, kernels

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]
STREAM_MB = (0.5, 2.0, 8.0, 32.0)
"""Where the weights of a whole model begin to leave a cache; from each on up to four times it, a weight costs more."""
LAYER_VARIANTS = ("int8", "blocked", "plain", "stored")
WITH_SUM, NO_LAYER = 4, 8
"""Added to a layer's code (its variant's number) where it adds a second tensor; the code where there is no layer."""
OTHER_VARIANTS = ("int8", "blocked", "split", "fp32", "early", "last")
NO_OTHER = len(OTHER_VARIANTS)
DEQUANTISE = "weights.dequantise"
LAYER_TERMS, DEQUANTISE_TERMS, OTHER_TERMS = 8, 3, 3
"""At most so many amounts of work has a unit; the first counts it."""
BLOCK = 2000
_WEIGHT_BYTES = np.array([1.0, 4, 4, 5, 1, 4, 4, 5, 0])  # in memory, by code: stored ones are there twice
_MILLION = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Units of one kind in a batch, each array of shape (m,): the operation's position, the policy's row, the sizes
    that prune ratios change (channels in and out of a layer; elements elsewhere); ``terms`` (m, terms) amounts of work
    for a non-negative sum; ``streamed`` millions of weights that come from further away the larger the model is."""

    kind: str
    layer: bool
    site: Index
    row: Index
    size_in: Array
    size_out: Array
    terms: Array
    streamed: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All units of a batch of ``count`` policies. ``conversions``: kernels of each and the millions of elements that
    they convert, shape (count, 2); ``nodes`` (count,) kernels in all; ``model_mb`` (count,) weights in memory."""

    count: int
    units: tuple[Units, ...]
    conversions: dict[str, Array]
    nodes: Array
    model_mb: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What runs where, by policy: codes of layers (layers, n) and of other operations (others, n), sizes of tensors
    (operations, n), and what follows from them."""

    count: int
    axes: Array
    elements: Callable[[], Array]
    """Only what has to be worked out anew asks for them."""
    layer_codes: NDArray[np.int8]
    other_codes: NDArray[np.int8]
    weights: Array
    conversions: dict[str, Array]
    nodes: Array
    model_mb: Array


class Worker:
    """Tells the work of batches of policies of one anatomy on a runtime, see :attr:`Target.runtime`."""

    def __init__(self, anatomy: Anatomy, runtime: str = "onnxruntime") -> None:
        self.anatomy = anatomy
        self._kernels = kernels_openvino.kernels if runtime == "openvino" else kernels
        self.planner = Planner(anatomy)
        ops, inputs = anatomy.ops, self.planner.inputs
        self.layers = np.array([i for i, op in enumerate(ops) if op.kind in WEIGHTED], np.int64)
        others = [i for i, op in enumerate(ops) if op.kind not in WEIGHTED | {"input", "param"}]
        self.others = np.array(others, np.int64)
        self.layer_kinds = np.array([_layer_kind(ops[i]) for i in self.layers], np.str_)
        # Layers over tokens are called "matmul"; a product of two tensors is another kernel.
        kinds = ["product" if ops[i].kind == "matmul" else ops[i].kind for i in others]
        self.other_kinds = np.array(kinds, np.str_)
        self._source = np.array([inputs[i][0] for i in self.layers], np.int64)
        sources = [(inputs[i][0], 1 if ops[i].kind == "conv" else -1) for i in self.layers]
        self._in, self._in_factor = self._rows(sources)
        self._out, self._out_factor = self._rows([(i, ops[i].channel_axis) for i in self.layers])
        constants = np.array([self._constants(i) for i in self.layers], np.float64).reshape(-1, 2)
        self._kernel, self._width = constants[:, :1], constants[:, 1:]
        self._sizes = [self._element_axes(i) for i in range(len(ops))]
        self._fixed = np.array([fixed for fixed, _ in self._sizes], np.float32)
        self._row = np.array([rows[0] if rows else -1 for _, rows in self._sizes], np.int64)
        self._plain = np.array([len(rows) <= 1 for _, rows in self._sizes], np.bool_)

    def axes_of(self, position: int) -> tuple[int, ...]:
        """Rows of the axes that the work of an operation depends on."""
        read = [self.planner.axis_of[i] for i in (*self.planner.inputs[position], position)]
        return tuple(dict.fromkeys(row for rows in read for row in rows if row is not None))

    def channels(self, axes: Array) -> Array:
        """Output channels of each layer, shape (layers, n), from sizes of axes."""
        return axes[self._out] * self._out_factor

    def weights(self, axes: Array) -> Array:
        """Weights of each layer, shape (layers, n)."""
        inner = np.where(self._width > 0, self._width, axes[self._in] * self._in_factor)
        return self.channels(axes) * inner * self._kernel

    def states(self, choices: Choices, at_once: int = BLOCK) -> Iterator[State]:
        """The policies in order, so many at once that their arrays stay in the cache of a core."""
        plans = self.planner.plans(choices)
        made = self._kernels(self.planner, plans)
        codes = self._layer_codes(plans, made), self._other_codes(plans, made)
        converted = {
            name: ([position for position, _ in found], unpack([flags for _, flags in found], plans.count))
            for name, found in made.conversions.items()
        }
        for start in range(0, plans.count, at_once):
            columns = slice(start, start + at_once)
            some = {name: (positions, flags[:, columns]) for name, (positions, flags) in converted.items()}
            yield self._state(plans.axes[:, columns], codes[0][:, columns], codes[1][:, columns], some)

    def _state(
        self, axes: Array, layer_codes: NDArray[np.int8], other_codes: NDArray[np.int8],
        converted: Mapping[str, tuple[list[int], Mask]],
    ) -> State:  # fmt: skip
        weights = self.weights(axes)
        conversions = {name: self._converted(*found, axes) for name, found in converted.items()}
        stored = (layer_codes & 3 == 3) & (layer_codes != NO_LAYER)
        counted = (layer_codes != NO_LAYER, stored, other_codes != NO_OTHER, other_codes == 2)
        nodes = sum((_count(flags) for flags in counted), np.zeros(axes.shape[1]))
        nodes += sum(amounts[:, 0] for amounts in conversions.values())
        return State(
            count=axes.shape[1], axes=axes, elements=cache(lambda: self._all_elements(axes)), layer_codes=layer_codes,
            other_codes=other_codes, weights=weights, conversions=conversions, nodes=nodes,
            model_mb=(weights * _WEIGHT_BYTES[layer_codes]).sum(axis=0) / 2**20 + 1e-3,
        )  # fmt: skip

    def work(self, choices: Choices) -> Work:
        [state] = self.states(choices, max(1, len(choices)))
        layers, others = state.layer_codes != NO_LAYER, state.other_codes != NO_OTHER
        units = (*self.layer_units(state, layers), *self.other_units(state, others))
        return Work(
            count=state.count, units=units, conversions=state.conversions, nodes=state.nodes, model_mb=state.model_mb
        )

    def _rows(self, axes: Sequence[tuple[int, int]]) -> tuple[Index, Array]:
        """For each (operation, axis) the row of ``Plans.axes`` and a factor: a size that nothing changes is the factor
        and the last row, which is 1."""
        rows, factors = [], []
        for position, axis in axes:
            row = self.planner.axis_of[position][axis]
            rows.append(-1 if row is None else row)
            factors.append(self.anatomy.ops[position].shape[axis] if row is None else 1.0)
        return np.array(rows, np.int64), np.array(factors, np.float64)[:, None]

    def _constants(self, position: int) -> tuple[float, float]:
        """Positions of the kernel, and input channels of a group where pruning does not change them (0 else)."""
        op = self.anatomy.ops[position]
        if op.kind == "linear":
            return 1.0, 0.0
        groups = op.attrs["groups"]
        width = self.anatomy.ops[self.planner.inputs[position][0]].shape[1] / groups if groups > 1 else 0.0
        return float(math.prod(op.attrs["kernel"])), width

    def _element_axes(self, position: int) -> tuple[float, list[int]]:
        op = self.anatomy.ops[position]
        rows = self.planner.axis_of[position]
        fixed = math.prod(size for size, row in zip(op.shape, rows, strict=True) if row is None)
        return float(fixed), [row for row in rows if row is not None]

    def _all_elements(self, axes: Array) -> Array:
        """Elements of each operation's tensor, shape (operations, n)."""
        found = np.empty((len(self._sizes), axes.shape[1]))
        for position in range(len(self._sizes)):
            found[position] = self._elements_of(position, axes)
        return found

    def _elements_of(self, position: int, axes: Array) -> Array:
        fixed, rows = self._sizes[position]
        return fixed * axes[rows].prod(axis=0)

    def _converted(self, positions: list[int], flags: Mask, axes: Array) -> Array:
        """Kernels of one conversion and the millions of elements that they convert, shape (n, 2)."""
        at = np.array(positions, np.int64)
        amounts = np.zeros(axes.shape[1])
        plain = self._plain[at]
        if plain.any():  # tensors that change with one axis: a product of matrices sums those of each axis
            rows, row_of = np.unique(self._row[at], return_inverse=True)
            matrix = np.zeros((len(rows), len(at)), np.float32)
            matrix[row_of, np.arange(len(at))] = self._fixed[at] * plain
            with np.errstate(invalid="ignore"):  # OpenBLAS may read beyond a small matrix, and says so of what it read
                sums = matrix @ flags.astype(np.float32)
            amounts += np.einsum("rn,rn->n", sums, axes[rows])
        for i in np.flatnonzero(~plain):
            amounts += flags[i] * self._elements_of(positions[i], axes)
        return np.stack([_count(flags), amounts / _MILLION], axis=1)

    def _layer_codes(self, plans: Plans, made: Kernels) -> NDArray[np.int8]:
        digits: list[tuple[Flags, ...]] = []
        for i in self.layers:
            gone = plans.full & ~plans.alive[i]
            _, stored, blocked, plain = _first_of(
                plans.full & ~gone, made.int8[i], made.stored[i], made.blocked[i], plans.full
            )
            digits.append((blocked | stored, plain | stored, made.sums[i] & ~gone, gone))
        return _numbers(digits, plans.count)

    def _other_codes(self, plans: Plans, made: Kernels) -> NDArray[np.int8]:
        digits: list[tuple[Flags, ...]] = []
        for i in self.others:
            there = plans.alive[i] & ~made.absorbed[i]
            gone = plans.full & ~there
            _, last, early, split, blocked, fp32 = _first_of(
                there, made.int8[i], made.last[i], made.early[i], made.split[i], made.blocked[i], plans.full
            )
            digits.append((blocked | fp32 | last, split | fp32 | gone, early | last | gone))
        return _numbers(digits, plans.count)

    def layer_units(self, state: State, wanted: Mask) -> Iterator[Units]:
        """Units of layers and of the dequantisation of their stored weights, where ``wanted`` (layers, n)."""
        variant = state.layer_codes & 3
        for base in dict.fromkeys(self.layer_kinds):
            of_base = np.flatnonzero(self.layer_kinds == base)
            there, which = wanted[of_base], variant[of_base]
            for number, name in enumerate(LAYER_VARIANTS):
                at, row = np.nonzero(there & (which == number))
                if len(row):
                    yield self._units_of_layers(state, f"{base}.{name}", of_base[at], row)
        at, row = np.nonzero(wanted & (variant == 3))
        if len(row):
            yield self._dequantisations(state, at, row)

    def _channels(self, state: State, at: Index, row: Index) -> tuple[Array, Array]:
        channels_in = state.axes[self._in[at], row] * self._in_factor[at, 0]
        return channels_in, state.axes[self._out[at], row] * self._out_factor[at, 0]

    def _units_of_layers(self, state: State, kind: str, at: Index, row: Index) -> Units:
        channels_in, channels_out = self._channels(state, at, row)
        sizes = _Layers(
            channels_out, state.elements()[self._source[at], row], state.elements()[self.layers[at], row],
            self._kernel[at, 0], state.weights[at, row], state.layer_codes[at, row] >= WITH_SUM,
        )  # fmt: skip
        depthwise = kind.startswith("depthwise")
        return Units(
            kind=kind, layer=True, site=self.layers[at], row=row, size_in=channels_in, size_out=channels_out,
            terms=sizes.depthwise() if depthwise else sizes.dense(kind.rpartition(".")[2]),
            streamed=state.weights[at, row] * (0.0 if depthwise else 1.0) / _MILLION,
        )  # fmt: skip

    def _dequantisations(self, state: State, at: Index, row: Index) -> Units:
        channels_in, channels_out = self._channels(state, at, row)
        amount = state.weights[at, row] / _MILLION
        return Units(
            kind=DEQUANTISE, layer=False, site=self.layers[at], row=row, size_in=channels_in, size_out=channels_out,
            terms=np.stack([np.ones(len(row)), amount, channels_out / 1e4], axis=1), streamed=amount,
        )  # fmt: skip

    def other_units(self, state: State, wanted: Mask) -> Iterator[Units]:
        """Units of operations between layers, where ``wanted`` (others, n)."""
        for kind in dict.fromkeys(self.other_kinds):
            of_kind = np.flatnonzero(self.other_kinds == kind)
            there, which = wanted[of_kind], state.other_codes[of_kind]
            for number, name in enumerate(OTHER_VARIANTS):
                at, row = np.nonzero(there & (which == number))
                if not len(row):
                    continue
                at = of_kind[at]
                sources = np.zeros(len(row))
                for place in np.unique(at):
                    here = at == place
                    for read in self.planner.inputs[self.others[place]]:
                        sources[here] += state.elements()[read, row[here]]
                results = state.elements()[self.others[at], row]
                yield Units(
                    kind=f"{kind}.{name}", layer=False, site=self.others[at], row=row, size_in=np.maximum(sources, 1),
                    size_out=results, streamed=np.zeros(len(row)),
                    terms=np.stack([np.ones(len(row)), sources / _MILLION, results / _MILLION], axis=1),
                )  # fmt: skip


def _count(flags: Mask) -> Array:
    """How many are true in each column, shape (n,): in bytes, as long as none can overflow, since wider numbers take
    ten times as long."""
    parts = (flags[start : start + 255].view(np.uint8) for start in range(0, len(flags), 255))
    return sum((part.sum(axis=0, dtype=np.uint8) for part in parts), np.zeros(flags.shape[1]))


def _first_of(where: Flags, *claims: Flags) -> Iterator[Flags]:
    """Each claim where nobody before it has claimed."""
    for claim in claims:
        yield claim & where
        where &= ~claim


def _numbers(digits: Sequence[Sequence[Flags]], count: int) -> NDArray[np.int8]:
    """Numbers from their binary digits, the lowest first, for each operation; shape (operations, count)."""
    if not digits:
        return np.zeros((0, count), np.int8)
    lowest, *higher = (unpack(flags, count).view(np.int8) for flags in zip(*digits, strict=True))
    for place, digit in enumerate(higher, 1):
        lowest |= digit << place
    return lowest


@dataclass(frozen=True, slots=True)
class _Layers:
    """Sizes of units of layers, each of shape (m,)."""

    channels_out: Array
    source: Array
    result: Array
    kernel: Array
    weights: Array
    sums: Mask

    def dense(self, variant: str) -> Array:
        """Convolutions and linear layers: multiply-accumulates as they are and on the kernel's grid, patches gathered
        for a product of matrices, tensors read and written, weights read, a second tensor added."""
        rows = self.result / self.channels_out
        inner = self.weights / self.channels_out
        grid_in = _up(inner, 4) if variant == "int8" else _up(inner, 16) if variant == "blocked" else inner
        grid = rows * _up(self.channels_out, 16) * grid_in / 1e7
        return np.stack(
            [np.ones(len(rows)), grid, rows * self.weights / 1e7, rows * inner / _MILLION, self.result / _MILLION,
             self.source / _MILLION, self.weights / _MILLION, self.result * self.sums / _MILLION],
            axis=1,
        )  # fmt: skip

    def depthwise(self) -> Array:
        rows = self.result / self.channels_out
        return np.stack(
            [np.ones(len(rows)), rows * _up(self.channels_out, 16) * self.kernel / _MILLION, self.result / _MILLION,
             self.source / _MILLION, self.channels_out / 1e4],
            axis=1,
        )  # fmt: skip


def streams(model_mb: Array) -> Array:
    """How far a model has outgrown each of :data:`STREAM_MB`, from 0 to 1, shape (n, caches)."""
    return np.stack([np.clip(np.log2(model_mb / size) / 2, 0, 1) for size in STREAM_MB], axis=1)


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
