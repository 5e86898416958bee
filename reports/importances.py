"""Which choices of the policies mattered: PED-ANOVA on the run's own records.

Watanabe, Bansal and Hutter, PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces,
IJCAI 2023, eq. 16 with γ = 1: the Pearson divergence between a parameter's density among the best trials and among
all, on a grid, each density a Parzen estimate with Scott's bandwidth and a uniform prior. Optuna's study is not needed.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..search import pareto
from ..search.records import RunRecord, TrialRecord, TrialState
from .front import Point, search_point

Array = NDArray[np.float64]
TOP = 0.1
LEAST_TOP = 5
"""Below so many best trials, a density of them says nothing."""
LEAST_TRIALS = 20
GRID = 50
NARROWEST = 0.5 / 1.64
"""In grid cells: 90 % of a kernel stays within its own cell."""
LEFT_OUT = frozenset({"schema", "model"})
ABSENT = {"prune": 0.0, "sparsity": 0.0}
"""What a name means that a mapping of the policy leaves out; any other is a category of its own."""


class Importance(NamedTuple):
    """A parameter's share of each objective's importance; shares of an objective add up to 1."""

    name: str
    shares: Mapping[str, float]


class Importances(NamedTuple):
    """Parameters by their largest share, largest first, and the number of trials that they rest on."""

    parameters: tuple[Importance, ...]
    trials: int


def importances(run: RunRecord) -> Importances:
    """Importances for reaching the front, a high accuracy and a low latency; empty with too few trials."""
    known = [(t, found) for t in run.trials if _counts(t) and (found := search_point(t)) is not None]
    # What was not sampled shares its settings, which would look like a reason for what it has in common.
    sampled = [pair for pair in known if pair[0].role == "search"]
    known = sampled if len(sampled) >= LEAST_TRIALS else known
    if len(known) < LEAST_TRIALS:
        return Importances((), len(known))
    columns = _columns([t.policy for t, _ in known])
    count = min(len(known) - 1, max(LEAST_TOP, math.ceil(TOP * len(known))))
    points = [found for _, found in known]
    by_objective = {name: _shares(columns, best(points)[:count]) for name, best in OBJECTIVES.items()}
    parameters = [Importance(name, {o: shares[name] for o, shares in by_objective.items()}) for name in columns]
    parameters.sort(key=lambda p: (-max(p.shares.values()), p.name))
    return Importances(tuple(parameters), len(known))


def _counts(trial: TrialRecord) -> bool:
    """Whether a trial is known at the highest rung of the search, and not a repeat."""
    return trial.state is TrialState.COMPLETE and trial.reused_from is None


def _by_front(points: Sequence[Point]) -> list[int]:
    """Indices by how many others dominate a point (Fonseca and Fleming 1993), then by the distance to the ideal."""
    losses = pareto.as_losses([p.losses for p in points])
    low, high = losses.min(axis=0), losses.max(axis=0)
    distance = (((losses - low) / np.where(high > low, high - low, 1.0)) ** 2).sum(axis=1)
    dominators = [int(((losses <= one).all(axis=1) & (losses < one).any(axis=1)).sum()) for one in losses]
    return sorted(range(len(points)), key=lambda i: (dominators[i], float(distance[i])))


def _by_accuracy(points: Sequence[Point]) -> list[int]:
    return sorted(range(len(points)), key=lambda i: -points[i].accuracy)


def _by_latency(points: Sequence[Point]) -> list[int]:
    return sorted(range(len(points)), key=lambda i: points[i].latency_ms)


OBJECTIVES: Mapping[str, Callable[[Sequence[Point]], list[int]]] = {
    "the front": _by_front,
    "accuracy": _by_accuracy,
    "latency": _by_latency,
}


def _columns(policies: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Each parameter that varies, as a grid cell a trial; categories are cells in order of their text."""
    flat = [flatten(policy) for policy in policies]
    columns: dict[str, Array] = {}
    for name in dict.fromkeys(name for one in flat for name in one):
        missing = ABSENT.get(name.split(":", 1)[0], "absent")
        values = [one.get(name, missing) for one in flat]
        if len(set(values)) > 1:
            columns[name] = _cells(values)
    return columns


def flatten(policy: Mapping[str, Any]) -> dict[str, float | str]:
    """A policy of any schema as named scalars: ``prune:<group>``, ``bits:<layer>``, ``block:<name>``, ``distill:…``."""
    found: dict[str, float | str] = {}
    for key, value in policy.items():
        if key in LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            inner = cast("Mapping[str, Any]", value)
            found |= {f"{key}:{name}": _scalar(item) for name, item in inner.items()}
        elif isinstance(value, list | tuple):
            found |= {f"{key.removeprefix('removed_').rstrip('s')}:{item}": 1.0 for item in cast("list[Any]", value)}
        else:
            found[key] = _scalar(value)
    return found


def _scalar(value: Any) -> float | str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _cells(values: Sequence[float | str]) -> Array:
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if len(distinct) <= GRID or any(isinstance(value, str) for value in distinct):
        position = {value: i for i, value in enumerate(distinct)}
        return np.array([position[value] for value in values], dtype=np.float64)
    numbers = np.array(values, dtype=np.float64)
    share = (numbers - numbers.min()) / (numbers.max() - numbers.min())
    return np.minimum(np.floor(share * GRID), GRID - 1)


def _shares(columns: Mapping[str, Array], best: Sequence[int]) -> dict[str, float]:
    found = {name: divergence(cells[list(best)], cells) for name, cells in columns.items()}
    total = sum(found.values())
    return {name: value / total if total > 0 else 0.0 for name, value in found.items()}


def divergence(top: Array, everything: Array) -> float:
    """Pearson divergence of two samples of grid cells, by their Parzen densities."""
    size = int(everything.max()) + 1
    some, whole = _density(top, size), _density(everything, size)
    return float(whole @ (some / whole - 1) ** 2)


def _density(cells: Array, size: int) -> Array:
    """Density over the grid: a kernel a sample, Scott's bandwidth (1992), and a uniform prior of weight 1."""
    low, high = np.quantile(cells, [0.25, 0.75])
    spread = min(float(high - low) / 1.34, float(cells.std(ddof=1))) if len(cells) > 1 else 0.0
    width = max(NARROWEST, 1.059 * spread * len(cells) ** -0.2)
    grid = np.arange(size, dtype=np.float64)
    centres, counts = np.unique(cells, return_counts=True)
    kernels = np.exp(-0.5 * ((grid[None, :] - centres[:, None]) / width) ** 2)
    kernels /= kernels.sum(axis=1, keepdims=True)
    return (counts @ kernels + 1.0 / size) / (len(cells) + 1)
