"""After the search: re-measure the front, train a spread of it long, export, verify, strike out."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..evaluators.evaluate import Job, Outcome
from ..evaluators.latency.measure import REFERENCE, MeasurementError, measure_policies
from ..evaluators.onnx_graph import build_onnx, random_tensors
from ..evaluators.quality import Score
from ..spaces.files import write_whole
from ..spaces.plan import plan
from ..spaces.policy import Policy
from .disk import drop_below, find_room, free_disk, is_full
from .encoding import Encoder
from .experience import Experience
from .feedback import feed_back
from .pareto import dominated_by, losses, non_dominated, spread
from .records import Latency, Rung, TrialRecord, TrialState, Verified
from .rungs import judge_rungs
from .session import Session, latency_of, quality_of
from .store import policy_of
from .surrogate import Describer, Surrogate
from .worker import Failure

log = logging.getLogger("nightpress")
OUTCOME = "long.json"
MOST_REMEASURED = 30
UNCOMPRESSED = "uncompressed"
MOST_EPOCHS = 20
"""Of a long fine-tune: what it can use."""
LONG_SHARE = 0.5
"""Of what is left before the verification, once the baselines are judged, for long fine-tunes: longer ones raise the
whole front, and more trials only its choice."""
LONGER, LEAST_FINALISTS = 3, 4
"""A long fine-tune should be so many short ones; where it cannot, so few finalists must do."""
LEAST_VERIFIED = 3
LEAST_AGREEMENT = 0.97
"""Of top-1 answers, between the exported file and its simulation: below it, what was judged is not what ships."""


def complete(session: Session, role: str | None = None) -> list[TrialRecord]:
    """COMPLETE trials whose three objectives are known; each policy once."""
    return [
        t for t in session.store.trials()
        if t.state is TrialState.COMPLETE and t.quality and t.latency and t.size_bytes and t.reused_from is None
        and (role is None or (t.role == "baseline") == (role == "baseline"))
    ]  # fmt: skip


def remeasure_seconds(session: Session) -> float:
    """What it takes to measure as many policies as may lie near the front, at what one took during calibration."""
    return 0.0 if session.profile.remote else MOST_REMEASURED * session.profile.seconds_each


def remeasure_front(session: Session) -> None:
    """Measure what is on the predicted front or within its error of it, before finalists are chosen."""
    trials = [t for t in complete(session, "search") if t.measured is None and session.store.ours(t)]
    near = _near_front(session, trials)[:MOST_REMEASURED]
    if not near or session.profile.remote:
        return
    session.update(activity=f"measuring {len(near)} policies near the front")
    policies = {str(t.number): policy_of(t) for t in near}
    anatomy, target = session.prepared.anatomy, session.config.target
    try:
        timings, sizes = session.on_target(
            "search", lambda timer: measure_policies(anatomy, policies, target, timer, kernels=True)
        )
    except MeasurementError as error:
        session.trouble(f"the front is not measured, its latencies are predictions: {error}")
        session.folder.decide("search", "the front was not re-measured", str(error))
        return
    feed_back(session, policies, timings, sizes)
    for trial in near:
        session.store.remeasure(trial.number, latency_of(timings[str(trial.number)]))
    session.folder.decide(
        "search",
        f"re-measured {len(near)} policies",
        "those that the predictor's error could put on the front",
    )


def _near_front(session: Session, trials: list[TrialRecord]) -> list[TrialRecord]:
    """Trials that nothing dominates even at the low end of their own interval."""
    everything = complete(session)
    front = np.array([_losses(t) for t in everything])
    near: list[TrialRecord] = []
    for trial in trials:
        if trial.latency is None or trial.quality is None or trial.size_bytes is None:
            continue
        hoped = losses(
            trial.quality.accuracy + (trial.quality.accuracy_se or 0.0),
            trial.latency.low_ms,
            trial.size_bytes,
        )
        if not dominated_by(hoped, front):
            near.append(trial)
    return sorted(near, key=lambda t: -(t.quality.accuracy if t.quality else 0))


def choose(session: Session) -> list[TrialRecord]:
    """A spread of the search's front within the limits, most hypervolume first.

    Accuracies are those to be expected after the long fine-tune: harsh policies gain most by it, so choosing by the
    short one would leave the fast end of the front out, and of many trials the luckiest would be taken for the best.
    """
    trials = [t for t in complete(session, "search") if _hopeful(session, t)]
    if not trials:
        return []
    later = expected_accuracies(session, trials)
    points = {t.number: _losses(t, later[t.number]) for t in trials}
    front = [trials[i] for i in non_dominated(list(points.values()))]
    reference, limits = session.state["reference"], session.config.limits
    floor = max(reference["accuracy"], limits.min_accuracy or reference["accuracy"])
    corner = losses(floor, reference["latency_ms"] * 1.01, reference["size_bytes"] * 1.01)
    wanted = session.state["rungs"]["finalists"]
    chosen = [front[i] for i in spread(np.array([points[t.number] for t in front]), corner, wanted)]
    # Where nothing beats the reference point, the most accurate ones are still worth a look.
    rest = sorted((t for t in front if t not in chosen), key=lambda t: points[t.number][0])
    return (chosen + rest)[:wanted] if len(chosen) < min(wanted, 2) else chosen


def expected_accuracies(session: Session, trials: list[TrialRecord]) -> dict[int, float]:
    """Accuracy that each trial will probably have after the long fine-tune, by number."""
    surrogate = surrogate_of(session)
    rows = np.stack([surrogate.describer.encoder.row(policy_of(t)) for t in trials])
    median, _, _ = surrogate.accuracy(rows)
    return {t.number: float(value) for t, value in zip(trials, median, strict=True)}


def surrogate_of(session: Session) -> Surrogate:
    """What the night knows of accuracies, whichever sampler proposed the trials."""
    encoder = Encoder(session.prepared.space)
    known = Experience(encoder)
    known.read(session.store.study)
    with threadpool_limits(limits=1, user_api="blas"):
        return Surrogate(Describer(encoder, session.sensitivity), known.observations())


def _hopeful(session: Session, trial: TrialRecord) -> bool:
    """Within the limits, or so near that the long fine-tune may bring it there."""
    limits, quality, latency = session.config.limits, trial.quality, trial.latency
    if quality is None or latency is None or trial.size_bytes is None:
        return False
    return (
        (limits.min_accuracy is None or quality.accuracy + 2 * (quality.accuracy_se or 0) >= limits.min_accuracy)
        and (limits.max_latency_ms is None or latency.low_ms <= limits.max_latency_ms)
        and (limits.max_size_bytes is None or trial.size_bytes <= limits.max_size_bytes)
    )


def train_rules(session: Session) -> None:
    """The long fine-tune of the baselines, before the search: they get the same training as the finalists, or the
    comparison with them would be worth nothing, and the search learns from them what it will give."""
    rules = _rules(session)
    seconds = LONG_SHARE * session.clock.left_before("verify", "report")
    _size_long(session, rules, seconds)
    _train(session, rules, session.clock.left_seconds - seconds)


def train_long(session: Session) -> None:
    """The long fine-tune of the finalists, each exported. What the deadline leaves no time for is said."""
    end = session.clock.share_seconds("verify") + session.clock.share_seconds("report")
    _train(session, _rules(session), end)  # those that there was no time for before the search
    chosen = choose(session)
    if chosen:
        expected = expected_accuracies(session, chosen)
        session.folder.decide(
            "finalists", f"trials {', '.join(str(t.number) for t in chosen)}",
            "chosen greedily by the hypervolume that each adds to those before it, at the accuracy to be expected "
            "after the long fine-tune", expected={str(number): round(value, 4) for number, value in expected.items()},
            alternatives=len(complete(session, "search")),
        )  # fmt: skip
    _train(session, ours(session, chosen), end)
    judge_rungs(session)


def _rules(session: Session) -> list[TrialRecord]:
    return sorted((t for t in complete(session, "baseline") if session.store.ours(t)),
                  key=lambda t: t.name != UNCOMPRESSED)  # fmt: skip


def ours(session: Session, trials: list[TrialRecord]) -> list[TrialRecord]:
    """Those whose checkpoints lie in this run's folder; of a shared study each driver trains its own."""
    return [t for t in trials if session.store.ours(t)]


