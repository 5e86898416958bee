"""OpenVINO on the CPU: a model's outputs, and which of its layers run on integers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spaces.plan import Plan
from .onnx_graph import INPUT, OUTPUT

_BATCH = 64
_WEIGHTED = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Subgraph"}


class OpenVinoSession:
    """A model compiled for the CPU, with fp32 where the file has it. Raises RuntimeError with OpenVINO's reason in one
    line, ImportError where the extra ``openvino`` is not installed."""

    def __init__(self, path: Path, *, threads: int) -> None:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        try:
            self._compiled: Any = openvino.Core().compile_model(str(path), "CPU", options)
        except RuntimeError as error:
            raise RuntimeError(f"OpenVINO cannot load {path.name}: {' '.join(str(error).split())}") from error

    def outputs(self, inputs: Tensor) -> Tensor:
        """The model's outputs for inputs of shape (items, …), in batches."""
        parts = [np.array(self._compiled({INPUT: part.float().numpy()})[0]) for part in inputs.split(_BATCH)]
        return torch.from_numpy(np.concatenate(parts))

    def bits_used(self, plan: Plan) -> dict[str, str]:
        """For each layer ``"int8"`` or ``"fp32"``, by the kernel that OpenVINO chose; ``"unknown"`` where it is not
        found in the compiled graph."""
        owners = {planned.op.name: planned.op.module for planned in plan.ops if planned.weight_count}
        owners |= {name + ".product": module for name, module in owners.items()}
        owners[OUTPUT] = owners.get(plan.output)
        found: dict[str, str] = {}
        nodes = [
            {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
            for node in self._compiled.get_runtime_model().get_ops()
        ]
        # Small layers in a row may become one subgraph; where only a layer's bias did, its product's kernel counts.
        for info in sorted(nodes, key=lambda info: info.get("layerType") != "Subgraph"):
            if info.get("layerType") in _WEIGHTED:
                kind = "int8" if info["runtimePrecision"] in {"u8", "i8"} else "fp32"
                # A kernel is known by all nodes that were fused into it; a layer is written as one or two of them,
                # and the last one's name is lost to the output's.
                names = (name.split("/", 1)[0] for name in info["originalLayersNames"].split(","))
                found |= dict.fromkeys((owner for name in names if (owner := owners.get(name))), kind)
        return {
            planned.op.module: found.get(planned.op.module, "unknown")
            for planned in plan.ops
            if planned.weight_count and planned.op.module
        }
