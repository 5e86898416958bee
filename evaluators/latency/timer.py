"""Times ONNX files in windows that are spread in time. Runs as a process of its own and does nothing else.

Needs only numpy and the runtime, and nothing of nightpress, so that it can run on another device. Requests and answers
are JSON, one line each, on standard input and output; beside a ``kit.json`` it measures that kit instead. A request:
``{"models": {key: path}, "runtime": "onnxruntime", "threads": 1, "batch": 1, "disabled_optimizers": [],
"least_rounds": 4, "most_rounds": 20, "window_ms": 25, "round_ms": 600, "agree": 0.02, "kernel_passes": 0}``, with
``"seconds": 60`` where it must be over by then; the answer ``{"windows_ms": {key: [...]}, "kernels": {key: {node:
[op_type, ms]}}, "busy_cores": 0.1, "session": name, "seconds": 9.5}`` or ``{"error": sentence}``. ``kernels`` are those
of the runtime's own profiler, which slows what it watches, where there are passes. Python 3.9 is enough.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
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
Request = Mapping[str, Any]
Lowest = dict[str, float]  # what each reference has taken at the least so far, by the digest of its file
PROVIDERS = {
    "onnxruntime": ["CPUExecutionProvider"],
    "onnxruntime-cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "onnxruntime-tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
X64, VNNI = frozenset({"x86_64", "AMD64"}), frozenset({"avx512_vnni", "avx_vnni"})
PACKAGES = {  # distributions that bring a runtime, by the first part of its name, or what it computes with
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",),
    "cuDNN": ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"), "TensorRT": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
}  # fmt: skip
GPU = ("cuDNN", "TensorRT")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
"""Of the CPU: those that choose kernels."""
LEAST_RUNS, MOST_RUNS, WARM_RUNS = 5, 80, 2  # of a profiled pass; the profiler writes a line a kernel and run
HALF_TICK_MS = 0.0005  # OpenVINO counts whole microseconds
KEPT_BYTES = 2**29  # files whose compiled models wait for a second look
CALM, LEAST_CALM = 0.05, 2
"""A round is calm when the reference is so near to the lowest it ever took; a model is timed in so many of them."""
REFERENCE, KIT, RESULTS = "reference", "kit.json", "results.json"
CPUINFO = Path("/proc/cpuinfo")
_KERNEL = "_kernel_time"
IDLE = (3, 4)  # which numbers of a line of /proc/stat are ticks of idleness


class OnnxRuntime:
    """A session with the options of the request."""

    LASTING = False  # whether its profiler can be read more than once, and loading it takes so long that it is kept

    def __init__(self, path: str, request: Request, profile: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = request["threads"] == 1 or not _shared_pool(request["threads"])
        options.intra_op_num_threads, options.inter_op_num_threads = request["threads"], 1
        options.log_severity_level = 3
        for name, value in session_config(processor()).items():
            options.add_session_config_entry(name, value)
        options.enable_profiling = profile
        if profile:
            options.profile_file_prefix = str(Path(scratch().name) / "profile")
        self._session = start_session(path, options, request["runtime"], request["disabled_optimizers"])
        source = self._session.get_inputs()[0]
        self._feed = {source.name: _random([request["batch"], *source.shape[1:]])}

    def run(self) -> None:
        self._session.run(None, self._feed)

    def kernels(self) -> Kernels:
        """Milliseconds of each node over all runs of a profiled session, which ends."""
        file = Path(self._session.end_profiling())
        events: list[dict[str, Any]] = json.loads(file.read_text())
        file.unlink()
        times: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL):
                node = str(event["name"])[: -len(_KERNEL)]
                times.setdefault((node, event["args"]["op_name"]), []).append(event["dur"] / 1000)
        # The mean of the lower half: bursts of other work only add, and the profiler counts whole microseconds.
        return {n: (kind, float(np.sort(found)[: (len(found) + 1) // 2].mean())) for (n, kind), found in times.items()}


class OpenVino:
    """A compiled model on the CPU, in fp32 where the file is, without the half precisions that OpenVINO may choose."""

    LASTING = True

    def __init__(self, path: str, request: Request, profile: bool = False) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        shape = [request["batch"], *(size.get_length() for size in list(model.inputs[0].partial_shape)[1:])]
        model.reshape({model.inputs[0]: openvino.PartialShape(shape)})
        options = {"INFERENCE_NUM_THREADS": request["threads"], "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32",
                   "PERF_COUNT": profile}  # fmt: skip
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


_pools: list[int] = []  # threads of the pool that this process's sessions share: there can be one


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
        path, options, providers=wanted, provider_options=[provider_options(name, path) for name in wanted],
        disabled_optimizers=list(disabled_optimizers), enable_fallback=0,
    )  # fmt: skip
    # A provider that cannot start is left out by the runtime without an error.
    if session.get_providers()[0] != wanted[0]:
        raise RuntimeError(f"{wanted[0]} is installed but does not start on this machine")
    return session


def provider_options(provider: str, path: str) -> dict[str, str]:
    """What a provider is told. TensorRT refuses quantised models unless it is told to expect them. It builds for
    minutes and finds what it built by the names of file and nodes, which policies share: each file has its own folder.
    How long layers take does not depend on the file. All is gone with this process: none outlives a version."""
    if provider != "TensorrtExecutionProvider":
        return {}
    built = Path(scratch().name) / digest(Path(path))
    built.mkdir(exist_ok=True)
    caches = {"engine": str(built), "timing": str(built.parent)}
    told = {"trt_int8_enable": "True", **{f"trt_{kind}_cache_enable": "True" for kind in caches}}
    return {**told, **{f"trt_{kind}_cache_path": folder for kind, folder in caches.items()}}


@cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Gone with this process."""
    return tempfile.TemporaryDirectory(prefix="nightpress-")


