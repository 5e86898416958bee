"""A plan as an ONNX file: real weights for the export, random ones for timing. One builder for both, so the
graph that was timed is node for node the graph that ships.

Quantised layers are written as QDQ: u8 activations, s8 weights per output channel, s32 biases. A layer of
b < 8 weight bits keeps its own grid of integers in ±(2^(b−1) − 1) inside the s8 tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..spaces.plan import Plan, PlannedOp

OPSET = 17  # read by every runtime of the last three years; QDQ per channel needs 13
IR_VERSION = 9
INPUT, OUTPUT = "input", "logits"
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """What one layer needs at inference. Integer layers: ``weight`` int8, ``scales`` fp32 (cout,).

    fp32 layers: ``weight`` fp32, ``scales`` None. ``bias`` is fp32 (cout,).
    """

    weight: Array
    scales: Array | None
    bias: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """All numbers of an export: layers by module name, activation grids (scale, zero point) by tensor,
    batch norms that no convolution absorbs as (scale, shift, mean, variance)."""

    layers: dict[str, LayerTensors]
    grids: dict[str, tuple[float, int]]
    norms: dict[str, tuple[Array, Array, Array, Array]]


def build_onnx(plan: Plan, tensors: Tensors, *, batch: int | None = 1, metadata: dict[str, str] | None = None) -> bytes:
    """The serialised ONNX model. ``batch`` None leaves the batch axis dynamic.

    Input ``input`` of shape (batch, …), output ``logits``. Raises onnx.checker.ValidationError when the
    result is not a valid model.
    """
    builder = _Builder(plan, tensors)
    for planned in plan.ops:
        builder.add(planned)
    source = next(op for op in plan.ops if op.op.kind == "input")
    result = next(op for op in plan.ops if op.op.name == plan.output)
    axis: int | str = "batch" if batch is None else batch
    builder.nodes.append(helper.make_node("Identity", [builder.value(plan.output)], [OUTPUT], name=OUTPUT))
    graph = helper.make_graph(
        _drop_final_identity(builder.nodes, builder.value(plan.output)),
        "nightpress",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [axis, *source.shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [axis, *result.shape])],
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
    """Numbers for timing: what a kernel costs depends on shapes and types, not on trained values."""
    generator = np.random.default_rng(seed)
    layers: dict[str, LayerTensors] = {}
    for planned in plan.ops:
        if not planned.weight_count or planned.op.module is None:
            continue
        shape = weight_shape(planned)
        cout = shape[0]
        if planned.bits.weights < 32:
            top = 2 ** (planned.bits.weights - 1) - 1
            weight: Array = generator.integers(-top, top + 1, size=shape).astype(np.int8)
            scales = np.full(cout, 0.05 / top, np.float32)
        else:
            weight, scales = generator.normal(0, 0.05, size=shape).astype(np.float32), None
        layers[planned.op.module] = LayerTensors(weight=weight, scales=scales, bias=np.full(cout, 0.01, np.float32))
    norms = {
        op.op.module: (np.ones(op.shape[0], np.float32), np.zeros(op.shape[0], np.float32),
                       np.zeros(op.shape[0], np.float32), np.ones(op.shape[0], np.float32))
        for op in plan.ops if op.op.kind == "batch_norm" and op.op.module
    }  # fmt: skip
    kinds = {op.op.name: op.op.kind for op in plan.ops}
    grids = {name: (0.02, 0 if kinds[name] in {"relu", "relu6"} else 128) for name in set(plan.quantised.values())}
    return Tensors(layers=layers, grids=grids, norms=norms)


def weight_shape(planned: PlannedOp) -> tuple[int, ...]:
    """Shape of a layer's weight: (cout, cin/groups, *kernel) or (cout, cin)."""
    cin = planned.in_shapes[0][0]
    if planned.op.kind == "conv":
        return (planned.shape[0], cin // planned.groups, *planned.op.attrs["kernel"])
    return (planned.shape[-1], planned.in_shapes[0][-1])


class _Builder:
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
        else:
            inputs = [self.value(name) for name in planned.inputs]
            result = _EMIT[op.kind](self, planned, inputs)
        self._reads[op.name] = self._quantise(op.name, result)

    def node(self, kind: str, inputs: list[str], name: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attrs))
        return name

    def constant(self, name: str, value: Array) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, planned: PlannedOp) -> list[str]:
        """Names of weight and bias, dequantised in the graph where they are integers."""
        name = planned.op.name
        tensors = self.tensors.layers[planned.op.module or ""]
        if tensors.scales is None:
            return [
                self.constant(f"{name}.weight", tensors.weight),
                self.constant(f"{name}.bias", tensors.bias),
            ]
        if not planned.int8:  # stored small, computed in fp32
            weight = self._dequantise(f"{name}.weight", tensors.weight, tensors.scales)
            return [weight, self.constant(f"{name}.bias", tensors.bias)]
        step = np.float32(self.tensors.grids[self.plan.quantised[planned.inputs[0]]][0])
        integers, scales = _with_room_for_bias(tensors.weight, tensors.scales, tensors.bias / step)
        biases = np.round(tensors.bias / (scales * step).astype(np.float64)).astype(np.int32)
        return [
            self._dequantise(f"{name}.weight", integers, scales),
            self._dequantise(f"{name}.bias", biases, scales * step),
        ]

    def _dequantise(self, name: str, integers: Array, scales: Array) -> str:
        inputs = [
            self.constant(f"{name}.q", integers),
            self.constant(f"{name}.scale", scales.astype(np.float32)),
            self.constant(f"{name}.zero", np.zeros(len(scales), integers.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=0)

    def _quantise(self, tensor: str, result: str) -> str:
        site = self.plan.quantised.get(tensor)
        if site is None:
            return result
        scale, zero_point = self.tensors.grids[site]
        grid = [
            self.constant(f"{tensor}.scale", np.array(scale, np.float32)),
            self.constant(f"{tensor}.zero", np.array(zero_point, np.uint8)),
        ]
        quantised = self.node("QuantizeLinear", [result, *grid], f"{tensor}.q")
        return self.node("DequantizeLinear", [quantised, *grid], f"{tensor}.dq")


def _with_room_for_bias(weight: Array, scales: Array, bias: Array) -> tuple[Array, Array]:
    """The integers and scales of a weight whose ``bias``, in steps of its input, fits into 32 bits with the sum.

    Only a channel whose weights have all but vanished changes: it gets a coarser scale.
    """
    coarse = np.maximum(scales, np.abs(bias) / np.float32(2**30)).astype(np.float32)
    finer = (scales / coarse).reshape(-1, *[1] * (weight.ndim - 1))
    return np.round(weight * finer).astype(np.int8), coarse


def _conv(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    attrs = planned.op.attrs
    return builder.node(
        "Conv", [*inputs, *builder.weight(planned)], planned.op.name,
        kernel_shape=list(attrs["kernel"]), strides=list(attrs["stride"]), pads=[*attrs["padding"], *attrs["padding"]],
        dilations=list(attrs["dilation"]), group=planned.groups,
    )  # fmt: skip


def _linear(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    return builder.node("Gemm", [*inputs, *builder.weight(planned)], planned.op.name, transB=1)


def _pool(kind: str) -> Callable[[_Builder, PlannedOp, list[str]], str]:
    def emit(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
        attrs = planned.op.attrs
        extra = {"count_include_pad": attrs["count_include_pad"]} if kind == "AveragePool" else {}
        return builder.node(
            kind, inputs, planned.op.name, kernel_shape=list(attrs["kernel"]), strides=list(attrs["stride"]),
            pads=[*attrs["padding"], *attrs["padding"]], ceil_mode=attrs["ceil"], **extra,
        )  # fmt: skip

    return emit


def _global_pool(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    if planned.op.attrs["keepdim"]:
        return builder.node("GlobalAveragePool", inputs, planned.op.name)
    pooled = builder.node("GlobalAveragePool", inputs, f"{planned.op.name}.pooled")
    return builder.node("Flatten", [pooled], planned.op.name, axis=1)


def _flatten(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    return builder.node("Flatten", inputs, planned.op.name, axis=1)


def _cat(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    return builder.node("Concat", inputs, planned.op.name, axis=1)


def _relu6(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    low = builder.constant(f"{planned.op.name}.low", np.array(0, np.float32))
    high = builder.constant(f"{planned.op.name}.high", np.array(6, np.float32))
    return builder.node("Clip", [*inputs, low, high], planned.op.name)


def _silu(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    gate = builder.node("Sigmoid", inputs, f"{planned.op.name}.gate")
    return builder.node("Mul", [*inputs, gate], planned.op.name)


def _gelu(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    name = planned.op.name
    root = builder.constant(f"{name}.root", np.array(np.sqrt(0.5), np.float32))
    erf = builder.node("Erf", [builder.node("Mul", [*inputs, root], f"{name}.scaled")], f"{name}.erf")
    one = builder.constant(f"{name}.one", np.array(1, np.float32))
    half = builder.constant(f"{name}.half", np.array(0.5, np.float32))
    gate = builder.node("Mul", [builder.node("Add", [erf, one], f"{name}.shifted"), half], f"{name}.gate")
    return builder.node("Mul", [*inputs, gate], name)


def _batch_norm(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
    name = planned.op.name
    parts = zip(("scale", "shift", "mean", "var"), builder.tensors.norms[planned.op.module or ""], strict=True)
    constants = [builder.constant(f"{name}.{key}", value) for key, value in parts]
    return builder.node("BatchNormalization", [*inputs, *constants], name, epsilon=planned.op.attrs["eps"])


def _simple(kind: str, **attrs: Any) -> Callable[[_Builder, PlannedOp, list[str]], str]:
    def emit(builder: _Builder, planned: PlannedOp, inputs: list[str]) -> str:
        return builder.node(kind, inputs, planned.op.name, **attrs)

    return emit


_EMIT: dict[str, Callable[[_Builder, PlannedOp, list[str]], str]] = {
    "conv": _conv,
    "linear": _linear,
    "max_pool": _pool("MaxPool"),
    "avg_pool": _pool("AveragePool"),
    "global_pool": _global_pool,
    "flatten": _flatten,
    "cat": _cat,
    "relu6": _relu6,
    "silu": _silu,
    "gelu": _gelu,
    "batch_norm": _batch_norm,
    "relu": _simple("Relu"),
    "sigmoid": _simple("Sigmoid"),
    "hardswish": _simple("HardSwish"),
    "hardsigmoid": _simple("HardSigmoid", alpha=1 / 6, beta=0.5),
    "add": _simple("Add"),
    "mul": _simple("Mul"),
}
KINDS = frozenset(_EMIT) | {"input"}


def _drop_final_identity(nodes: list[onnx.NodeProto], result: str) -> list[onnx.NodeProto]:
    """Let the last operation write the output itself, where it has one consumer: the added Identity."""
    *body, identity = nodes
    if sum(result in node.input for node in body):
        return nodes
    producer = next(node for node in body if result in node.output)
    producer.output[0] = identity.output[0]
    return body
