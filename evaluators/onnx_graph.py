"""A plan as an ONNX file: real weights for the export, random ones for timing. One builder for both, so the
graph that was timed is node for node the graph that ships.

Quantised layers are written as QDQ: u8 activations, s8 weights per output channel, s32 biases. A layer of
b < 8 weight bits keeps its own grid of integers in ±(2^(b−1) − 1) inside the s8 tensor.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..spaces.plan import Plan, PlannedOp, bias_refinement
from .onnx_ops import EMIT, INPUT, OUTPUT

OPSET = 17  # read by every runtime of the last three years; QDQ per channel needs 13
IR_VERSION = 9
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """What one layer needs at inference: ``weight`` int8 or, stored in 16 bits, fp16, with ``scales`` fp32 (cout,);
    or ``weight`` fp32 with ``scales`` None. ``bias`` is fp32 (cout,)."""

    weight: Array
    scales: Array | None
    bias: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """All numbers of an export: layers by module name, activation grids (scale, zero point) by tensor, constants by
    operation, and by module name the vectors of what no convolution absorbs: of a batch norm (scale, shift, mean,
    variance), of a layer or group norm the first two, of a PReLU its slopes."""

    layers: dict[str, LayerTensors]
    grids: dict[str, tuple[float, int]]
    norms: dict[str, tuple[Array, ...]]
    constants: dict[str, Array]


def build_onnx(plan: Plan, tensors: Tensors, *, batch: int | None = 1, metadata: dict[str, str] | None = None) -> bytes:
    """The serialised ONNX model. ``batch`` None leaves the batch axis dynamic.

    Input ``input`` of shape (batch, …), output ``logits``. Raises onnx.checker.ValidationError when the
    result is not a valid model.
    """
    builder = Builder(plan, tensors)
    for planned in plan.ops:
        builder.add(planned)
    source = next(op for op in plan.ops if op.op.kind == "input")
    result = next(op for op in plan.ops if op.op.name == plan.output)
    axis: int | str = "batch" if batch is None else batch
    builder.nodes.append(helper.make_node("Identity", [builder.value(plan.output)], [OUTPUT], name=OUTPUT))
    graph = helper.make_graph(
        _drop_final_identity(builder.nodes, builder.value(plan.output)),
        "nightpress",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [axis, *source.shape[1:]])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, _declared(result, axis))],
        builder.initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="nightpress",
    )
    for key, value in sorted((metadata or {}).items()):
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def random_tensors(plan: Plan, seed: int = 0) -> Tensors:
    """Numbers for timing: what a kernel costs depends on shapes and types, not on trained values. No two are the same,
    because the runtime merges constants that are."""
    generator = np.random.default_rng(seed)
    layers: dict[str, LayerTensors] = {}
    for planned in plan.ops:
        if not planned.weight_count or planned.op.module is None:
            continue
        shape = weight_shape(planned)
        cout = shape[0]
        if planned.bits.weights <= 8:
            top = 2 ** (planned.bits.weights - 1) - 1
            weight: Array = generator.integers(-top, top + 1, size=shape).astype(np.int8)
            scales = generator.uniform(0.04, 0.06, cout).astype(np.float32) / top
        elif planned.bits.weights == 16:
            weight = generator.normal(0, 0.05, size=shape).astype(np.float16)
            scales = generator.uniform(0.9, 1.1, cout).astype(np.float32)
        else:
            weight, scales = generator.normal(0, 0.05, size=shape).astype(np.float32), None
        bias = generator.normal(0, 0.01, cout).astype(np.float32)
        layers[planned.op.module] = LayerTensors(weight=weight, scales=scales, bias=bias)
    norms: dict[str, tuple[Array, ...]] = {
        op.op.module: tuple(np.full(vector_length(op), fill, np.float32) for fill in _NORM_FILLS[op.op.kind])
        for op in plan.ops
        if op.op.kind in _NORM_FILLS and op.op.module
    }
    constants: dict[str, Array] = {
        op.op.name: np.zeros(op.shape, np.float32) for op in plan.ops if op.op.kind == "param"
    }
    positive = _never_negative(plan)
    grids = {
        # No grid reaches above 6: what reaches beyond a ReLU6 would keep it apart.
        name: (float(generator.uniform(0.015, 0.023)), 0 if name in positive else int(generator.integers(100, 156)))
        for name in sorted(set(plan.quantised.values()))
    }
    return Tensors(layers=layers, grids=grids, norms=norms, constants=constants)


def _never_negative(plan: Plan) -> set[str]:
    """Tensors whose grid begins at 0 in every export. The runtime drops a ReLU in front of such a grid."""
    found: set[str] = set()
    for planned in plan.ops:
        if planned.op.kind in _POSITIVE or (
            planned.op.kind in _KEEP_SIGNS and planned.inputs and found.issuperset(planned.inputs)
        ):
            found.add(planned.op.name)
    return found


def weight_shape(planned: PlannedOp) -> tuple[int, ...]:
    """Shape of a layer's weight: (cout, cin/groups, *kernel) or (cout, cin)."""
    if planned.op.kind == "conv":
        return (planned.shape[1], planned.in_shapes[0][1] // planned.groups, *planned.op.attrs["kernel"])
    return (planned.shape[-1], planned.in_shapes[0][-1])


_POSITIVE = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "abs", "exp", "sqrt"})
_KEEP_SIGNS = frozenset({
    "max_pool", "avg_pool", "global_pool", "flatten", "reshape", "permute", "slice", "select", "cat", "add", "mul",
    "mean", "resize", "expand", "roll",
})  # fmt: skip
_NORM_FILLS = {"batch_norm": (1, 0, 0, 1), "layer_norm": (1, 0), "group_norm": (1, 0), "prelu": (0.25,)}


