"""The uncompressed model as a file of some kilobytes, to measure an export's speed against anywhere.

Its graph is the original's, but its large fp32 weights are computed: sin(1), sin(2), … , which ONNX Runtime folds into
constants when it loads the file. What a kernel costs depends on shapes and types, not on trained values.
"""

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGE = 256
"""Values from which on a tensor is computed rather than stored."""


def light_reference(model: onnx.ModelProto) -> bytes:
    """The serialised model with its large weights computed, scaled like a He initialisation so that nothing
    overflows or becomes denormal. Raises onnx.checker.ValidationError when the result is not valid."""
    light = onnx.ModelProto.FromString(model.SerializeToString())
    graph, stored, computed = light.graph, list(light.graph.initializer), list[onnx.NodeProto]()
    del graph.initializer[:]
    for tensor in stored:
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) >= LARGE:
            computed += _computed(graph, tensor.name, tuple(tensor.dims))
        else:
            graph.initializer.append(tensor)
    nodes = [*computed, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del light.metadata_props[:]
    onnx.checker.check_model(light)
    return light.SerializeToString()


def _computed(graph: onnx.GraphProto, name: str, shape: tuple[int, ...]) -> list[onnx.NodeProto]:
    """Nodes whose last one writes the tensor ``name``; the few numbers that they need become initializers."""

    def constant(suffix: str, value: object, dtype: type) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), f"{name}.{suffix}"))
        return f"{name}.{suffix}"

    def node(kind: str, inputs: list[str], output: str, **attrs: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=output, **attrs)

    bounds = [
        constant(key, value, np.int64) for key, value in (("first", 1), ("end", math.prod(shape) + 1), ("step", 1))
    ]
    scale = constant("scale", 2 / math.sqrt(max(1, math.prod(shape[1:]))), np.float32)
    return [
        node("Range", bounds, f"{name}.count"),
        node("Cast", [f"{name}.count"], f"{name}.angle", to=TensorProto.FLOAT),
        node("Sin", [f"{name}.angle"], f"{name}.wave"),
        node("Mul", [f"{name}.wave", scale], f"{name}.flat"),
        node("Reshape", [f"{name}.flat", constant("shape", shape, np.int64)], name),
    ]
