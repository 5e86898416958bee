"""Sums of units for batches of policies by looking them up: what a unit costs depends on its variant and on two sizes
that take few values, so that each combination is worked out once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...spaces.plans import Choices
from .insitu import InSitu
from .units import (
    DEQUANTISE,
    DEQUANTISE_TERMS,
    LAYER_TERMS,
    LAYER_VARIANTS,
    NO_LAYER,
    NO_OTHER,
    OTHER_TERMS,
    OTHER_VARIANTS,
    State,
    Units,
    Work,
    Worker,
)

Array = NDArray[np.floating[Any]]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]
MOST_ENTRIES = 4_000_000
"""Of one operation; one with more combinations is worked out each time."""
GROUPS = (*LAYER_VARIANTS, "dequantise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Of n policies: milliseconds in total (n,), of layers by variant and of dequantised weights (groups, n); kernels
    in all and megabytes of weights (n,)."""

    total: Array
    groups: Array
    nodes: Array
    model_mb: Array


def sums_of(parts: Mapping[str, Array], work: Work) -> Sums:
    """From the parts of an :class:`InSitu`."""
    nothing = np.zeros(work.count)
    groups = [
        sum((v for k, v in parts.items() if k.endswith(f".{group}") and _grouped(k)), nothing) for group in GROUPS
    ]
    return Sums(total=sum(parts.values(), nothing), groups=np.array(groups), nodes=work.nodes, model_mb=work.model_mb)


def _grouped(kind: str) -> bool:
    return kind == DEQUANTISE or kind.partition(".")[0] in LAYER_BASES


LAYER_BASES = frozenset({"conv", "pointwise", "depthwise", "grouped", "linear", "matmul"})


class Tables:
    """Looks units up, and works out those that were not asked for before."""

    def __init__(self, worker: Worker, units: InSitu) -> None:
        self._worker, self._units = worker, units
        self._axes = _Axes(worker)
        self._layers = _Table(self._axes, worker, worker.layers, NO_LAYER, depth=4)
        self._others = _Table(self._axes, worker, worker.others, NO_OTHER, depth=1)
        self._bases = list(dict.fromkeys(worker.layer_kinds))
        base = np.array([self._bases.index(kind) for kind in worker.layer_kinds], np.int64)
        self._kind_of = base[:, None] * len(LAYER_VARIANTS)

    def sums(self, choices: Choices) -> Sums:
        """``total`` is NaN for a policy with a kind of kernel that no measured policy ran."""
        parts = [self._sums(state) for state in self._worker.states(choices)]
        return Sums(
            total=np.concatenate([part.total for part in parts]),
            groups=np.concatenate([part.groups for part in parts], axis=1),
            nodes=np.concatenate([part.nodes for part in parts]),
            model_mb=np.concatenate([part.model_mb for part in parts]),
        )

    def _sums(self, state: State) -> Sums:
        steps = self._axes.steps(state.axes)
        layers = self._layers.look_up(state.layer_codes, steps, lambda new: self._price_layers(state, new))
        others = self._others.look_up(state.other_codes, steps, lambda new: self._price_others(state, new))
        conversions = self._units.conversion_ms(state.conversions)
        groups = self._by_group(state, layers)
        total = groups.sum(axis=0) + others[0].sum(axis=0) + sum(conversions.values())
        return Sums(total=total, groups=groups, nodes=state.nodes, model_mb=state.model_mb)

    def _by_group(self, state: State, found: Sequence[Array]) -> Array:
        """Milliseconds of layers by variant, then of dequantised weights, shape (groups, n)."""
        factors, further = self._of_model(state.model_mb)
        variant = state.layer_codes & 3
        kind = self._kind_of + variant
        place = kind * state.count + np.arange(state.count)
        ms = found[0] * factors.take(place) + found[1] * further.take(place)
        by_kind = np.bincount(place.ravel(), ms.ravel(), len(factors) * state.count)
        by_kind = by_kind.reshape(-1, state.count)[: len(self._bases) * len(LAYER_VARIANTS)]
        groups = by_kind.reshape(-1, len(LAYER_VARIANTS), state.count).sum(axis=0)
        stored = found[2].sum(axis=0) * factors[-1] + found[3].sum(axis=0) * further[-1]
        return np.array([*groups, stored])

    def _of_model(self, model_mb: Array) -> tuple[Array, Array]:
        """Factors of each kind of layer, and of dequantised weights in the last row, shape (kinds, n)."""
        names = [f"{base}.{variant}" for base in self._bases for variant in LAYER_VARIANTS] + [DEQUANTISE]
        factors, further = (
            np.ones((len(names), len(model_mb)), np.float32),
            np.zeros((len(names), len(model_mb)), np.float32),
        )
        for row, name in enumerate(names):
            if name in self._units.kinds:
                factors[row], further[row] = self._units.kinds[name].of_model(model_mb.astype(np.float64))
        return factors, further

    def _price_layers(self, state: State, new: Mask) -> Array:
        return self._priced(self._worker.layer_units(state, new), self._worker.layers, new.shape)

    def _price_others(self, state: State, new: Mask) -> Array:
        return self._priced(self._worker.other_units(state, new), self._worker.others, new.shape)

    def _priced(self, found: Iterable[Units], sites: Index, shape: tuple[int, ...]) -> Array:
        """Milliseconds and those for each unit of h(M), of units and of their dequantised weights: (4, sites, n)."""
        prices = np.zeros((4, *shape))
        for units in found:
            place = 2 if units.kind == DEQUANTISE else 0
            at = np.searchsorted(sites, units.site)
            kind = self._units.kinds.get(units.kind)
            own, streamed = kind.own_ms(units) if kind is not None else (np.nan, np.nan)
            prices[place, at, units.row] = own
            prices[place + 1, at, units.row] = streamed
        return prices


