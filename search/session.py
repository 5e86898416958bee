"""What all phases of a night share, and how they are told to stop."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import optuna
from numpy.typing import NDArray

from ..evaluators.evaluate import Job, Outcome
from ..evaluators.latency.insitu import UnseenKernelError
from ..evaluators.latency.measure import REFERENCE, MeasurementError, Timer, Timing, noise_warnings
from ..evaluators.latency.profile import Profile
from ..evaluators.latency.profile_file import profile_to_dict
from ..evaluators.onnx_graph import build_onnx, random_tensors
from ..evaluators.quality import Score
from ..evaluators.task import Task
from ..spaces.anatomy import Anatomy
from ..spaces.plan import Plan, plan
from ..spaces.plans import Choices, policy_at
from ..spaces.policy import Policy, digest
from ..spaces.space import Space
from .clock import Clock, length
from .config import RunConfig
from .folder import STATE, TARGET, RunFolder
from .glance import minute_line
from .jobs import Jobs
from .notify import notify
from .places import Places
from .process import WorkerProcess
from .proposals import Sensitivity
from .records import Latency, Quality
from .runner import Runner
from .store import Store
from .worker import Factory, Failure

log = logging.getLogger("nightpress")
TICK_SECONDS = 0.25
T = TypeVar("T")
MINUTE_SECONDS = 60.0
STATE_SECONDS = 10.0  # how old what ``status`` reads may be


class InterruptionError(BaseException):
    """Ctrl-C or SIGTERM: the night ends gracefully. What catches the exceptions of the user's code lets it pass."""


class OverdueError(Exception):
    """A phase ran into the time of what must follow it: what is under way is given up."""


@dataclass(slots=True)
class Prepared:
    """What the inspection found; fixed for the rest of the night."""

    task: Task
    anatomy: Anatomy
    space: Space
    train_items: int
    """What is left of the training data once the search split is taken out."""
    step_ms: float
    """One fine-tune step of the uncompressed model, in ms."""


