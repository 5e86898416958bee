"""The summary, its table and the verdict, from records made by hand."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from fakes_run import (
    INT8,
    empty_run,
    full_run,
    limited,
    measured,
    one_trial_run,
    original,
    quality,
    run,
    runs,
    trial,
    verify,
)
from nightpress.reports.front import candidates, picks, rule
from nightpress.reports.page import table_row
from nightpress.reports.summary import summary, summary_table
from nightpress.reports.verdict import answer, doubts, drop_points, findings, verdict
from nightpress.search.records import RunRecord, TrialRecord, TrialState


@pytest.mark.parametrize(("noted", "waiting"), [(1, 1), (5, 2), (None, 0), ("<b>", 0)])
def test_who_waits_is_counted_among_the_running(noted: object, waiting: int) -> None:
    trials = [replace(trial(n), state=TrialState.RUNNING) for n in range(2)]
    data = summary(run(trials, state={**run().state, "waiting": noted}))
    assert (data["trials"]["RUNNING"], data["waiting"]) == (2, waiting)


def test_summary_has_the_keys_that_scripts_rely_on() -> None:
    data = summary(full_run())
    assert list(data) == [
        "run",
        "state",
        "phase",
        "deadline",
        "trials",
        "waiting",
        "front",
        "baselines",
        "hypervolume",
        "baseline_hypervolume",
        "picks",
        "seconds",
        "forced",
    ]
    assert data["trials"] == {"COMPLETE": 59, "STOPPED": 2, "INFEASIBLE": 1, "FAILED": 1, "RUNNING": 0}
    assert set(data["picks"]) == {"best", "fastest", "knee", "accurate"}
    assert {
        "trial",
        "digest",
        "accuracy",
        "accuracy_se",
        "split",
        "rung",
        "latency_ms",
        "low_ms",
        "high_ms",
    } | {
        "measured",
        "size_bytes",
        "macs",
        "policy",
    } <= set(data["front"][0])
    assert [entry["name"] for entry in data["baselines"]][:2] == ["uncompressed", "uniform INT8"]


@pytest.mark.parametrize("make", [full_run, empty_run, one_trial_run])
def test_summary_is_json(make: Any) -> None:
    data = summary(make())
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_what_is_not_a_number_is_unknown_in_the_summary() -> None:
    night = run([trial(0, accuracy=math.nan, role="baseline")], state={"seconds": {"search": math.inf}})
    data = summary(night)
    assert data["baselines"][0]["accuracy"] is None
    assert data["seconds"] == {"search": None}
    assert (data["hypervolume"], data["state"], data["front"], data["picks"]) == (None, None, [], {})


@given(runs())
def test_every_run_has_a_summary_a_table_and_a_verdict(record: RunRecord) -> None:
    json.dumps(summary(record), allow_nan=False)
    json.dumps(summary_table(record), allow_nan=False)
    assert all(sentence.endswith(".") for sentence in verdict(record))


def test_table_holds_baselines_then_picks_once_each() -> None:
    records = [original(0.9), trial(1, 0.895, 0.5, 250_000), trial(2, 0.6, 0.45, 400_000)]
    table = summary_table(run(records))
    assert [(row["name"], row["picked"]) for row in table] == [
        ("uncompressed", ["most accurate"]),
        ("trial 1", ["best", "knee"]),
    ]
    assert table[1] == {
        "trial": 1,
        "name": "trial 1",
        "picked": ["best", "knee"],
        "accuracy_percent": pytest.approx(89.5),
        "se_points": pytest.approx(0.6854, abs=1e-3),
        "latency_ms": 0.5,
        "ratio": 2.0,
        "size_kb": 250.0,
        "size_ratio": 4.0,
        "split": "search",
        "on_front": True,
        "struck_out": None,
    }


# Verdict


def test_verdict_does_not_compare_the_uncompressed_model_with_itself() -> None:
    assert findings(run([original(0.9, 1.0)]))[0] == (
        "Best, knee, most accurate: uncompressed runs in 1.00 ms at 90.0 % ± 0.7 accuracy, in 1.00 MB."
    )


def test_verdict_says_what_you_get() -> None:
    night = run([verify(original(0.9, 0.87)), verify(trial(1, 0.895, 0.29, 250_000))])
    assert findings(night)[0] == (
        "Best, knee: trial 1 runs in 0.296 ms (2.9× as fast as the original) at 89.5 % ± 0.3 accuracy, "
        "0.5 points below the uncompressed model, in 250 kB (4.0× smaller)."
    )


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        (verify(trial(1, 0.9, 0.3, 200_000)), "The search beat the baselines: "),
        (trial(1, 0.6, 0.9, 999_000), "The search did not beat the baselines: it covers "),
        (trial(1, 0.4, 0.1, 999), "The search did not beat the baselines: it covers 0.0 %"),
        (
            trial(1, 0.9, 0.3, 200_000),
            "the fastest baseline is uniform INT8 with 0.500 ms: the best trial is 1.7× as fast",
        ),
        (trial(1, 0.6, 0.9, 999_000), "The default choice is a baseline: the search found nothing faster"),
    ],
)
def test_verdict_compares_with_uniform_compression(searched: TrialRecord, expected: str) -> None:
    rules = [original(0.9), trial(2, 0.898, 0.5, 300_000, role="baseline", name="uniform INT8", policy=INT8)]
    known = [verify(rule) for rule in rules] if searched.verified else rules
    assert expected in " ".join(findings(run([*known, searched])))


@pytest.mark.parametrize(
    ("night", "expected"),
    [
        (empty_run(), "No trial was recorded."),
        (
            run([trial(0, accuracy=None)]),
            "No trial has accuracy, latency and size all known; there is no front.",
        ),
        (
            run([verify(trial(0), struck_out="slower")]),
            "all known and passed verification; there is no front.",
        ),
        (
            limited([trial(0), trial(1, 0.9, 0.4)], max_latency_ms=0.3),
            "trial 1 comes nearest (0.400 ms, 90.0 %, 500 kB): 0.400 ms is over 0.300 ms by 33 %.",
        ),
        (limited([trial(0, 0.8)], min_accuracy=0.9), "No trial is within the limits"),
        (limited([trial(0)], max_size_bytes=10), "No trial is within the limits"),
        (run([original()]), "There is no trial of the search to compare with the baselines."),
        (run([original(0.5), trial(1, 0.5, 0.9)]), "Neither the search nor the baselines have a point"),
        (one_trial_run(), "There is no baseline to compare with."),
        (limited([original(), trial(1, 0.899, 0.4)], max_latency_ms=0.5), "No baseline is within 1.0 point"),
    ],
)
def test_verdict_says_what_is_missing(night: RunRecord, expected: str) -> None:
    assert expected in " ".join(findings(night))


def test_where_the_limits_struck_out_all_that_was_verified_the_nearest_is_named() -> None:
    near, far = (verify(trial(n, found, 0.4), struck_out="below") for n, found in ((1, 0.8996), (2, 0.8)))
    slower = verify(trial(3, 0.95, 0.9), struck_out="not surely faster than the original")
    wrong = verify(trial(4, 0.8999, 0.4), struck_out="agrees on only 80.0%", top1_agreement=0.8)
    said = "No trial is within the limits; trial 1 comes nearest (0.408 ms, 90.0 %, 500 kB): "
    assert findings(limited([far, near, slower, wrong], min_accuracy=0.9)) == [
        said + "90.0 % is under 90.0 % by 0.040 points."
    ]
    assert "0.408 ms is over 0.300 ms by 36 %; 90.0 % is under 91.0 % by 1.0 points." in " ".join(
        answer(limited([far, near], min_accuracy=0.91, max_latency_ms=0.3))
    )
    assert "passed verification; there is no front." in findings(limited([slower, wrong], min_accuracy=0.9))[0]


def with_state(**state: Any) -> RunRecord:
    records = [verify(trial(number)) for number in range(25)]
    return run(records, state={**run().state, **state}, target={"heldout": {"mape": 0.03, "n": 25}})


def test_the_answer_repeats_the_limits_and_names_the_default_choice() -> None:
    night = limited([original(0.9), trial(1, 0.895, 0.4, 250_000)], max_latency_ms=0.5, max_size_bytes=300_000)
    said = answer(night)
    assert said[:2] == [
        "Your limits: latency of at most 0.500 ms, size of at most 300 kB; 1 point that nothing beats is within them.",
        (
            "The fastest within 1.0 point of the uncompressed model's accuracy: trial 1 runs in 0.400 ms (2.5× as fast"
            " as the original) at 89.5 % ± 0.7 accuracy, 0.5 points below the uncompressed model, in 250 kB"
            " (4.0× smaller)."
        ),
    ]
    assert answer(run([original(0.9), trial(1, 0.895, 0.4)]))[0] == "You set no limits; 2 points are beaten by nothing."
    # Nothing keeps the accuracy: the answer says so first, and then what there is.
    lossy = run([verify(original(0.9), struck_out="slower"), verify(trial(1, 0.5, 0.4))])
    assert answer(lossy)[1].startswith("No point of the front is within 1.0 point of the uncompressed model's")


def test_no_speed_up_is_named_against_rules_of_which_some_were_not_verified() -> None:
    """A tight deadline leaves out just those."""
    int8 = trial(2, 0.898, 0.16, 300_000, role="baseline", name="uniform INT8", policy=INT8)
    night = run([verify(original(0.9)), verify(trial(1, 0.899, 0.15, 250_000)), int8])

    said = " ".join(findings(night))
    assert "How much faster it is than the fastest baseline is not known: uniform INT8 not verified." in said
    assert "By the same rule" not in said
    assert "By the same rule" in " ".join(findings(run([*night.trials[:2], verify(int8)])))


def test_the_table_says_which_split_an_accuracy_is_of() -> None:
    """Given weights remember the search split."""
    int8 = trial(2, 0.966, 0.16, 300_000, role="baseline", name="uniform INT8", policy=INT8, hopeless="too slow")
    night = run([verify(original(0.9)), int8])
    assert [line["split"] for line in summary_table(night)] == ["test", "search"]
    assert table_row(night, int8, (), on_front=False).note.endswith("accuracy of the search split, not compared")


def test_a_gain_is_judged_by_its_noise() -> None:
    int8 = verify(trial(2, 0.898, 0.5, 300_000, role="baseline", name="uniform INT8", policy=INT8))
    near, far = (run([verify(original(0.9)), verify(trial(1, 0.898, ms, 300_000)), int8]) for ms in (0.498, 0.05))
    # Within the noise nothing was beaten, and gain and noise are told in the same unit.
    assert "Whether the search beat the baselines is not shown" in (said := " ".join(findings(near)))
    assert " is no more than the " in said
    assert "The search beat the baselines: " not in said
    assert "The search beat the baselines: " in (said := " ".join(findings(far)))
    assert " is more than the " in said


def test_a_rule_that_was_not_worth_a_long_fine_tune_does_not_spoil_the_comparison() -> None:
    reason = "expected to end below min_accuracy 0.85: 0.700 ± 0.050"
    int8 = verify(trial(3, 0.898, 0.5, 300_000, role="baseline", name="uniform INT8", policy=INT8))
    beside = [verify(original(0.9)), verify(trial(1, 0.9, 0.05, 200_000)), int8]
    rule = trial(2, 0.6, 0.02, 100_000, role="baseline", name="uniform 25% INT8", policy=INT8)
    known, left_out = (limited([*beside, replace(rule, hopeless=why)], min_accuracy=0.85) for why in (reason, None))

    assert "The search beat the baselines: " in (said := " ".join(findings(known)))
    assert "not all baselines are verified" not in said
    assert "not all baselines are verified" in " ".join(findings(left_out))
    assert any(
        doubt.startswith("Not trained long, since they could not come within the limits: uniform 25% INT8")
        for doubt in doubts(known)
    )
    [row] = [row for row in summary_table(known) if row["name"] == "uniform 25% INT8"]
    assert row["struck_out"] == reason
    assert 2 not in {t.number for t in candidates(known)}


def test_a_night_without_a_fault_raises_no_doubt() -> None:
    assert doubts(with_state(noise=[{"repeat_error": 0.05}, {"repeat_error": None}])) == []


@pytest.mark.parametrize(
    ("night", "expected"),
    [
        (
            with_state(noise=[{"repeat_error": 0.051}, {"repeat_error": 0.01}]),
            "over 5.0 % in 1 of 2 measurements (worst 5.1 %)",
        ),
        (
            with_state(state="interrupted", phase="search"),
            "The run did not reach its end: it is interrupted in phase search.",
        ),
        (with_state(state="running", phase="search"), "The run is not over; it is still in phase search."),
        (with_state(state="running", phase=None), "The run is not over; it is still going."),
        (
            replace(with_state(), target={"heldout": {"mape": 0.11, "n": 25}}),
            "11.0 % off on 25 models that it had not seen",
        ),
        (
            replace(with_state(), target={"looks_apart": 0.051}, config={"target_profile": "here.json"}),
            "two looks at the same models differ by 5.1 % as a whole",
        ),
        (replace(with_state(), unreadable=("line 7",)), "1 record could not be read: line 7."),
        (
            with_state(noise=[{"reference_ms": 1.0}, {"reference_ms": 1.11}]),
            "The machine drifted: the uncompressed model took between 1.00 and 1.11 ms over the night",
        ),
        (
            run([trial(n, 0.6 + n / 100, 0.5 - n / 100) for n in range(20)]),
            "The search had not converged: the last quarter of its time still added",
        ),
        (
            run([verify(trial(0), quality=quality(0.9, rung="long", split="test", losses=4))]),
            "The long fine-tunes had not converged: their loss still fell by",
        ),
        (
            one_trial_run(),
            "No trial of the search was exported and re-measured; the front rests on the search split.",
        ),
        (run([verify(original()), trial(1)]), "the front shows verified baselines alone"),
        (one_trial_run(), "Few trials: the search completed only 1."),
        (one_trial_run(), "Accuracies rest on 2,000 examples: chance alone moves them by ± 1.3 points"),
        (
            run([trial(0, state=TrialState.FAILED, reason="ValueError: x")]),
            "1 trial of 1 failed: ValueError: x.",
        ),
        (
            run([trial(n, state=TrialState.FAILED) for n in (0, 1)]),
            "most often (2 times): no reason recorded.",
        ),
        (run([verify(trial(0), struck_out="slower")]), "Struck out by verification: trial 0."),
        (full_run(), "repeat error was over 5.0 % in 1 of 15 measurements (worst 7.1 %)"),
    ],
)
def test_doubts(night: RunRecord, expected: str) -> None:
    assert expected in " ".join(doubts(night))


def test_an_original_beyond_the_limits_is_no_doubt() -> None:
    night = run([verify(original(), struck_out="measured 1.000 ms, above max_latency_ms 0.5"), verify(trial(1))])
    assert "Struck out" not in " ".join(doubts(night))


def test_an_original_whose_export_is_wrong_is_a_doubt() -> None:
    wrong = verify(original(), struck_out="agrees on only 80.0%", top1_agreement=0.8)
    assert "Struck out by verification: uncompressed" in " ".join(doubts(run([wrong, verify(trial(1))])))


def test_best_keeps_the_accuracy_of_an_original_that_the_limits_strike_out() -> None:
    """2.9 points below it is no default, however fast."""
    struck = verify(original(0.9), struck_out="measured 1.000 ms, above max_latency_ms 0.6")
    night = limited([struck, verify(trial(1, accuracy=0.871, latency_ms=0.3)), verify(trial(2, accuracy=0.88,
                    latency_ms=0.5))], max_latency_ms=0.6)  # fmt: skip
    assert "best" not in picks(night)
    assert rule(night).words == "within 1.0 point of the uncompressed model's accuracy"


@pytest.mark.parametrize(("counted", "best", "drop"), [(0.888, False, 1.55), (None, True, 0.95)])
def test_a_drop_is_counted_against_the_better_of_the_given_and_the_trained_weights(
    counted: float | None, best: bool, drop: float
) -> None:
    """The given network had 88.8 %, and 88.2 after the extra training: no trial may gain by what that cost."""
    night = run([verify(original(0.882)), verify(trial(1, 0.8725, 0.3))])
    night = replace(night, state={**night.state, "reference_accuracy": {
        "given": 0.888, "trained_longer": 0.882, "counted": counted,
    }})  # fmt: skip

    assert (picks(night).get("best") is night.trials[1]) is best
    assert drop_points(night, night.trials[1]) == pytest.approx(-drop)
    assert drop_points(night, night.trials[0]) is None


def test_baselines_that_all_are_beyond_the_limits_cover_nothing() -> None:
    struck = verify(original(0.9), struck_out="measured 1.000 ms, above max_latency_ms 0.6")
    night = limited([struck, verify(trial(1, accuracy=0.895, latency_ms=0.3))], max_latency_ms=0.6)
    said = " ".join(verdict(night))
    assert "The search beat the baselines: the rules cover nothing (" in said
    assert "No baseline is within the limits." in said


def busy(cores: float, phase: str = "search") -> dict[str, Any]:
    return {"time": 1.8e9, "phase": phase, "text": f"other processes used {cores:.1f} cores on average"}


def test_warnings_of_the_night_are_told_once_a_kind_the_most_frequent_first() -> None:
    unsettled = {"time": 1.8e9, "phase": "calibrate", "text": "the windows of 2 models never agreed"}
    said = doubts(with_state(warnings=[unsettled, busy(1.2), busy(1.9), busy(1.3, "verify")]))
    assert said == [
        "Warned 3 times, last in phase verify: other processes used 1.3 cores on average.",
        "Warned in phase calibrate: the windows of 2 models never agreed.",
    ]
    many = doubts(with_state(warnings=[{**unsettled, "text": letter * 999} for letter in "abcde"]))
    assert len(many) == 5
    assert len(many[0]) < 450


def test_what_a_run_was_forced_to_overlook_is_said() -> None:
    cpu, threads = "cpu was 'A' when it was made, here it is 'B'", "threads was 1, here it is 2"
    assert summary(with_state())["forced"] is None
    plain = with_state()
    night = replace(plain, target={**(plain.target or {}), "forced": [cpu, threads]})
    carried = replace(measured(0.5), forced=f"{cpu}; {threads}")
    lost = replace(plain, target=None, trials=(*plain.trials, trial(25, measured=carried)))
    both = replace(lost, target=night.target)
    for forced in (night, lost, both):
        assert summary(forced)["forced"] == f"{cpu}; {threads}"
        assert doubts(forced) == [
            f"The latency profile does not hold here and was used all the same (--force): {cpu}; {threads}."
        ]


def test_a_latency_on_the_front_that_did_not_repeat_is_named() -> None:
    shaky = verify(trial(0))
    assert shaky.verified is not None
    latency = replace(shaky.verified.latency, repeat_error=0.2)
    night = run([replace(shaky, verified=replace(shaky.verified, latency=latency))])
    assert "Latencies on the front that did not repeat within 5.0 %: trial 0." in doubts(night)
