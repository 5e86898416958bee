"""The driver of a night: owns the study and the clock, and runs the phases one after another."""

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..spaces.errors import InputError
from ..spaces.policy import INT8
from . import finalists, prepare
from .clock import SHARES, Clock
from .config import RunConfig
from .folder import ARTIFACTS, CONFIG, LOG, STATE, JsonLog, RunFolder, read_run
from .layer_costs import record_layers
from .pareto import losses, non_dominated
from .proposals import baselines, greedy_walk
from .records import TrialState
from .sampler import NightpressSampler, make_sampler
from .session import InterruptionError, Session, graceful
from .store import Store, open_storage, policy_of
from .trials import Trials, enqueue

log = logging.getLogger("nightpress")
SEEDS = 8
DEFAULT_BUDGET_SECONDS = 8 * 3600.0
WHERE = ("runner", "address", "workers", "resources")


def run_night(
    config: RunConfig,
    deadline: float | None,
    *,
    resume: bool,
    watch: Callable[[Session], None] = lambda session: None,
) -> str:
    """Run the phases up to verification; returns the final state: ``done`` or ``interrupted``.

    ``deadline`` is in seconds since the epoch; None takes the run's own when it resumes, else eight hours.
    Raises InputError for anything that the user can mend, before anything is trained.
    """
    folder = _open_folder(config, resume)
    folder.acquire()
    handler = JsonLog(folder.path / LOG)
    log.addHandler(handler)
    try:
        state = folder.read_json(STATE) or {}
        clock = _clock(config, deadline, state, resume)
        session = Session(config=config, folder=folder, clock=clock, watch=watch, state=state)
        session.update(
            state="running", deadline=clock.deadline_text(), started=state.get("started", clock.start), pid=os.getpid(),
            host=socket.gethostname(), reason=None,
        )  # fmt: skip
        with graceful(session):
            return _run(session)
    except InputError:
        if not resume and not (folder.path / ARTIFACTS).exists():
            shutil.rmtree(folder.path)  # nothing was trained: the corrected config may use the same folder
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
        folder.release()


