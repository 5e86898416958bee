"""The profile file: whose seconds it states, and which model and device it holds for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightpress.evaluators.latency import timer
from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.measure import Timing
from nightpress.evaluators.latency.profile import LEAST_INFERENCES, Point, Profile
from nightpress.evaluators.latency.profile_file import load_profile, measured_elsewhere, profile_to_dict
from nightpress.evaluators.latency.target import Target, fingerprint
from nightpress.spaces.anatomy import Anatomy, Op
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import INT8, Policy, network_digest
from nightpress.spaces.space import uniform
from strategies import FormulaTimer, space_of, toy_anatomy

ANATOMY = toy_anatomy()
RETRAINED = replace(ANATOMY, digest="f" * 16)


@cache
def random_policies() -> list[Policy]:
    generator = np.random.default_rng(0)
    return [space_of(ANATOMY).random(generator) for _ in range(16)]


@cache
def calibrated() -> Profile:
    return calibrate(ANATOMY, random_policies()[:12], Target(), timer=FormulaTimer(Target()))


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> Path:
    """The profile's file with something changed in it."""
    data = json.loads(json.dumps(profile_to_dict(calibrated())))
    change(data)
    (folder / "profile.json").write_text(json.dumps(data))
    return folder / "profile.json"


# What a policy takes


def test_seconds_of_a_kit_s_device_are_none_of_this_machine() -> None:
    assert calibrated().seconds_each == pytest.approx(calibrated().seconds / 12)
    assert replace(calibrated(), remote=True).seconds_each == 0.0


def test_a_calibration_that_was_cut_short_does_not_make_measurements_cheap() -> None:
    slow = replace(calibrated(), points=tuple(replace(point, latency_ms=400.0) for point in calibrated().points))
    assert slow.seconds_each == pytest.approx(0.4 * LEAST_INFERENCES)


def test_more_measurements_do_not_make_each_cheaper() -> None:
    before = replace(calibrated(), seconds=24.0)
    points = [
        Point(policy=policy, latency_ms=0.05, halves_ms=(0.05, 0.05), repeat_error=0.0, size_bytes=5000)
        for policy in random_policies()[10:]
    ]

    after = before.with_points(points)

    assert len(after.points) == 16
    assert (after.seconds_each, after.seconds) == (2.0, 32.0)


def looked_at_twice(halves_ms: Sequence[tuple[float, float]]) -> Profile:
    """Calibrated in one session that looked twice at each policy."""
    points = [
        replace(point, halves_ms=halves, session="a")
        for point, halves in zip(calibrated().points, halves_ms, strict=True)
    ]
    return replace(calibrated(), points=()).with_points(points)


def test_how_far_looks_are_apart_stays_when_policies_come_that_were_looked_at_once() -> None:
    before, generator = looked_at_twice([(0.05, 0.06)] * 12), np.random.default_rng(3)
    later = [
        Point(policy=policy, latency_ms=0.05, halves_ms=(0.05, 0.05), repeat_error=0.0, size_bytes=5000)
        for policy in (space_of(ANATOMY).random(generator) for _ in range(30))
    ]

    after = before.with_points(later)

    assert len(after.points) > 2 * len(before.points)
    assert after.looks_apart == before.looks_apart == pytest.approx(0.2)
    assert after.noise_warnings() == before.noise_warnings() != []


def test_looks_that_differ_either_way_are_noise_and_no_change_of_the_device() -> None:
    """Each look is the lowest of its windows; by a tenth they differ, half of them upwards."""
    timings = [
        Timing(windows_ms=(first,), reference_ms=1.0).with_again(Timing(windows_ms=(second,), reference_ms=1.0))
        for first, second in [(0.05, 0.055), (0.055, 0.05)] * 6
    ]
    profile = looked_at_twice([timing.halves_ms() for timing in timings])

    assert profile.looks_apart == pytest.approx(0.0)
    assert profile.noise_warnings() == []


def test_a_calibration_measures_the_candidates_that_run_other_kernels() -> None:
    floats = [replace(policy, bits={}) for policy in random_policies()]
    integers = uniform(ANATOMY, width=1, bits=INT8)

    made = calibrate(ANATOMY, floats, Target(), candidates=[floats[0], integers], timer=FormulaTimer(Target()))

    networks = {network_digest(policy) for policy in [*floats, integers]}
    assert {network_digest(point.policy) for point in made.points} == networks
    assert np.isfinite(made.predict([integers])).all()


# Which model


def with_relu() -> Anatomy:
    """An activation behind the first layer of a block, which moves all behind it by one position."""
    at = [op.name for op in ANATOMY.ops].index("one.b")
    relu = Op(name="one.relu", kind="relu", inputs=("one.a",), shape=(1, 32, 8, 8))
    reads = replace(ANATOMY.ops[at], inputs=("one.relu",))
    return replace(RETRAINED, ops=(*ANATOMY.ops[:at], relu, reads, *ANATOMY.ops[at + 1 :]))


def with_pictures_of(side: int, anatomy: Anatomy = RETRAINED) -> Anatomy:
    ops = tuple(replace(op, shape=(*op.shape[:2], *(side for _ in op.shape[2:]))) for op in anatomy.ops)
    return replace(anatomy, ops=ops)


