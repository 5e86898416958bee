"""A latency predictor fitted to whole policies that were measured, which knows its own error.

Several designs compete by cross-validation and the best is used: sums of units that were learned in place
(:mod:`.insitu`), with and without a Gaussian process on what they leave in the logarithm; and three that need no
profile of nodes: a non-negative sum of physical terms, a Gaussian process on the logarithms of the terms, and the sum
corrected by such a process. The 90 % interval is split-conformal on the out-of-fold errors (Vovk et al. 2005; Lei et
al. 2018).
"""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # scikit-learn's own dependency

from ...spaces.plans import Choices
from .aggregates import (
    AGGREGATES,
    FOLDS,
    LEAST_MS,
    Predict,
    aggregate,
    columns_of,
    filled,
    of_terms,
    out_of_fold,
    physical,
    process_on,
)
from .insitu import InSitu, UnseenKernelError, learn
from .nodes import Timed
from .tables import Sums, Tables, sums_of
from .units import Work, Worker

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
COVERAGE = 0.9
LEAST_POINTS = 10
LEAST_DRIFT = 0.05
"""Less than that is what neighbours of a machine do in passing."""
_LEVELLINGS = 2
_SPREAD = 1.4826
"""Standard deviations in a median absolute deviation of normal errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Errors on policies that the model had not seen, by cross-validation; shares in [0, 1]."""

    n: int
    mape: float
    within_5: float
    within_10: float
    spearman: float
    interval_coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a predictor is fitted to: the work of n policies, their latencies in ms (n,), and the times of their nodes,
    None where a policy was measured without them. ``sessions`` (n,): those of one number were timed in turn;
    -1 where that tells nothing. ``looks_apart``: how far two looks at the same policies differ as a whole, as a
    share. ``networks`` (n,): policies of one number run the same network; None where all differ."""

    worker: Worker
    work: Work
    latency_ms: Array
    timed: Sequence[Timed | None]
    sessions: NDArray[np.int64]
    looks_apart: float = 0.0
    networks: NDArray[np.intp] | None = None

    @property
    def operations(self) -> list[str]:
        return [op.name for op in self.worker.anatomy.ops]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """``predict`` maps the choices of n policies to (n, 3): latency, low and high end of the 90 % interval, in ms."""

    design: str
    heldout: HeldOut
    candidates: dict[str, float]
    """Cross-validated MAPE of each design that competed."""
    out_of_fold: Array
    """Held-out prediction of each calibration point, in their order, in ms."""
    log_margin: float
    _model: Predict
    _unseen: Callable[[Choices], str]

    def latencies(self, choices: Choices) -> Array:
        """Milliseconds alone, shape (n,); NaN for a policy with a kind of kernel that no measured policy ran."""
        return np.maximum(self._model(choices), LEAST_MS)

    def predict(self, choices: Choices) -> Array:
        """Raises UnseenKernelError for a kind of kernel that no measured policy ran."""
        latency = self.latencies(choices)
        if np.isnan(latency).any():
            raise UnseenKernelError(self._unseen(choices))
        factor = math.exp(self.log_margin)
        return np.column_stack([latency, latency / factor, latency * factor])


def fit(measured: Measured, seed: int = 0) -> Predictor:
    """Fit to calibration points. Raises ValueError below 10 points."""
    count = len(measured.latency_ms)
    if count < LEAST_POINTS:
        raise ValueError(f"a predictor needs at least {LEAST_POINTS} measured policies, but got {count}")
    # A few dozen rows: more threads would only wait for each other, for long on a busy machine.
    with threadpool_limits(limits=1, user_api="blas"):
        return _fit(measured, seed)


def _fit(measured: Measured, seed: int) -> Predictor:
    work, as_measured = measured.work, measured.latency_ms
    folds = _folds(len(as_measured), measured.networks, seed)
    everything = np.ones(len(as_measured), np.bool_)
    held: dict[str, Array] = {}
    final: dict[str, Callable[[], Predict]] = {}
    profiled = np.array([t is not None for t in measured.timed])
    by_units = bool(profiled.sum() >= LEAST_POINTS) and _all_learned(measured, profiled)
    measured = _of_one_level(measured, profiled if by_units else None, folds)
    latency_ms = measured.latency_ms
    units: InSitu | None = None
    if by_units:
        units = _learned(measured, everything & profiled)
        sums, features = _out_of_fold_units(measured, profiled, folds)
        held["units"] = sums * _scales(sums, latency_ms, folds)
        held["units × Gaussian process"] = _crossed(
            lambda use: _corrected(sums, features, latency_ms, use), sums, features, folds
        )
        tables = Tables(measured.worker, units)
        final["units"] = lambda: _scaled(tables, _scale(sums, latency_ms))
        final["units × Gaussian process"] = lambda: _unit_process(
            tables, _corrected(sums, features, latency_ms, everything)
        )
    for name, make in AGGREGATES.items():
        columns = columns_of(work)
        terms = aggregate(work, columns)
        held[name] = out_of_fold(make, terms, latency_ms, folds)
        final[name] = lambda make=make, terms=terms, columns=columns: of_terms(
            measured.worker, make(terms, latency_ms), columns
        )
    errors = {name: float(np.mean(np.abs(h / latency_ms - 1))) for name, h in held.items()}
    design = min(errors, key=lambda name: errors[name])
    # Against what was measured: another hour has a level of its own too.
    scores = np.abs(np.log(held[design] / as_measured))
    return Predictor(
        design=design, heldout=held_out(held[design], as_measured, scores), candidates=errors,
        out_of_fold=held[design], log_margin=conformal_margin(scores) + _level_margin(measured.looks_apart),
        _model=final[design](),
        _unseen=_unseen_by(measured.worker, columns_of(work) if units is None else {*units.kinds, *units.conversions}),
    )  # fmt: skip


def _folds(count: int, networks: NDArray[np.intp] | None, seed: int) -> NDArray[np.int64]:
    """The fold of each policy, shape (n,). Those of one network share theirs: by its twin, a policy would be known."""
    kinds = np.arange(count) if networks is None else networks
    if (different := len(np.unique(kinds))) < FOLDS:  # of so few there are no folds: all of them are known
        kinds, different = np.arange(count), count
    return (np.random.default_rng(seed).permutation(different) % FOLDS)[kinds]


def _unseen_by(worker: Worker, known: Container[str]) -> Callable[[Choices], str]:
    """Says which kind of kernel of a batch is not known."""

    def name(choices: Choices) -> str:
        work = worker.work(choices)
        for units in work.units:
            if units.kind not in known:
                operation = worker.anatomy.ops[units.site[0]].name
                return f"{operation} runs as {units.kind}, which no measured policy did"
        kind = next(kind for kind, amounts in work.conversions.items() if kind not in known and amounts[:, 0].any())
        return f"something is converted ({kind}), which no measured policy did"

    return name


def _level_margin(looks_apart: float) -> float:
    """What a device that changes its speed by itself adds, in the logarithm: all policies of a look share its level, so
    no error out of fold shows that the next hour may have another one."""
    return math.log1p(looks_apart) / 2 if looks_apart > LEAST_DRIFT else 0.0


def conformal_margin(scores: Array) -> float:
    """The ⌈(n+1)·0.9⌉-th smallest score: a new policy's error stays below it in 90 % of cases."""
    rank = min(len(scores), math.ceil((len(scores) + 1) * COVERAGE))
    return float(np.sort(scores)[rank - 1])


