"""How much of a hypervolume is chance: the same front drawn again with the errors of its own measurements."""

from collections.abc import Sequence

import numpy as np

from ..search import pareto
from ..search.records import RunRecord, TrialRecord
from .front import Losses, Point, breaches, limits, reference, sides

DRAWS = 64
INTERVAL = 2 * 1.645
"""Standard deviations between the ends of a 90 % interval of a normal error."""


def hypervolume_errors(run: RunRecord) -> dict[str, float | None]:
    """Standard error of :func:`hypervolumes`, by the parametric bootstrap (Efron and Tibshirani 1993, ch. 6.5).

    Accuracies move by their standard error, measured latencies by their repeat error, predicted ones by their
    interval; sizes are exact. Only points that are not dominated now are drawn, so a hidden point that chance holds
    down is not counted: the error is a little too small.
    """
    both, allowed = sides(run), limits(run)
    corner = reference(run, verified=both.verified)

    def error(pairs: Sequence[tuple[TrialRecord, Point]]) -> float | None:
        return hypervolume_error([pair for pair in pairs if not breaches(allowed, pair[1])], corner, both.verified)

    return {"search": error(both.search), "baselines": error(both.baselines)}


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
