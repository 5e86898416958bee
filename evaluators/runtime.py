"""ONNX Runtime: sessions with the options that the measurement used, and what its optimiser made of a graph."""

import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

from ..spaces.plan import Plan
from .latency.timer import PROVIDERS, processor, runtime_version, session_config, start_session
from .onnx_graph import INPUT, OUTPUT
from .runtime_openvino import OpenVinoSession

_BATCH = 64
OPAQUE = "onnxruntime-tensorrt"
"""Compiles the graph into something that cannot be written down."""


class Session:
    """A model loaded in ONNX Runtime. Raises RuntimeError with the runtime's reason in one line."""

    def __init__(
        self, path: Path, *, threads: int, disabled_optimizers: tuple[str, ...], optimised: Path | None = None,
        runtime: str = "onnxruntime",
    ) -> None:  # fmt: skip
        self._path, self._disabled, self._runtime = path, disabled_optimizers, runtime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for name, value in session_config(processor()).items():
            options.add_session_config_entry(name, value)
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        try:
            self._session = start_session(str(path), options, runtime, disabled_optimizers)
        except Exception as error:  # the runtime raises types of its own that share no base
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"ONNX Runtime cannot load {path.name}: {reason}") from error

    def outputs(self, inputs: Tensor) -> Tensor:
        """The model's outputs for inputs of shape (items, …), in batches."""
        parts = [self._session.run([OUTPUT], {INPUT: part.float().numpy()})[0] for part in inputs.split(_BATCH)]
        return torch.from_numpy(np.concatenate(parts))

    def bits_used(self, plan: Plan) -> dict[str, str]:
        """For each layer what the runtime runs: see :func:`bits_used`."""
        return bits_used(self._path, plan, self._disabled, self._runtime)


def open_session(
    path: Path, runtime: str, *, threads: int, disabled_optimizers: tuple[str, ...]
) -> Session | OpenVinoSession:
    """A file in the runtime of a target, or on ONNX Runtime's CPU where that target is another device's and its runtime
    is not here. Raises RuntimeError with the runtime's reason in one line."""
    if runtime == "openvino" and runtime_version(runtime) is not None:
        return OpenVinoSession(path, threads=threads)
    if not set(PROVIDERS.get(runtime, (runtime,))) <= set(onnxruntime.get_available_providers()):
        runtime = "onnxruntime"
    return Session(path, threads=threads, disabled_optimizers=disabled_optimizers, runtime=runtime)


def optimised_graph(path: Path, disabled_optimizers: tuple[str, ...], runtime: str = "onnxruntime") -> onnx.ModelProto:
    """The graph that the runtime really executes. Raises RuntimeError where it cannot load the file."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        Session(path, threads=1, disabled_optimizers=disabled_optimizers, optimised=optimised, runtime=runtime)
        return onnx.load(str(optimised))


def bits_used(
    path: Path, plan: Plan, disabled_optimizers: tuple[str, ...], runtime: str = "onnxruntime"
) -> dict[str, str]:
    """For each layer what the runtime runs: ``"int8"`` or ``"fp32"``, by the kernel that holds its weights.

    A layer that cannot be found in the optimised graph is ``"unknown"``. Each provider has a graph of its own: CUDA
    computes in fp32 what the CPU does on integers. TensorRT's engines cannot be looked into; they obey the file's own
    quantisation, so what the CPU makes of that is said of them: what was asked, not what was seen.
    """
    graph = optimised_graph(path, disabled_optimizers, "onnxruntime" if runtime == OPAQUE else runtime).graph
    owners = _owners(plan)
    found: dict[str, str] = {}
    for node in graph.node:
        kind = KERNELS.get(node.op_type)
        if kind is None:
            continue
        # Integer kernels keep the names of their weights; fp32 weights are reordered under new names,
        # but the node keeps its own, or that of the activation fused into it.
        weights = [name.split(".weight")[0] for name in node.input if ".weight" in name]
        names = [*weights, _SUFFIX.sub("", node.name)]
        for owner in {owners[name] for name in names if name in owners}:
            found[owner] = kind
    return {
        planned.op.module: found.get(planned.op.module, "unknown")
        for planned in plan.ops
        if planned.weight_count and planned.op.module
    }


def _owners(plan: Plan) -> dict[str, str]:
    """Layer by the tensor that its kernel may be named after: its own output or a fused activation's."""
    owners = {p.op.name: p.op.module for p in plan.ops if p.weight_count and p.op.module}
    fused = {p.op.name: owners[p.inputs[0]] for p in plan.ops if len(p.inputs) == 1 and p.inputs[0] in owners
             and not p.weight_count}  # fmt: skip
    return owners | fused


def check_bits(used: dict[str, str], plan: Plan) -> None:
    """Raises ValueError naming the first layer that does not run as the policy says."""
    for planned in plan.ops:
        name = planned.op.module
        if not planned.weight_count or name is None:
            continue
        intended = "int8" if planned.int8 else "fp32"
        if used[name] != intended:
            raise ValueError(f"layer {name} was to run in {intended}, but the runtime runs it in {used[name]}")


def check_grids(path: Path, plan: Plan) -> None:
    """Raises ValueError naming the first layer whose file has other weights than the policy's bits allow: so many
    levels on either side of zero, and zero, in each output channel."""
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    axes = {node.input[0]: {a.name: a.i for a in node.attribute}.get("axis", 1)
            for node in graph.node if node.op_type == "DequantizeLinear"}  # fmt: skip
    for planned in plan.ops:
        name, bits, weight = planned.op.module, planned.bits.weights, f"{planned.op.name}.weight.q"
        if not planned.weight_count or name is None or bits > 8:
            continue
        if weight not in stored:
            raise ValueError(f"layer {name} was to have weights of {bits} bits, but its file has no integers for it")
        integers = np.moveaxis(numpy_helper.to_array(stored[weight]), axes[weight], 0)
        levels = max(len(np.unique(channel)) for channel in integers)
        if levels > 2**bits - 1:
            raise ValueError(
                f"layer {name} was to have weights of {bits} bits, at most {2**bits - 1} levels a channel, but its "
                f"file has {levels}"
            )


KERNELS = {
    "QLinearConv": "int8",
    "QGemm": "int8",
    "MatMulIntegerToFloat": "int8",
    "QLinearMatMul": "int8",
    "Conv": "fp32",
    "FusedConv": "fp32",
    "Gemm": "fp32",
    "FusedGemm": "fp32",
    "MatMul": "fp32",
    "FusedMatMul": "fp32",
    "MatMulNBits": "fp32",  # weights stored small, products in fp32
}
# What the runtime's optimisers append to a node's name when they rewrite it.
_SUFFIX = re.compile(r"(_nchwc|_pre_q|_token_\d+)+$")
