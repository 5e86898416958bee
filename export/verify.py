"""Checks an export on the machine that is to serve it: files, outputs, accuracy, latency.

Needs numpy and onnxruntime alone (and Pillow for folders of images), and nothing of nightpress: it is shipped inside
each export and runs there as ``python verify.py --data test.npz``; ``nightpress verify DIR`` runs the same code.
Exit codes: 0 it holds, 1 it does not, 2 the input is wrong.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from runpy import run_path
from typing import Any
from zipfile import BadZipFile

try:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"verify: {missing.name} is not installed: pip install numpy onnxruntime\n")
    sys.exit(2)

MANIFEST, SET = "manifest.json", "set.json"
MODEL, REFERENCE, RUNTIME = "model.onnx", "reference.onnx", "runtime.json"
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SAME_DATA = 0.001
"""How far the accuracy may lie from the stated one on the data that it was stated for: 0.1 point."""
BATCH = 64
PROBE_ITEMS = 2
UNREADABLE = (OSError, ValueError, EOFError, BadZipFile, zlib.error)
"""What numpy and Pillow raise for a file that is torn or of another kind."""
Array = NDArray[Any]
STATED = ("accuracy", "samples", "ratio", "ratio_low", "ratio_high", "max_abs_diff")
FIELDS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    SET: {"models": lambda found: [(str(entry["dir"]), str(entry["manifest"])) for entry in found]},
    MANIFEST: {
        "files": dict,
        "measured": lambda found: {
            "accuracy_se": found["accuracy_se"],
            **{key: float((found | found["parity"])[key]) for key in STATED},
        },
        "probe": lambda found: np.array(list(found), np.float32),
    },
    RUNTIME: {"runtime": str, "threads": int, "batch": int, "disabled_optimizers": list, "providers": list},
}
"""What is read of an export's files, and as what."""


class VerifyError(ValueError):
    """The input is wrong; the text is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer. ``state`` is ``ok``, ``failed`` or ``skipped``; ``numbers`` are what it compared."""

    name: str
    state: str
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``tolerance`` of the accuracy, None for the rule of :func:`check_accuracy`; ``mean`` and ``std`` normalise
    images, one value or one a channel; ``latency`` False leaves the measurement out; ``expect`` is the SHA-256 that
    the manifest must have: kept elsewhere, it tells an export that was replaced as a whole."""

    data: Path | None = None
    expect: str | None = None
    tolerance: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    latency: bool = True


# The whole


def verify(folder: Path, options: Options, timer: Path) -> list[Check]:
    """All checks of an export, or of each export of a set. ``timer`` is the script that measures latency.

    Raises VerifyError when the folder is no export or the data cannot be read.
    """
    top = SET if (folder / SET).is_file() else MANIFEST
    read_json(folder / top)  # raises where there is none
    if options.expect is not None and sha256(folder / top) != options.expect.lower():
        return [Check("files", "failed", f"{top} is not the expected one: its SHA-256 is {sha256(folder / top)}")]
    return _verify_set(folder, options, timer) if top == SET else _verify_one(folder, options, timer)


def _verify_set(folder: Path, options: Options, timer: Path) -> list[Check]:
    found: list[Check] = []
    for name, expected in read_fields(folder / SET)["models"]:
        part = inside(folder, name)
        if part is None or not (part / MANIFEST).is_file():
            found.append(Check(f"{name}/files", "failed", f"{SET} names it, but it is not an export"))
        elif sha256(part / MANIFEST) != expected:
            found.append(Check(f"{name}/files", "failed", f"its {MANIFEST} is not the one of {SET}"))
        else:
            checks = _verify_one(part, options, timer)
            found += [Check(f"{name}/{c.name}", c.state, c.text, c.numbers) for c in checks]
    return found


def _verify_one(folder: Path, options: Options, timer: Path) -> list[Check]:
    manifest = read_fields(folder / MANIFEST)
    files = check_files(folder, manifest)
    if files.state == "failed":  # nothing else of a folder like this can be believed
        return [files]
    runtime = read_fields(folder / RUNTIME)
    session = open_session(folder / MODEL, runtime)
    if isinstance(session, str):
        return [files, Check("model", "failed", session)]
    checks = [
        files,
        *_check_session(runtime),
        check_outputs(session, manifest),
        check_accuracy(session, manifest, options),
    ]
    return [*checks, check_latency(folder, manifest, runtime, timer)] if options.latency else checks


def holds(checks: Sequence[Check], *, strict: bool = False) -> bool:
    """Whether the export may be served. ``strict``: what could not be checked counts as failed."""
    return all(check.state == "ok" or (check.state == "skipped" and not strict) for check in checks)


# Files


def check_files(folder: Path, manifest: Mapping[str, Any]) -> Check:
    """Every file of the manifest against its SHA-256; the first that differs is named."""
    files: Mapping[str, str] = manifest["files"]
    for name, expected in files.items():
        path = inside(folder, name)
        if path is None:
            return Check("files", "failed", f"{name!r} in {MANIFEST} leads out of the folder")
        if not path.is_file():
            return Check("files", "failed", f"{name} is missing")
        if sha256(path) != expected:
            return Check("files", "failed", f"{name} is not the file that was exported: its SHA-256 differs")
    return Check("files", "ok", f"{len(files)} files are those that were exported", {"files": len(files)})


def inside(folder: Path, name: str) -> Path | None:
    """A path below a folder; None where the name leads out of it, also over a link."""
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) else None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises VerifyError when there is none."""
    try:
        found = json.loads(path.read_text())
    except OSError:
        raise VerifyError(f"{path.parent}: not an export folder: it has no {path.name}.") from None
    except ValueError:
        raise VerifyError(f"{path}: not a JSON file.") from None
    if not isinstance(found, dict):
        raise VerifyError(f"{path}: must hold a JSON object.")
    return found


