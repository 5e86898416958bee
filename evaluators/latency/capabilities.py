"""What a target can do, by measurement: which bit widths have kernels, where the channel staircases stand, and what a
change of precision costs.

Probes are pairs of layers around a width, written by the same builder as every export, so that they meet the layouts
and fusions that a pruned network meets.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...spaces.anatomy import Anatomy, Layer, Op
from ...spaces.errors import InputError
from ...spaces.files import cache_folder, write_whole
from ...spaces.plan import Plan, plan
from ...spaces.policy import FP32, INT8, LayerBits, Policy
from ..runtime import KERNELS, open_session
from .measure import Timer, Timing, settings, write_random
from .target import CHANNEL_STEPS, Target, fingerprint, fingerprint_to_dict, target_to_dict
from .timer import PROVIDERS

log = logging.getLogger("nightpress")
SIZE, AROUND, LINEAR_AROUND = 14, 64, 512
"""Height and width of a probe's pictures, and the channels on both sides of the width in question."""
NARROW, WIDE = tuple(range(16, 33)), tuple(range(64, 97, 2))
LINEAR = tuple(range(16, 97, 8))
PAIRS = (
    FP32, LayerBits(weights=16, activations=32), LayerBits(weights=8, activations=32), INT8,
    LayerBits(weights=7, activations=8), LayerBits(weights=4, activations=8),
)  # fmt: skip
FASTER = 1.15
"""So many times as fast integers of 7 bits must be to take the place of those of 8, which they are less exact than."""
PRECISIONS = ("fp32", "INT8")
CONV = "conv 3×3"
CHAIN = 4
MOST_WASTED, SAME = 0.25, 0.02
"""Times that lie no further apart are the same."""
MOST_UNSETTLED = 0.25
WINDOW_MS, ROUND_MS, MOST_ROUNDS = 6, 250, 10
"""Of probes, which take microseconds."""
COARSEST = 4
"""A step is at most so many times the one that is used where nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stair:
    """Latency of two layers by the width between them: (channels, ms), by channels."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How a layer of these bits runs: the kernel's precision, and how many times as fast as in fp32."""

    weights: int
    activations: int
    kernel: str
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """``change_ms`` is what one change of precision costs on ``change_elements`` numbers. ``settled``: whether the
    windows agreed well enough to take channel steps from the stairs."""

    stairs: tuple[Stair, ...]
    widths: tuple[Width, ...]
    change_ms: float
    change_elements: int
    settled: bool
    seconds: float

    @property
    def integer_kernels(self) -> bool:
        """Whether layers of 8 bits run on integers at all."""
        return any(width.kernel == "int8" for width in self.widths)

    def channel_steps(self, precisions: Sequence[str] = PRECISIONS) -> tuple[tuple[int, int], ...]:
        """(from width, step) for layers that may run in these precisions."""
        kinds = [dict(s.points) for s in self.stairs if s.name in {f"{CONV} {precision}" for precision in precisions}]
        return steps_of(kinds) if self.settled else CHANNEL_STEPS

    @property
    def integer_bits(self) -> int:
        """Of the weights of integer layers: 7 where those are faster than 8 by :data:`FASTER`. A processor without VNNI
        adds two products in 16 bits, which the eighth bit of the weights would overflow, so that those of 8 bits take
        slower kernels."""
        speedups = {(width.weights, width.activations): width.speedup for width in self.widths}
        eight, seven = (speedups.get((bits, 8), 0.0) for bits in (8, 7))
        return 7 if self.settled and seven >= FASTER * eight > 0 else 8

    def applied(self, target: Target, bits: Sequence[LayerBits] = (FP32, INT8)) -> Target:
        """The target with the bit widths that have kernels and the steps for those of them that are wanted, or for
        fp32, which is offered in their place."""
        wanted = [p for p in bits if self.integer_kernels or p.activations > 8] or [FP32]
        precisions = sorted({"INT8" if pair.activations <= 8 else "fp32" for pair in wanted})
        return replace(
            target, channel_steps=self.channel_steps(precisions), integer_kernels=self.integer_kernels,
            integer_bits=self.integer_bits,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``staircases`` in the form that reports draw."""
        stairs = [
            {"name": stair.name, "points": [{"channels": c, "latency_ms": ms} for c, ms in stair.points]}
            for stair in self.stairs
        ]
        data = {key: value for key, value in asdict(self).items() if key != "stairs"}
        steps = {name: [list(pair) for pair in self.channel_steps(precisions)] for name, precisions in
                 (("fp32", ("fp32",)), ("INT8", ("INT8",)), ("both", PRECISIONS))}  # fmt: skip
        return {**data, "channel_steps": steps, "staircases": stairs}


MEASURED_BESIDE = ("capabilities", "staircases")


def read_capabilities(profile: Path) -> Capabilities | None:
    """What a profile's file holds of them beside the profile; None where nothing was measured. Raises InputError where
    they are damaged."""
    try:
        data: dict[str, Any] = json.loads(profile.read_text())
        if "capabilities" not in data:
            return None
        return capabilities_from_dict({**data["capabilities"], "staircases": data["staircases"]})
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"{profile}: capabilities are not those that nightpress wrote ({type(error).__name__}: {error}): calibrate "
            "again."
        ) from None


def fewer_bits_are_faster(profile: Path, target: Target) -> bool:
    """Whether the device of a profile takes faster kernels for integers of fewer bits than those that were measured,
    so that the profile prices these too high. Raises InputError."""
    known = read_capabilities(profile)
    return known is not None and known.integer_bits < target.integer_bits


def beside_profile(found: Capabilities) -> dict[str, Any]:
    """What a profile's file holds of the capabilities: the staircases under a key of their own, which reports read."""
    data = found.to_dict()
    return {"staircases": data.pop("staircases"), "capabilities": data}


def capabilities_from_dict(data: Mapping[str, Any]) -> Capabilities:
    """The inverse of :meth:`Capabilities.to_dict`. Raises KeyError, TypeError or ValueError when something is missing
    or of another type."""
    stairs = tuple(
        Stair(
            name=stair["name"],
            points=tuple((int(p["channels"]), float(p["latency_ms"])) for p in stair["points"]),
        )
        for stair in data["staircases"]
    )  # fmt: skip
    return Capabilities(
        stairs=stairs,
        widths=tuple(
            Width(
                weights=int(width["weights"]),
                activations=int(width["activations"]),
                kernel=str(width["kernel"]),
                speedup=float(width["speedup"]),
            )
            for width in data["widths"]
        ),
        change_ms=float(data["change_ms"]),
        change_elements=int(data["change_elements"]),
        settled=bool(data["settled"]),
        seconds=float(data["seconds"]),
    )


def forget_capabilities() -> None:
    """All that is kept in the user's cache is measured anew where it is needed next."""
    with contextlib.suppress(OSError):
        for path in cache_folder().glob("capabilities-*.json"):
            path.unlink(missing_ok=True)


def capabilities(target: Target) -> Capabilities:
    """Measured once for a device, runtime, threads and batch, and kept in the user's cache when the windows settled.

    Takes some ten seconds. Raises MeasurementError.
    """
    path = _cache_path(target)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return capabilities_from_dict(json.loads(path.read_text()))
    found = measure_capabilities(target)
    if found.settled:
        _keep(path, found)
    return found


def measure_capabilities(target: Target, timer: Timer | None = None) -> Capabilities:
    """Time all probes, by a ``timer`` of another machine on that one. Raises MeasurementError."""
    start = time.perf_counter()
    plans = probes()
    with tempfile.TemporaryDirectory(prefix="nightpress-") as folder:
        files = {key: Path(folder) / f"{number}.onnx" for number, key in enumerate(plans)}
        for key, path in files.items():
            write_random(plans[key], path)
        with Timer(target) if timer is None else contextlib.nullcontext(timer) as timer:
            timings = timer.time(files, None, window_ms=WINDOW_MS, round_ms=ROUND_MS, most_rounds=MOST_ROUNDS)
            if target.runtime in PROVIDERS:  # the profiler tells the kernels of each provider
                bits = {key: files[key] for key in map(_bits_key, PAIRS)}
                watched = timer.time(bits, None, least_rounds=1, most_rounds=1, kernels=True, round_ms=0)
                timings |= {key: replace(timings[key], kernels=found.kernels) for key, found in watched.items()}
                return capabilities_elsewhere(timings, target, time.perf_counter() - start)
        kernels = {pair: _kernel_here(target, plans[_bits_key(pair)], files[_bits_key(pair)]) for pair in PAIRS}
    return capabilities_of(timings, kernels, target, time.perf_counter() - start)


def capabilities_elsewhere(timings: Mapping[str, Timing], target: Target, seconds: float) -> Capabilities:
    """From what the script measured of :func:`probes`, with the runtime's times of the nodes of those of bits: they
    tell the kernels on any device."""
    kernels: dict[LayerBits, str] = {}
    for pair in PAIRS:
        nodes = timings[_bits_key(pair)].kernels.values()
        kernels[pair] = "int8" if any(KERNELS.get(node.op_type) == "int8" for node in nodes) else "fp32"
    return capabilities_of(timings, kernels, target, seconds)


def probe_settings() -> dict[str, float]:
    """How the timing script measures the probes of a kit: once with times of nodes, which tell the kernels."""
    return settings(most_rounds=MOST_ROUNDS, kernel_passes=1, window_ms=WINDOW_MS, round_ms=ROUND_MS)


def capabilities_of(
    timings: Mapping[str, Timing], kernels: Mapping[LayerBits, str], target: Target, seconds: float
) -> Capabilities:
    """From the times of all probes, and the kernels that run each pair of bits."""
    unsettled = sum(not timing.settled for timing in timings.values()) / len(timings)
    if unsettled > MOST_UNSETTLED:
        log.warning(
            "the windows of %.0f %% of the probes never agreed: channel steps are not measured", 100 * unsettled
        )
    fp32_ms = timings[_bits_key(FP32)].latency_ms
    return Capabilities(
        stairs=_stairs(timings),
        widths=tuple(
            Width(weights=pair.weights, activations=pair.activations, kernel=kernel,
                  speedup=fp32_ms / timings[_bits_key(pair)].latency_ms)
            for pair, kernel in kernels.items()
        ),
        change_ms=_change_ms(timings),
        change_elements=AROUND * SIZE * SIZE * target.batch,
        settled=unsettled <= MOST_UNSETTLED,
        seconds=seconds,
    )  # fmt: skip


def steps_of(kinds: Sequence[Mapping[int, float]]) -> tuple[tuple[int, int], ...]:
    """(from width, step): the smallest step on which few widths are wasted; ``kinds`` are ms by width.

    A width is wasted when, in every kind, a larger one takes no longer. Steps are multiples of those that hold
    where nothing was measured, so a policy means the same network with both.
    """
    found: list[tuple[int, int]] = []
    for (first, least), widths in zip(CHANNEL_STEPS, (NARROW, WIDE), strict=True):
        step = least
        while step < COARSEST * least and _wasted(kinds, widths, step) > MOST_WASTED:
            step *= 2
        found.append((first, step))
    return tuple(found)


def _wasted(kinds: Sequence[Mapping[int, float]], widths: Sequence[int], step: int) -> float:
    """Share of the multiples of a step that are wasted; the widest cannot be."""
    offered = [width for width in widths if width % step == 0][:-1]

    def wasted(times: Mapping[int, float], width: int) -> bool:
        return min(times[wider] for wider in widths if wider > width) <= times[width] * (1 + SAME)

    return sum(all(wasted(times, width) for times in kinds) for width in offered) / max(1, len(offered))


def probes() -> dict[str, Plan]:
    """All that is timed to know a target, by name."""
    plans = {_key("conv", pair, width): _pair("conv", width, pair) for pair in (FP32, INT8) for width in NARROW + WIDE}
    plans |= {_key("linear", pair, width): _pair("linear", width, pair) for pair in (FP32, INT8) for width in LINEAR}
    plans |= {_bits_key(pair): _pair("conv", AROUND, pair) for pair in PAIRS}
    mixed = [INT8 if number % 2 == 0 else FP32 for number in range(CHAIN)]
    plans |= {name: _chain(bits) for name, bits in
              (("fp32", [FP32] * CHAIN), ("INT8", [INT8] * CHAIN), ("mixed", mixed))}  # fmt: skip
    return plans


def _key(kind: str, pair: LayerBits, width: int) -> str:
    return f"{kind} {pair} {width}"


def _bits_key(pair: LayerBits) -> str:
    return f"bits {pair}"


def _pair(kind: str, width: int, bits: LayerBits) -> Plan:
    """Two layers around a width."""
    around = AROUND if kind == "conv" else LINEAR_AROUND
    return _planned([_layer(kind, "a", "x", width), _layer(kind, "b", "a", around)], [bits, bits])


def _chain(bits: Sequence[LayerBits]) -> Plan:
    names = ["x", *"abcd"[: len(bits)]]
    return _planned([_layer("conv", b, a, AROUND) for a, b in itertools.pairwise(names)], bits)


def _layer(kind: str, name: str, source: str, channels: int) -> Op:
    if kind == "linear":
        return Op(name=name, kind="linear", inputs=(source,), shape=(1, channels), module=name)
    settings: dict[str, Any] = {
        "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1
    }  # fmt: skip
    return Op(name=name, kind="conv", inputs=(source,), shape=(1, channels, SIZE, SIZE), module=name, attrs=settings)


def _planned(layers: Sequence[Op], bits: Sequence[LayerBits]) -> Plan:
    shape = (1, AROUND, SIZE, SIZE) if layers[0].kind == "conv" else (1, LINEAR_AROUND)
    anatomy = Anatomy(
        digest="probe",
        ops=(Op(name="x", kind="input", inputs=(), shape=shape), *layers),
        output=layers[-1].name,
        groups=(),
        layers=tuple(Layer(name=op.name, kind=op.kind, op=op.name, macs=0, params=0) for op in layers),
        blocks=(),
        left_out=(),
        params=0,
    )
    chosen = {op.name: pair for op, pair in zip(layers, bits, strict=True) if pair != FP32}
    return plan(anatomy, Policy(model=anatomy.digest, bits=chosen))


def _stairs(timings: Mapping[str, Timing]) -> tuple[Stair, ...]:
    named = (("conv", CONV, NARROW + WIDE), ("linear", "linear", LINEAR))
    return tuple(
        Stair(
            name=f"{name} {precision}",
            points=tuple((width, timings[_key(kind, pair, width)].latency_ms) for width in widths),
        )
        for kind, name, widths in named for precision, pair in zip(PRECISIONS, (FP32, INT8), strict=True)
    )  # fmt: skip


def _kernel_here(target: Target, planned: Plan, path: Path) -> str:
    session = open_session(path, target.runtime, threads=1, disabled_optimizers=target.disabled_optimizers)
    return session.bits_used(planned)["a"]


def _change_ms(timings: Mapping[str, Timing]) -> float:
    """A chain of integers changes twice, at its ends, one of fp32 never, the mixed one as often as it has layers."""
    mixed, integers, floats = (timings[name].latency_ms for name in ("mixed", "INT8", "fp32"))
    return max(0.0, (mixed - (integers + floats) / 2) / (CHAIN - 1))


def _cache_path(target: Target) -> Path:
    settings = {**target_to_dict(target), "channel_steps": None, "integer_kernels": None, "integer_bits": None}
    parts = [fingerprint_to_dict(fingerprint(target)), settings, Path(__file__).read_text()]
    return cache_folder() / f"capabilities-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.json"


def _keep(path: Path, found: Capabilities) -> None:
    try:
        write_whole(path, lambda partial: partial.write_text(json.dumps(found.to_dict())))
    except OSError as error:
        log.warning("%s cannot be kept: %s", path, error)
