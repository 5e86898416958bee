"""What runs in a worker process, whoever started it: an evaluator that is made once, and bounds on memory and time."""

import faulthandler
import math
import os
import resource
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from tqdm import tqdm

from ..evaluators.evaluate import Job, Outcome

Progress = Callable[[float], None]
Evaluate = Callable[[Job, Progress | None], Outcome]
Factory = Callable[[], Evaluate]
"""Makes a worker's evaluator. It travels to the workers, so it must be picklable."""

OUT_OF_MEMORY, HUNG, WORKER_LOST = "OutOfMemory", "Hung", "WorkerLost"
"""Kinds of failures that say more of the machine than of the policy."""
GRACE_SECONDS = 5.0
"""How long a job beyond its time may take to notice; then its worker ends."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An evaluation that gave no outcome: the exception's type, or one of the kinds above, and text."""

    kind: str
    text: str


class HungError(Exception):
    """The job took longer than it was allowed to."""


class Worker:
    """A process's evaluator. ``make`` runs with the first job, and again after a failure that may have damaged it."""

    def __init__(self, make: Factory) -> None:
        self._make = make
        self._evaluate: Evaluate | None = None

    def __call__(self, job: Job, cap_seconds: float | None, progress: Progress | None = None) -> Outcome | Failure:
        """The outcome, or why there is none. The cap holds for the evaluation alone, not for making the evaluator."""
        try:
            if self._evaluate is None:
                self._evaluate = self._make()
            with capped(cap_seconds):
                return self._evaluate(job, progress)
        except Exception as error:  # noqa: BLE001  the one place where a trial becomes FAILED
            found = failure_of(error)
        if found.kind in (OUT_OF_MEMORY, HUNG):
            self._evaluate = None  # it holds on to memory, or was interrupted anywhere
        return found


def failure_of(error: Exception) -> Failure:
    """An exception as a value: its type and the first line of its text."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, HungError):
        return Failure(HUNG, text)
    # What torch's CPU allocator raises is a bare RuntimeError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return Failure(OUT_OF_MEMORY, text or type(error).__name__)
    return Failure(type(error).__name__, text)


@contextmanager
def capped(seconds: float | None) -> Generator[None]:
    """Raises HungError inside the block once the time is over. Code that cannot hear it (a C call that does not return,
    a handler that swallows it) is ended with its process some seconds later. Main thread only."""
    if seconds is None:
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise HungError(f"it took longer than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, late)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  faulthandler writes to its descriptor
        faulthandler.dump_traceback_later(math.ceil(seconds + GRACE_SECONDS), exit=True, file=nowhere)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)


def settle(memory_bytes: int | None) -> None:
    """Prepare a process for its jobs: no lock that a kill would leave behind, and a cap on memory, past which an
    allocation fails and the trial with it; without it the kernel would pick a process to kill."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
