"""After the search: which policies are known to meet new limits, and which untried ones are expected to be better."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ..evaluators.evaluate import Outcome
from ..evaluators.inspect import inspect
from ..evaluators.latency.profile import Profile
from ..evaluators.latency.profile_file import load_profile
from ..evaluators.latency.target import Target, target_from_dict
from ..evaluators.quality import Score
from ..evaluators.task import load_task
from ..spaces.anatomy import Anatomy
from ..spaces.errors import InputError
from ..spaces.plan import plan
from ..spaces.policy import Policy, digest, policy_to_dict
from ..spaces.space import Space
from .breeding import breed, crowded, fresh
from .config import BitsConfig, Limits, PruneConfig, RunConfig, SpaceConfig
from .corner import gap_at, least_accuracy
from .encoding import Encoder
from .experience import Experience
from .folder import TARGET
from .gain import expected_gain
from .gain import target as aim_at
from .pareto import losses, non_dominated
from .proposals import probed, sensitivity_of
from .records import Quality, RunRecord, TrialRecord, row
from .surrogate import RUNGS, Describer, Surrogate
from .verification import strike

Array = NDArray[np.float64]
MOST_SUGGESTED = 5
CANDIDATES = 48
TWO_SIDED = 1.645
"""Standard errors that hold nine of ten readings."""
POPULATION = 450
"""Of a generation. Each is looked at closely here, so there are fewer than in a proposal: a person waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a finished run knows: of accuracies, of costs, and what was tried."""

    surrogate: Surrogate
    experience: Experience
    profile: Profile
    anatomy: Anatomy

    def costs(self, rows: Array) -> Array:
        """Predicted latency in ms and file size in bytes of rows, shape (n, 2). The latency of a policy with a kind of
        kernel that was never measured is NaN: it could be anything, so it is not suggested."""
        return self.profile.costs(self.surrogate.describer.encoder.choices(rows))


def known_of(run: RunRecord) -> Known:
    """Rebuild the models of a run from its folder; nothing is trained or measured. Raises InputError when the run has
    no complete trial yet, or belongs to another model."""
    task = load_task(str(run.config["task"]), Path(run.config["base"]) if run.config.get("base") else None)
    target = _target(run)
    anatomy, _ = inspect(task, step_of=target.channel_step)
    if run.state.get("model") != anatomy.digest:
        raise InputError(
            f"{run.path}: a run of model {run.state.get('model')}, but the task's is {anatomy.digest} now."
        )
    encoder = Encoder(space_of_run(run, anatomy, target))
    experience = Experience(encoder)
    experience.take(run.trials)
    observations = experience.observations()
    if not observations:
        raise InputError(f"{run.path}: nothing can be suggested before the run's first trial is complete.")
    sensitivity = sensitivity_of(probed((run.sensitivity or {}).get("probes") or []))
    with threadpool_limits(limits=1, user_api="blas"):
        surrogate = Surrogate(Describer(encoder, sensitivity), observations)
    profile = load_profile(run.path / TARGET, anatomy, as_recorded=True)  # a report is read on other machines too
    return Known(surrogate=surrogate, experience=experience, profile=profile, anatomy=anatomy)


def _target(run: RunRecord) -> Target:
    """As it was measured; the config has what was assumed before."""
    return target_from_dict((run.target or {}).get("target") or run.config["target"])


def space_of_run(run: RunRecord, anatomy: Anatomy, target: Target) -> Space:
    """The space that a run searched, from its config as resolved."""
    from .prepare import space_of

    given: dict[str, Any] = dict(run.config["space"])
    prune, bits = given.pop("prune"), {k: tuple(v) for k, v in given.pop("bits").items()}
    rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    space = SpaceConfig(prune=PruneConfig(**prune) if prune else None, bits=BitsConfig(**bits), **rest)
    return space_of(anatomy, RunConfig(task="", base=None, out=run.path, target=target, space=space))


def suggest(run: RunRecord, limits: Limits, seed: int = 0) -> dict[str, Any]:
    """The verified points within the limits that no other dominates, and untried policies expected to add to them.

    What only the run's own limits struck out is judged by these limits instead. Accuracies of untried policies are the
    surrogate's median and 90 % interval of a reading after ``basis.rung``, of which it saw ``seen`` trials, moved by
    ``shift``: what the ``verified`` trials have more on the test split than on the search split; before there are any,
    what the uncompressed network has. Raises InputError as :func:`known_of`.
    """
    known = known_of(run)
    within = _best([t for t in run.trials if _stands(t, limits)])
    shift, verified, noise = _split_shift(run, RUNGS[known.surrogate.rung])
    with threadpool_limits(limits=1, user_api="blas"):
        found = _untried(run, known, limits, within, shift, noise, seed)
    rung = known.surrogate.rung
    return {
        "run": str(run.path),
        "limits": {"max_latency_ms": limits.max_latency_ms, "min_accuracy": limits.min_accuracy,
                   "max_size_bytes": limits.max_size_bytes, "max_macs": limits.max_macs},
        "verified": [row(t) for t in within],
        "suggested": found,
        "basis": {"rung": str(RUNGS[rung]), "seen": sum(any(q.rung == RUNGS[rung] for q in t.seen) for t in run.trials),
                  "shift": shift, "verified": verified},
    }  # fmt: skip


def _split_shift(run: RunRecord, rung: str) -> tuple[float, int, float]:
    """How much higher accuracies are on the test split than on the search split, of how many trials that is the mean
    (all that were verified, since those that were struck out for their test accuracy lost the most), and how far a
    reading of the test split may lie from the accuracy so moved, in nine of ten cases: its own noise and the mean's."""
    both = [(t.verified.quality, t.verified.search_quality) for t in run.trials if t.verified is not None]
    if both:
        apart = [test.accuracy - search.accuracy for test, search in both]
        own = float(np.mean([test.accuracy_se or 0.0 for test, _ in both]))
        mean = float(np.std(apart, ddof=1)) / math.sqrt(len(both)) if len(both) > 1 else own
        return float(np.mean(apart)), len(both), TWO_SIDED * math.hypot(own, mean)
    given = run.state.get("given") or {}
    known = {"test", "search"} <= set(given)
    if not known:
        return 0.0, 0, 0.0
    own = given["test"].get("accuracy_se") or 0.0
    easier = gap_at(run.state, rung, given["search"]["accuracy"] - given["test"]["accuracy"])
    return 0.0 - easier, 0, TWO_SIDED * own


