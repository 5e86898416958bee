"""Figures as values: what each picture shows and says."""

import json
import math
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings

from fakes_run import (
    SAMPLES,
    START,
    empty_run,
    full_run,
    hostile_run,
    limited,
    one_trial_run,
    original,
    policy,
    quality,
    run,
    runs,
    trial,
    verify,
)
from nightpress.reports.covered import HypervolumeStep
from nightpress.reports.figure_base import MOST_DOTS, logarithmic
from nightpress.reports.figure_front import front_figure, front_info, front_text
from nightpress.reports.figure_latency import Pair, heldout_title, latency_figure, latency_info, latency_text
from nightpress.reports.figure_night import (
    HypervolumeInfo,
    NoiseInfo,
    NoiseSample,
    PhasesInfo,
    hypervolume_info,
    hypervolume_text,
    noise_info,
    noise_text,
    phases_figure,
    phases_info,
    phases_text,
)
from nightpress.reports.figure_search import Stage, importances_text, rungs_figure, rungs_info, rungs_text, words_of
from nightpress.reports.figure_sensitivity import Cell, SensitivityInfo, sensitivity_info, sensitivity_text
from nightpress.reports.figure_staircase import Stair, staircase_figure, staircase_info, staircase_text
from nightpress.reports.figures import panels
from nightpress.reports.importances import Importances, divergence, flatten, importances
from nightpress.reports.text import local_time
from nightpress.search.config import Limits
from nightpress.search.records import NOT_CONTINUED, RunRecord, TrialRecord, TrialState


def layout(figure: Any) -> Any:
    """Plotly's own annotations say little about what a layout holds."""
    return figure.layout


def test_front_picture_of_a_small_run() -> None:
    records = [
        verify(original(0.9, 0.6)),
        verify(trial(1, 0.8, 0.5, 500_000)),
        verify(trial(2, 0.85, 0.4, 400_000), struck_out="slower"),
        trial(3, 0.95, 2.0),
        trial(4, state=TrialState.FAILED),
    ]
    info = front_info(limited(records, max_latency_ms=1.0))
    assert [(dot.trial, dot.kind, dot.split, dot.on_front, dot.within, dot.note) for dot in info.dots] == [
        (0, "baseline", "test", True, True, ""),
        (1, "verified", "test", True, True, ""),
        (2, "struck out", "test", False, True, "slower"),
        (3, "predicted", "search", False, False, "2.00 ms is over 1.00 ms by 100 %"),
    ]
    assert info.line == ((pytest.approx(0.51), 0.8), (pytest.approx(0.612), 0.9))
    assert info.labels == ((0, "best · most accurate"), (1, "knee"))
    assert info.limits == Limits(max_latency_ms=1.0)
    assert (info.outside, info.left_out, info.logarithmic) == (0, 0, False)
    assert info.x_range == pytest.approx((0, 2.2))


def test_front_line_leaves_out_what_is_on_the_front_by_size_alone() -> None:
    info = front_info(run([trial(0, 0.9, 0.4, 400), trial(1, 0.8, 0.6, 100)]))
    assert [dot.on_front for dot in info.dots] == [True, True]
    assert info.line == ((0.4, 0.9),)


def test_broken_models_lie_outside_the_picture_and_are_counted() -> None:
    info = front_info(run([trial(0, 0.9, 0.4), trial(1, 0.88, 0.5), trial(2, 0.1, 9.0)]))
    assert info.outside == 1
    assert info.y_range[0] > 0.8
    assert info.x_range[1] < 1
    assert "Outside the picture, far below: 1 point" in front_text(info)


def test_the_picture_is_as_deep_as_the_front_needs() -> None:
    """A model that lost 24 points pressed a front of one point into a line at the top."""
    front = [verify(trial(n, 0.98 + n / 1000, 0.1 * n)) for n in range(1, 8)]
    info = front_info(run([*front, trial(8, 0.75, 0.1), trial(9, 0.96, 0.3)]))
    assert (info.outside, [dot.trial for dot in info.dots if dot.accuracy < info.y_range[0]]) == (1, [8])
    wide = front_info(run([trial(1, 0.98, 0.3), trial(2, 0.9, 0.2), trial(3, 0.75, 0.21)]))
    assert wide.outside == 0


