"""Where evaluations run. A runner has three methods; it never decides anything."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from ..evaluators.evaluate import Job, Outcome
from .worker import WORKER_LOST, Factory, Failure, Worker, settle

MEMORY_SHARE = 0.8
"""Of the machine's memory, for all workers together."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


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


@dataclass(slots=True)
class _Process:
    """A worker and our end of its pipe."""

    process: SpawnProcess
    pipe: Connection
    key: int | None = None
    """Of the job that it works on."""


class LocalRunner:
    """Evaluations in processes of this machine. A worker that dies loses its own job only; the next job gets a new one.

    ``memory_bytes`` caps each worker; by default 80 % of the machine's memory is divided among them.
    """

    def __init__(self, make: Factory, workers: int, memory_bytes: int | None = None) -> None:
        self._make = make
        self._workers = workers
        self._memory_bytes = memory_bytes or int(MEMORY_SHARE * machine_bytes() / workers)
        self._context = multiprocessing.get_context("spawn")
        self._progress: Any = self._context.RawValue("d", 0.0)  # a torn reading does no harm
        self._waiting: deque[tuple[int, Job, float | None]] = deque()
        self._processes: list[_Process] = []

    @property
    def workers(self) -> int:
        return self._workers

    @property
    def progress(self) -> float:
        return self._progress.value

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
                result = Failure(WORKER_LOST, f"the worker process {self._bury(worker)}")
            self._start_waiting()
            yield key, result

    @contextmanager
    def paused(self) -> Generator[None]:
        stopped = [worker.process for worker in self._processes if worker.key is not None]
        for process in stopped:
            _signal(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in stopped:
                _signal(process, signal.SIGCONT)

    def close(self) -> None:
        for worker in self._processes:
            worker.process.kill()
        for worker in list(self._processes):
            self._bury(worker)
        self._waiting.clear()

    def _start_waiting(self) -> None:
        while self._waiting:
            worker = next((w for w in reversed(self._processes) if w.key is None), None)
            if worker is None:
                if len(self._processes) == self._workers:
                    return
                worker = self._spawn()
            try:
                worker.pipe.send(self._waiting[0][1:])
            except OSError:  # it died between two jobs
                self._bury(worker)
                continue
            worker.key = self._waiting.popleft()[0]

    def _spawn(self) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._make, self._progress, self._memory_bytes))
        process.start()
        theirs.close()  # so that its death ends the pipe
        self._processes.append(_Process(process, ours))  # type: ignore[arg-type]  named otherwise on each platform
        return self._processes[-1]

    def _bury(self, worker: _Process) -> str:
        """Forget a worker that has ended; says how it did."""
        self._processes.remove(worker)
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode or 0
        worker.process.close()
        if code == -signal.SIGKILL:
            return "was killed, as it is when memory runs out"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _signal(process: SpawnProcess, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just died, which its pipe will tell
        if process.pid is not None:
            os.kill(process.pid, number)


def _serve(pipe: Connection, make: Factory, progress: Any, memory_bytes: int) -> None:
    """A worker's life: one job after another, until the driver is gone."""
    settle(memory_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the driver decides
    with contextlib.suppress(AttributeError, OSError):  # Linux only: ends a worker that is paused when the driver dies
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    worker = Worker(make)

    def report(done: float) -> None:
        progress.value = done

    while True:
        try:
            job, cap_seconds = pipe.recv()
            pipe.send(worker(job, cap_seconds, report))
        except (EOFError, ConnectionError):
            return


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