def without_a_block() -> Anatomy:
    return replace(RETRAINED, blocks=ANATOMY.blocks[:1])


def unrecorded(data: dict[str, Any]) -> None:
    """As files were before they held the operations."""
    del data["operations"]


def timed_at(position: int, weights_us: float | None = None) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        unrecorded(data)
        prepared = {} if weights_us is None else {str(position): weights_us}
        data["points"][0]["nodes_us"] = {"kernels": {str(position): 3.0}, "weights": prepared, "conversions": {}}

    return change


def test_by_force_a_profile_predicts_where_its_runtime_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    monkeypatch.setitem(timer.PACKAGES, "onnxruntime", ("there-is-no-such-package",))

    with pytest.raises(InputError, match=r"^The runtime onnxruntime is not installed here: pip install"):
        load_profile(path, ANATOMY)
    [forced] = load_profile(path, ANATOMY, force=True).forced
    assert forced.endswith("when it was made, here it is 'not installed'")


@pytest.mark.parametrize(
    ("change", "anatomy", "other"),
    [
        (None, with_relu(), r"an operation was one\.b of shape .*, here it is one\.relu of shape \(1, 32, 8, 8\)"),
        (None, with_pictures_of(4), r"an operation was x of shape \(1, 3, 8, 8\), here it is x of .* 4\)"),
        (None, replace(RETRAINED, ops=ANATOMY.ops[:-1]), r"an operation was head of shape \(1, 5\), here it is none"),
        (None, without_a_block(), r"a policy names two"),
        (unrecorded, without_a_block(), r"a policy names two"),
        (timed_at(3, weights_us=1.0), with_relu(), r"weights were prepared where it has no layer"),
        (timed_at(10), replace(RETRAINED, ops=ANATOMY.ops[:-1]), r"more than 10 operations were timed"),
    ],
)  # fmt: skip
def test_a_profile_of_other_layers_is_refused_also_by_force(
    tmp_path: Path, change: Callable[[dict[str, Any]], object] | None, anatomy: Anatomy, other: str
) -> None:
    path = written(tmp_path, change or (lambda data: None))

    with pytest.raises(
        InputError, match=rf"^{path}: its layers are not those of the task's model \({other}\): calibrate again\.$"
    ):
        load_profile(path, anatomy, force=True)


def test_the_same_weights_on_larger_pictures_are_another_model(tmp_path: Path) -> None:
    """Their digest is the same."""
    with pytest.raises(InputError, match=r"an operation was x of shape \(1, 3, 8, 8\), here it is x of shape"):
        load_profile(written(tmp_path), with_pictures_of(16, ANATOMY))


@pytest.mark.parametrize("change", [lambda data: None, unrecorded, timed_at(3, weights_us=1.0)])
def test_a_profile_of_the_same_layers_with_other_weights_is_taken_by_force(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = written(tmp_path, change)

    with pytest.raises(InputError, match=r"a profile belongs to one model; .*use it all the same with --force\.$"):
        load_profile(path, RETRAINED)
    taken = load_profile(path, RETRAINED, force=True)

    assert taken.model == RETRAINED.digest
    assert len(taken.forced) == 1
    some = [replace(policy, model=RETRAINED.digest) for policy in random_policies()[:4]]
    np.testing.assert_allclose(taken.predict(some), calibrated().predict(random_policies()[:4]))


# Which device


def unrecorded_options(data: dict[str, Any]) -> None:
    del data["device"]["session_config"]


def test_a_profile_that_does_not_record_its_session_options_says_so(tmp_path: Path) -> None:
    told, untold = (
        replace(fingerprint(Target()), session_config=config) for config in ((("session.x64quantprecision", "1"),), ())
    )
    path = written(tmp_path, unrecorded_options)

    with pytest.raises(
        InputError,
        match=r"one device; this one does not record the session_config that it was made with, here it is \(\('session",
    ):
        load_profile(path, ANATOMY, here=told)
    loaded = load_profile(path, ANATOMY, here=untold)  # nothing is told today either: it fits
    assert profile_to_dict(loaded)["device"]["session_config"] is None  # unknown stays unknown


def test_what_is_measured_here_is_told_apart_from_what_a_profile_is_of(tmp_path: Path) -> None:
    here = written(tmp_path)
    assert measured_elsewhere(here, force=False) is None

    elsewhere = written(tmp_path, lambda data: data["device"].update(cpu="Z80"))
    with pytest.raises(InputError, match=rf"^{elsewhere}: a profile holds for one device; cpu was 'Z80' when it was"):
        measured_elsewhere(elsewhere, force=False)
    assert str(measured_elsewhere(elsewhere, force=True)).startswith("a profile holds for one device; cpu was 'Z80'")
    damaged = written(tmp_path, lambda data: data.pop("device"))
    with pytest.raises(InputError, match=r"the profile is damaged: KeyError 'device'\.$"):
        measured_elsewhere(damaged, force=True)


def test_a_kit_s_profile_is_of_another_device_also_where_all_looks_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, lambda data: data.update(remote=True))

    with pytest.raises(InputError, match=r"one device; this one was made of a kit's results, on '.*': calibrate again"):
        measured_elsewhere(path, force=False)
