"""The noise of the search's gain over the baselines: what both sides get wrong together cancels."""

import base64
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fakes_run import limited, measured, original, quality, run, trial, verify
from nightpress.reports.front import hypervolumes
from nightpress.reports.noise import gain_error, hypervolume_errors
from nightpress.reports.summary import summary
from nightpress.reports.verdict import findings
from nightpress.search.records import RunRecord, TrialRecord

ITEMS = 10_000


def judged(record: TrialRecord, correct: npt.NDArray[np.bool_], repeat_error: float = 0.0) -> TrialRecord:
    """The trial verified on a test split, with a bit for each item."""
    known = quality(float(correct.mean()), rung="long", split="test", samples=len(correct), losses=0)
    latency = measured(record.predicted.latency_ms if record.predicted else 0.5, repeat_error=repeat_error)
    bits = base64.b64encode(np.packbits(correct).tobytes()).decode()
    return verify(record, quality=known, latency=latency, answers=bits)


def night(rule: npt.NDArray[np.bool_], searched: npt.NDArray[np.bool_], repeat_error: float = 0.0) -> RunRecord:
    return run([
        judged(original(0.8, 0.5), rule, repeat_error), judged(trial(1, 0.8, 0.5, 900_000), searched, repeat_error)
    ])  # fmt: skip


def apart(record: RunRecord) -> float:
    """The standard error of the gain, were both sides judged on items of their own."""
    return math.hypot(*(error or 0.0 for error in hypervolume_errors(record).values()))


def some(share: float, seed: int, items: int = ITEMS) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(items) < share


def without_answers(record: RunRecord, number: int) -> RunRecord:
    trials = [
        replace(t, verified=replace(t.verified, answers=None)) if t.verified and t.number == number else t
        for t in record.trials
    ]
    return replace(record, trials=tuple(trials))


def test_sides_that_err_on_the_same_items_gain_with_little_noise() -> None:
    correct = some(0.8, 0)
    alike = night(correct, correct | some(0.02, 1))
    assert 0 < (gain_error(alike) or 0.0) < 0.5 * apart(alike)


def test_sides_that_err_on_unrelated_items_have_the_noise_of_both() -> None:
    unrelated = night(some(0.8, 0), some(0.8, 1))
    assert gain_error(unrelated) == pytest.approx(apart(unrelated), rel=0.25)


def test_the_latencies_of_both_sides_err_apart() -> None:
    exact = np.ones(ITEMS, np.bool_)
    noisy = night(exact, exact, repeat_error=0.05)
    assert gain_error(noisy) == pytest.approx(apart(noisy), rel=0.25)
    assert gain_error(night(exact, exact)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("number", [0, 1])
def test_where_one_point_has_no_answers_both_sides_err_apart(number: int) -> None:
    correct = some(0.8, 0)
    older = without_answers(night(correct, correct), number)
    assert gain_error(older) == apart(older) > 0
    assert summary(older)["hypervolume"] == hypervolumes(older)["search"]
    assert any("the search beat the baselines" in said.lower() for said in findings(older))


def test_answers_to_another_number_of_items_are_not_paired() -> None:
    mixed = night(some(0.8, 0), some(0.8, 0, 8000))
    assert gain_error(mixed) == apart(mixed)


def test_a_point_beyond_the_limits_needs_no_answers() -> None:
    correct = some(0.8, 0)
    within = night(correct, correct | some(0.02, 1))
    slow = verify(trial(2, 0.9, 5.0, 900_000))
    found = replace(limited([*within.trials, slow], max_latency_ms=1.0), state=within.state)
    assert gain_error(found) == gain_error(within)


def test_a_gain_that_is_alike_on_most_items_is_shown_and_without_the_answers_is_not() -> None:
    correct = some(0.8, 0)
    known = night(correct, correct | some(0.03, 1))
    small = replace(known, trials=tuple(replace(t, verified=replace(t.verified, size_bytes=900_000)) if t.verified
                                        else t for t in known.trials))  # fmt: skip
    assert any(said.startswith("The search beat the baselines") for said in findings(small))
    assert any("is not shown" in said for said in findings(without_answers(small, 1)))


def test_on_the_split_on_which_the_search_chose_its_points_nothing_is_beaten() -> None:
    """The best of many equal trials reads above the rules by luck."""
    readings = np.random.default_rng(0).normal(0.8, 0.009, 80)
    same = [trial(n + 1, float(found), 0.5, 500_000) for n, found in enumerate(readings)]
    said = " ".join(findings(run([original(0.8, 0.5), *same])))
    assert "Its points were chosen on this very split, so this shows nothing yet." in said
    assert "The search covers " in said
    assert "beat" not in said
    assert "noise" not in said
