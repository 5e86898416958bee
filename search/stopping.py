"""When a trial is stopped at a cheap rung: optimistic dominance.

A trial is stopped only when even an optimistic extrapolation of it would be dominated by trials that went to the top.
Ranking by the cheap rung itself would throw away one end of the front, because there the harsh policies look worst and
gain most. So the gain is taken from what trials of this night gained that compress alike and stood alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pareto import dominated_by, losses
from .records import Quality, TrialRecord, TrialState

Array = NDArray[np.float64]
GAIN_QUANTILE = 0.9
LEAST_ALIKE = 4.0
"""Effective number of alike trials below which nobody knows what a trial may gain."""
COMPRESSION_REACH = 0.5
"""Policies whose logarithms of MACs and parameters differ by this are hardly alike any more."""
ACCURACY_REACH = 0.15
SPARED = 8
"""One of so many trials that would be stopped is finished all the same, to count the errors of the rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a trial should be stopped, and the accuracy that was hoped for it."""

    reason: str
    hope: float


def verdict(record: TrialRecord, trials: Sequence[TrialRecord], min_accuracy: float | None) -> Verdict | None:
    """Whether a trial of the search is hopeless at the rung that it has reached; None while it is not, or while too
    little is known. ``trials`` are all of the night."""
    if record.role != "search" or record.quality is None or record.latency is None or record.size_bytes is None:
        return None
    full = [t for t in trials if t.state is TrialState.COMPLETE and t.reused_from is None]
    gain = likely_gain(record, full)
    if gain is None:
        return None
    hope = record.quality.accuracy + gain + (record.quality.accuracy_se or 0.0)
    if min_accuracy is not None and hope < min_accuracy:
        return Verdict(reason=f"even {hope:.4f} would be below min_accuracy {min_accuracy}", hope=hope)
    front = np.array(
        [losses(t.quality.accuracy, t.latency.latency_ms, t.size_bytes)
         for t in full if t.quality and t.latency and t.size_bytes]
    )  # fmt: skip
    if dominated_by(losses(hope, record.latency.latency_ms, record.size_bytes), front):
        return Verdict(reason=f"even {hope:.4f} would be dominated", hope=hope)
    return None


def likely_gain(record: TrialRecord, full: Sequence[TrialRecord]) -> float | None:
    """The 90 % quantile of the gains from the record's rung to the top of trials that are alike, each counted by how
    much it is; None where too few are."""
    rung = record.quality.rung if record.quality else ""
    rows = [(_place(t), _at(t, rung), t.quality) for t in full]
    known = [(place, at, top) for place, at, top in rows if at is not None and top is not None and top.rung != rung]
    if not known or record.quality is None:
        return None
    places = np.array([place for place, _, _ in known])
    there = np.array([at.accuracy for _, at, _ in known])
    gains = np.array([top.accuracy - at.accuracy for _, at, top in known])
    apart = ((places - _place(record)) ** 2).sum(axis=1) / COMPRESSION_REACH**2
    apart += (there - record.quality.accuracy) ** 2 / ACCURACY_REACH**2
    weights = np.exp(-apart / 2)
    if weights.sum() < LEAST_ALIKE:
        return None
    return _quantile(gains, weights, GAIN_QUANTILE)


def spared(digest: str) -> bool:
    """Whether a trial is one of the sample that is finished although the rule would stop it; by its policy, so that
    the same night spares the same."""
    return int(digest, 16) % SPARED == 0


def wrongly(trials: Sequence[TrialRecord], hopes: dict[int, float]) -> tuple[int, int, int]:
    """(stopped, finished all the same, of these on the front or above what was hoped), the rule's own record.

    ``hopes`` maps the number of a trial that was spared to the accuracy that was hoped for it.
    """
    stopped = sum(t.state is TrialState.STOPPED for t in trials)
    ended = [t for t in trials if t.number in hopes and t.state is TrialState.COMPLETE]
    others = [
        losses(t.quality.accuracy, t.latency.latency_ms, t.size_bytes)
        for t in trials
        if t.state is TrialState.COMPLETE and t.quality and t.latency and t.size_bytes
    ]
    front = np.array(others)
    wrong = [
        t for t in ended
        if t.quality and t.latency and t.size_bytes
        and not dominated_by(losses(t.quality.accuracy, t.latency.latency_ms, t.size_bytes), front)
    ]  # fmt: skip
    return stopped, len(ended), len(wrong)


def upper_bound(wrong: int, of: int) -> float:
    """Upper end of a one-sided 95 % interval of a share (Wilson 1927)."""
    if not of:
        return 1.0
    z, share = 1.645, wrong / of
    middle = share + z**2 / (2 * of)
    return (middle + z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))) / (1 + z**2 / of)


def _place(trial: TrialRecord) -> Array:
    """How hard a policy compresses: logarithms of what is left of work and weights."""
    return np.log([max(trial.macs or 1, 1), max(trial.params or 1, 1)])


def _at(trial: TrialRecord, rung: str) -> Quality | None:
    return next((q for q in trial.qualities if q.rung == rung), None)


def _quantile(values: Array, weights: Array, share: float) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, share * total[-1], side="left").clip(max=len(values) - 1)])
