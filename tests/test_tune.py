"""A night with Ray Tune in place of its search phase leaves the same run folder."""

import fcntl
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import tiny
from nightpress.cli.config import load_config
from nightpress.evaluators.evaluate import Job, Outcome
from nightpress.evaluators.quality import Score
from nightpress.search.config import RAY
from nightpress.search.folder import read_run
from nightpress.search.records import TrialState
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import Policy
from ray_nodes import LOOPBACK, listening

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what ray.tune imports
    from ray import tune

    from nightpress.search.tune import Handed, NightpressTrainable, TuneSearch, held, run_tune_night

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore"),  # Tune uses what Python and its own packages have deprecated
]


class RefusedError(Exception):
    """The lock is somebody else's."""


def refuse() -> None:
    raise RefusedError("the lock is held")


def tuner(search: TuneSearch, storage: Path) -> tune.Tuner:
    run_config = tune.RunConfig(storage_path=str(storage), verbose=0)
    return tune.Tuner(search.trainable(), tune_config=search.tune_config(), run_config=run_config)


def test_a_search_by_tune_leaves_the_run_folder_of_a_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tiny.write_task(tmp_path)
    profile = tiny.write_profile(tmp_path / "profile.json", tiny.anatomy_of(task))
    settings = {"max_trials": 4, "runner": RAY, "workers": 2}
    path = tiny.write_config(tmp_path, target=str(profile), search=settings)
    addresses: set[str] = set()

    def make(search: TuneSearch) -> tune.Tuner:
        addresses.update(listening(os.getpid()))
        return tuner(search, tmp_path / "tune")

    assert run_tune_night(load_config(path), None, make) == "done"

    assert addresses
    assert addresses <= LOOPBACK
    run = read_run(tmp_path / "run")
    trials = [t for t in run.trials if t.role != "baseline"]
    assert len(trials) == 4
    assert all(t.state in {TrialState.COMPLETE, TrialState.STOPPED} for t in trials)
    assert all([q.rung for q in t.qualities][:1] == ["bn"] for t in trials if t.reused_from is None)
    assert any(t.verified for t in trials)
    assert any(d["reason"] == "max_trials 4 is reached" for d in run.decisions)
    assert list((tmp_path / "tune").rglob("result.json"))
    out = tmp_path / "export"
    assert tiny.call("report", tmp_path / "run", capsys=capsys).code == 0
    assert tiny.call("export", tmp_path / "run", "best", "--out", out, capsys=capsys).code == 0
    assert (out / "model.onnx").is_file()


def test_a_night_with_tune_needs_the_runner_ray(tmp_path: Path) -> None:
    tiny.write_task(tmp_path)
    config = load_config(tiny.write_config(tmp_path))
    with pytest.raises(InputError, match=r"search.runner must be ray for a night with Tune, but got 'local'"):
        run_tune_night(config, None, lambda search: tuner(search, tmp_path))


def test_a_measurement_waits_for_the_rungs_that_run(tmp_path: Path) -> None:
    ticks: list[bool] = []
    with ExitStack() as rungs:
        for _ in range(2):  # beside each other
            rungs.enter_context(held(tmp_path / "lock", fcntl.LOCK_SH))

        def tick() -> None:
            ticks.append(True)
            rungs.close()

        with Handed(2, tmp_path / "lock", tick).paused():
            assert ticks == [True]


def test_no_rung_begins_while_something_is_timed(tmp_path: Path) -> None:
    def evaluate(job: Job, progress: Callable[[float], None] | None) -> Outcome:
        with pytest.raises(RefusedError, match="held"), Handed(1, tmp_path / "lock", refuse).paused():
            pass
        return Outcome(search=Score(accuracy=0.5, accuracy_se=None, samples=1, seconds=0.0))

    rung = NightpressTrainable.__new__(NightpressTrainable)
    job = Job(policy=Policy(model="m"), rung="bn", seed=0, steps=0, folder=tmp_path)
    rung.setup({"jobs": [job]}, make=lambda: evaluate, lock=tmp_path / "lock")

    assert isinstance(rung.step()["result"], Outcome)


def test_a_job_names_its_folder_for_processes_that_work_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handed = Handed(1)

    handed.submit(3, Job(policy=Policy(model="m"), rung="bn", seed=0, steps=0, folder=Path("runs/a/artifacts/3")))

    assert handed.jobs[3].folder == tmp_path / "runs/a/artifacts/3"
