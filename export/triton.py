"""Triton Inference Server's model configuration, as text."""

from typing import Any

import onnx
from onnx import TensorProto

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT8: "TYPE_INT8",
}


def config_pbtxt(model: onnx.ModelProto, name: str, threads: int, disabled_optimizers: tuple[str, ...]) -> str:
    """``config.pbtxt`` for Triton's onnxruntime backend: dynamic batching, one instance a model on the CPU.

    The batch axis is Triton's own, so ``dims`` leave it out.
    """
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 64"]
    for field, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            dims = ", ".join(str(d.dim_value) for d in tensor.shape.dim[1:])
            lines.append(
                f'{field} [{{ name: "{value.name}", data_type: {_TYPES[tensor.elem_type]}, dims: [ {dims} ] }}]'
            )
    lines += [
        "dynamic_batching { }",
        "instance_group [{ kind: KIND_CPU, count: 1 }]",
        _parameter("intra_op_thread_count", threads),
        _parameter("inter_op_thread_count", 1),
    ]
    if disabled_optimizers:
        # The backend has no key for this session option; who serves the file must know of it.
        lines.insert(0, f"# measured with these ONNX Runtime optimizers disabled: {', '.join(disabled_optimizers)}")
    return "\n".join(lines) + "\n"


def _parameter(key: str, value: Any) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