def _train(session: Session, trials: list[TrialRecord], end: float) -> None:
    """Long fine-tunes of trials that have none yet; none starts that would not be over ``end`` seconds before the
    deadline."""
    jobs = {t.number: _job(session, t) for t in trials if not outcome_file(session, t.number).is_file()}
    if not jobs:
        return
    if not find_room(session, jobs):
        session.folder.decide("finalists", f"{len(jobs)} long fine-tunes left out", "the disk is full")
        return
    one = _expected_seconds(session, trials) / len(trials) * session.workers
    done = 0
    session.update(activity=f"{done} of {len(jobs)} long fine-tunes")
    for number, result in session.run_all(jobs, end + one):
        done += 1
        session.update(activity=f"{done} of {len(jobs)} long fine-tunes")
        if is_full(result):
            free_disk(session, jobs)
        if isinstance(result, Failure):
            session.folder.decide("finalists", f"trial {number} failed", f"{result.kind}: {result.text}")
        else:
            _save(outcome_file(session, number), result)
            session.store.note_long(number, quality_of(result.search, Rung.LONG, "search"))
    session.update(activity=None)
    if done < len(jobs):
        session.folder.decide("finalists", f"{len(jobs) - done} long fine-tunes left out", "the deadline")


def _expected_seconds(session: Session, trials: list[TrialRecord]) -> float:
    """What the long fine-tunes of these trials will take on all workers together."""
    steps = session.state["rungs"]["long_steps"]
    costs = (long_costs(session, t) for t in trials)
    return sum(fixed + a_step * steps for fixed, a_step in costs) / session.workers


