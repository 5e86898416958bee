"""Calibration of a target for one model, and the profile file that keeps it. No pickle: the measured points are
stored and the predictor is fitted again on loading."""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import WEIGHTED, Anatomy
from ...spaces.errors import InputError
from ...spaces.plan import Plan, plan
from ...spaces.plans import Choices, choices_of, chunks
from ...spaces.policy import Policy, digest, network_digest, policy_from_dict, policy_to_dict
from .measure import REFERENCE, Timing
from .nodes import Matcher, NodeTimes, Timed, timed_from_dict, timed_to_dict
from .predictor import LEAST_DRIFT, Measured, Predictor, fit
from .recorded import are_texts, check_numbers, first_difference, operations_of
from .sizes import batch_bytes, payload_bytes, structure
from .target import (
    Fingerprint,
    Target,
    fingerprint,
    fingerprint_from_dict,
    fingerprint_to_dict,
    target_from_dict,
    target_to_dict,
)
from .units import Worker

VERSION = 2
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
        return replace(self, points=every, predictor=_fitted(self.worker, every), seconds=seconds)

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
    predictor, overheads = _fitted(worker, points), _overheads(anatomy, points)
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


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """The profile file's content."""
    return {
        "version": VERSION,
        "model": profile.model,
        "target": target_to_dict(profile.target),
        "device": fingerprint_to_dict(profile.device),
        "date": profile.date,
        "seconds": profile.seconds,
        "remote": profile.remote,
        "forced": list(profile.forced),
        "reference_ms": profile.reference_ms,
        "reference_repeat_error": profile.reference_repeat_error,
        "design": profile.predictor.design,
        "designs": profile.predictor.candidates,
        "heldout": asdict(profile.predictor.heldout),
        "truth_repeat": profile.truth_repeat(),
        "looks_apart": profile.looks_apart,
        "operations": operations_of(profile.worker.anatomy),
        "points": [
            {
                "policy": policy_to_dict(p.policy), "digest": digest(p.policy), "measured_ms": p.latency_ms,
                "halves_ms": list(p.halves_ms), "repeat_error": p.repeat_error, "size_bytes": p.size_bytes,
                "session": p.session, "predicted_ms": float(held), "held_out": True,
                "nodes_us": None if p.timed is None else timed_to_dict(p.timed),
                "low_ms": float(held * np.exp(-profile.predictor.log_margin)),
                "high_ms": float(held * np.exp(profile.predictor.log_margin)),
            }
            for p, held in zip(profile.points, profile.predictor.out_of_fold, strict=True)
        ],
    }  # fmt: skip


def load_profile(
    path: Path, anatomy: Anatomy, *, here: Fingerprint | None = None, force: bool = False, as_recorded: bool = False
) -> Profile:
    """Read a profile and fit its predictor again. ``here`` is the device it must hold for, by default this one; with
    ``as_recorded`` the one it was made on, for times there that are only read here.

    Raises InputError when the file is not a profile, or is one of another model, device or runtime; with ``force``
    it is taken all the same and the differences are kept in it, unless it is one of other layers. A profile of a kit
    is meant to be used elsewhere.
    """
    data = _read(path)
    with _damage_told(path):
        if as_recorded or data.get("remote"):
            here = fingerprint_from_dict(data["device"], str(path))
        return _profile_from_dict(data, path, anatomy, here, force or as_recorded)


def measured_elsewhere(path: Path, *, force: bool) -> str | None:
    """In what this machine differs from the device of a profile, where its target is to be measured here; None where
    it does not. Raises InputError when it does, unless ``force``, and when the file is not a profile."""
    data = _read(path)
    with _damage_told(path):
        target, device = target_from_dict(data["target"], str(path)), fingerprint_from_dict(data["device"], str(path))
        kit = f"a profile holds for one device; this one was made of a kit's results, on {device.cpu!r}"
        found = (*((kit,) if data.get("remote") else ()), *differences_of("", device, "", fingerprint(target)))
        _refuse(found, path, force)
        return "; ".join(found) or None


def _read(path: Path) -> dict[str, Any]:
    try:
        data: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: a profile must be a readable JSON file, but: {error}.") from None
    if not isinstance(data, dict) or cast("dict[str, Any]", data).get("version") != VERSION:
        raise InputError(f"{path}: a profile of version {VERSION} was expected; make one with nightpress calibrate.")
    return cast("dict[str, Any]", data)


@contextlib.contextmanager
def _damage_told(path: Path) -> Generator[None]:
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(f"{path}: the profile is damaged: {type(error).__name__} {error}.") from None


def _refuse(differences: Sequence[str], path: Path, force: bool) -> None:
    if differences and not force:
        raise InputError(f"{path}: {differences[0]}: calibrate again, or use it all the same with --force.")


