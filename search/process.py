"""A worker process of this machine. Importing this module imports next to nothing, so that a driver can start a worker
before it has imported what it needs itself."""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .worker import Factory

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
DYNAMO = "torch._dynamo"
"""Torch's optimisers import it with their first step, which takes as long as importing torch."""


class WorkerProcess:
    """A worker and our end of its pipe. ``work`` is the evaluator's factory and a cap on memory in bytes; a worker that
    is started before they are known imports its libraries and waits for :meth:`give`."""

    def __init__(self, work: "tuple[Factory, int] | None" = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._progress: Any = context.RawValue("d", 0.0)  # a torn reading does no harm
        ours, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, self._progress, work))
        self.process.start()
        theirs.close()  # so that its death ends the pipe
        self.pipe: Connection = ours  # type: ignore[assignment]  named otherwise on each platform
        self.key: int | None = None
        """Of the job that it works on."""
        self.buried = False

    @property
    def progress(self) -> float:
        """Share of its fine-tune that is done, in [0, 1]."""
        return self._progress.value

    def give(self, work: "tuple[Factory, int]") -> None:
        """What a worker that was started without it waits for. One that has died is found out by its first job."""
        with contextlib.suppress(OSError):
            self.pipe.send(work)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has died, which its pipe tells."""
        with contextlib.suppress(ProcessLookupError):
            if not self.buried and self.process.pid is not None:
                os.kill(self.process.pid, number)

    def bury(self) -> str:
        """Wait for the end; says how it came."""
        self.process.join()
        self.buried = True
        self.pipe.close()
        code = self.process.exitcode or 0
        self.process.close()
        if code == -signal.SIGKILL:
            return "was killed, as it is when memory runs out"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _serve(pipe: Connection, progress: Any, work: "tuple[Factory, int] | None") -> None:
    """A worker's life: one job after another, until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the driver decides
    with contextlib.suppress(AttributeError, OSError):  # Linux only: ends a worker that is paused when the driver dies
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    from .worker import Worker, settle

    def report(done: float) -> None:
        progress.value = done

    try:
        if work is None:
            importlib.import_module(DYNAMO)
        make, memory_bytes = work or pipe.recv()
        settle(memory_bytes)
        worker = Worker(make)
        while True:
            job, cap_seconds = pipe.recv()
            pipe.send(worker(job, cap_seconds, report))
    except (EOFError, ConnectionError):
        return


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
