"""Latency as a sum of units, each learned in place: from the runtime's own times of nodes of whole models.

A unit of one kind takes a non-negative sum of physical terms, times a correction that is linear in logarithms and in
how channels lie on the vectors of the machine (shared by the kind), times one of the layer's own. Times of nodes are
first brought to the model's measured latency, because a profiler slows what it watches and another hour is faster or
slower: of a profile only the shares are believed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from .nodes import Timed
from .units import DEQUANTISE, STREAM_MB, Units, Work, streams

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
KIND_PENALTY, OFFSET_PENALTY, SLOPE_PENALTY = 1.0, 0.1, 0.3
"""Of the ridge regressions on logarithms: of the kind's correction, of a layer's own offset and of its slopes."""
MOST_CORRECTION = 1.5
REWEIGHTINGS = 3
MOST_OVERHEAD_MS = 0.0025
"""A profiler's own time in a node; beyond that the difference is not the profiler's."""
LEAST_UNITS = 3
_LEAST_MS = 1e-4
_WIDTHS = (4, 8, 12, 16)


class UnseenKernelError(LookupError):
    """A policy needs a kind of kernel that no measured policy ran. The text names it and the operation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What was learned of one kind of units. With h(M) = ``streams(M) @ stream`` of a model of M megabytes:

    ``ms = (terms @ costs + streamed · h(M)) · exp(features @ shape + own[site] @ sizes) · exp(model(M) @ model_shape)``
    """

    costs: Array
    stream: Array
    shape: Array
    model_shape: Array
    centre: float
    own: Array
    """Of each operation an offset and two slopes, shape (operations, 3)."""
    spans: Array
    """Largest sizes (in, out) of each operation, shape (operations, 2)."""

    def own_ms(self, units: Units) -> tuple[Array, Array]:
        """What does not depend on the rest of the model: milliseconds, and milliseconds for each unit of h(M)."""
        own = self.own[units.site]
        sizes = _sizes(units, self.spans)
        correction = own[:, 0] + own[:, 1] * sizes[0] + own[:, 2] * sizes[1] - self.centre
        if units.layer:
            correction += _features(units) @ self.shape
        factor = np.exp(_clipped(correction))
        return np.maximum(units.terms @ self.costs, _LEAST_MS) * factor, units.streamed * factor

    def of_model(self, model_mb: Array) -> tuple[Array, Array]:
        """Factor of a model's units, and h(M) times it, each of shape (n,)."""
        factor = np.exp(_clipped(_model_features(model_mb) @ self.model_shape))
        return factor, factor * (streams(model_mb) @ self.stream)

    def ms(self, units: Units, model_mb: Array) -> Array:
        """Milliseconds of each unit; ``model_mb`` (n,) by the batch's policies."""
        own, streamed = self.own_ms(units)
        factor, further = (values[units.row] for values in self.of_model(model_mb))
        return own * factor + streamed * further


@dataclass(frozen=True, slots=True, kw_only=True)
class InSitu:
    """Sums of units in ms; ``operations`` names the operation at each position."""

    kinds: Mapping[str, Kind]
    conversions: Mapping[str, Array]
    operations: Sequence[str]

    def parts(self, work: Work) -> dict[str, Array]:
        """Milliseconds of each policy by kind, each of shape (n,). Raises UnseenKernelError."""
        found = {
            units.kind: np.bincount(
                units.row, weights=self.kind(units).ms(units, work.model_mb), minlength=work.count
            ).astype(np.float64)
            for units in work.units
        }
        converted = self.conversion_ms(work.conversions)
        for name, ms in converted.items():
            if np.isnan(ms).any():
                raise UnseenKernelError(f"something is converted ({name}), which no measured policy did")
        return found | converted

    def kind(self, units: Units) -> Kind:
        """Raises UnseenKernelError when no measured policy ran this kind."""
        if units.kind not in self.kinds:
            name = self.operations[units.site[0]]
            raise UnseenKernelError(f"{name} runs as {units.kind}, which no measured policy did")
        return self.kinds[units.kind]

    def conversion_ms(self, conversions: Mapping[str, Array]) -> dict[str, Array]:
        """Milliseconds of each conversion, each of shape (n,); NaN where no measured policy converted so."""
        unseen = {
            name: np.where(amounts[:, 0] > 0, np.nan, 0.0)
            for name, amounts in conversions.items()
            if name not in self.conversions
        }
        return {name: conversions[name] @ costs for name, costs in self.conversions.items()} | unseen


