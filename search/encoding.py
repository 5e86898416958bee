"""Policies as rows of numbers, so that tens of thousands of them can be looked at in one proposal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..spaces.anatomy import Op, op_macs
from ..spaces.plans import Choices, Planner
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
        of_network = np.array([c.standard is None for c in self.columns], np.bool_)
        self._mark = np.random.default_rng(0).uniform(1, 2, len(self.columns)) * of_network
        self._choices = np.array([len(c.choices) for c in self.columns], dtype=np.float64)
        self._reach = np.array([max(1.0 if c.whole else 0.0, 0.2 * (c.high - c.low)) for c in self.columns])
        self._real = np.array([i for i, c in enumerate(self.columns) if not (c.choices or c.whole)], dtype=np.intp)
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

    def choices(self, rows: Array) -> Choices:
        """What the networks and files of rows depend on, as latency and size are predicted from."""
        anatomy, removed = self.space.anatomy, rows[:, self.block] > 0
        return Choices(
            kept=self.kept(rows).astype(np.int64), bits=rows[:, self.bits].astype(np.int64),
            removed=removed if len(self.block) else np.zeros((len(rows), len(anatomy.blocks)), np.bool_),
            pairs=self.space.bit_choices,
        )  # fmt: skip

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
        """Another choice out of all, or another place in a range, near the one before."""
        at, index = np.nonzero(touched)
        chosen = np.floor(generator.random(len(at)) * self._choices[index])
        moved = rows[at, index] + generator.normal(size=len(at)) * self._reach[index]
        rows[at, index] = np.where(self._choices[index] > 0, chosen, moved)

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

    def networks(self, rows: Array) -> NDArray[np.intp]:
        """A number for each row, the same for rows that differ in their fine-tune alone, shape (n,)."""
        # Rounded, since products of matrices need not be the same to the last bit for equal rows.
        return np.unique(np.round(rows @ self._mark, 6), return_inverse=True)[1].reshape(len(rows))

    def tidy(self, rows: Array) -> Array:
        """Rows within their ranges, whole numbers where they must be, and the standard answer where an answer has no
        effect, as in :meth:`row`: policies that do the same lie at the same place."""
        found = np.clip(rows, self.low, self.high)
        real = found[:, self._real]
        np.rint(found, out=found)
        found[:, self._real] = real
        self._without_removed(found)
        self._without_unheard(found)
        return found

    def _without_removed(self, rows: Array) -> None:
        if not len(self.block):
            return
        gone = rows[:, self.block] @ self.block_layers > 0  # (n, layers)
        np.copyto(rows[:, _span(self.bits)], self._unheard_bits, where=gone)
        if len(self.keep):
            idle = (~gone).astype(np.float32) @ self._group_layers.T == 0
            np.copyto(rows[:, _span(self.keep)], self.high[self.keep], where=idle)

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
    """How much rows compute and weigh, without a plan for each."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._planner = encoder, Planner(encoder.space.anatomy)
        self._last: tuple[Array, tuple[Array, Array]] | None = None
        ops = encoder.space.anatomy.ops
        layers = [self._planner.index[layer.op] for layer in encoder.space.anatomy.layers]
        sites = [self._site(ops, i) for i in layers]
        self._out, self._in = (np.array([site[end] for site in sites], np.int64) for end in range(2))
        self._each = np.array([site[2:] for site in sites]).reshape(len(sites), 2)
        pairs = [parse_bits(name) for name in encoder.columns[encoder.bits[0]].choices] if len(encoder.bits) else []
        self._int8 = np.array([pair.int8 for pair in pairs])

    def totals(self, rows: Array) -> tuple[Array, Array]:
        """MACs and weights of rows, each of shape (n,). Several ask for the same rows one after the other: the last
        answer is kept."""
        if self._last is None or self._last[0] is not rows:
            axes = self._planner.axes(self._encoder.kept(rows).astype(np.int64))
            work = axes[self._out] * axes[self._in] * self._alive(rows).T
            macs, weights = self._each.T @ work
            self._last = rows, (macs, weights)
        return self._last[1]

    def _alive(self, rows: Array) -> Array:
        """1 for each layer that no removed block takes away, shape (n, layers)."""
        return 1.0 - np.minimum(1.0, rows[:, self._encoder.block] @ self._encoder.block_layers)

    def _site(self, ops: Sequence[Op], position: int) -> tuple[int, int, float, float]:
        """Of a layer the rows of ``Planner.axes`` with its channels out and in, -1 where they stay as they are, and
        MACs and weights for each product of the two."""
        op, before = ops[position], ops[self._planner.inputs[position][0]]
        groups: int = op.attrs.get("groups", 1)
        into = 1 if op.kind == "conv" else len(before.shape) - 1
        # A grouped convolution loses whole groups with their inputs: its work shrinks with its width once, not twice.
        out_row = self._planner.axis_of[position][op.channel_axis]
        in_row = None if groups > 1 else self._planner.axis_of[self._planner.inputs[position][0]][into]
        size = 1.0
        size *= op.shape[op.channel_axis] if out_row is not None else 1
        size *= before.shape[into] if in_row is not None else 1
        kernel = math.prod(op.attrs["kernel"]) if op.kind == "conv" else 1
        weights = op.shape[op.channel_axis] * (before.shape[into] // groups) * kernel
        macs = op_macs(op.kind, op.attrs, before.shape, op.shape)
        return _row(out_row), _row(in_row), macs / size, weights / size

    def int8(self, rows: Array) -> Array:
        """1 for each layer that runs on integers, shape (n, layers)."""
        return self._int8[rows[:, self._encoder.bits].astype(np.intp)].astype(np.float64)


def _span(columns: NDArray[np.intp]) -> slice:
    """Columns of one kind stand side by side; a slice of them is a view."""
    return slice(columns[0], columns[-1] + 1)


def _row(number: int | None) -> int:
    return -1 if number is None else number


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
