"""A long search looks at its target on the way: measurements are fed back, a drift is noticed while it counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.target import Target
from nightpress.search.clock import Clock, Times
from nightpress.search.feedback import measure_unseen
from nightpress.search.folder import read_run
from nightpress.search.loop import TARGET_LOOKS, search
from nightpress.search.session import Session
from nightpress.search.store import policy_of
from nightpress.search.trials import Trials
from nightpress.spaces.policy import network_digest
from test_feedback import Device, Paced, some
from test_loop import RUNGS
from test_trials import SPACE, asked, begun, sampler_of

pytestmark = pytest.mark.slow


def night(folder: Path, slower: float, *, seconds_each: float, most: int | None = None) -> Trials:
    """One whose device has changed its pace since it was calibrated; each job takes so many seconds of eight hours."""
    trials = begun(folder, dict(RUNGS), most=most, kind=Session)
    session = trials.session
    times, start = Times(), Times().wall()

    def spent() -> float:
        return seconds_each * len(asked(trials))

    clock = Times(lambda: start + spent(), lambda: times.awake() + spent(), lambda: times.awake() + spent())
    session.clock = Clock(start + 8 * 3600, times=clock)
    session.provide(places=Device(slower), sampler=sampler_of("random", 0, 0), measure_unseen=measure_unseen)
    session.keep_profile(calibrate(SPACE.anatomy, some(60, 0), Target(), timer=Paced(1.0)))
    return trials


def told(folder: Path, *words: str) -> list[dict[str, Any]]:
    return [dict(d) for d in read_run(folder).decisions if any(d["decision"].startswith(word) for word in words)]


def test_what_is_near_the_front_is_measured_while_the_search_goes_on(tmp_path: Path) -> None:
    trials = night(tmp_path, 1.0, seconds_each=120)

    search(trials.session, trials)

    [ended] = told(tmp_path, "ended the search")
    looks = told(tmp_path, "re-measured ")
    assert len(looks) == len(TARGET_LOOKS)
    assert all(look["time"] < ended["time"] for look in looks)
    measured = [t for t in trials.session.store.trials() if t.measured is not None]
    assert measured
    networks = [network_digest(policy_of(t)) for t in measured]
    assert set(networks) <= {network_digest(point.policy) for point in trials.session.profile.points}
    # Fine-tunes of one network are one network to the timer.
    times = {(network, t.measured.latency_ms) for network, t in zip(networks, measured, strict=True) if t.measured}
    assert len(times) == len(set(networks))


@pytest.mark.parametrize("slower", [1.2, 0.8])
def test_a_drift_in_the_middle_of_the_search_is_told_and_leaves_all_trials_at_one_pace(
    tmp_path: Path, slower: float
) -> None:
    trials = night(tmp_path, slower, seconds_each=120)

    search(trials.session, trials)

    assert told(tmp_path, "times are taken at the calibration's pace")
    measured = [t for t in trials.session.store.trials() if t.measured is not None and t.predicted is not None]
    ratios = [t.measured.latency_ms / t.predicted.latency_ms for t in measured if t.measured and t.predicted]
    assert len(ratios) >= 5
    assert float(np.median(ratios)) == pytest.approx(1, abs=0.03)


def test_where_trials_are_counted_nothing_is_measured_between_them(tmp_path: Path) -> None:
    trials = night(tmp_path, 1.2, seconds_each=600, most=30)

    search(trials.session, trials)

    assert not told(tmp_path, "re-measured ")
