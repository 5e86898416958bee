"""Triton Inference Server's model configuration, as text."""

import json
from typing import Any

import onnx
from onnx import TensorProto

from ..evaluators.latency.timer import PROVIDERS
from .origin import Origin

MOST_ITEMS = 64
"""The batch up to which Triton may gather requests, where the target's is not larger."""
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
}


def config_pbtxt(model: onnx.ModelProto, origin: Origin, latency_ms: float, *, needs_options: bool = False) -> str:
    """``config.pbtxt`` for Triton's onnxruntime backend (inference.ModelConfig of its model_config.proto).

    The batch axis is Triton's own, so ``dims`` leave it out. As many instances as the measured device has cores for
    the target's threads, or one on each GPU where the target is one. A target of larger batches lets a request wait
    for others as long as one inference takes. ``needs_options``: the runtime runs other kernels without the target's
    session options.
    """
    target = origin.target
    lines = [
        f'name: "{origin.file_name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max(MOST_ITEMS, target.batch)}",
    ]
    for field, values in (("input", model.graph.input), ("output", model.graph.output)):
        lines += [f"{field} [{{ {_tensor(value)} }}]" for value in values]
    lines += [
        f"dynamic_batching {{ {_batching(target.batch, latency_ms)}}}",
        f"instance_group [{{ {_instances(origin)} }}]",
        _parameter("intra_op_thread_count", target.threads),
        _parameter("inter_op_thread_count", 1),
    ]
    if needs_options:
        # The backend has no key for this session option; who serves the file must know of it.
        disabled = ", ".join(target.disabled_optimizers)
        lines.insert(
            0, f"# measured with these ONNX Runtime optimizers disabled: {disabled}. Triton cannot disable them,"
        )
        lines.insert(1, "# and with them the runtime runs other kernels: check accuracy and speed in Triton itself.")
    return "\n".join(lines) + "\n"


def _tensor(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = ", ".join(str(d.dim_value) for d in tensor.shape.dim[1:])
    return f"name: {json.dumps(value.name)}, data_type: {_TYPES[tensor.elem_type]}, dims: [ {dims} ]"


def _instances(origin: Origin) -> str:
    """Triton counts instances on GPUs by the GPU, on the CPU as a whole."""
    target = origin.target
    if not PROVIDERS.get(target.runtime, PROVIDERS["onnxruntime"])[0].startswith("CPU"):
        return "kind: KIND_GPU, count: 1"
    return f"kind: KIND_CPU, count: {max(1, origin.device.get('cores', 1) // target.threads)}"


def _batching(batch: int, latency_ms: float) -> str:
    if batch == 1:
        return ""
    return f"preferred_batch_size: [ {batch} ], max_queue_delay_microseconds: {max(1, round(1000 * latency_ms))} "


def _parameter(key: str, value: Any) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
