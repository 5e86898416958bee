"""Latency: timing in a process of its own, the predictor on truths that are known, the profile file."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nightpress.evaluators.bake import bake
from nightpress.evaluators.latency.calibrate import calibrate, covering
from nightpress.evaluators.latency.measure import (
    REFERENCE,
    MeasurementError,
    Timer,
    Timing,
    measure_policies,
    write_random,
)
from nightpress.evaluators.latency.predictor import conformal_margin, spearman
from nightpress.evaluators.latency.profile import Profile
from nightpress.evaluators.latency.profile_file import load_profile, profile_to_dict
from nightpress.evaluators.latency.sizes import payload_bytes
from nightpress.evaluators.latency.target import (
    Fingerprint,
    Target,
    check_target,
    fingerprint,
    target_from_dict,
    target_to_dict,
)
from nightpress.evaluators.latency.units import Worker
from nightpress.evaluators.onnx_graph import build_onnx
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import FP32, INT8, Policy, digest
from nightpress.spaces.space import uniform
from strategies import FormulaTimer, space_of, tiny

ANATOMY = tiny().anatomy
SPACE = space_of(ANATOMY)
PLAIN = Policy(model=ANATOMY.digest)
Array = NDArray[np.float64]


def random_policies(count: int, seed: int) -> list[Policy]:
    generator = np.random.default_rng(seed)
    return [SPACE.random(generator) for _ in range(count)]


# Timing


@pytest.mark.parametrize(
    ("windows_ms", "latency_ms", "repeat_error", "halves_ms"),
    [
        ((3.0, 2.0, 2.5, 4.0), 2.0, 0.25, (2.5, 2.0)),
        ((2.0, 2.0), 2.0, 0.0, (2.0, 2.0)),
        ((2.0,), 2.0, 0.0, (2.0, 2.0)),
    ],
)
def test_the_latency_is_the_lowest_window(
    windows_ms: tuple[float, ...], latency_ms: float, repeat_error: float, halves_ms: tuple[float, float]
) -> None:
    timing = Timing(windows_ms=windows_ms, reference_ms=6.0)

    assert timing.latency_ms == latency_ms
    assert timing.repeat_error == pytest.approx(repeat_error)
    assert timing.halves_ms() == halves_ms
    assert timing.ratio == 6.0 / latency_ms


def test_without_a_reference_there_is_no_ratio() -> None:
    assert Timing(windows_ms=(1.0,), reference_ms=None).ratio is None


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The tiny network in two versions, as files."""
    found = {"half": uniform(ANATOMY, width=0.5, bits=INT8), "whole": PLAIN}
    paths = {name: tmp_path / f"{name}.onnx" for name in found}
    for name, policy in found.items():
        write_random(plan(ANATOMY, policy), paths[name])
    return paths


@pytest.fixture
def timer() -> Iterator[Timer]:
    with Timer(Target(batch=2)) as running:
        yield running


@pytest.mark.slow
def test_models_are_timed_beside_the_reference(timer: Timer, files: dict[str, Path]) -> None:
    timings = timer.time({"half": files["half"]}, files["whole"], least_rounds=2, most_rounds=3)

    assert set(timings) == {"half", REFERENCE}
    for timing in timings.values():
        assert 2 <= len(timing.windows_ms) <= 3
        assert timing.latency_ms > 0
        assert timing.repeat_error >= 0
        assert timing.reference_ms == timings[REFERENCE].latency_ms
    assert timings[REFERENCE].ratio == 1


@pytest.mark.slow
def test_a_model_is_timed_without_a_reference_too(timer: Timer, files: dict[str, Path]) -> None:
    timings = timer.time(files, None, least_rounds=1, most_rounds=1)

    assert set(timings) == {"half", "whole"}
    assert all(timing.reference_ms is None and len(timing.windows_ms) == 1 for timing in timings.values())


@pytest.mark.slow
def test_the_runtimes_own_times_of_nodes_come_beside_the_windows(timer: Timer, files: dict[str, Path]) -> None:
    timings = timer.time({"half": files["half"]}, files["whole"], least_rounds=1, most_rounds=1, kernels=True)

    integer = {kernel.op_type for kernel in timings["half"].kernels.values()}
    assert {"QuantizeLinear", "QLinearConv"} <= integer  # conversions as they are, layers fused
    assert "Conv" not in integer
    blocked = {"ReorderOutput"} if "avx512f" in fingerprint(Target()).flags else set()  # blocks of 16 channels
    assert {kernel.op_type for kernel in timings[REFERENCE].kernels.values()} >= {"Conv", *blocked}
    for timing in timings.values():
        assert all(kernel.ms > 0 for kernel in timing.kernels.values())