def learn(work: Work, timed: Sequence[Timed | None], latency_ms: Array, use: Mask, operations: Sequence[str]) -> InSitu:
    """Learn units from the policies in ``use``, shape (n,), of a batch: ``timed`` and ``latency_ms`` by policy; those
    in ``use`` have times of their nodes."""
    nothing = np.full(len(operations), np.nan)
    kernel_ms = np.stack([nothing if t is None else t.kernels for t in timed])
    weight_ms = np.stack([nothing if t is None else t.weights for t in timed])
    converted = {
        name: np.array([0.0 if t is None else t.conversions[name] for t in timed]) for name in work.conversions
    }
    totals = np.nansum(kernel_ms, axis=1) + np.nansum(weight_ms, axis=1) + sum(converted.values())
    overhead, factors = _levels(totals, work.nodes, latency_ms, use)
    kinds: dict[str, Kind] = {}
    for units in work.units:
        times = (weight_ms if units.kind == DEQUANTISE else kernel_ms)[units.row, units.site]
        known = use[units.row] & (np.nan_to_num(times) > 0)
        if known.any():
            ms = _without(times[known], overhead, 1.0) * factors[units.row[known]]
            kinds[units.kind] = _learn_kind(_taken(units, known), ms, work.model_mb, len(operations))
        elif use[units.row].any():
            kinds[units.kind] = _untimed(units, len(operations))
    costs: dict[str, Array] = {}
    for name, amounts in work.conversions.items():
        known = use & (converted[name] > 0) & (amounts[:, 0] > 0)
        if known.any():
            ms = _without(converted[name][known], overhead, amounts[known, 0]) * factors[known]
            costs[name] = relative_nnls(amounts[known], ms)
        elif (use & (amounts[:, 0] > 0)).any():  # the runtime does it inside its kernels, as OpenVINO does
            costs[name] = np.zeros(amounts.shape[1])
    return InSitu(kinds=kinds, conversions=costs, operations=operations)


def _levels(totals: Array, nodes: Array, latency_ms: Array, use: Mask) -> tuple[float, Array]:
    """The profiler's time a node, and the factor of each policy from what is left of its profile to its latency."""
    matrix = np.stack([totals, -nodes], axis=1)[use] / latency_ms[use, None]
    share, taken = nnls(matrix, np.ones(int(use.sum())))[0]
    overhead = float(min(taken / share, MOST_OVERHEAD_MS)) if share > 0 else 0.0
    return overhead, latency_ms / np.maximum(totals - overhead * nodes, 0.3 * totals + 1e-9)


def _without(times: Array, overhead: float, nodes: "Array | float") -> Array:
    return np.maximum(times - overhead * nodes, 0.2 * times)


def _taken(units: Units, mask: Mask) -> Units:
    return Units(
        kind=units.kind, layer=units.layer, site=units.site[mask], row=units.row[mask], size_in=units.size_in[mask],
        size_out=units.size_out[mask], terms=units.terms[mask], streamed=units.streamed[mask],
    )  # fmt: skip


def _learn_kind(units: Units, ms: Array, model_mb: Array, operations: int) -> Kind:
    """``model_mb`` (n,) by policy."""
    further = units.streamed[:, None] * streams(model_mb)[units.row]
    terms = np.concatenate([units.terms, further], axis=1)
    costs = relative_nnls(terms, ms) if len(ms) >= LEAST_UNITS else np.eye(1, terms.shape[1])[0] * ms.mean()
    spans = np.ones((operations, 2))
    np.maximum.at(spans[:, 0], units.site, units.size_in)
    np.maximum.at(spans[:, 1], units.site, units.size_out)
    model = _model_features(model_mb)[units.row]
    features = np.concatenate([_features(units), model], axis=1) if units.layer else np.zeros((len(ms), 2))
    left = np.log(ms) - np.log(np.maximum(terms @ costs, _LEAST_MS))
    shape, centre, own = _corrections(units, left, features, _sizes(units, spans), operations)
    width = units.terms.shape[1]
    return Kind(
        costs=costs[:width], stream=costs[width:], shape=shape[:-2], model_shape=shape[-2:],
        centre=float(centre @ shape), own=own, spans=spans,
    )  # fmt: skip


