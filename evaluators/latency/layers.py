"""Where an exported model's time and bytes go, layer by layer: the runtime's own profiler, and the file's tensors."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from ...spaces.anatomy import WEIGHTED, Anatomy
from .measure import KERNEL_PASSES, Timer
from .nodes import SUFFIX

ROUND_MS = 150
"""Shares are shown, not seconds: less spread in time will do, and a night has many files to look at."""

_PARAMETER = re.compile(r"\.(weight|bias)\b.*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Milliseconds and bytes of each layer that was found, by the module's name, and the milliseconds of all other
    kernels: additions, pooling, changes of precision and layout.

    The profiler slows what it watches: the sum lies above the latency that is measured without it.
    """

    layers: Mapping[str, Mapping[str, float]]
    other_ms: float


def layer_costs(path: Path, anatomy: Anatomy, timer: Timer) -> LayerCosts:
    """Profile an exported file of the anatomy's model. Raises MeasurementError."""
    owners = _owners(anatomy)
    found: dict[str, dict[str, float]] = {}
    other_ms = 0.0
    timing = timer.time(
        {"model": path}, None, least_rounds=KERNEL_PASSES, most_rounds=KERNEL_PASSES, kernels=True, round_ms=ROUND_MS
    )
    for name, kernel in timing["model"].kernels.items():
        layer = owners.get(_PARAMETER.sub("", SUFFIX.sub("", name)))
        if layer is None:
            other_ms += kernel.ms
        else:
            costs = found.setdefault(layer, {"ms": 0.0})
            costs["ms"] += kernel.ms
    for name, size_bytes in _tensors(path):
        layer = owners.get(_PARAMETER.sub("", name))
        if layer is not None and _PARAMETER.search(name):
            costs = found.setdefault(layer, {})
            costs["bytes"] = costs.get("bytes", 0) + size_bytes
    return LayerCosts(layers=found, other_ms=other_ms)


def _owners(anatomy: Anatomy) -> dict[str, str]:
    """Layer by the node that its kernel may be named after: its own, or an activation's that is fused into it."""
    owners = {op.name: op.module for op in anatomy.ops if op.kind in WEIGHTED and op.module}
    fused = {
        op.name: owners[op.inputs[0]]
        for op in anatomy.ops
        if len(op.inputs) == 1 and op.inputs[0] in owners and op.kind not in WEIGHTED
    }
    return fused | owners


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Each stored tensor's name and bytes."""
    for tensor in onnx.load(str(path)).graph.initializer:
        yield tensor.name, len(tensor.raw_data) or onnx.numpy_helper.to_array(tensor).nbytes
