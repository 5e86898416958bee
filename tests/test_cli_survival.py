"""What a real night survives: trials that fail, Ctrl-C, and kill -9."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from nightpress.search.folder import read_run
from nightpress.search.records import TrialRecord, TrialState

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PICKY = '''
import torch.nn.functional as F


def parameters_behind(outputs: Tensor) -> int:
    """How many weights an output was computed from, read from autograd."""
    seen, todo, total = set(), [outputs.grad_fn], 0
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        total += node.variable.numel() if hasattr(node, "variable") else 0
        todo += [before for before, _ in node.next_functions]
    return total


def picky() -> Task:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, targets)
        return value * float("nan") if parameters_behind(outputs) < 8000 else value

    return build(loss=loss)
'''

LOADING = """
import time


def loading() -> Task:
    time.sleep(600)
    return build()
"""

SLOW = """
import time

import torch.nn.functional as F


def slow() -> Task:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(0.1)
        return F.cross_entropy(outputs, targets)

    return build(loss=loss)
"""


def finished(run: Path) -> dict[int, tuple[str, str, float | None]]:
    """What is on record of trials that have ended, by number."""
    return {t.number: (t.digest, str(t.state), t.finished) for t in ended(run)}


def ended(run: Path) -> list[TrialRecord]:
    return [t for t in read_run(run).trials if t.state is not TrialState.RUNNING]


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until it holds; a driver that ends before fails the test with what it said."""
    end = time.monotonic() + seconds
    while not condition():
        if driver.poll() is not None:
            raise AssertionError(driver.communicate()[1])
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def phase(run: Path) -> str | None:
    path = run / "state.json"
    return json.loads(path.read_text()).get("phase") if path.is_file() else None


@pytest.fixture
def slow_config(tmp_path: Path) -> Path:
    """A night that takes its time over each trial; its target is not measured anew."""
    task = tiny.write_task(tmp_path, SLOW)
    profile = tiny.write_profile(tmp_path / "profile.json", tiny.anatomy_of(task))
    return tiny.write_config(tmp_path, task="task.py:slow", target=str(profile))


def check_whole(run: Path) -> None:
    """No trial is lost, none was trained twice, and each rule stands there once."""
    trials = read_run(run).trials
    assert len({t.number for t in trials}) == len(trials)
    assert all(t.state is TrialState.COMPLETE for t in trials)
    trained = [t.digest for t in trials if t.reused_from is None]
    assert len(trained) == len(set(trained))
    names = [t.name for t in trials if t.role == "baseline"]
    assert len(names) == len(set(names)) >= 8
    assert sum(t.role != "baseline" for t in trials) == 4
    assert all(t.quality and t.latency and t.size_bytes for t in trials)


def test_trials_that_fail_do_not_end_the_night(tmp_path: Path) -> None:
    task = tiny.write_task(tmp_path, PICKY)
    profile = tiny.write_profile(tmp_path / "profile.json", tiny.anatomy_of(task))
    config = tiny.write_config(tmp_path, task="task.py:picky", target=str(profile))

    result = tiny.nightpress("run", config, "--json")

    data = result.json
    assert data["state"] == "done"
    assert data["trials"]["FAILED"] >= 2
    assert data["trials"]["COMPLETE"] >= 2
    failed = [t for t in read_run(tmp_path / "run").trials if t.state is TrialState.FAILED]
    assert {t.name for t in failed} >= {"uniform 25% fp32"}
    for trial in failed:
        assert trial.reason is not None
        assert trial.reason.startswith("DivergedError: the training loss became nan by step 1 of 3")
        assert trial.params is not None
        assert trial.params < 8000
        assert trial.verified is None
    numbers = {trial.number for trial in failed}
    assert data["front"]
    assert not numbers & {point["trial"] for point in data["front"]}
    assert "DivergedError" in (tmp_path / "run" / "report.html").read_text()
    assert "NaN" not in result.out


def test_ctrl_c_ends_it_gracefully_and_it_goes_on_later(slow_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with tiny.driver("run", slow_config, "--json") as process:
        wait_for(lambda: phase(run) == "baselines" and len(ended(run)) >= 3, process)
        status = tiny.nightpress("status", run, "--json").json
        assert (status["state"], status["phase"]) == ("running", "baselines")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    data = tiny.Result(0, out, err).json
    assert data["state"] == "interrupted"
    assert data["front"]
    assert (run / "report.html").is_file()
    assert {path.name for path in run.iterdir()} >= tiny.RUN_FILES
    assert json.loads((run / "state.json").read_text())["state"] == "interrupted"
    before = finished(run)
    assert len(before) >= 3
    exported = tiny.nightpress("export", run, str(next(iter(before))), "--out", tmp_path / "export", "--json")
    assert exported.json["accuracy"] > 0
    assert (tmp_path / "export" / "model.onnx").is_file()

    again = tiny.nightpress("run", slow_config, "--resume", "--budget", "150s", "--json")

    assert again.json["state"] == "done"
    assert len(read_run(run).state["resumed"]) == 1
    assert {number: found for number, found in finished(run).items() if number in before} == before
    check_whole(run)


def test_while_the_task_is_loaded_a_signal_ends_it_and_it_goes_on_later(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny.write_task(tmp_path, LOADING)
    config = tiny.write_config(tmp_path, task="task.py:loading")
    with tiny.driver("run", config, "--json") as process:
        wait_for(lambda: phase(run) == "inspect", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    state = read_run(run).state
    assert (state["state"], state["reason"]) == ("interrupted", "stopped by a signal")
    (tmp_path / "task.py").write_text((tmp_path / "task.py").read_text().replace("time.sleep(600)", "pass"))

    again = tiny.nightpress("run", config, "--resume", "--budget", "100s", "--json")

    assert again.json["state"] == "done"


def test_a_second_ctrl_c_ends_it_at_once(slow_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with tiny.driver("run", slow_config, "--json") as process:
        wait_for(lambda: phase(run) == "baselines" and len(ended(run)) >= 1, process)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "gracefully" in (run / "log.jsonl").read_text(), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    state = read_run(run).state
    # Where the trial that ran was just over, the end by the first signal can be written before the second one comes.
    reasons = {"stopped at once by a second signal", "stopped by a signal"}
    assert state["state"] == "interrupted"
    assert state["reason"] in reasons
    assert len(ended(run)) >= 1


def test_kill_9_loses_and_repeats_nothing(slow_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with tiny.driver("run", slow_config, "--json") as process:
        wait_for(lambda: phase(run) == "baselines" and len(ended(run)) >= 4, process)
        os.kill(process.pid, signal.SIGKILL)
    before = finished(run)
    assert len(before) >= 4

    words = ("run", slow_config, "--resume", "--budget", "150s", "--json")
    with tiny.driver(*words) as process:
        wait_for(lambda: len(list(run.glob("artifacts/*/long.json"))) >= 2, process)
        os.kill(process.pid, signal.SIGKILL)
    later = finished(run)
    assert {number: found for number, found in later.items() if number in before} == before
    long_files = {path: path.stat().st_mtime_ns for path in run.glob("artifacts/*/long.json")}

    last = tiny.nightpress(*words)

    assert last.json["state"] == "done"
    assert {number: found for number, found in finished(run).items() if number in later} == later
    assert {path: path.stat().st_mtime_ns for path in long_files} == long_files
    check_whole(run)
    assert last.json["front"]
    assert all(point["measured"] for point in last.json["front"])
