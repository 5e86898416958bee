"""The night's clock: shares of the whole, what is left before later phases must start, and clocks that jump."""

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.cli.config import parse_until
from nightpress.search.clock import SHARES, Clock, Times, length
from nightpress.search.feedback import has_time

PHASES = ("inspect", "calibrate", "baselines", "sensitivity", "search", "finalists", "verify", "report")


@dataclass
class Machine:
    """A machine whose time a test moves: it works, it sleeps, and somebody sets its clock."""

    wall: float = 0.0
    awake: float = 0.0
    boot: float = 0.0

    def works(self, seconds: float) -> None:
        self.wall, self.awake, self.boot = self.wall + seconds, self.awake + seconds, self.boot + seconds

    def sleeps(self, seconds: float) -> None:
        self.wall, self.boot = self.wall + seconds, self.boot + seconds

    def is_set(self, seconds: float) -> None:
        self.wall += seconds

    @property
    def times(self) -> Times:
        return Times(lambda: self.wall, lambda: self.awake, lambda: self.boot)


def night(machine: Machine, seconds: float = 1000.0, *, fixed: bool = True) -> Clock:
    return Clock(machine.wall + seconds, fixed, machine.times)


@pytest.fixture
def berlin() -> Generator[None]:
    """Local time as in Berlin, whose clocks change in March and October."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def test_the_shares_are_those_of_one_whole_night() -> None:
    assert tuple(SHARES) == PHASES
    assert sum(SHARES.values()) == pytest.approx(1.0)
    assert night(Machine()).shares() == pytest.approx(dict(SHARES))


def test_another_calibration_has_to_leave_the_finalists_their_time() -> None:
    machine = Machine()
    clock = night(machine)
    machine.works(600)  # 40 s are left of the search, 280 s for the finalists, 80 s for what follows

    assert has_time(clock, 50.0)
    assert not has_time(clock, 60.0)
    machine.works(40)
    assert has_time(clock, 10.0)
    assert not has_time(clock, 20.0)


def test_time_passes() -> None:
    machine = Machine(wall=100.0)
    clock = night(machine)
    assert (clock.total_seconds, clock.left_seconds) == (1000.0, 1000.0)
    machine.works(500)
    assert (clock.total_seconds, clock.left_seconds, clock.spent_seconds) == (1000.0, 500.0, 500.0)
    machine.works(600)
    assert clock.left_seconds == -100.0
    assert clock.noticed() is None


def test_a_share_is_of_the_whole_night_and_does_not_shrink() -> None:
    machine = Machine()
    clock = night(machine)
    before = clock.share_seconds("search")
    machine.works(900)
    assert clock.share_seconds("search") == pytest.approx(before) == pytest.approx(1000 * SHARES["search"])


def test_later_phases_keep_their_time() -> None:
    machine = Machine()
    clock = night(machine)
    machine.works(400)
    later = 1000 * (SHARES["finalists"] + SHARES["verify"] + SHARES["report"])
    assert clock.left_before("finalists", "verify", "report") == pytest.approx(600 - later)
    assert clock.left_before() == 600.0


def test_what_a_phase_is_planned_to_take_counts_and_the_search_gets_the_rest() -> None:
    clock = night(Machine())
    clock.planned |= {"finalists": 100.0, "verify": 10.0}
    assert clock.left_before("finalists", "verify") == 890.0
    shares = clock.shares()
    assert shares["finalists"] == pytest.approx(0.1)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["search"] == pytest.approx(SHARES["search"] + 0.28 - 0.1 + 0.06 - 0.01)


def test_an_unknown_phase_is_an_error() -> None:
    with pytest.raises(KeyError, match="sleep"):
        night(Machine()).share_seconds("sleep")


@given(st.floats(0, 1e9), st.floats(1, 1e7), st.floats(0, 1))
def test_what_earlier_phases_leave_goes_to_the_search(start: float, total: float, used: float) -> None:
    """Phases that keep to their shares leave the search at least its own."""
    before = sum(SHARES[phase] for phase in ("inspect", "calibrate", "baselines", "sensitivity"))
    machine = Machine(wall=start)
    clock = night(machine, total)
    machine.works(used * before * total)
    left = clock.left_before("finalists", "verify", "report")
    assert left >= clock.share_seconds("search") - 1e-6 * (start + total)


def test_hours_asleep_shrink_what_is_still_to_come_and_leave_the_deadline() -> None:
    machine = Machine()
    clock = night(machine, 8 * 3600)
    machine.works(3600)
    assert clock.noticed() is None
    machine.sleeps(6 * 3600)

    assert clock.noticed() == "the machine slept for 6 h 0 min"
    assert clock.noticed() is None
    assert clock.left_seconds == 3600.0
    assert clock.total_seconds == 2 * 3600.0  # all that could be used
    assert clock.share_seconds("finalists") == pytest.approx(SHARES["finalists"] * 7200)
    assert clock.left_before("finalists", "verify", "report") > 0


@pytest.mark.parametrize(("moved", "word"), [(3600, "forward by 1 h 0 min"), (-1800, "back by 30 min 0 s")])
def test_a_clock_that_is_set_moves_the_end_of_a_budget_but_not_a_time_of_day(moved: float, word: str) -> None:
    for fixed in (True, False):
        machine = Machine(wall=1e9)
        clock = night(machine, 7200, fixed=fixed)
        machine.works(600)
        machine.is_set(moved)
        assert clock.noticed() == f"the clock was set {word}"
        assert clock.left_seconds == (6600 - moved if fixed else 6600)
        assert clock.spent_seconds == 600


def test_a_machine_may_sleep_and_wake_with_another_time() -> None:
    machine = Machine()
    clock = night(machine, 7200, fixed=False)
    machine.sleeps(100)
    machine.is_set(-50)
    assert clock.noticed() == "the machine slept for 1 min 40 s and the clock was set back by 50 s"
    assert clock.left_seconds == 7100


def test_a_correction_of_seconds_is_no_news() -> None:
    machine = Machine()
    clock = night(machine)
    machine.is_set(2)
    machine.sleeps(1)
    assert clock.noticed() is None


def test_the_deadline_is_told_with_its_zone(berlin: None) -> None:
    deadline = datetime.fromisoformat("2026-01-31T07:00:00.250+01:00")
    clock = Clock(deadline.timestamp(), times=Machine(wall=deadline.timestamp() - 29_000).times)
    assert clock.deadline_text() == "2026-01-31T07:00:00+01:00"
    assert clock.told() == "2026-01-31 07:00:00 CET (UTC+0100), in 8 h 3 min"


@pytest.mark.parametrize(
    ("evening", "hours"),
    [("2026-03-28T22:00+01:00", 8), ("2026-10-24T22:00+02:00", 10), ("2026-06-01T22:00+02:00", 9)],
)
def test_seven_o_clock_is_seven_o_clock_on_nights_when_the_clocks_change(
    berlin: None, evening: str, hours: int
) -> None:
    now = datetime.fromisoformat(evening).astimezone()
    assert parse_until("07:00", "--until", now) - now.timestamp() == hours * 3600


def test_the_machine_s_own_clocks_are_the_default() -> None:
    clock = Clock(time.time() + 60)
    assert clock.left_seconds == pytest.approx(60, abs=5)
    assert clock.spent_seconds == pytest.approx(0, abs=5)
    assert clock.noticed() is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59.4, "59 s"), (250, "4 min 10 s"), (29000, "8 h 3 min"), (-5, "0 s")]
)
def test_a_length_is_told_in_two_units(seconds: float, words: str) -> None:
    assert length(seconds) == words
