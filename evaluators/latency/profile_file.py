"""The profile file: a header, which says what its numbers hold for, and the measured points. No pickle: the predictor
is fitted again on loading."""

import contextlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...spaces.anatomy import WEIGHTED, Anatomy
from ...spaces.errors import InputError
from ...spaces.policy import Policy, digest, policy_from_dict, policy_to_dict
from .nodes import timed_from_dict, timed_to_dict
from .profile import Point, Profile, fitted, overheads_of
from .recorded import are_texts, check_numbers, first_difference, operations_of
from .target import (
    Fingerprint,
    fingerprint,
    fingerprint_from_dict,
    fingerprint_to_dict,
    target_from_dict,
    target_to_dict,
)
from .units import Worker

VERSION = 2


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
    missing = "not installed" if force else None  # it is not run to predict
    found = [
        *data.get("forced", ()),
        *differences_of(data["model"], device, anatomy.digest, here or fingerprint(target, missing=missing)),
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
        predictor=fitted(worker, points), worker=worker, overheads=overheads_of(anatomy, points),
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
