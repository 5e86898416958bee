"""The search against other samplers: nights of equal length, and what a proposal costs.

    python benchmarks/search.py nights --out bench --rows nights.jsonl --task mnist5k-resnet --seeds 3 --budget 6m
    python benchmarks/search.py table --rows nights.jsonl
    python benchmarks/latency.py calibrate resnet56 --cache DIR
    python benchmarks/search.py overhead --cache DIR
    python benchmarks/search.py twice --trials 24
    python benchmarks/search.py suggest RUN

``nights`` can be stopped and started again: a night whose row is in the file is not repeated, one that was cut off is
resumed. All nights of a task share one calibration, which ``nights`` measures first, so that all samplers see the same
device, and the length of the short fine-tune that the first of them chose. A row holds the verified points as shares of
the uncompressed latency beside them, so rows of several days on CPUs of one kind (by name and by the flags that choose
kernels) make one table.
``suggest`` times the whole command on the folder of a run, start of the interpreter and all.
``twice`` runs a night on a tiny network two times with the same seed, one worker and lengths in steps, and compares
what they tried.
"""

import argparse
import importlib
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from latency import anatomy_of, files_of, space_of
from optuna.study import Study
from search_nights import nightpress, print_table, run_nights

import tiny
from nightpress.evaluators.latency.profile import Profile
from nightpress.evaluators.latency.profile_file import load_profile
from nightpress.evaluators.latency.target import Target
from nightpress.search.folder import read_run
from nightpress.search.memory import Memory
from nightpress.search.policy_sampler import PolicySampler, TrialSuggest
from nightpress.search.records import Quality, RunRecord, TrialRecord, TrialState
from nightpress.search.salvage import CREATE_TRIAL
from nightpress.search.sampler import NightpressSampler, make_sampler
from nightpress.search.store import JOURNAL, Store, open_storage
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import choices_of
from nightpress.spaces.policy import Policy
from nightpress.spaces.space import Space

TASKS = ("mnist5k-resnet", "mnist5k-vgg", "resnet20")
ABLATIONS = ("free_objectives", "rungs", "sensitivity")
NETWORK, ASKED = "resnet56", 7
MOST_SECONDS = 900
"""For a line of the overhead's table: gp takes time in the cube of the trials."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    nights = parts.add_parser("nights")
    nights.add_argument("--out", type=Path, required=True, help="run folders")
    nights.add_argument("--rows", type=Path, required=True, help="a line for each night that is done, appended")
    nights.add_argument("--task", choices=TASKS, default="mnist5k-resnet")
    nights.add_argument("--data", type=Path, help="folder of the CIFAR-10 JPEGs, for resnet20")
    nights.add_argument("--seeds", type=int, default=3)
    nights.add_argument("--first-seed", type=int, default=0)
    nights.add_argument("--budget", default="6m")
    nights.add_argument("--samplers", default="nightpress,random,nsga2,tpe")
    nights.add_argument("--ablations", default="", help="a list out of " + ", ".join(ABLATIONS))
    table = parts.add_parser("table")
    table.add_argument("--rows", type=Path, required=True)
    overhead = parts.add_parser("overhead")
    overhead.add_argument("--cache", type=Path, required=True, help="as of benchmarks/latency.py, with resnet56 in it")
    overhead.add_argument("--trials", default="100,500,2000")
    overhead.add_argument("--samplers", default="nightpress,random,nsga2,nsga3,tpe,gp")
    twice = parts.add_parser("twice")
    twice.add_argument("--trials", type=int, default=24)
    twice.add_argument("--seed", type=int, default=0)
    suggest = parts.add_parser("suggest")
    suggest.add_argument("run", type=Path)
    suggest.add_argument("--times", type=int, default=3)
    resume = parts.add_parser("resume", help="one line of overhead's table, as JSON")
    resume.add_argument("folder", type=Path)
    resume.add_argument("--sampler", required=True)
    resume.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.part == "nights":
        run_nights(arguments)
    elif arguments.part == "table":
        print_table(arguments.rows)
    elif arguments.part == "twice":
        run_twice(arguments.trials, arguments.seed)
    elif arguments.part == "suggest":
        print_suggest(arguments.run, arguments.times)
    elif arguments.part == "resume":
        print_resume(arguments.folder, arguments.sampler, arguments.cache)
    else:
        print_overhead(arguments.cache, [int(n) for n in arguments.trials.split(",")], arguments.samplers.split(","))


# Twice


def run_twice(trials: int, seed: int) -> None:
    """Two nights that should be the same, and whether they are: all but times, and latencies that were measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = tiny.write_task(folder)
        profile = tiny.write_profile(folder / "profile.json", tiny.anatomy_of(task))
        keys: dict[str, Any] = {
            "seed": seed, "target": str(profile), "budget": "20m", "search": {"max_trials": trials, "workers": 1},
            "finetune": {"part_steps": 2, "short_steps": 8, "long_steps": 16, "finalists": 3},
        }  # fmt: skip
        runs: list[RunRecord] = []
        for turn in range(2):
            config = tiny.write_config(folder, f"night-{turn}.yaml", **keys, out=str(folder / f"run-{turn}"))
            nightpress("run", config)
            runs.append(read_run(folder / f"run-{turn}"))
    first, second = ([_fixed(trial) for trial in run.trials] for run in runs)
    same = sum(one == other for one, other in zip(first, second, strict=False))
    states = Counter(str(trial.state) for trial in runs[0].trials)
    print(f"trials {len(first)} and {len(second)}, {same} of them the same: policy, role, state, reason and the "
          f"accuracy at each rung ({', '.join(f'{count} {state}' for state, count in states.items())})")  # fmt: skip
    longs = [{t.number: t.verified.quality.accuracy for t in run.trials if t.verified} for run in runs]
    both = longs[0].keys() & longs[1].keys()
    print(f"exported: {sorted(longs[0])} and {sorted(longs[1])}; of {len(both)} in both, "
          f"{sum(longs[0][n] == longs[1][n] for n in both)} are as accurate; "
          f"trained in {' and '.join(str(run.state['compute']) for run in runs)}")  # fmt: skip
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            print(f"trial {number}: {one} and {other}")
            break


