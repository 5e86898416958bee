"""The search against other samplers: nights of equal length, and what a proposal costs.

    python benchmarks/search.py nights --out bench --rows nights.jsonl --task mnist5k-resnet --seeds 3 --budget 6m
    python benchmarks/search.py table --rows nights.jsonl
    python benchmarks/latency.py calibrate resnet56 --cache DIR
    python benchmarks/search.py overhead --cache DIR
    python benchmarks/search.py twice --trials 24

``nights`` can be stopped and started again: a night whose row is in the file is not repeated, one that was cut off is
resumed. All nights of a task share one calibration, which ``nights`` measures first, so that all samplers see the same
device. A row holds the verified points as shares of the uncompressed latency beside them, so rows of several days on
CPUs of one kind (by name and by the flags that choose kernels) make one table.
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
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from latency import anatomy_of, files_of, space_of
from optuna.study import Study

import tiny
from nightpress.evaluators.latency.profile import Profile, load_profile
from nightpress.evaluators.latency.target import Fingerprint, Target, fingerprint, fingerprint_from_dict
from nightpress.search.folder import read_run
from nightpress.search.memory import Memory
from nightpress.search.pareto import hypervolume
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
CORNER_DROP = 0.10
"""The reference point: the given accuracy less this, the uncompressed latency. Fixed before any night."""
NETWORK, ASKED = "resnet56", 7


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
    overhead.add_argument("--samplers", default="nightpress,random,nsga2,nsga3,tpe")
    twice = parts.add_parser("twice")
    twice.add_argument("--trials", type=int, default=24)
    twice.add_argument("--seed", type=int, default=0)
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
    elif arguments.part == "resume":
        print_resume(arguments.folder, arguments.sampler, arguments.cache)
    else:
        print_overhead(arguments.cache, [int(n) for n in arguments.trials.split(",")], arguments.samplers.split(","))


# Nights


def run_nights(arguments: argparse.Namespace) -> None:
    folder = arguments.out / arguments.task
    folder.mkdir(parents=True, exist_ok=True)
    task = _task_of(arguments, folder)
    profile = folder / "profile.json"
    plans = [(name, {"sampler": name}) for name in arguments.samplers.split(",") if name]
    plans += [(f"without {part}", {"without": [part]}) for part in arguments.ablations.split(",") if part]
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name, search in plans:
            done = {(row["cpu"], row["task"], row["name"], row["seed"], row["budget"]) for row in _rows(arguments.rows)}
            if (cpu_of(fingerprint(Target())), arguments.task, name, seed, arguments.budget) in done:
                continue
            if not profile.is_file():
                _nightpress("calibrate", task, "--target", "onnxruntime", "--out", profile)
            run = _night(folder, task, profile, name, search, seed, arguments.budget)
            if run is not None:
                row = {"task": arguments.task, "name": name, "seed": seed, "budget": arguments.budget, **_row_of(run)}
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _row_of(run: RunRecord) -> dict[str, Any]:
    """What the table needs of a night. ``seen``: of each trial that went to the top the seconds since the beginning,
    its accuracy on the search split and its latency as a share of the uncompressed one."""
    level = float((run.target or {})["reference_ms"])
    begun = float(run.state["started"])
    cpu = cpu_of(fingerprint_from_dict((run.target or {})["device"]))
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(begun)), "commit": _commit(), "cpu": cpu,
        "given": run.state["given"]["test"]["accuracy"],
        "given_search": run.state["given"]["search"]["accuracy"],
        "points": _verified(run, "search"), "rules": _verified(run, "baseline"),
        "trials": sum(t.role != "baseline" for t in run.trials),
        "long_steps": (run.state.get("rungs") or {}).get("long_steps", 0),
        "seen": [
            (round(t.finished - begun, 1), t.quality.accuracy, t.latency.latency_ms / level) for t in run.trials
            if t.state is TrialState.COMPLETE and t.finished and t.quality and t.latency
        ],
    }  # fmt: skip


def cpu_of(device: Fingerprint) -> str:
    """Its name says little on a virtual machine: the flags choose the kernels."""
    return " ".join([device.cpu, *device.flags])


def _commit() -> str:
    """Of the code that ran, with a + where it was changed since."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def _night(
    folder: Path, task: str, profile: Path, name: str, search: dict[str, Any], seed: int, budget: str
) -> RunRecord | None:  # fmt: skip
    """None where it did not come to its end."""
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    state = json.loads((out / "state.json").read_text()) if (out / "state.json").is_file() else {}
    if state.get("state") == "done":
        return read_run(out)
    config = out.with_suffix(".yaml")
    settings: dict[str, Any] = {"workers": 1, **search, "resources": {"cpu": 1}}
    keys = {"task": task, "target": str(profile.resolve()), "seed": seed, "search": settings}
    if name in {"random", "nsga2", "nsga3", "tpe", "gp"}:
        settings["without"] = ["seeds"]  # a rival begins as it does elsewhere: with the rules, without our walk
    config.write_text(yaml.safe_dump(keys))
    _nightpress("run", config, "--out", out, "--budget", budget, *(["--resume"] if state else []))
    if not (out / "state.json").is_file():  # refused before it began
        return None
    run = read_run(out)
    return run if run.state.get("state") == "done" else None