class TermTables:
    """Terms of batches of policies summed by kind, as :func:`~.aggregates.aggregate` works them out, by looking each
    unit's up."""

    def __init__(self, worker: Worker, columns: Mapping[str, int]) -> None:
        self._worker, self._columns, self._axes = worker, columns, _Axes(worker)
        self._layers = _Table(self._axes, worker, worker.layers, NO_LAYER, depth=LAYER_TERMS + DEQUANTISE_TERMS)
        self._others = _Table(self._axes, worker, worker.others, NO_OTHER, depth=OTHER_TERMS)
        self._kinds = {kind: number for number, kind in enumerate(columns)}
        self._layer_kinds = self._numbers(worker.layer_kinds, (*LAYER_VARIANTS, "no layer"))
        self._other_kinds = self._numbers(worker.other_kinds, (*OTHER_VARIANTS, "none"))

    def _numbers(self, bases: NDArray[np.str_], variants: Sequence[str]) -> Index:
        """Of each operation's kind in each variant, shape (operations, variants); the last one for what is no
        column."""
        named = [[self._kinds.get(f"{base}.{name}", len(self._kinds)) for name in variants] for base in bases]
        return np.array(named, np.int64).reshape(-1, len(variants))

    def terms(self, choices: Choices) -> NDArray[np.float64]:
        """Shape (n, terms)."""
        return np.concatenate([self._terms(state) for state in self._worker.states(choices)])

    def _terms(self, state: State) -> NDArray[np.float64]:
        steps, unseen = self._axes.steps(state.axes), np.zeros(state.count, np.bool_)
        layers = self._layers.look_up(state.layer_codes, steps, lambda new: self._terms_of_layers(state, new))
        others = self._others.look_up(state.other_codes, steps, lambda new: self._terms_of_others(state, new))
        variant = np.where(state.layer_codes == NO_LAYER, len(LAYER_VARIANTS), state.layer_codes & 3)
        by_kind = self._by_kind(self._layer_kinds, variant, layers[:LAYER_TERMS])
        by_kind[:OTHER_TERMS] += self._by_kind(self._other_kinds, state.other_codes, others)
        dequantised = np.array([plane.sum(axis=0) for plane in layers[LAYER_TERMS:]])
        if DEQUANTISE in self._kinds:
            by_kind[:DEQUANTISE_TERMS, self._kinds[DEQUANTISE]] = dequantised
        else:
            unseen |= dequantised[0] > 0
        for name, amounts in state.conversions.items():
            if name in self._kinds:
                by_kind[:2, self._kinds[name]] = amounts.T
            else:
                unseen |= amounts[:, 0] > 0
        unseen |= by_kind[0, -1] > 0
        found = [by_kind[:width, number] for number, width in enumerate(self._columns.values())]
        terms = np.concatenate([np.ones((1, state.count)), *found]).T
        terms[unseen] = np.nan
        return terms

    def _by_kind(
        self, numbers: Index, variant: NDArray[np.integer[Any]], planes: Sequence[Array]
    ) -> NDArray[np.float64]:  # fmt: skip
        """Sums of operations of one kind, shape (terms, kinds + 1, n)."""
        count = variant.shape[1]
        kind = np.take_along_axis(numbers, variant.astype(np.int64), axis=1)
        place = (kind * count + np.arange(count)).ravel()
        size = (len(self._kinds) + 1) * count
        sums = [np.bincount(place, plane.ravel(), size).reshape(-1, count) for plane in planes]
        return np.array(sums, np.float64)

    def _terms_of_layers(self, state: State, new: Mask) -> Array:
        found = np.zeros((LAYER_TERMS + DEQUANTISE_TERMS, *new.shape))
        for units in self._worker.layer_units(state, new):
            first = LAYER_TERMS if units.kind == DEQUANTISE else 0
            _fill(found[first:], units, self._worker.layers)
        return found

    def _terms_of_others(self, state: State, new: Mask) -> Array:
        found = np.zeros((OTHER_TERMS, *new.shape))
        for units in self._worker.other_units(state, new):
            _fill(found, units, self._worker.others)
        return found


