"""When a trial is stopped at a cheap rung: optimistic dominance.

A trial is stopped only when even an optimistic extrapolation of it would be dominated by trials that went to the top.
Ranking by the cheap rung itself would throw away one end of the front, because there the harsh policies look worst and
gain most. So the gain is taken from what trials of this night gained that compress alike and stood alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .config import Limits
from .pareto import dominated_by, losses
from .records import NOT_CONTINUED, Rung, TrialRecord, TrialState

Array = NDArray[np.float64]
GAIN_QUANTILE = 0.9
PROSPECTS = (np.arange(10) + 0.5) / 10
"""Quantiles of the gains that stand for all of them."""
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


class Judge:
    """Judges trials at a cheap rung by what those of the night gained that went to the top.

    ``trials`` are all of the night, or enough of it; ``least`` is the accuracy after the short fine-tune below which
    no long one reaches the user's ``min_accuracy``, where that is known; ``part_steps`` is the length of the part of
    the short fine-tune that is a rung, where there is one. Rules with more work than ``limits`` allow tell of gains,
    but nothing is stopped for being no better than them: unlike what is too slow or too large, they may be faster and
    smaller than what is allowed.
    """

    def __init__(
        self, trials: Sequence[TrialRecord], least: float | None = None, part_steps: int | None = None,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self._full = [t for t in trials if t.state is TrialState.COMPLETE and t.reused_from is None]
        self._least, self._part_steps = least, part_steps
        self._gains: dict[str, _Gains] = {}
        allowed = [t for t in self._full if limits is None or not limits.too_much_work(t.macs)]
        self._losses = np.array([point for t in allowed if (point := t.losses)], dtype=np.float64).reshape(-1, 3)
        self.points = self._losses * np.array([-1.0, 1.0, 1.0])
        """Accuracy, latency in ms and size in bytes of the trials that went to the top, shape (n, 3)."""

    def verdict(self, record: TrialRecord) -> Verdict | None:
        """Whether a trial of the search is hopeless at the rung that it has reached; None while it is not, or while
        too little is known."""
        if record.role != "search" or record.quality is None or record.latency is None or record.size_bytes is None:
            return None
        hope = self.hope(record)
        if hope is None:
            return None
        if self._least is not None and hope < self._least:
            reason = f"even {hope:.4f} would be below {self._least:.4f}, from where none comes to min_accuracy"
            return Verdict(reason=reason, hope=hope)
        if dominated_by(losses(hope, record.latency.latency_ms, record.size_bytes), self._losses):
            return Verdict(reason=f"even {hope:.4f} would be dominated", hope=hope)
        return None

    def hope(self, record: TrialRecord) -> float | None:
        """The accuracy that a trial may well come to at the top, by trials that are alike, each counted by how much it
        is; None where too few are. The larger of what it shows with the 90 % quantile of their gains, and of where they
        ended: trials that look worse than all that are alike gained most of the way to these. By the gains alone, 14 of
        35 that were finished all the same ended above it.
        """
        alike = self._alike(record)
        if alike is None or record.quality is None:
            return None
        known, weights = alike
        share = np.array([GAIN_QUANTILE])
        gained = record.quality.accuracy + (record.quality.accuracy_se or 0.0) + _quantiles(known.gains, weights, share)
        return float(max(gained[0], _quantiles(known.there + known.gains, weights, share)[0]))

    def prospects(self, record: TrialRecord) -> Array | None:
        """What the trial's accuracy may be at the top: equally likely values, shape (m,); None where nobody knows."""
        alike = self._alike(record)
        if alike is None or record.quality is None:
            return None
        known, weights = alike
        return record.quality.accuracy + _quantiles(known.gains, weights, PROSPECTS)

    def _alike(self, record: TrialRecord) -> "tuple[_Gains, Array] | None":
        """Trials that went to the top from the record's rung, and how much each counts, shape (n,)."""
        if record.quality is None:
            return None
        rung = record.quality.rung
        if rung not in self._gains:
            self._gains[rung] = _gains_from(rung, self._full, self._part_steps)
        known = self._gains[rung]
        apart = ((known.places - _place(record)) ** 2).sum(axis=1) / COMPRESSION_REACH**2
        apart += (known.there - record.quality.accuracy) ** 2 / ACCURACY_REACH**2
        weights = np.exp(-apart / 2)
        return (known, weights) if weights.sum() >= LEAST_ALIKE else None


