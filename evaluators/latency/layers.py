"""Where an exported model's time and bytes go, layer by layer: the runtime's own profiler, and the file's tensors."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from ...spaces.anatomy import WEIGHTED, Anatomy
from .measure import KERNEL_PASSES, Timer
from .nodes import Matcher

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
    found: dict[str, dict[str, float]] = {}
    timing = timer.time(
        {"model": path}, None, least_rounds=KERNEL_PASSES, most_rounds=KERNEL_PASSES, kernels=True, round_ms=ROUND_MS
    )
    nodes = {name: (kernel.op_type, kernel.ms) for name, kernel in timing["model"].kernels.items()}
    timed = Matcher(anatomy).match(nodes)
    owners = {op.name: op.module for op in anatomy.ops if op.kind in WEIGHTED and op.module}
    for op, own in zip(anatomy.ops, np.stack([timed.kernels, timed.weights], axis=1), strict=True):
        if op.name in owners and not np.isnan(own).all():
            costs = found.setdefault(owners[op.name], {"ms": 0.0})
            costs["ms"] += float(np.nansum(own))
    other_ms = sum(ms for _, ms in nodes.values()) - sum(costs["ms"] for costs in found.values())
    for name, size_bytes in _tensors(path):
        layer = owners.get(_PARAMETER.sub("", name))
        if layer is not None and _PARAMETER.search(name):
            costs = found.setdefault(layer, {})
            costs["bytes"] = costs.get("bytes", 0) + size_bytes
    return LayerCosts(layers=found, other_ms=max(0.0, other_ms))


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Each stored tensor's name and bytes."""
    for tensor in onnx.load(str(path)).graph.initializer:
        yield tensor.name, len(tensor.raw_data) or onnx.numpy_helper.to_array(tensor).nbytes