def _fill(planes: Array, units: Units, sites: Index) -> None:
    at = np.searchsorted(sites, units.site)
    for plane, amounts in zip(planes, units.terms.T, strict=False):
        plane[at, units.row] = amounts


class _Axes:
    """The sizes that each axis can take, as whole steps from the least."""

    def __init__(self, worker: Worker) -> None:
        self._least, self._step, self.counts = worker.planner.axis_range()

    def steps(self, axes: Array) -> NDArray[np.int32]:
        """Of each axis and policy; the last row is 0."""
        return ((axes - self._least[:, None]) / self._step[:, None] + 0.5).astype(np.int32)


class _Table:
    """Entries of all operations of one sort, by code and the steps of the two axes that its work depends on."""

    def __init__(self, axes: _Axes, worker: Worker, sites: Index, nothing: int, depth: int) -> None:
        self._nothing = nothing
        rows = [worker.axes_of(int(site)) for site in sites]
        self._kept = np.array([len(r) <= 2 and np.prod(axes.counts[list(r)]) <= MOST_ENTRIES for r in rows], np.bool_)
        pairs = [(*r, -1, -1)[:2] if kept else (-1, -1) for r, kept in zip(rows, self._kept, strict=True)]
        self._first = np.array([first for first, _ in pairs], np.int64)
        self._second = np.array([second for _, second in pairs], np.int64)
        counts = np.array([*axes.counts[:-1], 1])
        width = counts[self._second][:, None] if len(sites) else np.zeros((0, 1), np.int64)
        sizes = counts[self._first] * counts[self._second] if len(sites) else np.zeros(0, np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes * (nothing + 1))])
        # Half as wide as an index while places are worked out: the passes over them are what takes time.
        self._width, self._each, self._start = (
            part.astype(np.int32) for part in (width, sizes[:, None], starts[:-1, None])
        )
        self._prices = np.zeros((depth, int(starts[-1])), np.float32)
        self._depth = depth
        self._known = np.zeros(int(starts[-1]), np.bool_)

    def look_up(self, codes: NDArray[np.int8], steps: NDArray[np.int32], price: Callable[[Mask], Array]) -> list[Array]:
        """Prices of each operation and policy, ``depth`` arrays of shape (operations, n)."""
        where = self._start + codes * self._each + steps[self._first] * self._width + steps[self._second]
        where = where.astype(np.int64)
        unknown = ~self._known.take(where) & self._kept[:, None] & (codes != self._nothing)
        if unknown.any():
            new = np.zeros(where.shape, np.bool_)
            first = np.unique(where[unknown], return_index=True)[1]
            new[tuple(part[first] for part in np.nonzero(unknown))] = True
            priced = price(new)
            self._prices[:, where[new]] = priced[: self._depth, new]
            self._known[where[new]] = True
        found = [plane.take(where) for plane in self._prices]
        each_time = ~self._kept[:, None] & (codes != self._nothing)
        if each_time.any():
            found = [known + new for known, new in zip(found, price(each_time), strict=False)]
        return found
