"""Calibration of a target for one model, and the profile file that keeps it. No pickle: the measured points are
stored and the predictor is fitted again on loading."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import Anatomy
from ...spaces.errors import InputError
from ...spaces.plan import Plan, plan
from ...spaces.policy import Policy, digest, policy_from_dict, policy_to_dict
from .features import features, payload_bytes, structure
from .measure import REFERENCE, Timer, Timing, measure_policies
from .predictor import Predictor, fit
from .target import Fingerprint, Target, fingerprint, target_from_dict, target_to_dict

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy that was measured on the target. ``halves_ms`` are two independent measurements of it."""

    policy: Policy
    latency_ms: float
    halves_ms: tuple[float, float]
    repeat_error: float
    size_bytes: int


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
    overheads: NDArray[np.float64]
    """Bytes for each count of :func:`~nightpress.evaluators.latency.features.structure`."""

    def predict(self, planned: Plan) -> tuple[float, float, float]:
        """Latency of a plan and the ends of its 90 % interval, in ms."""
        latency, low, high = self.predictor.predict(features(planned))[0]
        return float(latency), float(low), float(high)

    def predict_size(self, planned: Plan) -> int:
        """Bytes of the exported file: the payload exactly, nodes and names by a fit to the files of the calibration."""
        return payload_bytes(planned) + round(float(structure(planned) @ self.overheads))

    def truth_repeat(self) -> dict[str, float]:
        """How well two independent measurements of the same policy agree: the error no predictor can beat."""
        first, second = (np.array([p.halves_ms[i] for p in self.points]) for i in (0, 1))
        errors = np.abs(first / second - 1)
        return {"mape": float(errors.mean()), "within_10": float((errors <= 0.10).mean())}


def calibrate(
    anatomy: Anatomy, policies: Sequence[Policy], target: Target, *, timer: Timer | None = None,
    progress: Callable[[str], None] | None = None,
) -> Profile:  # fmt: skip
    """Measure policies of the model's own space and fit the predictor. Raises MeasurementError, ValueError."""
    start = time.perf_counter()
    unique = {digest(policy): policy for policy in policies}
    if progress is not None:
        progress(f"measuring {len(unique)} policies")
    timings, sizes = measure_policies(anatomy, unique, target, timer)
    points = tuple(_point(unique[key], timings[key], sizes[key]) for key in unique)
    return Profile(
        model=anatomy.digest,
        target=target,
        device=timer.fingerprint() if timer is not None else fingerprint(target),
        reference_ms=timings[REFERENCE].latency_ms,
        reference_repeat_error=timings[REFERENCE].repeat_error,
        points=points,
        predictor=_fitted(anatomy, points),
        overheads=_overheads(anatomy, points),
        seconds=time.perf_counter() - start,
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """The profile file's content."""
    return {
        "version": VERSION,
        "model": profile.model,
        "target": target_to_dict(profile.target),
        "device": {**asdict(profile.device), "flags": list(profile.device.flags)},
        "date": profile.date,
        "seconds": profile.seconds,
        "reference_ms": profile.reference_ms,
        "reference_repeat_error": profile.reference_repeat_error,
        "design": profile.predictor.design,
        "designs": profile.predictor.candidates,
        "heldout": asdict(profile.predictor.heldout),
        "truth_repeat": profile.truth_repeat(),
        "points": [
            {
                "policy": policy_to_dict(p.policy), "digest": digest(p.policy), "measured_ms": p.latency_ms,
                "halves_ms": list(p.halves_ms), "repeat_error": p.repeat_error, "size_bytes": p.size_bytes,
                "predicted_ms": float(held), "held_out": True,
                "low_ms": float(held * np.exp(-profile.predictor.log_margin)),
                "high_ms": float(held * np.exp(profile.predictor.log_margin)),
            }
            for p, held in zip(profile.points, profile.predictor.out_of_fold, strict=True)
        ],
    }  # fmt: skip


def load_profile(path: Path, anatomy: Anatomy, here: Fingerprint | None = None) -> Profile:
    """Read a profile and fit its predictor again. ``here`` is the device it must hold for, by default this one.

    Raises InputError when the file is not a profile, or is one of another model, device or runtime.
    """
    try:
        data: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: a profile must be a readable JSON file, but: {error}.") from None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise InputError(f"{path}: a profile of version {VERSION} was expected; make one with nightpress calibrate.")
    try:
        return _profile_from_dict(data, path, anatomy, here)
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise InputError(f"{path}: the profile is damaged: {type(error).__name__} {error}.") from None


def _profile_from_dict(
    data: Mapping[str, Any], path: Path, anatomy: Anatomy, here: Fingerprint | None
) -> Profile:
    if data["model"] != anatomy.digest:
        raise InputError(
            f"{path}: a profile belongs to one model; this one is for {data['model']}, the task's model is "
            f"{anatomy.digest}."
        )
    target = target_from_dict(data["target"])
    recorded: dict[str, Any] = {**data["device"], "flags": tuple(data["device"]["flags"])}
    device = Fingerprint(**recorded)
    here = here or fingerprint(target)
    for field in fields(Fingerprint):
        then, now = getattr(device, field.name), getattr(here, field.name)
        if then != now:
            raise InputError(
                f"{path}: a profile holds for one device; {field.name} was {then!r} when it was made, here it is "
                f"{now!r}: calibrate again."
            )
    points = tuple(
        Point(
            policy=policy_from_dict(p["policy"], str(path)), latency_ms=float(p["measured_ms"]),
            halves_ms=(float(p["halves_ms"][0]), float(p["halves_ms"][1])),
            repeat_error=float(p["repeat_error"]), size_bytes=int(p["size_bytes"]),
        )
        for p in data["points"]
    )  # fmt: skip
    if not all(np.isfinite(p.latency_ms) and p.latency_ms > 0 for p in points):
        raise InputError(f"{path}: measured_ms must be positive numbers in every point.")
    return Profile(
        model=data["model"], target=target, device=device, reference_ms=float(data["reference_ms"]),
        reference_repeat_error=float(data["reference_repeat_error"]), points=points, seconds=float(data["seconds"]),
        date=str(data["date"]), predictor=_fitted(anatomy, points), overheads=_overheads(anatomy, points),
    )  # fmt: skip


def _point(policy: Policy, timing: Timing, size_bytes: int) -> Point:
    return Point(
        policy=policy, latency_ms=timing.latency_ms, halves_ms=timing.halves_ms(),
        repeat_error=timing.repeat_error, size_bytes=size_bytes,
    )  # fmt: skip


def _fitted(anatomy: Anatomy, points: Sequence[Point]) -> Predictor:
    terms = np.stack([features(plan(anatomy, p.policy)) for p in points])
    return fit(terms, np.array([p.latency_ms for p in points]))


def _overheads(anatomy: Anatomy, points: Sequence[Point]) -> NDArray[np.float64]:
    """Least squares on what the files hold beside their payload."""
    plans = [plan(anatomy, p.policy) for p in points]
    rest = np.array([p.size_bytes - payload_bytes(planned) for p, planned in zip(points, plans, strict=True)])
    counts = np.stack([structure(planned) for planned in plans])
    return np.linalg.lstsq(counts, rest, rcond=None)[0].astype(np.float64)
