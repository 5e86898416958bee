"""The search against other samplers: nights of equal length, and what a proposal costs.

    python benchmarks/search.py nights --out bench-search --task mnist5k-resnet --seeds 3 --budget 6m
    python benchmarks/search.py table --out bench-search
    python benchmarks/search.py overhead

``nights`` can be stopped and started again: a night that is done is not repeated, one that was cut off is resumed. All
nights of a task share one calibration, which ``nights`` measures first, so that all samplers see the same device.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nightpress.search.costs import Costs
from nightpress.search.folder import read_run
from nightpress.search.pareto import hypervolume
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.records import Quality, RunRecord, TrialRecord, TrialState
from nightpress.search.sampler import NightpressSampler, make_sampler
from nightpress.search.store import JOURNAL, Store, open_storage
from nightpress.spaces.anatomy import Anatomy, Block, Group, Layer, Op
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import FP32, INT8, Policy
from nightpress.spaces.space import Space

TASKS = ("mnist5k-resnet", "mnist5k-vgg", "resnet20")
CONTENDERS = ("nightpress", "random", "nsga2", "tpe", "gp", "netadapt", "uniform")
ABLATIONS = ("free_objectives", "rungs", "sensitivity")
CORNER_DROP = 0.10
"""The reference point: the given accuracy less this, the uncompressed latency. Fixed before any night."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    nights = parts.add_parser("nights")
    nights.add_argument("--out", type=Path, required=True)
    nights.add_argument("--task", choices=TASKS, default="mnist5k-resnet")
    nights.add_argument("--data", type=Path, help="folder of the CIFAR-10 JPEGs, for resnet20")
    nights.add_argument("--seeds", type=int, default=3)
    nights.add_argument("--first-seed", type=int, default=0)
    nights.add_argument("--budget", default="6m")
    nights.add_argument("--samplers", default="nightpress,random,nsga2,tpe")
    nights.add_argument("--ablations", default="", help="a list out of " + ", ".join(ABLATIONS))
    table = parts.add_parser("table")
    table.add_argument("--out", type=Path, required=True)
    overhead = parts.add_parser("overhead")
    overhead.add_argument("--trials", default="100,500,2000")
    overhead.add_argument("--samplers", default="nightpress,random,nsga2,nsga3,tpe")
    arguments = parser.parse_args()
    if arguments.part == "nights":
        run_nights(arguments)
    elif arguments.part == "table":
        print_table(arguments.out)
    else:
        print_overhead([int(n) for n in arguments.trials.split(",")], arguments.samplers.split(","))


# Nights


def run_nights(arguments: argparse.Namespace) -> None:
    folder = arguments.out / arguments.task
    folder.mkdir(parents=True, exist_ok=True)
    task = _task_of(arguments, folder)
    profile = folder / "profile.json"
    if not profile.is_file():
        _nightpress("calibrate", task, "--target", "onnxruntime", "--out", profile)
    plans = [(name, {"sampler": name}) for name in arguments.samplers.split(",") if name]
    plans += [(f"without {part}", {"without": [part]}) for part in arguments.ablations.split(",") if part]
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name, search in plans:
            _night(folder, task, profile, name, search, seed, arguments.budget)


def _night(
    folder: Path, task: str, profile: Path, name: str, search: dict[str, Any], seed: int, budget: str
) -> None:  # fmt: skip
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    state = json.loads((out / "state.json").read_text()) if (out / "state.json").is_file() else {}
    if state.get("state") == "done":
        return
    config = out.with_suffix(".yaml")
    settings: dict[str, Any] = {"workers": 1, **search, "resources": {"cpu": 1}}
    keys = {"task": task, "target": str(profile.resolve()), "seed": seed, "search": settings}
    if name in {"random", "nsga2", "nsga3", "tpe", "gp"}:
        settings["without"] = ["seeds"]  # a rival begins as it does elsewhere: with the rules, without our walk
    config.write_text(yaml.safe_dump(keys))
    _nightpress("run", config, "--out", out, "--budget", budget, *(["--resume"] if state else []))


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


def print_table(out: Path) -> None:
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        runs = {path.name: read_run(path) for path in sorted(folder.iterdir()) if (path / "state.json").is_file()}
        done = {name: run for name, run in runs.items() if run.state.get("state") == "done"}
        if done:
            _print_task(folder.name, done)