def _task_of(arguments: argparse.Namespace, folder: Path) -> str:
    """The task's name; for CIFAR-10 a task file that knows where the data are."""
    if arguments.task != "resnet20":
        return arguments.task
    if arguments.data is None:
        raise SystemExit("--task resnet20 needs --data, the folder of the CIFAR-10 JPEGs and weights")
    here, data = Path(__file__).resolve().parent, arguments.data.resolve()
    text = f"""import sys
from pathlib import Path

sys.path.insert(0, {str(here)!r})
from cifar10 import task


def build():
    return task("resnet20", Path({str(data)!r}))
"""
    (folder / "task.py").write_text(text)
    return f"{folder.resolve() / 'task.py'}:build"


def _nightpress(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nightpress.cli", *map(str, words)], check=False, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        print(f"{' '.join(map(str, words))}: exit code {done.returncode}", flush=True)


# Table


def print_table(path: Path) -> None:
    rows = _rows(path)
    for task, budget, cpu in dict.fromkeys((row["task"], row["budget"], row["cpu"]) for row in rows):
        some = [row for row in rows if (row["task"], row["budget"], row["cpu"]) == (task, budget, cpu)]
        _print_task(f"{task}, nights of {budget} on {cpu}", some)


def _print_task(title: str, rows: list[dict[str, Any]]) -> None:
    """Latencies are shares of the uncompressed one's, so the box is as high as it is wide in the accuracy."""
    corner = (-(rows[0]["given"] - CORNER_DROP), 1.0)
    box = 1 + corner[0]

    def covered(*parts: list[tuple[float, float]]) -> float:
        return hypervolume([(-accuracy, share) for part in parts for accuracy, share in part], corner) / box

    best = covered(*(row[part] for row in rows for part in ("points", "rules")))
    print(f"\n{title}: hypervolume of (test accuracy, measured latency) of verified points, share of the box")
    print(f"reference: accuracy {-corner[0]:.4f}, the uncompressed latency; best front known {best:.4f}")
    print(f"commit {', '.join(dict.fromkeys(row['commit'] for row in rows))}")
    print(f"{'night':28} {'own':>8} {'regret':>8} {'with rules':>10} {'rules':>8} {'trials':>6} {'long steps':>10}")
    regrets: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["name"], row["seed"])):
        values = [covered(row["points"]), covered(row["points"], row["rules"]), covered(row["rules"])]
        regrets.setdefault(row["name"], []).append(best - values[0])
        regrets.setdefault("uniform and other rules", []).append(best - values[2])
        print(f"{row['name'] + '-' + str(row['seed']):28} {values[0]:8.4f} {best - values[0]:8.4f} {values[1]:10.4f} "
              f"{values[2]:8.4f} {row['trials']:6d} {row['long_steps']:10d}")  # fmt: skip
    print(f"\n{'median regret':28}")
    for name, values in sorted(regrets.items(), key=lambda item: statistics.median(item[1])):
        print(f"{name:28} {statistics.median(values):8.4f}   of {len(values)}: "
              + " ".join(f"{value:.4f}" for value in values))  # fmt: skip
    _print_times(rows)


def _print_times(rows: list[dict[str, Any]]) -> None:
    """When the search of ours had seen, on its own split, as much hypervolume as each rival saw in its whole night."""
    ours = {row["seed"]: row for row in rows if row["name"] == "nightpress"}
    print(f"\n{'reached by nightpress after':28} (share of the rival's own time; search split)")
    for name in sorted({row["name"] for row in rows} - {"nightpress"}):
        pairs = [(row, ours[row["seed"]]) for row in rows if row["name"] == name and row["seed"] in ours]
        shares = [_reached(rival, own) for rival, own in pairs if rival["seen"] and own["seen"]]
        if shares:
            print(f"{name:28} {statistics.median(shares):8.2f}   of {len(shares)}: "
                  + " ".join(f"{share:.2f}" for share in shares))  # fmt: skip


def _reached(rival: dict[str, Any], own: dict[str, Any]) -> float:
    """Infinite where it never did."""
    corner = (-(own["given_search"] - CORNER_DROP), 1.0)
    goal = hypervolume([(-accuracy, share) for _, accuracy, share in rival["seen"]], corner)
    seen = sorted(own["seen"])
    for count in range(1, len(seen) + 1):
        if hypervolume([(-accuracy, share) for _, accuracy, share in seen[:count]], corner) >= goal:
            return seen[count - 1][0] / max(at for at, *_ in rival["seen"])
    return math.inf


def _verified(run: RunRecord, role: str) -> list[tuple[float, float]]:
    """(Test accuracy, latency as a share of the uncompressed one's beside it) of verified points."""
    level = float((run.target or {})["reference_ms"])
    kept = [t.verified for t in run.trials if t.verified and not t.verified.struck_out
            and (t.role == "baseline") == (role == "baseline")]  # fmt: skip
    return [(v.quality.accuracy, v.latency.latency_ms / (v.latency.reference_ms or level)) for v in kept]


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
            _nightpress("run", config)
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
                done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
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
