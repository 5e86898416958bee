"""What a plan's file weighs: bytes of its numbers, and counts that the rest of it grows with."""

import math

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import Op
from ...spaces.plan import Plan
from ...spaces.plans import Choices, Plans, unpack
from ...spaces.policy import LayerBits
from .units import Worker

Array = NDArray[np.float64]

_VECTORS = {"batch_norm": 4.0, "layer_norm": 2.0, "group_norm": 2.0, "prelu": 1.0}


def payload_bytes(plan: Plan) -> int:
    """Bytes of all weights, scales and biases of the exported file; names and nodes come on top."""
    total = 0
    for planned in plan.ops:
        if planned.op.kind == "param":
            total += 4 * math.prod(planned.shape)
        total += round(4 * float(_numbers(planned.op, planned.channels)))
        if not planned.weight_count:
            continue
        cout = planned.channels
        each, channel = _bytes(planned.bits)
        total += planned.weight_count * each + cout * channel
    return total


def _numbers(op: Op, channels: Array | float) -> Array | float:
    """Numbers that the file holds for a norm or a PReLU of so many channels; 0 for others."""
    if op.attrs.get("shared"):
        return 0 * channels + 1
    groups = op.attrs["groups"] / op.shape[1] if op.kind == "group_norm" else 1
    each = _VECTORS.get(op.kind, 0.0) + (2 * groups if groups < 1 else 0.0)  # of the instance norm over its groups
    return each * channels


def _bytes(bits: LayerBits) -> tuple[int, int]:
    """Of a weight, and of an output channel: its bias, scale and zero point, and those of an integer bias."""
    stored = bits.weights <= 8
    each = 1 if stored else 2 if bits.weights == 16 else 4
    return each, 4 + (5 if stored else 4 if bits.weights == 16 else 0) + (8 if bits.int8 else 0)


def structure(plan: Plan) -> Array:
    """Counts that the rest of the file grows with, shape (5,): the file, operations, layers stored as integers,
    layers that run on integers, quantised tensors."""
    layers = [planned for planned in plan.ops if planned.weight_count]
    return np.array(
        [1, len(plan.ops), sum(p.bits.weights <= 8 for p in layers), sum(p.int8 for p in layers), len(plan.quantised)],
        dtype=np.float64,
    )


def batch_bytes(worker: Worker, choices: Choices, overheads: Array) -> Array:
    """Bytes of the files of a batch, shape (n,): what the two above say of each plan, with ``overheads`` for the
    counts."""
    planner, count = worker.planner, len(choices)
    plans = planner.plans(choices)
    alive = unpack(plans.alive, count)
    there = alive[worker.layers]
    bits = choices.bits.T[[planner.layer_of[int(position)] for position in worker.layers]]
    each, channel = np.array([_bytes(pair) for pair in choices.pairs], np.float64).T
    stored, int8 = (np.array(kind)[bits] & there for kind in
                    zip(*((pair.weights <= 8, pair.int8) for pair in choices.pairs), strict=True))  # fmt: skip
    weights = worker.weights(plans.axes) * each[bits] + worker.channels(plans.axes) * channel[bits]
    quantised = unpack([a & b for a, b in zip(plans.quantised, plans.alive, strict=True)], count)
    counts = [np.ones(count), *(part.sum(axis=0) for part in (alive, stored, int8, quantised))]
    payload = np.einsum("ln,ln->n", weights, there) + _unweighted(worker, plans, alive)
    return payload + np.round(np.stack(counts, axis=1) @ overheads)


def _unweighted(worker: Worker, plans: Plans, alive: NDArray[np.bool_]) -> Array:
    """Bytes of parameters that are no layer's and of norms of their own, shape (n,)."""
    found = np.zeros(plans.count)
    for position, op in enumerate(worker.anatomy.ops):
        rows = worker.planner.axis_of[position]
        if op.kind == "param":
            sizes = [size if row is None else plans.axes[row] for size, row in zip(op.shape, rows, strict=True)]
            found += 4 * math.prod(sizes) * alive[position]
        if op.kind in _VECTORS:
            row = rows[op.channel_axis]
            channels = op.shape[op.channel_axis] if row is None else plans.axes[row]
            found += np.round(4 * _numbers(op, channels)) * alive[position]
    return found
