"""The contract of runners, held by all of them, and what becomes of jobs whose worker, memory or time gives out."""

import os
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest

from fakes_jobs import Acting, job
from nightpress.evaluators.evaluate import Outcome
from nightpress.search.ahead import started_ahead
from nightpress.search.cluster import Cluster, Needs, connect
from nightpress.search.config import RAY, RunConfig, SearchConfig
from nightpress.search.folder import TARGET
from nightpress.search.jobs import MOST_LOST, Jobs
from nightpress.search.process import WorkerProcess
from nightpress.search.ray_runner import RayRunner
from nightpress.search.runner import LocalRunner, Runner
from nightpress.search.worker import HUNG, OUT_OF_MEMORY, WORKER_LOST, Failure

MEMORY_BYTES = 6 << 30
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def cluster() -> Generator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find the fake
        started = connect(None, cpus=2)
    yield started
    started.close()


@pytest.fixture(scope="module", params=["local", "ray"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def acts(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(f"acts-{kind}")


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest, kind: str, acts: Path) -> Generator[Runner]:
    """Two workers, used by all tests of a kind: starting them is what takes time."""
    make = Acting(acts)
    if kind == "local":
        made: Runner = LocalRunner(make, 2, MEMORY_BYTES)
    else:
        needs = Needs(cpu=1, memory_bytes=MEMORY_BYTES)
        made = RayRunner(request.getfixturevalue("cluster"), make, needs, 2, acts)
    yield made
    made.close()


def all_of(source: Runner | Jobs, count: int, seconds: float = 60) -> dict[int, Outcome | Failure]:
    """So many results by key."""
    found: dict[int, Outcome | Failure] = {}
    end = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < end, f"only {sorted(found)} came"
        found |= dict(source.as_completed(0.2))
    return found


def pid(result: Outcome | Failure) -> float:
    assert isinstance(result, Outcome), result
    return result.losses[0]


def test_each_job_gives_one_result_under_its_key(runner: Runner, tmp_path: Path) -> None:
    for key in range(5):
        runner.submit(key, job("sleep 0.05", tmp_path / str(key)))

    found = all_of(runner, 5)

    assert sorted(found) == [0, 1, 2, 3, 4]
    assert all(isinstance(result, Outcome) for result in found.values()), found
    assert os.getpid() not in {pid(result) for result in found.values()}
    assert list(runner.as_completed(0.0)) == []


def test_what_is_asked_for_beyond_the_workers_waits(runner: Runner, tmp_path: Path) -> None:
    assert runner.workers == 2
    start = time.monotonic()
    for key in range(4):
        runner.submit(key, job("sleep 0.5", tmp_path / str(key)))
    found = all_of(runner, 4)

    assert time.monotonic() - start >= 1.0
    assert len({pid(result) for result in found.values()}) <= 2


def test_results_come_one_by_one_and_a_wait_without_one_ends(runner: Runner, tmp_path: Path) -> None:
    runner.submit(0, job("sleep 2", tmp_path / "slow"))
    runner.submit(1, job("sleep 0", tmp_path / "quick"))

    assert list(all_of(runner, 1)) == [1]
    assert list(runner.as_completed(0.05)) == []
    assert list(all_of(runner, 1)) == [0]


def test_a_failing_job_is_a_value_and_its_worker_goes_on(runner: Runner, tmp_path: Path) -> None:
    runner.submit(0, job("diverge", tmp_path))
    assert all_of(runner, 1)[0] == Failure("DivergedError", "the training loss became nan")

    runner.submit(1, job("sleep 0", tmp_path))
    assert isinstance(all_of(runner, 1)[1], Outcome)


def test_a_worker_makes_its_evaluator_once(runner: Runner, acts: Path, tmp_path: Path) -> None:
    for key in range(2):  # both are at work
        runner.submit(key, job("sleep 0.3", tmp_path))
    all_of(runner, 2)
    before = len(list(acts.glob("made-*")))
    for key in range(12):
        runner.submit(key, job("sleep 0", tmp_path))
    all_of(runner, 12)

    assert len(list(acts.glob("made-*"))) == before


def test_a_killed_worker_loses_its_own_job_only(runner: Runner, acts: Path, tmp_path: Path) -> None:
    runner.submit(0, job("sleep 60", tmp_path / "victim"))
    runner.submit(1, job("sleep 3", tmp_path / "other"))
    while not (begun := list(acts.glob("begun-sleep-victim-*"))) or not begun[0].read_text():
        time.sleep(0.02)

    os.kill(int(begun[0].read_text()), signal.SIGKILL)
    found = all_of(runner, 2)

    lost = found[0]
    assert isinstance(lost, Failure)
    assert lost.kind == WORKER_LOST
    assert isinstance(found[1], Outcome)
    runner.submit(2, job("sleep 0", tmp_path))
    assert isinstance(all_of(runner, 1)[2], Outcome)


def test_memory_beyond_the_cap_fails_the_job_and_not_the_machine(runner: Runner, tmp_path: Path) -> None:
    runner.submit(0, job("hoard 100", tmp_path))
    failure = all_of(runner, 1)[0]

    assert isinstance(failure, Failure)
    assert failure.kind == OUT_OF_MEMORY
    assert "allocate" in failure.text


def test_a_job_beyond_its_time_is_interrupted_and_says_so(runner: Runner, tmp_path: Path) -> None:
    runner.submit(0, job("sleep 60", tmp_path), 0.5)
    assert all_of(runner, 1, seconds=20)[0] == Failure(HUNG, "it took longer than 0.5 s")


def test_a_job_that_hears_nothing_ends_with_its_worker(runner: Runner, tmp_path: Path) -> None:
    runner.submit(0, job("deaf 60", tmp_path), 0.5)
    failure = all_of(runner, 1, seconds=30)[0]

    assert isinstance(failure, Failure)
    assert failure.kind == WORKER_LOST


def test_a_paused_runner_works_on_nothing_and_goes_on_later(tmp_path: Path, acts: Path) -> None:
    runner = LocalRunner(Acting(acts), 1, MEMORY_BYTES)
    try:
        runner.submit(0, job("sleep 2", tmp_path / "paused"))
        while not (begun := list(acts.glob("begun-sleep-paused-*"))) or not begun[0].read_text():
            time.sleep(0.02)
        worker = int(begun[0].read_text())
        with runner.paused():
            wait_until(lambda: state(worker) == "T", "the worker goes on")
        assert list(all_of(runner, 1)) == [0]
    finally:
        runner.close()


def test_a_closed_runner_has_ended_its_workers(acts: Path, tmp_path: Path, cluster: Cluster) -> None:
    for made in (LocalRunner(Acting(acts), 1), RayRunner(cluster, Acting(acts), Needs(), 1, acts)):
        folder = tmp_path / type(made).__name__
        made.submit(0, job("sleep 60", folder))
        while not (begun := list(acts.glob(f"begun-sleep-{folder.name}-*"))) or not begun[0].read_text():
            time.sleep(0.02)
        worker = int(begun[0].read_text())
        made.close()

        assert list(made.as_completed(0.0)) == []
        wait_until(lambda worker=worker: not alive(worker), "the worker goes on")


def state(process: int) -> str:
    """A process's state as the kernel calls it: T is stopped, Z has ended and was not waited for; empty for none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def alive(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for has ended, too."""
    return state(process) not in {"", "Z"}


def wait_until(reached: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


# What is done about it


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def jobs(runner: Runner, told: list[tuple[str, str]]) -> Jobs:
    return Jobs(runner, 64, expected_seconds=lambda job: 1.0, tell=lambda what, why: told.append((what, why)))


def test_a_killed_worker_runs_exactly_one_rung_again(
    jobs: Jobs, told: list[tuple[str, str]], acts: Path, tmp_path: Path
) -> None:
    jobs.submit(7, job("die-once", tmp_path / "7"))
    jobs.submit(8, job("sleep 1", tmp_path / "8"))

    found = all_of(jobs, 2)

    assert all(isinstance(result, Outcome) for result in found.values()), found
    assert len(list(acts.glob("begun-die-once-7-*"))) == 2
    assert len(list(acts.glob("begun-sleep-8-*"))) == 1
    assert [what for what, _ in told] == ["trial 7: rung bn is run again"]


def test_a_job_that_kills_its_workers_fails_in_the_end(
    jobs: Jobs, told: list[tuple[str, str]], acts: Path, tmp_path: Path
) -> None:
    jobs.submit(3, job("die", tmp_path / "3"))
    failure = all_of(jobs, 1)[3]

    assert isinstance(failure, Failure)
    assert failure.kind == WORKER_LOST
    assert len(list(acts.glob("begun-die-3-*"))) == MOST_LOST + 1
    assert len(told) == MOST_LOST


def test_out_of_memory_is_tried_once_with_half_the_batch(
    jobs: Jobs, told: list[tuple[str, str]], tmp_path: Path
) -> None:
    jobs.submit(4, job("hoard 100", tmp_path, rung="short"))
    result = all_of(jobs, 1)[4]

    assert isinstance(result, Outcome)
    assert result.search.samples == 32
    [(what, why)] = told
    assert what == "trial 4: rung short is run again with batches of 32"
    assert why.startswith("out of memory: ")


# A worker that is started before its work is known


def test_a_worker_started_ahead_takes_the_first_job(tmp_path: Path) -> None:
    ahead = WorkerProcess()
    runner = LocalRunner(Acting(tmp_path), 1, MEMORY_BYTES, ahead)
    try:
        runner.submit(0, job("sleep 0", tmp_path))
        assert pid(all_of(runner, 1)[0]) == ahead.process.pid
    finally:
        runner.close()
    assert ahead.buried


def test_a_worker_that_died_before_it_had_work_is_replaced(tmp_path: Path) -> None:
    ahead = WorkerProcess()
    ahead.process.kill()
    ahead.process.join()
    runner = LocalRunner(Acting(tmp_path), 1, MEMORY_BYTES, ahead)
    try:
        runner.submit(0, job("sleep 0", tmp_path))
        assert isinstance(all_of(runner, 1)[0], Outcome)
    finally:
        runner.close()
    assert ahead.buried


def test_only_a_night_that_goes_on_where_it_trains_has_a_worker_ahead(tmp_path: Path) -> None:
    run = RunConfig(task="t.py:build", base=None, out=tmp_path)
    with started_ahead(run, resume=True) as before_calibration:
        assert before_calibration is None
    (tmp_path / TARGET).write_text("{}")
    with started_ahead(run, resume=False) as new:
        assert new is None
    with started_ahead(replace(run, search=SearchConfig(runner=RAY)), resume=True) as elsewhere:
        assert elsewhere is None
    with started_ahead(run, resume=True) as worker:
        assert worker is not None
        number = worker.process.pid
        assert number is not None
        assert alive(number)
    assert not alive(number)
