"""How each kind of operation is written in ONNX."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..spaces.plan import PlannedOp
from .lower_shapes import PADDING

if TYPE_CHECKING:
    from .onnx_graph import Array, Builder

INPUT, OUTPUT = "input", "logits"
_Emit = Callable[["Builder", PlannedOp, list[str]], str]


def _conv(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    attrs = planned.op.attrs
    return builder.node(
        "Conv", [*inputs, *builder.weight(planned)], planned.op.name,
        kernel_shape=list(attrs["kernel"]), strides=list(attrs["stride"]),
        pads=[*attrs["padding"], *attrs.get("padding_behind", attrs["padding"])],
        dilations=list(attrs["dilation"]), group=planned.groups,
    )  # fmt: skip


def _linear(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    if len(planned.shape) > 2:
        return _matmul_layer(builder, planned, inputs)
    return builder.node("Gemm", [*inputs, *builder.weight(planned)], planned.op.name, transB=1)


def _pool(kind: str) -> _Emit:
    def emit(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
        attrs = planned.op.attrs
        extra = {"count_include_pad": attrs["count_include_pad"]} if kind == "AveragePool" else {}
        return builder.node(
            kind, inputs, planned.op.name, kernel_shape=list(attrs["kernel"]), strides=list(attrs["stride"]),
            pads=[*attrs["padding"], *attrs["padding"]], ceil_mode=attrs["ceil"], **extra,
        )  # fmt: skip

    return emit


def _flatten(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    return builder.node("Flatten", inputs, planned.op.name, axis=1)


def _rsqrt(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    return builder.node("Reciprocal", [builder.node("Sqrt", inputs, f"{planned.op.name}.root")], planned.op.name)


def _cat(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    return builder.node("Concat", inputs, planned.op.name, axis=planned.op.attrs["axis"])


def _relu6(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    if builder.plan.activation_bits.get(planned.op.name, 8) < 8:
        # The grid ends at 6 before the byte does: the runtime absorbs the lower limit, the integers keep the upper.
        return builder.node("Relu", inputs, planned.op.name)
    low = builder.constant(f"{planned.op.name}.low", np.array(0, np.float32))
    high = builder.constant(f"{planned.op.name}.high", np.array(6, np.float32))
    return builder.node("Clip", [*inputs, low, high], planned.op.name)


def _silu(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    gate = builder.node("Sigmoid", inputs, f"{planned.op.name}.gate")
    return builder.node("Mul", [*inputs, gate], planned.op.name)


def _gelu(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    """x/2·(1 + erf(x/√2))."""
    if planned.op.attrs["approximate"] != "none":
        return _tanh_gelu(builder, planned, inputs)
    name = planned.op.name
    root = builder.constant(f"{name}.root", np.array(np.sqrt(0.5), np.float32))
    erf = builder.node("Erf", [builder.node("Mul", [*inputs, root], f"{name}.scaled")], f"{name}.erf")
    one = builder.constant(f"{name}.one", np.array(1, np.float32))
    half = builder.constant(f"{name}.half", np.array(0.5, np.float32))
    gate = builder.node("Mul", [builder.node("Add", [erf, one], f"{name}.shifted"), half], f"{name}.gate")
    return builder.node("Mul", [*inputs, gate], name)


def _batch_norm(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    name = planned.op.name
    parts = zip(("scale", "shift", "mean", "var"), builder.tensors.norms[planned.op.module or ""], strict=True)
    constants = [builder.constant(f"{name}.{key}", value) for key, value in parts]
    return builder.node("BatchNormalization", [*inputs, *constants], name, epsilon=planned.op.attrs["eps"])


def _simple(kind: str, **attrs: Any) -> _Emit:
    def emit(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
        return builder.node(kind, inputs, planned.op.name, **attrs)

    return emit


def _matmul_layer(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    """A linear layer over the last axis of a tensor of more than two: the runtime's matrix product, then the bias."""
    name = planned.op.name
    weight, bias = builder.weight(planned, axis=1)
    if "bias" not in planned.op.params:
        builder.initializers.pop()
        return builder.node("MatMul", [*inputs, weight], name)
    return builder.node("Add", [builder.node("MatMul", [*inputs, weight], f"{name}.product"), bias], name)


