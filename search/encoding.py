"""Policies as rows of numbers, so that tens of thousands of them can be looked at in one proposal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces.anatomy import WEIGHTED, Op, op_macs
from ..spaces.policy import FP32, Distill, Policy
from ..spaces.space import Space, parse_bits

Array = NDArray[np.float64]
BLOCK_SHARE = 0.4
"""How likely the harshest random policy removes a block, as in :meth:`~nightpress.spaces.space.Space.random`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One choice: ``choices`` of a categorical one, else the ends of its range; ``log`` ranges are kept as logarithms.

    ``standard`` is the answer of a policy that says nothing, and None where every answer changes the network.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    standard: float | None = None

    @property
    def top(self) -> float:
        return len(self.choices) - 1 if self.choices else self.high

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


class Encoder:
    """Rows of a space: shape (n, columns); a categorical choice is its index, a learning rate its logarithm."""

    def __init__(self, space: Space) -> None:
        self.space = space
        found = _Columns()
        space.sample(found)
        plain = space.params(Policy(model=space.anatomy.digest))
        self.columns = tuple(_with_standard(c, plain[c.name]) for c in found.columns)
        self.low = np.array([0.0 if c.choices else c.low for c in self.columns])
        self.high = np.array([c.top for c in self.columns])
        self.keep = self._of("keep")
        self.bits = self._of("bits")
        self.block = self._of("block")
        self.block_layers = _members(
            [self.columns[i].name.partition(":")[2] for i in self.block],
            {b.name: b.layers for b in space.anatomy.blocks},
            [layer.name for layer in space.anatomy.layers],
        )
        """1 where a removable block holds a layer, shape (blocks, layers)."""
        self._group_layers = _members(
            [g.name for g in space.anatomy.groups],
            {g.name: g.layers for g in space.anatomy.groups},
            [layer.name for layer in space.anatomy.layers],
        )
        unheard = FP32 if FP32 in space.bit_choices else space.bit_choices[0]
        self._unheard_bits = space.bit_choices.index(unheard)
        self.shapes = Shapes(self)
        self.hyper = np.array([i for i, c in enumerate(self.columns) if c.standard is not None], dtype=np.intp)

    def _of(self, kind: str) -> NDArray[np.intp]:
        return np.array([i for i, c in enumerate(self.columns) if c.kind == kind], dtype=np.intp)

    def row(self, policy: Policy) -> Array:
        """A policy as a row, shape (columns,). What the space does not offer is taken to the nearest answer."""
        answers = self.space.params(policy)
        values = [_number(c, answers[c.name]) for c in self.columns]
        return np.clip(np.array(values), self.low, self.high)

    def policy(self, row: Array) -> Policy:
        """The policy that a row stands for, in canonical form."""
        return self.space.sample(
            Answers({c.name: _answer(c, float(v)) for c, v in zip(self.columns, row, strict=True)})
        )

    def random(self, count: int, generator: np.random.Generator) -> Array:
        """Rows from mild to harsh, by the law of :meth:`~nightpress.spaces.space.Space.random`; half of them leave
        the fine-tune as it is by default."""
        rows = generator.uniform(self.low, self.high, size=(count, len(self.columns)))
        harshness, integers = generator.uniform(size=(2, count, 1))
        if len(self.keep):
            low, high = self.low[self.keep], self.high[self.keep]
            middle = high - harshness * (high - low)
            rows[:, self.keep] = generator.normal(middle, 0.25 * (high - low))
        if len(self.block):
            rows[:, self.block] = generator.uniform(size=(count, len(self.block))) < BLOCK_SHARE * harshness
        if len(self.bits):
            count_of = self.high[self.bits] + 1
            drawn = np.floor(generator.uniform(size=(count, len(self.bits))) * count_of)
            names = self.columns[self.bits[0]].choices
            if "8/8" in names:
                drawn[generator.uniform(size=drawn.shape) < integers] = names.index("8/8")
            rows[:, self.bits] = drawn
        plain = generator.uniform(size=count) < 0.5
        rows[np.ix_(plain, self.hyper)] = self.standard
        return self.tidy(rows)

    @property
    def standard(self) -> Array:
        """The default answers of the columns ``hyper``."""
        return np.array([self.columns[i].standard for i in self.hyper], dtype=np.float64)

    def children(self, parents: Array, count: int, generator: np.random.Generator) -> Array:
        """Crossed and mutated rows. Most keep one parent's fine-tune whole, since those choices work together."""
        first, second = (parents[generator.integers(len(parents), size=count)] for _ in range(2))
        share = generator.choice([0.0, 0.3, 0.5], size=(count, 1)).astype(np.float32)
        single = np.float32
        rows = np.where(generator.random(first.shape, dtype=single) < share, second, first)
        rows[:, self.hyper] = first[:, self.hyper]
        size = len(self.columns)
        changes = generator.choice([1, 2, 3, max(3, size // 6)], size=(count, 1))
        touched = generator.random(rows.shape, dtype=single) < changes / size
        touched[np.arange(count), generator.integers(size, size=count)] = True
        self._mutate(rows, touched, generator)
        self._shift_all(rows, generator)
        return self.tidy(rows)

    def _mutate(self, rows: Array, touched: NDArray[np.bool_], generator: np.random.Generator) -> None:
        for index, column in enumerate(self.columns):
            at = np.flatnonzero(touched[:, index])
            if not len(at):
                continue
            if column.choices:
                rows[at, index] = generator.integers(len(column.choices), size=len(at))
            else:
                reach = max(1.0 if column.whole else 0.0, 0.2 * (column.high - column.low))
                rows[at, index] += generator.normal(0.0, reach, size=len(at))

    def _shift_all(self, rows: Array, generator: np.random.Generator) -> None:
        """A quarter of the rows become wider or narrower everywhere, an eighth take one precision everywhere: no single
        change reaches the other end of the front."""
        if len(self.keep):
            moved = generator.uniform(size=len(rows)) < 0.25
            span = self.high[self.keep] - self.low[self.keep]
            rows[np.ix_(moved, self.keep)] += generator.normal(0.0, 0.2, size=(int(moved.sum()), 1)) * span
        if len(self.bits):
            moved = generator.uniform(size=len(rows)) < 0.125
            names = self.columns[self.bits[0]].choices
            rows[np.ix_(moved, self.bits)] = generator.integers(len(names), size=(int(moved.sum()), 1))

    def tidy(self, rows: Array) -> Array:
        """Rows within their ranges, whole numbers where they must be, and the standard answer where an answer has no
        effect, as in :meth:`row`: policies that do the same lie at the same place."""
        found = np.clip(rows, self.low, self.high)
        whole = np.array([bool(c.choices) or c.whole for c in self.columns])
        found[:, whole] = np.round(found[:, whole])
        self._without_removed(found)
        self._without_unheard(found)
        return found

    def _without_removed(self, rows: Array) -> None:
        if not len(self.block):
            return
        gone = rows[:, self.block] @ self.block_layers > 0  # (n, layers)
        rows[:, self.bits] = np.where(gone, self._unheard_bits, rows[:, self.bits])
        if len(self.keep):
            idle = (~gone).astype(np.float64) @ self._group_layers.T == 0
            rows[:, self.keep] = np.where(idle, self.high[self.keep], rows[:, self.keep])

    def _without_unheard(self, rows: Array) -> None:
        names = [c.name for c in self.columns]
        if "distill.method" not in names:
            return
        methods = [Distill(method=m) for m in self.columns[names.index("distill.method")].choices]
        chosen = rows[:, names.index("distill.method")].astype(np.intp)
        logit = np.array([m.logit for m in methods])[chosen]
        inner = np.array([m.inner is not None for m in methods])[chosen]
        for name, heard, answer in (
            ("distill.alpha", logit, 0.0), ("distill.temperature", logit, Distill().temperature),
            ("distill.schedule", logit, 0.0), ("distill.feature_weight", inner, math.log(Distill().feature_weight)),
        ):  # fmt: skip
            if name in names:
                rows[~heard, names.index(name)] = answer

    def kept(self, rows: Array) -> Array:
        """Channels that each group keeps, shape (n, groups)."""
        groups = self.space.anatomy.groups
        step, most = np.array([g.step for g in groups]), np.array([g.channels for g in groups])
        return np.minimum(rows[:, self.keep] * step, most) if len(groups) else np.zeros((len(rows), 0))


class Shapes:
    """What the layers of rows do: MACs, weights, elements and bits of each, without a plan for each row."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._last: tuple[Array, tuple[Array, Array, Array]] | None = None
        anatomy = encoder.space.anatomy
        ops = {op.name: op for op in anatomy.ops}
        self._ops = [ops[layer.op] for layer in anatomy.layers]
        self._inputs = [ops[op.inputs[0]] for op in self._ops]
        self._groups = [g.name for g in anatomy.groups]
        pairs = [parse_bits(name) for name in encoder.columns[encoder.bits[0]].choices] if len(encoder.bits) else []
        self._bytes = np.array([min(pair.weights, 8 if pair.weights <= 8 else pair.weights) / 8 for pair in pairs])
        self._bytes = np.where(self._bytes < 1, 1, self._bytes)
        self._int8 = np.array([pair.int8 for pair in pairs])

    def work(self, rows: Array) -> tuple[Array, Array, Array]:
        """MACs, weights and output elements of each layer, each of shape (n, layers). Several ask for the same rows one
        after the other: the last answer is kept."""
        if self._last is None or self._last[0] is not rows:
            self._last = rows, self._work(rows)
        return self._last[1]

    def alive(self, rows: Array) -> Array:
        """1 for each layer that no removed block takes away, shape (n, layers)."""
        return 1.0 - np.minimum(1.0, rows[:, self.encoder.block] @ self.encoder.block_layers)

    def _work(self, rows: Array) -> tuple[Array, Array, Array]:
        removed = self._removed(rows)
        parts = [_layer_work(op, before, removed) for op, before in zip(self._ops, self._inputs, strict=True)]
        macs, weights, elements = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
        alive = self.alive(rows)
        return macs * alive, weights * alive, elements * alive

    def int8(self, rows: Array) -> Array:
        """1 for each layer that runs on integers, shape (n, layers)."""
        return self._int8[rows[:, self.encoder.bits].astype(np.intp)].astype(np.float64)

    def bytes_each(self, rows: Array) -> Array:
        """Bytes of one weight, shape (n, layers)."""
        return self._bytes[rows[:, self.encoder.bits].astype(np.intp)]

    def _removed(self, rows: Array) -> dict[str, Array]:
        kept = self.encoder.kept(rows)
        most = [g.channels for g in self.encoder.space.anatomy.groups]
        return {name: most[i] - kept[:, i] for i, name in enumerate(self._groups)}


def _layer_work(op: Op, before: Op, removed: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    assert op.kind in WEIGHTED
    full = op_macs(op.kind, op.attrs, before.shape, op.shape)
    out, full_out = _size(op, op.channel_axis, removed), op.shape[op.channel_axis]
    axis = 1 if op.kind == "conv" else len(before.shape) - 1
    into, full_in = _size(before, axis, removed), before.shape[axis]
    groups: int = op.attrs.get("groups", 1)
    # A grouped convolution loses whole groups with their inputs: its work shrinks with its width once, not twice.
    share = out / full_out * (1.0 if groups > 1 else into / full_in)
    kernel = math.prod(op.attrs["kernel"]) if op.kind == "conv" else 1
    weights = full_out * (full_in // groups) * kernel
    elements = math.prod(op.shape)
    return full * share, weights * share, elements * out / full_out


def _size(op: Op, axis: int, removed: Mapping[str, Array]) -> Array:
    size = np.asarray(float(op.shape[axis]))
    lost = op.lost[axis] if op.lost else {}
    total = sum((times * removed[group] for group, times in lost.items()), start=np.zeros(()))
    count = len(next(iter(removed.values()))) if removed else 1
    return np.broadcast_to(size - total, (count,)).astype(np.float64)


def _members(rows: Sequence[str], sets: Mapping[str, Iterable[str]], columns: Sequence[str]) -> Array:
    return np.array([[float(c in set(sets[r])) for c in columns] for r in rows]).reshape(len(rows), len(columns))


@dataclass(frozen=True, slots=True)
class Answers:
    """A table of answers as the space's :class:`~nightpress.spaces.space.Suggest`."""

    table: Mapping[str, Any]

    def choice(self, name: str, values: Sequence[str]) -> str:
        return self.table[name]

    def integer(self, name: str, low: int, high: int) -> int:
        return self.table[name]

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self.table[name]


@dataclass(slots=True)
class _Columns:
    columns: list[Column] = field(default_factory=list[Column])

    def choice(self, name: str, values: Sequence[str]) -> str:
        self.columns.append(Column(name=name, choices=tuple(values)))
        return values[0]

    def integer(self, name: str, low: int, high: int) -> int:
        self.columns.append(Column(name=name, low=low, high=high, whole=True))
        return low

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        ends = (math.log(low), math.log(high)) if log else (low, high)
        self.columns.append(Column(name=name, low=ends[0], high=ends[1], log=log))
        return low


def _with_standard(column: Column, answer: Any) -> Column:
    if column.kind in {"keep", "bits", "block", "sparsity"}:
        return column
    return Column(
        name=column.name, choices=column.choices, low=column.low, high=column.high, whole=column.whole, log=column.log,
        standard=_number(column, answer),
    )  # fmt: skip


def _number(column: Column, answer: Any) -> float:
    if column.choices:
        return float(column.choices.index(answer)) if answer in column.choices else 0.0
    return math.log(answer) if column.log else float(answer)


def _answer(column: Column, value: float) -> str | int | float:
    if column.choices:
        return column.choices[int(value)]
    if column.whole:
        return int(value)
    return min(max(math.exp(value), math.exp(column.low)), math.exp(column.high)) if column.log else value
