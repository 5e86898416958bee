"""The study's file: Optuna's journal on a file that survives kills.

Optuna's own file backend leaves a lock behind when its process is killed, and a torn last line makes its file
unreadable for good. Here the kernel frees the lock (flock), each entry is one append, and a torn tail is cut off
before the next entry.
"""

import copy
import fcntl
import json
import os
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalStorageReplayResult  # pyright: ignore[reportPrivateUsage]
from optuna.trial import FrozenTrial, TrialState

from ..spaces.errors import InputError
from ..spaces.files import DISK_FULL

FOLLOWED = frozenset({
    "digest", "started", "role", "predicted", "measured", "size_bytes", "macs", "params", "reused_from", "reason",
    "finished",
})  # fmt: skip
"""Attributes of a trial; ``policy``, ``qualities`` or ``state`` comes after each."""


@lru_cache(maxsize=1 << 14)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


class _Replay(JournalStorageReplayResult):
    """Optuna's replay of a journal, with one object for all equal distributions and without a copy of a trial for each
    of its parameters: a study of 2,000 trials has a quarter of a million of them. Whatever is out of the ordinary is
    left to Optuna's own code."""

    def __init__(self, worker_id_prefix: str) -> None:
        super().__init__(worker_id_prefix)
        self._first: dict[tuple[int, str], BaseDistribution] = {}
        self._changing: set[int] = set()
        """Trials of which nobody outside has the object that stands here now."""

    def apply_logs(self, logs: Iterable[dict[str, Any]]) -> None:
        self._changing.clear()
        super().apply_logs(logs)

    def count(self, study_id: int) -> int:
        """How many trials a study has."""
        return len(self._study_id_to_trial_ids[study_id])

    def _apply_create_trial(self, log: dict[str, Any]) -> None:
        before = len(self._trials)
        known = {name: _distribution(text) for name, text in log.get("distributions", {}).items()}
        super()._apply_create_trial({**log, "distributions": {}, "params": {}})
        if len(self._trials) > before:
            trial = self._trials[before]
            trial.distributions = known
            trial.params = {name: known[name].to_external_repr(v) for name, v in log.get("params", {}).items()}
            for name, distribution in known.items():
                self._first.setdefault((log["study_id"], name), distribution)

    def _apply_set_trial_param(self, log: dict[str, Any]) -> None:
        trial_id, name, distribution = log["trial_id"], log["param_name"], _distribution(log["distribution"])
        trial = self._trials.get(trial_id)
        if trial is None or trial.state.is_finished():
            super()._apply_set_trial_param(log)
            return
        first = self._first.setdefault((self._trial_id_to_study_id[trial_id], name), distribution)
        if first is not distribution:
            super()._apply_set_trial_param(log)
            return
        if trial_id not in self._changing:
            trial = copy.copy(trial)
            trial.params, trial.distributions = dict(trial.params), dict(trial.distributions)
            self._trials[trial_id] = trial
            self._changing.add(trial_id)
        trial.params[name] = distribution.to_external_repr(log["param_value_internal"])
        trial.distributions[name] = distribution


