"""Several runs beside each other: what differs between them, and which of their points are still on the front."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..search.pareto import losses, non_dominated
from ..search.records import RunRecord, row
from .front import front, hypervolumes


def compare_runs(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The ``compare`` command's JSON: ``runs``, ``differences`` in config, model and device, and the common ``front``.

    The common front holds the points of all runs that no point of any run dominates; accuracies on different
    splits or of different models are compared as they are, so look at ``differences`` first.
    """
    return {
        "runs": [
            {
                "run": str(run.path),
                "state": run.state.get("state"),
                "hypervolume": hypervolumes(run).get("search"),
                "trials": len(run.trials),
                "front": len(front(run)),
            }
            for run in runs
        ],
        "differences": _differences(runs),
        "front": _common_front(runs),
    }


def _common_front(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"run": str(run.path), **row(trial)} for run in runs for trial in front(run)]
    points = [losses(r["accuracy"], r["latency_ms"], r["size_bytes"]) for r in rows]
    return [rows[i] for i in non_dominated(points)]


def _differences(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Rows of ``what`` and the value in each run, for everything that is not the same in all of them."""
    flat = [_flat({"config": run.config, **_circumstances(run)}) for run in runs]
    names = [str(run.path) for run in runs]
    return [
        {"what": key, **{name: values.get(key) for name, values in zip(names, flat, strict=True)}}
        for key in sorted(set().union(*flat))
        if len({repr(values.get(key)) for values in flat}) > 1
    ]


def _circumstances(run: RunRecord) -> dict[str, Any]:
    return {
        "model": run.state.get("model"),
        "environment": run.state.get("environment"),
        "device": (run.target or {}).get("device"),
        "rungs": run.state.get("rungs"),
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
