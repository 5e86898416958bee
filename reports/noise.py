"""How much of a hypervolume is chance: the same front drawn again with the errors of its own measurements."""

import base64
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..search import pareto
from ..search.records import RunRecord, TrialRecord, Verified
from .front import Losses, Point, breaches, limits, reference, sides

DRAWS = 64
GAIN_DRAWS = 200
INTERVAL = 2 * 1.645
"""Standard deviations between the ends of a 90 % interval of a normal error."""


def hypervolume_errors(run: RunRecord) -> dict[str, float | None]:
    """Standard error of :func:`hypervolumes`, by the parametric bootstrap (Efron and Tibshirani 1993, ch. 6.5).

    Accuracies move by their standard error, measured latencies by their repeat error, predicted ones by their
    interval; sizes are exact. Only points that are not dominated now are drawn, so a hidden point that chance holds
    down is not counted: the error is a little too small. It is that of one side alone; points that are judged on the
    same items err together, so that their difference errs by less than both (:func:`gain_error`).
    """
    both, allowed = sides(run), limits(run)
    corner = reference(run, verified=both.verified)

    def error(pairs: Sequence[tuple[TrialRecord, Point]]) -> float | None:
        return hypervolume_error([pair for pair in pairs if not breaches(allowed, pair[1])], corner, both.verified)

    return {"search": error(both.search), "baselines": error(both.baselines)}


def gain_error(run: RunRecord) -> float | None:
    """Standard error of the search's relative hypervolume less the baselines'; None without a reference.

    All verified points answered the same test items: the items are drawn with replacement, the same for every point
    (non-parametric bootstrap), and each measured latency moves by its own error. Where some point's answers are not
    known, both sides err apart (:func:`hypervolume_errors`), which is too much for points that err alike.
    """
    both, allowed = sides(run), limits(run)
    corner = reference(run, verified=both.verified)
    if corner is None:
        return None
    search, rules = ([p for p in side if not breaches(allowed, p[1])] for side in (both.search, both.baselines))
    correct = _answers([trial.verified for trial, _ in (*search, *rules)]) if both.verified else None
    if correct is None:
        return math.hypot(*(error or 0.0 for error in hypervolume_errors(run).values()))
    losses = pareto.as_losses([found.losses for _, found in (*search, *rules)])
    latency_errors = np.array([_spread(trial, verified=True)[1] for trial, _ in (*search, *rules)])
    accuracy, items, rng = correct.mean(axis=1), correct.shape[1], np.random.default_rng(0)
    gains: list[float] = []
    for _ in range(GAIN_DRAWS):
        times_drawn = np.bincount(rng.integers(items, size=items), minlength=items).astype(np.float32)
        drawn = losses.copy()
        drawn[:, 0] -= correct @ times_drawn / items - accuracy
        drawn[:, 1] *= np.maximum(0.0, 1 + rng.normal(size=len(drawn)) * latency_errors)
        points = [(a, b, c) for a, b, c in drawn.tolist()]
        sides_drawn = (points[: len(search)], points[len(search) :])
        ours, theirs = (pareto.relative_hypervolume(side, corner) for side in sides_drawn)
        gains.append(ours - theirs)
    return float(np.std(gains, ddof=1))


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


def hypervolume_error(
    pairs: Sequence[tuple[TrialRecord, Point]], corner: Losses | None, verified: bool
) -> float | None:
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
