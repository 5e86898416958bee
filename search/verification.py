"""At the end of a night: re-measure what was exported beside the uncompressed model, strike out what fails."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..evaluators.evaluate import Outcome
from ..evaluators.latency.measure import REFERENCE
from ..evaluators.onnx_graph import build_onnx, random_tensors
from ..spaces.plan import plan
from ..spaces.policy import Policy
from .config import Limits
from .disk import drop_below
from .long_length import untrained
from .long_tuning import load_outcome, outcome_file
from .records import LEAST_AGREEMENT, UNCOMPRESSED, Latency, Rung, TrialRecord, Verified
from .session import Session, latency_of, quality_of
from .store import policy_of

log = logging.getLogger("nightpress")
LEAST_VERIFIED = 3


def verify(session: Session) -> None:
    """Re-measure every exported finalist and baseline beside the uncompressed model; strike out what fails."""
    trials = {t.number: t for t in session.store.trials()}
    outcomes = {n: load_outcome(outcome_file(session, n)) for n in trials if outcome_file(session, n).is_file()}
    outcomes = _affordable(session, trials, outcomes)
    if not outcomes:
        return
    session.update(activity=f"verifying {len(outcomes)} exported models")
    latencies, reference_ms = _latencies(session, {n: trials[n] for n in outcomes})
    original = next((n for n in outcomes if trials[n].name == UNCOMPRESSED), None)
    given = session.state["given"]["test"]["accuracy"]
    whole = original is not None and not untrained(session, trials[original])
    trained = outcomes[original].exported if original is not None and whole else None
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
    if not each:  # nothing is measured here
        return dict(outcomes)
    most = max(LEAST_VERIFIED, int(session.clock.left_before("report") / each))
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
        return {n: latency_of(timings[str(n)], session.forced) for n in trials}, timings[REFERENCE].latency_ms
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
        struck_out=strike(session.config.limits, trial, outcome, latency),
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
        answers=outcome.answers,
        rate=outcome.rate,
    )


def strike(limits: Limits, trial: TrialRecord, outcome: Outcome, latency: Latency) -> str | None:
    """Why a point is taken off the front, in one sentence; None when it stands."""
    exported, size_bytes = outcome.exported, outcome.size_bytes or 0
    reference_ms = latency.reference_ms or 0.0
    if trial.name != UNCOMPRESSED and latency.latency_ms * (1 + (latency.repeat_error or 0.0)) >= reference_ms:
        spread = f" ± {latency.repeat_error:.0%} (its repeat error)" if latency.repeat_error else ""
        return f"not surely faster than the original: {latency.latency_ms:.3f} ms{spread} against {reference_ms:.3f} ms"
    if outcome.top1_agreement is not None and outcome.top1_agreement < LEAST_AGREEMENT:
        return f"the exported file agrees with torch on only {outcome.top1_agreement:.1%} of the test split"
    if limits.min_accuracy is not None and exported is not None and exported.accuracy < limits.min_accuracy:
        return f"test accuracy {exported.accuracy:.4f} is below min_accuracy {limits.min_accuracy}"
    if limits.max_latency_ms is not None and latency.latency_ms > limits.max_latency_ms:
        return f"measured {latency.latency_ms:.3f} ms, above max_latency_ms {limits.max_latency_ms}"
    if limits.max_size_bytes is not None and size_bytes > limits.max_size_bytes:
        return f"its file has {size_bytes} bytes, above max_size_bytes {limits.max_size_bytes}"
    if limits.too_much_work(trial.macs):
        return f"it has {trial.macs} multiply-accumulates, above max_macs {limits.max_macs}"
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