@pytest.mark.slow
def test_a_refused_file_is_one_line_and_the_timer_goes_on(timer: Timer, files: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(files["half"].read_bytes()[:100])

    with pytest.raises(MeasurementError, match=r"^[^\n]*broken\.onnx[^\n]*$"):
        timer.time({"half": files["half"], "broken": broken}, None)
    with pytest.raises(MeasurementError, match=r"^[^\n]*missing\.onnx[^\n]*$"):
        timer.time({"missing": tmp_path / "missing.onnx"}, files["whole"])

    assert timer.time({"half": files["half"]}, None, least_rounds=1, most_rounds=1)["half"].latency_ms > 0


@pytest.mark.slow
def test_a_timing_process_that_dies_is_an_error_and_can_be_closed(files: dict[str, Path]) -> None:
    with Timer(Target()) as timer:
        os.kill(timer._process.pid, signal.SIGKILL)  # pyright: ignore[reportPrivateUsage]

        for _ in range(2):
            with pytest.raises(MeasurementError, match=r"^the timing process ended with code -9$"):
                timer.time({"half": files["half"]}, None)


@pytest.mark.slow
def test_policies_are_measured_without_training() -> None:
    with Timer(Target()) as timer:
        timings, sizes = measure_policies(ANATOMY, {"small": uniform(ANATOMY, width=0.25, bits=FP32)}, Target(), timer)

    assert set(timings) == set(sizes) == {"small", REFERENCE}
    assert timings["small"].latency_ms > 0
    assert 0 < sizes["small"] < sizes[REFERENCE]


def export_bytes(policy: Policy) -> int:
    module, planned = tiny().apply(policy)
    return len(build_onnx(planned, bake(module, planned), batch=None))


def test_the_size_of_a_policy_is_that_of_its_export() -> None:
    some = {digest(policy): policy for policy in random_policies(10, 11)}

    _, sizes = measure_policies(ANATOMY, some, Target(), FormulaTimer(Target()))

    assert sizes == {name: export_bytes(policy) for name, policy in some.items()} | {REFERENCE: export_bytes(PLAIN)}


# The predictor


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60))
def test_the_margin_covers_at_least_nine_in_ten_of_its_own_scores(scores: list[float]) -> None:
    margin = conformal_margin(np.array(scores))

    assert margin in scores
    assert np.mean(np.array(scores) <= margin) >= 0.9
    assert margin == conformal_margin(np.array(scores[::-1]))
    if len(scores) < 9:  # too few to leave one out
        assert margin == max(scores)


def test_the_margin_is_the_rank_of_the_conformal_quantile() -> None:
    assert conformal_margin(np.arange(1.0, 20)) == 18  # ⌈20 · 0.9⌉
    assert conformal_margin(np.arange(1.0, 100)) == 90
    assert conformal_margin(np.arange(1.0, 102)) == 92  # ⌈91.8⌉


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.floats(0, 10))
def test_a_worse_score_never_lowers_the_margin(scores: list[float], more: float) -> None:
    worse = [*scores[:-1], scores[-1] + more]

    assert conformal_margin(np.array(worse)) >= conformal_margin(np.array(scores))


@pytest.mark.parametrize("count", [19, 40, 99])
def test_a_new_score_lies_within_the_margin_in_nine_of_ten_draws(count: int) -> None:
    generator = np.random.default_rng(count)
    draws = np.abs(generator.normal(size=(4000, count + 1)))

    covered = np.mean([draw[-1] <= conformal_margin(draw[:-1]) for draw in draws])

    assert 0.885 <= covered <= 0.915 + 1 / (count + 1)


@pytest.mark.parametrize(
    ("second", "expected"), [([10.0, 20.0, 90.0], 1), ([3.0, 2.0, 1.0], -1), ([1.0, 3.0, 2.0], 0.5)]
)
def test_rank_correlation_looks_at_the_order_alone(second: list[float], expected: float) -> None:
    assert spearman([1.0, 2.0, 3.0], second) == pytest.approx(expected)


# The profile


@cache
def calibrated() -> Profile:
    known = covering(Worker(ANATOMY), random_policies(12, 7), random_policies(300, 8))
    return calibrate(ANATOMY, known, Target(), timer=FormulaTimer(Target()))


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> Path:
    """The profile's file with something changed in it."""
    data = json.loads(json.dumps(profile_to_dict(calibrated())))
    change(data)
    path = folder / "profile.json"
    path.write_text(json.dumps(data))
    return path


