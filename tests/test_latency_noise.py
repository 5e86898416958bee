"""What else a machine did while it measured: who is told, of which models, on whose cores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nightpress.evaluators.latency.measure import AGREE, AT_ONCE, REFERENCE, Listener, Timer, Timing, noise_warnings
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.latency.timer import busy_seconds, busy_ticks

QUIET = Timing(windows_ms=(1.0, 1.0 + AGREE / 2), reference_ms=1.0, busy_cores=0.0)
FAR = [Timing(windows_ms=(1.0, 1.0 + apart), reference_ms=1.0) for apart in (0.05, 0.125, 0.1)]
DISTURBED = {REFERENCE: replace(QUIET, busy_cores=1.25), **dict(zip("abc", FAR, strict=True))}


class ToldTimer(Timer):
    """Answers each request with the next of given windows of the reference and busy cores."""

    def __init__(self, answers: Sequence[tuple[list[float], float | None]], listener: Listener) -> None:
        self.target, self._listener = Target(), listener
        self._answers = iter(answers)

    def _ask(self, models: Mapping[str, Path], how: Mapping[str, float]) -> dict[str, Any]:
        windows_ms, busy = next(self._answers)
        windows = {key: windows_ms if key == REFERENCE else [0.5, 0.5] for key in models}
        return {"windows_ms": windows, "kernels": {}, "busy_cores": busy}


@pytest.mark.parametrize(
    ("busy", "most"), [((1.5, 0.25, 0.0), 1.5), ((0.25, None, 1.5), 1.5), ((None, None, None), None)]
)
def test_load_beside_any_of_many_models_is_told(
    tmp_path: Path, busy: tuple[float | None, ...], most: float | None
) -> None:
    """More than are open at once: the reference is timed beside each part of them."""
    told: list[Mapping[str, Timing]] = []
    windows = ([2.0, 2.1], [3.0, 3.9], [4.0, 4.0])
    models = {str(number): tmp_path / str(number) for number in range(2 * AT_ONCE + 1)}

    timings = ToldTimer(list(zip(windows, busy, strict=True)), told.append).time(models, tmp_path / "reference")

    [heard] = told
    assert (heard[REFERENCE].busy_cores, heard[REFERENCE].repeat_error) == (most, pytest.approx(0.3))
    assert (timings[REFERENCE].busy_cores, timings[REFERENCE].latency_ms) == (most, 4.0)
    assert {key: timing.reference_ms for key, timing in timings.items()} == {
        REFERENCE: 4.0, **{key: (2.0, 3.0, 4.0)[number // AT_ONCE] for number, key in enumerate(models)}
    }  # fmt: skip
    assert {key: heard[key] for key in models} == {key: timings[key] for key in models}


def test_what_disturbed_a_measurement_is_said_with_its_figures() -> None:
    assert [QUIET.settled, *(timing.settled for timing in FAR)] == [True, False, False, False]
    assert noise_warnings({REFERENCE: QUIET}) == []
    busy, unsettled = noise_warnings(DISTURBED)
    assert busy.startswith("other processes used 1.2 cores on average while latencies were measured (load ")
    assert unsettled == (
        "this machine is so noisy that the windows of 3 of 4 models never agreed within 2% (the two lowest lie up to "
        "12.5% apart): the latencies of these are marked"
    )


def test_what_disturbed_another_device_is_said_without_the_load_of_this_one() -> None:
    busy, unsettled = noise_warnings(DISTURBED, elsewhere=True)
    assert busy == (
        "other processes used 1.2 cores on average while latencies were measured: measure the kit again without them, "
        "or the figures hold for a busy machine"
    )
    assert unsettled.startswith("the device is so noisy that the windows of 3 of 4 models never agreed within 2% (the ")


# user nice system idle iowait irq softirq steal guest guest_nice
STAT = """cpu  1111 222 33 9000 500 4 5 6 0 0
cpu0 1000 200 30 4000 200 3 2 1 0 0
cpu1 100 20 2 4000 200 1 2 3 0 0
cpu10 11 2 1 1000 100 0 1 2 0 0
intr 5000 1 2
"""


@pytest.mark.parametrize(
    ("cpus", "ticks"),
    [({0}, 1236), ({1}, 128), ({0, 1}, 1364), ({10}, 17), ({1, 7}, 128), ({7}, 1381), (set[int](), 1381)],
)  # fmt: skip
def test_work_on_cores_that_this_process_may_not_use_does_not_count(cpus: set[int], ticks: int) -> None:
    assert busy_ticks(STAT, cpus) == ticks


def test_a_system_that_lists_no_cores_is_taken_as_a_whole() -> None:
    assert busy_ticks(STAT.splitlines()[0], {0}) == 1381


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="only Linux tells")
def test_a_process_that_is_pinned_looks_at_fewer_cores() -> None:
    before = os.sched_getaffinity(0)
    own = sum(os.times()[:2])
    try:
        os.sched_setaffinity(0, {min(before)})
        one = busy_seconds()
    finally:
        os.sched_setaffinity(0, before)
    line = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{min(before)} "))
    assert one is not None
    assert one + own == pytest.approx(busy_ticks(line, before) / os.sysconf("SC_CLK_TCK"), abs=1)
