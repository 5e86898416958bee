"""What a night makes of a target device that is lost, jobs that hang and a person who cannot wait."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tiny
from fakes_jobs import job
from nightpress.evaluators.evaluate import GIVEN, Job, Outcome
from nightpress.evaluators.quality import Score
from nightpress.search.folder import read_run
from nightpress.search.jobs import FIRST_CAP_SECONDS, LEAST_CAP_SECONDS, PATIENCE, PEERS, Jobs
from nightpress.search.worker import GRACE_SECONDS, HUNG, WORKER_LOST, Failure
from nightpress.spaces.policy import network_digest, policy_from_dict

# How long a job may run


@dataclass(slots=True)
class Scripted:
    """A runner that gives the results it was told to, and keeps what it was asked for."""

    results: list[Outcome | Failure]
    workers: int = 1
    progress: float = 0.0
    asked: list[tuple[int, Job, float | None]] = field(default_factory=list[tuple[int, Job, float | None]])

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        self.asked.append((key, job, cap_seconds))

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        if self.results:
            yield self.asked[-1][0], self.results.pop(0)

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self.results.clear()


def outcome(seconds: float) -> Outcome:
    return Outcome(search=Score(accuracy=0.5, accuracy_se=None, samples=64, seconds=seconds), seconds=seconds)


def jobs_on(runner: Scripted, now: list[float]) -> Jobs:
    return Jobs(runner, 64, expected_seconds=lambda job: 2.0, tell=lambda what, why: None, now=lambda: now[0])


def test_a_job_may_take_some_times_what_the_slowest_of_its_peers_took(tmp_path: Path) -> None:
    spans = [1.0, 40.0, 2.0]
    jobs = jobs_on(Scripted([outcome(span) for span in spans]), [0.0])
    short = job("sleep", tmp_path, rung="short", steps=3)
    assert len(spans) == PEERS
    assert jobs.cap_seconds(short) == FIRST_CAP_SECONDS + 20.0
    for key in range(PEERS):
        jobs.submit(key, short)
        assert [found for found, _ in jobs.as_completed(0.0)] == [key]

    assert jobs.cap_seconds(short) == PATIENCE * 40.0
    assert jobs.cap_seconds(job("sleep", tmp_path, rung="short", steps=4)) == FIRST_CAP_SECONDS + 20.0
    assert jobs.cap_seconds(job("sleep", tmp_path, rung=GIVEN)) is None


def test_quick_peers_leave_a_job_a_minute(tmp_path: Path) -> None:
    jobs = jobs_on(Scripted([outcome(0.1)] * PEERS), [0.0])
    for key in range(PEERS):
        jobs.submit(key, job("sleep", tmp_path))
        list(jobs.as_completed(0.0))

    assert jobs.cap_seconds(job("sleep", tmp_path)) == LEAST_CAP_SECONDS


def test_a_job_that_was_paused_for_a_measurement_is_run_again_and_not_called_hung(tmp_path: Path) -> None:
    late = Failure(HUNG, "it took longer than 60 s")
    runner = Scripted([late, late])
    jobs = jobs_on(runner, [0.0])
    jobs.submit(3, job("sleep", tmp_path))
    with jobs.paused():
        pass

    assert list(jobs.as_completed(0.0)) == []
    assert [key for key, *_ in runner.asked] == [3, 3]
    assert list(jobs.as_completed(0.0)) == [(3, late)]


def test_a_worker_that_had_to_end_with_its_job_is_no_lost_worker(tmp_path: Path) -> None:
    now = [0.0]
    runner = Scripted([Failure(WORKER_LOST, "ended with code 1")])
    jobs = jobs_on(runner, now)
    jobs.submit(0, job("sleep", tmp_path))
    now[0] = (jobs.cap_seconds(job("sleep", tmp_path)) or 0.0) + GRACE_SECONDS

    [(_, failure)] = jobs.as_completed(0.0)

    assert failure == Failure(HUNG, "it took longer than 320 s and could not be interrupted")
    assert len(runner.asked) == 1


# A night


def children(process: int) -> dict[int, str]:
    """The processes that a process has started, with their command lines."""
    found: dict[int, str] = {}
    for number in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        try:
            found[int(number)] = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def kill_timers(process: subprocess.Popen[str], killed: list[int]) -> None:
    """Kill the timing processes of a driver as long as it lives."""
    while process.poll() is None:
        try:
            timers = [number for number, line in children(process.pid).items() if "latency/timer.py" in line]
        except OSError:
            return
        for number in timers:
            os.kill(number, signal.SIGKILL)
            killed.append(number)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lost_target_device_ends_the_night_gracefully_and_it_is_verified_later(tmp_path: Path) -> None:
    task = tiny.write_task(tmp_path)
    profile = tiny.write_profile(tmp_path / "profile.json", tiny.anatomy_of(task))
    config = tiny.write_config(tmp_path, target=str(profile), search={"max_trials": 2})
    killed: list[int] = []

    with tiny.driver("run", config, "--json") as process:
        watcher = threading.Thread(target=kill_timers, args=(process, killed))
        watcher.start()
        out, err = process.communicate(timeout=200)
        watcher.join()

    assert killed
    assert process.returncode == 1, err
    data = json.loads(out)
    assert data["state"] == "failed"
    run = read_run(tmp_path / "run")
    known = {network_digest(policy_from_dict(p["policy"], "")) for p in json.loads(profile.read_text())["points"]}
    networks = {network_digest(policy_from_dict(point["policy"], "")): point["measured"] for point in data["front"]}
    assert not any(measured for network, measured in networks.items() if network not in known)
    assert run.state["reason"].startswith("the target device was lost: ")
    assert [d["decision"] for d in run.decisions if d["phase"] == "verify"][-1] == "the measurement is repeated"
    assert (tmp_path / "run" / "report.html").is_file()

    again = tiny.nightpress("run", config, "--resume", "--budget", "150s", "--json").json

    assert again["state"] == "done"
    assert all(point["measured"] for point in again["front"])
