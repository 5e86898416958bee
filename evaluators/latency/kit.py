"""A kit: a model's policies as ONNX files and one script that times them on another device, and what comes back.

The script is ``timer.py`` itself, so a kit is measured as a policy here is. The results hold the kit's description,
and calibration reads them as if they had just been measured.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...spaces.anatomy import Anatomy
from ...spaces.errors import InputError
from ...spaces.plan import Plan, plan
from ...spaces.policy import Policy, digest, policy_from_dict, policy_to_dict
from . import timer as script
from .capabilities import Capabilities, capabilities_elsewhere, probe_settings
from .measure import (
    AT_ONCE,
    AT_ONCE_BYTES,
    REFERENCE,
    Timing,
    for_script,
    settings,
    timings_of,
    write_random,
)
from .recorded import check_numbers, first_difference, operations_of
from .target import Fingerprint, Target, fingerprint_from_dict, target_from_dict, target_to_dict

VERSION = 3
MEASURE = "measure.py"


def write_kit(
    anatomy: Anatomy, policies: Sequence[Policy], target: Target, out: Path, *,
    how: Mapping[str, float] | None = None, probes: Mapping[str, Plan] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write models, ``kit.json`` and ``measure.py`` into an empty or new folder; returns the description.
    ``how`` is what the script is told of windows and rounds, as :func:`settings` gives it; ``probes`` those of the
    target's capabilities, where they are to be measured too.

    Raises OSError.
    """
    (out / "models").mkdir(parents=True, exist_ok=True)
    chosen = {REFERENCE: Policy(model=anatomy.digest)} | {digest(policy): policy for policy in policies}
    models = {key: _write(plan(anatomy, policy), out, f"models/{key}.onnx") for key, policy in chosen.items()}
    largest = max(entry["size_bytes"] for entry in models.values())
    kit: dict[str, Any] = {
        "version": VERSION,
        "model": anatomy.digest,
        "operations": operations_of(anatomy),
        "target": for_script(target),
        "settings": target_to_dict(target),
        "request": dict(how or settings()),
        "at_once": max(1, min(AT_ONCE, AT_ONCE_BYTES // largest)),
        "models": models,
        "policies": {key: policy_to_dict(policy) for key, policy in chosen.items() if key != REFERENCE},
    }
    if probes:
        (out / "probes").mkdir(exist_ok=True)
        kit["probes"] = {
            key: _write(planned, out, f"probes/{number}.onnx") for number, (key, planned) in enumerate(probes.items())
        }
        kit["probe_request"] = {**how, "kernel_passes": 1} if how else probe_settings()
    kit["id"] = kit_id(kit)
    (out / script.KIT).write_text(json.dumps(kit, indent=1) + "\n")
    shutil.copyfile(script.__file__, out / MEASURE)
    return kit


def _write(planned: Plan, out: Path, name: str) -> dict[str, Any]:
    """Write a model of a kit; returns its entry."""
    size_bytes = write_random(planned, out / name)
    return {"file": name, "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(), "size_bytes": size_bytes}


def kit_id(kit: Mapping[str, Any]) -> str:
    """Names a kit by its content."""
    content = json.dumps({key: value for key, value in kit.items() if key != "id"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a kit's script measured on another device, by policy digest; ``timings`` and ``sizes`` (bytes) with the
    reference."""

    target: Target
    device: Fingerprint
    policies: Mapping[str, Policy]
    timings: Mapping[str, Timing]
    sizes: Mapping[str, int]
    seconds: float
    date: str
    capabilities: Capabilities | None
    """What the device can do, where the kit held the probes."""


def read_results(path: Path, anatomy: Anatomy) -> Results:
    """Read ``results.json``. Raises InputError when it is damaged, or of a kit that was made for another model."""
    try:
        data: object = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: a kit's results must be a readable JSON file, but: {error}.") from None
    try:
        return _results(cast("dict[str, Any]", data), path, anatomy)
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: these are not the whole results of a kit ({type(error).__name__}: {error}); "
            f"run {MEASURE} of the kit again."
        ) from None


def _results(data: Mapping[str, Any], path: Path, anatomy: Anatomy) -> Results:
    kit: Mapping[str, Any] = data["kit"]
    _check_kit(kit, path, anatomy)
    windows: Mapping[str, Sequence[object]] = data["windows_ms"]
    for key in kit["models"]:
        if not windows.get(key):
            raise InputError(f"{path}: windows_ms of model {key} is missing: run {MEASURE} of the kit to its end.")
        kernels: Mapping[str, Any] = data["kernels"][key]
        check_numbers(f"kernels of model {key}", [ms for _, ms in kernels.values()], path, zero=True)
        _check_texts([op_type for op_type, _ in kernels.values()], f"types of kernels of model {key}", path)
        for look, which in ((data, "model"), (data["again"], "the second look at model")):
            check_numbers(f"windows_ms of {which} {key}", look["windows_ms"][key], path)
            check_numbers(f"reference_ms of {which} {key}", [look["reference_ms"][key]], path)
        _check_texts([look["sessions"][key] for look in (data, data["again"])], f"sessions of model {key}", path)
    device = data["device"]
    _check_texts([device[key] for key in ("machine", "cpu", "runtime_version")], "machine, cpu, runtime_version", path)
    check_numbers("cores of the device", [device["cores"]], path)
    check_numbers("seconds", [data["seconds"]], path)
    busy = [cores for look in (data, data["again"]) if (cores := look["busy_cores"]) is not None]
    check_numbers("busy_cores", busy, path, zero=True)
    target, again = target_from_dict(kit["settings"]), timings_of(data["again"])
    return Results(
        target=target,
        device=fingerprint_from_dict(data["device"]),
        policies={key: policy_from_dict(p, str(path)) for key, p in kit["policies"].items()},
        timings={key: timing.with_again(again[key]) for key, timing in timings_of(data).items()},
        sizes={key: int(entry["size_bytes"]) for key, entry in kit["models"].items()},
        seconds=float(data["seconds"]),
        date=str(data["date"]),
        capabilities=_capabilities(data["probes"], kit["probes"], target, path) if "probes" in kit else None,
    )


def _check_texts(found: Sequence[object], what: str, path: Path) -> None:
    for text in found:
        if not isinstance(text, str):
            raise InputError(f"{path}: {what} must be text, but one is {text!r}.")


def _capabilities(measured: Mapping[str, Any], probes: Mapping[str, Any], target: Target, path: Path) -> Capabilities:
    for key in probes:
        check_numbers(f"windows_ms of probe {key}", measured["windows_ms"][key], path)
    check_numbers("seconds of the probes", [measured["seconds"]], path)
    return capabilities_elsewhere(timings_of(measured), target, float(measured["seconds"]))


def _check_kit(kit: Mapping[str, Any], path: Path, anatomy: Anatomy) -> None:
    if kit["version"] != VERSION:
        raise InputError(
            f"{path}: results of a kit of version {VERSION} were expected, but got {kit['version']!r}: make the kit "
            "again with nightpress kit and measure that."
        )
    if kit["id"] != kit_id(kit):
        raise InputError(f"{path}: the kit was changed after nightpress kit wrote it, so its times belong to nothing.")
    if kit["model"] != anatomy.digest:
        raise InputError(
            f"{path}: the results are of another kit: it was made for model {kit['model']}, the task's model is "
            f"{anatomy.digest}."
        )
    different = first_difference(kit["operations"], anatomy)
    if different is not None:
        raise InputError(f"{path}: the results are of another kit: it was made for other layers ({different}).")
    beside = path.with_name(script.KIT)
    if beside.is_file() and (known := json.loads(beside.read_text()).get("id")) != kit["id"]:
        raise InputError(f"{path}: the results are of kit {kit['id']}, but the kit beside them is {known}.")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a time")
