"""Times ONNX files in windows that are spread in time. Runs as a process of its own and does nothing else.

Needs only numpy and the runtime, and nothing of nightpress, so that it can run on another device. Requests and answers
are JSON, one line each, on standard input and output; beside a ``kit.json`` it measures that kit instead. A request:
``{"models": {key: path}, "runtime": "onnxruntime", "threads": 1, "batch": 1, "disabled_optimizers": [],
"least_rounds": 4, "most_rounds": 20, "window_ms": 25, "round_ms": 600, "agree": 0.02, "kernel_passes": 0}``;
the answer ``{"windows_ms": {key: [...]}, "kernels": {key: {node: [op_type, ms]}}, "busy_cores": 0.1, "session": name}``
or ``{"error": sentence}``. ``kernels`` are those of the runtime's own profiler, which slows what it watches, and are
there when ``kernel_passes`` is not 0. Python 3.9 is enough.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Union

import numpy as np

Kernels = dict[str, tuple[str, float]]
Lowest = dict[str, float]
"""What each reference has taken at the least so far, by the digest of its file."""
PROVIDERS = {
    "onnxruntime": ["CPUExecutionProvider"],
    "onnxruntime-cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "onnxruntime-tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
PROVIDER_OPTIONS = {"TensorrtExecutionProvider": {"trt_int8_enable": "True"}}
"""TensorRT refuses quantised models unless it is told to expect them."""
EXACT_INTEGERS = {"session.x64quantprecision": "1"}
X64, VNNI = frozenset({"x86_64", "AMD64"}), frozenset({"avx512_vnni", "avx_vnni"})
PACKAGES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",)}
"""Distributions that bring a runtime, by the first part of its name."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
"""Of the CPU: those that choose kernels."""
LEAST_RUNS, MOST_RUNS, WARM_RUNS = 5, 80, 2
"""Of a profiled pass; the profiler writes a line a kernel and run."""
HALF_TICK_MS = 0.0005
"""OpenVINO counts whole microseconds."""
SECOND_ROUNDS = 8
"""The most of a second look, minutes after the first."""
KEPT_BYTES = 2**29
"""Files whose compiled models wait for a second look."""
REFERENCE = "reference"
CALM, LEAST_CALM = 0.05, 2
"""A round is calm when the reference is so near to the lowest it ever took; a model is timed in so many of them."""
KIT, RESULTS = "kit.json", "results.json"
_KERNEL = "_kernel_time"
IDLE = (3, 4)
"""Which numbers of a line of ``/proc/stat`` are ticks of idleness, for whatever reason."""