def _size_long(session: Session, rules: list[TrialRecord], share_seconds: float) -> None:
    """The length that lets the baselines and as many finalists as are wanted finish, from what the short fine-tunes
    took; the config wins. A finalist is taken to cost what the median baseline does."""
    rungs = session.state["rungs"]
    if session.config.finetune.long_steps is not None or rungs.get("long_sized") or not rules:
        return
    costs = np.array([long_costs(session, t) for t in rules])
    affordable, count = 0, rungs["finalists"]
    for count in range(rungs["finalists"], min(rungs["finalists"], LEAST_FINALISTS) - 1, -1):
        fixed, a_step = costs.sum(axis=0) + count * np.median(costs, axis=0)
        affordable = int((0.9 * share_seconds * session.workers - fixed) / max(a_step, 1e-9))
        if affordable >= LONGER * rungs["short_steps"]:  # else fewer are trained, but well
            break
    steps = max(rungs["short_steps"], min(MOST_EPOCHS * rungs["epoch_steps"], affordable))
    session.folder.decide(
        "search", f"long fine-tunes of {steps} steps",
        f"{len(rules)} baselines and {count} finalists, at what the short ones took, fit into the time for it",
        affordable=affordable, least=rungs["short_steps"], most=MOST_EPOCHS * rungs["epoch_steps"],
    )  # fmt: skip
    session.update(rungs={**rungs, "long_steps": steps, "finalists": count, "long_sized": True})


def long_costs(session: Session, trial: TrialRecord) -> tuple[float, float]:
    """Seconds that a long fine-tune takes however short it is, and seconds a step, from the trial's lower rungs.

    The fixed part is four times the lowest rung: both splits, the exported file on the test split, a new view of
    the data. Simulated activations make a step half as dear again.
    """
    spent = {q.rung: q.seconds for q in trial.qualities}
    low, short = spent.get(Rung.BN, 0.0), spent.get(Rung.PART, 0.0) + spent.get(Rung.SHORT, 0.0)
    a_step = max(short - low, 0.3 * short) / session.state["rungs"]["short_steps"]
    return 4 * low, a_step * (1.5 if trial.policy["bits"] else 1.0)


