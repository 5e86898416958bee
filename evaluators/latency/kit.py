"""A kit: a model's policies as ONNX files and one script that times them on another device, and what comes back.

The script is ``timer.py`` itself, so a kit is measured as a policy here is. The results hold the kit's description,
and calibration reads them as if they had just been measured.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...spaces.anatomy import Anatomy
from ...spaces.errors import InputError
from ...spaces.plan import Plan, plan
from ...spaces.policy import Policy, digest, policy_from_dict, policy_to_dict
from . import timer as script
from .calibrate import worth_measuring
from .capabilities import Capabilities, capabilities_elsewhere, probe_settings
from .measure import (
    AT_ONCE,
    REFERENCE,
    SECOND_ROUNDS,
    Timing,
    for_script,
    joined,
    settings,
    timings_of,
    write_random,
)
from .recorded import check_numbers, first_difference, operations_of
from .target import Fingerprint, Target, fingerprint_from_dict, target_from_dict, target_to_dict

VERSION = 4
PART_BYTES = 256 << 20
"""Of models that a device loads at once: what it has of memory is not known here, and files take some two and a half
times their size in it."""
MEASURE = "measure.py"
FIRST, AGAIN, LAYERS = "all models", "the same models a second time", "single layers"
"""What the parts of a kit's measurement are, as its script says."""


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
    chosen = {REFERENCE: Policy(model=anatomy.digest)} | {digest(p): p for p in worth_measuring(policies)}
    models = {key: _write(plan(anatomy, policy), out, f"models/{key}.onnx") for key, policy in chosen.items()}
    if probes:
        (out / "probes").mkdir(exist_ok=True)
    single = {
        key: _write(planned, out, f"probes/{number}.onnx")
        for number, (key, planned) in enumerate((probes or {}).items())
    }
    request = dict(how or settings())
    kit: dict[str, Any] = {
        "version": VERSION,
        "model": anatomy.digest,
        "operations": operations_of(anatomy),
        "target": for_script(target),
        "settings": target_to_dict(target),
        "models": models,
        "probes": single,
        "parts": list(_parts(models, request)),
        "policies": {key: policy_to_dict(policy) for key, policy in chosen.items() if key != REFERENCE},
    }
    if single:
        request = {**how, "kernel_passes": 1} if how else probe_settings()
        kit["parts"].append({"what": LAYERS, "keys": list(single), "request": request})
    kit["id"] = kit_id(kit)
    (out / script.KIT).write_text(json.dumps(kit, indent=1) + "\n")
    shutil.copyfile(script.__file__, out / MEASURE)
    return kit


def _parts(models: Mapping[str, Mapping[str, Any]], request: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """All models as many at once as memory allows, beside the reference; then once more in another order, without the
    times of nodes."""
    at_once = max(1, min(AT_ONCE, PART_BYTES // max(entry["size_bytes"] for entry in models.values())))
    keys = [key for key in models if key != REFERENCE]
    shuffled: list[str] = np.random.default_rng(0).permutation(keys).tolist()
    second = {**request, "kernel_passes": 0, "most_rounds": min(SECOND_ROUNDS, request["most_rounds"])}
    for what, order, how in ((FIRST, keys, request), (AGAIN, shuffled, second)):
        for start in range(0, len(order), at_once):
            yield {"what": what, "keys": [REFERENCE, *order[start : start + at_once]], "request": how}


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
    device = data["device"]
    check_numbers("seconds", [data["seconds"]], path)
    _check_texts([data["date"]], "date", path)
    found: dict[str, list[dict[str, Timing]]] = {FIRST: [], AGAIN: [], LAYERS: []}
    seconds = 0.0
    for part, answer in zip(kit["parts"], data["answers"], strict=True):
        _check_answer(part, answer, path)
        found[part["what"]].append(timings_of(answer))
        seconds = float(answer["seconds"])  # of the last part: the probes
    again, target = joined(found[AGAIN]), target_from_dict(kit["settings"], str(path))
    return Results(
        target=target,
        device=fingerprint_from_dict(device, str(path)),
        policies={key: policy_from_dict(p, str(path)) for key, p in kit["policies"].items()},
        timings={key: timing.with_again(again[key]) for key, timing in joined(found[FIRST]).items()},
        sizes={key: int(entry["size_bytes"]) for key, entry in kit["models"].items()},
        seconds=float(data["seconds"]),
        date=data["date"],
        capabilities=capabilities_elsewhere(joined(found[LAYERS]), target, seconds) if kit["probes"] else None,
    )


def _check_answer(part: Mapping[str, Any], answer: Mapping[str, Any], path: Path) -> None:
    """Of the timing script, to one part of a kit. Raises InputError, or KeyError, TypeError or ValueError."""
    windows: Mapping[str, Sequence[object]] = answer["windows_ms"]
    kernels: Mapping[str, Mapping[str, Any]] = answer["kernels"]
    for key in part["keys"]:
        if not windows.get(key):
            raise InputError(
                f"{path}: windows_ms of {key} in {part['what']!r} are missing: run {MEASURE} of the kit to its end."
            )
        times = kernels[key] if part["request"]["kernel_passes"] else kernels.get(key, {})
        if part["request"]["kernel_passes"] and not times:
            raise InputError(f"{path}: kernels of {key} in {part['what']!r} are empty: run {MEASURE} of the kit again.")
        check_numbers(f"kernels of {key}", [ms for _, ms in times.values()], path, zero=True)
        _check_texts([op_type for op_type, _ in times.values()], f"types of kernels of {key}", path)
        check_numbers(f"windows_ms of {key} in {part['what']!r}", windows[key], path)
    if set(windows) != set(part["keys"]):
        raise InputError(f"{path}: windows_ms of {part['what']!r} hold models that are not of this part of the kit.")
    check_numbers(f"seconds of {part['what']!r}", [answer["seconds"]], path)
    check_numbers("busy_cores", [] if answer["busy_cores"] is None else [answer["busy_cores"]], path, zero=True)
    _check_texts([answer["session"]], "session", path)


def _check_texts(found: Sequence[object], what: str, path: Path) -> None:
    for text in found:
        if not isinstance(text, str):
            raise InputError(f"{path}: {what} must be text, but one is {text!r}.")


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
    known: object = None
    with contextlib.suppress(OSError, ValueError, RecursionError):  # a damaged one says nothing against the results
        known = json.loads(path.with_name(script.KIT).read_text())
    if isinstance(known, dict) and (name := cast("dict[str, Any]", known).get("id")) != kit["id"]:
        raise InputError(f"{path}: the results are of kit {kit['id']}, but the kit beside them is {name}.")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a time")