class OnnxRuntime:
    """A session with the options of the request."""

    LASTING = False
    """Whether its profiler can be read more than once, and loading it takes so long that it is kept."""

    def __init__(self, path: str, request: Mapping[str, Any], profile: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if request["threads"] > 1 and _shared_pool(request["threads"]):
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = request["threads"]
            options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for name, value in session_config(processor()).items():
            options.add_session_config_entry(name, value)
        options.enable_profiling = profile
        self._folder = tempfile.TemporaryDirectory(prefix="nightpress-") if profile else None
        if self._folder is not None:
            options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = start_session(path, options, request["runtime"], request["disabled_optimizers"])
        source = self._session.get_inputs()[0]
        self._feed = {source.name: _random([request["batch"], *source.shape[1:]])}

    def run(self) -> None:
        self._session.run(None, self._feed)

    def kernels(self) -> Kernels:
        """Milliseconds of each node over all runs of a profiled session, which ends."""
        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text())
        times: dict[str, list[float]] = {}
        types: dict[str, str] = {}
        for event in events:
            name = str(event["name"])
            if event.get("cat") == "Node" and name.endswith(_KERNEL):
                node = name[: -len(_KERNEL)]
                times.setdefault(node, []).append(event["dur"] / 1000)
                types[node] = str(event["args"]["op_name"])
        if self._folder is not None:
            self._folder.cleanup()
        # The mean of the lower half: bursts of other work only add, and the profiler counts whole microseconds.
        return {n: (types[n], float(np.sort(found)[: (len(found) + 1) // 2].mean())) for n, found in times.items()}


class OpenVino:
    """A compiled model on the CPU, in fp32 where the file is, without the half precisions that OpenVINO may choose."""

    LASTING = True

    def __init__(self, path: str, request: Mapping[str, Any], profile: bool = False) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        shape = [request["batch"], *(size.get_length() for size in list(model.inputs[0].partial_shape)[1:])]
        model.reshape({model.inputs[0]: openvino.PartialShape(shape)})
        options = {
            "INFERENCE_NUM_THREADS": request["threads"],
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": profile,
        }
        self._infer: Any = core.compile_model(model, "CPU", options).create_infer_request()
        self._infer.set_input_tensor(openvino.Tensor(_random(shape)))
        self._profile, self._runs, self._warm = profile, 0, WARM_RUNS
        self._warming: Kernels = {}

    def run(self) -> None:
        self._infer.infer()
        self._runs += 1
        if self._profile and self._runs == self._warm:
            self._warming = self._averages()

    def _averages(self) -> Kernels:
        """Type and milliseconds of each node that was executed, which OpenVINO averages over all runs there were."""
        return {
            info.node_name: (info.node_type, info.real_time.total_seconds() * 1000)
            for info in self._infer.get_profiling_info()
            if str(info.status).endswith("EXECUTED")
        }

    def kernels(self) -> Kernels:
        """Type and milliseconds of each node in the runs since the last answer. The first of them are taken out of the
        averages, with all before: in them weights and buffers are touched for the first time, which takes a node up to
        ten times as long."""
        found, runs, warm = self._averages(), self._runs, min(self._warm, self._runs - 1)
        self._warm = runs + WARM_RUNS
        return {
            node: (kind, max(HALF_TICK_MS, (runs * ms - warm * self._warming.get(node, (kind, ms))[1]) / (runs - warm)))
            for node, (kind, ms) in found.items()
        }


_pools: list[int] = []
"""Threads of the pool that this process's sessions share: there can be one."""


def _shared_pool(threads: int) -> bool:
    """Whether ONNX Runtime's sessions share a pool of so many threads. The threads of a session's own pool spin for a
    while after its run and take the cores from the model that is timed next, which takes up to four times as long."""
    import onnxruntime

    if not _pools and hasattr(onnxruntime, "set_global_thread_pool_sizes"):  # a kit's device may have an older one
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        _pools.append(threads)
    return threads in _pools


Model = Union[OnnxRuntime, OpenVino]  # noqa: UP007  a kit's device may have Python 3.9
BACKENDS: dict[str, type[Model]] = {**dict.fromkeys(PROVIDERS, OnnxRuntime), "openvino": OpenVino}


def start_session(path: str, options: Any, runtime: str, disabled_optimizers: Collection[str]) -> Any:
    """A session of ONNX Runtime on the first of the runtime's providers. Raises RuntimeError where it has none."""
    import onnxruntime

    wanted = PROVIDERS[runtime]
    if missing := set(wanted) - set(onnxruntime.get_available_providers()):
        raise RuntimeError(f"this onnxruntime has no {min(missing)}")
    if len(wanted) > 1 and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA as pip installs it lies where no loader looks
    session = onnxruntime.InferenceSession(
        path, options, providers=wanted, provider_options=[PROVIDER_OPTIONS.get(name, {}) for name in wanted],
        disabled_optimizers=list(disabled_optimizers), enable_fallback=0,
    )  # fmt: skip
    # A provider that cannot start is left out by the runtime without an error.
    if session.get_providers()[0] != wanted[0]:
        raise RuntimeError(f"{wanted[0]} is installed but does not start on this machine")
    return session


def _random(shape: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def load(path: str, request: Mapping[str, Any], profile: bool = False) -> Model:
    """Raises RuntimeError with the runtime's reason in one line."""
    try:
        return BACKENDS[request["runtime"]](path, request, profile)
    except Exception as error:  # the runtimes raise types of their own that share no base
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise RuntimeError(f"{request['runtime']} cannot load {Path(path).name}: {reason}") from error


def load_all(paths: Mapping[str, str], request: Mapping[str, Any], profile: bool = False) -> dict[str, Model]:
    """The models of files: those that wait for a second look, and the others loaded, as many at once as there are cores
    where loading one takes long. Raises RuntimeError as :func:`load`."""
    if not BACKENDS[request["runtime"]].LASTING:
        return {key: load(path, request, profile) for key, path in paths.items()}

    def one(path: str) -> Model:
        return (None if profile else kept(path, request)) or load(path, request, profile)

    with ThreadPoolExecutor(cores()) as pool:
        return dict(zip(paths, pool.map(one, paths.values())))  # noqa: B905  strict came with Python 3.10


def window(model: Model, window_ms: float) -> float:
    """Low percentile of the run times within one window, in ms: bursts of other work only ever add."""
    model.run()  # caches of the model before are gone: not counted
    times: list[float] = []
    end = time.perf_counter() + window_ms / 1000
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        model.run()
        times.append(time.perf_counter() - start)
    return float(np.percentile(times, 10)) * 1000


def kernel_pass(model: Model, request: Mapping[str, Any]) -> Kernels:
    """One pass of the runtime's profiler."""
    runs, end = 0, time.perf_counter() + 2 * request["window_ms"] / 1000
    while runs < LEAST_RUNS or (runs < MOST_RUNS and time.perf_counter() < end):
        model.run()
        runs += 1
    return model.kernels()


_waiting: dict[tuple[Any, ...], tuple[Model, int]] = {}
"""Compiled models that were timed with their kernels, and the bytes of their files. A calibration times them again."""


def keep(path: str, request: Mapping[str, Any], model: Model) -> None:
    """Have the model for the next request that times this file, unless too many wait."""
    size = Path(path).stat().st_size
    if sum(size for _, size in _waiting.values()) + size <= KEPT_BYTES:
        _waiting[_key(path, request)] = model, size


def kept(path: str, request: Mapping[str, Any]) -> Model | None:
    """The model of this file if it waits, which it does no longer."""
    return _waiting.pop(_key(path, request), (None, 0))[0] if _waiting else None


def _key(path: str, request: Mapping[str, Any]) -> tuple[Any, ...]:
    return request["runtime"], request["threads"], request["batch"], digest(Path(path))


def settled(windows: list[float], share: float) -> bool:
    """Whether the two lowest windows lie within a share of each other."""
    lowest = sorted(windows)[:2]
    return len(lowest) == 2 and lowest[1] <= lowest[0] * (1 + share)


def calm_rounds(windows: list[float], lowest_ms: float) -> int:
    """Rounds in which the reference took no longer than it can: a neighbour on the same hardware slows a machine for
    seconds on end, in which windows agree with each other all the same."""
    floor = min([lowest_ms, *windows])
    return sum(window <= floor * (1 + CALM) for window in windows)


def measure(request: Mapping[str, Any], known: Lowest) -> dict[str, Any]:
    """All models in turn, round after round, until the two lowest windows of each agree and two rounds were calm, or
    the rounds are up. ``known`` is read and brought up to date.

    Rounds beyond the least hold the models that have not settled, and the first of the request beside them; all models
    as long as there is no second calm round.
    """
    paths: dict[str, str] = request["models"]
    models = load_all(paths, request)
    for model in models.values():
        model.run()
    reference = digest(Path(paths[REFERENCE])) if REFERENCE in paths else None
    windows: dict[str, list[float]] = {key: [] for key in models}
    passes: dict[str, list[Kernels]] = {key: [] for key in models}
    lasting = BACKENDS[request["runtime"]].LASTING
    watched = load_all(paths, request, profile=True) if lasting and request["kernel_passes"] else {}
    first, before, began = next(iter(models), ""), busy_seconds(), time.perf_counter()
    for number in range(request["most_rounds"]):
        start = time.perf_counter()
        open_ = {key for key in models if not settled(windows[key], request["agree"])}
        if reference is not None and calm_rounds(windows[REFERENCE], known.get(reference, np.inf)) < LEAST_CALM:
            open_ = set(models)
        if number >= request["least_rounds"] and not open_:
            break
        for key, model in models.items():
            if number < request["least_rounds"] or key in open_ or key == first:
                windows[key].append(window(model, request["window_ms"]))
        if number < request["kernel_passes"]:
            for key, path in paths.items():
                model = watched[key] if lasting else load(path, request, profile=True)
                passes[key].append(kernel_pass(model, request))
        if number + 1 < request["most_rounds"]:
            time.sleep(max(0.0, request["round_ms"] / 1000 - (time.perf_counter() - start)))
    if reference is not None:
        known[reference] = min([known.get(reference, np.inf), *windows[REFERENCE]])
    after, seconds = busy_seconds(), max(time.perf_counter() - began, 1e-9)
    busy = None if before is None or after is None else max(0.0, (after - before) / seconds)
    kernels = {key: lowest(found) for key, found in passes.items() if found}
    for key, model in models.items():
        if lasting and (request["kernel_passes"] or key == REFERENCE):
            keep(paths[key], request, model)
    return {"windows_ms": windows, "kernels": kernels, "busy_cores": busy, "session": f"{time.time_ns():x}"}


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lowest(passes: list[Kernels]) -> Kernels:
    """Of each node its lowest time over the passes."""
    found: Kernels = {}
    for kernels in passes:
        for node, (kind, milliseconds) in kernels.items():
            found[node] = (kind, min(milliseconds, found.get(node, (kind, milliseconds))[1]))
    return found


def busy_seconds() -> float | None:
    """Seconds that all processes but this one have used since the machine was started, of the cores that this one may
    use; what a hypervisor took counts too. None where the system does not tell (it is Linux that does)."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    try:
        ticks = busy_ticks(Path("/proc/stat").read_text(), cpus)
    except OSError:
        return None
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def busy_ticks(stat: str, cpus: Collection[int]) -> int:
    """Ticks of the text of ``/proc/stat`` in which these CPUs worked; in which any did where it does not list them."""
    lines = {line.split()[0]: line.split()[1:9] for line in stat.splitlines() if line.startswith("cpu")}
    listed = [lines[name] for name in map("cpu{}".format, cpus) if name in lines] or [lines["cpu"]]
    return sum(int(t) for ticks in listed for kind, t in enumerate(ticks) if kind not in IDLE)


def session_config(device: Mapping[str, Any]) -> dict[str, str]:
    """What a session of ONNX Runtime must be told on a device, of which ``machine`` and ``flags`` are looked at.

    On an x64 processor without VNNI its usual integer kernels add two products in 16 bits, which saturates: what runs
    is not what was trained. Then others are taken. They are no better where there is VNNI, and 2.5 times as slow.
    """
    saturates = device.get("machine") in X64 and not VNNI.intersection(device.get("flags", ()))
    return dict(EXACT_INTEGERS) if saturates else {}


@cache
def processor() -> dict[str, Any]:
    """That of this machine."""
    info = _cpuinfo()
    known = (info.get("flags") or info.get("Features") or "").split()
    return {
        "machine": platform.machine(),
        "cpu": info.get("model name") or info.get("Model") or platform.processor() or "unknown",
        "flags": [flag for flag in FLAGS if flag in known],
    }


def device(runtime: str) -> dict[str, Any]:
    """What numbers of this machine and runtime hold for."""
    return {
        **processor(),
        "session_config": session_config(processor()) if runtime.startswith("onnxruntime") else {},
        "cores": cores(),
        "runtime_version": runtime_version(runtime),
        "accelerator": None if runtime in {"onnxruntime", "openvino"} else _accelerator(),
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runtime_version(runtime: str) -> str | None:
    """None where the runtime is not installed."""
    for name in PACKAGES[runtime.split("-")[0]]:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _accelerator() -> str | None:
    """The first graphics card's name, as its driver tells it."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(asked[0]) is None:
        return None
    return (subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines() or [None])[0]


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    pairs = [line.split(":", 1) for line in path.read_text(errors="replace").splitlines() if ":" in line]
    # Of the first core; a board's own name stands at the end.
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def serve() -> None:
    """Answer requests until standard input closes."""
    known: Lowest = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # the runtime prints what it thinks of a provider
    for line in sys.stdin:
        try:
            answer = measure(json.loads(line), known)
        except Exception as error:  # noqa: BLE001  the answer is the only way to tell the parent
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def measure_kit(folder: Path) -> dict[str, Any]:
    """Time the files of a kit on this device; the results hold the kit's own description.

    Raises ValueError or OSError when the kit is damaged or this device cannot run it, RuntimeError with the runtime's
    reason when it does not load a model.
    """
    kit: dict[str, Any] = json.loads((folder / KIT).read_text())
    target, models = kit["target"], kit["models"]
    runtime = target["runtime"]
    if runtime_version(runtime) is None:
        package = runtime if len(PROVIDERS.get(runtime, ())) < 2 else "onnxruntime-gpu"
        raise ValueError(f"{runtime} is not installed here: pip install {package}")
    if target["threads"] > cores():
        raise ValueError(f"the kit asks for {target['threads']} threads, but this device has {cores()} cores")
    probes = kit.get("probes", {})
    for entry in [*models.values(), *probes.values()]:
        if digest(folder / entry["file"]) != entry["sha256"]:
            raise ValueError(f"{entry['file']} is not the file that the kit was made with")
    began, known = time.perf_counter(), Lowest()
    keys, request = [key for key in models if key != REFERENCE], kit["request"]
    results: dict[str, Any] = {"kit": kit, "device": device(runtime)}

    def look(keys: list[str], request: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {key: {} for key in ("windows_ms", "kernels", "reference_ms", "sessions")}
        busy: list[float] = []
        for start in range(0, len(keys), kit["at_once"]):
            chosen = [REFERENCE, *keys[start : start + kit["at_once"]]]
            sys.stderr.write(f"measuring models {start + 1} to {start + len(chosen) - 1} of {len(keys)}\n")
            paths = {key: str(folder / models[key]["file"]) for key in chosen}
            answer = measure({**request, **target, "models": paths}, known)
            found["windows_ms"].update(answer["windows_ms"])
            found["reference_ms"].update(dict.fromkeys(chosen, min(answer["windows_ms"][REFERENCE])))
            found["sessions"].update(dict.fromkeys(chosen, answer["session"]))
            found["kernels"].update(answer["kernels"])
            busy += [answer["busy_cores"]] if answer["busy_cores"] is not None else []
        return {**found, "busy_cores": max(busy, default=None)}

    results |= look(keys, request)
    sys.stderr.write("the same models a second time\n")
    shuffled = np.random.default_rng(0).permutation(keys).tolist()
    rounds = min(SECOND_ROUNDS, request["most_rounds"])
    results["again"] = look(shuffled, {**request, "kernel_passes": 0, "most_rounds": rounds})
    if probes:
        sys.stderr.write(f"measuring {len(probes)} single layers\n")
        start, paths = time.perf_counter(), {key: str(folder / entry["file"]) for key, entry in probes.items()}
        answer = measure({**kit["probe_request"], **target, "models": paths}, known)
        results["probes"] = {**answer, "seconds": time.perf_counter() - start}
    return {**results, "seconds": time.perf_counter() - began, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def main() -> int:
    """``python measure.py`` in a kit measures it; elsewhere requests are answered."""
    folder = Path(__file__).resolve().parent
    if not (folder / KIT).is_file():
        serve()
        return 0
    try:
        results = measure_kit(folder)
        partial = folder / "results.partial"
        partial.write_text(json.dumps(results))
        partial.replace(folder / RESULTS)
    except Exception as error:  # noqa: BLE001  the runtimes raise types of their own that share no base
        sys.stderr.write(f"measure: {' '.join(str(error).split()) or type(error).__name__}.\n")
        return 1
    sys.stderr.write(f"wrote {folder / RESULTS}: bring it back for nightpress calibrate TASK --from results.json\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
