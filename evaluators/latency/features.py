"""What a plan costs, as physical terms: work on the grids that kernels really use, nodes, and conversions."""

import math

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import WEIGHTED
from ...spaces.plan import Plan, PlannedOp

TERMS = (
    "graph", "int8_conv_macs", "int8_conv_patches", "int8_depthwise_macs", "int8_linear_macs", "int8_elements",
    "int8_nodes", "fp32_conv_macs", "fp32_conv_macs_off_grid", "fp32_depthwise_macs", "fp32_linear_macs",
    "fp32_elements", "fp32_nodes", "other_int8_elements", "other_fp32_elements", "other_nodes",
    "quantise_elements", "dequantise_elements", "conversions", "stored_weights", "int8_weights", "fp32_weights",
    "product_macs",
)  # fmt: skip
_INDEX = {name: i for i, name in enumerate(TERMS)}
_FREE = frozenset({"input", "flatten", "reshape", "param"})
_NORM_VECTORS = {"batch_norm": 4, "layer_norm": 2}


def features(plan: Plan) -> NDArray[np.float64]:
    """Amount of each of :data:`TERMS`, shape (terms,): counts of MACs, elements, nodes.

    Kernels work on channels rounded up to 16 outputs and 4 inputs; fp32 convolutions whose inputs are off
    the grid of 4 run in the slow layout and are counted apart; every change of precision costs.
    """
    amounts = np.zeros(len(TERMS))
    amounts[_INDEX["graph"]] = 1
    for planned in plan.ops:
        for term, amount in _terms(planned):
            amounts[_INDEX[term]] += amount
    for term, amount in _conversions(plan):
        amounts[_INDEX[term]] += amount
    return amounts


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


def _terms(planned: PlannedOp) -> list[tuple[str, float]]:
    kind, elements = planned.op.kind, math.prod(planned.shape)
    if kind in _FREE:
        return []
    precision = "int8" if planned.int8 else "fp32"
    if kind in {"attention", "matmul"}:
        return [("product_macs", _product_macs(planned)), ("other_fp32_elements", elements), ("other_nodes", 1)]
    if kind not in WEIGHTED:
        return [(f"other_{precision}_elements", elements), ("other_nodes", 0 if kind == "relu" else 1)]
    terms = [
        (f"{precision}_elements", elements),
        (f"{precision}_nodes", 1.0),
        (f"{precision}_weights", planned.weight_count),
    ]
    if planned.bits.weights <= 8 and not planned.int8:
        terms.append(("stored_weights", planned.weight_count))
    if kind == "linear":
        return [*terms, (f"{precision}_linear_macs", planned.macs)]
    return terms + _conv_terms(planned, precision)


def _conv_terms(planned: PlannedOp, precision: str) -> list[tuple[str, float]]:
    cin, cout = planned.in_shapes[0][1], planned.shape[1]
    if planned.groups == cout and cout > 1:
        return [(f"{precision}_depthwise_macs", planned.macs)]
    padded = planned.macs * (_up(cout, 16) / cout) * (_up(cin, 4) / cin)
    if precision == "int8":
        patches = math.prod(planned.shape[2:]) * cin * math.prod(planned.op.attrs["kernel"])
        return [("int8_conv_macs", padded), ("int8_conv_patches", patches)]
    on_grid = cin % 4 == 0 or cin < 16
    return [("fp32_conv_macs" if on_grid else "fp32_conv_macs_off_grid", padded)]


def _conversions(plan: Plan) -> list[tuple[str, float]]:
    by_name = {planned.op.name: planned for planned in plan.ops}
    read_in_fp32 = {
        name for planned in plan.ops if not planned.int8 and planned.op.kind not in {"relu", "relu6"}
        for name in planned.inputs
    }  # fmt: skip
    terms: list[tuple[str, float]] = []
    for name, planned in by_name.items():
        if name not in plan.quantised or planned.op.kind in _FREE - {"input"}:
            continue
        elements = math.prod(planned.shape)
        if not _made_of_integers(planned, by_name):
            terms += [("quantise_elements", elements), ("conversions", 1.0)]
        if name in read_in_fp32:
            terms += [("dequantise_elements", elements), ("conversions", 1.0)]
    return terms


def _made_of_integers(planned: PlannedOp, by_name: dict[str, PlannedOp]) -> bool:
    if planned.op.kind in {"relu", "relu6"}:
        return by_name[planned.inputs[0]].int8
    # Over tokens a linear layer's sum is not requantised, because its bias is added in fp32.
    return planned.int8 and not (planned.op.kind == "linear" and len(planned.shape) > 2)


def _product_macs(planned: PlannedOp) -> int:
    """Multiply-accumulates of products of two tensors: scores and values of an attention, one product else."""
    if planned.op.kind == "matmul":
        return math.prod(planned.shape) * planned.in_shapes[0][-1]
    query, key, value = planned.in_shapes[:3]
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _up(value: int, step: int) -> int:
    return math.ceil(value / step) * step
