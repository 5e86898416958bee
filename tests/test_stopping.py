"""What the stopping rule's own record counts as an error."""

from pathlib import Path

import pytest

from nightpress.search.config import Limits
from nightpress.search.folder import read_run
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.records import TrialState
from nightpress.search.rungs import judge_stopping
from nightpress.search.session import Session
from nightpress.search.split_gap import least_short
from nightpress.search.stopping import wrongly
from test_search import quality
from test_search_model import MILD, trial
from test_trials import PLANNED, SPACE, begun

LATENCY = {"latency_ms": 0.1, "low_ms": 0.1, "high_ms": 0.1, "measured": False}


def test_a_trial_that_ends_below_the_limit_was_stopped_rightly() -> None:
    fastest = trial(20, macs=50_000, accuracies=(0.2, 0.6), latency_ms=0.05)
    within = trial(21, macs=50_000, accuracies=(0.2, 0.9), latency_ms=0.3)

    assert wrongly([*MILD, fastest, within], {20: 0.7, 21: 0.7}) == (0, 2, 1, 2)
    assert wrongly([*MILD, fastest, within], {20: 0.7, 21: 0.7}, least=0.8) == (0, 2, 1, 1)
    assert wrongly([*MILD, fastest], {20: 0.7}, least=0.99) == (0, 1, 0, 0)


def ended(session: Session, accuracy: float, *, long: float | None = None, hope: float = 0.4) -> None:
    """A trial that was to be stopped and was finished all the same; each is smaller the less accurate it is."""
    asked = session.store.ask()
    session.store.begin(asked, SPACE.sample(TrialSuggest(asked)), 0.0)
    size_bytes = round(100_000 * accuracy)  # each is on the front of all
    session.store.note(asked.number, predicted=LATENCY, size_bytes=size_bytes, spared={"hope": hope})
    session.store.note_quality(asked.number, quality(accuracy))
    session.store.finish(asked.number, TrialState.COMPLETE, finished=1.0)
    if long is not None:
        session.store.note_long(asked.number, quality(long, rung="long"))


def test_a_night_counts_by_the_accuracy_that_its_trials_were_stopped_by(tmp_path: Path) -> None:
    session = begun(tmp_path, PLANNED, limits=Limits(min_accuracy=0.96)).session
    ended(session, 0.5)
    ended(session, 0.9)
    ended(session, 0.95, long=0.97)  # so what has 0.94 after the short fine-tune may come to 0.96

    judge_stopping(session)
    session.update()

    [told] = [d for d in read_run(tmp_path).decisions if "wrong" in d["evidence"]]
    assert (told["evidence"]["finished"], told["evidence"]["above"], told["evidence"]["wrong"]) == (3, 3, 1)
    assert "3 ended above what was hoped for and 1 came onto the front" in told["reason"]


def test_what_a_long_fine_tune_may_bring_within_the_limit_is_not_stopped_by_it(tmp_path: Path) -> None:
    session = begun(tmp_path, PLANNED, limits=Limits(min_accuracy=0.96)).session
    assert least_short(session) is None  # while nobody knows what a long one gives
    ended(session, 0.2, long=0.7)  # far below the limit: what it gained says nothing of those that reach it
    assert least_short(session) is None

    ended(session, 0.93, long=0.95)
    ended(session, 0.95, long=0.97)

    assert least_short(session) == pytest.approx(0.94)


def test_a_long_fine_tune_that_lost_something_does_not_raise_what_a_short_one_must_show(tmp_path: Path) -> None:
    session = begun(tmp_path, PLANNED, limits=Limits(min_accuracy=0.96)).session
    ended(session, 0.97, long=0.96)

    assert least_short(session) == 0.96
