"""An exported file in another version of ONNX, for runtimes that read no newer or no older one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, version_converter

from ..evaluators.latency.target import Target, target_to_dict
from ..evaluators.runtime import optimised_graph
from ..spaces.errors import InputError
from .verify import open_session, outputs, probe_inputs

OLDEST_OPSET = 13  # the first that dequantises weights per channel


def restamp(path: Path, target: Target, opset: int | None, ir_version: int | None) -> None:
    """Rewrite the file at ``path`` with this opset and IR version; None leaves one as it is.

    Raises InputError when a version is not one that ONNX and the runtime here know, or when the runtime would run
    other kernels or compute other numbers.
    """
    if opset is None and ir_version is None:
        return
    before = onnx.load(str(path))
    model = before if opset is None else _converted(before, opset)
    model.ir_version = _ir_version(model, ir_version)
    changed = path.with_name(f".{path.name}.restamped")
    changed.write_bytes(model.SerializeToString())
    asked = f"opset {opset_of(model)}, IR version {model.ir_version}"
    try:
        _check_same(path, changed, target)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        changed.unlink()
        line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"--opset, --ir-version: the model cannot ship with {asked}: {line}.") from None
    changed.replace(path)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"--opset must be between {OLDEST_OPSET} and {newest}, but got {opset}.")
    try:
        return version_converter.convert_version(model, opset)
    except RuntimeError:  # it has no adapter downwards for many operators whose meaning never changed
        stamped = onnx.ModelProto.FromString(model.SerializeToString())
        del stamped.opset_import[:]
        stamped.opset_import.append(helper.make_opsetid("", opset))
        return stamped


def _ir_version(model: onnx.ModelProto, asked: int | None) -> int:
    least = helper.find_min_ir_version_for(list(model.opset_import))
    if asked is None:
        return max(least, model.ir_version)
    if not least <= asked <= onnx.IR_VERSION:
        raise InputError(
            f"--ir-version must be between {least}, the first with opset {opset_of(model)}, and {onnx.IR_VERSION}, "
            f"but got {asked}."
        )
    return asked


def _check_same(path: Path, changed: Path, target: Target) -> None:
    """Raises when the changed file is not valid, does not load, or is not the same model to the runtime."""
    onnx.checker.check_model(str(changed), full_check=True)
    if _kernels(path, target) != _kernels(changed, target):
        raise ValueError(f"ONNX Runtime {onnxruntime.__version__} runs other kernels for it")
    first, second = (probe_outputs(file, target) for file in (path, changed))
    difference = float(np.abs(first - second).max())
    if difference > 1e-6 * max(1.0, float(np.abs(first).max())):
        raise ValueError(f"its outputs differ by {difference:.2g}")


def probe_outputs(path: Path, target: Target) -> NDArray[np.float32]:
    """What the file answers to the inputs that every language can make. Raises ValueError when it does not load."""
    session = open_session(path, target_to_dict(target))
    if isinstance(session, str):
        raise ValueError(session)
    return outputs(session, probe_inputs(session.get_inputs()[0].shape[1:]))


def needs_options(path: Path, target: Target) -> bool:
    """Whether the runtime runs other kernels when the target's optimizers are not disabled."""
    return _kernels(path, target) != _kernels(path, replace(target, disabled_optimizers=()))


def _kernels(path: Path, target: Target) -> list[str]:
    return sorted(node.op_type for node in optimised_graph(path, target.disabled_optimizers).graph.node)
