"""The files of one export, and where they come from."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from ..evaluators.evaluate import checkpoint
from ..evaluators.latency import measure
from ..evaluators.latency.timer import PROVIDERS, session_config
from ..search.mark import is_ours
from ..search.records import REJECT, RunRecord, TrialRecord, Verified, last_word
from ..spaces.errors import InputError
from . import verify
from .card import card
from .folder import staged
from .intermediate import openvino_there, write_openvino
from .late import MODEL, REFERENCE, WEIGHTS, verify_now
from .licences import licences_text
from .origin import Origin, origin_of
from .recipe import FINETUNE, recipe_text
from .reference import light_reference
from .triton import config_pbtxt
from .versions import needs_options, opset_of, probe_outputs, restamp

log = logging.getLogger("nightpress")
POLICY, RUNTIME, MANIFEST = "policy.json", verify.RUNTIME, verify.MANIFEST
LEAST_MARGIN = 0.10
"""Within which a ratio of two independent measurements is stated to hold, where the night was no noisier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to export. ``opset`` and ``ir_version`` None leave the file as it was measured; ``openvino`` adds its
    representation; ``require_approval`` refuses what no person approved last; ``run_task`` lets a run that was not
    begun here execute its task's code, where the night left a point unverified."""

    force: bool = False
    opset: int | None = None
    ir_version: int | None = None
    openvino: bool = False
    require_approval: bool = False
    run_task: bool = False


PLAIN = Options()


def export_trial(run: RunRecord, trial: TrialRecord, out: Path, options: Options = PLAIN) -> dict[str, Any]:
    """Write a trial's production files; returns the command's JSON.

    Raises InputError when ``out`` exists or cannot be written, the trial left no weights, was struck out, or lacks an
    approval that is required.
    """
    check_trial(run, trial, options)
    with staged(out, force=options.force) as folder:
        origin = origin_of(run, trial) if trial.verified is not None else origin_of(run, trial).here()
        verified = _collect(run, trial, origin, folder, options)
        data = write_files(origin, verified, folder, options)
    return {"dir": str(out), **data}


def check_trial(run: RunRecord, trial: TrialRecord, options: Options) -> None:
    """Raises InputError when the trial must not be exported."""
    struck = trial.verified.struck_out if trial.verified is not None else None
    if struck and not options.force:
        raise InputError(f"{run.path}: trial {trial.number} was struck out: {struck}; --force exports it.")
    word = last_word(run, trial)
    rejected = word is not None and word.get("action") == REJECT
    if options.require_approval and (word is None or rejected):
        why = f"{word['who']} rejected it" if word is not None else "nobody approved it"
        raise InputError(
            f"{run.path}: trial {trial.number} needs an approval, but {why}; "
            f"nightpress approve {run.path} {trial.number} --note TEXT gives one."
        )
    if word is not None and rejected:
        log.warning("trial %d was rejected by %s: %s", trial.number, word["who"], word["note"])


def _collect(run: RunRecord, trial: TrialRecord, origin: Origin, folder: Path, options: Options) -> Verified:
    """Put model, weights and, where there is one, the original into the folder; measure now what the night did not."""
    if trial.driver not in {None, run.state.get("driver")}:
        raise InputError(
            f"{run.path}: another driver of this study trained trial {trial.number}; export it from its run folder."
        )
    if trial.verified is None:
        if not options.run_task and not is_ours(run):
            raise InputError(
                f"{run.path}: the night did not verify trial {trial.number}, so exporting it executes {origin.task}, "
                "but this run was not begun by you on this machine; --run-task says that you trust its code."
            )
        return verify_now(run, trial, origin, folder)
    source = _within(run, trial.verified.model_file)
    weights = checkpoint(source.parent, "long")
    for path, name in ((source, MODEL), (weights, WEIGHTS)):
        if not path.is_file():
            raise InputError(f"{path}: the run's artefact is missing, so trial {trial.number} cannot be exported.")
        shutil.copyfile(path, folder / name)
    original = next((t.verified for t in run.trials if t.name == "uncompressed" and t.verified), None)
    reference = _within(run, original.model_file) if original else run.path / "artifacts" / REFERENCE
    if reference.is_file():
        shutil.copyfile(reference, folder / REFERENCE)
    return trial.verified


def _within(run: RunRecord, name: str) -> Path:
    """A file of the run. A record from elsewhere may name any path: what leads out of the folder is refused."""
    path = verify.inside(run.path, name)
    if path is None:
        raise InputError(f"{run.path}: its record names the file {name!r}, which lies outside the run.")
    return path


