"""A disk that fills up: what is given up, what is kept, and what a night does without room. The disks are real."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from fakes_run import trial
from nightpress.search.disk import collect, drop_below, find_room, is_full, promising, shortage
from nightpress.search.folder import BALLAST, RunFolder, read_run
from nightpress.search.records import TrialState
from nightpress.search.worker import Failure
from test_trials import begun

pytestmark = pytest.mark.timeout(240)

SMALL_DISK = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}", "none", sys.argv[1]], check=True)
"""

FILL = """
import errno
def fill(path):
    with open(path, "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2
"""

RECORD = """
from pathlib import Path
from nightpress.search.folder import BALLAST, RunFolder
from nightpress.search.store import JOURNAL, Store, open_storage

run = Path(sys.argv[1])
folder = RunFolder(run)
folder.lay_ballast()
store = Store(open_storage(run, None, make_room=folder.make_room))
store.study.set_user_attr("before", "x")
fill(run / "filler")
whole = (run / JOURNAL).read_bytes()
for number in range(200):
    store.study.set_user_attr(f"after:{number}", "y" * 1000)
assert folder.pressed and not (run / BALLAST).exists()
folder.write_json("state.json", {"state": "done"})
folder.decide("search", "went on", "without room")
fill(run / "filler2")
size = (run / JOURNAL).stat().st_size
try:
    for number in range(2000):
        store.study.set_user_attr("last", "z" * 1000)
    raise SystemExit("there was still room")
except OSError:
    pass
text = (run / JOURNAL).read_bytes()
assert text.startswith(whole) and text.endswith(b"\\n")
attrs = Store(open_storage(run, None)).study.user_attrs
assert attrs["before"] == "x" and len([a for a in attrs if a.startswith("after:")]) == 200
print("whole")
"""


