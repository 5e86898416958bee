"""Which trials make the front, and which of them are picked.

Plain functions of a run's records. Accuracy, latency and size that are not known keep a trial out; no
placeholder ever stands in for them.
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from ..search import pareto
from ..search.config import Limits
from ..search.corner import asked_rung, limits_at
from ..search.records import LEAST_AGREEMENT, Latency, Quality, Rung, RunRecord, TrialRecord, TrialState
from .text import digits, million_macs, milliseconds, percent, size

PICK_NAMES = {"best": "best", "knee": "knee", "accurate": "most accurate"}

Losses = tuple[float, float, float]


class Point(NamedTuple):
    """The three objectives of one trial, all known and finite, and its multiply-accumulates where they are known."""

    accuracy: float
    latency_ms: float
    size_bytes: float
    macs: int | None = None

    @property
    def losses(self) -> Losses:
        return pareto.losses(self.accuracy, self.latency_ms, self.size_bytes)


def limits(run: RunRecord, *, verified: bool = True) -> Limits:
    """The limits of the run's config; for points that are not ``verified`` as the search asks them of the search split,
    which is easier by what the uncompressed network's fine-tune has told."""
    given: dict[str, Any] = dict(run.config.get("limits") or {})
    found = Limits(**{field.name: given.get(field.name) for field in fields(Limits)})
    return found if verified else limits_at(run.state, found, asked_rung(run.state, Rung.SHORT))


def point(trial: TrialRecord) -> Point | None:
    """What is best known of a trial: verified on the test split, else as the search saw it."""
    verified = trial.verified
    if verified is None:
        return search_point(trial)
    return _point(verified.quality, verified.latency, verified.size_bytes, trial.macs)


def search_point(trial: TrialRecord) -> Point | None:
    """What the search knew of a trial: search split, highest rung, latency before verification."""
    return _point(trial.quality, trial.measured or trial.predicted, trial.size_bytes, trial.macs)


def _point(quality: Quality | None, latency: Latency | None, size_bytes: int | None, macs: int | None) -> Point | None:
    if quality is None or latency is None or size_bytes is None:
        return None
    found = Point(quality.accuracy, latency.latency_ms, size_bytes, macs)
    return found if all(map(math.isfinite, found.losses)) else None


def breaches(allowed: Limits, found: Point) -> list[str]:
    """A phrase for each limit that a point breaks, and by how much."""
    said: list[str] = []
    if allowed.max_latency_ms is not None and found.latency_ms > allowed.max_latency_ms:
        over = _over(found.latency_ms, allowed.max_latency_ms)
        said.append(f"{milliseconds(found.latency_ms)} is over {milliseconds(allowed.max_latency_ms)}{over}")
    if allowed.min_accuracy is not None and found.accuracy < allowed.min_accuracy:
        short = f" by {digits(100 * (allowed.min_accuracy - found.accuracy), 2)} points"
        said.append(f"{percent(found.accuracy)} is under {percent(allowed.min_accuracy)}{short}")
    if allowed.max_size_bytes is not None and found.size_bytes > allowed.max_size_bytes:
        over = _over(found.size_bytes, allowed.max_size_bytes)
        said.append(f"{size(found.size_bytes)} is over {size(allowed.max_size_bytes)}{over}")
    if allowed.max_macs is not None and found.macs is not None and found.macs > allowed.max_macs:
        over = _over(found.macs, allowed.max_macs)
        said.append(f"{million_macs(found.macs)} are over {million_macs(allowed.max_macs)}{over}")
    return said


def _over(value: float, limit: float) -> str:
    return f" by {digits(100 * (value / limit - 1), 2)} %" if limit else ""


def verified_any(run: RunRecord) -> bool:
    """Whether some trial was exported and re-measured, so that nothing else is comparable any more."""
    return any(trial.verified is not None for trial in run.trials)


def candidates(run: RunRecord) -> list[TrialRecord]:
    """Trials that may stand on the front: the verified that are not struck out, baselines among them.

    As long as nothing is verified: the complete ones. Test and search split are never mixed.
    """
    if verified_any(run):
        chosen = [t for t in run.trials if t.verified is not None and t.struck_out is None]
    else:
        chosen = [t for t in run.trials if t.state is TrialState.COMPLETE and t.struck_out is None]
    return [trial for trial in chosen if point(trial) is not None]


