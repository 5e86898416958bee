"""Evaluations without a network: an evaluator whose jobs do what their policy's name says, a runner that takes no time.

It lives here because worker processes import it by name.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nightpress.evaluators.evaluate import Job, Outcome
from nightpress.evaluators.quality import DivergedError, Score
from nightpress.search.worker import Failure
from nightpress.spaces.policy import Policy

GIB = 2**30


def job(act: str, folder: Path, *, rung: str = "bn", steps: int = 0) -> Job:
    """A job that does ``act``: see :class:`Acting`."""
    return Job(policy=Policy(model=act), rung=rung, seed=0, steps=steps, folder=folder)


@dataclass(frozen=True, slots=True)
class Acting:
    """Makes an evaluator; leaves a file in ``folder`` for each one made and each job begun."""

    folder: Path

    def __call__(self) -> Callable[..., Outcome]:
        (self.folder / f"made-{os.getpid()}-{time.monotonic_ns()}").touch()
        return self.evaluate

    def evaluate(self, asked: Job, progress: Callable[[float], None] | None) -> Outcome:
        act, _, value = asked.policy.model.partition(" ")
        begun = self.folder / f"begun-{act}-{asked.folder.name}-{time.monotonic_ns()}"
        begun.write_text(str(os.getpid()))
        seconds = float(value or 0)
        if act == "sleep":
            time.sleep(seconds)
        elif act == "deaf":  # swallows what is to interrupt it
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                try:
                    time.sleep(seconds)
                except Exception:  # noqa: BLE001
                    continue
        elif act == "diverge":
            raise DivergedError("the training loss became nan\nand more that nobody needs")
        elif act == "die" or (
            act == "die-once" and len(list(self.folder.glob(f"begun-die-once-{asked.folder.name}-*"))) == 1
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        elif act == "hoard" and asked.batch_size is None:
            torch.zeros(int(seconds * GIB), dtype=torch.uint8)
        if progress is not None:
            progress(1.0)
        return Outcome(
            search=Score(accuracy=0.5, accuracy_se=None, samples=asked.batch_size or 64, seconds=0.0),
            seconds=seconds, losses=(float(os.getpid()),),
        )  # fmt: skip


@dataclass(slots=True)
class Instant:
    """A runner whose jobs take no time; ``asked`` keeps them all."""

    evaluate: Callable[[Job], Outcome | Failure]
    workers: int = 1
    progress: float = 0.0
    asked: list[tuple[int, Job]] = field(default_factory=list[tuple[int, Job]])
    _done: list[tuple[int, Outcome | Failure]] = field(default_factory=list[tuple[int, Outcome | Failure]])

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        self.asked.append((key, job))
        self._done.append((key, self.evaluate(job)))

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        done, self._done = self._done, []
        yield from done

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._done.clear()
