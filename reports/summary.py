"""A run in one JSON object, and in one table for the end of the night."""

from collections import Counter
from typing import Any

from ..search.records import RunRecord, TrialRecord, TrialState, row
from .covered import hypervolumes
from .front import front, picked, picks, point, shrinkage, speedup
from .text import plain, title
from .verdict import forced


def summary(run: RunRecord) -> dict[str, Any]:
    """What ``run --json`` and ``status --json`` print. Unknown is None; nothing in it is NaN."""
    counts = Counter(trial.state for trial in run.trials)
    covered = hypervolumes(run)
    data = {
        "run": str(run.path),
        "state": run.state.get("state"),
        "phase": run.state.get("phase"),
        "deadline": run.state.get("deadline"),
        "trials": {
            str(state): counts[state]
            for state in (
                TrialState.COMPLETE,
                TrialState.STOPPED,
                TrialState.INFEASIBLE,
                TrialState.FAILED,
                TrialState.RUNNING,
            )
        },
        "waiting": _waiting(run, counts[TrialState.RUNNING]),
        "front": [row(trial) for trial in front(run)],
        "baselines": [row(trial) for trial in run.trials if trial.role == "baseline"],
        "hypervolume": covered["search"],
        "baseline_hypervolume": covered["baselines"],
        "picks": {name: trial.number for name, trial in picks(run).items()},
        "seconds": dict(run.state.get("seconds") or {}),
        "forced": forced(run),
    }
    return plain(data)


def _waiting(run: RunRecord, running: int) -> int:
    """Of the trials that are RUNNING, those that pause at a rung; others promise more."""
    noted = run.state.get("waiting")
    return min(noted, running) if isinstance(noted, int) else 0


def summary_table(run: RunRecord) -> list[dict[str, Any]]:
    """A row for each baseline and each pick, in percent, milliseconds and kilobytes; unknown is None."""
    on_front = {trial.number for trial in front(run)}
    named = picked(run)
    labels = {trial.number: names for trial, names in named}
    chosen = [trial for trial in run.trials if trial.role == "baseline"]
    chosen += [trial for trial, _ in named if trial.role != "baseline"]
    return [
        plain(
            {
                "trial": trial.number,
                "name": title(trial),
                "picked": labels.get(trial.number, []),
                **_figures(run, trial),
                "split": row(trial)["split"],
                "on_front": trial.number in on_front,
                "struck_out": trial.struck_out,
            }
        )
        for trial in chosen
    ]


def _figures(run: RunRecord, trial: TrialRecord) -> dict[str, float | None]:
    values = row(trial)
    found = point(trial)
    error = values["accuracy_se"]
    return {
        "accuracy_percent": 100 * found.accuracy if found else None,
        "se_points": 100 * error if error is not None else None,
        "latency_ms": found.latency_ms if found else None,
        "ratio": speedup(run, trial),
        "size_kb": found.size_bytes / 1000 if found else None,
        "size_ratio": shrinkage(run, trial),
    }