def feasible(run: RunRecord, trial: TrialRecord) -> bool:
    """Whether everything is known of a trial and nothing of it is beyond the limits."""
    found = point(trial)
    return found is not None and not breaches(limits(run, verified=trial.verified is not None), found)


def front(run: RunRecord) -> list[TrialRecord]:
    """The non-dominated feasible candidates, fastest first. Search and baselines compete on it."""
    pairs = [(trial, found) for trial in candidates(run) if (found := point(trial)) and feasible(run, trial)]
    # Of equal points the first stays; sorting by number makes that independent of the records' order.
    pairs.sort(key=lambda pair: pair[0].number)
    kept = [pairs[i] for i in pareto.non_dominated([found.losses for _, found in pairs])]
    kept.sort(key=lambda pair: (pair[1].latency_ms, -pair[1].accuracy, pair[1].size_bytes, pair[0].number))
    return [trial for trial, _ in kept]


def most_interesting(run: RunRecord, most: int) -> list[TrialRecord]:
    """At most so many trials, in order of number, for a picture that more would only blacken: the front,
    then what was verified, then the latest of the complete, of the stopped and of the rest."""
    if len(run.trials) <= most:
        return list(run.trials)
    on_front = {trial.number for trial in front(run)}

    def interest(trial: TrialRecord) -> tuple[int, int]:
        if trial.number in on_front:
            return 0, trial.number
        if trial.verified is not None or trial.role == "baseline":
            return 1, trial.number
        return {TrialState.COMPLETE: 2, TrialState.STOPPED: 3}.get(trial.state, 4), -trial.number

    return sorted(sorted(run.trials, key=interest)[:most], key=lambda trial: trial.number)


def uncompressed(run: RunRecord) -> TrialRecord | None:
    """The baseline that compresses nothing: the more accurate one, where the given weights and the same
    after extra training both stand as baselines. Of the candidates alone: same split, same rung."""
    found = [
        (values.accuracy, -trial.number, trial)
        for trial in candidates(run)
        if trial.role == "baseline" and compresses_nothing(trial) and (values := point(trial))
    ]
    return max(found)[2] if found else None


def origin_of(run: RunRecord, trial: TrialRecord) -> TrialRecord | None:
    """What a trial is compared with: :func:`uncompressed`, or, where the limits strike that out, as any do that ask for
    a faster or smaller network, what was verified of it, for a trial that was verified as well."""
    return uncompressed(run) or (beyond_limits(run) if trial.verified else None)


def original_accuracy(run: RunRecord, trial: TrialRecord | None = None) -> float | None:
    """What a drop is counted against: of verified points the better of the given weights and of the same after the
    extra training, as the verification found them; or else the accuracy of :func:`origin_of` the trial, or of the
    run's. None while neither is known."""
    known = (run.state.get("reference_accuracy") or {}).get("counted")
    if isinstance(known, int | float) and (verified_any(run) if trial is None else trial.verified is not None):
        return float(known)
    if trial is not None:
        origin = origin_of(run, trial)
    else:
        origin = uncompressed(run) or (beyond_limits(run) if verified_any(run) else None)
    found = point(origin) if origin else None
    return found.accuracy if found is not None else None


def beyond_limits(run: RunRecord) -> TrialRecord | None:
    """The uncompressed network as it was verified, where only the limits struck it out."""
    found = (t for t in run.trials if t.role == "baseline" and compresses_nothing(t) and t.struck_out and t.verified)
    return next((t for t in found if t.verified and t.verified.top1_agreement >= LEAST_AGREEMENT), None)