def _profile_from_dict(
    data: Mapping[str, Any], path: Path, anatomy: Anatomy, here: Fingerprint | None, force: bool
) -> Profile:
    target = target_from_dict(data["target"], str(path))
    device = fingerprint_from_dict(data["device"], str(path))
    if not are_texts(data.get("forced", ())):
        raise InputError(f"{path}: forced must be a list of texts, but got {data['forced']!r}.")
    found = [
        *data.get("forced", ()),
        *differences_of(data["model"], device, anatomy.digest, here or fingerprint(target)),
    ]
    policies = [replace(policy_from_dict(p["policy"], str(path)), model=anatomy.digest) for p in data["points"]]
    other = _other_layers(data, policies, anatomy)
    if other is not None:
        raise InputError(f"{path}: its layers are not those of the task's model ({other}): calibrate again.")
    differences = tuple(dict.fromkeys(found))
    _refuse(differences, path, force)
    points = tuple(
        Point(
            policy=policy, latency_ms=float(p["measured_ms"]),
            halves_ms=(float(p["halves_ms"][0]), float(p["halves_ms"][1])),
            repeat_error=float(p["repeat_error"]), size_bytes=int(p["size_bytes"]), session=str(p.get("session", "")),
            timed=None if p["nodes_us"] is None else timed_from_dict(p["nodes_us"], len(anatomy.ops)),
        )
        for p, policy in zip(data["points"], policies, strict=True)
    )  # fmt: skip
    reference_ms, repeat_error, seconds = (
        float(data[name]) for name in ("reference_ms", "reference_repeat_error", "seconds")
    )
    check_numbers("measured_ms", (p.latency_ms for p in points), path)
    check_numbers("halves_ms", (ms for p in points for ms in p.halves_ms), path)
    timed = [p.timed for p in points if p.timed is not None]
    times = [found[np.isfinite(found)] for t in timed for found in (t.kernels, t.weights)]
    conversions = [ms for t in timed for ms in t.conversions.values()]
    check_numbers("nodes_us", [*np.concatenate([*times, np.empty(0)]).tolist(), *conversions], path, zero=True)
    check_numbers("size_bytes", (p.size_bytes for p in points), path)
    check_numbers("repeat_error", (p.repeat_error for p in points), path, zero=True)
    check_numbers("reference_ms", [reference_ms], path)
    check_numbers("reference_repeat_error", [repeat_error], path, zero=True)
    check_numbers("seconds", [seconds], path, zero=True)
    worker = Worker(anatomy, target.runtime)
    return Profile(
        model=anatomy.digest, target=target, device=device, reference_ms=reference_ms,
        reference_repeat_error=repeat_error, points=points, seconds=seconds, date=str(data["date"]),
        predictor=_fitted(worker, points), worker=worker, overheads=_overheads(anatomy, points),
        remote=bool(data.get("remote", False)), forced=differences,
    )  # fmt: skip


def _other_layers(data: Mapping[str, Any], policies: Sequence[Policy], anatomy: Anatomy) -> str | None:
    """The first operation or layer in which a profile's model differs from the anatomy's; None where none does."""
    then: Mapping[str, list[int]] | None = data.get("operations")
    if then is not None and (different := first_difference(then, anatomy)) is not None:
        return different
    known = {item.name for part in (anatomy.groups, anatomy.layers, anatomy.blocks) for item in part}
    named = {name for p in policies for part in (p.prune, p.bits, p.sparsity, p.removed_blocks) for name in part}
    if named - known:
        return f"a policy names {min(named - known)}"
    # A file that does not hold the operations has times by their position alone.
    times = [p["nodes_us"] for p in data["points"] if p["nodes_us"] is not None]
    layers = {str(i) for i, op in enumerate(anatomy.ops) if op.kind in WEIGHTED}
    if any(set(found["weights"]) - layers for found in times):
        return "weights were prepared where it has no layer"
    if any(int(i) >= len(anatomy.ops) for found in times for i in found["kernels"]):
        return f"more than {len(anatomy.ops)} operations were timed"
    return None


def differences_of(model: str, device: Fingerprint, model_now: str, device_now: Fingerprint) -> tuple[str, ...]:
    """Why a profile does not hold here, each as a sentence without its full stop."""
    found: list[str] = []
    if model != model_now:
        found.append(f"a profile belongs to one model; this one is for {model}, the task's model is {model_now}")
    for field in fields(Fingerprint):
        then, now = getattr(device, field.name), getattr(device_now, field.name)
        if then is None and field.name == "session_config":
            if now:
                found.append(
                    "a profile holds for one device; this one does not record the session_config that it was made "
                    f"with, here it is {now!r}"
                )
        elif then != now:
            found.append(
                f"a profile holds for one device; {field.name} was {then!r} when it was made, here it is {now!r}"
            )
    return tuple(found)


def is_remote(path: Path) -> bool:
    """Whether a profile was made from a kit; False where the file is no profile, which loading it will say."""
    try:
        data: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and bool(data.get("remote"))


def _fitted(worker: Worker, points: Sequence[Point]) -> Predictor:
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


def _overheads(anatomy: Anatomy, points: Sequence[Point]) -> NDArray[np.float64]:
    """Least squares on what the files hold beside their payload."""
    plans = [plan(anatomy, p.policy) for p in points]
    rest = np.array([p.size_bytes - payload_bytes(planned) for p, planned in zip(points, plans, strict=True)])
    counts = np.stack([structure(planned) for planned in plans])
    return np.linalg.lstsq(counts, rest, rcond=None)[0].astype(np.float64)
