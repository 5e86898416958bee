"""Several runs beside each other, and how much of a hypervolume is noise."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes_run import empty_run, full_run, hostile_run, limited, measured, original, run, runs, trial, verify
from nightpress.reports.compare import compare_runs, in_common_box, kind_of
from nightpress.reports.compare_page import comparison_html, fronts_figure, run_names, sentences
from nightpress.reports.covered import hypervolumes
from nightpress.reports.front import front, point
from nightpress.reports.noise import hypervolume_errors
from nightpress.search.records import RunRecord, TrialRecord
from test_reports_noise import judged, some, without_answers


def named(record: RunRecord, path: str, **state: Any) -> RunRecord:
    return replace(record, path=Path(path), state={**record.state, **state})


FAST = named(run([original(0.9), trial(1, 0.89, 0.2, 200_000)]), "runs/fast")
SLOW = named(run([original(0.9), trial(1, 0.89, 0.4, 200_000)]), "runs/slow")


def test_the_answer_has_the_keys_that_scripts_rely_on() -> None:
    data = compare_runs([FAST, SLOW])
    assert list(data) == ["runs", "gains", "differences", "front", "dominance"]
    assert [entry["run"] for entry in data["runs"]] == ["runs/fast", "runs/slow"]
    assert {"run", "state", "hypervolume", "trials", "front"} <= set(data["runs"][0])
    assert data["runs"][0]["hypervolume"] == hypervolumes(FAST)["search"]
    # A verified twin of the uncompressed model in both: of equal points the first run's stays.
    assert [(row["run"], row["trial"]) for row in data["front"]] == [("runs/fast", 1), ("runs/fast", 0)]


def test_what_dominates_what_is_named() -> None:
    assert compare_runs([FAST, SLOW])["dominance"] == [
        {"run": "runs/slow", "trial": 1, "by_run": "runs/fast", "by_trial": 1, "others": 0}
    ]
    assert compare_runs([FAST, FAST])["dominance"] == []


def test_of_two_that_dominate_a_point_the_one_that_covers_more_is_named() -> None:
    beaten = named(run([trial(1, 0.8, 0.8, 800_000)]), "runs/beaten")
    accurate, quick = trial(1, 0.9, 0.79, 790_000), trial(2, 0.81, 0.2, 100_000)
    for searched in ([accurate, quick], [quick, accurate]):
        row = {"run": "runs/beaten", "trial": 1, "by_run": "runs/better", "by_trial": 2, "others": 1}
        assert compare_runs([beaten, named(run(searched), "runs/better")])["dominance"] == [row]
    # Without a box there are only accuracies to go by.
    unknown = [replace(record, state={}) for record in (beaten, named(run([accurate, quick]), "runs/better"))]
    assert compare_runs(unknown)["dominance"][0]["by_trial"] == 1


@given(st.lists(runs(), min_size=2, max_size=3))
def test_a_point_is_on_the_common_front_or_dominated_or_a_twin(records: list[RunRecord]) -> None:
    night = [replace(record, path=Path(f"runs/{i}")) for i, record in enumerate(records)]
    data = compare_runs(night)
    json.dumps(data, allow_nan=False)
    kept = {(entry["run"], entry["trial"]) for entry in data["front"]}
    beaten = {(entry["run"], entry["trial"]) for entry in data["dominance"]}
    assert not kept & beaten
    values = {(str(r.path), t.number): point(t) for r in night for t in front(r)}
    for key, found in values.items():
        assert key in kept or key in beaten or found in [values[other] for other in kept]


def test_every_run_is_measured_in_the_same_box() -> None:
    small = named(SLOW, "runs/small", reference={"accuracy": 0.85, "latency_ms": 0.5, "size_bytes": 300_000})
    one, other = in_common_box([FAST, small])
    assert one is not None
    assert other is not None
    assert other == in_common_box([FAST, SLOW])[1]
    assert one.share > other.share
    assert hypervolumes(small)["search"] != pytest.approx(other.share)
    assert in_common_box([FAST, empty_run()])[1] is None
    assert in_common_box([empty_run(), empty_run()]) == [None, None]


def test_verified_fronts_share_the_box_of_the_test_split() -> None:
    """A network that has 100 % on its own training data leaves no verified front beside that."""
    reference = {"accuracy": 0.9, "latency_ms": 1.0, "size_bytes": 1_200_000}
    easy = {"reference": reference, "given": {"search": {"accuracy": 1.0}, "test": {"accuracy": 0.85}}}
    accurate, fast = (
        named(run([verify(trial(1, accuracy, ms, 600_000, predicted=None), latency=measured(ms))]), name, **easy)
        for accuracy, ms, name in ((0.85, 0.6, "runs/accurate"), (0.8, 0.5, "runs/fast"))
    )
    shares = [covered.share for covered in in_common_box([accurate, fast]) if covered]
    assert shares == pytest.approx([0.4 * 0.4 * 0.5, 0.2 * 0.5 * 0.5])
    own = [entry["hypervolume"] for entry in compare_runs([accurate, fast])["runs"]]
    assert own == pytest.approx(shares)


def test_a_forced_profile_is_a_difference_and_so_is_the_device_that_it_was_used_on() -> None:
    """Its file names the device that it was made on."""
    target = {"device": {"cpu": "A"}, "forced": ["cpu was 'A', here it is 'B'"]}
    forced = replace(named(FAST, "runs/forced", device={"cpu": "B"}), target=target)
    plain = replace(named(FAST, "runs/plain", device={"cpu": "A"}), target={"device": {"cpu": "A"}})

    found = {entry["what"]: entry["runs/forced"] for entry in compare_runs([plain, forced])["differences"]}

    assert found == {"device.cpu": "B", "forced": "cpu was 'A', here it is 'B'"}
    assert kind_of("forced") == "device"


def test_differences_say_what_they_are_of() -> None:
    other = replace(
        named(FAST, "runs/other", data="d1", code="c1", environment={"python": "3.12"}),
        config={**FAST.config, "seed": 1},
        target={"device": {"cpu": "B"}, "target": {"threads": 2}},
    )
    found = compare_runs([FAST, other])["differences"]
    kinds = {entry["what"]: kind_of(entry["what"]) for entry in found}
    assert kinds == {
        "code": "code",
        "config.seed": "config",
        "data": "data",
        "device.cpu": "device",
        "environment.python": "code",
        "target.threads": "device",
    }
    said = " ".join(sentences([FAST, other], compare_runs([FAST, other])))
    for words in ("model or data", "device or runtime", "code or libraries"):
        assert f"The runs differ in {words}: compare with care." in said


def test_a_difference_within_noise_is_called_so() -> None:
    near = named(run([original(0.9), trial(1, 0.889, 0.2, 200_000)]), "runs/near")
    assert "fast and near cover the same within noise" in sentences([FAST, near], compare_runs([FAST, near]))[0]
    far = named(run([original(0.6), trial(1, 0.6, 0.9, 900_000)]), "runs/far")
    assert "fast covers more than far, by more than noise" in sentences([far, FAST], compare_runs([far, FAST]))[0]
    lonely = sentences([FAST, empty_run()], compare_runs([FAST, empty_run()]))
    assert lonely[0] == "There are not two fronts whose hypervolumes could be compared."


def test_names_are_as_short_as_they_can_be() -> None:
    def names(*paths: str) -> list[str]:
        return run_names([replace(FAST, path=Path(path)) for path in paths])

    assert names("a/x", "b/y") == ["x", "y"]
    assert names("a/x", "b/x") == ["a/x", "b/x"]
    assert names("a/x", "a/x") == ["a/x (1)", "a/x (2)"]
    assert names(".", "a") == [".", "a"]


def test_fronts_are_told_apart_without_their_colour() -> None:
    data: Any = fronts_figure([FAST, SLOW]).data
    lines = [trace for trace in data if trace.mode == "lines"]
    points = [trace for trace in data if trace.mode == "markers"]
    assert len({trace.line.dash for trace in lines}) == len({trace.marker.symbol for trace in points}) == 2
    assert [trace.name for trace in points] == ["fast", "slow"]


@pytest.mark.parametrize("other", [empty_run(), full_run(24), hostile_run("</script>"), limited([trial(0)])])
def test_every_pair_of_runs_makes_a_page(other: RunRecord) -> None:
    page = comparison_html([FAST, other])
    assert page.count("</script>") == 3
    assert "What changed" in page


# Noise


def test_a_hypervolume_wavers_as_its_points_do() -> None:
    def error(samples: int, repeat_error: float) -> float:
        record = verify(trial(1, 0.8, 0.4))
        assert record.verified is not None
        quality = replace(record.verified.quality, accuracy_se=(0.8 * 0.2 / samples) ** 0.5)
        latency = replace(record.verified.latency, repeat_error=repeat_error)
        verified = replace(record.verified, quality=quality, latency=latency)
        found = hypervolume_errors(run([replace(record, verified=verified)]))["search"]
        assert found is not None
        return found

    exact = error(10**12, 0.0)
    assert exact == pytest.approx(0, abs=1e-5)
    # One point covers (a − a₀)(t₀ − t)(s₀ − s) of (1 − a₀)·t₀·s₀: its derivative by a is known.
    by_accuracy = 1 / 0.5 * (1 - 0.408) * (1 - 500_000 / 1_200_000)
    assert error(1600, 0.0) == pytest.approx(0.01 * by_accuracy, rel=0.25)
    assert error(10**12, 0.05) == pytest.approx(0.05 * 0.408 * 0.3 / 0.5 * (1 - 5 / 12), rel=0.25)


def test_where_not_all_rules_were_verified_noise_is_that_of_the_search() -> None:
    """Points on the search split wavered by the errors of their exports on the test split."""
    rules, left_out = [verify(original(0.85))], trial(2, 0.7, 0.5, role="baseline")

    def error(searched: TrialRecord, *more: TrialRecord) -> float:
        found = hypervolume_errors(run([searched, *rules, *more]))["search"]
        assert found is not None
        return found

    known = trial(1, 0.8, 0.4)
    assert error(verify(known), left_out) == error(known, left_out) != error(verify(known))
    measured_since = replace(verify(known), measured=measured(0.4, repeat_error=0.3))
    assert error(measured_since, left_out) > 2 * error(known, left_out)


def test_what_is_not_known_has_no_noise() -> None:
    assert hypervolume_errors(empty_run()) == {"search": None, "baselines": None}
    [gain] = compare_runs([FAST, FAST])["gains"]
    assert gain["gain"] <= 2 * gain["gain_se"]
    assert compare_runs([FAST, empty_run()])["gains"] == []


def of_one_task(correct: npt.NDArray[np.bool_], path: str, **given: float) -> RunRecord:
    """A run of one point, judged on 10,000 test items, of which the given network answers 89 % rightly."""
    test = {"samples": len(correct), "accuracy": 0.89, **given}
    record = run([judged(trial(1, 0.8, 0.5, 500_000), correct)])
    return named(record, path, task="plates", model="m0", given={"test": test, "search": test})


def test_two_runs_of_one_task_differ_with_the_noise_of_the_items_that_they_answer_otherwise() -> None:
    correct = some(0.8, 0)
    base, better = of_one_task(correct, "runs/base"), of_one_task(correct | some(0.02, 1), "runs/better")
    other_items = of_one_task(correct | some(0.02, 1), "runs/better", accuracy=0.88)

    [paired], [apart] = (compare_runs([base, run])["gains"] for run in (better, other_items))

    assert (paired["run"], paired["over"], paired["paired"]) == ("runs/better", "runs/base", True)
    assert paired["gain"] == apart["gain"] > 2 * paired["gain_se"]
    assert 0 < paired["gain_se"] < 0.5 * apart["gain_se"]
    assert apart["gain_se"] == pytest.approx(
        math.hypot(*(entry["hypervolume_common_se"] for entry in compare_runs([base, other_items])["runs"])), rel=0.25
    )
    said = sentences([base, better], compare_runs([base, better]))[0]
    assert said.startswith("better covers more than base, by more than noise: ")
    assert said.endswith(" points (both answered the same test items).")
    said = sentences([base, other_items], compare_runs([base, other_items]))[0]
    assert "cover the same within noise" in said
    assert said.endswith(" points (their errors taken as independent).")


@pytest.mark.parametrize("lost", ["answers", "task", "given"])
def test_runs_of_which_it_is_not_known_what_they_were_judged_on_err_apart(lost: str) -> None:
    correct = some(0.8, 0)
    one, other = of_one_task(correct, "runs/one"), of_one_task(correct, "runs/other")
    older = without_answers(other, 1) if lost == "answers" else named(other, "runs/other", **{lost: None})
    assert compare_runs([one, other])["gains"][0]["paired"]
    assert not compare_runs([one, older])["gains"][0]["paired"]
