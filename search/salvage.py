"""The study's journal as far as it can be read: what a damaged file still says, and what it no longer does.

Only trials' and the study's own attributes are read; they hold the whole record (see store.py). Entries of parameters,
of which there are dozens a trial, are passed over unread. Nothing is written, so a report disturbs no running night.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STUDY_ATTR, CREATE_TRIAL, TRIAL_STATE, TRIAL_ATTR = 2, 4, 6, 8
"""Operations of Optuna's journal, ``optuna.storages.journal._storage.JournalOperation``."""
FINISHED = frozenset({1, 2, 3})
"""States of Optuna in which a trial is closed: like its own reader, this one takes no attribute after that."""
_PARAM = re.compile(rb'\{"op_code":5,.*\}\n$')
_OPERATION = re.compile(rb'"op_code":\s*(\d+)')
_TRIAL = re.compile(rb'"trial_id":\s*(\d+)')


class Journal(NamedTuple):
    """Attributes of each trial, by number, and of the study; a sentence for each loss."""

    trials: Mapping[int, Mapping[str, Any]]
    study: Mapping[str, Any]
    complaints: tuple[str, ...]


class _Line(NamedTuple):
    """A line that says something to readers: its entry, None where it is damaged."""

    number: int
    operation: int | None
    trial: int | None
    entry: Mapping[str, Any] | None


def read_journal(path: Path) -> Journal:
    """Read what can be read. A last line without its end is not damage: it is being written."""
    with path.open("rb") as file:
        lines = [line for number, text in enumerate(file, start=1) if (line := _line(number, text)) is not None]
    births = _births(lines)
    trials: list[dict[str, Any]] = []
    study: dict[str, Any] = {}
    closed: set[int] = set()
    complaints = Counter[str]()
    for line in lines:
        if line.number in births:
            trials.append(dict((line.entry or {}).get("user_attrs") or {}))
        if line.entry is None:
            complaints[_complaint(line, len(trials) - 1 if line.number in births else line.trial, path.name)] += 1
        elif line.operation == STUDY_ATTR:
            study |= line.entry["user_attr"]
        elif line.operation == TRIAL_STATE and line.entry.get("state") in FINISHED:
            closed.add(line.trial or 0)
        elif line.operation == TRIAL_ATTR and line.trial is not None and line.trial not in closed:
            if line.trial < len(trials):
                trials[line.trial] |= line.entry["user_attr"]
            else:
                complaints[f"trial {line.trial} (its beginning is missing in {path.name})"] += 1
    return Journal(dict(enumerate(trials)), study, tuple(complaints))


def _line(number: int, text: bytes) -> _Line | None:
    if not text.endswith(b"\n") or _PARAM.match(text):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        entry = None
    operation = entry.get("op_code") if isinstance(entry, dict) else _found(_OPERATION, text)
    trial = entry.get("trial_id") if isinstance(entry, dict) else _found(_TRIAL, text)
    if isinstance(entry, dict) and _whole(entry, operation, trial):
        return _Line(number, operation, trial, entry)
    known = isinstance(operation, int), isinstance(trial, int)
    return _Line(number, operation if known[0] else None, trial if known[1] else None, None)


def _found(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    match = pattern.search(text)
    return int(match.group(1)) if match else None


def _whole(entry: Mapping[str, Any], operation: object, trial: object) -> bool:
    if operation == CREATE_TRIAL:
        return isinstance(entry.get("user_attrs", {}), dict)
    if operation == STUDY_ATTR:
        return isinstance(entry.get("user_attr"), dict)
    if operation == TRIAL_ATTR:
        return isinstance(trial, int) and isinstance(entry.get("user_attr"), dict)
    return isinstance(operation, int) and (operation != TRIAL_STATE or isinstance(trial, int))


def _births(lines: Sequence[_Line]) -> set[int]:
    """Numbers of the lines that begin a trial.

    Trials are numbered by the order of these lines, so one that is lost would give all later trials the records of
    their predecessors. Where an entry speaks of a trial that has not begun, a damaged line before it, of which nothing
    else is known, must have been its beginning.
    """
    births: set[int] = set()
    suspects: list[int] = []
    for line in lines:
        if line.operation == CREATE_TRIAL:
            births.add(line.number)
        elif line.entry is None and line.operation is None and line.trial is None:
            suspects.append(line.number)
        elif line.entry is not None and line.trial is not None:
            while line.trial >= len(births) and suspects:
                births.add(suspects.pop())
    return births


def _complaint(line: _Line, trial: int | None, file: str) -> str:
    where = f"line {line.number} of {file} is damaged"
    return where if trial is None else f"trial {trial} ({where}; what it said is missing)"


def unreadable(complaints: Iterable[str], most: int = 200) -> tuple[str, ...]:
    """At most so many complaints; the rest as a count."""
    listed = list(complaints)
    rest = len(listed) - most
    return (*listed[:most], f"{rest} more") if rest > 0 else tuple(listed)