def test_calibration_measures_each_policy_twice() -> None:
    timer = FormulaTimer(Target())
    some = random_policies(10, 8)

    profile = calibrate(ANATOMY, [*some, *some], Target(), timer=timer)

    assert sorted(timer.timed) == sorted(2 * [*{digest(policy) for policy in some}])
    assert len(profile.points) == len(timer.timed) / 2
    assert profile.reference_ms == pytest.approx(0.02 + export_bytes(PLAIN) / 1e6)
    assert profile.reference_repeat_error == pytest.approx(0.01)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    loaded = load_profile(written(tmp_path), ANATOMY)

    for policy in [PLAIN, *random_policies(5, 9)]:
        planned = plan(ANATOMY, policy)
        np.testing.assert_array_equal(loaded.predict([policy]), calibrated().predict([policy]))
        assert loaded.predict_size(planned) == calibrated().predict_size(planned)
    assert profile_to_dict(loaded) == profile_to_dict(calibrated())


def test_a_profile_says_how_well_it_predicts_what_it_had_not_seen() -> None:
    data = profile_to_dict(calibrated())

    assert data["heldout"]["n"] == len(data["points"]) == len(calibrated().points) >= 12
    assert data["truth_repeat"] == {"mape": pytest.approx(1 - 1 / 1.01), "within_10": 1.0}
    for point in data["points"]:
        assert point["low_ms"] <= point["predicted_ms"] <= point["high_ms"]
        assert point["held_out"] is True


def test_a_device_that_changes_its_speed_is_said_and_makes_the_interval_wider() -> None:
    def margin(slower: float) -> tuple[float, list[str]]:
        profile = calibrate(ANATOMY, random_policies(12, 7), Target(), timer=FormulaTimer(Target(), slower))
        return profile.predictor.log_margin, profile.noise_warnings()

    usual, quiet = margin(1.01)
    wider, [warning] = margin(1.21)

    assert quiet == []
    assert wider == pytest.approx(usual + math.log(1.21) / 2)
    assert warning.startswith("two looks at the same policies differ by 21% as a whole")


def test_the_size_of_a_file_is_predicted() -> None:
    for policy in [PLAIN, *random_policies(15, 12)]:
        planned, true_bytes = plan(ANATOMY, policy), export_bytes(policy)

        assert payload_bytes(planned) < true_bytes
        assert calibrated().predict_size(planned) == pytest.approx(true_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"profile\.json: a profile must be a readable JSON file, but: Expecting property name.*\.$"),
        ("[]", r"profile\.json: a profile of version 2 was expected; make one with nightpress calibrate\.$"),
        ("{}", r"profile\.json: a profile of version 2 was expected; make one with nightpress calibrate\.$"),
        ('{"version": 1}', r"a profile of version 2 was expected"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)

    with pytest.raises(InputError, match=message):
        load_profile(path, ANATOMY)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=r"profile\.json: a profile must be a readable JSON file, but: .*\.$"):
        load_profile(path, ANATOMY)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, lambda data: data.update(model="0" * 16))

    with pytest.raises(
        InputError,
        match=rf"^{path}: a profile belongs to one model; this one is for 0{{16}}, the task.s model is {PLAIN.model}",
    ):
        load_profile(path, ANATOMY)