class OneWriterJournal(JournalStorage):
    """A journal's study with one driver. Only it adds trials that wait, so that it need not look at all trials for each
    proposal to find that none does."""

    def __init__(self, backend: BaseJournalBackend) -> None:
        self._replay: _Replay | None = None
        super().__init__(backend)
        self._may_wait = True

    def _sync_with_backend(self) -> None:
        if self._replay is None:  # before anything is read, in the middle of Optuna's own beginning
            self._replay = self._replay_result = _Replay(self._worker_id_prefix)
        super()._sync_with_backend()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        waits = template_trial is not None and template_trial.state is TrialState.WAITING
        self._may_wait = self._may_wait or waits
        return super().create_new_trial(study_id, template_trial)

    def get_n_trials(self, study_id: int, state: TrialState | tuple[TrialState, ...] | None = None) -> int:
        if state is not None or self._replay is None:
            return super().get_n_trials(study_id, state)
        with self._thread_lock:
            self._sync_with_backend()
            return self._replay.count(study_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        only_waiting = states == (TrialState.WAITING,)
        if only_waiting and not self._may_wait:
            return []
        found = super().get_all_trials(study_id, deepcopy, states)
        if only_waiting:
            self._may_wait = bool(found)
        return found


class JournalFile(BaseJournalBackend):
    """One JSON entry a line. Several processes of one machine may share it. ``make_room`` is asked when the disk is
    full; it says whether it freed anything."""

    def __init__(self, path: Path, make_room: Callable[[], bool] = lambda: False) -> None:
        self._path = path
        self._make_room = make_room
        self._prepare()
        self._read_to = 0  # bytes
        self._read_count = 0  # entries

    def _prepare(self) -> None:
        self._path.touch()
        with self._locked() as file:
            _cut_torn_tail(file)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Entries from number ``log_number_from`` on. Raises InputError naming the line that is damaged."""
        if log_number_from == self._read_count and self._path.stat().st_size == self._read_to:
            return []  # asked before and after each entry, and nearly always nothing is new
        return self._entries(log_number_from)

    def _entries(self, log_number_from: int) -> Generator[dict[str, Any]]:
        with self._path.open("rb") as file:
            if log_number_from >= self._read_count:
                skip = log_number_from - self._read_count
                file.seek(self._read_to)
            else:
                skip, self._read_to, self._read_count = log_number_from, 0, 0
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing it, or died while it did
                    break
                self._read_to += len(line)
                self._read_count += 1
                if skip:
                    skip -= 1
                else:
                    yield self._entry(line)

    def _entry(self, line: bytes) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError:
            raise InputError(
                f"{self._path}: line {self._read_count} is damaged, so the run cannot be gone on with or added to; "
                "report and status still read the rest."
            ) from None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append entries. They survive the death of the process at once, and a power cut when this returns, but for
        those that :func:`_followed` names. Raises OSError when they cannot be written; then none stands in the file."""
        data = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        durable = not all(_followed(log) for log in logs)
        with self._locked() as file:
            _cut_torn_tail(file)
            while True:
                try:
                    return _append(file, data, durable=durable)
                except OSError as error:
                    if error.errno not in DISK_FULL or not self._make_room():
                        raise

    @contextmanager
    def _locked(self) -> Generator[int]:
        file = os.open(self._path, os.O_RDWR | os.O_APPEND)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)  # frees the lock as well


class ReadJournal(JournalFile):
    """A journal that somebody else writes, for those who only look."""

    def _prepare(self) -> None:
        pass

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Raises InputError."""
        raise InputError(f"{self._path}: it was opened for reading only.")


def _followed(log: Mapping[str, Any]) -> bool:
    """Whether the entry needs no flush of its own: a trial that was asked for, because its policy follows; its single
    parameters, of which there are dozens and which its policy repeats; attributes that are always followed by one whose
    flush takes them along; and what the sampler was told, because after a power cut it is told again."""
    if "trial_id" in log:
        return "user_attr" not in log or not FOLLOWED.isdisjoint(log["user_attr"])
    return "datetime_start" in log and "state" not in log


def _append(file: int, data: bytes, *, durable: bool) -> None:
    """All of it or nothing: a full disk may take a part."""
    size = os.fstat(file).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        if durable:
            os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def _cut_torn_tail(file: int) -> None:
    """Drop what stands behind the last line break: an entry whose writer died was never acknowledged."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return
    end, step = size, 1 << 16
    while end > 0:
        start = max(0, end - step)
        chunk = os.pread(file, end - start, start)
        position = chunk.rfind(b"\n")
        if position >= 0:
            os.ftruncate(file, start + position + 1)
            return
        end = start
    os.ftruncate(file, 0)
