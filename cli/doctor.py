"""What this machine has and how far its timings can be trusted."""

import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..evaluators.latency.capabilities import capabilities, forget_capabilities
from ..evaluators.latency.measure import BUSY_CORES, MeasurementError, Timer, Timing
from ..evaluators.latency.target import RUNTIMES, Target, fingerprint, fingerprint_to_dict, missing_runtime
from ..evaluators.latency.timer import PROVIDERS, runtime_version

PACKAGES = (
    "nightpress", "torch", "torchvision", "optuna", "onnx", "onnxruntime", "scikit-learn", "plotly",
    "openvino", "ray", "optuna-dashboard", "timm", "mlxtend",
)  # fmt: skip


def examine(fresh: bool = False) -> dict[str, Any]:
    """Packages (None where missing), the machine, its runtimes with what their kernels can do, and the noise of its
    timings. With ``fresh`` nothing counts that was measured of kernels before, for any threads and batch."""
    device = fingerprint(Target())
    if fresh:
        forget_capabilities()
    kernels, missing = _kernels()
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {**fingerprint_to_dict(device), "load": os.getloadavg()[0], "cuda": _cuda()},
        "runtimes": [_runtime(name, missing.get(name)) for name in RUNTIMES],
        "kernels": kernels,
        "noise": _noise(device.cores),
    }


def _kernels() -> tuple[dict[str, Any], dict[str, str]]:
    """By runtime: what its kernels can do; or why it does not run here."""
    kernels: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in RUNTIMES:
        reason = missing_runtime(name)
        if reason is None:
            try:
                kernels[name] = capabilities(Target(runtime=name)).to_dict()
            except MeasurementError as error:  # installed, but it does not start: a GPU's build without the GPU
                reason = str(error)
        if reason is not None:
            missing[name] = reason
    return kernels, missing


def _runtime(name: str, missing: str | None) -> dict[str, Any]:
    return {
        "runtime": name,
        "version": runtime_version(name),
        "providers": list(PROVIDERS.get(name, ("CPU",))),
        "missing": missing,
    }


def kernel_lines(kernels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was measured of each runtime, in words."""
    found: list[str] = []
    for name, known in kernels.items():
        widths = ", ".join(
            f"{w['weights']}-bit weights with {w['activations']}-bit activations on {w['kernel']} kernels at "
            f"{w['speedup']:.2g} times the speed of fp32" for w in known["widths"]
        )  # fmt: skip
        steps = {key: ", ".join(f"{step} from {first}" for first, step in pairs)
                 for key, pairs in known["channel_steps"].items()}  # fmt: skip
        found.append(
            f"{name}: {widths}; channel steps for fp32 alone {steps['fp32']}, for INT8 alone {steps['INT8']}, for both "
            f"{steps['both']}; a change of precision costs {1000 * known['change_ms']:.1f} µs on "
            f"{known['change_elements']:,} numbers."
            + ("" if known["settled"] else " The windows did not agree, so the steps are not measured.")
        )
    return found


def _noise(core_count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(_probe())
        with Timer(Target()) as timer:
            timing = timer.time({"probe": path}, None, least_rounds=12, most_rounds=12)["probe"]
    low, (first, second) = timing.latency_ms, timing.halves_ms()
    spread = float(np.median(timing.windows_ms)) / low - 1
    floor = max(timing.repeat_error, abs(first / second - 1))
    return {
        "windows_ms": list(timing.windows_ms),
        "median_above_lowest": spread,
        "repeat_error": timing.repeat_error,
        "floor": floor,
        "settled": timing.settled,
        "busy_cores": timing.busy_cores,
        "meaning": noise_words(spread, floor, timing, core_count),
    }


def noise_words(spread: float, floor: float, timing: Timing, core_count: int) -> str:
    """What the noise means for a night. ``spread``: how far the median window lies above the lowest; ``floor``: how far
    two measurements of one model lay apart; shares."""
    busy = timing.busy_cores
    told = (
        f"Timings: {len(timing.windows_ms)} windows of one model, spread over seconds, lie {spread:.1%} (median) above "
        f"the lowest; measured twice, the model differs from itself by {floor:.1%}. "
    )
    disturbed = busy is not None and busy >= BUSY_CORES
    others = f" Other processes use {busy:.1f} of {core_count} cores: end them for the night." if disturbed else ""
    if not timing.settled:
        return told + (
            "The two lowest windows never agreed within 2 %: a night here marks its latencies as unsettled, and no "
            f"difference below {max(floor, timing.repeat_error):.0%} between two models means anything." + others
        )
    if floor <= 0.02 and spread < 0.05:
        return told + "A night here can tell models apart that differ by 3 % or more." + others
    return told + (
        f"A night here cannot tell models apart that differ by less than {max(0.03, 1.5 * floor):.0%}; each of its "
        "latencies states its own repeat error." + others
    )


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