def write_files(origin: Origin, verified: Verified, folder: Path, options: Options) -> dict[str, Any]:
    """Complete a folder that holds model and weights; returns what was measured and the files' names."""
    restamp(folder / MODEL, origin.target, options.opset, options.ir_version)
    model = onnx.load(str(folder / MODEL))
    onnx.checker.check_model(model, full_check=True)
    measured = _measured(origin, verified, (folder / MODEL).stat().st_size)
    probe = probe_outputs(folder / MODEL, origin.target)
    if (folder / REFERENCE).is_file():
        (folder / REFERENCE).write_bytes(light_reference(onnx.load(str(folder / REFERENCE))))
    _write(folder / POLICY, {**origin.policy, "digests": dict(origin.digests)})
    needed = needs_options(folder / MODEL, origin.target)
    _write(folder / RUNTIME, {**_runtime(origin, model), "needs_disabled_optimizers": needed})
    triton = config_pbtxt(model, origin, verified.latency.latency_ms, needs_options=needed)
    (folder / "config.pbtxt").write_text(triton)
    (folder / FINETUNE).write_text(recipe_text(origin, verified.rate))
    (folder / "card.md").write_text(card(origin, verified, measured, version("nightpress")))
    (folder / "LICENSES.txt").write_text(licences_text(_openvino(origin, folder, options)))
    shutil.copyfile(verify.__file__, folder / "verify.py")
    shutil.copyfile(timer_script(), folder / "timer.py")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    manifest = {
        "schema": 1, "nightpress": version("nightpress"), "trial": origin.trial, "policy": origin.digest,
        "digests": dict(origin.digests), "opset": opset_of(model), "ir_version": model.ir_version,
        "measured": measured, "probe": probe.tolist(), "origin": origin.to_dict(), "files": hashes,
    }  # fmt: skip
    _write(folder / MANIFEST, manifest)
    return {"files": [*hashes, MANIFEST], "manifest": verify.sha256(folder / MANIFEST), **measured}


def timer_script() -> Path:
    """The timing script, which runs without nightpress."""
    return Path(measure.__file__).with_name("timer.py")


def _measured(origin: Origin, verified: Verified, size_bytes: int) -> dict[str, Any]:
    """The numbers of the manifest: milliseconds, bytes and shares. The ratio's interval is three times the night's own
    disagreement between two measurements of one model, at least 10 %, and the repeat error on top; no narrower than
    the prediction's where the latency was predicted.

    Raises InputError when there is no ratio."""
    quality, latency = verified.quality, verified.latency
    if latency.ratio is None:
        raise InputError("the trial was measured without the original beside it, so there is no ratio to state.")
    margin = max(LEAST_MARGIN, 3 * (origin.truth_repeat or 0.0)) + (latency.repeat_error or 0.0)
    if not latency.measured:
        margin = max(margin, latency.high_ms / latency.latency_ms - 1)
    return {
        "accuracy": quality.accuracy,
        "accuracy_se": quality.accuracy_se,
        "samples": quality.samples,
        "latency_ms": latency.latency_ms,
        "low_ms": latency.low_ms,
        "high_ms": latency.high_ms,
        "latency_measured": latency.measured,
        "forced": origin.forced,
        "repeat_error": latency.repeat_error,
        "reference_ms": latency.reference_ms,
        "ratio": latency.ratio,
        "ratio_low": latency.ratio / (1 + margin),
        "ratio_high": latency.ratio * (1 + margin),
        "size_bytes": size_bytes,
        "parity": {"top1_agreement": verified.top1_agreement, "max_abs_diff": verified.max_abs_diff},
        "bits_used": dict(verified.bits_used),
    }


def _runtime(origin: Origin, model: onnx.ModelProto) -> dict[str, Any]:
    """What a session must be told, and what goes in and out."""
    target = origin.target
    return {
        "runtime": target.runtime, "threads": target.threads, "batch": target.batch, "execution_mode": "sequential",
        "inter_op_threads": 1, "disabled_optimizers": list(target.disabled_optimizers),
        "session_config": session_config(origin.device) if target.runtime.startswith("onnxruntime") else {},
        "providers": PROVIDERS.get(target.runtime, ["CPUExecutionProvider"]), "device": dict(origin.device) or None,
        "input": _tensor(model.graph.input[0]), "output": _tensor(model.graph.output[0]),
    }  # fmt: skip


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [d.dim_value or None for d in tensor.shape.dim]
    return {"name": value.name, "shape": shape, "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}


def _openvino(origin: Origin, folder: Path, options: Options) -> tuple[str, ...]:
    """OpenVINO's files, where they are wanted and can be made; returns the package that made them."""
    if not options.openvino and origin.target.runtime != "openvino":
        return ()
    if not openvino_there():
        log.warning("openvino is not installed, so its files are left out; pip install 'nightpress[openvino]' adds it")
        return ()
    write_openvino(folder / MODEL, folder)
    return ("openvino",)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
