"""Where an exported model's time and bytes go, layer by layer: ONNX Runtime's own profiler, and the file's tensors."""

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from ...spaces.anatomy import WEIGHTED, Anatomy
from .target import Target

PASSES = 3
PASS_SECONDS = 0.1
LEAST_RUNS, MOST_RUNS = 5, 80
"""Of each pass; the profiler writes a line a kernel and run."""
# What the runtime's optimisers append to a node's name when they rewrite it, and the profiler to a kernel's.
_SUFFIX = re.compile(r"(_nchwc|_pre_q|_token_\d+|_kernel_time)+$")
_PARAMETER = re.compile(r"\.(weight|bias)\b.*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Milliseconds and bytes of each layer that was found, by the module's name, and the milliseconds of all other
    kernels: additions, pooling, changes of precision and layout.

    The profiler slows what it watches: the sum lies above the latency that is measured without it.
    """

    layers: Mapping[str, Mapping[str, float]]
    other_ms: float


def layer_costs(path: Path, anatomy: Anatomy, target: Target, *, pass_seconds: float = PASS_SECONDS) -> LayerCosts:
    """Profile an exported file of the anatomy's model. Raises RuntimeError with the runtime's reason in one line."""
    owners = _owners(anatomy)
    found: dict[str, dict[str, float]] = {}
    other_ms = 0.0
    for kernel, milliseconds in _kernels(path, target, pass_seconds).items():
        layer = owners.get(_PARAMETER.sub("", _SUFFIX.sub("", kernel)))
        if layer is None:
            other_ms += milliseconds
        else:
            costs = found.setdefault(layer, {"ms": 0.0})
            costs["ms"] += milliseconds
    for name, size_bytes in _tensors(path):
        layer = owners.get(_PARAMETER.sub("", name))
        if layer is not None and _PARAMETER.search(name):
            costs = found.setdefault(layer, {})
            costs["bytes"] = costs.get("bytes", 0) + size_bytes
    return LayerCosts(layers=found, other_ms=other_ms)


def _owners(anatomy: Anatomy) -> dict[str, str]:
    """Layer by the node that its kernel may be named after: its own, or an activation's that is fused into it."""
    owners = {layer.op: layer.name for layer in anatomy.layers}
    fused = {
        op.name: owners[op.inputs[0]]
        for op in anatomy.ops
        if len(op.inputs) == 1 and op.inputs[0] in owners and op.kind not in WEIGHTED
    }
    return fused | owners


def _kernels(path: Path, target: Target, pass_seconds: float) -> dict[str, float]:
    """Lowest duration of each kernel over passes that are spread in time, in ms."""
    lowest: dict[str, float] = {}
    for _ in range(PASSES):
        for event in _profile(path, target, pass_seconds):
            name = str(event["name"])
            milliseconds = event["dur"] / 1000
            lowest[name] = min(lowest.get(name, milliseconds), milliseconds)
    return lowest


def _profile(path: Path, target: Target, pass_seconds: float) -> Iterator[Mapping[str, Any]]:
    """The profiler's events of kernels over some runs."""
    with tempfile.TemporaryDirectory(prefix="nightpress-") as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"],
                disabled_optimizers=list(target.disabled_optimizers),
            )  # fmt: skip
            _run(session, target.batch, pass_seconds)
            written = session.end_profiling()
        except Exception as error:  # the runtime raises types of its own that share no base
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"ONNX Runtime cannot profile {path.name}: {reason}") from error
        events: list[Mapping[str, Any]] = json.loads(Path(written).read_text())
    yield from (e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time"))


def _run(session: Any, batch: int, seconds: float) -> None:
    source = session.get_inputs()[0]
    shape = [batch, *source.shape[1:]]
    feed = {source.name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    runs, end = 0, time.perf_counter() + seconds
    while runs < LEAST_RUNS or (runs < MOST_RUNS and time.perf_counter() < end):
        session.run(None, feed)
        runs += 1


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Each stored tensor's name and bytes."""
    for tensor in onnx.load(str(path)).graph.initializer:
        yield tensor.name, len(tensor.raw_data) or onnx.numpy_helper.to_array(tensor).nbytes