@pytest.mark.parametrize("field", [field.name for field in fields(Fingerprint)])
def test_a_profile_of_another_device_is_refused_with_the_difference(tmp_path: Path, field: str) -> None:
    changed: dict[str, tuple[Any, str]] = {
        "flags": (["avx9"], r"\('avx9',\)"), "cores": (99, "99"),
        "session_config": ({"kernels": "slow"}, r"\(\('kernels', 'slow'\),\)"),
    }  # fmt: skip
    then, shown = changed.get(field, ("another", "'another'"))
    path = written(tmp_path, lambda data: data["device"].update({field: then}))

    with pytest.raises(
        InputError,
        match=rf": a profile holds for one device; {field} was {shown} when it was made, here it is .*: calibrate ag",
    ):
        load_profile(path, ANATOMY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("target"), r"the profile is damaged: KeyError 'target'\.$"),
        (lambda data: data["target"].pop("disabled_optimizers"), r"the profile is damaged: KeyError 'disabled_opt"),
        (lambda data: data["target"].update(cache=1), r"the profile is damaged: TypeError .*cache"),
        (lambda data: data.update(target=None), r"the profile is damaged: TypeError "),
        (lambda data: data.update(device=[]), r"the profile is damaged: TypeError "),
        (lambda data: data["device"].update(session_config="x"), r"the profile is damaged: ValueError "),
        (lambda data: data["points"][3].pop("halves_ms"), r"the profile is damaged: KeyError 'halves_ms'\.$"),
        (lambda data: data["points"][3].update(halves_ms=[1.0]), r"the profile is damaged: IndexError "),
        (lambda data: data["points"][3].update(measured_ms="fast"), r"the profile is damaged: ValueError .*'fast'\.$"),
        (lambda data: data["points"][3].update(measured_ms=-1), r"measured_ms must be positive numbers, but one is -1"),
        (lambda data: data["points"][3].update(measured_ms=float("nan")), r"must be positive numbers, but one is nan"),
        (lambda data: data["points"][3].update(measured_ms=10**400), r"the profile is damaged: OverflowError "),
        (lambda data: data["points"][3].update(halves_ms=[1, 0]), r"halves_ms must be positive numbers, but one is 0"),
        (lambda data: data["points"][3].update(repeat_error=-1), r"repeat_error must be numbers that are not negative"),
        (lambda data: data["points"][3].update(size_bytes=-1), r"size_bytes must be positive numbers, but one is -1"),
        (lambda data: data["points"][3].update(nodes_us={"kernels": {"1": -3}, "weights": {}, "conversions": {}}),
         r"nodes_us must be numbers that are not negative, but one is -0\.003\.$"),
        (lambda data: data.update(operations=[]), r"the profile is damaged: AttributeError "),
        (lambda data: data.update(reference_ms=0), r"json: reference_ms must be positive numbers, but one is 0\.0\.$"),
        (lambda data: data.update(reference_ms=float("inf")), r"reference_ms must be positive numbers, but one is inf"),
        (lambda data: data.update(reference_repeat_error=-1), r"reference_repeat_error must be numbers that are not n"),
        (lambda data: data.update(seconds=float("nan")), r"seconds must be numbers that are not negative, but one is"),
        (lambda data: data["points"][3]["policy"].update(prunne={}), r"json: unknown key prunne; did you mean prune"),
        (lambda data: data.update(points=data["points"][:9]), r"damaged: ValueError a predictor needs at least 10 m"),
        (lambda data: data.update(points=[]), r"profile\.json: the profile is damaged: ValueError "),
        (lambda data: data.update(points=None), r"profile\.json: the profile is damaged: TypeError "),
        (lambda data: data.update(reference_ms=None), r"profile\.json: the profile is damaged: TypeError "),
    ],
)  # fmt: skip
def test_a_damaged_profile_is_refused_with_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = written(tmp_path, change)

    with pytest.raises(InputError, match=message):
        load_profile(path, ANATOMY)


# Targets


@pytest.mark.parametrize(
    ("weights", "activations", "offered"),
    [
        ((8, 32), (8, 32), "32/32 8/8 8/32"),
        ((32,), (32,), "32/32"),
        ((8,), (8,), "8/8"),
        ((4, 8), (8,), "4/8 8/8"),
        ((32,), (8,), "8/8"),
    ],
)
def test_a_target_offers_the_pairs_that_it_runs(
    weights: tuple[int, ...], activations: tuple[int, ...], offered: str
) -> None:
    pairs = Target().bit_choices(weights, activations)

    assert " ".join(f"{pair.weights}/{pair.activations}" for pair in pairs) == offered


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(runtime="tensorrt"), r"^target\.runtime must be one of onnxruntime.*, but got 'tensorrt'\.$"),
        (Target(threads=0), r"^target\.threads must be between 1 and this machine's \d+ cores, but got 0\.$"),
        (Target(threads=4096), r"but got 4096\.$"),
        (Target(batch=0), r"^target\.batch must be at least 1, but got 0\.$"),
    ],
)
def test_a_target_that_this_machine_cannot_run_is_refused(target: Target, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_target(target)


def test_a_target_comes_back_from_its_data() -> None:
    target = Target(threads=2, batch=8, disabled_optimizers=("GemmActivationFusion",))

    assert target_from_dict(json.loads(json.dumps(target_to_dict(target)))) == target
    check_target(Target())


NO_ROOM = """
import resource
from nightpress.evaluators.latency.measure import MeasurementError, measure_policies
from nightpress.evaluators.latency.target import Target
from strategies import toy_anatomy

resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
try:
    measure_policies(toy_anatomy(), {}, Target())
except MeasurementError as error:
    print(error)
"""


@pytest.mark.slow
def test_models_that_cannot_be_written_are_a_measurement_that_failed() -> None:
    """A night goes on without one; a full disk must not end it."""
    told = subprocess.run([sys.executable, "-c", NO_ROOM], capture_output=True, text=True, cwd=Path(__file__).parent,
                          check=True)  # fmt: skip
    assert told.stdout == "the models to be timed cannot be written: File too large\n"