def _print_task(task: str, runs: dict[str, RunRecord]) -> None:
    corner = _corner(next(iter(runs.values())))
    points = {name: _verified(run, "search") for name, run in runs.items()}
    rules = {name: _verified(run, "baseline") for name, run in runs.items()}
    everything = np.vstack([p for p in (*points.values(), *rules.values()) if len(p)])
    best = hypervolume(everything, corner)
    box = (1 + corner[0]) * corner[1]
    print(f"\n{task}: hypervolume of (test accuracy, measured latency) of verified points, share of the box")
    print(f"reference: accuracy {-corner[0]:.4f}, {corner[1]:.3f} ms; best front known {best / box:.4f}")
    print(f"{'night':28} {'own':>8} {'regret':>8} {'with rules':>10} {'rules':>8} {'trials':>6} {'long steps':>10}")
    own: dict[str, list[float]] = {}
    for name, run in runs.items():
        values = [hypervolume(p, corner) for p in (points[name], np.vstack([points[name], rules[name]]), rules[name])]
        own.setdefault(name.rpartition("-")[0], []).append((best - values[0]) / box)
        own.setdefault("uniform and other rules", []).append((best - values[2]) / box)
        trials = sum(t.role != "baseline" for t in run.trials)
        steps = (run.state.get("rungs") or {}).get("long_steps", 0)
        print(f"{name:28} {values[0] / box:8.4f} {(best - values[0]) / box:8.4f} {values[1] / box:10.4f} "
              f"{values[2] / box:8.4f} {trials:6d} {steps:10d}")  # fmt: skip
    print(f"\n{'median regret':28}")
    for name, regrets in sorted(own.items(), key=lambda item: statistics.median(item[1])):
        print(f"{name:28} {statistics.median(regrets):8.4f}   of {len(regrets)}: "
              + " ".join(f"{r:.4f}" for r in regrets))  # fmt: skip


def _corner(run: RunRecord) -> tuple[float, float]:
    return -(run.state["given"]["test"]["accuracy"] - CORNER_DROP), float((run.target or {})["reference_ms"])


def _verified(run: RunRecord, role: str) -> np.ndarray:
    """Losses (−test accuracy, ms) of verified points; latency as a ratio to the reference measured beside it."""
    level = float((run.target or {})["reference_ms"])
    kept = [t for t in run.trials if t.verified and not t.verified.struck_out
            and (t.role == "baseline") == (role == "baseline")]  # fmt: skip
    return np.array([_losses(t, level) for t in kept]).reshape(len(kept), 2)


def _losses(trial: TrialRecord, level: float) -> tuple[float, float]:
    if trial.verified is None:
        raise ValueError(f"trial {trial.number} is not verified")
    latency = trial.verified.latency
    return -trial.verified.quality.accuracy, latency.latency_ms / (latency.reference_ms or level) * level


# Overhead


def print_overhead(counts: list[int], samplers: list[str]) -> None:
    space = Space(anatomy=deep_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8), distill=("none", "logit"))
    costs, accuracy = toy_costs(space.anatomy), _Accuracy(space)
    print(f"{space.dimensions} dimensions; milliseconds a proposal with its suggests, median (worst) of 5 in a row")
    with tempfile.TemporaryDirectory() as folder:
        filler = Store(open_storage(Path(folder), None), make_sampler("random", 0, 0, space, costs))
        for count in sorted(counts):
            while len(filler.trials()) < count:
                _finish(filler, space, costs, accuracy)
            for name in samplers:
                spans, opened = _proposals(Path(folder), space, name, count)
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{name:12} {count:5d} trials: {statistics.median(spans):7.0f} ({max(spans):.0f}) ms, "
                      f"study opened in {opened:.2f} s, peak memory so far {memory:.0f} MB", flush=True)  # fmt: skip


def _proposals(folder: Path, space: Space, name: str, count: int) -> tuple[list[float], float]:
    """Milliseconds of proposals on a copy of the study, as a resumed night would make them, and seconds to open it."""
    costs = toy_costs(space.anatomy)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(folder / JOURNAL, copy)
        start = time.perf_counter()
        sampler = make_sampler(name, 1, count, space, costs)
        store = Store(open_storage(Path(copy), None), sampler)
        opened = time.perf_counter() - start
        if isinstance(sampler, NightpressSampler):
            latency, size = costs(Policy(model=space.anatomy.digest))
            sampler.reference = (-0.5, latency, float(size))
        _ask(store, space)  # the first proposal also builds what the others share
        return [_ask(store, space) for _ in range(5)], opened