def _job(session: Session, trial: TrialRecord) -> Job:
    session.state["current"] = {"trial": trial.number, "rung": Rung.LONG.value}
    return Job(
        policy=policy_of(trial), rung=Rung.LONG.value, seed=session.config.seed + 1,
        steps=session.state["rungs"]["long_steps"], folder=session.folder.artifacts(trial.number),
    )  # fmt: skip


def verify(session: Session) -> None:
    """Re-measure every exported finalist and baseline beside the uncompressed model; strike out what fails."""
    trials = {t.number: t for t in session.store.trials()}
    outcomes = {n: _load(outcome_file(session, n)) for n in trials if outcome_file(session, n).is_file()}
    outcomes = _affordable(session, trials, outcomes)
    if not outcomes:
        return
    session.update(activity=f"verifying {len(outcomes)} exported models")
    latencies, reference_ms = _latencies(session, {n: trials[n] for n in outcomes})
    original = next((n for n in outcomes if trials[n].name == UNCOMPRESSED), None)
    given = session.state["given"]["test"]["accuracy"]
    trained = outcomes[original].exported if original is not None else None
    best = max(given, trained.accuracy) if trained is not None else given
    session.update(
        reference_accuracy={
            "given": given,
            "trained_longer": trained.accuracy if trained else None,
            "counted": best,
        }
    )
    for number, outcome in outcomes.items():
        verified = _verified(session, trials[number], outcome, latencies[number])
        session.store.verify(number, verified)
        if verified.struck_out:
            log.info("trial %d struck out: %s", number, verified.struck_out)
    for number in outcomes:
        drop_below(session.folder, number, Rung.LONG)  # its checkpoint is all that an export needs
    session.update(reference_ms=reference_ms)


def _affordable(
    session: Session, trials: Mapping[int, TrialRecord], outcomes: Mapping[int, Outcome]
) -> dict[int, Outcome]:
    """What there is time to measure, at what a model took during calibration: the uncompressed one, then what was
    found, then the rules. The others stay unverified, and that is said."""
    each = session.profile.seconds_each
    most = max(LEAST_VERIFIED, int(session.clock.left_before("report") / max(each, 1e-9)))
    order = sorted(outcomes, key=lambda n: (trials[n].name != UNCOMPRESSED, trials[n].role == "baseline", n))
    if len(order) > most:
        session.folder.decide(
            "verify", f"{len(order) - most} exported models left unverified",
            f"a model takes {each:.2g} s here, and the deadline leaves time for {most}",
        )  # fmt: skip
    return {number: outcomes[number] for number in order[:most]}


def _latencies(session: Session, trials: dict[int, TrialRecord]) -> tuple[dict[int, Latency], float]:
    """Of each exported model, and the uncompressed model's: measured here, or predicted for another device."""
    if not session.profile.remote:
        files = {str(n): session.folder.artifacts(n) / "model.onnx" for n in trials}
        timings = session.time_files(files, _reference_file(session), "verify")
        return {n: latency_of(timings[str(n)]) for n in trials}, timings[REFERENCE].latency_ms
    session.folder.decide(
        "verify", "latencies are predictions",
        f"the profile is of another device ({session.profile.device.cpu}); verify.py of an export measures it there",
    )  # fmt: skip
    reference_ms = session.profile.reference_ms
    known = {n: trial.measured or session.predicted(policy_of(trial)) for n, trial in trials.items()}
    return {n: replace(latency, reference_ms=reference_ms) for n, latency in known.items()}, reference_ms


def _verified(session: Session, trial: TrialRecord, outcome: Outcome, latency: Latency) -> Verified:
    if outcome.exported is None:
        raise ValueError(f"trial {trial.number}: its long fine-tune left no export")
    return verified_of(
        outcome, latency, rung=Rung.LONG,
        model_file=str(session.folder.artifacts(trial.number).relative_to(session.folder.path) / "model.onnx"),
        struck_out=_strike(session, trial, outcome, latency),
    )  # fmt: skip


