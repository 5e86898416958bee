"""What the calibration of a target for one model has found: the measured points, and the predictor that they make."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import Anatomy
from ...spaces.plan import Plan, plan
from ...spaces.plans import Choices, choices_of, chunks
from ...spaces.policy import Policy, digest, network_digest
from .measure import REFERENCE, Timing
from .nodes import Matcher, NodeTimes, Timed
from .predictor import LEAST_DRIFT, Measured, Predictor, fit
from .sizes import batch_bytes, payload_bytes, structure
from .target import (
    Fingerprint,
    Target,
    fingerprint,
)
from .units import Worker

CHUNK = 10_000
"""Policies predicted at once, to bound memory."""
LEAST_INFERENCES = 30
"""Of a whole measurement with times of nodes: four windows of four runs, three passes of five."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy that was measured on the target. ``halves_ms`` are two independent measurements of it. Points of one
    ``session`` were drawn at random and timed in turn; it is empty where they were chosen."""

    policy: Policy
    latency_ms: float
    halves_ms: tuple[float, float]
    repeat_error: float
    size_bytes: int
    session: str = ""
    timed: Timed | None = None
    """The runtime's times of its nodes, where they were taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A target that was calibrated for one model (``model``: its digest)."""

    model: str
    target: Target
    device: Fingerprint
    reference_ms: float
    reference_repeat_error: float
    points: tuple[Point, ...]
    seconds: float
    date: str
    predictor: Predictor
    worker: Worker
    overheads: NDArray[np.float64]
    """Bytes for each count of :func:`~nightpress.evaluators.latency.sizes.structure`."""
    remote: bool = False
    """Whether a kit was measured on another device: nothing here can measure what it predicts."""
    forced: tuple[str, ...] = ()
    """In what it differs from the model and device that it was loaded for, where that was overridden."""

    @property
    def caveat(self) -> str | None:
        """What every number from it must carry, where something was overridden."""
        return "; ".join(self.forced) or None

    @property
    def seconds_each(self) -> float:
        """Seconds of this machine that measuring a policy takes, as it did during the calibration, and at least the
        inferences of a measurement that no time limit cuts short; 0 for a kit's profile, whose device nothing here can
        measure."""
        if self.remote or not self.points:
            return 0.0
        inference_ms = float(np.median([point.latency_ms for point in self.points]))
        return max(self.seconds / len(self.points), LEAST_INFERENCES * inference_ms / 1000)

    def predict(self, policies: Sequence[Policy] | Choices) -> NDArray[np.float64]:
        """Latency of each policy and the ends of its 90 % interval in ms, shape (n, 3).

        Raises UnseenKernelError for a policy with a kind of kernel that no measured policy ran.
        """
        choices = policies if isinstance(policies, Choices) else choices_of(self.worker.anatomy, policies)
        found = [self.predictor.predict(part) for part in chunks(choices, CHUNK)]
        return np.concatenate(found) if found else np.empty((0, 3))

    def costs(self, choices: Choices) -> NDArray[np.float64]:
        """Latency in ms and file size in bytes of each policy, shape (n, 2), quick enough for tens of thousands; the
        latency is NaN for a policy with a kind of kernel that no measured policy ran."""
        found = [
            np.column_stack([self.predictor.latencies(part), batch_bytes(self.worker, part, self.overheads)])
            for part in chunks(choices, CHUNK)
        ]
        return np.concatenate(found) if found else np.empty((0, 2))

    def predict_size(self, planned: Plan) -> int:
        """Bytes of the exported file: the payload exactly, nodes and names by a fit to the files of the calibration."""
        return payload_bytes(planned) + round(float(structure(planned) @ self.overheads))

    def with_points(self, points: Sequence[Point]) -> "Profile":
        """Fitted again with more measurements; a policy that was measured before takes its new ones. ``seconds`` are
        what calibrating with all of them would take."""
        known = {digest(p.policy): p for p in self.points}
        for point in points:
            before = known.get(digest(point.policy))
            kept = point.timed if point.timed is not None or before is None else before.timed
            known[digest(point.policy)] = replace(point, timed=kept)
        every = tuple(known.values())
        seconds = self.seconds * len(every) / max(1, len(self.points))
        return replace(self, points=every, predictor=fitted(self.worker, every), seconds=seconds)

    def truth_repeat(self) -> dict[str, float]:
        """How well two independent measurements of the same policy agree: the error no predictor can beat."""
        first, second = (np.array([p.halves_ms[i] for p in self.points]) for i in (0, 1))
        errors = np.abs(first / second - 1)
        return {"mape": float(errors.mean()), "within_10": float((errors <= 0.10).mean())}

    @property
    def looks_apart(self) -> float:
        """By how much two looks at the same policies, one after the other, differ as a whole, as a share."""
        return _looks_apart(self.points)

    def noise_warnings(self) -> list[str]:
        """What a person should know of the device, from two looks at the same policies."""
        if self.looks_apart <= LEAST_DRIFT:
            return []
        text = (
            f"two looks at the same policies differ by {self.looks_apart:.0%} as a whole: this device "
            "changes its speed by itself (heat, power saving, other machines on the same hardware), so the intervals "
            "are wider; trust ratios to the uncompressed model, or calibrate in a quieter hour"
        )
        return [text]