def _run(session: Session) -> str:
    try:
        _phases(session)
        session.update(state="done", phase="report", current=None, activity=None)
    except InterruptionError:
        session.update(state="interrupted", current=None, activity=None, reason="stopped by a signal")
    except Exception as error:  # whatever it was, the record must not say that the night goes on
        session.update(state="failed", current=None, activity=None, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        session.close()
    return str(session.state["state"])


def _phases(session: Session) -> None:
    with session.phase("inspect"):
        prepare.prepare(session)
        prepare.size_rungs(session)
    with session.phase("calibrate"):
        prepare.calibrate_target(session)
    trials = _open_study(session)
    with session.phase("baselines"):
        prepare.judge_given(session)
        _aim(session)
        _run_baselines(session, trials)
    with session.phase("sensitivity"):
        prepare.probe_sensitivity(session)
        _enqueue_seeds(session)
        _aim(session)
    with session.phase("search"):
        _search(session, trials)
        finalists.remeasure_front(session)
    with session.phase("finalists"):
        finalists.train_long(session)
    with session.phase("verify"):
        finalists.verify(session)
        record_layers(session)


def _open_study(session: Session) -> Trials:
    config = session.config
    storage = open_storage(session.folder.path, config.search.storage)
    count = len(Store(storage).trials())
    sampler = make_sampler(config.search.sampler, config.seed, count, session.prepared.space, session.costs)
    session.provide(store=Store(storage, sampler), sampler=sampler)
    unfinished = session.store.repair()
    if unfinished:
        session.folder.decide(
            "search", f"took up {len(unfinished)} unfinished trials", "the driver before ended in the middle"
        )
    return Trials(session, adopted=unfinished)


def _aim(session: Session) -> None:
    """Tell our sampler what it may build on."""
    sampler = session.sampler
    if isinstance(sampler, NightpressSampler):
        sampler.sensitivity = session.sensitivity
        reference = session.state["reference"]
        sampler.reference = losses(reference["accuracy"], reference["latency_ms"], reference["size_bytes"])


def _run_baselines(session: Session, trials: Trials) -> None:
    if not session.state.get("baselines_enqueued", False):
        for name, policy in baselines(session.prepared.anatomy, bool(session.config.space.distill)).items():
            enqueue(session, policy, "baseline", name)
        session.update(baselines_enqueued=True)
    while session.store.waiting("baseline"):
        trials.fill(1)
        trials.collect()
    trials.drain()


def _enqueue_seeds(session: Session) -> None:
    if session.state.get("seeds_enqueued", False):
        return
    prepared = session.prepared
    _enqueue_earlier(session)
    walk = greedy_walk(prepared.space, session.sensitivity, session.costs, SEEDS)
    for policy in walk:
        enqueue(session, policy, "seed")
    if INT8 in prepared.space.bit_choices:
        reason = "from uniform INT8, each step the cut with the most time and bytes saved per damage"
    else:
        reason = "each step the cut with the most time and bytes saved per damage"
    session.folder.decide("sensitivity", f"enqueued {len(walk)} policies of a greedy walk", reason)
    session.update(seeds_enqueued=True)


def _enqueue_earlier(session: Session) -> None:
    """Fronts of earlier runs of the same model. Raises InputError when one is not a run of it."""
    for earlier in session.config.warm_start:
        run = read_run(Path(earlier))
        if run.state.get("model") != session.prepared.anatomy.digest:
            raise InputError(
                f"warm_start: {earlier} is a run of model {run.state.get('model')}, this one's is "
                f"{session.prepared.anatomy.digest}."
            )
        done = [t for t in run.trials if t.state is TrialState.COMPLETE and t.quality and t.latency and t.size_bytes]
        points = [losses(t.quality.accuracy, t.latency.latency_ms, t.size_bytes) for t in done
                  if t.quality and t.latency and t.size_bytes]  # fmt: skip
        front = [done[i] for i in non_dominated(points)]
        for trial in front:
            enqueue(session, policy_of(trial), "seed")
        session.folder.decide("sensitivity", f"enqueued {len(front)} policies of {earlier}", "warm_start")


def _search(session: Session, trials: Trials) -> None:
    """Trials until the clock, the trial limit or the sampler's ideas run out."""
    most = session.config.search.max_trials
    reason = "the time for it is used up"
    while session.clock.left_before("finalists", "verify", "report") > _trial_seconds(session):
        begun = sum(t.role != "baseline" for t in session.store.trials())
        if most is not None and begun >= most:
            reason = f"max_trials {most} is reached"
            break
        if trials.dry:
            reason = "the sampler proposes only policies that are known"
            break
        trials.fill(session.workers if most is None else most - begun)
        trials.collect()
    trials.drain()
    session.folder.decide("search", "ended the search", reason)


def _trial_seconds(session: Session) -> float:
    """What a trial takes, from those of this night: the upper quartile, so that the last one still fits."""
    spans = sorted(
        sum(q.seconds for q in t.qualities)
        for t in session.store.trials()
        if t.state is TrialState.COMPLETE and t.reused_from is None
    )
    return spans[(3 * len(spans)) // 4] if spans else 0.0


def _open_folder(config: RunConfig, resume: bool) -> RunFolder:
    path = config.out
    written = path / CONFIG
    resolved = resolved_config(config)
    if resume:
        if not written.is_file():
            raise InputError(f"{path}: not a run folder, so there is nothing to resume: it has no {CONFIG}.")
        _check_same(yaml.safe_load(written.read_text()), resolved, path)
        return RunFolder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: the run folder exists already; choose another out, or go on with --resume.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump(resolved, sort_keys=False))
    except OSError as error:
        raise InputError(f"{path}: the run folder cannot be written: {error.strerror}.") from None
    return RunFolder(path)


def resolved_config(config: RunConfig) -> dict[str, Any]:
    """The config as a run keeps it: all defaults filled in, the time limits left to the state."""
    data = asdict(config)
    data.pop("out")
    data.pop("until")
    data.pop("budget_seconds")
    return _plain(data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check_same(before: Any, now: dict[str, Any], path: Path) -> None:
    """A resumed run must mean the same thing; the time limit may differ."""
    for key, value in now.items():
        was = before.get(key) if isinstance(before, dict) else None
        if key == "search":
            was, value = _what(was), _what(value)
        if was != value:
            raise InputError(
                f"{path / CONFIG}: a run is resumed with the config it began with, but {key} was {was!r} and is now "
                f"{value!r}."
            )


def _what(search: Any) -> Any:
    """The part of ``search`` that says what is run; where it runs may differ."""
    return {k: v for k, v in search.items() if k not in WHERE} if isinstance(search, dict) else search


def _clock(config: RunConfig, deadline: float | None, state: dict[str, Any], resume: bool) -> Clock:
    now = time.time()
    if deadline is None and resume and "deadline_epoch" in state:
        deadline = float(state["deadline_epoch"])
        if deadline <= now:
            raise InputError(
                f"{config.out}: its deadline {state['deadline']} has passed; give --budget or --until to go on."
            )
    if deadline is None:
        deadline = now + DEFAULT_BUDGET_SECONDS
    if deadline <= now:
        raise InputError("The deadline must lie in the future.")
    state["deadline_epoch"] = deadline
    state["shares"] = dict(SHARES)
    return Clock(start=now, deadline=deadline)
