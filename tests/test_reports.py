"""The front, its picks, hypervolumes, the summary and the verdict, from records made by hand."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes_run import (
    INT8,
    REFERENCE,
    START,
    limited,
    measured,
    one_trial_run,
    original,
    policy,
    run,
    runs,
    trial,
    verify,
)
from nightpress.reports.covered import baseline_level, hypervolume_over_time, hypervolumes, reference
from nightpress.reports.front import (
    Point,
    breaches,
    candidates,
    compresses_nothing,
    feasible,
    front,
    limits,
    most_interesting,
    picked,
    picks,
    point,
    rule,
    search_point,
    shrinkage,
    speedup,
    uncompressed,
)
from nightpress.reports.noise import hypervolume_errors
from nightpress.reports.verdict import drop_points, findings
from nightpress.search import pareto
from nightpress.search.records import RunRecord, TrialRecord, TrialState


def numbers(trials: list[TrialRecord]) -> list[int]:
    return [record.number for record in trials]


# Candidates and the front


def test_before_verification_complete_and_known_trials_are_candidates() -> None:
    others = [
        trial(1, state=TrialState.STOPPED),
        trial(2, state=TrialState.RUNNING),
        trial(3, accuracy=None),
        trial(4, latency_ms=None),
        trial(5, size_bytes=None),
        trial(6, accuracy=math.nan),
        trial(7, latency_ms=math.inf),
    ]
    assert numbers(candidates(run([*others, trial(0), trial(8, role="baseline")]))) == [0, 8]


def test_once_something_is_verified_only_that_counts() -> None:
    records = [
        trial(0, 0.99, 0.1),
        verify(trial(1)),
        verify(original(number=2)),
        verify(trial(3), struck_out="slower"),
    ]
    assert numbers(candidates(run(records))) == [1, 2]


def test_a_verified_trial_is_known_by_its_export_and_not_by_the_search() -> None:
    record = verify(trial(0, 0.9, 0.5, 1000), size_bytes=1234)
    found = point(record)
    assert found == Point(0.9, 0.5 * 1.02, 1234)
    assert search_point(record) == Point(0.9, 0.5, 1000)


@pytest.mark.parametrize(
    ("limits", "within"),
    [
        ({}, True),
        ({"max_latency_ms": 0.5, "min_accuracy": 0.9, "max_size_bytes": 500_000}, True),
        ({"max_latency_ms": 0.49}, False),
        ({"min_accuracy": 0.901}, False),
        ({"max_size_bytes": 499_999}, False),
        ({"max_macs": 20_000_000}, True),
        ({"max_macs": 19_999_999}, False),
    ],
)
def test_limits_are_inclusive(limits: dict[str, float], within: bool) -> None:
    record = trial(0, 0.9, 0.5, 500_000, macs=20_000_000)
    assert feasible(limited([record], **limits), record) is within
    assert numbers(front(limited([record], **limits))) == ([0] if within else [])


@pytest.mark.parametrize(
    ("known", "within"),
    [({}, [1, 2]), ({"split_gap": 0.05}, [2]), ({"split_gap": 0.05, "long_gap": 0.01}, [1, 2])],
)
def test_before_verification_the_least_accuracy_is_asked_of_the_search_split_as_the_search_asks_it(
    known: dict[str, float], within: list[int]
) -> None:
    records = [trial(0, 0.89, 0.2), trial(1, 0.92, 0.3), trial(2, 0.96, 0.5)]
    night = run(records, config={"limits": {"min_accuracy": 0.9}}, state=known)

    assert numbers(front(night)) == within
    assert picks(night)["best"].number == within[0]


def test_search_and_baselines_stand_on_one_front_fastest_first() -> None:
    records = [
        original(),
        trial(1, 0.88, 0.4, 600_000),
        trial(2, 0.86, 0.5, 300_000),
        trial(3, 0.85, 0.6, 400_000),
    ]
    assert numbers(front(run(records))) == [1, 2, 0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_equal_trials_the_earlier_stays_on_the_front(order: tuple[int, int]) -> None:
    assert numbers(front(run([trial(number) for number in order]))) == [0]


def test_the_search_prefers_a_measured_latency_to_a_predicted_one() -> None:
    record = trial(0, 0.9, 0.5, 1000, measured=measured(0.7))
    assert search_point(record) == point(record) == Point(0.9, 0.7, 1000)


@given(runs())
def test_front_is_a_part_of_the_feasible_candidates_and_none_dominates_another(record: RunRecord) -> None:
    shown = front(record)
    points = {t.number: p.losses for t in candidates(record) if (p := point(t))}
    assert set(numbers(shown)) <= {t.number for t in candidates(record) if feasible(record, t)}
    for one, other in itertools.permutations(numbers(shown), 2):
        assert any(a < b for a, b in zip(points[one], points[other], strict=True))
    latencies = [points[number][1] for number in numbers(shown)]
    assert latencies == sorted(latencies)


@given(runs())
def test_whoever_is_not_on_the_front_is_no_better_than_one_who_is(record: RunRecord) -> None:
    shown = [p.losses for t in front(record) if (p := point(t))]
    for candidate in candidates(record):
        found = point(candidate)
        if found and feasible(record, candidate):
            assert any(all(a <= b for a, b in zip(one, found.losses, strict=True)) for one in shown)


@given(runs(), st.randoms(use_true_random=False))
def test_front_and_picks_do_not_depend_on_the_order(record: RunRecord, chance: random.Random) -> None:
    shuffled = list(record.trials)
    chance.shuffle(shuffled)
    other = replace(record, trials=tuple(shuffled))
    assert front(other) == front(record)
    assert picks(other) == picks(record)


# Picks


def test_default_choice_is_the_fastest_within_one_point_of_the_uncompressed_model() -> None:
    records = [
        original(0.9),
        trial(1, 0.85, 0.2, 100_000),
        trial(2, 0.89, 0.5, 300_000),
        trial(3, 0.905, 0.8, 600_000),
    ]
    chosen = picks(run(records))
    assert {name: record.number for name, record in chosen.items()} == {
        "best": 2,  # 1.0 point exactly is within
        "fastest": 2,
        "knee": 2,
        "accurate": 3,
    }
    assert rule(run(records)).words == "within 1.0 point of the uncompressed model's accuracy"


def test_a_drop_of_exactly_one_point_is_within_the_rule() -> None:
    accuracy = 0.5006
    assert accuracy - 0.01 > 0.4906  # in binary
    night = run([original(accuracy), trial(1, 0.4906, 0.3)])
    assert picks(night)["best"].number == 1


def test_a_limit_on_accuracy_replaces_the_one_point_rule() -> None:
    records = [original(0.9), trial(1, 0.85, 0.2, 100_000), trial(2, 0.89, 0.5, 300_000)]
    night = limited(records, min_accuracy=0.84)
    assert picks(night)["best"].number == 1
    assert rule(night) == (0.84, "within the limits (accuracy of at least 84.0 %)")


def test_the_better_of_two_uncompressed_baselines_is_the_measure() -> None:
    trained_on = original(0.92, number=1, name="uncompressed, trained on")
    records = [original(0.9), trained_on, trial(2, 0.905, 0.3), trial(3, 0.915, 0.5)]
    assert uncompressed(run(records)) == trained_on
    assert picks(run(records))["best"].number == 3


def test_uniform_compression_is_not_the_uncompressed_model() -> None:
    records = [
        trial(0, role="baseline", policy=INT8),
        trial(1, role="baseline", policy=policy({"stem": 0.5})),
    ]
    assert uncompressed(run(records)) is None
    assert compresses_nothing(trial(2, policy=policy({"stem": 0.0})))


def test_without_a_baseline_the_most_accurate_trial_is_the_measure() -> None:
    night = run([trial(0, 0.9, 0.6), trial(1, 0.895, 0.4), trial(2, 0.7, 0.1)])
    assert picks(night)["best"].number == 1
    assert rule(night).words == "within 1.0 point of the most accurate trial"


def test_no_default_choice_where_nothing_keeps_the_accuracy() -> None:
    night = limited([original(0.9, 1.0), trial(1, 0.8, 0.4)], max_latency_ms=0.5)
    assert set(picks(night)) == {"knee", "accurate"}
    assert "there is no default choice" in " ".join(findings(night))


@given(runs())
def test_picks_stand_on_the_front(record: RunRecord) -> None:
    shown, chosen = front(record), picks(record)
    assert all(one in shown for one in chosen.values())
    assert bool(chosen) == bool(shown)


def test_a_trial_that_is_picked_twice_is_listed_once() -> None:
    assert [(t.number, names) for t, names in picked(one_trial_run())] == [(0, ["best", "knee", "most accurate"])]


# Ratios


def test_ratio_is_the_interleaved_one_where_there_is_one() -> None:
    verified = verify(trial(1, 0.9, 0.5))
    night = run([verify(original(latency_ms=1.0)), verified])
    assert speedup(night, verified) == pytest.approx(0.87 / (0.5 * 1.02))
    assert shrinkage(night, verified) == 2.0


def test_a_point_is_compared_with_the_original_also_where_the_limits_strike_that_out() -> None:
    night = run([verify(original(0.9, latency_ms=1.0), struck_out="slower than allowed"), verify(trial(1, 0.895, 0.4))])
    beside = run([verify(original(0.9, latency_ms=1.0)), verify(trial(1, 0.895, 0.4))])
    assert shrinkage(night, night.trials[1]) == shrinkage(beside, beside.trials[1]) is not None
    assert drop_points(night, night.trials[1]) == drop_points(beside, beside.trials[1]) is not None


def test_ratio_of_a_prediction_is_against_the_uncompressed_baseline() -> None:
    night = run([original(latency_ms=1.0), trial(1, 0.9, 0.4)])
    assert speedup(night, night.trials[1]) == 2.5
    assert speedup(one_trial_run(), trial(0)) is None
    itself = verify(original(0.9))  # 1.02 ms, and 0.87 ms where it was measured beside itself
    assert speedup(run([itself]), itself) == 1
    assert shrinkage(one_trial_run(), trial(0)) is None


# Hypervolume


def test_hypervolume_of_search_and_baselines_apart() -> None:
    half = trial(1, 0.75, 0.5, 600_000)  # half of the box in each of three directions
    night = run([trial(0, 0.75, 0.5, 1_200_000, role="baseline"), half])
    assert hypervolumes(night) == {"search": pytest.approx(0.125), "baselines": 0.0}


@pytest.mark.parametrize(
    "reference",
    [
        None,
        {},
        {**REFERENCE, "latency_ms": None},
        {**REFERENCE, "latency_ms": math.nan},
        {**REFERENCE, "latency_ms": 0},
        {**REFERENCE, "accuracy": 1.0},
    ],
)
def test_without_a_usable_reference_point_hypervolume_is_unknown(reference: dict[str, float] | None) -> None:
    night = run([trial(0)], state={"reference": reference})
    assert hypervolumes(night) == {"search": None, "baselines": None}
    assert hypervolume_over_time(night) == []
    assert baseline_level(night) is None


def test_hypervolume_of_no_trial_is_unknown_and_of_none_within_the_limits_zero() -> None:
    night = limited([trial(0)], max_latency_ms=0.1)
    assert hypervolumes(night) == {"search": 0.0, "baselines": None}


def test_hypervolume_over_time_follows_the_clock_and_counts_complete_searched_trials() -> None:
    start = START.timestamp()
    records = [
        trial(0, role="baseline", finished=start + 1),
        trial(1, 0.8, 0.4, finished=start + 90),
        trial(2, 0.7, 0.6, finished=start + 30),
        trial(3, 0.7, 0.7, finished=start + 120),
        trial(4, state=TrialState.FAILED, finished=start + 10),
        trial(5, finished=None),
    ]
    steps = hypervolume_over_time(run(records))
    assert [step.seconds for step in steps] == [30, 90, 120]
    assert 0 < steps[0].hypervolume < steps[1].hypervolume == steps[2].hypervolume


@given(runs())
def test_hypervolume_over_time_never_falls_and_ends_at_the_whole(record: RunRecord) -> None:
    steps = hypervolume_over_time(record)
    values = [step.hypervolume for step in steps]
    assert values == sorted(values)
    allowed = limits(record)
    points = [
        p.losses
        for t in record.trials
        if t.role != "baseline" and t.state is TrialState.COMPLETE
        if (p := search_point(t)) and not breaches(allowed, p)
    ]
    corner = reference(record, verified=False)
    assert corner is not None
    assert (values[-1] if values else 0.0) == pytest.approx(pareto.relative_hypervolume(points, corner))


EASY = {"reference": {**REFERENCE, "accuracy": 0.9}, "given": {"search": {"accuracy": 1.0}, "test": {"accuracy": 0.85}}}
"""A network that knows the search split by heart."""


def test_verified_points_are_held_against_the_given_network_on_the_test_split() -> None:
    rule, searched = original(0.85, role="baseline", number=1), trial(2, 0.8, 0.5, 600_000)
    night = run([verify(rule), verify(searched, latency=measured(0.5))], state={**run().state, **EASY})
    assert reference(night, verified=True) == pytest.approx((-0.75, 1.0, 1_200_000))
    # A fifth of the way from 75 % to 100 %, half of the latency, half of the size.
    assert hypervolumes(night)["search"] == pytest.approx(0.2 * 0.5 * 0.5)
    assert (hypervolume_errors(night)["search"] or 0) > 0
    # Where a rule was not verified both sides stand as the search saw them, and so does the corner.
    partly = replace(night, trials=(*night.trials, trial(3, role="baseline")))
    assert hypervolumes(partly)["search"] == 0
    assert hypervolumes(replace(partly, trials=(trial(2, 0.95, 0.5, 600_000),)))["search"] == pytest.approx(0.125)
    older = replace(night, state={**night.state, "given": None})
    assert reference(older, verified=True) == reference(older, verified=False) == (-0.9, 1.0, 1_200_000)


def test_progress_is_told_in_the_box_of_the_search_split() -> None:
    records = [trial(0, 0.95, 0.5, 600_000, role="baseline"), verify(trial(1, 0.95, 0.5, 600_000))]
    night = run(records, state={**run().state, **EASY})
    assert baseline_level(night) == hypervolume_over_time(night)[-1].hypervolume == pytest.approx(0.125)


@pytest.mark.parametrize("least", [0.3, 0.6])
def test_the_users_least_accuracy_is_that_of_the_box(least: float) -> None:
    at = (1 + least) / 2
    searched = trial(1, at, 0.5, 600_000)
    network = {"search": {"accuracy": 0.6}, "test": {"accuracy": 0.55}}
    for record in (searched, verify(searched, latency=measured(0.5))):
        night = replace(limited([record], min_accuracy=least), state={**run().state, "given": network})
        assert hypervolumes(night)["search"] == pytest.approx(0.125)
    assert hypervolume_over_time(night)[-1].hypervolume == pytest.approx(0.125)


def test_a_picture_of_many_trials_keeps_the_front_and_what_was_verified() -> None:
    best, baseline = trial(0, 0.95, 0.1, 1000), original(0.5, 2.0, number=1)
    night = run([best, baseline, *(trial(n, 0.6, 1.5, 900_000) for n in range(2, 30))])
    assert numbers(most_interesting(night, 4)) == [0, 1, 28, 29]
    assert most_interesting(night, 30) == list(night.trials)
