"""When timing ends: with the time that it has, however slow the model, and with the process that asked for it."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nightpress.evaluators.latency import timer as script
from nightpress.evaluators.latency.calibrate import LEAST_SECONDS, Calibration, calibrate, calibrate_until_flat
from nightpress.evaluators.latency.measure import REFERENCE, Timer, Timing, write_random
from nightpress.evaluators.latency.predictor import LEAST_POINTS
from nightpress.evaluators.latency.profile import Profile
from nightpress.evaluators.latency.target import Target
from nightpress.spaces.anatomy import Anatomy
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import FP32, FineTune, Policy, network_digest
from nightpress.spaces.space import Space
from strategies import FormulaTimer, space_of, toy_anatomy

ANATOMY = toy_anatomy()
SLOW = 1024
"""Height and width of pictures on which it takes half a second and more."""


def with_pictures_of(side: int) -> Anatomy:
    ops = tuple(replace(op, shape=(*op.shape[:2], side, side)) if op.shape[2:] == (8, 8) else op for op in ANATOMY.ops)
    return replace(ANATOMY, ops=ops)


def calibrated(anatomy: Anatomy, timer: Timer, seconds: float, most: int = 40) -> Calibration:
    generator = np.random.default_rng(0)
    space = space_of(anatomy)
    return calibrate_until_flat(
        anatomy, lambda count: [space.random(generator) for _ in range(count)], Target(), timer=timer, seconds=seconds,
        most=most,
    )  # fmt: skip


# The time it has


@pytest.mark.slow
def test_slow_models_are_timed_as_long_as_there_is_time(tmp_path: Path) -> None:
    """So many take a minute anywhere: each has four windows of four runs, and three passes of the profiler."""
    path = tmp_path / "slow.onnx"
    write_random(plan(with_pictures_of(SLOW // 3), Policy(model=ANATOMY.digest)), path)
    models = {str(number): path for number in range(120)}

    with Timer(Target()) as timer:
        start = time.monotonic()
        with timer.within(16):
            found = timer.time(models, path, kernels=True)
        seconds = time.monotonic() - start
        slowest = found[REFERENCE].latency_ms / 1000

        assert seconds < 16 + 10 * slowest  # the run that is going on, one that counts, and a noisy machine
        assert list(found) == [REFERENCE, *(key for key in models if key in found)]
        assert 0 < len(found) - 1 < 120
        assert all(len(timing.windows_ms) >= 2 for key, timing in found.items() if key != REFERENCE)
        assert all(timing.kernels for timing in found.values())
        assert timer.seconds_left is None
        # There is no time for anything more, but what comes after it is not bound.
        with timer.within(0):
            assert timer.time(models, path) == {}
        again = timer.time({}, path, least_rounds=1, most_rounds=1)
        assert len(again[REFERENCE].windows_ms) == 1


@pytest.mark.slow
def test_a_model_too_slow_to_be_calibrated_is_refused_with_its_figures() -> None:
    start = time.monotonic()
    with Timer(Target()) as timer, pytest.raises(
        InputError,
        match=rf"^The calibration had time for \d of \d\d policies in {LEAST_SECONDS:.0f} s \(the uncompressed model "
        rf"takes [\d,]+ ms an inference\), and a predictor needs {LEAST_POINTS}: ask for a number of policies, which ",
    ):  # fmt: skip
        calibrated(with_pictures_of(SLOW), timer, seconds=1)
    assert time.monotonic() - start < LEAST_SECONDS + 30


def test_fine_tunes_of_one_network_are_measured_once() -> None:
    """Each network is drawn with two learning rates; half of what is drawn is left to be timed."""
    generator, space = np.random.default_rng(0), space_of(ANATOMY)

    def twice(count: int) -> list[Policy]:
        drawn = [space.random(generator) for _ in range(count // 2)]
        return [replace(policy, finetune=FineTune(learning_rate=rate)) for policy in drawn for rate in (0.01, 0.05)]

    timer = FormulaTimer(Target())
    made = calibrate_until_flat(ANATOMY, twice, Target(), timer=timer, most=24)

    networks = [network_digest(point.policy) for point in made.profile.points]
    assert len(networks) == len(set(networks)) > 16
    assert len(timer.timed) == 2 * len(networks)  # each was looked at twice


@pytest.mark.parametrize("kind", ["drawn", "asked"])
def test_of_a_model_with_few_networks_their_fine_tunes_are_measured_or_it_is_refused(kind: str) -> None:
    """One group of 8 channels in steps of 4, in fp32."""
    small = Space(anatomy=ANATOMY, max_ratio=0.8, bit_choices=(FP32,))
    networks = [Policy(model=ANATOMY.digest, prune={ANATOMY.groups[0].name: cut}) for cut in (0.25, 0.5)]
    rates = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    assert all(small.contains(policy) for policy in networks)

    def profile_of(count: int) -> Profile:
        twins = [replace(p, finetune=FineTune(learning_rate=rate)) for rate in rates for p in networks][:count]
        if kind == "asked":
            return calibrate(ANATOMY, twins, Target(), timer=FormulaTimer(Target()))
        return calibrate_until_flat(ANATOMY, lambda _: twins, Target(), timer=FormulaTimer(Target()), most=12).profile

    assert len(profile_of(12).points) == 12
    with pytest.raises(InputError, match=r"^A calibration needs 10 different policies, but only 9 were drawn: this mo"):
        profile_of(9)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.03])
def test_a_timer_that_has_no_time_left_once_the_models_are_loaded_says_what_it_timed(
    tmp_path: Path, seconds: float
) -> None:
    path = tmp_path / "slow.onnx"
    write_random(plan(with_pictures_of(SLOW // 3), Policy(model=ANATOMY.digest)), path)
    with Timer(Target()) as timer, timer.within(seconds):
        found = timer.time({"one": path}, path)
    assert set(found) <= {REFERENCE, "one"}
    assert all(timing.windows_ms for timing in found.values())


class LateTimer(FormulaTimer):
    """Has time for so many models of the first request, and for none of a later one."""

    def __init__(self, count: int) -> None:
        super().__init__(Target())
        self.count = count

    def time(
        self, models: Mapping[str, Path], reference: Path | None, *, least_rounds: int = 4, most_rounds: int = 20,
        kernels: bool = False, window_ms: float = 0, round_ms: float = 0,
    ) -> dict[str, Timing]:  # fmt: skip
        del least_rounds, most_rounds, kernels, window_ms, round_ms
        some, self.count = dict(list(models.items())[: self.count]), 0
        return super().time(some, reference) if some else {}


@pytest.mark.slow
def test_what_there_was_time_for_is_used() -> None:
    made = calibrated(ANATOMY, LateTimer(15), seconds=3600, most=15)

    assert made.stages[0].policies == len(made.profile.points) == 15
    assert re.fullmatch(
        r"15 policies are the most, and \d+ of the last \d+ policies found no time in 3600 s; all were timed a .*",
        made.reason,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"time for 9 of \d\d policies in 3600 s .* takes 0 ms an inference\), and a"):
        calibrated(ANATOMY, LateTimer(9), seconds=3600)
    with pytest.raises(InputError, match=r"time for 0 of .* \(not even the uncompressed model was timed\), and a pred"):
        calibrated(ANATOMY, LateTimer(0), seconds=3600)


# The process that asked

ASKS = """
import os, subprocess, sys, time
words = [sys.executable, sys.argv[1], str(os.getpid())]
child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
child.stdin.write(sys.argv[2] + "\\n")
child.stdin.flush()
print("asked", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 3])
def test_a_timer_ends_soon_after_the_process_that_asked_it_was_killed(tmp_path: Path, seconds: int) -> None:
    """Before it could look who asked, and in the middle of its rounds. Its standard error closes when it has ended."""
    write_random(plan(ANATOMY, Policy(model=ANATOMY.digest)), tmp_path / "model.onnx")
    request = {
        "models": {"it": str(tmp_path / "model.onnx")}, "runtime": "onnxruntime", "threads": 1, "batch": 1,
        "disabled_optimizers": [], "least_rounds": 1000, "most_rounds": 1000, "window_ms": 25, "round_ms": 100,
        "agree": 0.02, "kernel_passes": 0,
    }  # fmt: skip
    words = [sys.executable, "-c", ASKS, script.__file__, json.dumps(request)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "asked\n"
        time.sleep(seconds)
        driver.kill()
        _, said = driver.communicate(timeout=15)
    assert said == ""


@pytest.mark.slow
def test_who_asks_once_and_closes_is_answered(tmp_path: Path) -> None:
    """A closed standard input is not the end of who asked: an export's check asks so."""
    write_random(plan(ANATOMY, Policy(model=ANATOMY.digest)), tmp_path / "model.onnx")
    request = {
        "models": {"it": str(tmp_path / "model.onnx")}, "runtime": "onnxruntime", "threads": 1, "batch": 1,
        "disabled_optimizers": [], "least_rounds": 4, "most_rounds": 4, "window_ms": 5, "round_ms": 600, "agree": 0.02,
        "kernel_passes": 0,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, script.__file__], input=json.dumps(request) + "\n", capture_output=True, text=True, check=True
    )
    assert len(json.loads(done.stdout)["windows_ms"]["it"]) == 4
