"""A night that was interrupted and resumed: its pauses are no work, and were not planned."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from fakes_run import START, run, trial
from nightpress.reports.clock import Clock, Pause, clock, started
from nightpress.reports.covered import hypervolume_over_time, late_gain
from nightpress.reports.figure_night import hypervolume_figure, hypervolume_info, noise_info, phases_info, phases_text
from nightpress.reports.verdict import doubts
from nightpress.search.records import RunRecord

BEGAN, HOUR, DAY = START.timestamp(), 3600.0, 24 * 3600.0


def night(**state: Any) -> RunRecord:
    """Two hours of trials that find something, a day's pause, and two hours of some that find nothing more."""
    moments = [BEGAN + 600 * i for i in range(1, 13)] + [BEGAN + DAY + 600 * i for i in range(1, 13)]
    trials = [
        trial(n, min(0.6 + 0.02 * n, 0.8), 0.5, started=moment - 500, finished=moment)
        for n, moment in enumerate(moments)
    ]
    seconds = {"calibrate": 0.1 * HOUR, "search": 3.7 * HOUR, "report": 0.2 * HOUR}
    deadline = (START + timedelta(hours=24 + 3)).isoformat()
    shares = {"search": 0.8, "report": 0.2}
    return run(trials, state={**run().state, "seconds": seconds, "deadline": deadline, "shares": shares, **state})


RESUMED = night(resumed=[BEGAN + DAY])


def test_the_plan_of_a_resumed_night_leaves_its_pause_out() -> None:
    info = phases_info(RESUMED)
    # Two hours before the pause, and three that it was given when it was resumed.
    assert info.planned == {"search": pytest.approx(4 * HOUR), "report": pytest.approx(HOUR)}
    assert "The night took 4 h 0 min" in phases_text(info)
    assert "5 h 0 min were planned" in phases_text(info)


def test_progress_is_told_in_hours_of_work() -> None:
    steps = hypervolume_over_time(RESUMED)
    assert [step.seconds for step in steps] == pytest.approx([600 * i for i in range(1, 25)])
    figure: Any = hypervolume_figure(hypervolume_info(RESUMED))
    assert max(figure.data[0].x) == pytest.approx(4)
    assert figure.layout.xaxis.title.text == "hours of work"


def test_the_last_quarter_is_one_of_the_work() -> None:
    """With the day between, all that the second night found came in the last quarter."""
    late = replace(RESUMED, trials=tuple(
        replace(t, qualities=(replace(t.qualities[0], accuracy=0.6 + 0.02 * min(n, 15)),))
        for n, t in enumerate(RESUMED.trials)
    ))  # fmt: skip
    assert late_gain(hypervolume_over_time(late)) == pytest.approx(0, abs=1e-9)
    assert "The search had not converged" not in " ".join(doubts(late))


def test_noise_stands_at_its_hour_of_work() -> None:
    look = {"time": BEGAN + DAY + 2 * HOUR, "reference_ms": 1.0}
    [sample] = noise_info(replace(RESUMED, state={**RESUMED.state, "noise": [look]})).samples
    assert sample.seconds == pytest.approx(4 * HOUR)


def test_a_night_that_was_resumed_twice_has_two_pauses() -> None:
    record = night(resumed=[BEGAN + 5 * HOUR, (START + timedelta(days=1)).isoformat(), None, BEGAN - HOUR])
    found = Clock(BEGAN, (Pause(BEGAN + 2 * HOUR, BEGAN + 5 * HOUR), Pause(BEGAN + 5 * HOUR, BEGAN + DAY)))
    assert clock(record) == found
    assert found.worked(BEGAN + HOUR) == HOUR
    assert found.worked(BEGAN + 6 * HOUR) == 2 * HOUR  # in the middle of a pause
    assert found.worked(BEGAN + DAY + HOUR) == 3 * HOUR


def test_a_night_that_was_not_resumed_has_no_pause_however_silent_it_was() -> None:
    quiet = [trial(0, finished=BEGAN + 600), trial(1, started=BEGAN + 5 * HOUR, finished=BEGAN + 6 * HOUR)]
    assert clock(run(quiet)) == Clock(BEGAN)
    assert clock(night(resumed=[])) == Clock(BEGAN)


def test_the_start_is_the_first_trials_where_the_run_does_not_say() -> None:
    assert started(run([trial(3), trial(1)], state={})) == trial(1).started
    assert started(run([trial(1)], state={"started": "not a time"})) == trial(1).started
    assert started(run()) == BEGAN
    assert clock(run(state={})) is None