@pytest.mark.parametrize(("complete", "left_out"), [(MOST_DOTS - 1, 0), (MOST_DOTS + 3, 3)])
def test_only_trials_that_could_be_drawn_are_said_to_be_left_out(complete: int, left_out: int) -> None:
    failed = [trial(n, state=TrialState.FAILED, qualities=()) for n in range(50)]
    info = front_info(run([*failed, *(trial(100 + n) for n in range(complete)), trial(60, accuracy=None)]))
    assert (len(info.dots), info.left_out) == (complete - left_out, left_out)
    assert ("3 trials more are not drawn" in front_text(info)) is bool(left_out)


def test_a_perfect_model_is_drawn_whole() -> None:
    info = front_info(run([trial(0, 1.0, 0.4), trial(1, 0.99, 0.3)]))
    assert 1 < info.y_range[1] < 1.002


def test_wide_latencies_get_a_logarithmic_axis() -> None:
    info = front_info(run([trial(0, 0.9, 0.4), trial(1, 0.95, 9.0)]))
    assert info.logarithmic
    axis = layout(front_figure(info)).xaxis
    assert axis.type == "log"
    assert axis.range == pytest.approx((math.log10(0.4 / 1.5), math.log10(9 * 1.25)))


@pytest.mark.parametrize(("low", "high"), [(0.2, 1.0), (0.9, 1.1), (0.1, 900), (1e-3, 1e6)])
def test_logarithmic_ticks_are_few_and_inside(low: float, high: float) -> None:
    axis = logarithmic(low, high)
    assert all(low <= tick <= high for tick in axis["tickvals"])
    assert 1 <= len(axis["tickvals"]) <= 10


def test_markers_say_what_is_verified_and_carry_the_trial() -> None:
    records = [verify(original(0.9, 0.6)), verify(trial(1, 0.8, 0.5)), trial(2, 0.85, 0.4)]
    data: Any = front_figure(front_info(run(records))).data
    traces = {trace.name: trace for trace in data if trace.customdata is not None}
    symbols = {name: t.marker.symbol for name, t in traces.items()}
    assert symbols == {"baseline": ("diamond",), "verified": ("circle",), "predicted": ("circle-open",)}
    assert [t.customdata[0][0] for t in traces.values()] == [2, 1, 0]
    legend = {trace.name: trace.marker.symbol for trace in data if trace.legendgroup and not trace.customdata}
    assert legend == {"baseline": "diamond", "verified": "circle", "predicted": "circle-open"}
    assert traces["predicted"].error_x.array == pytest.approx((0.04,))
    assert traces["verified"].error_x.array is None


def test_limits_are_shaded() -> None:
    night = limited([trial(0, 0.9, 0.5), trial(1, 0.8, 0.4)], max_latency_ms=0.45, min_accuracy=0.85)
    shapes = layout(front_figure(front_info(night))).shapes
    assert [(shape.x0, shape.y1) for shape in shapes] == [(0.45, 1), (0, 85.0)]


def test_growth_of_the_hypervolume() -> None:
    steps = (HypervolumeStep(60, 0.2), HypervolumeStep(3700, 0.5))
    assert hypervolume_text(HypervolumeInfo(steps, 0.3)) == (
        "After 2 complete trials the search covers 50.0 % of the objective box (on the search split). "
        "It passed the baselines (30.0 %) after 1 h 1 min."
    )
    assert "never passed" in hypervolume_text(HypervolumeInfo(steps, 0.6))
    assert hypervolume_info(empty_run()) == HypervolumeInfo((), None)


@pytest.mark.parametrize(("last", "words"), [(0.5, "a longer night would pay"), (0.401, "next to nothing")])
def test_growth_says_whether_more_time_would_pay(last: float, words: str) -> None:
    steps = (*(HypervolumeStep(100 * i, 0.4) for i in range(8)), HypervolumeStep(800, last))
    assert words in hypervolume_text(HypervolumeInfo(steps, None))


