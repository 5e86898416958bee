"""What the driver asks of all trials after each one, kept up to date trial by trial: counting anew would make a night
slower the longer it lasts."""

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .records import TrialRecord, TrialState

Losses = tuple[float, float, float]
RECENT = 300
_DONE = (TrialState.COMPLETE, TrialState.STOPPED)


@dataclass(slots=True)
class Tally:
    """Figures over the trials that have ended. Trials whose measurements were reused count for ``begun`` only."""

    begun: int = 0
    """Trials that are no baselines, ended or not."""
    changes: int = 0
    """How often those by which others are judged have changed."""
    spans: list[float] = field(default_factory=list[float])
    """Seconds that each COMPLETE trial was evaluated for, ascending."""
    front: list[tuple[Losses, TrialRecord]] = field(default_factory=list[tuple[Losses, TrialRecord]])
    """The COMPLETE trials that none dominates."""
    _recent: deque[TrialRecord] = field(default_factory=lambda: deque(maxlen=RECENT))
    _done: dict[str, int] = field(default_factory=dict[str, int])

    def number_of(self, digest: str) -> int | None:
        """The first trial that measured the policy, None while none has."""
        return self._done.get(digest)

    def judges(self) -> list[TrialRecord]:
        """COMPLETE trials by which others are judged: the front, and the last three hundred."""
        found = {record.number: record for record in self._recent} | {record.number: record for _, record in self.front}
        return list(found.values())

    def add(self, record: TrialRecord) -> None:
        """Count a trial that has ended."""
        if record.state in _DONE:
            self._done.setdefault(record.digest, record.number)
        if record.state is not TrialState.COMPLETE or record.reused_from is not None:
            return
        self.changes += 1
        insort(self.spans, sum(q.seconds for q in record.qualities))
        self._recent.append(record)
        self._join(record)

    def refront(self, records: Iterable[TrialRecord]) -> None:
        """The front and the judges anew, after a latency was measured."""
        self.changes += 1
        self.front.clear()
        known = {record.number: record for record in records}
        self._recent = deque((known.get(record.number, record) for record in self._recent), maxlen=RECENT)
        for record in known.values():
            if record.state is TrialState.COMPLETE and record.reused_from is None:
                self._join(record)

    def _join(self, record: TrialRecord) -> None:
        point = record.losses
        if point is None or any(all(a <= b for a, b in zip(other, point, strict=True)) for other, _ in self.front):
            return
        kept = [(other, at) for other, at in self.front if any(a < b for a, b in zip(other, point, strict=True))]
        self.front = [*kept, (point, record)]
