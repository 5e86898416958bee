"""A night whose search is run by Ray Tune, for those who live there.

Everything else is a night like any other: the same phases before and after, the same run folder, the same reports and
exports. Tune's trials are ours; our sampler proposes them and our rule stops them::

    from ray import tune
    from nightpress.search.tune import TuneSearch, run_tune_night

    def tuner(search: TuneSearch) -> tune.Tuner:
        return tune.Tuner(search.trainable(), tune_config=search.tune_config(max_concurrent_trials=4))

    run_tune_night(config, deadline, tuner)    # config.search.runner must be ray

Limits:

- ``Tuner.restore`` does not bring a night back; ``resume=True`` does: the study in the run folder is the record,
  and Tune's own files are not needed for it. What Tune ran when its driver was killed goes on at its last rung.
- Tune sees a trial's accuracy alone as its metric, not the search's objectives: its own best trial is none of
  ours. A scheduler of Tune's that stops trials (ASHA, median) looks at one metric and throws an end of the front away;
  such a trial counts as STOPPED with what it had reached. Schedulers that pause or clone trials are not supported.
- Trials that need no training (known, or beyond a limit) never reach Tune, so it counts fewer than the run folder does.
- An actor that dies fails its trial, unless ``RunConfig(failure_config=...)`` lets Tune try again; memory and time of a
  trial are bounded by Tune's resources alone, and a batch is not made smaller after an out-of-memory.
- A trial goes from its first rung to the top: it does not pause for others that promise more, and is not judged on the
  way.
- The search ends when no further trial fits before the finalists; those that run then are waited for.
- What has to be timed during the search (a kind of kernel that was never measured) waits on one machine for the rungs
  that run, and Tune hears nothing meanwhile. An actor that is being started then loads its libraries beside the timing.
"""

import fcntl
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ..evaluators.evaluate import Job, Outcome
from ..spaces.errors import InputError
from .clock import Deadline
from .config import RAY, RunConfig
from .loop import enough
from .night import run_night
from .records import Rung, TrialState
from .session import TICK_SECONDS, Session
from .trials import Trials
from .worker import WORKER_LOST, Factory, Failure, Worker

_QUIET = "TUNE_DISABLE_SIGINT_HANDLER"  # the night ends gracefully on Ctrl-C, Tune included
LOCK = "tune.lock"
"""File in the run folder: shared by the rungs that run, taken by whoever times something."""


def run_tune_night(
    config: RunConfig,
    deadline: Deadline | None,
    tuner: "Callable[[TuneSearch], tune.Tuner]",
    *,
    resume: bool = False,
    watch: Callable[[Session], None] = lambda session: None,
) -> str:
    """:func:`~nightpress.search.night.run_night` with Tune in place of its search phase; the same results and errors.

    ``tuner`` is called once there is something to search. Raises InputError when the config's runner is not ``ray``.
    """
    if config.search.runner != RAY:
        raise InputError(f"search.runner must be ray for a night with Tune, but got {config.search.runner!r}.")
    return run_night(config, deadline, resume=resume, watch=watch, search_by=partial(_search, tuner))


def _search(tuner: "Callable[[TuneSearch], tune.Tuner]", session: Session, trials: Trials) -> None:
    cluster, lock = session.places.cluster, session.folder.path.absolute() / LOCK
    alone = cluster is not None and len(cluster.nodes()) == 1  # a cluster times on a node of its own
    handed, trials.straight = Handed(session.workers, lock if alone else None, session.tick), True
    runner, session.jobs.runner = session.jobs.runner, handed
    ours = _QUIET not in os.environ
    os.environ.setdefault(_QUIET, "1")
    try:
        search = TuneSearch(session, trials, handed)
        tuner(search).fit()
        session.check()
        trials.give_up("Tune ended before the trial did")
        session.folder.decide("search", "ended the search", search.reason or "Tune ended it")
    finally:
        session.jobs.runner = runner
        if ours:
            del os.environ[_QUIET]


