"""The export's folder: written whole beside its place, then moved there."""

import hashlib
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from ..evaluators.evaluate import checkpoint
from ..search.records import RunRecord, TrialRecord, Verified
from ..spaces.errors import InputError
from .card import card
from .late import target_of, verify_now
from .triton import config_pbtxt

MODEL, WEIGHTS, POLICY, MANIFEST = "model.onnx", "model.safetensors", "policy.json", "manifest.json"


def export_trial(run: RunRecord, trial: TrialRecord, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Write a trial's production files; returns the command's JSON.

    Raises InputError when ``out`` exists and ``force`` is not set, cannot be written, or the trial left no weights.
    """
    if out.exists() and not force:
        raise InputError(f"{out}: the export folder exists already; --force replaces it.")
    if trial.verified is not None and trial.verified.struck_out and not force:
        raise InputError(
            f"{run.path}: trial {trial.number} was struck out: {trial.verified.struck_out}; --force exports it."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: the export cannot be written: {error.strerror}.") from None
    try:
        staged.chmod(0o755)
        verified = _collect(run, trial, staged)
        data = _describe(run, trial, verified, staged)
        swap(staged, out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return {"dir": str(out), **data}


def _collect(run: RunRecord, trial: TrialRecord, staged: Path) -> Verified:
    """Put model and weights into the folder; verify now what the night did not."""
    if trial.verified is None:
        verified = verify_now(run, trial, staged)
        checkpoint(staged, "short").unlink()
        checkpoint(staged, "long").rename(staged / WEIGHTS)
        return verified
    source = run.path / trial.verified.model_file
    weights = checkpoint(source.parent, "long")
    for path, name in ((source, MODEL), (weights, WEIGHTS)):
        if not path.is_file():
            raise InputError(f"{path}: the run's artefact is missing, so trial {trial.number} cannot be exported.")
        shutil.copyfile(path, staged / name)
    return trial.verified


def _describe(run: RunRecord, trial: TrialRecord, verified: Verified, staged: Path) -> dict[str, Any]:
    target = target_of(run)
    model = onnx.load(str(staged / MODEL))
    onnx.checker.check_model(model)
    name = str(run.state.get("task", "model")).replace("/", "_").replace(":", "_")
    original = next((t for t in run.trials if t.name == "uncompressed"), None)
    original_bytes = original.size_bytes if original is not None else None
    measured = {
        "accuracy": verified.quality.accuracy,
        "accuracy_se": verified.quality.accuracy_se,
        "samples": verified.quality.samples,
        "latency_ms": verified.latency.latency_ms,
        "repeat_error": verified.latency.repeat_error,
        "reference_ms": verified.latency.reference_ms,
        "ratio": verified.latency.ratio,
        "size_bytes": verified.size_bytes,
        "parity": {"top1_agreement": verified.top1_agreement, "max_abs_diff": verified.max_abs_diff},
        "bits_used": dict(verified.bits_used),
    }
    provenance = {
        "model": run.state.get("model"),
        "data": run.state.get("data"),
        "code": run.state.get("code"),
    }
    _write(staged / POLICY, {**trial.policy, "digests": provenance})
    runtime = {
        "runtime": target.runtime, "threads": target.threads, "batch": target.batch, "execution_mode": "sequential",
        "inter_op_threads": 1, "disabled_optimizers": list(target.disabled_optimizers),
        "providers": ["CPUExecutionProvider"], "device": (run.target or {}).get("device"),
    }  # fmt: skip
    _write(staged / "runtime.json", runtime)
    (staged / "config.pbtxt").write_text(config_pbtxt(model, name, target.threads, target.disabled_optimizers))
    (staged / "card.md").write_text(card(run, trial, verified, version("nightpress"), original_bytes))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(staged.iterdir())}
    manifest = {
        "schema": 1, "nightpress": version("nightpress"), "trial": trial.number, "policy": trial.digest,
        "digests": provenance, "measured": measured, "files": hashes,
    }  # fmt: skip
    _write(staged / MANIFEST, manifest)
    return {"files": [*hashes, MANIFEST], **measured}


def swap(staged: Path, out: Path) -> None:
    """Move the finished folder into place; what was there goes only once the new one is complete."""
    if not out.exists():
        staged.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.rename(old / out.name)
    try:
        staged.rename(out)
    except BaseException:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old)


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