def vector_length(planned: PlannedOp) -> int:
    """Numbers in each vector of a norm or a PReLU."""
    return 1 if planned.op.attrs.get("shared") else planned.channels


def _declared(result: PlannedOp, batch: int | str) -> list[int | str]:
    sizes: list[int | str] = list(result.shape)
    if result.op.batch_axis is not None:
        times = result.shape[result.op.batch_axis]
        sizes[result.op.batch_axis] = (
            times * batch if isinstance(batch, int) else batch if times == 1 else f"{times}*{batch}"
        )
    return sizes


class Builder:
    """Collects nodes and initializers; ``value`` says what a consumer of a tensor reads."""

    def __init__(self, plan: Plan, tensors: Tensors) -> None:
        self.plan = plan
        self.tensors = tensors
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._reads: dict[str, str] = {}

    def value(self, name: str) -> str:
        return self._reads[name]

    def add(self, planned: PlannedOp) -> None:
        op = planned.op
        if op.kind == "input":
            result = INPUT
        elif op.kind == "param":
            result = self.constant(op.name, self.tensors.constants[op.name])
        else:
            inputs = [self.value(name) for name in planned.inputs]
            result = EMIT[op.kind](self, planned, inputs)
        self._reads[op.name] = self._quantise(op.name, result)

    def node(self, kind: str, inputs: list[str], name: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attrs))
        return name

    def constant(self, name: str, value: Array) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, planned: PlannedOp, *, axis: int = 0) -> list[str]:
        """Names of weight and bias, dequantised in the graph where they are integers. The output channels stand along
        ``axis`` of the weight: 1 turns that of a linear layer."""
        name = planned.op.name
        tensors = self.tensors.layers[planned.op.module or ""]
        values = tensors.weight if axis == 0 else np.ascontiguousarray(tensors.weight.T)
        bias = tensors.bias
        if tensors.scales is None:
            return [self.constant(f"{name}.weight", values), self.constant(f"{name}.bias", bias)]
        if values.dtype == np.float16:
            return [self._widened(f"{name}.weight", values, tensors.scales, axis), self.constant(f"{name}.bias", bias)]
        if not planned.int8_bias:
            weight = self._dequantise(f"{name}.weight", values, tensors.scales, axis)
            return [weight, self.constant(f"{name}.bias", bias)]
        site = self.plan.quantised[planned.inputs[0]]
        step = np.float32(self.tensors.grids[site][0])
        factor = bias_refinement(planned.bits.weights, self.plan.activation_bits[site])
        integers, scales = _with_room_for_bias(tensors.weight * np.int8(factor), tensors.scales / factor, bias / step)
        biases = np.round(bias / (scales * step).astype(np.float64)).astype(np.int32)
        return [
            self._dequantise(f"{name}.weight", integers, scales),
            self._dequantise(f"{name}.bias", biases, scales * step),
        ]

    def _widened(self, name: str, halves: Array, scales: Array, axis: int) -> str:
        """Weights stored in 16 bits; the runtime computes with 32 and widens them when it loads the file."""
        whole = self.node("Cast", [self.constant(f"{name}.half", halves)], f"{name}.wide", to=TensorProto.FLOAT)
        shape = [1] * halves.ndim
        shape[axis] = -1
        factor = self.constant(f"{name}.factor", scales.astype(np.float32).reshape(shape))
        return self.node("Mul", [whole, factor], name)

    def _dequantise(self, name: str, integers: Array, scales: Array, axis: int = 0) -> str:
        inputs = [
            self.constant(f"{name}.q", integers),
            self.constant(f"{name}.scale", scales.astype(np.float32)),
            self.constant(f"{name}.zero", np.zeros(len(scales), integers.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=axis)

    def _quantise(self, tensor: str, result: str) -> str:
        site = self.plan.quantised.get(tensor)
        if site is None:
            return result
        scale, zero_point = self.tensors.grids[site]
        grid = [
            self.constant(f"{tensor}.grid.scale", np.array(scale, np.float32)),
            self.constant(f"{tensor}.grid.zero", np.array(zero_point, np.uint8)),
        ]
        quantised = self.node("QuantizeLinear", [result, *grid], f"{tensor}.q")
        bits = self.plan.activation_bits[site]
        if bits < 8:  # the grid ends before the byte does
            ends = [np.array(end, np.uint8) for end in (0, 2**bits - 1)]
            limits = [self.constant(f"{tensor}.{n}", end) for n, end in zip(("least", "most"), ends, strict=True)]
            quantised = self.node("Clip", [quantised, *limits], f"{tensor}.clipped")
        return self.node("DequantizeLinear", [quantised, *grid], f"{tensor}.dq")


def _with_room_for_bias(weight: Array, scales: Array, bias: Array) -> tuple[Array, Array]:
    """The integers and scales of a weight whose ``bias``, in steps of its input, fits into 32 bits with the sum.

    Only a channel whose weights have all but vanished changes: it gets a coarser scale.
    """
    coarse = np.maximum(scales, np.abs(bias) / np.float32(2**30)).astype(np.float32)
    finer = (scales / coarse).reshape(-1, *[1] * (weight.ndim - 1))
    return np.round(weight * finer).astype(np.int8), coarse


def _drop_final_identity(nodes: list[onnx.NodeProto], result: str) -> list[onnx.NodeProto]:
    """Let the last operation write the output itself, where it has one consumer: the added Identity."""
    *body, identity = nodes
    if sum(result in node.input for node in body):
        return nodes
    producer = next(node for node in body if result in node.output)
    producer.output[0] = identity.output[0]
    return body
