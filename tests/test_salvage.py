"""Reading a damaged study: what is whole is read, and what is lost is named."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.search.journal import JournalFile
from nightpress.search.records import Quality, TrialRecord, TrialState
from nightpress.search.store import JOURNAL, Store, open_storage, read_study
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import Policy

COUNT = 6
GARBAGE = b"\x00\xff garbage\n"


def write_study(folder: Path) -> Store:
    """A study of a few trials, two of them enqueued, the last still running."""
    store = Store(open_storage(folder, None))
    for name in ("first rule", "second rule"):
        store.enqueue({}, "baseline", name, {})
    for number in range(COUNT):
        trial = store.study.ask()
        trial.suggest_float("learning_rate", 0.001, 0.1)
        store.begin(trial, Policy(model="m", prune={"a": 0.125 * number}), float(number))
        latency = {"latency_ms": 1.0 + number, "low_ms": 1.0, "high_ms": 9.0, "measured": False}
        store.note(trial.number, predicted=latency, size_bytes=100, macs=1, params=1)
        quality = Quality(rung="short", split="search", accuracy=0.5, accuracy_se=0.01, samples=100, seconds=0.1)
        store.note_quality(trial.number, quality)
        if number < COUNT - 1:
            store.finish(trial.number, TrialState.COMPLETE, finished=1.0)
    store.approve({"trial": 1, "who": "me"})
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sequence[bytes], tuple[TrialRecord, ...]]:
    """A journal's lines, and the trials that they tell of."""
    folder = tmp_path_factory.mktemp("study")
    store = write_study(folder)
    return (folder / JOURNAL).read_bytes().splitlines(keepends=True), store.trials()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def test_a_whole_journal_reads_as_the_store_reads_it(tmp_path: Path) -> None:
    store = write_study(tmp_path)
    found = read_study(tmp_path, None)
    assert found.trials == store.trials()
    assert found.approvals == store.approvals() == ({"trial": 1, "who": "me"},)
    assert found.unreadable == ()


def test_reading_changes_nothing_on_disk(tmp_path: Path) -> None:
    write_study(tmp_path)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"op_code":8,"tri')
    before = journal.read_bytes()
    assert read_study(tmp_path, None).unreadable == ()
    assert journal.read_bytes() == before


@given(data=st.data())
def test_one_damaged_line_costs_at_most_the_trial_that_it_spoke_of(
    data: st.DataObject, whole: tuple[Sequence[bytes], tuple[TrialRecord, ...]], folder: Path
) -> None:
    lines, trials = whole
    number = data.draw(st.integers(0, len(lines) - 1))
    cut = data.draw(st.integers(0, len(lines[number]) - 2))
    damage = data.draw(st.sampled_from([GARBAGE, lines[number][:cut] + b"\n", b"{}\n", b"[1]\n", b"\n"]))
    (folder / JOURNAL).write_bytes(b"".join([*lines[:number], damage, *lines[number + 1 :]]))
    found = read_study(folder, None)
    entry = json.loads(lines[number])
    spoken = entry.get("trial_id")
    if entry["op_code"] == 4:
        spoken = sum(b'"op_code":4' in line for line in lines[:number])
    left = {trial.number: trial for trial in found.trials}
    for trial in trials:
        if trial.number != spoken:
            assert left[trial.number] == trial
    assert bool(found.unreadable)
    assert f"line {number + 1} of study.journal" in " ".join(found.unreadable)


def test_a_lost_beginning_does_not_shift_the_trials_behind_it(
    whole: tuple[Sequence[bytes], tuple[TrialRecord, ...]], folder: Path
) -> None:
    lines, trials = whole
    births = [i for i, line in enumerate(lines) if b'"op_code":4' in line]
    (folder / JOURNAL).write_bytes(b"".join(GARBAGE if i == births[3] else line for i, line in enumerate(lines)))
    found = read_study(folder, None)
    # What its beginning said (nothing here) is lost; what was noted later is not.
    assert found.trials == trials
    assert found.unreadable == (f"trial 3 (line {births[3] + 1} of study.journal is damaged; what it said is missing)",)


def test_a_record_that_makes_no_sense_is_named_and_left_out(tmp_path: Path) -> None:
    store = write_study(tmp_path)
    store.note(5, qualities=[{"rung": "short"}])
    found = read_study(tmp_path, None)
    assert [trial.number for trial in found.trials] == [0, 1, 2, 3, 4]
    assert len(found.unreadable) == 1
    assert re.match(r"trial 5 \(its record is damaged: TypeError: .*missing", found.unreadable[0])


def test_a_study_of_garbage_has_no_trial_and_says_so(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(GARBAGE * 300)
    found = read_study(tmp_path, None)
    assert found.trials == ()
    assert len(found.unreadable) == 201
    assert found.unreadable[-1] == "100 more"


def test_writers_refuse_a_damaged_journal_by_its_line(tmp_path: Path) -> None:
    write_study(tmp_path)
    journal = tmp_path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:4], GARBAGE, *lines[5:]]))
    with pytest.raises(InputError, match=r"study\.journal: line 5 is damaged, so the run cannot be gone on with"):
        list(JournalFile(journal).read_logs(0))
