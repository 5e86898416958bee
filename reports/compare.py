"""Several runs beside each other: what differs between them, and which of their points are still on the front."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..search import pareto
from ..search.config import Limits
from ..search.pareto import losses, non_dominated
from ..search.records import RunRecord, TrialRecord, row
from .covered import hypervolumes, reference
from .front import Losses, Point, front, point, verified_any
from .noise import hypervolume_error, hypervolume_errors, noise_of_gain
from .text import plain
from .verdict import forced

KINDS = {
    "config": "config",
    "data": "data",
    "model": "data",
    "device": "device",
    "forced": "device",
    "target": "device",
    "host": "device",
    "code": "code",
    "environment": "code",
    "rungs": "config",
}
"""What a difference belongs to, by the first part of its name."""


class Covered(NamedTuple):
    """Hypervolume of a run's front as a share of a box that all runs share, with its standard error."""

    share: float
    error: float


def compare_runs(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The ``compare`` command's JSON: ``runs``, ``gains`` of the run that covers most over each other one,
    ``differences`` in config, data, device and code, the common ``front``, and ``dominance``: which point of one run's
    front is better than which of another's.

    ``hypervolume`` is each run's own figure; ``hypervolume_common`` measures all fronts in the same box and can be
    compared. The common front holds the points of all runs that no point of any run dominates; accuracies on different
    splits or of different models are compared as they are, so look at ``differences`` first.
    """
    common = in_common_box(runs)
    data = {
        "runs": [
            {
                "run": str(run.path),
                "state": run.state.get("state"),
                "hypervolume": hypervolumes(run).get("search"),
                "hypervolume_se": hypervolume_errors(run).get("search"),
                "hypervolume_common": covered.share if covered else None,
                "hypervolume_common_se": covered.error if covered else None,
                "trials": len(run.trials),
                "front": len(front(run)),
            }
            for run, covered in zip(runs, common, strict=True)
        ],
        "gains": gains(runs, common),
        "differences": differences(runs),
        "front": _common_front(runs),
        "dominance": dominance(runs),
    }
    return plain(data)


def in_common_box(runs: Sequence[RunRecord]) -> list[Covered | None]:
    """Hypervolume of each run's whole front, baselines included, up to the worst of all runs' reference points, each of
    the split that its run's front stands on.

    None for a run without a front, and for all when no run has a reference point.
    """
    corner = _common_corner(runs)
    if corner is None:
        return [None] * len(runs)
    covered: list[Covered | None] = []
    for run in runs:
        pairs = _points(run)
        error = hypervolume_error(pairs, corner, verified=True)
        share = pareto.relative_hypervolume([found.losses for _, found in pairs], corner) if pairs else None
        covered.append(Covered(share, error or 0.0) if share is not None else None)
    return covered


def _common_corner(runs: Sequence[RunRecord]) -> Losses | None:
    corners = [known for run in runs if (known := reference(run, verified=verified_any(run))) is not None]
    if not corners:
        return None
    accuracies, latencies, sizes = zip(*corners, strict=True)
    return max(accuracies), max(latencies), max(sizes)


def gains(runs: Sequence[RunRecord], common: Sequence[Covered | None]) -> list[dict[str, Any]]:
    """How much more of the common box the run that covers most has than each other one, and what of it is chance: see
    :class:`.noise.Gain`."""
    corner = _common_corner(runs)
    known = [(covered.share, run) for run, covered in zip(runs, common, strict=True) if covered is not None]
    if corner is None or len(known) < 2:
        return []
    known.sort(key=lambda pair: -pair[0])
    (most, best), *others = known
    rows: list[dict[str, Any]] = []
    for share, run in others:
        found = noise_of_gain(
            _points(best), _points(run), corner, Limits(), verified=True, same_items=_same_items(best, run)
        )
        rows.append({
            "run": str(best.path), "over": str(run.path), "gain": most - share, "gain_se": found.error,
            "gain_luck": found.luck, "paired": found.paired,
        })  # fmt: skip
    return rows


def _same_items(one: RunRecord, other: RunRecord) -> bool:
    """Whether both runs were judged on the same test items: the same network of the same task answered as many of them
    and as many rightly. Their data's digests do not tell, since they leave out the search split, which varies."""

    def known(run: RunRecord) -> list[Any]:
        test: Mapping[str, Any] = (run.state.get("given") or {}).get("test") or {}
        return [run.state.get("task"), run.state.get("model"), test.get("samples"), test.get("accuracy")]

    return None not in known(one) and known(one) == known(other)


def _points(run: RunRecord) -> list[tuple[TrialRecord, Point]]:
    return [(trial, found) for trial in front(run) if (found := point(trial)) is not None]


def dominance(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """For each front point that another run's front points dominate, the one that does so by most of the common box;
    by most accuracy where the box does not tell them apart."""
    corner = _common_corner(runs)

    def covered(found: Point) -> float:
        # What a point covers, each that dominates it covers too: whichever covers most has most beyond it.
        return pareto.relative_hypervolume([found.losses], corner) if corner is not None else 0.0

    fronts = [[(trial, found, covered(found)) for trial, found in _points(run)] for run in runs]
    rows: list[dict[str, Any]] = []
    for i, (run, points) in enumerate(zip(runs, fronts, strict=True)):
        for trial, found, _ in points:
            better = [
                (share, other.accuracy, j, rival)
                for j, rivals in enumerate(fronts)
                if j != i
                for rival, other, share in rivals
                if other.losses != found.losses and all(a <= b for a, b in zip(other.losses, found.losses, strict=True))
            ]
            if better:
                *_, j, rival = max(better, key=lambda item: item[:2])
                rows.append(
                    {
                        "run": str(run.path),
                        "trial": trial.number,
                        "by_run": str(runs[j].path),
                        "by_trial": rival.number,
                        "others": len(better) - 1,
                    }
                )
    return rows


def _common_front(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"run": str(run.path), **row(trial)} for run in runs for trial in front(run)]
    points = [losses(r["accuracy"], r["latency_ms"], r["size_bytes"]) for r in rows]
    return [rows[i] for i in non_dominated(points)]


def differences(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Rows of ``what`` and the value in each run, for everything that is not the same in all of them."""
    flat = [_flat({"config": run.config, **_circumstances(run)}) for run in runs]
    names = [str(run.path) for run in runs]
    return [
        {"what": key, **{name: values.get(key) for name, values in zip(names, flat, strict=True)}}
        for key in sorted(set().union(*flat))
        if len({repr(values.get(key)) for values in flat}) > 1
    ]


def kind_of(what: str) -> str:
    """Whether a difference is one of config, data, device or code."""
    return KINDS.get(what.split(".", 1)[0], "config")


def _circumstances(run: RunRecord) -> dict[str, Any]:
    target: Mapping[str, Any] = run.target or {}
    return {
        "model": run.state.get("model"),
        "data": run.state.get("data"),
        "code": run.state.get("code"),
        "environment": run.state.get("environment"),
        "host": run.state.get("host"),
        "device": run.device,
        "forced": forced(run),
        "target": target.get("target"),
        "rungs": run.state.get("rungs"),
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