def read_fields(path: Path) -> dict[str, Any]:
    """A file of an export, with its :data:`FIELDS`. Raises VerifyError where one is not there or of another kind."""
    found = read_json(path)
    try:
        return {**found, **{key: kind(found[key]) for key, kind in FIELDS[path.name].items()}}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise VerifyError(f"{path.parent}: its {path.name} is not one of an export ({reason}).") from None


# Numbers


@cache
def processor_config() -> dict[str, str]:
    """What sessions must be told on this processor, by the rule of the timing script, which stands beside this file
    where that is shipped: the kernels whose outputs are judged are those that are timed."""
    if __package__:
        from ..evaluators.latency.timer import processor, session_config

        return session_config(processor())
    timer = run_path(str(Path(__file__).resolve().with_name("timer.py")))  # python -P would not find it to import
    return timer["session_config"](timer["processor"]())


def open_session(path: Path, runtime: Mapping[str, Any]) -> Any:
    """The model in ONNX Runtime with the threads and optimizers that it was measured with and what this processor
    needs, or why it cannot be loaded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = runtime["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in processor_config().items():
        options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=runtime["disabled_optimizers"]
        )
    except Exception as error:  # noqa: BLE001  the runtime raises types of its own that share no base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"ONNX Runtime {onnxruntime.__version__} cannot load it: {reason}"


def outputs(session: Any, inputs: Array) -> Array:
    """The model's outputs for inputs of shape (items, …), in batches."""
    name = session.get_inputs()[0].name
    parts = [inputs[start : start + BATCH].astype(np.float32) for start in range(0, len(inputs), BATCH)]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts])


def probe_inputs(shape: Sequence[int], items: int = PROBE_ITEMS) -> Array:
    """Inputs that every language can make without a file: sin(1), sin(2), … in fp32, shape (items, *shape)."""
    count = items * math.prod(shape)
    return np.sin(np.arange(1, count + 1, dtype=np.float64)).astype(np.float32).reshape(items, *shape)


def _check_session(runtime: Mapping[str, Any]) -> list[Check]:
    """Where the options in the runtime file are those of another processor: all that follows is judged with this one's,
    and what serves by the file would run other kernels."""
    config = processor_config()
    if runtime["runtime"] == "openvino" or config == runtime.get("session_config", {}):
        return []
    text = f"{RUNTIME} has the session_config of another processor: serve it here with {json.dumps(config)}"
    return [Check("session", "skipped", text, {"session_config": config})]


def check_outputs(session: Any, manifest: Mapping[str, Any]) -> Check:
    """Outputs for the probe against those of the exporting machine: other kernels may round otherwise, but by no
    more than they did between torch and ONNX Runtime (and 0.001)."""
    expected = manifest["probe"]
    found = outputs(session, probe_inputs(session.get_inputs()[0].shape[1:], len(expected)))
    allowed = max(0.001, manifest["measured"]["max_abs_diff"])
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
    numbers = {"max_abs_diff": difference if math.isfinite(difference) else None, "allowed": allowed}
    state = "ok" if difference <= allowed else "failed"
    text = f"outputs differ from the exporting machine's by {difference:.2g}, allowed are {allowed:.2g}"
    return Check("outputs", state, text, numbers)


