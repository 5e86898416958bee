"""How much of a hypervolume is chance: the same front drawn again with the errors of its own measurements."""

import base64
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..search import pareto
from ..search.config import Limits
from ..search.records import RunRecord, TrialRecord, Verified
from .covered import reference, sides
from .front import Losses, Point, breaches, limits, only_beyond, point

DRAWS = 64
GAIN_DRAWS = 200
Pairs = Sequence[tuple[TrialRecord, Point]]
INTERVAL = 2 * 1.645
"""Standard deviations between the ends of a 90 % interval of a normal error."""


def hypervolume_errors(run: RunRecord) -> dict[str, float | None]:
    """Standard error of :func:`hypervolumes`, by the parametric bootstrap (Efron and Tibshirani 1993, ch. 6.5).

    Accuracies move by their standard error, measured latencies by their repeat error, predicted ones by their
    interval; sizes are exact. Only points that are not dominated now are drawn, so a hidden point that chance holds
    down is not counted: the error is a little too small. It is that of one side alone; points that are judged on the
    same items err together, so that their difference errs by less than both (:func:`gain_of`).
    """
    both = sides(run)
    corner, allowed = reference(run, verified=both.verified), limits(run, verified=both.verified)

    def error(pairs: Pairs) -> float | None:
        return hypervolume_error([pair for pair in pairs if not breaches(allowed, pair[1])], corner, both.verified)

    return {"search": error(both.search), "baselines": error(both.baselines)}


class Gain(NamedTuple):
    """One side's relative hypervolume less the other's, and how much of it is chance.

    ``luck`` is what chance alone would make of it, were no point better than those of the other side that it has to
    beat: of many noisy readings the best are too good, and the side with more points has more of them. ``error`` is the
    standard error of that. ``paired`` says that what both sides err on together is left out.
    """

    gain: float
    error: float
    luck: float
    paired: bool

    @property
    def shown(self) -> bool:
        """Whether what luck leaves of it is more than two standard errors: by chance in about one of twenty nights."""
        return self.gain - self.luck > 2 * self.error


def gain_of(run: RunRecord) -> Gain | None:
    """What the search covers more than the baselines; None without a reference."""
    both = sides(run)
    verified, corner = both.verified, reference(run, verified=both.verified)
    if corner is None:
        return None
    struck = [(trial, found) for trial in only_beyond(run) if (found := point(trial))] if verified else []
    search = [*both.search, *(pair for pair in struck if pair[0].role != "baseline")]
    rules = [*both.baselines, *(pair for pair in struck if pair[0].role == "baseline")]
    allowed = limits(run, verified=verified)
    return noise_of_gain(search, rules, corner, allowed, verified=verified, same_items=verified)


def noise_of_gain(
    one: Pairs, other: Pairs, corner: Losses, allowed: Limits, *, verified: bool, same_items: bool
) -> Gain:  # fmt: skip
    """What one side covers more than the other, beside what is drawn of it where it covers no more in truth: each point
    of the one side as accurate as the best of the other that is as fast and as small, unless it is surely worse (a test
    against the least favourable hypothesis; the bare spread of the gain called one of ten nights better in which no
    point was). A point counts in a draw where it is within the limits then: one that misses by a hair is a rival, too.

    With ``same_items`` all points answered the same test items: the items are drawn with replacement, the same for
    every point (non-parametric bootstrap), and each measured latency moves by its own error. Without, or where some
    point's answers are not known, each accuracy moves by its own error, which is too much for points that err alike.
    """
    most = np.array([
        math.inf if allowed.min_accuracy is None else -allowed.min_accuracy,
        allowed.max_latency_ms or math.inf, allowed.max_size_bytes or math.inf,
    ])  # fmt: skip
    one, other = ([pair for pair in side if _near(pair, most, verified)] for side in (one, other))
    losses = pareto.as_losses([found.losses for _, found in (*one, *other)])
    correct = _answers([trial.verified for trial, _ in (*one, *other)]) if same_items else None
    errors = np.array([_spread(trial, verified) for trial, _ in (*one, *other)]).reshape(-1, 2)

    def gain(points: npt.NDArray[np.float64]) -> float:
        within = np.asarray((points <= most).all(axis=1), np.bool_)
        ours, theirs = (
            pareto.relative_hypervolume([(a, b, c) for a, b, c in side.tolist()], corner)
            for side in (points[: len(one)][within[: len(one)]], points[len(one) :][within[len(one) :]])
        )
        return ours - theirs

    rng, drawn, no_better = np.random.default_rng(0), list[float](), losses.copy()
    no_better[: len(one), 0] = _no_better(losses, errors, len(one), corner)
    for _ in range(GAIN_DRAWS):
        moved = no_better.copy()
        if correct is not None:
            items = correct.shape[1]
            times_drawn = np.bincount(rng.integers(items, size=items), minlength=items).astype(np.float32)
            moved[:, 0] -= correct @ times_drawn / items - correct.mean(axis=1)
        else:
            moved[:, 0] += rng.normal(size=len(moved)) * errors[:, 0]
        moved[:, 1] *= np.maximum(0.0, 1 + rng.normal(size=len(moved)) * errors[:, 1])
        drawn.append(gain(moved))
    luck = max(0.0, float(np.mean(drawn)))
    return Gain(gain(losses), float(np.std(drawn, ddof=1)), luck, correct is not None)


