"""When to stop searching: the front's hypervolume has stopped growing."""

from collections.abc import Sequence

from .pareto import losses, relative_hypervolume
from .records import TrialRecord, TrialState

LEAST_TRIALS = 60
"""Trials without growth that mean anything; fewer are a run of bad luck."""
LEAST_SHARE = 0.4
"""Of all trials: a long search needs a long standstill before it is believed."""
GROWTH = 0.002
"""Relative growth over the window that counts as none: nobody would see it in the report."""


def stalled(
    trials: Sequence[TrialRecord], reference: tuple[float, float, float], patience: float = 1.0
) -> str | None:  # fmt: skip
    """Why the search may end, in a sentence; None while it still finds something.

    ``reference`` are losses (−accuracy, latency_ms, size_bytes). ``patience`` is the share of the usual standstill that
    is enough, where being wrong costs little. Latencies are the predicted ones where they are known,
    so that measuring a point is no growth.
    """
    done = [t for t in trials if t.state in {TrialState.COMPLETE, TrialState.STOPPED} and t.reused_from is None]
    window = int(patience * max(LEAST_TRIALS, int(LEAST_SHARE * len(done))))
    if len(done) <= window:
        return None
    before, now = (_covered(part, reference) for part in (done[:-window], done))
    if before <= 0 or now / before - 1 > GROWTH:
        return None
    return f"the last {window} trials let the hypervolume grow by {now / before - 1:.2%}, from {before:.4g}"


def _covered(trials: Sequence[TrialRecord], reference: tuple[float, float, float]) -> float:
    return relative_hypervolume(
        [losses(t.quality.accuracy, (t.predicted or t.latency).latency_ms, t.size_bytes)
         for t in trials if t.state is TrialState.COMPLETE and t.quality and t.latency and t.size_bytes], reference,
    )  # fmt: skip
