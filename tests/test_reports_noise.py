"""The noise of the search's gain over the baselines: what both sides get wrong together cancels."""

import base64
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fakes_run import INT8, limited, measured, original, quality, run, trial, verify
from nightpress.reports.covered import hypervolumes
from nightpress.reports.noise import Gain, gain_of, hypervolume_errors
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


def gained(record: RunRecord) -> Gain:
    found = gain_of(record)
    assert found is not None
    return found


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
    assert 0 < gained(alike).error < 0.5 * apart(alike)


def test_sides_that_err_on_unrelated_items_have_the_noise_of_both() -> None:
    unrelated = night(some(0.8, 0), some(0.8, 1))
    assert gained(unrelated).error == pytest.approx(apart(unrelated), rel=0.25)


def test_the_latencies_of_both_sides_err_apart() -> None:
    exact = np.ones(ITEMS, np.bool_)
    noisy = night(exact, exact, repeat_error=0.05)
    assert 0.5 * apart(noisy) < gained(noisy).error < apart(noisy)  # of points that are no faster than their rivals
    assert gained(night(exact, exact)).error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("number", [0, 1])
def test_where_one_point_has_no_answers_both_sides_err_apart(number: int) -> None:
    correct = some(0.8, 0)
    older = without_answers(night(correct, correct), number)
    assert gained(older).error == pytest.approx(apart(older), rel=0.25)
    assert not gained(older).paired
    assert summary(older)["hypervolume"] == hypervolumes(older)["search"]
    assert any("the search beat the baselines" in said.lower() for said in findings(older))


def test_answers_to_another_number_of_items_are_not_paired() -> None:
    mixed = night(some(0.8, 0), some(0.8, 0, 8000))
    assert gained(mixed).error == pytest.approx(apart(mixed), rel=0.4)
    assert not gained(mixed).paired


def test_a_point_beyond_the_limits_needs_no_answers() -> None:
    correct = some(0.8, 0)
    within = night(correct, correct | some(0.02, 1))
    slow = verify(trial(2, 0.9, 5.0, 900_000))
    found = replace(limited([*within.trials, slow], max_latency_ms=1.0), state=within.state)
    assert gained(found) == gained(within)


def test_a_gain_that_is_alike_on_most_items_is_shown_and_without_the_answers_is_not() -> None:
    correct = some(0.8, 0)
    known = night(correct, correct | some(0.03, 1))
    small = replace(known, trials=tuple(replace(t, verified=replace(t.verified, size_bytes=900_000)) if t.verified
                                        else t for t in known.trials))  # fmt: skip
    assert any(said.startswith("The search beat the baselines") for said in findings(small))
    assert any("is not shown" in said for said in findings(without_answers(small, 1)))


@pytest.mark.slow
def test_finalists_no_better_than_the_rules_are_not_said_to_beat_them_for_being_many() -> None:
    """The best of three noisy readings is above one of the same accuracy, on average by the luck that is taken off."""
    generator, gains = np.random.default_rng(0), list[Gain]()
    for _ in range(20):
        difficulty = generator.normal(size=1000)

        def answers(easy: float, hard: npt.NDArray[np.float64] = difficulty) -> npt.NDArray[np.bool_]:
            return 0.85 * hard + math.sqrt(1 - 0.85**2) * generator.normal(size=1000) < easy

        points = [original(0.9, 1.0)]
        for level, easy in enumerate((1.2, 1.15, 1.05, 0.95)):
            rule = trial(level + 1, 0.9, 0.5 - 0.1 * level, 400_000, role="baseline", name=f"rule {level}", policy=INT8)
            finalists = [trial(10 + 3 * level + i, 0.9, 0.5 - 0.1 * level, 400_000) for i in range(3)]
            points += [judged(record, answers(easy)) for record in (rule, *finalists)]
        points[0] = judged(points[0], answers(1.2))
        gains.append(gained(run(points)))

    assert sum(gain.gain > 2 * gain.error for gain in gains) > sum(gain.shown for gain in gains)
    assert sum(gain.shown for gain in gains) <= 2
    assert np.mean([gain.gain - gain.luck for gain in gains]) == pytest.approx(0, abs=0.005)


def test_a_rule_that_misses_the_limit_by_a_hair_is_a_rival_still() -> None:
    """Its accuracy is a reading, too: nothing is beaten by what is no more accurate than it."""
    rule = judged(original(0.8, 0.5), some(0.7999, 0))
    short = float(rule.verified.quality.accuracy) if rule.verified else 0.0
    struck = replace(rule, verified=replace(rule.verified, struck_out="below") if rule.verified else None)
    night = limited([struck, judged(trial(1, 0.8, 0.5, 1_000_000), some(0.801, 1))], min_accuracy=short + 0.0001)

    said = " ".join(findings(night))

    assert "is not shown" in said
    assert "The search beat" not in said


def test_on_the_split_on_which_the_search_chose_its_points_nothing_is_beaten() -> None:
    """The best of many equal trials reads above the rules by luck."""
    readings = np.random.default_rng(0).normal(0.8, 0.009, 80)
    same = [trial(n + 1, float(found), 0.5, 500_000) for n, found in enumerate(readings)]
    said = " ".join(findings(run([original(0.8, 0.5), *same])))
    assert "Its points were chosen on this very split, so this shows nothing yet." in said
    assert "The search covers " in said
    assert "beat" not in said
    assert "noise" not in said