def check_accuracy(session: Any, manifest: Mapping[str, Any], options: Options) -> Check:
    """Top-1 accuracy on the given data against the stated one.

    As many examples as the test split had are taken for the test split: 0.1 point either way. Any other number is
    another sample: it fails when it lies more than two standard errors of the difference below. ``tolerance``
    replaces both by a difference either way.
    """
    stated = manifest["measured"]
    if options.data is None:
        return Check("accuracy", "skipped", "no data was given (--data)")
    if stated["accuracy_se"] is None:
        return Check("accuracy", "skipped", "the task has a metric of its own, which is not in the export")
    inputs, targets = read_data(options.data, session.get_inputs()[0].shape[1:], options)
    accuracy = float((outputs(session, inputs).argmax(axis=1) == targets).mean())
    same = options.tolerance is not None or len(targets) == stated["samples"]
    error = math.sqrt(accuracy * (1 - accuracy) / len(targets))
    allowed = 2 * math.hypot(error, stated["accuracy_se"])
    if same:
        allowed = SAME_DATA if options.tolerance is None else options.tolerance
    drop = stated["accuracy"] - accuracy
    kept = (abs(drop) if same else drop) <= allowed + 1e-9
    text = f"{accuracy:.4f} on {len(targets)} examples, stated {stated['accuracy']:.4f}, allowed {allowed:.4f}"
    numbers = {"accuracy": accuracy, "stated": stated["accuracy"], "allowed": allowed, "samples": len(targets)}
    return Check("accuracy", "ok" if kept else "failed", text, numbers)


# Data


def read_data(path: Path, shape: Sequence[int], options: Options) -> tuple[Array, Array]:
    """Inputs (n, *shape) as the model takes them, and labels (n,). Raises VerifyError."""
    inputs, targets = _read_folder(path, shape, options) if path.is_dir() else _read_npz(path)
    if targets.ndim != 1 or targets.size == 0 or inputs.shape != (*targets.shape, *shape):
        raise VerifyError(
            f"{path}: inputs must have shape (n, {', '.join(map(str, shape))}) with n labels, "
            f"but got {inputs.shape} and {targets.shape}."
        )
    if inputs.dtype.kind not in "biuf" or targets.dtype.kind not in "biuf":
        raise VerifyError(f"{path}: inputs and targets must be numbers, but got {inputs.dtype} and {targets.dtype}.")
    return inputs, targets


def _read_npz(path: Path) -> tuple[Array, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays["inputs"], arrays["targets"]
    # An .npy is an array, which cannot be entered: TypeError, before Python 3.11 AttributeError.
    except (*UNREADABLE, KeyError, TypeError, AttributeError):
        raise VerifyError(f"{path}: must be an .npz file with the arrays inputs and targets.") from None


def _read_folder(path: Path, shape: Sequence[int], options: Options) -> tuple[Array, Array]:
    """``path/<class>/<item>.npy`` or images. Class names that are numbers are the labels; others count in their
    alphabetical order, as torchvision's ImageFolder has it."""
    classes = sorted(part for part in path.iterdir() if part.is_dir())
    numbered = all(part.name.isdecimal() for part in classes)
    inputs: list[Array] = []
    targets: list[int] = []
    for index, part in enumerate(classes):
        files = sorted(f for f in part.iterdir() if f.suffix.lower() in (".npy", *IMAGES))
        inputs += [_read_item(file, shape, options) for file in files]
        targets += [int(part.name) if numbered else index] * len(files)
    if not inputs:
        raise VerifyError(f"{path}: must hold one folder a class, with .npy files or images in it.")
    return np.stack(inputs), np.array(targets)


def _read_item(file: Path, shape: Sequence[int], options: Options) -> Array:
    try:
        if file.suffix.lower() == ".npy":
            item = np.load(BytesIO(file.read_bytes()), allow_pickle=False)
        else:
            item = _read_image(file, shape, options)
    except VerifyError:
        raise
    except UNREADABLE:
        raise VerifyError(f"{file}: cannot be read.") from None
    found = getattr(item, "shape", None)  # an .npz under the name of an .npy has none
    if found != tuple(shape):
        raise VerifyError(f"{file}: must have shape {tuple(shape)}, but got {found}.")
    return item


def _read_image(file: Path, shape: Sequence[int], options: Options) -> Array:
    """Resized to the model's input, channels first, in [0, 1], then normalised."""
    try:
        from PIL import Image
    except ImportError:
        raise VerifyError(f"{file}: images need Pillow; without it give .npy files or an .npz file.") from None
    if len(shape) != 3 or shape[0] not in {1, 3}:
        raise VerifyError(f"{file}: the model takes inputs of shape {tuple(shape)}, which is no image.")
    if any(len(values) not in {1, shape[0]} for values in (options.mean, options.std)) or 0 in options.std:
        raise VerifyError(f"mean and std must be one number or {shape[0]}, one a channel, and std must not be 0.")
    with Image.open(file) as opened:
        picture = opened.convert("L" if shape[0] == 1 else "RGB").resize(
            (shape[2], shape[1]), Image.Resampling.BILINEAR
        )
    pixels = np.asarray(picture, np.float32).reshape(shape[1], shape[2], shape[0]).transpose(2, 0, 1) / 255
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (options.mean, options.std))
    return (pixels - mean) / std


