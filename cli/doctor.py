"""What this machine has and how far its timings can be trusted."""

import os
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..evaluators.latency.measure import Timer
from ..evaluators.latency.target import Target, fingerprint

PACKAGES = (
    "nightpress", "torch", "torchvision", "optuna", "onnx", "onnxruntime", "scikit-learn", "plotly",
    "openvino", "ray", "optuna-dashboard", "timm", "mlxtend",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Packages (None where missing), the machine, and the noise of its timings."""
    device = fingerprint(Target())
    load = os.getloadavg()[0]
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {**asdict(device), "flags": list(device.flags), "load": load, "cuda": _cuda()},
        "kernels": {"int8": "avx512_vnni" in device.flags or "avx_vnni" in device.flags or "asimddp" in device.flags},
        "noise": _noise(load, device.cores),
    }


def _noise(load: float, cores: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(_probe())
        with Timer(Target()) as timer:
            windows = timer.time({"probe": path}, None, least_rounds=10, most_rounds=10)["probe"].windows_ms
    low = min(windows)
    spread = float(np.median(windows)) / low - 1
    repeat = sorted(windows)[1] / low - 1
    quiet = spread < 0.05 and repeat < 0.02
    meaning = (
        f"Timings: ten windows of the same model lie {spread:.1%} (median) above the lowest, the two lowest agree "
        f"within {repeat:.1%}. "
        + ("This machine is quiet enough to trust differences of a few percent." if quiet else
           f"Something else uses the cores (load {load:.1f} on {cores}): expect errors of this size.")
    )  # fmt: skip
    return {
        "windows_ms": list(windows),
        "median_above_lowest": spread,
        "repeat_error": repeat,
        "meaning": meaning,
    }


def _probe() -> bytes:
    weight = numpy_helper.from_array(np.full((64, 64, 3, 3), 0.01, np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    shape = [1, 64, 28, 28]
    graph = helper.make_graph(
        nodes, "probe", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