def _stands(trial: TrialRecord, limits: Limits) -> bool:
    """Whether a trial was verified and is not struck out by these limits, in place of the run's."""
    known = trial.verified
    if known is None:
        return False
    outcome = Outcome(
        search=_score(known.search_quality), exported=_score(known.quality), size_bytes=known.size_bytes,
        top1_agreement=known.top1_agreement,
    )  # fmt: skip
    return strike(limits, trial, outcome, known.latency) is None


def _best(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that no other one dominates, fastest first."""
    points = [
        losses(known.quality.accuracy, known.latency.latency_ms, known.size_bytes)
        for trial in trials
        if (known := trial.verified)
    ]
    return [trials[i] for i in sorted(non_dominated(points), key=lambda i: points[i][1])]


def _score(known: Quality) -> Score:
    return Score(
        accuracy=known.accuracy, accuracy_se=known.accuracy_se, samples=known.samples, seconds=known.seconds
    )  # fmt: skip


def _untried(
    run: RunRecord, known: Known, limits: Limits, within: Sequence[TrialRecord], shift: float, noise: float, seed: int
) -> list[dict[str, Any]]:
    """Untried policies, the most useful first; each counts as known for those after it."""
    surrogate, encoder = known.surrogate, known.surrogate.describer.encoder
    reference, least = run.state["reference"], limits.min_accuracy
    corner = np.array([
        least_accuracy(run.state, Limits(), RUNGS[surrogate.rung]) if least is None else least - shift,
        limits.max_latency_ms or reference["latency_ms"], limits.max_size_bytes or reference["size_bytes"],
    ])  # fmt: skip
    front = [(t.verified.quality.accuracy - shift, t.verified.latency.latency_ms, float(t.verified.size_bytes))
             for t in within if t.verified]  # fmt: skip
    # Hardly anything will be more accurate than the best of all that was tried: see NightpressSampler.
    top = float(surrogate.scale.down(surrogate.mean(known.experience.rows)).max())
    aim = aim_at(np.array(front).reshape(len(front), 3), corner, top if top > corner[0] else np.inf)

    most_macs = (limits.max_macs or math.inf) / known.anatomy.macs * (1 + 1e-6)

    def worth(rows: Array) -> Array:
        costs = known.costs(rows)
        mean, spread = surrogate.predict(rows)
        median = surrogate.scale.down(mean)
        gains = expected_gain(mean, spread, surrogate.scale, costs, aim)
        heavy = np.maximum(surrogate.describer.macs(rows) / most_macs - 1, 0)
        gains[_behind(np.column_stack([median, costs]), aim.front) | (heavy > 0)] = 0
        beyond = np.maximum(costs / corner[1:] - 1, 0).sum(axis=1) + heavy
        short = np.maximum(corner[0] - median, 0)
        found = np.where(gains > 1e-12, gains, -beyond - 1e-3 * short)
        return np.where(np.isnan(costs[:, 0]), -np.inf, found)

    def spread_out(rows: Array) -> Array:
        found = worth(rows)
        order = np.argsort(-found, kind="stable")
        found[order[crowded(encoder.networks(rows)[order])]] -= 1e3
        return found

    generator = np.random.default_rng(seed)
    rows = breed(encoder, known.experience.rows, spread_out, generator, POPULATION)
    rows = rows[~crowded(encoder.networks(rows), 1)]  # a network counts once, with the fine-tune that suits it best
    candidates = list(islice(fresh(encoder, rows, known.experience.digests), CANDIDATES))
    if not candidates:
        return []
    found, policies = np.stack([row for row, _ in candidates]), [policy for _, policy in candidates]
    costs = known.costs(found)
    chosen: list[int] = []
    median, low, high = surrogate.accuracy(found)
    eligible = (median >= corner[0]) & (costs <= corner[1:]).all(axis=1)  # NaN is not
    eligible &= ~np.array([limits.too_much_work(plan(known.anatomy, policy).macs) for policy in policies])
    while len(chosen) < MOST_SUGGESTED:
        gains = np.where(eligible, worth(found), -np.inf)
        gains[chosen] = -np.inf
        best = int(np.argmax(gains))
        if gains[best] <= 1e-6:
            break
        chosen.append(best)
        aim = aim.with_point(float(median[best]), costs[best])
    low, high = median - np.hypot(median - low, noise), median + np.hypot(high - median, noise)
    median, low, high = (np.clip(values + shift, 0, 1) for values in (median, low, high))
    return [_entry(known, policies[i], float(median[i]), float(low[i]), float(high[i])) for i in chosen]


def _behind(points: Array, front: Array) -> NDArray[np.bool_]:
    """Which points (accuracy, latency in ms, bytes) are no better in anything than one of the front, shape (n,). Luck
    alone could make them better: worth a trial while a search goes on, and not what is expected of them."""
    worse = (points[:, None, :1] <= front[:, :1]) & (points[:, None, 1:] >= front[:, 1:]).all(axis=2, keepdims=True)
    return np.asarray(worse.any(axis=(1, 2)), dtype=np.bool_)


def _entry(known: Known, policy: Policy, accuracy: float, low: float, high: float) -> dict[str, Any]:
    planned = plan(known.anatomy, policy)
    latency, low_ms, high_ms = (float(value) for value in known.profile.predict([policy])[0])
    return {
        "digest": digest(policy), "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "measured": False,
        "latency_ms": latency, "low_ms": low_ms, "high_ms": high_ms, "size_bytes": known.profile.predict_size(planned),
        "macs": planned.macs, "forced": known.profile.caveat, "policy": policy_to_dict(policy),
    }  # fmt: skip