def _looks_apart(points: Sequence[Point]) -> float:
    """What was measured later, one policy at a time, was not looked at twice: its halves are windows of one session."""
    points = [p for p in points if p.session] or points
    first, second = np.log([p.halves_ms for p in points]).T
    return float(np.expm1(abs(np.median(first - second))))


def profile_of(
    anatomy: Anatomy, target: Target, policies: Mapping[str, Policy], timings: Mapping[str, Timing],
    sizes: Mapping[str, int], *, seconds: Callable[[], float], device: Fingerprint | None = None,
) -> Profile:  # fmt: skip
    """A profile of policies that were measured, by the keys of their timings. Raises ValueError."""
    matcher, worker = Matcher(anatomy), Worker(anatomy, target.runtime)
    points = tuple(point_of(policies[key], timings[key], sizes[key], matcher) for key in policies)
    reference = timings[REFERENCE]
    predictor, overheads = fitted(worker, points), overheads_of(anatomy, points)
    return Profile(
        model=anatomy.digest,
        target=target,
        device=device or fingerprint(target),
        reference_ms=_median_reference(timings.values()) or reference.latency_ms,
        reference_repeat_error=reference.repeat_error,
        points=points,
        predictor=predictor,
        worker=worker,
        overheads=overheads,
        seconds=seconds(),
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _median_reference(timings: Iterable[Timing]) -> float | None:
    """The uncompressed model's latency in ms over the sessions that the models were timed in."""
    found = {timing.session: timing.reference_ms for timing in timings if timing.reference_ms is not None}
    return float(np.median(list(found.values()))) if found else None


def drift(profile: Profile, reference: Timing) -> float:
    """By which share the uncompressed model is slower than when the profile was made."""
    return reference.latency_ms / profile.reference_ms - 1


def point_of(policy: Policy, timing: Timing, size_bytes: int, matcher: Matcher) -> Point:
    """What was measured."""
    nodes: NodeTimes = {name: (kernel.op_type, kernel.ms) for name, kernel in timing.kernels.items()}
    return Point(
        policy=policy, latency_ms=timing.latency_ms, halves_ms=timing.halves_ms(), repeat_error=timing.repeat_error,
        size_bytes=size_bytes, session=timing.session, timed=matcher.match(nodes) if nodes else None,
    )  # fmt: skip


def fitted(worker: Worker, points: Sequence[Point]) -> Predictor:
    """The predictor that measured policies make. Raises ValueError where they are too few."""
    known: dict[str, int] = {}
    measured = Measured(
        worker=worker,
        work=worker.work(choices_of(worker.anatomy, [p.policy for p in points])),
        latency_ms=np.array([p.latency_ms for p in points]),
        timed=[p.timed for p in points],
        sessions=_sessions(points),
        looks_apart=_looks_apart(points),
        networks=np.array([known.setdefault(network_digest(p.policy), len(known)) for p in points], np.intp),
    )
    return fit(measured)


def _sessions(points: Sequence[Point]) -> NDArray[np.int64]:
    """Numbers of the sessions that points were timed in, -1 where they have none."""
    numbers = {"": -1}
    return np.array([numbers.setdefault(point.session, len(numbers) - 1) for point in points], np.int64)


def overheads_of(anatomy: Anatomy, points: Sequence[Point]) -> NDArray[np.float64]:
    """Least squares on what the files hold beside their payload."""
    plans = [plan(anatomy, p.policy) for p in points]
    rest = np.array([p.size_bytes - payload_bytes(planned) for p, planned in zip(points, plans, strict=True)])
    counts = np.stack([structure(planned) for planned in plans])
    return np.linalg.lstsq(counts, rest, rcond=None)[0].astype(np.float64)
