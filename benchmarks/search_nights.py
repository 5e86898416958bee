"""Nights of equal length by each sampler, a line of a file for each, and the table of them: parts of ``search.py``."""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from nightpress.cli.config import parse_budget
from nightpress.evaluators.latency.target import Fingerprint, Target, fingerprint, fingerprint_from_dict
from nightpress.reports.clock import clock
from nightpress.search.folder import STATE, read_run
from nightpress.search.pareto import hypervolume
from nightpress.search.records import RunRecord, TrialState

CORNER_DROP = 0.10
"""The reference point: the given accuracy less this, the uncompressed latency. Fixed before any night."""
LEFT_OUT = {"sensitivity": ["sensitivity", "seeds"]}
"""What an ablation leaves out beside its name: the walk is built from the probes, so it would bring them back."""
RIVALS = frozenset({"random", "nsga2", "nsga3", "tpe", "gp", "netadapt"})


def run_nights(arguments: argparse.Namespace) -> None:
    folder = arguments.out / arguments.task
    folder.mkdir(parents=True, exist_ok=True)
    task = _task_of(arguments, folder)
    profile = folder / "profile.json"
    plans = [(name, {"sampler": name}) for name in arguments.samplers.split(",") if name]
    plans += [
        (f"without {part}", {"without": LEFT_OUT.get(part, [part])}) for part in arguments.ablations.split(",") if part
    ]
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name, search in plans:
            done = {(row["cpu"], row["task"], row["name"], row["seed"], row["budget"]) for row in _rows(arguments.rows)}
            if (cpu_of(fingerprint(Target())), arguments.task, name, seed, arguments.budget) in done:
                continue
            if not profile.is_file():
                nightpress("calibrate", task, "--target", "onnxruntime", "--out", profile)
            run = _night(folder, task, profile, name, search, seed, arguments.budget)
            if run is not None:
                row = {"task": arguments.task, "name": name, "seed": seed, "budget": arguments.budget, **_row_of(run)}
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _row_of(run: RunRecord) -> dict[str, Any]:
    """What the table needs of a night. ``seen``: of each trial that went to the top the seconds of work before its end,
    its accuracy on the search split and its latency as a share of the uncompressed one."""
    level = float((run.target or {})["reference_ms"])
    work, begun = clock(run), float(run.state["started"])
    assert work is not None
    cpu = cpu_of(fingerprint_from_dict((run.target or {})["device"]))
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(begun)), "commit": _commit(), "cpu": cpu,
        "resumed": len(run.state.get("resumed", ())),
        "given": run.state["given"]["test"]["accuracy"],
        "given_search": run.state["given"]["search"]["accuracy"],
        "points": _verified(run, "search"), "rules": _verified(run, "baseline"),
        "trials": sum(t.role != "baseline" for t in run.trials),
        "long_steps": (run.state.get("rungs") or {}).get("long_steps", 0),
        "seen": [
            (round(work.worked(t.finished), 1), t.quality.accuracy, t.latency.latency_ms / level) for t in run.trials
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
    state = json.loads((out / STATE).read_text()) if (out / STATE).is_file() else {}
    if state.get("state") == "done":
        return read_run(out)
    config = out.with_suffix(".yaml")
    settings: dict[str, Any] = {"workers": 1, **search, "resources": {"cpu": 1}}
    keys = {"task": task, "target": str(profile.resolve()), "seed": seed, "search": settings}
    # As long for all as the first night found: what two nights saw of accuracies is only comparable then.
    lengths = folder / f"short_steps-{budget}.json"
    if lengths.is_file():
        keys["finetune"] = {"short_steps": json.loads(lengths.read_text())}
    if name in RIVALS:
        settings["without"] = ["seeds"]  # a rival begins as it does elsewhere: with the rules, without our walk
    if not state:  # one that is resumed keeps what it began with
        config.write_text(yaml.safe_dump(keys))
    nightpress("run", config, "--out", out, "--budget", *([_left(out, budget), "--resume"] if state else [budget]))
    if not (out / STATE).is_file():  # refused before it began
        return None
    run = read_run(out)
    if run.state.get("state") != "done":
        return None
    if not lengths.is_file():
        lengths.write_text(json.dumps(run.state["rungs"]["short_steps"]))
    return run


def _left(out: Path, budget: str) -> str:
    """Of a night's budget, beside what it has worked: until it last wrote its state, which it does every ten seconds
    whatever it is busy with."""
    work = clock(read_run(out))
    worked = work.worked((out / STATE).stat().st_mtime) if work is not None else 0.0
    return f"{max(60.0, parse_budget(budget, '--budget') - worked):.1f}s"


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


def nightpress(*words: object) -> None:
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
    """A night is as good as its final front, on which rules stand as well; ``own`` is what its search's points cover
    alone. Latencies are shares of the uncompressed one's, so the box is as high as it is wide in the accuracy."""
    corner = (-(rows[0]["given"] - CORNER_DROP), 1.0)
    box = 1 + corner[0]

    def covered(*parts: list[tuple[float, float]]) -> float:
        return hypervolume([(-accuracy, share) for part in parts for accuracy, share in part], corner) / box

    best = covered(*(row[part] for row in rows for part in ("points", "rules")))
    print(f"\n{title}: hypervolume of (test accuracy, measured latency) of verified points, share of the box")
    print(f"reference: accuracy {-corner[0]:.4f}, the uncompressed latency; best front known {best:.4f}")
    print(f"commit {', '.join(dict.fromkeys(row['commit'] for row in rows))}")
    columns = " ".join(f"{name:>8}" for name in ("front", "regret", "own", "regret", "rules"))
    print(f"{'night':28} {columns} {'trials':>6} {'long steps':>10}")
    fronts: dict[str, list[float]] = {}
    own: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["name"], row["seed"])):
        front, alone, rules = covered(row["points"], row["rules"]), covered(row["points"]), covered(row["rules"])
        fronts.setdefault(row["name"], []).append(best - front)
        fronts.setdefault("uniform and other rules", []).append(best - rules)
        own.setdefault(row["name"], []).append(best - alone)
        print(f"{row['name'] + '-' + str(row['seed']):28} {front:8.4f} {best - front:8.4f} {alone:8.4f} "
              f"{best - alone:8.4f} {rules:8.4f} {row['trials']:6d} {row['long_steps']:10d}")  # fmt: skip
    _print_medians("regret of the final front", fronts)
    _print_medians("the same without the rules on it", own)
    _print_times(rows)


def _print_medians(title: str, regrets: dict[str, list[float]]) -> None:
    print(f"\nmedian {title}")
    for name, values in sorted(regrets.items(), key=lambda item: statistics.median(item[1])):
        print(f"{name:28} {statistics.median(values):8.4f}   of {len(values)}: "
              + " ".join(f"{value:.4f}" for value in values))  # fmt: skip


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
