"""The clock of a night's work, which stands still between an interruption and ``--resume``."""

from typing import Any, NamedTuple

from ..search.records import RunRecord
from .text import seconds_since_epoch


class Pause(NamedTuple):
    """A time in which no driver worked, in seconds since the epoch."""

    begin: float
    end: float


class Clock(NamedTuple):
    """``start`` in seconds since the epoch."""

    start: float
    pauses: tuple[Pause, ...] = ()

    def worked(self, moment: float) -> float:
        """Seconds of work from the start until a moment, given in seconds since the epoch."""
        idle = sum(max(0.0, min(moment, pause.end) - pause.begin) for pause in self.pauses)
        return moment - self.start - idle


def started(run: RunRecord) -> float | None:
    """When the run started, in seconds since the epoch; its first trial's start where it does not say."""
    known = seconds_since_epoch(run.state.get("started"))
    if known is not None:
        return known
    return min((trial.started for trial in run.trials if trial.started is not None), default=None)


def clock(run: RunRecord) -> Clock | None:
    """The run's clock; None where nothing says when it started."""
    start = started(run)
    if start is None:
        return None
    signs = {start, *(sign for sign in _signs(run) if sign > start)}
    resumed = [m for moment in run.state.get("resumed", ()) if (m := seconds_since_epoch(moment)) is not None]
    # Nobody wrote down when the driver before ended: it was at work until its last sign at least.
    return Clock(start, tuple(Pause(max(s for s in signs.union(resumed) if s < m), m) for m in resumed if m > start))


def _signs(run: RunRecord) -> list[float]:
    """Moments at which the night recorded something, in seconds since the epoch."""
    own = [trial for trial in run.trials if trial.driver in {None, run.state.get("driver")}]
    moments: list[Any] = [moment for trial in own for moment in (trial.started, trial.finished)]
    moments += [entry.get("time") for entry in (*run.decisions, *(run.state.get("noise") or ()))]
    return [known for moment in moments if (known := seconds_since_epoch(moment)) is not None]
