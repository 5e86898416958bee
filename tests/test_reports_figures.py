"""Figures as values: what each picture shows and says."""

import json
import math
from typing import Any

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
    run,
    runs,
    trial,
    verify,
)
from nightpress.reports.figure_base import logarithmic
from nightpress.reports.figure_latency import Pair, heldout_title
from nightpress.reports.figure_night import NoiseSample
from nightpress.reports.figure_sensitivity import Bar
from nightpress.reports.figures import (
    HypervolumeInfo,
    NoiseInfo,
    PhasesInfo,
    SensitivityInfo,
    front_figure,
    front_info,
    front_text,
    hypervolume_info,
    hypervolume_text,
    latency_figure,
    latency_info,
    latency_text,
    noise_info,
    noise_text,
    panels,
    phases_info,
    phases_text,
    sensitivity_info,
    sensitivity_text,
)
from nightpress.reports.front import HypervolumeStep, Limits
from nightpress.reports.text import local_time
from nightpress.search.records import RunRecord, TrialState


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
        (3, "predicted", "search", False, False, "2.00 ms is over 1.00 ms"),
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


def test_a_perfect_model_is_drawn_whole() -> None:
    info = front_info(run([trial(0, 1.0, 0.4), trial(1, 0.99, 0.3)]))
    assert 1 < info.y_range[1] < 1.002


def test_wide_latencies_get_a_logarithmic_axis() -> None:
    info = front_info(run([trial(0, 0.9, 0.4), trial(1, 0.95, 9.0)]))
    assert info.logarithmic
    axis = layout(front_figure(info)).xaxis
    assert axis.type == "log"
    assert axis.range == pytest.approx((math.log10(0.4 / 1.25), math.log10(9 * 1.25)))


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
        "It passed the uniform baselines (30.0 %) after 1 h 1 min."
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


def test_sensitivity_takes_the_worst_choice_and_the_worst_parts_first() -> None:
    data = {
        "groups": {"a": 0.1, "b": {"0.25": 0.2, "0.5": 0.4}},
        "blocks": {"c": 0.3, "d": None},
        "seconds": 3,
    }
    info = sensitivity_info(run(sensitivity=data))
    bars = (Bar("groups", "b", 0.4), Bar("blocks", "c", 0.3), Bar("groups", "a", 0.1))
    assert info == SensitivityInfo(bars, 3, bars[-1])
    assert sensitivity_text(info) == ("Of 3 parts compressed one at a time, b hurts most (0.400) and a least (0.100).")
    assert sensitivity_text(sensitivity_info(empty_run())) == "Sensitivity was not measured in this run."


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


@pytest.mark.parametrize("night", SAMPLES.values(), ids=SAMPLES)
def test_every_panel_says_something_and_its_figure_is_json(night: RunRecord) -> None:
    shown = panels(night)
    assert [panel.key for panel in shown] == [
        "front",
        "hypervolume",
        "latency",
        "sensitivity",
        "noise",
        "seconds",
    ]
    for panel in shown:
        assert panel.text.endswith(".")
        assert panel.figure is None or json.loads(str(panel.figure.to_json()))["data"]


@settings(max_examples=25)
@given(runs())
def test_panels_cope_with_any_run(record: RunRecord) -> None:
    assert len(panels(record)) == 6


def test_markup_in_names_does_not_reach_plotly() -> None:
    figures = [panel.figure for panel in panels(hostile_run("<i>sly</i>")) if panel.figure]
    assert figures
    assert not any("<i" in str(figure.to_json()).replace("\\u003c", "<") for figure in figures)


def test_info_is_a_value() -> None:
    """Two readings of one run give equal pictures, so that a change of the picture can be seen in a test."""
    info = front_info(full_run())
    assert info == front_info(full_run())
    assert len(info.dots) == 59
