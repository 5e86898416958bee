"""What a night promises, measured: nothing lost by kills, done by the deadline, little time spent on itself.

    python benchmarks/night.py kills --kills 100 --seed 0 [--imported]     # the whole: some 20 minutes
    python benchmarks/night.py deadline --budget 10m --runs 10 [--load]    # 100 minutes, and 100 more under load
    python benchmarks/night.py deadline --runs 10 --at-once 5 --task tiny  # 20 minutes: they are each other's load

Needs the test extra: the tiny task of the tests is what is killed. ``kills`` ends the driver with SIGKILL at random
moments of a night, resumes it, and compares what comes out with an undisturbed night of the same seed and steps. The
device's profile is made by a formula, so that latencies, and with them the sampler's proposals, are the same. With
``--imported`` drivers begin with their libraries imported, so that most kills fall on the work; workers import theirs.
``deadline`` runs nights and says by how much they miss their deadline and how much of their time went into neither
training nor evaluation nor measurement. Nothing of their length is given, so that each plans its own. A night that is
refused, because the budget is too short for what its share of the machine can do, has not met its deadline.
"""

import argparse
import json
import math
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
from nightpress.cli import main as cli
from nightpress.search.folder import read_run
from nightpress.search.pareto import losses, non_dominated
from nightpress.search.records import TrialRecord, TrialState