def held_out(predicted: Array, measured: Array, scores: Array) -> HeldOut:
    """Error figures; coverage leaves each point out of the margin that judges it."""
    errors = np.abs(predicted / measured - 1)
    covered = [scores[i] <= conformal_margin(np.delete(scores, i)) for i in range(len(scores))]
    return HeldOut(
        n=len(measured),
        mape=float(errors.mean()),
        within_5=float((errors <= 0.05).mean()),
        within_10=float((errors <= 0.10).mean()),
        spearman=spearman(predicted, measured),
        interval_coverage=float(np.mean(covered)),
    )


def spearman(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float:
    """Rank correlation; ties by order of appearance."""
    ranks = [np.argsort(np.argsort(np.asarray(v), kind="stable"), kind="stable") for v in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


# Levels of sessions


def _of_one_level(measured: Measured, profiled: Mask | None, folds: NDArray[np.int64]) -> Measured:
    """The latencies as if all had been timed in a session of the middle level; ``profiled`` None where units are not
    learned."""
    found = measured
    if len(np.unique(measured.sessions)) > 1:
        for _ in range(_LEVELLINGS):  # what is expected was learned from sessions of all levels
            if profiled is not None:
                expected = _out_of_fold_units(found, profiled, folds)[0]
            else:
                terms = aggregate(found.work, columns_of(found.work))
                expected = out_of_fold(physical, terms, found.latency_ms, folds)
            levels = session_levels(np.log(measured.latency_ms / expected), measured.sessions)
            found = replace(measured, latency_ms=measured.latency_ms * np.exp(-levels))
    return found


def session_levels(left: Array, sessions: NDArray[np.int64]) -> Array:
    """How much slower each policy's session was than the middle one, in the logarithm, shape (n,).

    ``left`` (n,): log of measured over expected latency. A session's level is the median of what it left, shrunk by
    how far medians of so many policies lie apart by chance (empirical Bayes; Efron and Morris 1975). The uncompressed
    model's own latency does not tell it: where a neighbour takes memory bandwidth, large fp32 weights slow down and
    small integer networks do not.
    """
    left = left - np.median(left)
    names, place, counts = np.unique(sessions, return_inverse=True, return_counts=True)
    medians = np.array([np.median(left[sessions == name]) if name >= 0 else 0.0 for name in names])
    within = _SPREAD * float(np.median(np.abs(left - medians[place])))
    by_chance = math.pi / 2 * within**2 / counts
    between = max(0.0, float(np.average(medians**2 - by_chance, weights=counts)))
    levels = (medians * between / (between + by_chance + 1e-12))[place]
    return np.where(sessions >= 0, levels - np.median(levels[sessions >= 0]), 0.0)


# Units


def _learned(measured: Measured, use: Mask) -> InSitu:
    return learn(measured.work, measured.timed, measured.latency_ms, use, measured.operations)


def _all_learned(measured: Measured, profiled: Mask) -> bool:
    """Whether each kind of kernel runs in a policy whose nodes were timed: a sum of units can say nothing of others."""
    learned, work = _learned(measured, profiled), measured.work
    converted = {name for name, amounts in work.conversions.items() if amounts[:, 0].any()}
    return converted <= learned.conversions.keys() and all(units.kind in learned.kinds for units in work.units)


def _out_of_fold_units(measured: Measured, profiled: Mask, folds: NDArray[np.int64]) -> tuple[Array, Array]:
    """Sums of units (n,) and their features (n, features) by models that had not seen the policy.

    A kind that only the left-out policies run is learned from them: it would be unseen otherwise.
    """
    whole = _learned(measured, profiled)
    sums, features = np.empty(len(folds)), np.empty((len(folds), 0))
    for fold in range(FOLDS):
        out = folds == fold
        learned = _learned(measured, profiled & ~out)
        complete = replace(
            learned, kinds={**whole.kinds, **learned.kinds}, conversions={**whole.conversions, **learned.conversions}
        )
        made = sums_of(complete.parts(measured.work), measured.work)
        sums[out] = made.total[out]
        found = _sum_features(made)
        if not features.shape[1]:
            features = np.empty((len(folds), found.shape[1]))
        features[out] = found[out]
    return np.maximum(sums, LEAST_MS), features


def _sum_features(sums: Sums) -> Array:
    """Logarithms of how the sum is made up, of kernels in all, and of the model's weights, shape (n, features)."""
    total = np.maximum(sums.total, LEAST_MS)
    logs = np.log(np.array([total, sums.nodes, sums.model_mb]))
    return np.concatenate([np.log(sums.groups / total + 0.02), logs]).T


def _scale(sums: Array, latency_ms: Array) -> float:
    return float(np.exp(np.median(np.log(latency_ms / sums))))


def _scales(sums: Array, latency_ms: Array, folds: NDArray[np.int64]) -> Array:
    """For each policy the scale that the policies of the other folds ask for."""
    found = np.array([_scale(sums[folds != fold], latency_ms[folds != fold]) for fold in range(FOLDS)])
    return found[folds]


def _corrected(sums: Array, features: Array, latency_ms: Array, use: Mask) -> Callable[[Array, Array], Array]:
    """Sums times a Gaussian process on their log residual."""
    process = process_on(features[use], np.log(latency_ms[use] / sums[use]))
    return lambda new, of: new * np.exp(process(of))


def _crossed(
    make: Callable[[Mask], Callable[[Array, Array], Array]], sums: Array, features: Array, folds: NDArray[np.int64]
) -> Array:
    held = np.empty(len(folds))
    for fold in range(FOLDS):
        out = folds == fold
        held[out] = make(~out)(sums[out], features[out])
    return np.maximum(held, LEAST_MS)


def _scaled(tables: Tables, scale: float) -> Predict:
    return lambda choices: tables.sums(choices).total * scale


def _unit_process(tables: Tables, correct: Callable[[Any, Array], Array]) -> Predict:
    def predict(choices: Choices) -> Array:
        sums = tables.sums(choices)
        seen, features = np.isfinite(sums.total), _sum_features(sums)
        return filled(seen, correct(sums.total[seen], features[seen]) if seen.any() else features[:0, 0])

    return predict