def _ask(store: Store, space: Space) -> float:
    start = time.perf_counter()
    trial = store.study.ask()
    policy = space.sample(TrialSuggest(trial))
    spent = 1000 * (time.perf_counter() - start)
    store.begin(trial, policy, 0.0)
    store.finish(trial.number, TrialState.FAILED, finished=1.0)
    return spent


class _Accuracy:
    """A made-up truth with noise: every cut costs, harsh ones more."""

    def __init__(self, space: Space) -> None:
        self._generator = np.random.default_rng(0)
        self._weights = {g.name: self._generator.uniform(0.2, 2) for g in space.anatomy.groups}

    def __call__(self, policy: Policy) -> float:
        cut = sum(self._weights[name] * ratio**2 for name, ratio in policy.prune.items()) / len(self._weights)
        return float(0.9 - 0.2 * cut - 0.02 * len(policy.removed_blocks) + self._generator.normal() * 0.004)


def _finish(store: Store, space: Space, costs: Costs, accuracy: _Accuracy) -> None:
    trial = store.study.ask()
    policy = space.sample(TrialSuggest(trial))
    latency, size = costs(policy)
    store.begin(trial, policy, 0.0)
    store.note(trial.number, size_bytes=size,
               predicted={"latency_ms": latency, "low_ms": latency, "high_ms": latency, "measured": False})  # fmt: skip
    seen = accuracy(policy)
    for rung, shown in (("bn", seen - 0.2), ("short", seen)):
        store.note_quality(trial.number, Quality(rung=rung, split="search", accuracy=shown, accuracy_se=0.004,
                                                 samples=5000, seconds=1.0))  # fmt: skip
    store.finish(trial.number, TrialState.COMPLETE, finished=1.0)


def toy_costs(anatomy: Anatomy) -> Costs:
    """Time and bytes in proportion to work and weights."""

    def costs(policy: Policy) -> tuple[float, int]:
        planned = plan(anatomy, policy)
        spent = sum(op.macs / (4 if op.int8 else 1) for op in planned.ops)
        return spent / 1e7 + 0.01, sum(op.weight_count * (1 if op.bits.weights < 32 else 4) for op in planned.ops) + 1

    return costs


def deep_anatomy(blocks: int = 29) -> Anatomy:
    """A residual network of 59 layers as data: blocks of two convolutions, a little deeper than ResNet-56."""
    ops = [Op(name="x", kind="input", inputs=(), shape=(1, 3, 32, 32)), _conv("stem", "x", 3, 64, {})]
    groups, layers, found = [], [_layer(ops[-1], 3 * 64 * 9)], []
    before = "stem"
    for i in range(blocks):
        first, second, total = f"b{i}.conv1", f"b{i}.conv2", f"b{i}.add"
        group = Group(name=first, channels=64, step=8, layers=(first,), macs=0)
        ops += [_conv(first, before, 64, 64, {first: 1}), _conv(second, first, 64, 64, {}),
                Op(name=total, kind="add", inputs=(before, second), shape=(1, 64, 8, 8))]  # fmt: skip
        layers += [_layer(ops[-3], 64 * 64 * 9), _layer(ops[-2], 64 * 64 * 9)]
        groups.append(group)
        found.append(Block(name=f"b{i}", ops=(first, second, total), source=before, output=total,
                           layers=(first, second), macs=2 * 64 * 64 * 9 * 64))  # fmt: skip
        before = total
    return Anatomy(
        digest="deep", ops=tuple(ops), output=before, groups=tuple(groups), layers=tuple(layers), blocks=tuple(found),
        left_out=(), params=sum(layer.params for layer in layers),
    )  # fmt: skip


def _conv(name: str, source: str, into: int, out: int, lost: dict[str, int]) -> Op:
    side = 32 if into == 3 else 8
    attrs = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    return Op(name=name, kind="conv", inputs=(source,), shape=(1, out, side, side), module=name, attrs=attrs,
              params={"weight": f"{name}.weight"}, lost=({}, lost, {}, {}))  # fmt: skip


def _layer(op: Op, weights: int) -> Layer:
    name = op.module or op.name
    return Layer(name=name, kind="conv", op=op.name, macs=weights * op.shape[2] * op.shape[3], params=weights)


if __name__ == "__main__":
    main()
