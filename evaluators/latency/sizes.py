"""What a plan's file weighs: bytes of its numbers, and counts that the rest of it grows with."""

import math

import numpy as np
from numpy.typing import NDArray

from ...spaces.plan import Plan

_NORM_VECTORS = {"batch_norm": 4, "layer_norm": 2}


def payload_bytes(plan: Plan) -> int:
    """Bytes of all weights, scales and biases of the exported file; names and nodes come on top."""
    total = 0
    for planned in plan.ops:
        if planned.op.kind == "param":
            total += 4 * math.prod(planned.shape)
        if planned.op.kind in _NORM_VECTORS:
            total += 4 * _NORM_VECTORS[planned.op.kind] * planned.channels
        if not planned.weight_count:
            continue
        cout = planned.channels
        stored = planned.bits.weights <= 8
        bytes_each = 1 if stored else 2 if planned.bits.weights == 16 else 4
        total += planned.weight_count * bytes_each + 4 * cout  # the bias
        total += 5 * cout if stored else 4 * cout if planned.bits.weights == 16 else 0  # scale, zero point
        total += 8 * cout if planned.int8 else 0  # those of the integer bias
    return total


def structure(plan: Plan) -> NDArray[np.float64]:
    """Counts that the rest of the file grows with, shape (5,): the file, operations, layers stored as integers,
    layers that run on integers, quantised tensors."""
    layers = [planned for planned in plan.ops if planned.weight_count]
    return np.array(
        [1, len(plan.ops), sum(p.bits.weights <= 8 for p in layers), sum(p.int8 for p in layers), len(plan.quantised)],
        dtype=np.float64,
    )
