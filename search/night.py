"""The driver of a night: owns the study and the clock, and runs the phases one after another."""

import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..evaluators.latency.measure import MeasurementError
from ..spaces.errors import InputError
from ..spaces.plan import plan
from ..spaces.plans import choices_of
from ..spaces.policy import Policy, digest
from . import finalists, long_length, long_tuning, planning, prepare, sharing
from .aiming import aim
from .clock import ENDING, Clock, Deadline, length
from .config import RunConfig
from .corner import corner_of
from .folder import ARTIFACTS, CONFIG, LOG, STATE, JsonLog, RunFolder, read_run, read_state
from .layer_costs import record_layers
from .loop import run_first, search
from .mark import mark
from .pareto import MAX_DROP, losses, non_dominated, spread
from .policy_sampler import PolicySampler
from .process import WorkerProcess
from .proposals import greedy_rules, greedy_walk, own_policies, pointless, walk_seeds
from .records import Rung, RunRecord, TrialState
from .resolved import check_same, resolved_config
from .sampler import make_sampler
from .session import InterruptionError, OverdueError, Session
from .signals import graceful
from .split_gap import note_gap
from .storages import close, open_storage
from .store import Store, policy_of
from .trials import Trials, enqueue
from .verification import verify
from .why import record_why

log = logging.getLogger("nightpress")
MOST_WAITING = 2
"""Paused trials a worker. The sampler learns next to nothing from the lowest rung: with no bound it proposed a hundred
trials alike, which all waited, and never found out at the top that they were worthless."""
SEEDS, WALK = 8, 60
MOST_EARLIER = 8
"""Policies of all earlier runs together: seeds are never stopped, and whole fronts would use up the night."""
DEFAULT_BUDGET_SECONDS = 8 * 3600.0


def run_night(
    config: RunConfig,
    deadline: Deadline | None,
    *,
    resume: bool,
    watch: Callable[[Session], None] = lambda session: None,
    search_by: Callable[[Session, Trials], None] | None = None,
    ahead: WorkerProcess | None = None,
) -> str:
    """Run the phases up to verification; returns the final state: ``done``, ``interrupted``, or ``failed`` where
    the target device was lost before the verification.

    ``deadline`` None takes the run's own when it resumes, else eight hours. ``search_by`` takes the place of
    :func:`search`. ``ahead`` is a worker of this machine that has been started.
    Raises InputError for anything that the user can mend, before anything is trained.
    """
    folder = _open_folder(config, resume)
    folder.acquire()
    handler = JsonLog(folder.path / LOG)
    log.addHandler(handler)
    log.setLevel(min(log.getEffectiveLevel(), logging.INFO))  # the log is written whether or not a terminal shows it
    try:
        folder.lay_ballast()
        state = read_state(folder) if (folder.path / STATE).is_file() else {}
        clock = _clock(config, deadline, state, resume)
        session = Session(config=config, folder=folder, clock=clock, watch=watch, state=state)
        session.provide(ahead=ahead)
        log.info("the deadline is %s", clock.told())
        session.update(
            state="running", deadline=clock.deadline_text(), started=state.get("started", clock.now()), pid=os.getpid(),
            resumed=[*state.get("resumed", ()), *([clock.now()] if "started" in state else ())],
            host=socket.gethostname(), reason=None, disk_full=False,
            mark=mark(config.task, config.base),
        )  # fmt: skip
        with graceful(session):
            return _run(session, search_by or search)
    except InputError:
        if not resume and not (folder.path / ARTIFACTS).exists():
            shutil.rmtree(folder.path)  # nothing was trained: the corrected config may use the same folder
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
        folder.drop_ballast()
        folder.release()


def _run(session: Session, search_by: Callable[[Session, Trials], None]) -> str:
    try:
        try:
            _told(session, search_by)
        finally:
            session.close()
    except KeyboardInterrupt:  # also of one that comes while the end by the first signal is written, or workers end
        if session.state["state"] != "done":
            told = "stopped at once by a second signal"
            session.update(state="interrupted", current=None, activity=None, reason=told)
        session.close()
        raise
    return str(session.state["state"])


