"""Where evaluations run. A runner has three methods; it never decides anything."""

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm

from ..evaluators.evaluate import Evaluator, Job, Outcome, Recipe

MEMORY_SHARE = 0.8
"""Of the machine's memory, for all workers together."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An evaluation that gave no outcome: the exception's type and text."""

    kind: str
    text: str


class Runner(Protocol):
    """Runs jobs somewhere. Keys are chosen by the caller; an evaluation is idempotent."""

    def submit(self, key: int, job: Job) -> None:
        """Take a job; at most ``workers`` run at once."""
        ...

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        """Results that came within the timeout, as soon as there is at least one."""
        ...

    def close(self) -> None:
        """End all workers at once; what was running is lost and can be submitted again."""
        ...


class LocalRunner:
    """Evaluations in processes of this machine. A worker that dies fails its job; the pool is made anew."""

    def __init__(self, recipe: Recipe, workers: int) -> None:
        self._recipe = recipe
        self._workers = workers
        self._memory_bytes = int(MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / workers)
        self._context = multiprocessing.get_context("spawn")
        self._progress: Any = self._context.RawValue("d", 0.0)  # one writer, and a torn reading does no harm
        self._futures: dict[Future[Outcome | Failure], tuple[int, Job]] = {}
        self._pool = self._make_pool()

    @property
    def progress(self) -> float:
        """Share of the latest reported fine-tune that is done, in [0, 1]."""
        return self._progress.value

    def submit(self, key: int, job: Job) -> None:
        try:
            future = self._pool.submit(_evaluate, job)
        except BrokenProcessPool:  # a worker died between two jobs
            self._pool = self._make_pool()
            future = self._pool.submit(_evaluate, job)
        self._futures[future] = (key, job)

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        if not self._futures:
            return
        done, _ = wait(self._futures, timeout=timeout_seconds, return_when=FIRST_COMPLETED)
        broken = False
        for future in done:
            key, _ = self._futures.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                broken = True
                yield key, Failure("WorkerDied", "the worker process ended, as it does when memory runs out")
            elif error is not None:
                yield key, Failure(type(error).__name__, str(error))
            else:
                yield key, future.result()
        if broken:
            self._pool = self._make_pool()

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())
        for process in processes:
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._futures.clear()

    def _make_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._workers,
            mp_context=self._context,
            initializer=_start,
            initargs=(self._recipe, self._progress, self._memory_bytes),
        )


_evaluator: Evaluator | None = None
_shared_progress: Any = None
_recipe: Recipe | None = None


def _start(recipe: Recipe, progress: Any, memory_bytes: int) -> None:
    global _recipe, _shared_progress
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is killed would leave behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the driver decides
    # Past this an allocation fails and the trial with it; without it the kernel would pick a process to kill.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _recipe, _shared_progress = recipe, progress


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _evaluate(job: Job) -> Outcome | Failure:
    global _evaluator
    try:
        if _evaluator is None:
            if _recipe is None:
                return Failure("WorkerNotStarted", "the worker was not given its recipe")
            _evaluator = Evaluator(_recipe)
        return _evaluator(job, _report)
    except Exception as error:  # noqa: BLE001  the one place where a trial becomes FAILED
        return Failure(type(error).__name__, (str(error).strip().splitlines() or [""])[0])


def _report(done: float) -> None:
    if _shared_progress is not None:
        _shared_progress.value = done
