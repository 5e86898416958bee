"""What the stopping rule's own record counts as an error."""

from pathlib import Path

from nightpress.search.config import Limits
from nightpress.search.folder import read_run
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.records import TrialState
from nightpress.search.rungs import judge_stopping
from nightpress.search.stopping import wrongly
from test_search import quality
from test_search_model import MILD, trial
from test_trials import PLANNED, SPACE, begun

LATENCY = {"latency_ms": 0.1, "low_ms": 0.1, "high_ms": 0.1, "measured": False}


def test_a_trial_that_ends_below_the_limit_was_stopped_rightly() -> None:
    fastest = trial(20, macs=50_000, accuracies=(0.2, 0.6), latency_ms=0.05)
    within = trial(21, macs=50_000, accuracies=(0.2, 0.9), latency_ms=0.3)

    assert wrongly([*MILD, fastest, within], {20, 21}) == (0, 2, 2)
    assert wrongly([*MILD, fastest, within], {20, 21}, min_accuracy=0.8) == (0, 2, 1)
    assert wrongly([*MILD, fastest], {20}, min_accuracy=0.99) == (0, 1, 0)


def test_a_night_counts_by_the_limit_that_its_trials_were_stopped_by(tmp_path: Path) -> None:
    session = begun(tmp_path, PLANNED, limits=Limits(min_accuracy=0.9)).session
    for accuracy in (0.5, 0.95):
        asked = session.store.ask()
        session.store.begin(asked, SPACE.sample(TrialSuggest(asked)), 0.0)
        size_bytes = round(100_000 * accuracy)  # each is on the front of both
        session.store.note(asked.number, predicted=LATENCY, size_bytes=size_bytes, spared={"hope": 0.4})
        session.store.note_quality(asked.number, quality(accuracy))
        session.store.finish(asked.number, TrialState.COMPLETE, finished=1.0)

    judge_stopping(session)
    session.update()

    [told] = [d for d in read_run(tmp_path).decisions if "wrong" in d["evidence"]]
    assert (told["evidence"]["finished"], told["evidence"]["wrong"]) == (2, 1)
