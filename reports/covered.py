"""How much of the objective box the trials of a run cover, at its end and over time. Only what stands on the same split
and rung is compared."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..search import pareto
from ..search.config import Limits
from ..search.corner import asked_rung, least_accuracy
from ..search.records import Rung, RunRecord, TrialRecord, TrialState
from .clock import clock
from .front import Losses, Point, breaches, candidates, limits, point, search_point, verified_any

LEAST_STEPS = 8
"""Complete trials below which a growing hypervolume says nothing about its end."""


class HypervolumeStep(NamedTuple):
    """The search's relative hypervolume from this moment on, in seconds of work since the run's start."""

    seconds: float
    hypervolume: float


def reference(run: RunRecord, *, verified: bool) -> Losses | None:
    """The hypervolume's reference point as losses, for points as ``verified`` or else as the search saw them; None when
    unknown or when it spans no volume.

    Its accuracy is the user's ``min_accuracy``; without one, it lies as far below that of the given network on the test
    split as the run's lies below it on the search split, which the network may know by heart. On that split it is where
    the search's box begins.
    """
    known: dict[str, Any] = dict(run.state.get("reference") or {})
    least, given = limits(run, verified=verified).min_accuracy, run.state.get("given")
    if least is not None:
        known["accuracy"] = least
    elif verified and given and known.get("accuracy") is not None:
        known["accuracy"] += given["test"]["accuracy"] - given["search"]["accuracy"]
    elif given and known.get("accuracy") is not None:
        known["accuracy"] = least_accuracy(run.state, Limits(), asked_rung(run.state, Rung.SHORT))
    values = [known.get(key) for key in ("accuracy", "latency_ms", "size_bytes")]
    if any(not isinstance(value, int | float) or not math.isfinite(value) for value in values):
        return None
    corner = pareto.losses(*(float(value) for value in values if value is not None))
    return corner if corner[0] > -1 and corner[1] > 0 and corner[2] > 0 else None


def all_baselines_verified(run: RunRecord) -> bool:
    """Whether every baseline that ended was verified, or was known to end beyond the limits. Where the deadline left
    some out, comparing verified trials of the search with the few verified baselines would flatter the search."""
    return not unverified_baselines(run)


def unverified_baselines(run: RunRecord) -> list[TrialRecord]:
    """Those that ended, that nobody verified, and that were not known to end beyond the limits."""
    ended = [t for t in run.trials if t.role == "baseline" and t.state is TrialState.COMPLETE]
    return [t for t in ended if t.verified is None and t.hopeless is None]


class Sides(NamedTuple):
    """Trials of the search and baselines that may be compared, and what is known of each: as ``verified``, or else
    as the search saw it."""

    search: tuple[tuple[TrialRecord, Point], ...]
    baselines: tuple[tuple[TrialRecord, Point], ...]
    verified: bool


def sides(run: RunRecord) -> Sides:
    """The verified ones when all baselines are among them, else all complete ones as the search saw them: both sides
    stand on the same split and rung."""
    verified = verified_any(run) and all_baselines_verified(run)
    known = candidates(run) if verified else [t for t in run.trials if t.state is TrialState.COMPLETE]
    pairs = [(trial, found) for trial in known if (found := (point if verified else search_point)(trial))]
    return Sides(
        tuple(pair for pair in pairs if pair[0].role != "baseline"),
        tuple(pair for pair in pairs if pair[0].role == "baseline"),
        verified,
    )


def hypervolumes(run: RunRecord) -> dict[str, float | None]:
    """Relative hypervolume of the feasible trials of the ``search`` and of the ``baselines``, by :func:`sides`."""
    both = sides(run)
    corner, allowed = reference(run, verified=both.verified), limits(run, verified=both.verified)

    def covered(pairs: Sequence[tuple[TrialRecord, Point]], tried: bool = False) -> float | None:
        if corner is None or not (pairs or tried):
            return None
        return pareto.relative_hypervolume([p.losses for _, p in pairs if not breaches(allowed, p)], corner)

    # Baselines that all were struck out cover nothing, which is not to say that there were none.
    tried = both.verified and any(t.role == "baseline" and t.state is TrialState.COMPLETE for t in run.trials)
    return {"search": covered(both.search), "baselines": covered(both.baselines, tried)}


def hypervolume_over_time(run: RunRecord) -> list[HypervolumeStep]:
    """How the search's hypervolume grew: a step for each complete trial, in the order of ``finished``.

    On the search split, since the test split is not touched before the end.
    """
    corner, night, allowed = reference(run, verified=False), clock(run), limits(run, verified=False)
    if corner is None or night is None:
        return []
    steps: list[HypervolumeStep] = []
    kept: list[Losses] = []
    value = 0.0
    for finished, trial in sorted(
        ((t.finished, t) for t in run.trials if t.finished is not None), key=lambda pair: pair[0]
    ):
        found = search_point(trial)
        if trial.state is not TrialState.COMPLETE or trial.role == "baseline" or found is None:
            continue
        # Most trials are dominated and leave the volume as it is; asking first keeps this loop quick.
        covered = any(_no_worse(other, found.losses) for other in kept)
        if not covered and not breaches(allowed, found):
            kept = [other for other in kept if not _no_worse(found.losses, other)] + [found.losses]
            value = pareto.relative_hypervolume(kept, corner)
        steps.append(HypervolumeStep(night.worked(finished), value))
    return steps


def late_gain(steps: Sequence[HypervolumeStep]) -> float | None:
    """What the last quarter of the time added, as a share of the whole; None where there is too little to say."""
    if len(steps) < LEAST_STEPS or steps[-1].hypervolume <= 0:
        return None
    begin, end = steps[0].seconds, steps[-1].seconds
    before = max((s.hypervolume for s in steps if s.seconds <= begin + 0.75 * (end - begin)), default=0.0)
    return 1 - before / steps[-1].hypervolume


def _no_worse(one: Losses, other: Losses) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def baseline_level(run: RunRecord) -> float | None:
    """The baselines' relative hypervolume on the search split, to compare with the search's over time."""
    corner, allowed = reference(run, verified=False), limits(run, verified=False)
    found = [search_point(t) for t in run.trials if t.role == "baseline" and t.state is TrialState.COMPLETE]
    points = [p.losses for p in found if p is not None and not breaches(allowed, p)]
    return pareto.relative_hypervolume(points, corner) if corner is not None and points else None