def _random(shape: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def load(path: str, request: Request, profile: bool = False) -> Model:
    """Raises RuntimeError with the runtime's reason in one line."""
    try:
        return BACKENDS[request["runtime"]](path, request, profile)
    except Exception as error:  # the runtimes raise types of their own that share no base
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise RuntimeError(f"{request['runtime']} cannot load {Path(path).name}: {reason}") from error


def load_all(paths: Mapping[str, str], request: Request, end: float, profile: bool = False) -> dict[str, Model]:
    """The models of files, as many as begin to load in half of the time to ``end``: those that wait for a second look,
    and the others loaded, several at once where loading one takes long. Raises RuntimeError as :func:`load`."""
    until = (time.perf_counter() + end) / 2

    def one(path: str) -> Model | None:
        if time.perf_counter() > until:
            return None
        waits = _waiting.pop(_key(path, request), None) if _waiting and not profile else None
        return waits[0] if waits else load(path, request, profile)

    with ThreadPoolExecutor(cores()) as pool:
        loaded = (pool.map if BACKENDS[request["runtime"]].LASTING else map)(one, paths.values())
        return {key: model for key, model in zip(paths, loaded) if model is not None}  # noqa: B905  Python 3.9


def window(model: Model, window_ms: float, until: float = math.inf) -> float:
    """Low percentile of the run times within one window, in ms: bursts of other work only ever add. At least three
    runs, but none that begins after ``until`` beside the first."""
    model.run()  # caches of the model before are gone: not counted
    times: list[float] = []
    end = time.perf_counter() + window_ms / 1000
    while not times or time.perf_counter() < (until if len(times) < 3 else min(end, until)):
        start = time.perf_counter()
        model.run()
        times.append(time.perf_counter() - start)
    return float(np.percentile(times, 10)) * 1000


def kernel_pass(model: Model, request: Request, until: float = math.inf) -> Kernels:
    """One pass of the runtime's profiler."""
    runs, end = 0, time.perf_counter() + 2 * request["window_ms"] / 1000
    while not runs or (time.perf_counter() < (until if runs < LEAST_RUNS else min(end, until)) and runs < MOST_RUNS):
        model.run()
        runs += 1
    return model.kernels()


_waiting: dict[tuple[Any, ...], tuple[Model, int]] = {}
"""Compiled models that were timed with their kernels, and the bytes of their files. A calibration times them again."""


def keep(path: str, request: Request, model: Model) -> None:
    """Have the model for the next request that times this file, unless too many wait."""
    size = Path(path).stat().st_size
    if sum(size for _, size in _waiting.values()) + size <= KEPT_BYTES:
        _waiting[_key(path, request)] = model, size


def _key(path: str, request: Request) -> tuple[Any, ...]:
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


def measure(request: Request, known: Lowest) -> dict[str, Any]:
    """All models in turn, round after round, until the two lowest windows of each agree and two rounds were calm, or
    rounds or seconds are up. ``known`` is read and brought up to date.

    Rounds beyond the least hold the models that have not settled, and the first of the request beside them; all models
    as long as there is no second calm round. With seconds, no more models are begun than can have a second window; the
    others are not in the answer.
    """
    paths: dict[str, str] = request["models"]
    end = time.perf_counter() + request.get("seconds", math.inf)
    lasting, wanted = BACKENDS[request["runtime"]].LASTING, request["kernel_passes"]
    models = load_all(paths, request, end)
    watched = load_all(paths, request, end, profile=True) if lasting and wanted else {}
    reference = digest(Path(paths[REFERENCE])) if REFERENCE in paths else None
    windows: dict[str, list[float]] = {key: [] for key in models}
    passes: dict[str, list[Kernels]] = {key: [] for key in models}
    first, before, began = next(iter(models), ""), busy_seconds(), time.perf_counter()
    for number in range(request["most_rounds"]):
        start = time.perf_counter()
        open_ = {key for key in models if not settled(windows[key], request["agree"])}
        if reference is not None and calm_rounds(windows[REFERENCE], known.get(reference, np.inf)) < LEAST_CALM:
            open_ = set(models)
        if (number >= request["least_rounds"] and not open_) or start > end:
            break
        until = end if number else (start + end) / 2
        for key, model in models.items():
            if time.perf_counter() > until and windows[first]:
                break
            if number < request["least_rounds"] or key in open_ or key == first:
                windows[key].append(window(model, request["window_ms"], end))
            if number < wanted:
                passes[key].append(kernel_pass(watched.get(key) or load(paths[key], request, True), request, end))
        models = {key: model for key, model in models.items() if windows[key]}
        if number + 1 < request["most_rounds"]:
            time.sleep(max(0.0, min(start + request["round_ms"] / 1000, end) - time.perf_counter()))
    if reference is not None:
        known[reference] = min([known.get(reference, np.inf), *windows[REFERENCE]])
    after, seconds = busy_seconds(), max(time.perf_counter() - began, 1e-9)
    busy = None if before is None or after is None else max(0.0, (after - before) / seconds)
    for key, model in models.items():
        if lasting and (wanted or key == REFERENCE):
            keep(paths[key], request, model)
    kernels = {key: lowest(passes[key]) for key in models if passes[key]}
    timed = {key: windows[key] for key in models if len(windows[key]) > (math.isfinite(end) and key != REFERENCE)}
    return {"windows_ms": timed, "kernels": kernels, "busy_cores": busy, "session": f"{time.time_ns():x}",
            "seconds": seconds}  # fmt: skip


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lowest(passes: list[Kernels]) -> Kernels:
    """Of each node its lowest time over the passes."""
    nodes = dict.fromkeys(node for kernels in passes for node in kernels)
    return {node: min((p[node] for p in passes if node in p), key=lambda kernel: kernel[1]) for node in nodes}


def busy_seconds() -> float | None:
    """Seconds that all processes but this one have used since the machine was started, of the cores that this one may
    use; what a hypervisor took counts too. None where the system does not tell (it is Linux that does)."""
    stat, cpus = Path("/proc/stat"), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if not stat.is_file():
        return None
    return busy_ticks(stat.read_text(), cpus) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


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
    return {"session.x64quantprecision": "1"} if saturates else {}


def doubt_of(device: Mapping[str, Any], told: Collection[str]) -> str:
    """What to say of a device whose sessions are told something that it may not need; nothing where that is known."""
    untold = " or ".join(sorted(VNNI.difference(told))) if device["session_config"] else ""
    said = f"nothing here tells whether this processor has {untold}: integers take kernels that may be slower"
    return said if untold else ""


@cache
def processor(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """That of this machine."""
    info = read_cpuinfo(cpuinfo)
    name = info.get("model name") or info.get("Model") or platform.processor() or "unknown"
    flags = [flag for flag, there in told_flags(info).items() if there]
    return {"machine": platform.machine(), "cpu": name, "flags": flags}


def told_flags(info: Mapping[str, str]) -> dict[str, bool]:
    """Whether the processor has each of the flags that Linux tells of, or elsewhere numpy, which knows fewer."""
    known = (info.get("flags") or info.get("Features") or "").split()
    if known:
        return {flag: flag in known for flag in FLAGS}
    numpys: Any = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]
    features = {name.lower(): there for name, there in numpys.__cpu_features__.items()}
    return {flag: features[name] for flag in FLAGS if (name := flag.replace("_", "")) in features}


def read_cpuinfo(path: Path = CPUINFO) -> dict[str, str]:
    """What Linux tells of the first core; nothing elsewhere."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}  # a board's own name stands at the end


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
    """The first graphics card and its driver, as that tells them, and versions of what computes on it: the CUDA that
    onnxruntime was built for, and libraries that pip installed."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    import onnxruntime

    numbers = {"CUDA": getattr(onnxruntime, "cuda_version", None), **{n: runtime_version(n) for n in GPU}}
    return ", ".join([*told.splitlines()[:1], *(f"{name} {number}" for name, number in numbers.items() if number)])


def end_with(parent: int) -> None:
    """End this process within a second of its parent; a closed standard input may be that of one who asks once."""
    while os.getppid() == parent:
        time.sleep(1)
    scratch().cleanup()
    os._exit(1)


def serve(parent: int) -> int:
    """Answer requests until standard input closes."""
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    known: Lowest = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # the runtime prints what it thinks of a provider
    for line in sys.stdin:
        try:
            answer = measure(json.loads(line), known)
        except Exception as error:  # noqa: BLE001  the answer is the only way to tell the parent
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def measure_kit(folder: Path) -> dict[str, Any]:
    """Time the files of a kit on this device; the results hold the kit's own description. Raises ValueError or OSError
    when the kit is damaged or this device cannot run it, RuntimeError with the runtime's reason when that cannot."""
    kit: dict[str, Any] = json.loads((folder / KIT).read_text())
    target, files = kit["target"], {**kit["models"], **kit["probes"]}
    runtime = target["runtime"]
    if runtime_version(runtime) is None:
        package = runtime if len(PROVIDERS.get(runtime, ())) < 2 else "onnxruntime-gpu"
        raise ValueError(f"{runtime} is not installed here: pip install {package}")
    if target["threads"] > cores():
        raise ValueError(f"the kit asks for {target['threads']} threads, but this device has {cores()} cores")
    for entry in files.values():
        if digest(folder / entry["file"]) != entry["sha256"]:
            raise ValueError(f"{entry['file']} is not the file that the kit was made with")
    results: dict[str, Any] = {"kit": kit, "device": device(runtime), "answers": []}
    if doubt := doubt_of(results["device"], told_flags(read_cpuinfo())):
        sys.stderr.write(doubt + "\n")
    began, known = time.perf_counter(), Lowest()
    for part in kit["parts"]:
        sys.stderr.write(f"{part['what']}: {len(part['keys'])} models\n")
        paths = {key: str(folder / files[key]["file"]) for key in part["keys"]}
        results["answers"].append(measure({**part["request"], **target, "models": paths}, known))
    return {**results, "seconds": time.perf_counter() - began, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def main() -> int:
    """``python measure.py`` in a kit measures it; elsewhere requests are answered."""
    folder = Path(__file__).resolve().parent
    if not (folder / KIT).is_file():
        return serve(int(sys.argv[1]) if sys.argv[1:] else os.getppid())  # who asks may be gone before this begins
    try:
        partial = folder / "results.partial"
        partial.write_text(json.dumps(measure_kit(folder)))
        partial.replace(folder / RESULTS)
    except Exception as error:  # noqa: BLE001  the runtimes raise types of their own that share no base
        sys.stderr.write(f"measure: {' '.join(str(error).split()) or type(error).__name__}.\n")
        return 1
    sys.stderr.write(f"wrote {folder / RESULTS}: bring it back for nightpress calibrate TASK --from results.json\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