def _told(session: Session, search_by: Callable[[Session, Trials], None]) -> None:
    """The night, and how it ended in its record."""
    try:
        _phases(session, search_by)
        session.update(state="done", phase="report", current=None, activity=None)
    except InterruptionError:
        session.update(state="interrupted", current=None, activity=None, reason="stopped by a signal")
    except MeasurementError as error:
        if not session.begun:  # nothing was searched yet
            session.update(state="failed", current=None, activity=None, reason=f"{type(error).__name__}: {error}")
            raise
        reason = f"the target device was lost: {error}; --resume verifies what was trained"
        session.trouble(reason)
        session.update(state="failed", current=None, activity=None, reason=reason)
    except Exception as error:  # whatever it was, the record must not say that the night goes on
        session.update(state="failed", current=None, activity=None, reason=f"{type(error).__name__}: {error}")
        raise


def _phases(session: Session, search_by: Callable[[Session, Trials], None]) -> None:
    with session.phase("inspect"):
        _check_storage(session.config)
        prepare.prepare(session)
        prepare.size_rungs(session)
        if not session.state.get("seeds_enqueued"):  # what is wrong with them is said before training
            own_policies(session.config.seeds, session.prepared.space)
            _runs_before(session)
        session.update(workers=session.workers)
        planning.check_budget(session, others=sharing.look(session))
    with session.phase("calibrate"):
        prepare.calibrate_target(session)
    planning.plan_verify(session)
    trials = _open_study(session)
    try:
        _evaluate(session, trials, search_by)
    except OverdueError:
        phase = str(session.state["phase"])
        session.folder.decide(phase, "gave up what was running", "the verification would not be over by the deadline")
        session.jobs.runner.close()
        trials.give_up("given up: the verification had to begin")
    with session.phase("verify"):
        verify(session)
        explain(session)


def explain(session: Session) -> None:
    """Write what tells why finalists are as they are: layers.json, but not where the target is another node, since
    layers are profiled on this machine; and why.json, whose savings are measured wherever the target is."""
    if session.places.target_node:
        session.folder.decide("verify", "layers are not profiled", "the target is another node of the cluster")
    else:
        with session.measuring():
            record_layers(session)
    record_why(session)


def _evaluate(session: Session, trials: Trials, search_by: Callable[[Session, Trials], None]) -> None:
    """All that trains. Raises OverdueError when it would take the verification's time."""
    with session.phase("baselines", *ENDING):
        prepare.judge_given(session)
        sharing.agree(session)  # nothing refuses the night after this: no study keeps the word of one that never was
        aim(session)
        _run_baselines(session, trials)
        note_gap(session)
    with session.phase("sensitivity", *ENDING):
        prepare.probe_sensitivity(session)
        _enqueue_seeds(session)
        aim(session)
    with session.phase("search", *ENDING):
        _run_enqueued(session, trials)
        end = long_length.size_long(session)
        if search_by is search:
            run_first(session, trials)
        long_tuning.train_rules(session, end)
        aim(session)  # by what they tell of the splits
        planning.more_to_verify(session, long_tuning.train_lessons(session, end))
        search_by(session, trials)
        finalists.remeasure_front(session)
    with session.phase("finalists", *ENDING):
        long_tuning.train_long(session)


def _check_storage(config: RunConfig) -> None:
    """Raises InputError when the database does not answer: now, and not after the target was calibrated."""
    if config.search.storage is not None:
        close(open_storage(config.out, config.search.storage))


def _open_study(session: Session) -> Trials:
    config, space = session.config, session.prepared.space
    shared = config.search.storage is not None
    driver = session.state.setdefault("driver", uuid.uuid4().hex) if shared else None
    storage = open_storage(session.folder.path, config.search.storage, make_room=session.folder.make_room)
    name, seed = config.search.sampler, config.seed + (int(driver, 16) % 10_000 if driver else 0)
    sampler = make_sampler(name, seed, 0, space, session.costs_of)
    # Ours draw by the trial's number; the others keep a state, which a resumed night would not have.
    fresh = None if isinstance(sampler, PolicySampler) else (
        lambda trials: make_sampler(name, seed, trials, space, session.costs_of)
    )  # fmt: skip
    store = Store(storage, sampler, study=config.search.study, driver=driver, sampler_at=fresh)
    session.provide(store=store, sampler=sampler)
    session.update()  # the driver's name is on record before any trial bears it
    there = store.join(session.prepared.anatomy.digest)
    unfinished = store.repair()
    if unfinished:
        session.folder.decide(
            "search", f"took up {len(unfinished)} unfinished trials", "the driver before ended in the middle"
        )
    if there and not any(store.ours(t) for t in store.trials()):
        session.folder.decide("search", f"joined a search of {there} trials", f"study {config.search.study!r} is there")
    return Trials(session, adopted=unfinished, most_waiting=MOST_WAITING * session.workers)


