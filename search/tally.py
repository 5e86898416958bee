"""What the driver asks of all trials after each one, kept up to date trial by trial: counting anew would make a night
slower the longer it lasts."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from .pareto import losses
from .records import TrialRecord, TrialState

Losses = tuple[float, float, float]
_DONE = (TrialState.COMPLETE, TrialState.STOPPED)


@dataclass(slots=True)
class Tally:
    """Figures over the trials that have ended. Trials whose measurements were reused count for ``begun`` only."""

    begun: int = 0
    """Trials that are no baselines, ended or not."""
    spans: list[float] = field(default_factory=list[float])
    """Seconds that each COMPLETE trial was evaluated for, ascending."""
    gains: list[float] = field(default_factory=list[float])
    """Accuracy of each COMPLETE trial at its last rung less that at its first, ascending."""
    front: list[Losses] = field(default_factory=list[Losses])
    """Losses of the COMPLETE trials that none dominates."""
    _done: dict[str, int] = field(default_factory=dict[str, int])

    def number_of(self, digest: str) -> int | None:
        """The first trial that measured the policy, None while none has."""
        return self._done.get(digest)

    def add(self, record: TrialRecord) -> None:
        """Count a trial that has ended."""
        if record.state in _DONE:
            self._done.setdefault(record.digest, record.number)
        if record.state is not TrialState.COMPLETE or record.reused_from is not None:
            return
        insort(self.spans, sum(q.seconds for q in record.qualities))
        if len(record.qualities) > 1:
            insort(self.gains, record.qualities[-1].accuracy - record.qualities[0].accuracy)
        self._join(record)

    def refront(self, records: Iterable[TrialRecord]) -> None:
        """The front anew, after a latency was measured."""
        self.front.clear()
        for record in records:
            if record.state is TrialState.COMPLETE and record.reused_from is None:
                self._join(record)

    def _join(self, record: TrialRecord) -> None:
        if record.quality is None or record.latency is None or record.size_bytes is None:
            return
        point = losses(record.quality.accuracy, record.latency.latency_ms, record.size_bytes)
        if any(all(a <= b for a, b in zip(other, point, strict=True)) for other in self.front):
            return
        self.front = [other for other in self.front if any(a < b for a, b in zip(other, point, strict=True))]
        self.front.append(point)