def _fixed(trial: TrialRecord) -> tuple[Any, ...]:
    seen = tuple((quality.rung, quality.accuracy) for quality in trial.qualities)
    return trial.digest, trial.role, str(trial.state), trial.reason, seen


# Suggest


def print_suggest(run: Path, times: int) -> None:
    """Wall seconds of the command in a process of its own, and of what it says itself: from its imports on."""
    words = [sys.executable, "-m", "nightpress.cli", "suggest", str(run), "--json"]
    for _ in range(times):
        start = time.perf_counter()
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        spent, found = time.perf_counter() - start, json.loads(done.stdout)
        print(f"suggest {run}: {spent:.1f} s, {found['seconds']:.1f} s of them behind its imports", flush=True)


# Overhead


def print_overhead(cache: Path, counts: list[int], samplers: list[str]) -> None:
    """A table of proposals on resumed studies: each line is a process of its own, as a resumed night is one."""
    space = space_of(anatomy_of(NETWORK, cache))
    print(
        f"{NETWORK}, {space.dimensions} dimensions; processor (wall) time of a proposal with its record: the first "
        f"after the study was opened, then median and worst of the next {ASKED}; memory beside the driver's own"
    )
    print(f"{'sampler':12} {'trials':>6} {'open s':>13} {'first ms':>13} {'median ms':>13} {'worst ms':>13} {'MB':>6}")
    profile = profile_of(cache)
    ours, theirs = (_filler(cache / f"study-{name}", space, profile) for name in ("ours", "theirs"))
    for count in sorted(counts):
        for name in samplers:
            filler = ours if name == "nightpress" else theirs
            filler.fill(count)
            with tempfile.TemporaryDirectory() as copy:
                filler.copy(Path(copy), count)
                words = [__file__, "resume", copy, "--sampler", name, "--cache", str(cache)]
                try:
                    done = subprocess.run(
                        [sys.executable, *words], check=True, capture_output=True, text=True, timeout=MOST_SECONDS
                    )
                except subprocess.TimeoutExpired:
                    print(f"{name:12} {count:6d} not over after {MOST_SECONDS} s", flush=True)
                    continue
            found = json.loads(done.stdout.splitlines()[-1])
            pairs = [f"{found['open_cpu']:.2f} ({found['open_wall']:.2f})"]
            pairs += [f"{found[f'{which}_cpu']:.0f} ({found[f'{which}_wall']:.0f})"
                      for which in ("first", "median", "worst")]  # fmt: skip
            columns = " ".join(f"{pair:>13}" for pair in pairs)
            print(f"{name:12} {found['trials']:6d} {columns} {found['more_mb']:6.0f}", flush=True)


def profile_of(cache: Path) -> Profile:
    """The calibration that benchmarks/latency.py keeps, as it would be read from a run."""
    made = json.loads(files_of(NETWORK, Target(), cache)[1].read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps(made["profile"]))
        return load_profile(path, anatomy_of(NETWORK, cache), force=True)