class _Gains(NamedTuple):
    """Of trials that went to the top: how hard they compress (n, 3), where they stood at a rung and what they gained
    from there."""

    places: Array
    there: Array
    gains: Array


def _gains_from(rung: str, full: Sequence[TrialRecord], part_steps: int | None) -> _Gains:
    known = [
        (_place(t), at, t.quality.accuracy - at)
        for t in full
        if t.quality is not None and t.quality.rung != rung and (at := accuracy_at(t, rung, part_steps)) is not None
    ]
    places, there, gains = zip(*known, strict=True) if known else ((), (), ())
    return _Gains(np.array(places).reshape(-1, 3), np.array(there), np.array(gains))


def accuracy_at(trial: TrialRecord, rung: str, part_steps: int | None) -> float | None:
    """What a trial showed at a rung. Trials of the study were looked at after so many steps without pausing there."""
    seen = next((q.accuracy for q in trial.qualities if q.rung == rung), None)
    if seen is None and rung == Rung.PART:
        return next((accuracy for step, accuracy in trial.looks if step == part_steps), None)
    return seen


def spared(digest: str) -> bool:
    """Whether a trial is one of the sample that is finished although the rule would stop it; by its policy, so that
    the same night spares the same."""
    return int(digest, 16) % SPARED == 0


class Errors(NamedTuple):
    """The rule's own record: trials that it stopped, and of those that it would have stopped and that were finished all
    the same how many ended ``above`` what was hoped for them, and how many on the front."""

    stopped: int
    finished: int
    above: int
    wrong: int


def wrongly(trials: Sequence[TrialRecord], hopes: Mapping[int, float], least: float | None = None) -> Errors:
    """``hopes``: by number of the trials that were spared. The front is of what reached ``least``, by which the judge
    stopped as well."""
    stopped = sum(t.state is TrialState.STOPPED and t.reason != NOT_CONTINUED for t in trials)
    ended = {t.number: point for t in trials if t.state is TrialState.COMPLETE and (point := t.losses)}
    front = np.array([point for point in ended.values() if -point[0] >= (least or -math.inf)]).reshape(-1, 3)
    finished = {number: point for number, point in ended.items() if number in hopes}
    return Errors(
        stopped=stopped, finished=len(finished),
        above=sum(-point[0] > hopes[number] for number, point in finished.items()),
        wrong=sum(
            -point[0] >= (least or -math.inf) and not dominated_by(point, front) for point in finished.values()
        ),
    )  # fmt: skip


def upper_bound(wrong: int, of: int) -> float:
    """Upper end of a one-sided 95 % interval of a share (Wilson 1927)."""
    if not of:
        return 1.0
    z, share = 1.645, wrong / of
    middle = share + z**2 / (2 * of)
    return (middle + z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))) / (1 + z**2 / of)


def _place(trial: TrialRecord) -> Array:
    """How hard a policy compresses: logarithms of what is left of work and weights; and in how many stages, because a
    part of a staged fine-tune shows a network whose last cut has just been made."""
    stages = trial.policy.get("finetune", {}).get("stages", 1)
    return np.array([math.log(max(trial.macs or 1, 1)), math.log(max(trial.params or 1, 1)), 0.5 * stages])


def _quantiles(values: Array, weights: Array, shares: Array) -> Array:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return values[order][np.searchsorted(total, shares * total[-1], side="left").clip(max=len(values) - 1)]