@contextmanager
def held(lock: Path | None, how: int, tick: Callable[[], None] = lambda: None) -> Generator[None]:
    """Hold a lock file, ``how`` as flock takes it; ``tick`` is called now and then while it is somebody else's. None
    is free for all."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                tick()
                time.sleep(TICK_SECONDS)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # by name: a process that was forked meanwhile has the file open, too


@dataclass(slots=True)
class Handed:
    """A runner that keeps jobs until Tune asks for them."""

    workers: int
    lock: Path | None = None
    """Where the workers are on this machine: see :data:`LOCK`."""
    tick: Callable[[], None] = lambda: None
    progress: float = 0.0
    jobs: dict[int, Job] = field(default_factory=dict[int, Job])

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        self.jobs[key] = replace(job, folder=job.folder.absolute())  # Tune's actors work in folders of their own

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        yield from ()

    def paused(self) -> AbstractContextManager[None]:
        """On one machine, once the rungs that run are over; none begins until it ends."""
        return held(self.lock, fcntl.LOCK_EX, self.tick)

    def close(self) -> None:
        self.jobs.clear()


class TuneSearch:
    """What a Tuner needs: :meth:`trainable` and :meth:`tune_config`, or the parts of the latter."""

    def __init__(self, session: Session, trials: Trials, handed: Handed) -> None:
        self.session = session
        self.reason: str | None = None
        """Why no further trial is proposed."""
        self._trials, self._handed = trials, handed
        self._numbers: dict[str, int] = {}
        self.searcher = NightpressSearcher(self)
        self.scheduler = NightpressScheduler(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles what it holds so that ``Tuner.restore`` can; a copy of this one is nothing (see the limits)."""
        return type(None), ()

    def trainable(self) -> Any:
        """The evaluator as a Tune trainable, a rung a step, with the config's resources."""
        needs = self.session.places.needs
        resources: dict[str, float] = {"cpu": needs.cpu, "gpu": needs.gpu, "memory": needs.memory_bytes or 0}
        made = tune.with_parameters(NightpressTrainable, make=self.session.make, lock=self._handed.lock)
        return tune.with_resources(made, {name: value for name, value in resources.items() if value})

    def tune_config(self, **settings: Any) -> tune.TuneConfig:
        """Our sampler and our stopping rule, as many trials as the night has room for; ``settings`` win."""
        ours: dict[str, Any] = {
            "search_alg": self.searcher, "scheduler": self.scheduler, "num_samples": -1, "reuse_actors": True,
            "max_concurrent_trials": self.session.workers,
        }  # fmt: skip
        return tune.TuneConfig(**{**ours, **settings})

    def propose(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial that needs training, as Tune's config of it; None when the search is over."""
        trials, session = self._trials, self.session
        self._handed.workers = len(trials.running) + 1
        while not session.stop:
            self.reason = enough(session, trials)
            if self.reason is not None and not trials.adopted:
                return None
            trials.fill(1)
            new = set(self._handed.jobs) - set(self._numbers.values())
            if new:
                number = new.pop()
                self._numbers[trial_id] = number
                return {"number": number, "jobs": self._ladder(number)}
        return None

    def heard(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Record what a rung gave, once; whether the trial goes on."""
        number, trials = self._numbers[trial_id], self._trials
        job, found = trials.running.get(number), result.get("result")
        if job is None:
            return False
        if isinstance(found, Outcome | Failure) and result["rung"] == job.rung:
            trials.take(number, found)
        return number in trials.running

    def ended(self, trial_id: str, error: bool) -> None:
        """Close a trial that Tune ended before our driver did."""
        number, trials = self._numbers[trial_id], self._trials
        if number not in trials.running:
            return
        if error:
            trials.take(number, Failure(WORKER_LOST, "its Tune actor ended with an error"))
        elif self.session.store.trial(number).qualities:
            trials.close(number, TrialState.STOPPED, "stopped by Tune's scheduler")
        else:
            trials.take(number, Failure("Stopped", "Tune stopped it before its first rung"))

    def _ladder(self, number: int) -> list[Job]:
        """The trial's jobs from where it stands to its top rung."""
        job = self._handed.jobs[number]
        if job.rung == Rung.SHORT:
            return [job]
        return [job, replace(job, rung=Rung.SHORT.value, steps=self.session.state["rungs"]["short_steps"])]


class NightpressTrainable(tune.Trainable):
    """One rung a step. The actor is kept from trial to trial, and its evaluator with it."""

    def setup(self, config: dict[str, Any], make: Factory | None = None, lock: Path | None = None) -> None:
        if make is None:
            raise ValueError("the trainable is made by TuneSearch.trainable")
        self._worker, self._lock = Worker(make), lock
        self._jobs: list[Job] = list(config["jobs"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._jobs = list(new_config["jobs"])
        return True

    def step(self) -> dict[str, Any]:
        job = self._jobs.pop(0)
        with held(self._lock, fcntl.LOCK_SH):  # what is being timed is not disturbed
            found = self._worker(job, None)
        shown = {"accuracy": found.search.accuracy} if isinstance(found, Outcome) else {"failure": found.text}
        return {"rung": job.rung, "result": found, **shown, "done": not self._jobs or isinstance(found, Failure)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a rung's weights lie in the run folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


class NightpressSearcher(Searcher):
    """The night's sampler as Tune's."""

    def __init__(self, search: TuneSearch) -> None:
        super().__init__()
        self._search = search

    def suggest(self, trial_id: str) -> Any:
        return self._search.propose(trial_id) or Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._search.heard(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            self._search.heard(trial_id, result)
        self._search.ended(trial_id, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Raises InputError: see the limits above."""
        raise InputError("a night with Tune is gone on with by run_tune_night(..., resume=True), not by Tuner.restore.")


class NightpressScheduler(FIFOScheduler):
    """Stops a trial where the night's own rule does."""

    def __init__(self, search: TuneSearch) -> None:
        super().__init__()
        self._search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self._search.heard(trial.trial_id, result)
        return TrialScheduler.CONTINUE if goes_on or result.get("done") else TrialScheduler.STOP