# Latency


def check_latency(folder: Path, manifest: Mapping[str, Any], runtime: Mapping[str, Any], timer: Path) -> Check:
    """How many times faster than the original, both measured now and interleaved, against the stated interval.

    Only its lower end can fail: on other hardware an export may well gain more.
    """
    if runtime["runtime"] == "openvino" and find_spec("openvino") is None:
        return Check("latency", "skipped", "it was measured in openvino, which is not installed here")
    lacking = [name for name in runtime["providers"] if name not in onnxruntime.get_available_providers()]
    if lacking:
        text = f"it was measured in {runtime['runtime']}, and the onnxruntime here has no {lacking[0]}"
        return Check("latency", "skipped", text)
    if not (folder / REFERENCE).is_file():
        return Check("latency", "skipped", f"the export has no {REFERENCE} to compare with")
    stated = manifest["measured"]
    models = {"export": str(folder / MODEL), "original": str(folder / REFERENCE)}
    try:
        windows = measure(models, runtime, timer)
    except (OSError, ValueError, KeyError) as error:
        return Check("latency", "failed", f"it could not be measured: {error}")
    latency_ms, reference_ms = min(windows["export"]), min(windows["original"])
    ratio, low, high = reference_ms / latency_ms, stated["ratio_low"], stated["ratio_high"]
    text = (
        f"{ratio:.2f} times as fast as the original ({latency_ms:.3f} ms against {reference_ms:.3f} ms), "
        f"stated {stated['ratio']:.2f} within {low:.2f} to {high:.2f}"
    )
    if ratio > high:
        text += ", so it gains more on this machine"
    numbers = {"ratio": ratio, "stated": stated["ratio"], "low": low, "high": high,
               "latency_ms": latency_ms, "reference_ms": reference_ms}  # fmt: skip
    return Check("latency", "ok" if ratio >= low else "failed", text, numbers)


def measure(models: Mapping[str, str], runtime: Mapping[str, Any], timer: Path) -> dict[str, list[float]]:
    """Windows in ms of each model, from the timing script in a process that does nothing else.

    Raises OSError or ValueError with the reason.
    """
    request = {
        "models": dict(models), "runtime": runtime["runtime"], "threads": runtime["threads"],
        "batch": runtime["batch"], "disabled_optimizers": runtime["disabled_optimizers"], "least_rounds": 4,
        "most_rounds": 12, "window_ms": 25, "round_ms": 600, "agree": 0.02, "kernel_passes": 0,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(timer)], input=json.dumps(request) + "\n", capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"error": "the timing process ended"}
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["windows_ms"]


# The command


def to_dict(folder: Path, checks: Sequence[Check], *, strict: bool = False) -> dict[str, Any]:
    """The command's JSON."""
    return {"dir": str(folder), "holds": holds(checks, strict=strict), "checks": [asdict(check) for check in checks]}


def lines(checks: Sequence[Check]) -> list[str]:
    """One line a check."""
    return [f"{check.state:8}{check.name}: {check.text}" for check in checks]


def numbers(text: str) -> tuple[float, ...]:
    """``0.48,0.45,0.41`` as numbers. Raises VerifyError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise VerifyError(f"mean and std must be numbers separated by commas, but got {text!r}.") from None


def main() -> int:
    """``python verify.py``, in an export or with its folder named."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Check an export of nightpress on this machine.")
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="default: the folder of this file")
    parser.add_argument("--data", type=Path, help="file.npz (inputs, targets) or a folder of class folders")
    parser.add_argument("--tolerance", type=float, help="of the accuracy, as a share: 0.001 is 0.1 point")
    parser.add_argument("--mean", default="0", help="of images: one value or one a channel")
    parser.add_argument("--std", default="1")
    parser.add_argument("--expect", metavar="SHA256", help="the manifest's, as export printed it")
    parser.add_argument("--no-latency", action="store_true", help="do not measure")
    parser.add_argument("--strict", action="store_true", help="what cannot be checked counts as failed")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args()
    try:
        options = Options(
            data=given.data, expect=given.expect, tolerance=given.tolerance, mean=numbers(given.mean),
            std=numbers(given.std), latency=not given.no_latency,
        )  # fmt: skip
        checks = verify(given.folder, options, here / "timer.py")
    except VerifyError as error:
        sys.stderr.write(f"verify: {error}\n")
        return 2
    answer = to_dict(given.folder, checks, strict=given.strict)
    sys.stdout.write(json.dumps(answer) + "\n" if given.json else "\n".join(lines(checks)) + "\n")
    return 0 if answer["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