def _untimed(units: Units, operations: int) -> Kind:
    """A kind that ran and that the profiler has no time for: the levels bring its share to those that it has."""
    return Kind(
        costs=np.zeros(units.terms.shape[1]), stream=np.zeros(len(STREAM_MB)),
        shape=np.zeros(_features(units).shape[1]), model_shape=np.zeros(2), centre=0.0, own=np.zeros((operations, 3)),
        spans=np.ones((operations, 2)),
    )  # fmt: skip


def _corrections(
    units: Units, left: Array, features: Array, sizes: tuple[Array, Array], operations: int
) -> tuple[Array, Array, Array]:
    """The kind's correction and the layers' own, in turn, with outliers weighed down (Huber 1964)."""
    centre: Array = features.mean(axis=0)
    features = features - centre
    design = np.stack([np.ones(len(left)), *sizes], axis=1)
    sites = {int(site): np.nonzero(units.site == site)[0] for site in np.unique(units.site)}
    own, of_own, weights = np.zeros((operations, 3)), np.zeros(len(left)), np.ones(len(left))
    shape = np.zeros(features.shape[1])
    penalty = KIND_PENALTY * np.eye(features.shape[1])
    for _ in range(REWEIGHTINGS):
        weighed = features * weights[:, None]
        shape = np.linalg.solve(weighed.T @ features + penalty, weighed.T @ _clipped(left - of_own)).astype(np.float64)
        rest = left - features @ shape
        for site, at in sites.items():
            own[site] = _ridge(design[at], _clipped(rest[at]))
            of_own[at] = design[at] @ own[site]
        errors = np.abs(rest - of_own)
        weights = 1 / np.maximum(1.0, errors / (2.2 * float(np.median(errors)) + 1e-6))
    return shape, centre, own


def _ridge(design: Array, target: Array) -> Array:
    penalty = np.diag([OFFSET_PENALTY, SLOPE_PENALTY, SLOPE_PENALTY])
    return np.linalg.solve(design.T @ design + penalty, design.T @ target).astype(np.float64)


def _clipped(values: Array) -> Array:
    return np.clip(values, -MOST_CORRECTION, MOST_CORRECTION)


def _sizes(units: Units, spans: Array) -> tuple[Array, Array]:
    span = spans[units.site]
    return np.log(units.size_in / span[:, 0]), np.log(units.size_out / span[:, 1])


def _features(units: Units) -> Array:
    """Of layers: logarithms of channels, how channels fill vectors of 16, narrow layers."""
    wide_in, wide_out = np.log(np.maximum(units.size_in, 1)) / 3, np.log(np.maximum(units.size_out, 1)) / 3
    over_in, over_out = units.size_in % 16, units.size_out % 16
    return np.stack(
        [
            np.ones(len(wide_in)), wide_in, wide_out, wide_in**2, wide_out**2, wide_in * wide_out,
            *(over_out == r for r in _WIDTHS[:3]), *(units.size_out == w for w in _WIDTHS),
            *(over_in == r for r in (0, *_WIDTHS[:3])), *(units.size_in == w for w in _WIDTHS[:3]),
            (over_out != 0) / np.maximum(units.size_out / 16, 1),
        ],
        axis=1,
    )  # fmt: skip


def _model_features(model_mb: Array) -> Array:
    model = np.log(model_mb) / 3
    return np.stack([model, model**2], axis=1)


def relative_nnls(terms: Array, ms: Array) -> Array:
    """Non-negative costs of terms by least squares on relative errors."""
    scale = np.maximum(terms.max(axis=0), 1e-12)
    matrix = np.vstack([terms / scale / ms[:, None], 1e-3 * np.eye(terms.shape[1])])
    return nnls(matrix, np.concatenate([np.ones(len(ms)), np.zeros(terms.shape[1])]))[0] / scale