def _run_baselines(session: Session, trials: Trials) -> None:
    rules = worthwhile(session, prepare.rules_of(session))
    _enqueue(session, "baseline", [(policy, name) for name, policy in rules.items()])
    _run_enqueued(session, trials)


def worthwhile(session: Session, rules: Mapping[str, Policy]) -> dict[str, Policy]:
    """The rules that are trained. What was left out once stays so: by a profile that was fitted again since, a resumed
    night would train rules that an undisturbed one does not."""
    if "pointless" not in session.state:
        left_out = pointless(rules, lambda policy: (session.predict(policy)[0], session.predict(policy)[3]))
        if left_out:
            session.folder.decide(
                "baselines", f"left out {', '.join(left_out)}",
                "equally wide, INT8 is predicted to be faster and smaller on this target", instead=left_out,
            )  # fmt: skip
        session.update(pointless=list(left_out))
    return {name: policy for name, policy in rules.items() if name not in session.state["pointless"]}


def _run_enqueued(session: Session, trials: Trials) -> None:
    while session.store.waiting("baseline"):
        trials.fill(1, go_on=False)
        trials.collect()
    trials.drain()


def _enqueue(session: Session, role: str, policies: Sequence[tuple[Policy, str | None]]) -> None:
    """Put policies in front of the search: once, also where the driver was killed in the middle of it or another one
    shares the study."""
    store = session.store
    if store.claims.take(role) != (store.driver or ""):
        return
    kept = "baseline" if role == "greedy" else role  # a rule too, but one that is known only later
    known = store.enqueued(kept)
    for policy, name in policies:
        if digest(policy) not in known:
            enqueue(session, policy, kept, name)
            known.add(digest(policy))  # two rules may come to the same policy in a small network


def _enqueue_seeds(session: Session) -> None:
    if session.state.get("seeds_enqueued", False):
        return
    prepared = session.prepared
    steps = greedy_walk(prepared.space, session.sensitivity, session.costs_of, WALK)
    rivals = greedy_rules(steps, prepare.rules_of(session), session.costs)
    _enqueue(session, "greedy", [(policy, name) for name, policy in rivals.items()])
    within = finalists.reachable(session, steps)
    walk = [] if "seeds" in session.config.search.without else walk_seeds(within, SEEDS)
    own = own_policies(session.config.seeds, prepared.space)
    seeds = [*own, *earlier_fronts(session), *(policy for policy in walk if policy not in rivals.values())]
    _enqueue(session, "seed", [(policy, None) for policy in seeds])
    if own:
        session.folder.decide("sensitivity", f"enqueued {len(own)} policies of the user", "seeds")
    if prepared.space.integers is not None:
        reason = "from uniform INT8, each step the cut with the most time and bytes saved per damage"
    else:
        reason = "each step the cut with the most time and bytes saved per damage"
    session.folder.decide(
        "sensitivity", f"enqueued {len(walk)} policies of a greedy walk", reason,
        steps=len(steps), beyond_limits=len(steps) - len(within),
    )  # fmt: skip
    session.update(seeds_enqueued=True)