def _shaped(values: list[int]) -> Any:
    return np.array(values, np.int64)


def _reshape(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    shape = builder.constant(f"{planned.op.name}.shape", _shaped(planned.run_time_shape))
    return builder.node("Reshape", [*inputs, shape], planned.op.name)


def _permute(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    return builder.node("Transpose", inputs, planned.op.name, perm=list(planned.op.attrs["order"]))


def _cut(builder: "Builder", name: str, source: str, axis: int, start: int, end: int, step: int = 1) -> str:
    ends = zip(("start", "end", "axis", "step"), (start, end, axis, step), strict=True)
    return builder.node("Slice", [source, *(builder.constant(f"{name}.{k}", _shaped([v])) for k, v in ends)], name)


def _slice(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    axis, step = planned.op.attrs["axis"], planned.op.attrs["step"]
    end = planned.start + (planned.shape[axis] - 1) * step + 1
    return _cut(builder, planned.op.name, inputs[0], axis, planned.start, end, step)


def _select(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    index = builder.constant(f"{planned.op.name}.index", np.array(planned.op.attrs["index"], np.int64))
    return builder.node("Gather", [*inputs, index], planned.op.name, axis=planned.op.attrs["axis"])


def _expand(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    """To as many examples as the input has."""
    name = planned.op.name
    batch = _cut(builder, f"{name}.batch", builder.node("Shape", [INPUT], f"{name}.sizes"), 0, 0, 1)
    axis = planned.op.batch_axis or 0
    parts = [
        *([builder.constant(f"{name}.before", _shaped(list(planned.shape[:axis])))] if axis else []),
        batch,
        builder.constant(f"{name}.after", _shaped(list(planned.shape[axis + 1 :]))),
    ]
    return builder.node("Expand", [*inputs, builder.node("Concat", parts, f"{name}.shape", axis=0)], name)


def _roll(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    name, value = planned.op.name, inputs[0]
    steps = list(zip(planned.op.attrs["axes"], planned.op.attrs["shifts"], strict=True))
    for number, (axis, shift) in enumerate(steps):
        size = planned.shape[axis]
        cut = -shift % size
        parts = [
            _cut(builder, f"{name}.{number}.tail", value, axis, cut, size),
            _cut(builder, f"{name}.{number}.head", value, axis, 0, cut),
        ]
        value = builder.node("Concat", parts, name if number == len(steps) - 1 else f"{name}.{number}", axis=axis)
    return value


def _pad(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    amounts = builder.constant(
        f"{planned.op.name}.amounts", _shaped([*planned.op.attrs["before"], *planned.op.attrs["after"]])
    )
    return builder.node("Pad", [*inputs, amounts], planned.op.name, mode=PADDING[planned.op.attrs["mode"]])


def _reduced(kind: str) -> _Emit:
    def emit(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
        axes, keepdims = list(planned.op.attrs["axes"]), int(planned.op.attrs["keepdim"])
        if kind != "ReduceSum":
            return builder.node(kind, inputs, planned.op.name, axes=axes, keepdims=keepdims)
        along = builder.constant(f"{planned.op.name}.axes", _shaped(axes))  # it alone takes them as an input
        return builder.node(kind, [*inputs, along], planned.op.name, keepdims=keepdims)

    return emit


def _resize(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    attrs, before = planned.op.attrs, planned.in_shapes[0][2:]
    factors = [_factor(to, of) for to, of in zip(attrs["size"], before, strict=True)]
    if attrs["mode"] == "nearest":
        picked = [_nearest(to, of) for to, of in zip(attrs["size"], before, strict=True)]
        if any((np.arange(len(p), dtype=np.float32) // f != p).any() for p, f in zip(picked, factors, strict=True)):
            return _gathered(builder, planned.op.name, inputs[0], picked)
    scales = builder.constant(f"{planned.op.name}.scales", np.array([1, 1, *factors], np.float32))
    mode = "asymmetric" if attrs["mode"] == "nearest" else "align_corners" if attrs["align_corners"] else "half_pixel"
    return builder.node(
        "Resize", [*inputs, "", scales], planned.op.name, mode=attrs["mode"], coordinate_transformation_mode=mode,
        nearest_mode="floor",
    )  # fmt: skip


def _factor(size: int, before: int) -> np.float32:
    """The factor of a resize. The runtime rounds the size that it leads to down; more than that would move pixels."""
    factor = np.float32(size / before)
    return factor if int(factor * np.float32(before)) == size else np.nextafter(factor, np.float32(np.inf))


def _nearest(size: int, before: int) -> "Array":
    """The pixels that torch picks: ⌊i·before/size⌋ in fp32."""
    pixels = np.floor(np.arange(size, dtype=np.float32) * np.float32(before / size)).astype(np.int64)
    return np.minimum(pixels, before - 1)


def _gathered(builder: "Builder", name: str, value: str, pixels: "list[Array]") -> str:
    """Pixels by their numbers, for sizes where the runtime's resize would round to a neighbour of torch's."""
    rows = builder.constant(f"{name}.rows", pixels[0])
    columns = builder.constant(f"{name}.columns", pixels[1])
    return builder.node(
        "Gather", [builder.node("Gather", [value, rows], f"{name}.picked", axis=2), columns], name, axis=3
    )


def _attention(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    """softmax(q·kᵀ·scale + mask)·v (Vaswani et al. 2017, eq. 1)."""
    name, rank = planned.op.name, len(planned.shape)
    query, key, value = inputs[:3]
    order = [*range(rank - 2), rank - 1, rank - 2]
    turned = builder.node("Transpose", [key], f"{name}.turned", perm=order)
    scale = builder.constant(f"{name}.scale", np.array(planned.op.attrs["scale"], np.float32))
    scaled = builder.node("Mul", [query, scale], f"{name}.scaled")
    scores = builder.node("MatMul", [scaled, turned], f"{name}.scores")
    if len(inputs) > 3:
        scores = builder.node("Add", [scores, inputs[3]], f"{name}.masked")
    return builder.node("MatMul", [builder.node("Softmax", [scores], f"{name}.shares", axis=-1), value], name)


def _binary(kind: str) -> _Emit:
    def emit(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
        if "constant" in planned.op.attrs:
            number = np.array(planned.op.attrs["constant"], np.float32)
            inputs = [*inputs, builder.constant(f"{planned.op.name}.constant", number)]
        return builder.node(kind, inputs, planned.op.name)

    return emit


def _clip(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    ends = ((end, planned.op.attrs[end]) for end in ("low", "high"))
    limits = [
        builder.constant(f"{planned.op.name}.{end}", np.array(value, np.float32)) if math.isfinite(value) else ""
        for end, value in ends
    ]
    return builder.node("Clip", [*inputs, *limits], planned.op.name)


def _mish(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    soft = builder.node("Softplus", inputs, f"{planned.op.name}.soft")
    return builder.node("Mul", [*inputs, builder.node("Tanh", [soft], f"{planned.op.name}.gate")], planned.op.name)


def _layer_norm(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    name = planned.op.name
    scale, shift = builder.tensors.norms[planned.op.module or ""]
    constants = [builder.constant(f"{name}.gain", scale), builder.constant(f"{name}.shift", shift)]
    return builder.node("LayerNormalization", [*inputs, *constants], name, axis=-1, epsilon=planned.op.attrs["eps"])


def _group_norm(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    """An instance norm over the channels of each group; opset 17 has no node for it."""
    name, groups, channels = planned.op.name, planned.groups, planned.channels
    gain, shift = builder.tensors.norms[planned.op.module or ""]
    eps = planned.op.attrs["eps"]
    if groups == channels:
        constants = [builder.constant(f"{name}.gain", gain), builder.constant(f"{name}.shift", shift)]
        return builder.node("InstanceNormalization", [*inputs, *constants], name, epsilon=eps)
    apart = builder.constant(f"{name}.apart", _shaped([0, groups, -1]))
    whole = builder.constant(f"{name}.whole", _shaped(planned.run_time_shape))
    ones = builder.constant(f"{name}.ones", np.ones(groups, np.float32))
    zeros = builder.constant(f"{name}.zeros", np.zeros(groups, np.float32))
    parts = builder.node("Reshape", [*inputs, apart], f"{name}.groups")
    normal = builder.node("InstanceNormalization", [parts, ones, zeros], f"{name}.normal", epsilon=eps)
    value = builder.node("Reshape", [normal, whole], f"{name}.together")
    per_channel = (-1, *[1] * (len(planned.shape) - 2))
    scaled = builder.node("Mul", [value, builder.constant(f"{name}.gain", gain.reshape(per_channel))], f"{name}.scaled")
    return builder.node("Add", [scaled, builder.constant(f"{name}.shift", shift.reshape(per_channel))], name)


def _prelu(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    [slope] = builder.tensors.norms[planned.op.module or ""]
    slope = slope.reshape(-1, *[1] * (len(planned.shape) - 2))
    return builder.node("PRelu", [*inputs, builder.constant(f"{planned.op.name}.slope", slope)], planned.op.name)


def _along(kind: str) -> _Emit:
    def emit(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
        return builder.node(kind, inputs, planned.op.name, axis=planned.op.attrs["axis"])

    return emit


def _tanh_gelu(builder: "Builder", planned: PlannedOp, inputs: list[str]) -> str:
    """x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))) (Hendrycks & Gimpel 2016)."""
    name = planned.op.name

    def number(key: str, value: float) -> str:
        return builder.constant(f"{name}.{key}", np.array(value, np.float32))

    square = builder.node("Mul", [*inputs, *inputs], f"{name}.square")
    bent = builder.node("Mul", [square, number("bend", 0.044715)], f"{name}.bent")
    factor = builder.node("Add", [bent, number("one", 1.0)], f"{name}.factor")
    inner = builder.node("Mul", [*inputs, factor], f"{name}.inner")
    gate = builder.node(
        "Tanh", [builder.node("Mul", [inner, number("root", math.sqrt(2 / math.pi))], f"{name}.scaled")], f"{name}.tanh"
    )
    shifted = builder.node("Add", [gate, number("again", 1.0)], f"{name}.shifted")
    half = builder.node("Mul", [shifted, number("half", 0.5)], f"{name}.gate")
    return builder.node("Mul", [*inputs, half], name)


EMIT: dict[str, _Emit] = {
    "conv": _conv,
    "linear": _linear,
    "max_pool": _pool("MaxPool"),
    "avg_pool": _pool("AveragePool"),
    "global_pool": _simple("GlobalAveragePool"),
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
    "tanh": _simple("Tanh"),
    "exp": _simple("Exp"),
    "sqrt": _simple("Sqrt"),
    "abs": _simple("Abs"),
    "erf": _simple("Erf"),
    "neg": _simple("Neg"),
    "softplus": _simple("Softplus"),
    "mish": _mish,
    "clip": _clip,
    "leaky_relu": lambda builder, planned, inputs: builder.node(
        "LeakyRelu", inputs, planned.op.name, alpha=planned.op.attrs["slope"]
    ),
    "elu": lambda builder, planned, inputs: builder.node(
        "Elu", inputs, planned.op.name, alpha=planned.op.attrs["alpha"]
    ),
    "softmax": _along("Softmax"),
    "log_softmax": _along("LogSoftmax"),
    "group_norm": _group_norm,
    "prelu": _prelu,
    "pixel_shuffle": lambda builder, planned, inputs: builder.node(
        "DepthToSpace", inputs, planned.op.name, blocksize=planned.op.attrs["factor"], mode="CRD"
    ),
    "log": _simple("Log"),
    "rsqrt": _rsqrt,
    "reciprocal": _simple("Reciprocal"),
    "selu": _simple("Selu"),
    "pow": _binary("Pow"),
    "maximum": _binary("Max"),
    "minimum": _binary("Min"),
    "layer_norm": _layer_norm,
    "attention": _attention,
    "matmul": _simple("MatMul"),
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "expand": _expand,
    "roll": _roll,
    "pad": _pad,
    "mean": _reduced("ReduceMean"),
    "sum": _reduced("ReduceSum"),
    "amax": _reduced("ReduceMax"),
    "resize": _resize,
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
}