def only_beyond(run: RunRecord) -> list[TrialRecord]:
    """What was verified and struck out for the limits alone: its file agrees with torch, and what is compressed is
    surely faster than the original."""

    def sound(trial: TrialRecord) -> bool:
        known, found = trial.verified, point(trial)
        if known is None or known.struck_out is None or known.top1_agreement < LEAST_AGREEMENT or found is None:
            return False
        slowest = known.latency.latency_ms * (1 + (known.latency.repeat_error or 0.0))
        faster = compresses_nothing(trial) or slowest < (known.latency.reference_ms or 0.0)
        return faster and bool(breaches(limits(run), found))

    return [trial for trial in run.trials if sound(trial)]


def compresses_nothing(trial: TrialRecord) -> bool:
    """Whether the trial's policy keeps every channel, bit and block."""
    policy = trial.policy
    ratios: Iterable[float] = (policy.get("prune") or {}).values()
    return not any(ratios) and not any(policy.get(key) for key in ("bits", "removed_blocks", "sparsity"))


class Rule(NamedTuple):
    """What a default choice must keep, and the same in words."""

    min_accuracy: float
    words: str


def rule(run: RunRecord) -> Rule:
    """The accuracy that ``best`` must keep, besides the other limits."""
    floor, asked = limits(run, verified=verified_any(run)).min_accuracy, limits(run).min_accuracy
    if floor is not None:
        where = "" if floor == asked else " on the search split"
        return Rule(floor, f"within the limits (accuracy of at least {percent(floor)}{where})")
    original = original_accuracy(run)
    if original is not None:
        return Rule(original - pareto.MAX_DROP, "within 1.0 point of the uncompressed model's accuracy")
    accuracies = [found.accuracy for trial in front(run) if (found := point(trial))]
    best = max(accuracies, default=0.0)
    return Rule(best - pareto.MAX_DROP, "within 1.0 point of the most accurate trial")


def picks(run: RunRecord) -> dict[str, TrialRecord]:
    """The points of the front that have a name.

    ``best``, the default choice for export, is the fastest that keeps :func:`rule`, and ``fastest`` another name of
    it; ``knee`` is the nearest to the ideal point; ``accurate`` the most accurate. Empty without a front; without a
    point that keeps the rule, ``best`` and ``fastest`` are left out.
    """
    shown = [(trial, found) for trial in front(run) if (found := point(trial))]
    nearest = pareto.knee([found.losses for _, found in shown])
    if nearest is None:
        return {}
    chosen: dict[str, TrialRecord] = {}
    # A drop of exactly 1.0 point is within the rule, although 0.5006 - 0.01 > 0.4906 in binary.
    floor = rule(run).min_accuracy - 1e-9
    kept = next((trial for trial, found in shown if found.accuracy >= floor), None)
    if kept is not None:
        chosen |= {"best": kept, "fastest": kept}
    chosen["knee"] = shown[nearest][0]
    chosen["accurate"] = max(shown, key=lambda pair: (pair[1].accuracy, -pair[1].latency_ms))[0]
    return chosen


def picked(run: RunRecord) -> list[tuple[TrialRecord, list[str]]]:
    """Each picked trial once, with all its labels; the default choice first."""
    labels: dict[int, list[str]] = {}
    chosen = picks(run)
    for name, label in PICK_NAMES.items():
        if name in chosen:
            labels.setdefault(chosen[name].number, []).append(label)
    by_number = {trial.number: trial for trial in chosen.values()}
    return [(by_number[number], names) for number, names in labels.items()]


def speedup(run: RunRecord, trial: TrialRecord) -> float | None:
    """How many times faster than the uncompressed model: measured beside it where that was done, else
    against the uncompressed baseline's latency. It is as fast as itself: what its own two measurements differ by is
    noise."""
    if trial.latency is None:
        return None
    if origin_of(run, trial) is trial:
        return 1.0
    if trial.latency.ratio is not None:
        return trial.latency.ratio
    origin = origin_of(run, trial)
    return origin.latency.latency_ms / trial.latency.latency_ms if origin and origin.latency else None


def shrinkage(run: RunRecord, trial: TrialRecord) -> float | None:
    """How many times smaller than the uncompressed model's exported file."""
    origin, found = origin_of(run, trial), point(trial)
    origin_point = point(origin) if origin else None
    return origin_point.size_bytes / found.size_bytes if origin_point and found and found.size_bytes else None
