"""Where a model will run: runtime, threads, batch, session options, and what that runtime can do."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...spaces.errors import InputError
from ...spaces.policy import FP32, INT8, LayerBits

RUNTIMES = ("onnxruntime",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime with its settings. ``disabled_optimizers`` are session options that travel with the export:
    ONNX Runtime's WeightBiasQuantization would turn layers that the policy left in fp32 into INT8."""

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    disabled_optimizers: tuple[str, ...] = ("WeightBiasQuantization",)

    def bit_choices(self, weights: tuple[int, ...], activations: tuple[int, ...]) -> tuple[LayerBits, ...]:
        """(weights, activations) pairs worth offering: fp32, integer kernels, and weights stored small.

        Fewer than 8 bits run on the INT8 kernel and save neither time nor raw bytes: they are offered only because
        the user listed them. Weights of 16 bits are computed with in 32; no kernel takes activations of 16.
        """
        pairs = [FP32] if 32 in weights and 32 in activations else []
        pairs += [LayerBits(weights=16)] if 16 in weights and 32 in activations else []
        for width in sorted(w for w in weights if w <= 8):
            pairs += [LayerBits(weights=width, activations=a) for a in sorted(activations) if a != 16]
        return tuple(pairs) or (INT8,)

    def channel_step(self, channels: int) -> int:
        """Channel steps on which the kernels run well: fp32 convolutions leave the blocked layout off a grid of 4."""
        return 8 if channels >= 64 else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The device and runtime that numbers were measured on."""

    machine: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    runtime_version: str


_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp")


def fingerprint(target: Target) -> Fingerprint:
    """This device. Flags are those that choose kernels."""
    info = _cpuinfo()
    return Fingerprint(
        machine=platform.machine(),
        cpu=info.get("model name") or platform.processor() or "unknown",
        flags=tuple(f for f in _FLAGS if f in info.get("flags", "").split()),
        cores=len(os.sched_getaffinity(0)),
        runtime_version=version(target.runtime),
    )


def check_target(target: Target) -> None:
    """Raises InputError when this machine cannot run the target."""
    if target.runtime not in RUNTIMES:
        raise InputError(f"target.runtime must be one of {', '.join(RUNTIMES)}, but got {target.runtime!r}.")
    cores = len(os.sched_getaffinity(0))
    if not 1 <= target.threads <= cores:
        raise InputError(
            f"target.threads must be between 1 and this machine's {cores} cores, but got {target.threads}."
        )
    if target.batch < 1:
        raise InputError(f"target.batch must be at least 1, but got {target.batch}.")


def target_to_dict(target: Target) -> dict[str, Any]:
    return {**asdict(target), "disabled_optimizers": list(target.disabled_optimizers)}


def target_from_dict(data: Mapping[str, Any]) -> Target:
    """The inverse of :func:`target_to_dict`. Raises KeyError or TypeError when something is missing or unknown."""
    values: dict[str, Any] = {**data, "disabled_optimizers": tuple(data["disabled_optimizers"])}
    return Target(**values)


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
