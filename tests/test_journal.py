"""The study's file under a real Optuna storage: torn lines, several writers, writers that are killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from nightpress.search.journal import JournalFile, OneWriterJournal

HOLDER = """
import sys, time
from pathlib import Path
from nightpress.search.journal import JournalFile

journal = JournalFile(Path(sys.argv[1]))
with journal._locked():
    print("locked", flush=True)
    time.sleep(600)
"""

WRITER = """
import sys
from pathlib import Path
from nightpress.search.journal import JournalFile

name, count = sys.argv[2], int(sys.argv[3])
journal = JournalFile(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    journal.append_logs([{"writer": name, "number": number, "filling": "x" * 3000}, {"writer": name, "pair": number}])
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def entries(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"number": number, "text": "é\n\u2028"} for number in range(start, start + count)]


def study_in(path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFile(path)), study_name="night", directions=["maximize", "minimize"],
        load_if_exists=True,
    )  # fmt: skip


def one_trial(study: optuna.Study, value: float) -> None:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("policy", {"prune": {"stem": value}})
    study.tell(trial, [value, 1 - value])


def test_a_driver_reads_the_same_trials_as_optuna_does(path: Path) -> None:
    storage = OneWriterJournal(JournalFile(path))
    study = optuna.create_study(storage=storage, study_name="night")
    ranges = {"x": FloatDistribution(0, 1), "bits": CategoricalDistribution(["8", "32"])}
    whole = optuna.trial.create_trial(state=TrialState.RUNNING, params={"x": 0.5, "bits": "8"}, distributions=ranges)
    storage.create_new_trial(storage.get_study_id_from_name("night"), whole)
    study.enqueue_trial({"x": 0.25})
    for number in range(3):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        before = study.get_trials(deepcopy=False)[-1]
        trial.suggest_categorical("bits", ["8", "32"])
        assert list(before.params) == ["x"]  # what was read before does not change
        trial.set_user_attr("policy", number)
        study.tell(trial, number)
    with pytest.raises(ValueError, match="does not support dynamic value space"):
        study.ask().suggest_categorical("bits", ["8", "16"])

    def known(kind: type[JournalStorage]) -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="night", storage=kind(JournalFile(path))).get_trials()

    assert known(OneWriterJournal) == known(JournalStorage) == study.get_trials()