def on_small_disk(folder: Path, size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a file system of its own, of so many bytes, which goes with the process; skips where that may not
    be."""
    folder.mkdir(exist_ok=True)
    code = SMALL_DISK + FILL + script
    words = [sys.executable, "-c", code, str(folder), size]
    inside = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-Urm"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system allows no mount of its own")
    return subprocess.run([*inside, *words], capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_the_record_stays_whole_on_a_full_disk(tmp_path: Path) -> None:
    done = on_small_disk(tmp_path / "disk", "40m", RECORD)
    assert done.stdout == "whole\n", done.stderr


OUTCOME = """
from pathlib import Path
from types import SimpleNamespace
from nightpress.evaluators.evaluate import Outcome
from nightpress.evaluators.quality import Score
from nightpress.search.folder import RunFolder
from nightpress.search.long_tuning import load_outcome, outcome_file, save_outcome

session = SimpleNamespace(folder=RunFolder(Path(sys.argv[1])))
session.folder.artifacts(3).mkdir(parents=True)
session.folder.lay_ballast()
fill(Path(sys.argv[1]) / "filler")
outcome = Outcome(search=Score(accuracy=0.9, accuracy_se=0.01, samples=800, seconds=1.0))
save_outcome(session, 3, outcome)
assert session.folder.pressed
assert load_outcome(outcome_file(session, 3)).search == outcome.search
print("kept")
"""


@pytest.mark.slow
def test_a_long_fine_tune_that_ends_on_a_full_disk_is_kept(tmp_path: Path) -> None:
    done = on_small_disk(tmp_path / "disk", "40m", OUTCOME)
    assert done.stdout == "kept\n", done.stderr


NIGHT = """
import json, signal, time
from pathlib import Path

sys.path.insert(0, sys.argv[4])
import tiny

disk, config = Path(sys.argv[1]), sys.argv[3]
run = disk / "run"
pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
night = subprocess.Popen(tiny.command("run", config, "--json"), **pipes)
while night.poll() is None and not list(run.glob("artifacts/8/short.safetensors")):
    time.sleep(0.02)
night.send_signal(signal.SIGSTOP)  # or the filler would take the room that the night frees meanwhile
threads = Path(f"/proc/{night.pid}/task").glob
while any(path.read_text().rsplit(")", 1)[1].split()[0] != "T" for path in threads("*/stat")):
    time.sleep(0.01)
fill(disk / "filler")
night.send_signal(signal.SIGCONT)
MEANWHILE
out, err = night.communicate()
print(json.dumps({"code": night.returncode, "err": err, "files": [p.name for p in run.iterdir()],
                  "status": tiny.nightpress("status", run, "--json").json, "told": (disk / "told").read_text()}))
"""


def night_on_small_disk(tmp_path: Path, meanwhile: str = "") -> dict[str, Any]:
    """What a night says and leaves whose disk is filled after its first trials; ``meanwhile`` runs then."""
    task = tiny.write_task(tmp_path)
    profile = tiny.write_profile(tmp_path / "profile.json", tiny.anatomy_of(task))
    disk = tmp_path / "disk"
    config = tiny.write_config(
        tmp_path, out=str(disk / "run"), target=str(profile), budget="70s", search={"max_trials": 60},
        notify={"command": f'echo "$NIGHTPRESS_EVENT $NIGHTPRESS_TEXT" >> {tmp_path / "told"}'},
    )  # fmt: skip
    script = NIGHT.replace("sys.argv[3]", repr(str(config))).replace("sys.argv[4]", repr(str(Path(__file__).parent)))
    script = script.replace('(disk / "told")', f"Path({str(tmp_path / 'told')!r})")
    done = on_small_disk(disk, "90m", script.replace("MEANWHILE", meanwhile))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_night_without_room_pauses_says_so_and_ends_with_all_it_has(tmp_path: Path) -> None:
    found = night_on_small_disk(tmp_path)

    assert found["code"] == 0, found["err"]
    assert found["status"]["state"] == "done"
    assert found["status"]["trials"]["COMPLETE"] >= 8
    assert found["status"]["trials"]["RUNNING"] == 0
    assert found["status"]["front"]
    assert "the night pauses" in found["err"]
    assert "ended the search (the disk is full)" in found["err"]
    assert set(found["files"]) >= tiny.RUN_FILES
    assert BALLAST not in found["files"]
    trouble, end = found["told"].splitlines()
    assert trouble.startswith("trouble ")
    assert "the disk has" in trouble
    assert end.startswith("done ")


@pytest.mark.slow
def test_a_night_that_cannot_even_write_its_record_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    greedy = """
while night.poll() is None:
    fill(disk / f"filler{time.monotonic()}")
    time.sleep(0.01)
"""
    found = night_on_small_disk(tmp_path, meanwhile=greedy)

    assert found["code"] == 2
    assert found["err"].splitlines()[-1] == (
        "nightpress: The disk is full: make room; a run then goes on with --resume."
    )
    assert found["status"]["trials"]["COMPLETE"] >= 8


# What nobody needs


def checkpoints(folder: RunFolder, number: int, *rungs: str) -> None:
    folder.artifacts(number).mkdir(parents=True)
    for rung in rungs:
        (folder.artifacts(number) / f"{rung}.safetensors").write_bytes(b"x" * 1000)


def left(folder: RunFolder) -> set[str]:
    base = folder.path / "artifacts"
    return {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}


def test_what_may_still_be_a_finalist_a_baseline_or_a_running_trial_keeps_its_highest_rung(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in range(6):
        checkpoints(folder, number, "bn", "short")
    checkpoints(folder, 6, "bn")
    checkpoints(folder, 7, "bn", "short", "long")
    (folder.artifacts(7) / "model.onnx").write_bytes(b"x")
    (folder.artifacts(5) / "short.77.partial").write_bytes(b"x" * 500)
    trials = [
        trial(0, 0.5, 2.0, role="baseline"),
        trial(1, 0.99, 0.5),  # the front
        trial(2, 0.5, 0.9),  # dominated, beyond all errors
        trial(3, 0.99, 0.54),  # dominated, but not at the low end of its interval
        trial(4, 0.7, 0.9, state=TrialState.RUNNING),
        trial(5, None, None, state=TrialState.FAILED),
        trial(6, 0.4, 0.9, state=TrialState.STOPPED),
        trial(7, 0.5, 0.9),  # dominated, but exported
    ]

    freed = collect(folder, trials, running=[4])

    assert left(folder) == {
        "0/short.safetensors", "1/short.safetensors", "3/short.safetensors", "4/bn.safetensors", "4/short.safetensors",
        "7/long.safetensors", "7/model.onnx",
    }  # fmt: skip
    assert freed == 1000 * (1 + 1 + 2 + 1 + 2 + 1 + 2) + 500
    assert collect(folder, trials, running=[4]) == 0


def test_a_search_goes_on_once_there_is_room_again(tmp_path: Path) -> None:
    session = begun(tmp_path, {"short_steps": 1, "part_steps": 0}).session
    session.folder.lay_ballast()
    assert session.folder.make_room()  # as for a write that exceeds a quota
    assert session.folder.pressed

    assert find_room(session, ())

    assert not session.folder.pressed
    assert (tmp_path / BALLAST).stat().st_size > 0


def test_once_a_rung_is_on_record_those_below_it_are_not_needed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoints(folder, 0, "bn", "part", "short")
    checkpoints(folder, 1, "bn", "part")

    drop_below(folder, 0, "short")
    drop_below(folder, 1, "part")

    assert left(folder) == {"0/short.safetensors", "1/part.safetensors"}


def test_only_what_is_surely_dominated_is_given_up() -> None:
    trials = [trial(0, 0.9, 0.5), trial(1, 0.9 - 0.001, 0.5), trial(2, 0.6, 0.9)]
    assert promising(trials) == [0, 1]
    assert promising([]) == []


def test_a_run_keeps_within_what_it_may_use(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoints(folder, 0, "bn", "short")
    assert shortage(folder, max_bytes=1_000_000) is None
    assert shortage(folder, max_bytes=5000) == "the artefacts take 0 MB of max_disk 0 MB"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    checkpoints(folder, 1)
    with (folder.artifacts(1) / "short.safetensors").open("wb") as file:
        file.truncate(free)  # a file of holes takes no room
    assert "the disk has" in (shortage(folder, max_bytes=100 * free) or "")


@pytest.mark.parametrize(
    ("failure", "full"),
    [
        (Failure("SafetensorError", "Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (Failure("OSError", "[Errno 28] No space left on device: 'bn.partial'"), True),
        (Failure("OSError", "[Errno 122] Disk quota exceeded"), True),
        (Failure("DivergedError", "the loss became nan"), False),
        (None, False),
    ],
)
def test_what_a_full_disk_looks_like(failure: Failure | None, full: bool) -> None:
    assert is_full(failure) is full


def test_a_line_that_a_kill_tore_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.decide("search", "first", "a")
    with (tmp_path / "decisions.jsonl").open("a") as file:
        file.write('{"time": 1, "phase": "sea')
    folder.decide("search", "second", "b")
    (tmp_path / "config.yaml").write_text("{task: t}")
    folder.write_json("state.json", {"state": "done"})

    decisions = read_run(tmp_path).decisions

    assert [d["decision"] for d in decisions] == ["first", "second"]
    assert all(d["time"] <= time.time() for d in decisions)


CUT_OFF = """
from pathlib import Path
from nightpress.spaces.files import write_whole

disk = Path(sys.argv[1])
for size in (100, 4 << 20):
    try:
        write_whole(disk / "model.onnx", lambda partial: partial.write_bytes(b"x" * size))
    except OSError as error:
        assert error.errno == 28
print([(path.name, path.stat().st_size) for path in disk.iterdir()])
"""


def test_a_file_that_finds_no_room_leaves_what_was_there_and_nothing_of_itself(tmp_path: Path) -> None:
    done = on_small_disk(tmp_path / "disk", "2m", CUT_OFF)
    assert done.stdout == "[('model.onnx', 100)]\n", done.stderr
