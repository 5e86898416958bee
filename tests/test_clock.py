"""The night's clock: shares of the whole, and what is left before later phases must start."""

from dataclasses import dataclass
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.search.clock import SHARES, Clock

PHASES = ("inspect", "calibrate", "baselines", "sensitivity", "search", "finalists", "verify", "report")


@dataclass
class ManualTime:
    """Time that a test moves."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_shares_are_those_of_one_whole_night() -> None:
    assert tuple(SHARES) == PHASES
    assert sum(SHARES.values()) == pytest.approx(1.0)


def test_time_passes() -> None:
    now = ManualTime(100.0)
    clock = Clock(start=100.0, deadline=1100.0, now=now)
    assert (clock.total_seconds, clock.left_seconds) == (1000.0, 1000.0)

    now.seconds = 600.0

    assert (clock.total_seconds, clock.left_seconds) == (1000.0, 500.0)
    now.seconds = 1200.0
    assert clock.left_seconds == -100.0


def test_a_share_is_of_the_whole_night_and_does_not_shrink() -> None:
    now = ManualTime()
    clock = Clock(start=0.0, deadline=1000.0, now=now)
    before = clock.share_seconds("search")
    now.seconds = 900.0
    assert clock.share_seconds("search") == before == pytest.approx(1000 * SHARES["search"])


def test_later_phases_keep_their_time() -> None:
    clock = Clock(start=0.0, deadline=1000.0, now=ManualTime(400.0))
    later = 1000 * (SHARES["finalists"] + SHARES["verify"] + SHARES["report"])
    assert clock.left_before("finalists", "verify", "report") == pytest.approx(600 - later)
    assert clock.left_before() == 600.0


def test_an_unknown_phase_is_an_error() -> None:
    with pytest.raises(KeyError, match="sleep"):
        Clock(start=0.0, deadline=1.0).share_seconds("sleep")


@given(st.floats(0, 1e9), st.floats(1, 1e7), st.floats(0, 1))
def test_what_earlier_phases_leave_goes_to_the_search(start: float, total: float, used: float) -> None:
    """Phases that keep to their shares leave the search at least its own."""
    before = sum(SHARES[phase] for phase in ("inspect", "calibrate", "baselines", "sensitivity"))
    clock = Clock(start=start, deadline=start + total, now=ManualTime(start + used * before * total))
    left = clock.left_before("finalists", "verify", "report")
    assert left >= clock.share_seconds("search") - 1e-6 * (start + total)


def test_the_deadline_is_told_with_its_zone() -> None:
    deadline = datetime.fromisoformat("2026-01-31T07:00:00.250+01:00")
    told = datetime.fromisoformat(Clock(start=0.0, deadline=deadline.timestamp()).deadline_text())
    assert told.tzinfo is not None
    assert told == deadline.replace(microsecond=0)


def test_wall_time_is_the_default() -> None:
    start = datetime.now().timestamp()
    assert Clock(start=start, deadline=start + 60).left_seconds == pytest.approx(60, abs=5)
