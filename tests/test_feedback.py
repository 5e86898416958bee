"""What a night measures goes back into its profile; a device that is another now is calibrated again."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.insitu import UnseenKernelError
from nightpress.evaluators.latency.measure import REFERENCE, MeasurementError, Timing, measure_policies
from nightpress.evaluators.latency.target import Target
from nightpress.search.clock import Clock, Times
from nightpress.search.config import RunConfig
from nightpress.search.feedback import feed_back, measure_unseen
from nightpress.search.folder import RunFolder, read_run
from nightpress.search.session import Prepared, Session
from nightpress.spaces.policy import FP32, INT8, Policy
from nightpress.spaces.space import uniform
from strategies import FormulaTimer, space_of, toy_anatomy
from test_planning import TASK

ANATOMY = toy_anatomy()
SPACE = space_of(ANATOMY)


class Paced(FormulaTimer):
    """The formula's times, all so many times as long."""

    def __init__(self, pace: float) -> None:
        super().__init__(Target())
        self.pace = pace

    def time(self, *files: Any, **rest: Any) -> dict[str, Timing]:
        return {
            key: replace(
                timing, windows_ms=tuple(self.pace * ms for ms in timing.windows_ms),
                reference_ms=self.pace * (timing.reference_ms or 0.0),
            )
            for key, timing in super().time(*files, **rest).items()
        }  # fmt: skip


@dataclass
class Device:
    """Where models take ``slower`` times as long as they did, unless it is lost."""

    slower: float = 1.0
    lost: bool = False
    target_node: bool = False

    def timer(self, target: Target, listener: object) -> nullcontext[Paced]:
        if self.lost:
            raise MeasurementError("the device is gone")
        return nullcontext(Paced(self.slower))


def some(count: int, seed: int) -> list[Policy]:
    generator = np.random.default_rng(seed)
    return [SPACE.random(generator) for _ in range(count)]


def night(folder: Path, device: Device) -> Session:
    """One that was calibrated while the device had its usual pace."""
    (folder / "config.yaml").write_text("{task: t}")
    session = Session(
        config=RunConfig(task="t", base=None, out=folder), folder=RunFolder(folder), watch=lambda session: None,
        clock=Clock(Times().wall() + 8 * 3600),
    )  # fmt: skip
    session.provide(
        prepared=Prepared(task=TASK, anatomy=ANATOMY, space=SPACE, train_items=64, step_ms=1),
        places=device, jobs=SimpleNamespace(paused=nullcontext),
    )  # fmt: skip
    session.keep_profile(calibrate(ANATOMY, some(12, 0), Target(), timer=Paced(1.0)))
    session.update(state="running", phase="search")
    return session


def fed(session: Session, slower: float, policies: list[Policy]) -> dict[str, Timing]:
    """Measure policies at this pace and feed them back."""
    named = {str(i): policy for i, policy in enumerate(policies)}
    timings, sizes = measure_policies(ANATOMY, named, Target(), Paced(slower))
    feed_back(session, named, timings, sizes)
    return timings


def decisions(folder: Path) -> list[str]:
    return [decision["decision"] for decision in read_run(folder).decisions]


def test_what_was_measured_is_learned_and_written(tmp_path: Path) -> None:
    session, fresh = night(tmp_path, Device()), some(3, 9)
    fed(session, 1.0, fresh)
    assert [p.policy for p in session.profile.points[-3:]] == fresh
    assert decisions(tmp_path) == ["fitted the latency predictor to 3 more measurements"]
    assert len((read_run(tmp_path).target or {})["points"]) == len(session.profile.points) == 15


@pytest.mark.parametrize("slower", [1.1, 0.9])
def test_a_device_that_has_drifted_is_calibrated_again(tmp_path: Path, slower: float) -> None:
    """Or old and new measurements would be of two devices."""
    session, fresh = night(tmp_path, Device(slower)), some(3, 9)
    before = {point.latency_ms for point in session.profile.points}

    timings = fed(session, slower, fresh)

    assert decisions(tmp_path)[0] == "calibrate the target again"
    assert session.profile.reference_ms == pytest.approx(timings["0"].reference_ms)
    assert not before & {point.latency_ms for point in session.profile.points}


def test_a_device_that_is_lost_while_it_is_calibrated_again_takes_no_measurement_with_it(tmp_path: Path) -> None:
    session, fresh = night(tmp_path, Device(lost=True)), some(3, 9)

    fed(session, 1.1, fresh)

    assert decisions(tmp_path)[1:] == [
        "the calibration before is kept", "fitted the latency predictor to 3 more measurements",
    ]  # fmt: skip
    assert [p.policy for p in session.profile.points[-3:]] == fresh


def test_what_a_device_that_has_drifted_took_is_learned_at_the_pace_of_its_calibration(tmp_path: Path) -> None:
    """Where there is no other calibration: mixed, times of two paces would make one poor predictor."""
    session, fresh = night(tmp_path, Device(lost=True)), some(7, 9)

    timings = fed(session, 2.0, fresh)

    pace = (timings["0"].reference_ms or 0.0) / session.profile.reference_ms
    assert pace == pytest.approx(2.0, rel=0.05)
    assert [p.latency_ms for p in session.profile.points[-7:]] == pytest.approx(
        [timings[str(i)].latency_ms / 2 for i in range(7)], rel=0.05
    )


@pytest.mark.parametrize("count", [1, 7])
def test_where_the_uncompressed_network_alone_is_slower_what_was_measured_stays_as_it_is(
    tmp_path: Path, count: int
) -> None:
    """A neighbour that takes memory bandwidth slows large fp32 weights down; and of one policy nobody knows."""
    session, named = night(tmp_path, Device(lost=True)), {str(i): p for i, p in enumerate(some(count, 9))}
    timings, sizes = measure_policies(ANATOMY, named, Target(), Paced(1.0))
    slow = tuple(1.1 * ms for ms in timings[REFERENCE].windows_ms)
    timings[REFERENCE] = replace(timings[REFERENCE], windows_ms=slow)

    level = feed_back(session, named, timings, sizes, recalibrate=False)

    assert decisions(tmp_path)[0] == "times are taken as they are"
    assert level == 1
    assert [p.latency_ms for p in session.profile.points[-count:]] == pytest.approx(
        [timings[key].latency_ms for key in named], rel=0.01
    )


def test_a_kernel_that_is_first_met_on_a_device_that_drifted_is_learned(tmp_path: Path) -> None:
    """In the middle of the search, in which nothing is calibrated again."""
    session = night(tmp_path, Device(1.3))
    floats = replace(SPACE, bit_choices=(FP32,))
    generator = np.random.default_rng(0)
    session.keep_profile(calibrate(ANATOMY, [floats.random(generator) for _ in range(18)], Target(), timer=Paced(1.0)))
    policy = uniform(ANATOMY, width=1, bits=INT8)
    with pytest.raises(UnseenKernelError, match="which no measured policy did") as unseen:
        session.profile.predict([policy])

    measure_unseen(session, policy, unseen.value)

    assert "calibrate the target again" not in decisions(tmp_path)
    assert session.profile.predict([policy])[0, 0] > 0