@dataclass(slots=True)
class Session:
    """One driver's hold on one run."""

    config: RunConfig
    folder: RunFolder
    clock: Clock
    watch: Callable[["Session"], None]
    state: dict[str, Any] = field(default_factory=dict[str, Any])
    stop: bool = False
    followers: tuple[str, ...] = ()
    """Phases whose time the running one must not touch, whatever it is busy with."""
    unmeasurable: bool = False
    """Whether a kind of kernel that was never measured could not be measured either: no further one is tried."""
    _told: float = 0.0  # of the minute line
    _written: float = 0.0  # of the state
    _parts: dict[str, Any] = field(default_factory=dict[str, Any])
    _cost_cache: dict[str, tuple[float, float, float, int]] = field(
        default_factory=dict[str, tuple[float, float, float, int]]
    )

    # What a phase produces and later ones need. Asking before it is there is a bug, not a user's error.
    @property
    def prepared(self) -> Prepared:
        return self._parts["prepared"]

    @property
    def profile(self) -> Profile:
        return self._parts["profile"]

    @property
    def store(self) -> Store:
        return self._parts["store"]

    @property
    def places(self) -> Places:
        return self._parts["places"]

    @property
    def make(self) -> Factory:
        """Makes a worker's evaluator."""
        return self._parts["make"]

    @property
    def ahead(self) -> WorkerProcess | None:
        """A worker of this machine that was started before anything was known of its work."""
        return self._parts.get("ahead")

    @property
    def jobs(self) -> Jobs:
        return self._parts["jobs"]

    @property
    def runner(self) -> Runner:
        return self.jobs.runner

    @property
    def workers(self) -> int:
        """How many jobs can run at once now, at least one."""
        return max(1, self.runner.workers)

    @property
    def sensitivity(self) -> Sensitivity:
        return self._parts.get("sensitivity") or Sensitivity()

    @property
    def inspected(self) -> bool:
        """Whether the task is loaded and known."""
        return "prepared" in self._parts

    @property
    def begun(self) -> bool:
        """Whether there is a study yet."""
        return "store" in self._parts

    def close(self) -> None:
        """End the workers, where there are any."""
        if "jobs" in self._parts:
            self.runner.close()
        if self.begun:
            self.store.close()
        if "places" in self._parts:
            self.places.close()

    @property
    def sampler(self) -> optuna.samplers.BaseSampler:
        return self._parts["sampler"]

    def provide(self, **parts: Any) -> None:
        self._parts.update(parts)

    def use_profile(self, profile: Profile) -> None:
        """From now on predict by this one; what was predicted before is forgotten."""
        self.provide(profile=profile)
        self._cost_cache.clear()

    def keep_profile(self, profile: Profile) -> None:
        """Use this profile and write it to the run's folder, with what was measured beside it."""
        self.use_profile(profile)
        self.folder.write_json(TARGET, {**profile_to_dict(profile), **self._parts.get("beside_profile", {})})

    @contextmanager
    def phase(self, name: str, *followers: str) -> Generator[None]:
        """Mark a phase in state and log; its seconds are counted even when it is interrupted. It ends with an
        OverdueError when it runs into the time of its followers."""
        start = time.monotonic()
        self.followers = followers
        self.update(phase=name, activity=None)
        log.info("phase %s", name)
        try:
            yield
        finally:
            self.followers = ()
            spent = self.state.setdefault("seconds", {})
            spent[name] = round(spent.get(name, 0.0) + time.monotonic() - start, 2)
            self.update()
        self.check()

    def update(self, **values: Any) -> None:
        """Change the state file; ``status`` reads it from other terminals."""
        self.state.update(values)
        self._written = time.monotonic()
        self.folder.write_json(STATE, self.state)
        self.watch(self)

    def check(self) -> None:
        """Raises InterruptionError when a signal came."""
        if self.stop:
            raise InterruptionError

    def results(self, timeout_seconds: float = TICK_SECONDS) -> Iterator[tuple[int, Outcome | Failure]]:
        """Results of submitted jobs within one tick; keeps the live view and the stop signal served."""
        for key, result in self.jobs.as_completed(timeout_seconds):
            if isinstance(result, Outcome):
                self._count("evaluated_seconds", result.seconds)
            yield key, result
        self.tick()

    @contextmanager
    def measuring(self) -> Generator[None]:
        """Count the seconds that a measurement on the target takes."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._count("measured_seconds", time.monotonic() - start)

    def _count(self, kind: str, seconds: float) -> None:
        spent = self.state.setdefault(kind, {})
        phase = str(self.state.get("phase"))
        spent[phase] = round(spent.get(phase, 0.0) + seconds, 3)

    def tick(self) -> None:
        """What goes on whatever a phase is busy with: the live view, a line a minute, clocks, signals, the deadline.

        Raises InterruptionError and OverdueError.
        """
        happened = self.clock.noticed()
        if happened is not None:
            self.replan({}, happened)
        if time.monotonic() - self._told >= MINUTE_SECONDS:
            self._told = time.monotonic()
            log.info("%s", minute_line(self))
        if time.monotonic() - self._written >= STATE_SECONDS:
            self.update()
        self.watch(self)
        self.check()
        if self.followers and self.clock.left_before(*self.followers) <= 0:
            raise OverdueError(f"the time for {', '.join(self.followers)} has come")

    def replan(self, seconds: Mapping[str, float], reason: str) -> None:
        """Give phases that are to come another length, in seconds, because of what was learned."""
        self.clock.planned.update(seconds)
        shares = self.clock.shares()
        self.state["deadline_epoch"] = self.clock.deadline
        self.update(deadline=self.clock.deadline_text(), shares=shares)
        total = self.clock.total_seconds
        told = ", ".join(f"{phase} {length(shares[phase] * total)}" for phase in seconds) or "what is left"
        self.folder.decide(self.state.get("phase") or "inspect", f"planned anew: {told}", reason, shares=shares)

    def trouble(self, text: str) -> None:
        """Tell whoever is away that the night needs them."""
        log.warning("%s", text)
        notify(self.config.notify, self.folder.path, "trouble", text)

    def run_all(
        self, jobs: Iterable[tuple[int, Job]], until_left_seconds: float | None = None
    ) -> Iterator[tuple[int, Outcome | Failure]]:
        """Run independent jobs, each taken when a worker is free for it; starts none past the time limit."""
        waiting, running = iter(jobs), 0

        def begin() -> bool:
            late = until_left_seconds is not None and self.clock.left_seconds < until_left_seconds
            job = None if late else next(waiting, None)
            if job is not None:
                self.jobs.submit(*job)
            return job is not None

        while True:
            while running < self.workers and begin():
                running += 1
            if not running:
                return
            for key, result in self.results():
                running -= 1
                yield key, result

    def costs(self, policy: Policy) -> tuple[float, int]:
        """Predicted latency in ms and file size in bytes, without building the graph."""
        latency = float(self._predicted([policy])[0, 0])
        return latency, self.profile.predict_size(plan(self.prepared.anatomy, policy))

    def costs_of(self, choices: Choices) -> NDArray[np.float64]:
        """The same for tens of thousands, shape (n, 2). A kind of kernel that was never measured is measured first;
        where it cannot be, because the profile is of another device or the runtime refuses it, the latency is NaN."""
        found = self.profile.costs(choices)
        elsewhere = self.profile.remote or self.profile.forced
        while not (elsewhere or self.unmeasurable) and (unseen := np.flatnonzero(np.isnan(found[:, 0]))).size:
            try:
                self._predicted([policy_at(self.prepared.anatomy, choices, int(unseen[0]))])
            except (MeasurementError, UnseenKernelError) as error:
                self.unmeasurable = True
                self.folder.decide("search", "policies of some kinds of kernels are not proposed", str(error))
            found = self.profile.costs(choices)
        return found

    def predict(self, policy: Policy) -> tuple[float, float, float, int]:
        """Predicted latency with the ends of its interval (ms), and the file size in bytes, for which the
        graph is built as it will be exported."""
        key = digest(policy)
        if key not in self._cost_cache:
            planned = plan(self.prepared.anatomy, policy)
            latency, low, high = (float(value) for value in self._predicted([policy])[0])
            self._cost_cache[key] = (latency, low, high, file_size(planned))
        return self._cost_cache[key]

    @property
    def forced(self) -> str | None:
        """What every number from the profile must carry: in what it differs from this model or device."""
        return self.profile.caveat

    def predicted(self, policy: Policy) -> Latency:
        """A policy's predicted latency as a record."""
        latency, low, high, _ = self.predict(policy)
        return Latency(latency_ms=latency, low_ms=low, high_ms=high, measured=False, forced=self.forced)

    def _predicted(self, policies: Sequence[Policy]) -> NDArray[np.float64]:
        """The profile's predictions; a policy with a kind of kernel that was never measured is measured first."""
        try:
            return self.profile.predict(policies)
        except UnseenKernelError as error:
            self._parts["measure_unseen"](self, policies[0], error)
            return self.profile.predict(policies)

    def measured(self, timings: Mapping[str, Timing], phase: str) -> None:
        """Keep the reference's own figures, the noise of the night, and warn of what makes it."""
        if REFERENCE not in timings:
            return
        reference = timings[REFERENCE]
        entry = {
            "time": time.time(), "phase": phase, "reference_ms": reference.latency_ms,
            "repeat_error": reference.repeat_error, "busy_cores": reference.busy_cores,
            "unsettled": sum(not timing.settled for timing in timings.values()),
        }  # fmt: skip
        self.state.setdefault("noise", []).append(entry)
        for text in noise_warnings(timings, node=self.places.target_node):
            self.warn(phase, text)

    def warn(self, phase: str, text: str) -> None:
        """Tell and keep what makes the numbers of the night less sure."""
        log.warning("%s: %s", phase, text)
        self.state.setdefault("warnings", []).append({"time": time.time(), "phase": phase, "text": text})

    def time_files(self, files: Mapping[str, Path], reference: Path, phase: str) -> dict[str, Timing]:
        """Time files while nothing of ours trains. Raises MeasurementError."""
        return self.on_target(phase, lambda timer: timer.time(files, reference))

    @contextmanager
    def timer(self, phase: str) -> Generator[Timer]:
        """A timer of the target device, while training is paused; its seconds are counted, and the noise that it hears
        is kept."""
        listener = partial(self.measured, phase=phase)
        with self.jobs.paused(), self.measuring(), self.places.timer(self.config.target, listener) as timer:
            yield timer

    def on_target(self, phase: str, measure: Callable[[Timer], T]) -> T:
        """Measure on the target while nothing of ours trains there, and once more when it was lost meanwhile.

        Raises MeasurementError when it is lost again.
        """
        try:
            with self.timer(phase) as timer:
                return measure(timer)
        except MeasurementError as error:
            self.folder.decide(phase, "the measurement is repeated", f"it was lost: {error}")
            with self.timer(phase) as timer:
                return measure(timer)


def file_size(planned: Plan) -> int:
    """Bytes of the ONNX file that the plan exports to."""
    return len(build_onnx(planned, random_tensors(planned), batch=None))


def latency_of(timing: Timing, forced: str | None = None) -> Latency:
    """A measurement as a record; ``forced`` is what the run overlooks (see :attr:`Session.forced`)."""
    return Latency.of_windows(
        timing.latency_ms, timing.repeat_error, timing.reference_ms, settled=timing.settled, forced=forced
    )


def quality_of(
    score: Score, rung: str, split: str, losses: tuple[float, ...] = (), seconds: float | None = None
) -> Quality:
    return Quality(
        rung=rung, split=split, accuracy=score.accuracy, accuracy_se=score.accuracy_se, samples=score.samples,
        seconds=score.seconds if seconds is None else seconds, losses=losses,
    )  # fmt: skip
