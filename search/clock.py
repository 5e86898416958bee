"""The deadline, and each phase's share of what is left.

The deadline is wall time, so that it holds in the morning. Spans are counted while the machine is awake: hours that a
laptop slept were nobody's work, so they shrink all that is still to come alike. What a phase will really take is
planned anew as the night learns it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
ENDING = ("verify", "report")
"""Phases that must have their time whatever came before."""
NOTICED_SECONDS = 5.0
"""Sleeps and changes of the clock below this are nobody's business."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a night ends, in seconds since the epoch. ``fixed``: it is a time of day, which a change of the clock leaves
    where it is; otherwise it is the end of a span, which moves with the clock. ``given``: when somebody said so, in
    seconds since the epoch; a budget counts from then on, and a driver has much to import before its first phase."""

    epoch: float
    fixed: bool
    given: float = field(default_factory=time.time, compare=False)


def since_boot() -> float:
    """Seconds on a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Times:
    """The machine's three clocks, in seconds; arguments, so that tests need not wait.

    ``wall`` is set by people and by NTP, ``awake`` stands still while the machine sleeps, ``boot`` does neither.
    """

    wall: Callable[[], float] = time.time
    awake: Callable[[], float] = time.monotonic
    boot: Callable[[], float] = since_boot

    def __call__(self) -> tuple[float, float, float]:
        return self.wall(), self.awake(), self.boot()


@dataclass(slots=True)
class Clock:
    """``deadline`` and ``fixed`` as in :class:`Deadline`."""

    deadline: float
    fixed: bool = True
    times: Times = field(default_factory=Times)
    planned: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of the phases that were planned anew."""
    before: float = 0.0
    """Seconds of the night that had passed when this was made."""
    _start: float = 0.0
    _last: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        self._last = self.times()
        self._start = self._last[1]

    def now(self) -> float:
        """Wall time, in seconds since the epoch."""
        return self.times.wall()

    @property
    def left_seconds(self) -> float:
        return self.deadline - self.now()

    @property
    def spent_seconds(self) -> float:
        """Awake since the deadline was given."""
        return self.before + self.times.awake() - self._start

    @property
    def total_seconds(self) -> float:
        """The night's length as far as it can be used: what was spent and what is left."""
        return self.spent_seconds + max(0.0, self.left_seconds)

    def share_seconds(self, phase: str) -> float:
        """The phase's planned length. Raises KeyError for a phase that is none."""
        share = SHARES[phase] * self.total_seconds
        return self.planned.get(phase, share)

    def left_before(self, *phases: str) -> float:
        """Seconds until these later phases must start so that they fit before the deadline."""
        return self.left_seconds - sum(self.share_seconds(p) for p in phases)

    def shares(self) -> dict[str, float]:
        """Each phase's planned share of the night, adding up to 1: what the others do not take is the search's."""
        total = max(self.total_seconds, 1e-9)
        found = {phase: self.share_seconds(phase) / total for phase in SHARES}
        rest = 1 - sum(share for phase, share in found.items() if phase != "search")
        return found | {"search": max(0.0, rest)}

    def noticed(self) -> str | None:
        """What happened to the clocks since the last call, in a sentence; None when they go as they should."""
        before, self._last = self._last, self.times()
        wall, awake, boot = (now - then for now, then in zip(self._last, before, strict=True))
        slept, moved = boot - awake, wall - boot
        said: list[str] = []
        if slept > NOTICED_SECONDS:
            said.append(f"the machine slept for {length(slept)}")
        if abs(moved) > NOTICED_SECONDS:
            said.append(f"the clock was set {'forward' if moved > 0 else 'back'} by {length(abs(moved))}")
            if not self.fixed:
                self.deadline += moved
        return " and ".join(said) or None

    def deadline_text(self) -> str:
        """ISO 8601 with the local zone said aloud."""
        return datetime.fromtimestamp(self.deadline).astimezone().isoformat(timespec="seconds")

    def told(self) -> str:
        """The deadline for people: with the zone's name, and how long it is until then."""
        then = datetime.fromtimestamp(self.deadline).astimezone()
        return f"{then:%Y-%m-%d %H:%M:%S %Z (UTC%z)}, in {length(self.left_seconds)}"


def length(seconds: float) -> str:
    """``8 h 3 min``, ``4 min 10 s``, ``9 s``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