def verified_of(outcome: Outcome, latency: Latency, *, rung: str, model_file: str, struck_out: str | None) -> Verified:
    """An exported model's record. Raises ValueError when the outcome has no export in it."""
    exported, simulated = outcome.exported, outcome.simulated
    if exported is None or simulated is None or outcome.top1_agreement is None or outcome.max_abs_diff is None:
        raise ValueError("the evaluation left no export")
    return Verified(
        quality=quality_of(exported, rung, "test", outcome.losses, outcome.seconds),
        simulated=quality_of(simulated, rung, "test"),
        search_quality=quality_of(outcome.search, rung, "search"),
        latency=latency,
        size_bytes=outcome.size_bytes or 0,
        top1_agreement=outcome.top1_agreement,
        max_abs_diff=outcome.max_abs_diff,
        bits_used=outcome.bits_used or {},
        model_file=model_file,
        struck_out=struck_out,
    )


def _strike(session: Session, trial: TrialRecord, outcome: Outcome, latency: Latency) -> str | None:
    """Why a point is taken off the front, in one sentence; None when it stands."""
    limits, exported, size_bytes = session.config.limits, outcome.exported, outcome.size_bytes or 0
    reference_ms = latency.reference_ms or 0.0
    if trial.name != UNCOMPRESSED and latency.latency_ms * (1 + (latency.repeat_error or 0.0)) >= reference_ms:
        return f"not faster than the original: {latency.latency_ms:.3f} ms against {reference_ms:.3f} ms"
    if outcome.top1_agreement is not None and outcome.top1_agreement < LEAST_AGREEMENT:
        return f"the exported file agrees with torch on only {outcome.top1_agreement:.1%} of the test split"
    if limits.min_accuracy is not None and exported is not None and exported.accuracy < limits.min_accuracy:
        return f"test accuracy {exported.accuracy:.4f} is below min_accuracy {limits.min_accuracy}"
    if limits.max_latency_ms is not None and latency.latency_ms > limits.max_latency_ms:
        return f"measured {latency.latency_ms:.3f} ms, above max_latency_ms {limits.max_latency_ms}"
    if limits.max_size_bytes is not None and size_bytes > limits.max_size_bytes:
        return f"its file has {size_bytes} bytes, above max_size_bytes {limits.max_size_bytes}"
    return None


def _reference_file(session: Session) -> Path:
    """The uncompressed model as a file: its trained export, or its graph with random weights before there is one."""
    original = next((t for t in session.store.trials() if t.name == UNCOMPRESSED), None)
    path = session.folder.artifacts(original.number) / "model.onnx" if original is not None else None
    if path is not None and path.is_file():
        return path
    path = session.folder.path / "artifacts" / "reference.onnx"
    path.parent.mkdir(exist_ok=True)
    planned = plan(session.prepared.anatomy, Policy(model=session.prepared.anatomy.digest))
    path.write_bytes(build_onnx(planned, random_tensors(planned), batch=None))
    return path


def _losses(trial: TrialRecord, accuracy: float | None = None) -> tuple[float, float, float]:
    if trial.quality is None or trial.latency is None or trial.size_bytes is None:
        raise ValueError(f"trial {trial.number} has an unknown objective")
    seen = trial.quality.accuracy if accuracy is None else accuracy
    return losses(seen, trial.latency.latency_ms, trial.size_bytes)


def outcome_file(session: Session, number: int) -> Path:
    return session.folder.artifacts(number) / OUTCOME


def _save(path: Path, outcome: Outcome) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(asdict(outcome), allow_nan=False)))


def _load(path: Path) -> Outcome:
    data: dict[str, Any] = json.loads(path.read_text())
    for key in ("search", "simulated", "exported"):
        data[key] = Score(**data[key]) if data[key] else None
    data["losses"] = tuple(data["losses"])
    return Outcome(**data)