def test_pairs_of_predicted_and_measured_latency() -> None:
    point = {"predicted_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1, "measured_ms": 1.25, "held_out": True}
    heldout = {"mape": 0.2, "n": 1, "within_10": 0.0, "spearman": 0.5, "interval_coverage": 0.0}
    records = [verify(trial(0, 0.9, 0.5)), trial(1)]
    target = {"points": [point, {"predicted_ms": None}], "heldout": heldout, "truth_repeat": {"mape": 0.02}}
    info = latency_info(run(records, target=target))
    assert info.pairs[0] == Pair("held out", "calibration model", 1.0, 0.9, 1.1, 1.25)
    assert [pair[:2] for pair in info.pairs[1:]] == [("trial", "trial 0")]
    assert info.pairs[1][2:] == pytest.approx((0.5, 0.46, 0.55, 0.51))
    assert info.pairs[0].error == pytest.approx(0.2)
    assert layout(latency_figure(info)).title.text == "held-out error 20.0 % (n = 1)"
    assert "On 1 model that it had not seen, the predictor is 20.0 % off on average." in latency_text(info)
    assert "Measuring them twice differs by 2.0 %." in latency_text(info)
    assert "Of 1 measured trial of this night, 1 lay within 10 %" in latency_text(info)


def test_without_a_target_the_predictors_error_is_unknown() -> None:
    info = latency_info(one_trial_run())
    assert info.pairs == ()
    assert latency_text(info) == "The predictor's error on unseen models is not known."
    assert heldout_title({}) == "no held-out error known"


def test_sensitivity_is_a_map_in_the_order_of_the_network() -> None:
    data = {
        "groups": {"b": 0.1, "a": 0.2},
        "blocks": {"first": 0.3, "d": None},
        "bits": {"a": {"4/8": 0.5, "2/8": 0.9}},
        "seconds": 3,
        "probes": [[["group", "a", ""], 0.2]],
    }
    known = {"layers": [{"name": "a"}, {"name": "b"}], "blocks": [{"name": "first", "layers": ["b"]}]}
    info = sensitivity_info(run(sensitivity=data, state={"anatomy": known}))
    worst, least = Cell("a", "2/8", 0.9), Cell("b", "half the width", 0.1)
    cells = (
        Cell("a", "half the width", 0.2),
        Cell("a", "4/8", 0.5),
        worst,
        Cell("first", "removed", 0.3),
        least,
    )
    assert info == SensitivityInfo(cells, 3, worst, least)
    assert sensitivity_text(info) == (
        "Of 3 parts compressed one at a time, a (2/8: 0.900) hurts most and b (half the width: 0.100) least."
    )
    assert sensitivity_text(sensitivity_info(empty_run())) == "Sensitivity was not measured in this run."


def test_a_large_network_shows_its_most_sensitive_parts() -> None:
    info = sensitivity_info(run(sensitivity={"groups": {f"layer{i:03}": i / 100 for i in range(100)}}))
    assert len(info.cells) == 60
    assert (info.cells[0].name, info.parts) == ("layer040", 100)
    assert "The 60 worst are shown." in sensitivity_text(info)


def test_noise_of_the_night() -> None:
    noise = [
        {"time": START.timestamp() + 3600, "reference_ms": 1.0, "repeat_error": 0.01, "phase": "search"},
        {"time": "soon", "reference_ms": 1.1, "repeat_error": 0.06, "phase": None},
        {"reference_ms": None},
    ]
    info = noise_info(run(state={**run().state, "noise": noise}))
    assert info == NoiseInfo(
        (
            NoiseSample(local_time(START.timestamp() + 3600), 3600, "search", 1.0, 0.01),
            NoiseSample("soon", None, "", 1.1, 0.06),
        )
    )
    once = "The uncompressed model was measured once: 1.00 ms."
    assert once in noise_text(NoiseInfo(info.samples[:1]))
    assert "took between 1.00 and 1.10 ms: 10.0 % apart" in noise_text(info)
    assert "over 5.0 % in 1 of them (worst 6.0 %)" in noise_text(info)


def test_seconds_by_phase_keep_their_order() -> None:
    info = phases_info(run(state={"seconds": {"search": 90, "inspect": 10, "verify": None}}))
    assert info == PhasesInfo((("search", 90.0), ("inspect", 10.0)))
    assert phases_text(info) == "The night took 1 min 40 s; 90.0 % of it went to search."


def test_the_budget_stands_beside_what_was_used() -> None:
    state = {
        "started": START.isoformat(),
        "deadline": START.timestamp() + 1000,
        "shares": {"search": 0.8, "inspect": 0.2},
        "seconds": {"inspect": 260, "search": 700},
    }
    info = phases_info(run(state=state))
    assert info.planned == {"search": pytest.approx(800), "inspect": pytest.approx(200)}
    assert "16 min 40 s were planned" in phases_text(info)
    assert "Inspect took 1 min 0 s longer than planned." in phases_text(info)
    data: Any = phases_figure(info).data
    assert [trace.name for trace in data] == ["used", "planned"]


# The search


def test_rungs_tell_how_far_the_trials_came() -> None:
    low, high = quality(0.5, rung="bn"), quality(0.8)
    records = [
        original(),
        trial(1, qualities=(low, high)),
        verify(trial(2, qualities=(low, high))),
        verify(trial(3, qualities=(low, high)), struck_out="slower"),
        trial(4, state=TrialState.STOPPED, qualities=(low,)),
        trial(5, state=TrialState.FAILED, qualities=(low,)),
        trial(6, state=TrialState.FAILED, qualities=()),
        trial(7, state=TrialState.INFEASIBLE, qualities=()),
        trial(8, qualities=(low, high), reused_from=1),
        trial(9, state=TrialState.RUNNING, qualities=()),
    ]
    info = rungs_info(run(records))
    assert info.stages == (
        Stage("proposed", (("went on", 5), ("known already", 1), ("beyond the limits", 1), ("failed", 1))),
        Stage("batch-norm re-estimation", (("went on", 3), ("stopped", 1), ("failed", 1))),
        Stage("short fine-tune", (("went on", 3),)),
        Stage("exported and re-measured", (("went on", 1), ("struck out", 1))),
    )
    assert rungs_text(info) == (
        "The search proposed 8 policies (1 known already, 1 beyond the limits, 1 failed). 5 trials had the batch-norm "
        "re-estimation (1 stopped, 1 failed). 3 trials had the short fine-tune. 2 trials of the search were exported "
        "and re-measured; 1 of them stood."
    )
    assert rungs_text(rungs_info(empty_run())) == "The search has finished no trial."


def test_how_far_a_cheap_rung_can_be_trusted_is_said_where_the_night_found_it() -> None:
    evidence = {"rung": "short", "pairs": 9, "rank_correlation": 0.813, "low": 0.5, "high": 0.96}
    entries: list[dict[str, Any]] = [
        {"phase": "finalists", "evidence": evidence}, {"phase": "search", "evidence": evidence},
        {"phase": "finalists", "evidence": evidence | {"low": None}}, {"phase": "finalists", "evidence": "none"},
    ]  # fmt: skip
    info = rungs_info(run([trial(0)], decisions=tuple(entries)))
    assert [trust.rung for trust in info.trust] == ["short"]
    assert rungs_text(info).endswith(
        "The short fine-tune ranked 9 policies as the long fine-tune did with a rank correlation of 0.81 "
        "(90 %: 0.50 to 0.96)."
    )


def test_a_part_of_the_fine_tune_is_a_stage_and_who_was_not_continued_is_told_apart() -> None:
    low, part, high = quality(0.5, rung="bn"), quality(0.6, rung="part"), quality(0.8)
    records = [
        original(),
        trial(1, qualities=(low, part, high)),
        trial(2, qualities=(low, high), looks=((4, 0.6), (8, 0.7))),  # looked at on its way, for the study
        trial(3, state=TrialState.STOPPED, qualities=(low, part), reason="even 0.6100 would be dominated"),
        trial(4, state=TrialState.STOPPED, qualities=(low, part), reason=NOT_CONTINUED),
        trial(5, state=TrialState.STOPPED, qualities=(low,), reason=NOT_CONTINUED),
    ]
    info = rungs_info(run(records))
    assert info.stages[1:4] == (
        Stage("batch-norm re-estimation", (("went on", 4), ("not continued", 1))),
        Stage("first part of the short fine-tune", (("went on", 2), ("stopped", 1), ("not continued", 1))),
        Stage("short fine-tune", (("went on", 2),)),
    )
    assert "4 trials had the first part of the short fine-tune (1 stopped, 1 not continued)." in rungs_text(info)
    data: Any = rungs_figure(info).data
    assert {trace.name for trace in data} == {"went on", "stopped", "not continued"}


def test_the_study_of_the_rungs_is_told_with_its_intervals() -> None:
    numbers = {"pairs": 30, "rank_correlation": 0.5, "low": 0.3, "high": 0.7}
    found = [{"rung": "bn", "steps": 0, **numbers}, {"rung": "part", "steps": 16, **numbers, "rank_correlation": 0.9}]
    ended = {"phase": "search", "evidence": {"study": found, "part_steps": 16}}
    text = rungs_text(rungs_info(run([trial(0)], decisions=(ended,))))
    assert text.endswith(
        "At first 30 policies went through the whole short fine-tune, to see what ranks policies as it does: "
        "batch-norm re-estimation with 0.50 (90 %: 0.30 to 0.70), 16 of its steps with 0.90 (90 %: 0.30 to 0.70); so "
        "it got a rung after 16 steps."
    )
    few = {"phase": "search", "evidence": {"study": [], "part_steps": 0}}
    assert "Too few policies went through the study" in rungs_text(rungs_info(run([trial(0)], decisions=(few,))))


@given(runs())
def test_no_trial_is_lost_between_the_stages(record: RunRecord) -> None:
    stages = rungs_info(record).stages
    searched = [t for t in record.trials if t.role != "baseline" and t.state is not TrialState.RUNNING]
    assert (stages[0].number if stages else 0) == len(searched)
    assert all(stage.number <= stages[0].number for stage in stages)


def test_importances_find_what_decides() -> None:
    rng = np.random.default_rng(0)
    records: list[TrialRecord] = []
    for number in range(200):
        a, b, c = rng.uniform(0, 0.8, 3)
        how = policy({"a": a, "b": b, "c": c}, {"a": (8, 8)} if rng.random() < 0.5 else {})
        records.append(trial(number, 0.9 - 0.5 * a, 1 - 0.5 * b, policy=how))
    found = importances(run(records))
    shares = {p.name: p.shares for p in found.parameters}
    assert max(shares, key=lambda name: shares[name]["accuracy"]) == "prune:a"
    assert max(shares, key=lambda name: shares[name]["latency"]) == "prune:b"
    assert min(shares["prune:a"]["accuracy"], shares["prune:b"]["latency"]) > 0.8
    assert sum(share["accuracy"] for share in shares.values()) == pytest.approx(1)
    assert "a good accuracy depended most on width of a" in importances_text(found)


def test_importances_need_enough_trials_and_choices_that_differ() -> None:
    assert importances(run([trial(n) for n in range(19)])) == Importances((), 19)
    same = importances(run([trial(n) for n in range(30)]))
    assert same.parameters == ()
    assert "cannot be said" in importances_text(same)


def test_importances_agree_with_optunas_on_sampled_trials() -> None:
    """The same estimator on the same trials, but for the kernels' tails."""
    from optuna.distributions import FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng(1)
    weights = {"a": 1.0, "b": 0.5, "c": 0.2, "d": 0.0}
    study = optuna.create_study()
    records: list[TrialRecord] = []
    for number in range(300):
        values = {name: float(rng.uniform(0, 0.8)) for name in weights}
        loss = sum(weights[name] * value for name, value in values.items())
        ranges: Any = dict.fromkeys(weights, FloatDistribution(0, 0.8))
        study.add_trial(optuna.trial.create_trial(params=values, distributions=ranges, value=loss))
        records.append(trial(number, 0.9 - 0.1 * loss, policy={"prune": values}))
    theirs = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    ours = {p.name.removeprefix("prune:"): p.shares["accuracy"] for p in importances(run(records)).parameters}
    assert sorted(ours, key=lambda name: -ours[name]) == sorted(theirs, key=lambda name: -theirs[name])
    assert all(abs(ours[name] - theirs[name]) < 0.05 for name in weights)


def test_equal_samples_do_not_diverge() -> None:
    cells = np.array([0.0, 1, 2, 3] * 10)
    assert divergence(cells, cells) == pytest.approx(0)
    assert divergence(np.zeros(10), cells) > 1


def test_policies_of_any_schema_become_parameters() -> None:
    how = {
        "schema": 2,
        "prune": {"a": 0.5},
        "bits": {"a": {"weights": 4, "activations": 8}},
        "removed_blocks": ["b1"],
        "finetune": {"stages": 2},
        "importance": "taylor",
    }
    assert flatten(how) == {
        "prune:a": 0.5,
        "bits:a": '{"activations": 8, "weights": 4}',
        "block:b1": 1.0,
        "finetune:stages": 2.0,
        "importance": "taylor",
    }
    assert [words_of(name) for name in flatten(how)] == [
        "width of a",
        "bits of a",
        "block b1",
        "finetune stages",
        "importance",
    ]


# The device


def test_a_staircase_is_drawn_from_measured_points_alone() -> None:
    points = [{"channels": 16, "latency_ms": 0.3}, {"channels": 8, "latency_ms": 0.1}, {"channels": None}]
    info = staircase_info(run(target={"staircases": [{"name": "conv <3>", "points": points}, {"points": []}, 7]}))
    assert info.stairs == (Stair("conv <3>", ((8, 0.1), (16, 0.3))),)
    assert staircase_text(info) == (
        "2 measurements of 1 kind of layer at different widths. "
        "The highest step: conv <3> takes 0.200 ms more with 16 channels than with 8."
    )
    data: Any = staircase_figure(info).data
    assert data[0].name == "conv &lt;3&gt;"


@pytest.mark.parametrize("target", [None, {}, {"staircases": []}, {"staircases": "none"}])
def test_a_device_without_a_staircase_says_so(target: Any) -> None:
    assert "holds no measured staircase" in staircase_text(staircase_info(run(target=target)))


@pytest.mark.parametrize("night", SAMPLES.values(), ids=SAMPLES)
def test_every_panel_says_something_and_its_figure_is_json(night: RunRecord) -> None:
    shown = panels(night)
    assert [panel.key for panel in shown] == [
        "front",
        "hypervolume",
        "rungs",
        "importances",
        "latency",
        "sensitivity",
        "staircase",
        "noise",
        "seconds",
    ]
    for panel in shown:
        assert panel.text.endswith(".")
        assert panel.how.endswith(".")
        assert panel.figure is None or json.loads(str(panel.figure.to_json()))["data"]


@settings(max_examples=25)
@given(runs())
def test_panels_cope_with_any_run(record: RunRecord) -> None:
    assert len(panels(record)) == 9


def test_markup_in_names_does_not_reach_plotly() -> None:
    figures = [panel.figure for panel in panels(hostile_run("<i>sly</i>")) if panel.figure]
    assert figures
    assert not any("<i" in str(figure.to_json()).replace("\\u003c", "<") for figure in figures)


def test_info_is_a_value() -> None:
    """Two readings of one run give equal pictures, so that a change of the picture can be seen in a test."""
    info = front_info(full_run())
    assert info == front_info(full_run())
    assert len(info.dots) == 59