def _near(pair: tuple[TrialRecord, Point], most: npt.NDArray[np.float64], verified: bool) -> bool:
    """Whether a point may be within the limits, ``most`` as losses, by three of its errors."""
    (accuracy_error, latency_error), found = _spread(pair[0], verified), np.array(pair[1].losses)
    return bool((found - 3 * np.array([accuracy_error, latency_error * found[1], 0]) <= most).all())


def _no_better(
    losses: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], count: int, corner: Losses
) -> npt.NDArray[np.float64]:
    """Accuracies as losses of the first ``count`` points, were they no better than what they have to beat, shape
    (count,)."""
    ours, theirs = losses[:count], losses[count:]
    as_fast = theirs[None, :, 1] <= ours[:, None, 1] * (1 + 2 * errors[:count, None, 1])
    rivals = as_fast & (theirs[None, :, 2] <= ours[:, None, 2])
    best = np.where(rivals, theirs[None, :, 0], corner[0]).min(axis=1, initial=corner[0])
    surely_worse = ours[:, 0] > best + 2 * errors[:count, 0]
    return np.where(surely_worse, ours[:, 0], best)


def _answers(points: Sequence[Verified | None]) -> npt.NDArray[np.float32] | None:
    """1 where a point answered an item rightly, shape (points, items); None unless all are known, of as many items."""
    items = {known.quality.samples if known else 0 for known in points}
    if len(items) != 1 or 0 in items:
        return None
    count = items.pop()
    rows: list[npt.NDArray[np.uint8]] = []
    for known in points:
        packed = base64.b64decode(known.answers) if known and known.answers else b""
        if len(packed) != -(-count // 8):
            return None
        rows.append(np.unpackbits(np.frombuffer(packed, np.uint8), count=count))
    return np.array(rows, np.float32)


def hypervolume_error(pairs: Pairs, corner: Losses | None, verified: bool) -> float | None:
    """Standard error of the relative hypervolume of these points; None without a point or a reference. ``verified``:
    they stand where the verification saw them, as far as it did, and not where the search did."""
    if corner is None or not pairs:
        return None
    losses = pareto.as_losses([found.losses for _, found in pairs])
    kept = pareto.non_dominated(losses)
    spread = np.array([_spread(pairs[i][0], verified) for i in kept])
    draws = np.random.default_rng(0).normal(size=(DRAWS, len(kept), 2)) * spread
    values: list[float] = []
    for moved in draws:
        drawn = losses[kept].copy()
        drawn[:, 0] += moved[:, 0]
        drawn[:, 1] *= np.maximum(0.0, 1 + moved[:, 1])
        values.append(pareto.relative_hypervolume([(a, b, c) for a, b, c in drawn.tolist()], corner))
    return float(np.std(values, ddof=1))


def _spread(trial: TrialRecord, verified: bool) -> tuple[float, float]:
    """Standard errors of the accuracy, and of the latency as a share."""
    known = trial.verified if verified else None
    quality, latency = trial.quality, trial.measured or trial.predicted
    if known is not None:
        quality, latency = known.quality, known.latency
    error = (quality.accuracy_se if quality else None) or 0.0
    if latency is None or latency.latency_ms <= 0:
        return error, 0.0
    if latency.measured and latency.repeat_error is not None:
        return error, latency.repeat_error
    return error, (latency.high_ms - latency.low_ms) / INTERVAL / latency.latency_ms