def print_resume(folder: Path, name: str, cache: Path) -> None:
    """Open a study as a driver that goes on with it does, and ask for proposals; one JSON object."""
    importlib.import_module("nightpress.search.night")  # what a driver holds in memory anyway, torch among it
    space, profile = space_of(anatomy_of(NETWORK, cache)), profile_of(cache)
    sampler = make_sampler(name, 1, 0, space, profile.costs)
    if isinstance(sampler, NightpressSampler):
        sampler.reference = (-0.5, profile.reference_ms, float(4 * space.anatomy.params))
        sampler.memory = Memory(folder)
    before_mb, start = _memory_mb(), _clocks()
    store = Store(open_storage(folder, None), sampler)
    store.repair()
    found: dict[str, float] = {"trials": len(store.trials())}
    found |= {f"open_{clock}": now - then for (clock, now), then in zip(_clocks().items(), start.values(), strict=True)}
    asked = [_ask(store, space) for _ in range(1 + ASKED)]
    for clock in ("cpu", "wall"):
        first, *rest = [1000 * spent[clock] for spent in asked]
        found |= {f"first_{clock}": first, f"median_{clock}": statistics.median(rest), f"worst_{clock}": max(rest)}
    print(json.dumps(found | {"more_mb": _memory_mb() - before_mb}))


def _clocks() -> dict[str, float]:
    return {"cpu": time.process_time(), "wall": time.perf_counter()}


def _memory_mb() -> float:
    """What the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _ask(store: Store, space: Space) -> dict[str, float]:
    """Seconds by clock."""
    start = _clocks()
    trial = store.ask()
    policy = space.sample(TrialSuggest(trial))
    spent = {clock: now - start[clock] for clock, now in _clocks().items()}
    store.begin(trial, policy, 0.0)
    store.finish(trial.number, TrialState.FAILED, finished=1.0)
    return spent


class _RandomPolicies(PolicySampler):
    """Random policies, recorded as those of our sampler are."""

    def propose(self, study: Study, number: int) -> Policy:
        return self.space.random(np.random.default_rng((self.seed, number)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filler:
    """A study that is filled with random policies under a made-up accuracy with noise: every cut costs."""

    folder: Path
    store: Store
    space: Space
    profile: Profile
    weights: dict[str, float]
    noise: np.random.Generator

    def fill(self, count: int) -> None:
        self.store.repair()
        while len(self.store.trials()) < count:
            trial = self.store.ask()
            policy = self.space.sample(TrialSuggest(trial))
            self.store.begin(trial, policy, 0.0)
            [(latency, size)] = self.profile.costs(choices_of(self.space.anatomy, [policy])).tolist()
            self.store.note(
                trial.number, size_bytes=int(size), macs=plan(self.space.anatomy, policy).macs,
                predicted={"latency_ms": latency, "low_ms": latency, "high_ms": latency, "measured": False},
            )  # fmt: skip
            seen = self._accuracy(policy)
            for rung, shown in (("bn", seen - 0.2), ("short", seen)):
                quality = Quality(rung=rung, split="search", accuracy=shown, accuracy_se=0.004, samples=5000, seconds=1)
                self.store.note_quality(trial.number, quality)
            known = TrialState.FAILED if math.isnan(latency) else TrialState.COMPLETE
            self.store.finish(trial.number, known, finished=1.0)

    def copy(self, folder: Path, count: int) -> None:
        """The study as it was with so many trials."""
        begun = 0
        with (self.folder / JOURNAL).open() as lines, (folder / JOURNAL).open("w") as out:
            for line in lines:
                begun += json.loads(line)["op_code"] == CREATE_TRIAL
                if begun > count:
                    break
                out.write(line)

    def _accuracy(self, policy: Policy) -> float:
        cut = sum(self.weights[name] * ratio**2 for name, ratio in policy.prune.items()) / len(self.weights)
        return float(0.9 - 0.2 * cut - 0.02 * len(policy.removed_blocks) + self.noise.normal() * 0.004)


def _filler(folder: Path, space: Space, profile: Profile) -> _Filler:
    """Goes on with the study in the folder, where there is one."""
    folder.mkdir(exist_ok=True)
    random = make_sampler("random", 0, 0, space, profile.costs)
    sampler = _RandomPolicies(space, profile.costs, 0) if folder.name.endswith("ours") else random
    noise = np.random.default_rng(0)
    return _Filler(
        folder=folder, store=Store(open_storage(folder, None), sampler), space=space, profile=profile, noise=noise,
        weights={g.name: float(noise.uniform(0.2, 2)) for g in space.anatomy.groups},
    )  # fmt: skip


if __name__ == "__main__":
    main()
