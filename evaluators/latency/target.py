"""Where a model will run: runtime, threads, batch, session options, and what that runtime can do."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from ...spaces.errors import InputError
from ...spaces.policy import FP32, LayerBits
from . import timer
from .recorded import are_texts, is_whole

CHANNEL_STEPS = ((0, 4), (64, 8))
"""Where nothing was measured: ONNX Runtime's fp32 convolutions leave the blocked layout off a grid of 4."""
RUNTIMES = tuple(timer.BACKENDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime with its settings. ``disabled_optimizers`` are session options that travel with the export:
    ONNX Runtime's WeightBiasQuantization would turn layers that the policy left in fp32 into INT8."""

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    disabled_optimizers: tuple[str, ...] = ("WeightBiasQuantization",)
    channel_steps: tuple[tuple[int, int], ...] = CHANNEL_STEPS
    """(from this width on, this step), by width; measured where the target was calibrated."""
    integer_kernels: bool = True
    """Whether layers of 8 bits run on integers."""
    integer_bits: int = 8
    """Of the weights of layers that run on integers: 7 where the target was measured to take slower kernels for 8."""

    def bit_choices(self, weights: tuple[int, ...], activations: tuple[int, ...]) -> tuple[LayerBits, ...]:
        """(weights, activations) pairs worth offering: fp32, integer kernels, and weights stored small.

        Fewer than 8 bits run on the INT8 kernel and save neither time nor raw bytes: they are offered only because
        the user listed them, but for ``integer_bits`` in the place of 8. Weights of 16 bits are computed with in 32; no
        kernel takes activations of 16.
        """
        pairs = [FP32] if 32 in weights and 32 in activations else []
        pairs += [LayerBits(weights=16)] if 16 in weights and 32 in activations else []
        for width in sorted(w for w in weights if w <= 8 and self.integer_kernels):
            pairs += [
                LayerBits(weights=min(width, self.integer_bits) if a <= 8 else width, activations=a)
                for a in sorted(activations) if a != 16
            ]  # fmt: skip
        integers = LayerBits(weights=self.integer_bits, activations=8)
        return tuple(dict.fromkeys(pairs)) or (integers if self.integer_kernels else FP32,)

    def channel_step(self, channels: int) -> int:
        """The step on which the kernels run well for a layer of this width."""
        return next(step for first, step in reversed(self.channel_steps) if channels >= first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The device and runtime that numbers were measured on."""

    machine: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    runtime_version: str
    accelerator: str | None = None
    session_config: tuple[tuple[str, str], ...] | None = ()
    """What its sessions of ONNX Runtime are told: names and values; None where a file does not record it."""


def fingerprint(target: Target, *, missing: str | None = None) -> Fingerprint:
    """This device. Where the target's runtime is not installed, ``missing`` stands for its version; without that it
    raises InputError."""
    found = timer.device(target.runtime)
    found["runtime_version"] = found["runtime_version"] or missing
    if found["runtime_version"] is None:
        raise InputError(missing_runtime(target.runtime) or f"{target.runtime} has no version.")
    return fingerprint_from_dict(found)


def fingerprint_from_dict(data: Mapping[str, Any], source: str = "") -> Fingerprint:
    """A device as JSON has it; ``source`` names the file. Raises KeyError, TypeError or ValueError when something is
    missing or unknown, InputError with the key that is wrong."""
    values: dict[str, Any] = {"session_config": None, "accelerator": None, **data}
    told: dict[Any, Any] | None = None if values["session_config"] is None else dict(values["session_config"])
    _check(_DEVICE_RULES, {**values, "session_config": told}, "device", source)
    values |= {"flags": tuple(data["flags"]), "session_config": None if told is None else tuple(told.items())}
    return Fingerprint(**values)


Rules = Mapping[str, tuple[Callable[[Any], bool], str]]
"""By key, what its value must be, as a test and in words."""
_WHOLE = (is_whole, "a whole number from 1 to 1,000,000")
_TEXT = (lambda value: isinstance(value, str), "text")
_DEVICE_RULES: Rules = {
    "machine": _TEXT, "cpu": _TEXT, "runtime_version": _TEXT, "cores": _WHOLE,
    "flags": (are_texts, "a list of texts"),
    "accelerator": (lambda value: value is None or isinstance(value, str), "text or null"),
    "session_config": (lambda value: value is None or are_texts([*value, *value.values()]), "texts by name, or null"),
}  # fmt: skip


def _check(rules: Rules, values: Mapping[str, Any], what: str, source: str) -> None:
    """Raises InputError with the first key whose value breaks its rule."""
    for key, (holds, rule) in rules.items():
        if not holds(values[key]):
            where = f"{source}: " if source else ""
            raise InputError(f"{where}{what}.{key} must be {rule}, but got {values[key]!r}.")


def fingerprint_to_dict(device: Fingerprint) -> dict[str, Any]:
    """The inverse of :func:`fingerprint_from_dict`."""
    told = device.session_config
    return {
        **asdict(device), "flags": list(device.flags), "session_config": None if told is None else dict(told)
    }  # fmt: skip


def missing_runtime(runtime: str) -> str | None:
    """Why this machine cannot run a runtime, with what would mend it, as one sentence; None where it can."""
    if timer.runtime_version(runtime) is None:
        return f"The runtime {runtime} is not installed here: pip install 'nightpress[{runtime}]'."
    if runtime not in timer.PROVIDERS:
        return None
    import onnxruntime  # its list of providers; half a second that the other commands need not wait

    missing = [p for p in timer.PROVIDERS[runtime] if p not in cast("Any", onnxruntime).get_available_providers()]
    if not missing:
        return None
    return (
        f"The runtime {runtime} needs {missing[0]}, which the installed onnxruntime does not have: on a machine with "
        "such a device, pip install onnxruntime-gpu in place of onnxruntime."
    )


def check_target(target: Target) -> None:
    """Raises InputError when this machine cannot run the target."""
    if target.runtime not in RUNTIMES:
        raise InputError(f"target.runtime must be one of {', '.join(RUNTIMES)}, but got {target.runtime!r}.")
    missing = missing_runtime(target.runtime)
    if missing is not None:
        raise InputError(missing)
    cores = timer.cores()
    if not 1 <= target.threads <= cores:
        raise InputError(
            f"target.threads must be between 1 and this machine's {cores} cores, but got {target.threads}."
        )
    if target.batch < 1:
        raise InputError(f"target.batch must be at least 1, but got {target.batch}.")


def target_to_dict(target: Target) -> dict[str, Any]:
    return {
        **asdict(target),
        "disabled_optimizers": list(target.disabled_optimizers),
        "channel_steps": [list(pair) for pair in target.channel_steps],
    }


def target_from_dict(data: Mapping[str, Any], source: str = "") -> Target:
    """The inverse of :func:`target_to_dict`; ``source`` names the file. Raises KeyError or TypeError when something is
    missing or unknown, InputError with the key that is wrong."""
    asked = data["disabled_optimizers"]  # only what later versions added may be missing
    values: dict[str, Any] = {**target_to_dict(Target()), **data, "disabled_optimizers": asked}
    _check(_TARGET_RULES, values, "target", source)
    values["channel_steps"] = tuple((first, step) for first, step in values["channel_steps"])
    values["disabled_optimizers"] = tuple(values["disabled_optimizers"])
    return Target(**values)


def _are_steps(value: object) -> bool:
    pairs = cast("list[Any]", value) if isinstance(value, list | tuple) else []
    if not all(isinstance(pair, list | tuple) and len(cast("list[Any]", pair)) == 2 and is_whole(pair[0], 0)
               and is_whole(pair[1]) for pair in pairs):  # fmt: skip
        return False
    widths = [first for first, _ in pairs]
    return widths[:1] == [0] and all(a < b for a, b in itertools.pairwise(widths))


_TARGET_RULES: Rules = {
    "runtime": (lambda value: value in RUNTIMES, f"one of {', '.join(RUNTIMES)}"),
    "threads": _WHOLE, "batch": _WHOLE,
    "disabled_optimizers": (are_texts, "a list of texts"),
    "channel_steps": (_are_steps, "a list of [width, step] by width, the first of width 0"),
    "integer_kernels": (lambda value: isinstance(value, bool), "true or false"),
    "integer_bits": (lambda value: is_whole(value) and value <= 8, "a whole number from 1 to 8"),
}  # fmt: skip
