"""When the front has stopped growing, and when it has not."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes_run import trial
from nightpress.search.plateau import LEAST_TRIALS, stalled
from nightpress.search.records import TrialRecord, TrialState

CORNER = (-0.5, 1.0, 1e6)


def trials(accuracies: list[float]) -> list[TrialRecord]:
    return [trial(n, accuracy, 0.5, 500_000) for n, accuracy in enumerate(accuracies)]


def test_a_search_that_finds_nothing_more_is_over_and_says_how_little_it_found() -> None:
    reason = stalled(trials([0.8, 0.9, *[0.85] * 2 * LEAST_TRIALS]), CORNER)
    assert reason is not None
    assert reason.startswith(f"the last {LEAST_TRIALS} trials let the hypervolume grow by 0.00%")


def test_a_late_find_keeps_it_going() -> None:
    flat = [0.8, *[0.7] * 2 * LEAST_TRIALS]
    assert stalled(trials([*flat, 0.9]), CORNER) is None
    assert stalled(trials([*flat, 0.9, *[0.7] * 2 * LEAST_TRIALS]), CORNER) is not None


def test_a_handful_of_trials_says_nothing() -> None:
    assert stalled(trials([0.9] * LEAST_TRIALS), CORNER) is None
    assert stalled([], CORNER) is None


def test_a_front_beyond_the_corner_is_none() -> None:
    assert stalled(trials([0.4] * 3 * LEAST_TRIALS), CORNER) is None


def test_repetitions_and_failures_are_no_evidence() -> None:
    known = trials([0.9] * 10)
    same = [trial(n, 0.9, 0.5, 500_000, reused_from=0) for n in range(10, 300)]
    failed = [trial(n, None, None, None, state=TrialState.FAILED) for n in range(300, 600)]
    assert stalled([*known, *same, *failed], CORNER) is None


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_search_that_grows_steadily_never_stalls(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rising = np.linspace(0.6, 0.95, 200) + generator.uniform(0, 0.005, 200)
    assert stalled(trials(list(rising)), CORNER) is None