TRIALS = 24
LONGEST_SECONDS, IMPORTED_LONGEST_SECONDS, BEYOND_SECONDS = 18.0, 9.0, 3.0
"""Half of the drivers live at most so long, much of it their start; the others so long beyond their first result."""
IMPORTED = ("__main__", "nightpress.cli.main", "nightpress.reports", "nightpress.search.night", "torch._dynamo")
TINY = "tiny"
MORE_PICTURES = "def larger():\n    return build(train=pictures(12_000, 0), test=pictures(1_000, 1))\n"
"""Enough that a night of ten minutes does not come to the end of what its fine-tunes can use."""
LATE_SECONDS = 60.0
LAST_BREATH_SECONDS = 1.5
"""Workers notice within a second that their driver was killed; what they still write is nobody's resumption."""
Finished = dict[int, tuple[Any, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser("kills")
    killing.add_argument("--kills", type=int, default=100)
    killing.add_argument("--seed", type=int, default=0)
    killing.add_argument("--imported", action="store_true", help="drivers begin with their libraries imported")
    ending = commands.add_parser("deadline")
    ending.add_argument("--budget", default="10m")
    ending.add_argument("--runs", type=int, default=10)
    ending.add_argument("--load", action="store_true", help="another process keeps every core busy")
    ending.add_argument("--at-once", type=int, default=1, help="so many nights run at the same time")
    ending.add_argument(
        "--task", default="mnist5k-resnet", help="a built-in task, or tiny: that of the tests with more pictures"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightpress-night-") as folder:
        if arguments.command == "kills":
            start = Imported(Path(folder)) if arguments.imported else Fresh()
            kills(Path(folder), arguments.kills, arguments.seed, start)
        else:
            deadline(Path(folder), arguments)


class Fresh:
    """Drivers as a user starts them."""

    longest_seconds = LONGEST_SECONDS

    def __call__(self, words: Sequence[str]) -> "FreshDriver":
        return FreshDriver(subprocess.Popen(tiny.command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))


@dataclass(frozen=True, slots=True)
class FreshDriver:
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def code(self) -> int | None:
        """How it ended, None while it runs."""
        return self.process.poll()

    def errors(self) -> str:
        """What it wrote, once it has ended."""
        return self.process.communicate()[1].decode()


class Imported:
    """Drivers that are forked from a process which has imported their libraries."""

    longest_seconds = IMPORTED_LONGEST_SECONDS

    def __init__(self, folder: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTED))
        self._errors = folder / "errors.txt"

    def __call__(self, words: Sequence[str]) -> "ImportedDriver":
        process = self._context.Process(target=drive_imported, args=(words, self._errors))
        process.start()
        return ImportedDriver(process, self._errors)


@dataclass(frozen=True, slots=True)
class ImportedDriver:
    process: multiprocessing.process.BaseProcess
    file: Path

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def code(self) -> int | None:
        """How it ended, None while it runs."""
        return self.process.exitcode

    def errors(self) -> str:
        """What it wrote, once it has ended."""
        self.process.join()
        return self.file.read_text() if self.file.is_file() else ""  # it may have ended before it could write


def drive_imported(words: Sequence[str], errors: Path) -> None:
    """The command line in a forked process."""
    sys.modules["__main__"] = ModuleType("__main__")  # or its workers would import this file
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["nightpress", *words]
    sys.exit(cli())


def kills(folder: Path, wanted: int, seed: int, start: Fresh | Imported) -> None:
    """Nights one after another until so many kills were dealt; each is compared with the undisturbed one."""
    task = tiny.write_task(folder)
    profile = tiny.write_profile(folder / "profile.json", tiny.anatomy_of(task))
    keys: dict[str, Any] = {"target": str(profile), "search": {"max_trials": TRIALS}, "budget": "2h"}
    keys["finetune"] = {"short_steps": 12, "long_steps": 16, "finalists": 3}
    chance = random.Random(seed)
    truth = folder / "undisturbed"
    tiny.nightpress("run", tiny.write_config(folder, out=str(truth), **keys))
    expected = finished(truth)
    dealt = nights = lost = repeated = 0
    resumed: list[float] = []
    while dealt < wanted:
        run = folder / f"night{nights}"
        config = tiny.write_config(folder, f"night{nights}.yaml", out=str(run), **keys)
        nights += 1
        begin_like(run, truth)
        while True:
            before, stamps = finished(run), written(run)
            alive, beyond = math.inf, math.inf
            if dealt < wanted and chance.random() < 0.5:
                alive = chance.uniform(0, start.longest_seconds)
            elif dealt < wanted:
                beyond = chance.uniform(0, BEYOND_SECONDS)
            first = drive(start, config, run, alive, beyond)
            if first is not None and before:
                resumed.append(first)
            after, now = finished(run), written(run)
            lost += sum(after.get(number) != found for number, found in before.items())
            repeated += sum(now.get(path, stamp) != stamp for path, stamp in stamps.items() if trial_of(path) in before)
            if state_of(run) == "done":
                break
            dealt += 1
        same, front = finished(run) == expected, front_of(run) == front_of(truth)
        if not same:
            print([(n, expected.get(n), f) for n, f in finished(run).items() if expected.get(n) != f][:2])
        print(
            f"night {nights}: {dealt} kills so far, {lost} trials lost, {repeated} repeated; "
            f"trials {'as' if same else 'NOT as'} undisturbed, front {'equal' if front else 'NOT equal'}",
            flush=True,
        )
    resumed.sort()
    print(f"{dealt} kills in {nights} nights of {len(expected)} trials: {lost} lost, {repeated} repeated")
    if not resumed:
        return
    included = "imports of the driver apart" if isinstance(start, Imported) else "process start included"
    print(f"resume to the first new evaluation's result, {included}: "
          f"median {resumed[len(resumed) // 2]:.1f} s, longest {resumed[-1]:.1f} s (n={len(resumed)})")  # fmt: skip


def begin_like(run: Path, truth: Path) -> None:
    """A night that trains in the number format which the undisturbed one found fastest: that is a matter of chance."""
    run.mkdir()
    (run / "config.yaml").write_bytes((truth / "config.yaml").read_bytes())
    begun = {"state": "interrupted", "phase": "inspect", "compute": _state(truth)["compute"]}
    (run / "state.json").write_text(json.dumps(begun))


def drive(start: Fresh | Imported, config: Path, run: Path, alive: float, beyond: float) -> float | None:
    """One driver, killed after ``alive`` seconds or ``beyond`` its first new result. Returns when that was there."""
    words = ["run", str(config), *(["--resume"] if (run / "config.yaml").is_file() else [])]
    begin, wall = time.monotonic(), time.time()
    driver = start(words)
    first = None
    while driver.code() is None and time.monotonic() - begin < min(alive, (first or math.inf) + beyond):
        if first is None and any(stamp / 1e9 > wall + LAST_BREATH_SECONDS for stamp in written(run).values()):
            first = time.monotonic() - begin
        time.sleep(0.03)
    if driver.code() is None:
        os.kill(driver.pid, signal.SIGKILL)
        driver.errors()
    elif driver.code():
        sys.exit(f"a driver failed: {driver.errors()[-2000:]}")
    return first


def finished(run: Path) -> Finished:
    """What is on record of each trial that has ended."""
    if not (run / "state.json").is_file():
        return {}
    return {t.number: fixed(t) for t in read_run(run).trials if t.state is not TrialState.RUNNING}


def fixed(trial: TrialRecord) -> tuple[Any, ...]:
    """What must not depend on when a driver was killed: all but times."""
    return trial.digest, str(trial.state), trial.role, trial.size_bytes, tuple(q.accuracy for q in trial.qualities)


def front_of(run: Path) -> list[tuple[Any, ...]]:
    """The front over accuracy, predicted latency and size: measured latencies differ from night to night."""
    trials = [t for t in read_run(run).trials if t.state is TrialState.COMPLETE]
    points = [losses(t.quality.accuracy, t.predicted.latency_ms, t.size_bytes)
              for t in trials if t.quality and t.predicted and t.size_bytes]  # fmt: skip
    return sorted((trials[i].digest, *points[i]) for i in non_dominated(points))


def written(run: Path) -> dict[str, int]:
    """When each artefact of a trial was written; a file that is written again was evaluated twice."""
    found: dict[str, int] = {}
    for path in run.glob("artifacts/*/*"):
        if path.name in {"short.safetensors", "long.json"}:
            try:
                found[str(path)] = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
    return found


def trial_of(path: str) -> int:
    return int(Path(path).parent.name)


def state_of(run: Path) -> str | None:
    return _state(run).get("state")


def _state(run: Path) -> dict[str, Any]:
    path = run / "state.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def deadline(folder: Path, asked: argparse.Namespace) -> None:
    """Nights, each with its overrun and what it spent on itself."""
    if asked.task == TINY:
        tiny.write_task(folder, MORE_PICTURES)
    config = folder / "config.yaml"
    config.write_text(f"task: {'task.py:larger' if asked.task == TINY else asked.task}\n")
    burning = [multiprocessing.Process(target=burn, daemon=True) for _ in os.sched_getaffinity(0)] if asked.load else []
    for process in burning:
        process.start()
    late: list[float] = []
    for first in range(0, asked.runs, asked.at_once):
        runs = [folder / f"run{number}" for number in range(first, min(first + asked.at_once, asked.runs))]
        nights = {run: Night(run, [str(config), "--budget", asked.budget, "--out", str(run)]) for run in runs}
        while nights:
            for run, night in list(nights.items()):
                if night.process.poll() is not None:
                    del nights[run]
                    late += night.told(f"night {int(run.name.removeprefix('run')) + 1} of {asked.budget}")
            time.sleep(0.05)
    print(f"{len(late)} of {asked.runs} nights came to an end, {sum(s <= LATE_SECONDS for s in late)} of them within "
          f"{LATE_SECONDS:.0f} s after their deadline, the latest {max(late, default=math.nan):+.1f} s")  # fmt: skip
    for process in burning:
        process.kill()


class Night:
    """One night as a user starts it."""

    def __init__(self, run: Path, words: Sequence[str]) -> None:
        self.run, self.begin = run, time.time()
        self.errors = run.with_suffix(".txt")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(tiny.command("run", *words), stdout=subprocess.DEVNULL, stderr=errors)

    def told(self, name: str) -> list[float]:
        """Print how it went; seconds by which it was late, nothing where it was refused or failed."""
        end = time.time()
        total = end - self.begin
        if self.process.returncode:
            told = self.errors.read_text().splitlines()[-1:]
            print(f"{name}: ended with code {self.process.returncode} after {total:.0f} s: {told}", flush=True)
            return []
        state = _state(self.run)
        over = end - datetime.fromisoformat(state["deadline"]).timestamp()
        counts = Counter(str(trial.state) for trial in read_run(self.run).trials)
        own = own_seconds(state, total)
        print(
            f"{name}: {state['state']}, {over:+.1f} s after the deadline, {dict(counts)}; outside training, evaluation "
            f"and measurement {sum(own.values()) / total:.1%}: "
            f"{', '.join(f'{phase} {seconds:.1f}' for phase, seconds in own.items())} of {total:.0f} s; "
            f"load average {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        return [over]


def own_seconds(state: dict[str, Any], total: float) -> dict[str, float]:
    """What a night spent on itself, by phase; ``start and end`` is what no phase counts: imports, reading, writing."""
    worked = state["evaluated_seconds"], state.get("measured_seconds", {})
    own = {
        phase: seconds - worked[0].get(phase, 0.0) / state["workers"] - worked[1].get(phase, 0.0)
        for phase, seconds in state["seconds"].items()
    }
    return {"start and end": total - sum(state["seconds"].values()), **own}


def burn() -> None:
    """Keep a core busy."""
    while True:
        sum(i * i for i in range(100_000))


if __name__ == "__main__":
    main()
