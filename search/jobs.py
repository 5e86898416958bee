"""Jobs on a runner, seen through the faults of workers, machines and memory: what is repeated, and for how long a job
may run. Everything that sends jobs goes through here; results come out once a job."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..evaluators.evaluate import GIVEN, RUNGS, Job, Outcome
from .runner import Runner
from .worker import GRACE_SECONDS, HUNG, OUT_OF_MEMORY, WORKER_LOST, Failure

MOST_LOST = 2
"""How many workers may be lost under a job before it counts as the job's own fault."""
LEAST_BATCH = 2
PEERS = 3
PATIENCE = 5.0
"""A job may take so many times what the slowest of its peers took."""
LEAST_CAP_SECONDS = 60.0
FIRST_CAP_SECONDS = 300.0
FIRST_PATIENCE = 10.0


@dataclass(slots=True)
class _Peers:
    """Jobs of one rung and length that came to an end."""

    count: int = 0
    slowest_seconds: float = 0.0


@dataclass(slots=True)
class _Running:
    job: Job
    cap_seconds: float | None
    lost: int = 0
    since: float = 0.0
    pauses: int = 0
    """How often all work had been paused before it began."""


@dataclass(slots=True)
class Jobs:
    """``expected_seconds`` says what a job should take while it has no peers; ``batch_size`` is that of jobs which say
    nothing; ``tell`` hears (what was done, why) of each repetition; ``now`` is a clock for spans, in seconds."""

    runner: Runner
    batch_size: int
    expected_seconds: Callable[[Job], float]
    tell: Callable[[str, str], None]
    now: Callable[[], float] = time.monotonic
    _pauses: int = 0
    _running: dict[int, _Running] = field(default_factory=dict[int, _Running])
    _peers: dict[tuple[str, int], _Peers] = field(default_factory=dict[tuple[str, int], _Peers])

    def submit(self, key: int, job: Job) -> None:
        """Start a job. Its result comes once, after whatever repetitions it needs."""
        self._submit(key, _Running(job, self.cap_seconds(job)))

    @contextmanager
    def paused(self) -> Generator[None]:
        """Inside, no job uses the driver's machine. What is stopped meanwhile does not know it: its time goes on."""
        self._pauses += 1
        with self.runner.paused():
            yield

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        """Results that came within the timeout, as soon as there is at least one; failures are final."""
        for key, result in self.runner.as_completed(timeout_seconds):
            running = self._running.pop(key)
            if isinstance(result, Outcome):
                self._learn(running.job, result)
                yield key, result
                continue
            failure = self._judged(running, result)
            again = self._again(key, running, failure)
            if again is None:
                yield key, failure
            else:
                self._submit(key, again)

    def cap_seconds(self, job: Job) -> float | None:
        """How long a job may run: by its slowest peer, by what it should take where it has too few. The judgement of
        the given model has no peer and may take its time, because nothing goes on without it."""
        if job.rung == GIVEN:
            return None
        peers = self._peers.get((job.rung, job.steps), _Peers())
        if peers.count < PEERS:
            return FIRST_CAP_SECONDS + FIRST_PATIENCE * self.expected_seconds(job)
        return max(LEAST_CAP_SECONDS, PATIENCE * peers.slowest_seconds)

    def _submit(self, key: int, running: _Running) -> None:
        self._running[key] = replace(running, since=self.now(), pauses=self._pauses)
        self.runner.submit(key, running.job, running.cap_seconds)

    def _learn(self, job: Job, outcome: Outcome) -> None:
        peers = self._peers.setdefault((job.rung, job.steps), _Peers())
        peers.count += 1
        peers.slowest_seconds = max(peers.slowest_seconds, outcome.seconds)

    def _judged(self, running: _Running, failure: Failure) -> Failure:
        """A worker that had to be ended because its job did not heed the cap was not lost: the job hung."""
        cap = running.cap_seconds
        if failure.kind == WORKER_LOST and cap is not None and self.now() - running.since >= cap + GRACE_SECONDS:
            return Failure(HUNG, f"it took longer than {cap:.3g} s and could not be interrupted")
        return failure

    def _again(self, key: int, running: _Running, failure: Failure) -> _Running | None:
        """The job as it is to be repeated; None when the failure is final."""
        job = running.job
        name = f"trial {key}: rung {job.rung}" if job.rung in RUNGS else f"{job.rung} {key}"
        if failure.kind == HUNG and running.pauses < self._pauses:
            self.tell(f"{name} is run again", f"{failure.text}, in which it was paused for a measurement")
            return running
        if failure.kind == WORKER_LOST and running.lost < MOST_LOST:
            self.tell(f"{name} is run again", failure.text)
            return replace(running, lost=running.lost + 1)
        smaller = (job.batch_size or self.batch_size) // 2
        if failure.kind == OUT_OF_MEMORY and job.batch_size is None and smaller >= LEAST_BATCH:
            self.tell(f"{name} is run again with batches of {smaller}", f"out of memory: {failure.text}")
            cap = 2 * running.cap_seconds if running.cap_seconds is not None else None
            return replace(running, job=replace(job, batch_size=smaller), cap_seconds=cap)
        return None