def earlier_fronts(session: Session) -> list[Policy]:
    """A spread of the fronts of earlier runs of the same model, at most :data:`MOST_EARLIER`: by their accuracies as
    they were recorded and by what this target is predicted to take. Rules, which this night tries anyway, are not among
    them. Raises InputError when one is a run of another task or model."""
    runs = _runs_before(session)
    if not runs:
        return []
    found: dict[str, tuple[Policy, float]] = {}
    for run in runs:
        done = [(point, t) for t in run.trials if t.state is TrialState.COMPLETE and (point := t.losses)]
        front = [done[i] for i in non_dominated([point for point, _ in done])]
        found |= {t.digest: (policy_of(t), -point[0]) for point, t in front if t.role != "baseline"}
    space = session.prepared.space
    limits = session.config.limits
    inside = [
        (policy, accuracy) for policy, accuracy in found.values()
        if space.contains(policy) and not limits.too_much_work(plan(space.anatomy, policy).macs)
    ]  # fmt: skip
    choices = choices_of(space.anatomy, [policy for policy, _ in inside])
    costs = session.costs_of(choices) if inside else np.zeros((0, 2))
    priced = [i for i in range(len(inside)) if np.isfinite(costs[i]).all()]
    if len(priced) < len(found):
        session.folder.decide(
            "sensitivity", f"left out {len(found) - len(priced)} of {len(found)} policies of earlier fronts",
            f"warm_start: {len(found) - len(inside)} make choices that this run's space or max_macs does not allow, "
            f"{len(inside) - len(priced)} cannot be priced on its target",
        )  # fmt: skip
    points = [losses(inside[i][1], *costs[i].tolist()) for i in priced]
    # Accuracies are those of short fine-tunes, which a long one may raise: none is too low here.
    least = min((-point[0] for point in points), default=0.0) - MAX_DROP
    _, latency_ms, size_bytes = corner_of(session.state, limits, Rung.SHORT)
    chosen = spread(points, losses(least, latency_ms, size_bytes), MOST_EARLIER)
    names = ", ".join(str(run.path) for run in runs)
    session.folder.decide(
        "sensitivity", f"enqueued {len(chosen)} of {len(points)} policies of {names}",
        f"warm_start: at most {MOST_EARLIER}, by the hypervolume that each adds to those before it",
    )  # fmt: skip
    return [inside[priced[i]][0] for i in chosen]


def _runs_before(session: Session) -> list[RunRecord]:
    """Raises InputError when one is a run of another task or model. A task is its name: data may have been added to it
    since, and the digest of what is trained on changes with the seed as well. Older runs do not know theirs."""
    task = session.prepared.task.name
    runs = [read_run(Path(earlier)) for earlier in session.config.warm_start]
    for run in runs:
        if run.state.get("model") != session.prepared.anatomy.digest:
            raise InputError(
                f"warm_start: {run.path} is a run of model {run.state.get('model')}, this one's is "
                f"{session.prepared.anatomy.digest}."
            )
        if run.state.get("task", task) != task:
            raise InputError(f"warm_start: {run.path} is a run of task {run.state['task']!r}, this one's is {task!r}.")
    return runs


def _open_folder(config: RunConfig, resume: bool) -> RunFolder:
    path = config.out
    written = path / CONFIG
    resolved = resolved_config(config)
    if resume:
        if not written.is_file():
            raise InputError(f"{path}: not a run folder, so there is nothing to resume: it has no {CONFIG}.")
        check_same(yaml.safe_load(written.read_text()), resolved, config, path)
        return RunFolder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: the run folder exists already; choose another out, or go on with --resume.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump(resolved, sort_keys=False))
    except OSError as error:
        raise InputError(f"{path}: the run folder cannot be written: {error.strerror}.") from None
    return RunFolder(path)


def _clock(config: RunConfig, deadline: Deadline | None, state: dict[str, Any], resume: bool) -> Clock:
    now = time.time()
    if deadline is None and resume and "deadline_epoch" in state:
        deadline = Deadline(float(state["deadline_epoch"]), fixed=bool(state.get("deadline_fixed", True)))
        if deadline.epoch <= now:
            raise InputError(
                f"{config.out}: its deadline {state['deadline']} has passed; give --budget or --until to go on."
            )
    if deadline is None:
        deadline = Deadline(now + DEFAULT_BUDGET_SECONDS, fixed=False)
    if deadline.epoch <= now:
        late = length(now - deadline.epoch)
        raise InputError(f"The deadline passed {late} ago, while the night was starting; give it more time.")
    state["deadline_epoch"], state["deadline_fixed"] = deadline.epoch, deadline.fixed
    clock = Clock(deadline.epoch, deadline.fixed, before=max(0.0, now - deadline.given))
    state["shares"] = clock.shares()
    return clock
