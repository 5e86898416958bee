"""A run's folder: its files, who may write to it, and the run read back as one value."""

import fcntl
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from ..spaces.errors import InputError
from ..spaces.files import DISK_FULL
from .records import RunRecord
from .store import STUDY, read_study

CONFIG, STATE, TARGET, DECISIONS = "config.yaml", "state.json", "target.json", "decisions.jsonl"
LAYERS, WHY = "layers.json", "why.json"
SENSITIVITY, LOG, REPORT, ARTIFACTS, LOCK = (
    "sensitivity.json",
    "log.jsonl",
    "report.html",
    "artifacts",
    "lock",
)
BALLAST, BALLAST_BYTES = ".ballast", 8 << 20
"""A file that is given up when the disk is full, so that the record and the report can still be written."""
RETRY_SECONDS, PATIENCE_SECONDS = 0.2, 5.0
log = logging.getLogger("nightpress")
T = TypeVar("T")


class RunFolder:
    """The one writer of a run folder. Held by a lock that the kernel frees when the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self.pressed = False
        """Whether the ballast had to be given up."""
        self._pressed_at = -math.inf

    def acquire(self) -> None:
        """Raises InputError naming the other driver's pid and host."""
        lock = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise InputError(f"{self.path}: only one driver may work on a run, but {holder} holds it.") from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def held(self) -> bool:
        """Whether a driver is at work on the run."""
        try:
            with (self.path / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def lay_ballast(self) -> None:
        """Set space aside for the record where none is; without it where the disk is full already."""
        self.pressed = False
        if (self.path / BALLAST).exists():
            return
        try:
            with (self.path / BALLAST).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
        except OSError:
            (self.path / BALLAST).unlink(missing_ok=True)

    def make_room(self) -> bool:
        """Whether a write that found no room is worth another try: give the ballast up; after that, wait a little, for
        some file systems (XFS, btrfs) free in the background what was deleted, and somebody may have taken it first."""
        try:
            (self.path / BALLAST).unlink()
        except FileNotFoundError:
            time.sleep(RETRY_SECONDS)
            return time.monotonic() - self._pressed_at < PATIENCE_SECONDS
        self.pressed, self._pressed_at = True, time.monotonic()
        log.warning("the disk is full: space that was set aside for the record is used now")
        return True

    def drop_ballast(self) -> None:
        (self.path / BALLAST).unlink(missing_ok=True)

    def written(self, write: Callable[[], T]) -> T:
        """Write, again with the ballast's space when the disk is full."""
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in DISK_FULL or not self.make_room():
                    raise

    def artifacts(self, trial: int) -> Path:
        return self.path / ARTIFACTS / str(trial)

    def write_json(self, name: str, data: Any) -> None:
        """Whole or not at all, also when the power fails."""
        partial, text = self.path / f".{name}.partial", json.dumps(data, indent=1, allow_nan=False)

        def write() -> None:
            with partial.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / name)

        self.written(write)

    def read_json(self, name: str) -> Any:
        """The file's content, None when it does not exist."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def decide(self, phase: str, decision: str, reason: str, **evidence: Any) -> None:
        """Record a choice that the agent made by itself."""
        log.info("%s: %s (%s)", phase, decision, reason)
        self._append(
            DECISIONS,
            {
                "time": time.time(),
                "phase": phase,
                "decision": decision,
                "reason": reason,
                "evidence": evidence,
            },
        )

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False) + "\n"

        def write() -> None:
            _end_line(self.path / name)
            with (self.path / name).open("a") as file:
                file.write(line)

        self.written(write)


class JsonLog(logging.Handler):
    """``log.jsonl``: one JSON object a line, always."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        _end_line(path)
        self._file = path.open("a")

    def emit(self, record: logging.LogRecord) -> None:
        entry = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        with suppress(OSError):  # a full disk: the record matters more than its log
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        super().close()


def _end_line(path: Path) -> None:
    """Give a last line that a killed driver tore its end, so that the next one stands on its own."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_run(path: Path) -> RunRecord:
    """A run from its folder. Raises InputError when the folder is not one of a run."""
    folder = RunFolder(path)
    missing = next((name for name in (CONFIG, STATE) if not (path / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{path}: not a run folder: it has no {missing}.")
    config = _read_config(path / CONFIG)
    study = read_study(path, *study_place(config))
    state = read_state(folder)
    if state["state"] == "running" and not folder.held():
        state = {**state, "state": "interrupted", "reason": "its driver ended without a word"}
    parts: dict[str, Any] = {}
    unreadable = list(study.unreadable)
    for key, name in {"target": TARGET, "sensitivity": SENSITIVITY, "layers": LAYERS, "why": WHY}.items():
        try:
            parts[key] = folder.read_json(name)
        except ValueError:  # the report goes without
            parts[key] = None
            unreadable.append(f"{name} (it is not JSON)")
    return RunRecord(
        path=path,
        config=config,
        state=state,
        trials=study.trials,
        decisions=tuple(_lines(path / DECISIONS)),
        approvals=study.approvals,
        unreadable=tuple(unreadable),
        **parts,
    )


def study_place(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """Where a run's study is: the storage's URL, None for the journal in its folder, and the study's name."""
    search = config.get("search") or {}
    return search.get("storage"), search.get("study") or STUDY


def _read_config(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(errors="replace"))
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{path}: the run's config must be a YAML mapping, but the file is damaged.")
    return config


def read_state(folder: RunFolder) -> dict[str, Any]:
    """How a run stands. Raises InputError when the file is damaged."""
    try:
        state = folder.read_json(STATE)
    except ValueError:
        state = None
    if not isinstance(state, dict) or "state" not in state:
        raise InputError(f"{folder.path / STATE}: the run's state must be a JSON object, but the file is damaged.")
    return state


def _lines(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    entries: list[Mapping[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # a torn last line
    return entries
