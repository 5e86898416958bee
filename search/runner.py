"""Where evaluations run. A runner has three methods; it never decides anything."""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import wait
from typing import Protocol

from ..evaluators.evaluate import Job, Outcome
from .process import WorkerProcess
from .worker import WORKER_LOST, Factory, Failure

MEMORY_SHARE = 0.8
"""Of the machine's memory, for all workers together."""


class Runner(Protocol):
    """Runs jobs somewhere. Keys are chosen by the caller; an evaluation is idempotent, so a job whose worker was lost
    may be submitted again."""

    @property
    def workers(self) -> int:
        """How many jobs run at once as things stand; it changes where workers come and go."""
        ...

    @property
    def progress(self) -> float:
        """Share of the latest reported fine-tune that is done, in [0, 1]."""
        ...

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        """Take a job, which may run for ``cap_seconds``; at most ``workers`` run at once, the rest wait."""
        ...

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        """Results that came within the timeout, as soon as there is at least one."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Inside, no job uses the driver's machine, so that something can be timed there."""
        ...

    def close(self) -> None:
        """End all workers at once; what was running is lost and can be submitted again."""
        ...


def machine_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class LocalRunner:
    """Evaluations in processes of this machine. A worker that dies loses its own job only; the next job gets a new one.

    ``memory_bytes`` caps each worker; by default 80 % of the machine's memory is divided among them. ``ahead`` is a
    worker that was started before anything was known of its work.
    """

    def __init__(
        self, make: Factory, workers: int, memory_bytes: int | None = None, ahead: WorkerProcess | None = None
    ) -> None:
        self._work = make, memory_bytes or int(MEMORY_SHARE * machine_bytes() / workers)
        self._workers = workers
        self._waiting: deque[tuple[int, Job, float | None]] = deque()
        self._processes: list[WorkerProcess] = []
        if ahead is not None:
            ahead.give(self._work)
            self._processes.append(ahead)

    @property
    def workers(self) -> int:
        return self._workers

    @property
    def progress(self) -> float:
        return max((worker.progress for worker in self._processes if worker.key is not None), default=0.0)

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        self._waiting.append((key, job, cap_seconds))
        self._start_waiting()

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        busy = {worker.pipe: worker for worker in self._processes if worker.key is not None}
        if not busy:
            return
        for pipe in wait(list(busy), timeout_seconds):
            worker = busy[pipe]  # type: ignore[index]  wait returns what it was given
            if worker.key is None:
                continue
            key, worker.key = worker.key, None
            try:
                result = worker.pipe.recv()
            except (EOFError, ConnectionError):
                self._processes.remove(worker)
                result = Failure(WORKER_LOST, f"the worker process {worker.bury()}")
            self._start_waiting()
            yield key, result

    @contextmanager
    def paused(self) -> Generator[None]:
        stopped = list(self._processes)  # one that is idle may be importing its libraries
        for worker in stopped:
            worker.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in stopped:
                worker.signal(signal.SIGCONT)

    def close(self) -> None:
        for worker in self._processes:
            worker.process.kill()
        for worker in self._processes:
            worker.bury()
        self._processes.clear()
        self._waiting.clear()

    def _start_waiting(self) -> None:
        while self._waiting:
            worker = next((w for w in reversed(self._processes) if w.key is None), None)
            if worker is None:
                if len(self._processes) == self._workers:
                    return
                worker = WorkerProcess(self._work)
                self._processes.append(worker)
            try:
                worker.pipe.send(self._waiting[0][1:])
            except OSError:  # it died between two jobs
                self._processes.remove(worker)
                worker.bury()
                continue
            worker.key = self._waiting.popleft()[0]
