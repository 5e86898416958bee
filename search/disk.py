"""Room on the disk: what a run may use, what nobody needs any more, and what to do when there is none."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..spaces.files import DISK_FULL
from .folder import ARTIFACTS, RunFolder
from .pareto import dominated_by
from .records import Rung, TrialRecord, TrialState
from .session import Session
from .worker import Failure

log = logging.getLogger("nightpress")
RESERVE_BYTES = 64 << 20
"""Free space below which nothing new begins, beside what a few checkpoints take."""
CHECKPOINTS_AHEAD = 4
SUFFIX = ".safetensors"
PAUSE_SECONDS, PAUSE_SHARE = 600.0, 0.05
"""How long a search waits for somebody to make room, at most: the less of the two."""


def is_full(failure: object) -> bool:
    """Whether an evaluation failed because it could not write; safetensors' own error says it in words only."""
    return isinstance(failure, Failure) and any(os.strerror(number) in failure.text for number in DISK_FULL)


def used_bytes(folder: RunFolder) -> int:
    """What the run's artefacts take."""
    return sum(_size(path) for path in (folder.path / ARTIFACTS).rglob("*"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # a worker has just renamed it
        return 0


def shortage(folder: RunFolder, max_bytes: int) -> str | None:
    """Why nothing new should begin, in a sentence; None while there is room."""
    largest = max((_size(p) for p in (folder.path / ARTIFACTS).rglob(f"*{SUFFIX}")), default=0)
    free, needed = shutil.disk_usage(folder.path).free, RESERVE_BYTES + CHECKPOINTS_AHEAD * largest
    if free < needed:
        return f"the disk has {megabytes(free)} left, and the night needs {megabytes(needed)} to go on"
    used = used_bytes(folder)
    if used + CHECKPOINTS_AHEAD * largest > max_bytes:
        return f"the artefacts take {megabytes(used)} of max_disk {megabytes(max_bytes)}"
    return None


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def collect(folder: RunFolder, trials: Sequence[TrialRecord], running: Iterable[int], keep: Iterable[int] = ()) -> int:
    """Delete checkpoints that nothing needs; returns the bytes that came free.

    Needed are those of trials that run or are listed in ``keep``, of baselines, and of what nothing dominates even at
    the fast end of its interval; of each only the highest rung. Exported models and their weights always stay.
    """
    busy = set(running)
    wanted = {t.number for t in trials if t.role == "baseline"} | set(promising(trials)) | set(keep)
    freed = 0
    for trial in trials:
        source = folder.artifacts(trial.number)
        if trial.number in busy or trial.state is TrialState.RUNNING or not source.is_dir():
            continue
        reached = [r for r in Rung if (source / f"{r}{SUFFIX}").is_file()]
        stays = reached[-1] if reached and (trial.number in wanted or reached[-1] is Rung.LONG) else None
        unneeded = [source / f"{r}{SUFFIX}" for r in reached if r is not stays] + list(source.glob("*.partial"))
        for path in unneeded:
            freed += _size(path)
            path.unlink(missing_ok=True)
    return freed


def free_disk(session: Session, running: Iterable[int]) -> int:
    """Collect what the night can do without, and set space aside for the record again; returns the bytes freed."""
    freed = collect(session.folder, session.store.trials(), running)
    session.folder.lay_ballast()
    if freed:
        session.folder.decide(
            str(session.state["phase"]), f"freed {megabytes(freed)} of checkpoints",
            "nothing needs those of dominated and failed trials, nor a rung whose successor is there",
        )  # fmt: skip
    return freed


def drop_below(folder: RunFolder, number: int, rung: str) -> None:
    """Delete a trial's checkpoints of the rungs below one that is on record: it goes on from the highest."""
    order = list(Rung)
    for lower in order[: order.index(Rung(rung))]:
        (folder.artifacts(number) / f"{lower}{SUFFIX}").unlink(missing_ok=True)


def find_room(session: Session, running: Iterable[int], give_up: Callable[[], bool] = lambda: False) -> bool:
    """Make room where it lacks, and wait some time for others to make it; whether the night can go on. ``give_up``
    does without something that could still be of use, and says whether there was anything."""
    short = _shortage(session)
    if short is None:  # or there is none again: somebody else had filled the disk, or a write exceeded a quota
        session.folder.lay_ballast()
        return True
    free_disk(session, running)
    short = _shortage(session)
    while short is not None and give_up():
        free_disk(session, running)
        short = _shortage(session)
    if short is None:
        return True
    if session.state.get("disk_full"):  # it was waited for already
        return False
    session.trouble(f"{short}: the night pauses")
    end = time.monotonic() + min(PAUSE_SECONDS, PAUSE_SHARE * session.clock.total_seconds)
    while short is not None and time.monotonic() < end:
        time.sleep(1)
        session.tick()
        short = _shortage(session)
    if short is None:
        session.folder.lay_ballast()
    session.update(disk_full=short is not None)
    session.folder.decide(str(session.state["phase"]), "went on" if short is None else "no room was made",
                          short or "there is room again")  # fmt: skip
    return short is None


def _shortage(session: Session) -> str | None:
    return shortage(session.folder, session.config.max_disk_bytes)


def promising(trials: Sequence[TrialRecord]) -> list[int]:
    """Numbers of the trials that may still be finalists: dominated by none at the best that their errors allow."""
    done = [t for t in trials if t.state is TrialState.COMPLETE and t.reused_from is None]
    points = np.array([point for t in done if (point := t.losses)])
    return [t.number for t in done if (hoped := t.hoped(2)) and not dominated_by(hoped, points)]
