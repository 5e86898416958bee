"""The deadline and each phase's share of what is left. Wall time for the deadline, so that it holds in the morning;
spans come from the same clock, which callers may replace."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

# Shares of the whole night. What a phase does not use goes to the search, which takes all that is left
# before the finalists must start.
SHARES: Mapping[str, float] = {
    "inspect": 0.03,
    "calibrate": 0.10,
    "baselines": 0.15,
    "sensitivity": 0.07,
    "search": 0.29,
    "finalists": 0.28,
    "verify": 0.06,
    "report": 0.02,
}


@dataclass(frozen=True, slots=True)
class Clock:
    """``deadline`` in seconds since the epoch; ``now`` is an argument so that tests need not wait."""

    start: float
    deadline: float
    now: Callable[[], float] = time.time

    @property
    def left_seconds(self) -> float:
        return self.deadline - self.now()

    @property
    def total_seconds(self) -> float:
        return self.deadline - self.start

    def share_seconds(self, phase: str) -> float:
        """The phase's planned length."""
        return SHARES[phase] * self.total_seconds

    def left_before(self, *phases: str) -> float:
        """Seconds until these later phases must start so that they fit before the deadline."""
        return self.left_seconds - sum(self.share_seconds(p) for p in phases)

    def deadline_text(self) -> str:
        """ISO 8601 with the local zone said aloud."""
        return datetime.fromtimestamp(self.deadline).astimezone().isoformat(timespec="seconds")
