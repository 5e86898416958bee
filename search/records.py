"""What a night leaves behind, as plain values: trials, their measurements, and a run read from its folder.

Reports and exports read these; they need neither the model nor the study.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from .pareto import losses

PICK, REJECT, NOTE = "pick", "reject", "note"
"""What a person says of a trial."""
UNCOMPRESSED = "uncompressed"
"""The name of the baseline that compresses nothing."""
LEAST_AGREEMENT = 0.97
"""Of top-1 answers, between the exported file and its simulation: below it, what was judged is not what ships."""


class TrialState(StrEnum):
    """How a trial stands or ended. Nothing else says that a value is missing."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    INFEASIBLE = "INFEASIBLE"
    FAILED = "FAILED"


NOT_CONTINUED = "paused when the search ended, and not continued"
"""Why a STOPPED trial ended that no rule had given up."""


DIVERGED = "DivergedError"
"""The kind of a failure that is the policy's own doing: its loss or its outputs were no numbers any more."""


def by_divergence(reason: str | None) -> bool:
    """Whether that is why a trial FAILED; other reasons say more of the machine or of the task."""
    return reason is not None and reason.startswith(f"{DIVERGED}:")


class Rung(StrEnum):
    """The fidelities: BN re-estimation only, part of the short fine-tune, all of it, the finalist's long one."""

    BN = "bn"
    PART = "part"
    SHORT = "short"
    LONG = "long"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Accuracy of a policy at a rung. ``accuracy_se`` is null for metrics whose error is not known."""

    rung: str
    split: str
    accuracy: float
    accuracy_se: float | None
    samples: int
    seconds: float
    losses: tuple[float, ...] = ()
    """Mean training loss over each tenth of the fine-tune."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds of one inference. Predicted: with a 90 % interval. Measured: with its repeat error
    (how far the two lowest windows lie apart, as a share) and the reference measured in between.

    ``settled`` is False where the windows never agreed, because the machine was too noisy. ``forced`` says in what
    the profile differs from this model or device, where it was used all the same."""

    latency_ms: float
    low_ms: float
    high_ms: float
    measured: bool
    repeat_error: float | None = None
    reference_ms: float | None = None
    settled: bool = True
    forced: str | None = None

    @classmethod
    def of_windows(
        cls, latency_ms: float, repeat_error: float, reference_ms: float | None, *, settled: bool,
        forced: str | None = None,
    ) -> "Latency":  # fmt: skip
        """A measurement; the ends of its interval are its own repeat error."""
        return cls(
            latency_ms=latency_ms, low_ms=latency_ms / (1 + repeat_error), high_ms=latency_ms * (1 + repeat_error),
            measured=True, repeat_error=repeat_error, reference_ms=reference_ms, settled=settled, forced=forced,
        )  # fmt: skip

    def at_pace(self, slower: float) -> "Latency":
        """The same on a device that is so many times as fast."""
        reference_ms = None if self.reference_ms is None else self.reference_ms / slower
        return replace(
            self, latency_ms=self.latency_ms / slower, low_ms=self.low_ms / slower, high_ms=self.high_ms / slower,
            reference_ms=reference_ms,
        )  # fmt: skip

    @property
    def ratio(self) -> float | None:
        """How many times faster than the uncompressed model that was measured beside it."""
        return self.reference_ms / self.latency_ms if self.reference_ms is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A finalist or baseline after the long fine-tune: exported, run in the target's runtime, re-measured.

    ``simulated`` is torch's fake-quantised accuracy; ``quality`` the exported file's, both on the test split.
    """

    quality: Quality
    simulated: Quality
    search_quality: Quality
    latency: Latency
    size_bytes: int
    top1_agreement: float
    max_abs_diff: float
    bits_used: Mapping[str, str]
    model_file: str
    struck_out: str | None = None
    rate: float = 1.0
    """The long fine-tune learned at so many times the policy's learning rate."""
    answers: str | None = None
    """Which items of the test split the exported file answered rightly, a bit each as base64: what two points err on
    together cancels in their difference. None for metrics of the task's own, very long splits and older runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """A trial as the record holds it. ``policy`` is the policy's JSON form; times are seconds since the epoch."""

    number: int
    state: TrialState
    role: str
    """``baseline``, ``seed`` or ``search``."""
    name: str | None
    digest: str
    policy: Mapping[str, Any]
    qualities: tuple[Quality, ...] = ()
    predicted: Latency | None = None
    measured: Latency | None = None
    size_bytes: int | None = None
    macs: int | None = None
    params: int | None = None
    reason: str | None = None
    reused_from: int | None = None
    started: float | None = None
    finished: float | None = None
    long: Quality | None = None
    """What its long fine-tune gave on the search split; it is verified later, if at all."""
    verified: Verified | None = None
    hopeless: str | None = None
    """Why a rule got no long fine-tune although there was time: it could not have come within the limits."""
    driver: str | None = None
    """The run that evaluates it, where several share a study."""
    looks: tuple[tuple[int, float], ...] = ()
    """Steps of the short fine-tune at which it was judged on its way, ascending, with the accuracies there."""

    @property
    def quality(self) -> Quality | None:
        """The search-split accuracy at the highest rung reached."""
        return self.qualities[-1] if self.qualities else None

    @property
    def seen(self) -> tuple[Quality, ...]:
        """All that it has shown on the search split, its long fine-tune last."""
        return (*self.qualities, *((self.long,) if self.long is not None else ()))

    @property
    def diverged(self) -> bool:
        """Whether it FAILED by its own policy."""
        return self.state is TrialState.FAILED and by_divergence(self.reason)

    @property
    def losses(self) -> tuple[float, float, float] | None:
        """(−accuracy, latency in ms, size in bytes) as it was seen; None while one of them is unknown."""
        if self.quality is None or self.latency is None or self.size_bytes is None:
            return None
        return losses(self.quality.accuracy, self.latency.latency_ms, self.size_bytes)

    def hoped(self, errors: float) -> tuple[float, float, float] | None:
        """The same with so many standard errors more accuracy, at the fast end of the latency's interval."""
        if self.quality is None or self.latency is None or self.size_bytes is None:
            return None
        accuracy = self.quality.accuracy + errors * (self.quality.accuracy_se or 0.0)
        return losses(accuracy, self.latency.low_ms, self.size_bytes)

    @property
    def struck_out(self) -> str | None:
        """Why it is taken off the front, in one sentence; None while it stands."""
        return self.verified.struck_out if self.verified is not None else self.hopeless

    @property
    def latency(self) -> Latency | None:
        """Measured where it was measured, else predicted."""
        if self.verified is not None:
            return self.verified.latency
        return self.measured or self.predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run folder, read. Every part is plain data as written by the night.

    ``state``: state, phase, started, deadline (ISO 8601 with zone), seconds{phase}, pid, host, reference
    (hypervolume reference point), ``config`` as resolved; ``target`` the calibration's public figures and
    its points; ``decisions`` dicts with time, phase, decision, reason, evidence; ``approvals`` what people
    said of trials, in order: dicts with trial, digest, action (``pick``, ``reject`` or ``note``; a pick where it
    is missing), note, who, time; ``layers`` by trial number: ``layers{name: {ms, bytes}}`` and ``other_ms``,
    as the runtime's profiler saw the exported file; ``why`` by trial number: a finalist's choices, each with kind,
    name, choice, sensitivity (nats), saved_ms, accuracy_cost and whether the saving was measured.
    """

    path: Path
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    trials: tuple[TrialRecord, ...]
    decisions: tuple[Mapping[str, Any], ...]
    target: Mapping[str, Any] | None
    sensitivity: Mapping[str, Any] | None
    approvals: tuple[Mapping[str, Any], ...] = ()
    unreadable: tuple[str, ...] = field(default=())
    layers: Mapping[str, Any] | None = None
    why: Mapping[str, Any] | None = None

    @property
    def device(self) -> Mapping[str, Any]:
        """The device that latencies hold for: of a kit the profile's, else the one that the night measured on, which a
        profile that was taken by force is not of. Older runs did not record it."""
        found, measured_on = self.target or {}, self.state.get("device")
        if found.get("remote") or (measured_on is None and not found.get("forced")):
            return found.get("device") or {}
        return measured_on or {}


def last_word(run: RunRecord, trial: TrialRecord) -> Mapping[str, Any] | None:
    """The last pick or rejection of a trial; None where nobody decided on this very policy."""
    said = [a for a in run.approvals if a.get("trial") == trial.number and a.get("digest") == trial.digest]
    decided = [a for a in said if a.get("action", PICK) in {PICK, REJECT}]
    return decided[-1] if decided else None


def row(trial: TrialRecord) -> dict[str, Any]:
    """A trial in the keys that scripts rely on; unknown is None."""
    verified = trial.verified
    quality = verified.quality if verified else trial.quality
    latency = trial.latency
    return {
        "trial": trial.number,
        "name": trial.name,
        "role": trial.role,
        "state": str(trial.state),
        "digest": trial.digest,
        "accuracy": quality.accuracy if quality else None,
        "accuracy_se": quality.accuracy_se if quality else None,
        "samples": quality.samples if quality else None,
        "split": quality.split if quality else None,
        "rung": quality.rung if quality else None,
        "latency_ms": latency.latency_ms if latency else None,
        "low_ms": latency.low_ms if latency else None,
        "high_ms": latency.high_ms if latency else None,
        "measured": latency.measured if latency else False,
        "repeat_error": latency.repeat_error if latency else None,
        "reference_ms": latency.reference_ms if latency else None,
        "ratio": latency.ratio if latency else None,
        "settled": latency.settled if latency else None,
        "forced": latency.forced if latency else None,
        "size_bytes": verified.size_bytes if verified else trial.size_bytes,
        "macs": trial.macs,
        "params": trial.params,
        "struck_out": trial.struck_out,
        "reason": trial.reason,
        "policy": dict(trial.policy),
    }