def child(code: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# Reading


def test_an_empty_file_is_an_empty_study(path: Path) -> None:
    path.touch()
    journal = JournalFile(path)
    assert list(journal.read_logs(0)) == []
    assert list(journal.read_logs(5)) == []
    journal.append_logs(entries(2))
    assert list(journal.read_logs(0)) == entries(2)


def test_a_file_is_made_where_there_is_none(path: Path) -> None:
    assert list(JournalFile(path).read_logs(0)) == []
    assert path.is_file()


def test_what_another_instance_appends_is_read(path: Path) -> None:
    first, second = JournalFile(path), JournalFile(path)
    first.append_logs(entries(2))
    assert list(second.read_logs(0)) == entries(2)
    first.append_logs(entries(2, 2))
    second.append_logs(entries(1, 4))
    assert list(second.read_logs(2)) == entries(3, 2)
    assert list(first.read_logs(0)) == entries(5)


def test_an_entry_is_one_line(path: Path) -> None:
    JournalFile(path).append_logs(entries(3))
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == entries(3)
    assert lines[-1] == b""


@given(st.lists(st.tuples(st.sampled_from(["append", "read", "read elsewhere"]), st.integers(0, 12)), max_size=12))
def test_entries_are_read_from_any_number(steps: list[tuple[str, int]]) -> None:
    """Whatever was read before, reading from number n gives all entries but the first n."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.journal"
        journal, count = JournalFile(path), 0
        for what, number in steps:
            if what == "append":
                journal.append_logs(entries(number, count))
                count += number
            else:
                reader = journal if what == "read" else JournalFile(path)
                assert list(reader.read_logs(number)) == entries(count)[number:]


# Torn lines


@pytest.mark.parametrize("torn", [b'{"number": 2, "te', b"{", b'{"number": 2}', b'{"text": "\xc3', b"\x00\x00\x00"])
def test_a_torn_last_line_is_cut_before_the_next_entry(path: Path, torn: bytes) -> None:
    """Its writer died, so it was never acknowledged; not even a line that only lacks its end counts."""
    JournalFile(path).append_logs(entries(2))
    with path.open("ab") as file:
        file.write(torn)

    journal = JournalFile(path)

    assert list(journal.read_logs(0)) == entries(2)
    journal.append_logs(entries(2, 2))
    assert list(journal.read_logs(0)) == entries(4)
    assert list(JournalFile(path).read_logs(1)) == entries(3, 1)


def test_a_line_torn_while_the_file_is_open_is_cut_too(path: Path) -> None:
    journal = JournalFile(path)
    journal.append_logs(entries(1))
    with path.open("ab") as file:
        file.write(b'{"number": 1, "te')
    assert list(journal.read_logs(0)) == entries(1)
    journal.append_logs(entries(1, 1))
    assert list(journal.read_logs(1)) == entries(1, 1)


def test_a_first_line_that_is_torn_leaves_an_empty_file(path: Path) -> None:
    path.write_bytes(b"x" * 200_000)
    journal = JournalFile(path)
    assert path.read_bytes() == b""
    journal.append_logs(entries(1))
    assert list(journal.read_logs(0)) == entries(1)


def test_a_torn_line_longer_than_a_block_is_cut(path: Path) -> None:
    JournalFile(path).append_logs(entries(2))
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b"x" * 200_000)
    JournalFile(path)
    assert path.read_bytes() == whole


def test_a_study_goes_on_after_a_torn_line(path: Path) -> None:
    study = study_in(path)
    one_trial(study, 0.25)
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "')

    again = study_in(path)
    one_trial(again, 0.75)

    trials = study_in(path).trials
    assert [(t.number, t.values) for t in trials] == [(0, [0.25, 0.75]), (1, [0.75, 0.25])]
    assert trials[1].user_attrs == {"policy": {"prune": {"stem": 0.75}}}


# Several processes


@pytest.mark.slow
def test_two_processes_append_whole_entries(path: Path) -> None:
    writers = [child(WRITER, path, name, 40) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n", timeout=50)
        assert writer.returncode == 0

    found = list(JournalFile(path).read_logs(0))
    assert len(found) == 160
    for name in ("a", "b"):
        own = [entry for entry in found if entry["writer"] == name]
        assert [entry["number"] for entry in own if "number" in entry] == list(range(40))
        assert [entry["pair"] for entry in own if "pair" in entry] == list(range(40))
    for first, second in zip(found[::2], found[1::2], strict=True):  # the entries of one append stay together
        assert (first["writer"], first["number"]) == (second["writer"], second["pair"])


@pytest.mark.slow
def test_a_writer_waits_for_the_one_that_holds_the_lock(path: Path) -> None:
    """Else it could cut off, as a torn tail, what the other is writing."""
    holder = child(HOLDER, path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    writer = child(WRITER, path, "a", 1)
    with pytest.raises(subprocess.TimeoutExpired, match="2 seconds"):
        writer.communicate("go\n", timeout=2)
    assert path.read_bytes() == b""

    holder.kill()
    holder.communicate()
    writer.communicate(timeout=20)

    assert writer.returncode == 0
    assert len(list(JournalFile(path).read_logs(0))) == 2


@pytest.mark.slow
def test_a_killed_writer_that_held_the_lock_does_not_block_the_next(path: Path) -> None:
    study = study_in(path)
    one_trial(study, 0.5)
    holder = child(HOLDER, path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()

    start = time.monotonic()
    one_trial(study, 0.75)

    assert time.monotonic() - start < 5
    assert [t.number for t in study_in(path).trials] == [0, 1]


@pytest.mark.slow
def test_a_writer_killed_in_the_middle_leaves_a_readable_file(path: Path) -> None:
    writer = child(WRITER, path, "a", 100_000)
    assert writer.stdin is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()
    deadline = time.monotonic() + 40
    while (not path.exists() or path.stat().st_size < 50_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.kill()
    writer.communicate()

    journal = JournalFile(path)

    numbers = [entry["number"] for entry in journal.read_logs(0) if "number" in entry]
    assert len(numbers) >= 10
    assert numbers == list(range(len(numbers)))
    journal.append_logs([{"after": True}])
    assert list(JournalFile(path).read_logs(0))[-1] == {"after": True}
