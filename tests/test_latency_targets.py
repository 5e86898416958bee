"""What holds for every runtime: the policy's bits are run, the answers are torch's, times come with their nodes."""

import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torchvision import models

import tiny as night
from nightpress.evaluators import builtin
from nightpress.evaluators.apply import Compressor
from nightpress.evaluators.bake import bake
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.evaluate import Evaluator, Job, Recipe
from nightpress.evaluators.latency import timer as script
from nightpress.evaluators.latency.measure import REFERENCE, MeasurementError, Timer, write_random
from nightpress.evaluators.latency.nodes import Matcher
from nightpress.evaluators.latency.target import RUNTIMES, Target, check_target, missing_runtime
from nightpress.evaluators.latency.units import Worker
from nightpress.evaluators.onnx_graph import build_onnx
from nightpress.evaluators.quantise import end_observation, quantisers
from nightpress.evaluators.runtime import bits_used, check_bits, open_session, optimised_graph
from nightpress.search.records import LEAST_AGREEMENT
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import choices_of
from nightpress.spaces.policy import FP32, INT8, Policy
from nightpress.spaces.space import uniform
from strategies import CLASSES, compressor_of, images, seeded, space_of, task_of, tiny

POLICIES = {
    "uncompressed": Policy(model=tiny().anatomy.digest),
    "half on integers": uniform(tiny().anatomy, width=0.5, bits=INT8),
    "mixed": Policy(model=tiny().anatomy.digest, bits={tiny().anatomy.layers[1].name: INT8}),
}


@cache
def absent(runtime: str) -> str | None:
    """Why a runtime cannot be tested here: it is not installed, or its device does not start."""
    missing = missing_runtime(runtime)
    if missing is not None or script.PROVIDERS.get(runtime, script.PROVIDERS["onnxruntime"])[0].startswith("CPU"):
        return missing  # a CPU that does not start is a failure
    with tempfile.TemporaryDirectory() as folder, Timer(Target(runtime=runtime)) as timer:
        write_random(plan(tiny().anatomy, POLICIES["uncompressed"]), Path(folder) / "model.onnx")
        try:
            timer.time({"it": Path(folder) / "model.onnx"}, None, least_rounds=1, most_rounds=1)
        except MeasurementError as error:
            return str(error)
    return None


@pytest.fixture(params=RUNTIMES)
def target(request: pytest.FixtureRequest) -> Target:
    reason = absent(request.param)
    if reason is not None:
        pytest.skip(reason)
    return Target(runtime=request.param)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_runtime_runs_what_the_policy_says_and_answers_as_torch_does(
    target: Target, policy: Policy, tmp_path: Path
) -> None:
    module, planned = tiny().apply(policy)
    path = tmp_path / "model.onnx"
    path.write_bytes(build_onnx(planned, bake(module, planned)))
    session = open_session(path, target.runtime, threads=1, disabled_optimizers=target.disabled_optimizers)

    check_bits(session.bits_used(planned), planned)

    with torch.no_grad():
        expected = module(images(1))
    atol = 1e-4 if policy == POLICIES["uncompressed"] else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(session.outputs(images(1)), expected, atol=atol, rtol=1e-3)


@pytest.mark.slow
def test_a_finalist_is_judged_in_its_target_s_runtime(
    target: Target, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = night.place(tmp_path_factory)
    recipe = Recipe(
        task=place.task, base=None, anatomy=place.anatomy, seed=0, compute=Compute(), batch_size=64, threads=1,
        disabled_optimizers=target.disabled_optimizers, runtime=target.runtime,
    )  # fmt: skip
    policy = uniform(place.anatomy, width=0.5, bits=INT8)

    outcome = Evaluator(recipe)(Job(policy=policy, rung="long", seed=0, steps=0, folder=tmp_path))

    assert set((outcome.bits_used or {}).values()) == {"int8"}
    assert (outcome.top1_agreement or 0.0) >= LEAST_AGREEMENT
    assert outcome.exported is not None
    assert outcome.exported.samples == 80


@pytest.mark.slow
def test_a_runtime_times_models_and_their_nodes(target: Target, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{number}.onnx" for number, name in enumerate(POLICIES)}
    for name, path in files.items():
        write_random(plan(tiny().anatomy, POLICIES[name]), path)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(files["mixed"].read_bytes()[:100])

    with Timer(target) as timer:
        timings = timer.time(
            files, files["uncompressed"], least_rounds=1, most_rounds=1, kernels=True, window_ms=2, round_ms=10
        )
        with pytest.raises(MeasurementError, match=rf"^{target.runtime} cannot load broken\.onnx: [^\n]+$"):
            timer.time({"broken": broken}, None)

    assert set(timings) == {REFERENCE, *files}
    for timing in timings.values():
        assert timing.latency_ms > 0
        assert timing.kernels
        assert all(kernel.ms > 0 and kernel.op_type for kernel in timing.kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_openvino_runs_on_integers_what_its_predictor_counts_so(seed: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    anatomy, target = tiny().anatomy, Target(runtime="openvino")
    policy = space_of(anatomy).random(np.random.default_rng(seed))
    path = tmp_path / "model.onnx"
    write_random(plan(anatomy, policy), path)
    model = openvino.Core().read_model(path)
    model.reshape({model.inputs[0]: openvino.PartialShape([1, 3, 8, 8])})
    options = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    request.infer([np.zeros((1, 3, 8, 8), np.float32)])
    nodes = [n for n in request.get_profiling_info() if n.exec_type.endswith("I8")]

    ran = Matcher(anatomy).match({n.node_name: (n.node_type, 1.0) for n in nodes}).kernels

    units = Worker(anatomy, target.runtime).work(choices_of(anatomy, [policy])).units
    counted = {int(site) for u in units if u.layer and u.kind.endswith(".int8") for site in u.site}
    convolutions = {i for i, op in enumerate(anatomy.ops) if op.kind == "conv"}  # a last linear layer loses its name
    assert {i for i in convolutions if not np.isnan(ran[i])} == counted & convolutions


def test_nodes_of_openvino_are_timed_without_the_runs_that_warm_it_up() -> None:
    class Warming(script.OpenVino):
        """Says what OpenVINO says: the mean of all runs there were."""

        def __init__(self, runs_ms: list[float]) -> None:
            self._profile, self._runs, self._warm, self._runs_ms = True, 0, script.WARM_RUNS, runs_ms
            self._infer = SimpleNamespace(infer=lambda: None, get_profiling_info=self._told)

        def _told(self) -> list[SimpleNamespace]:
            mean = timedelta(milliseconds=float(np.mean(self._runs_ms[: self._runs])))
            return [SimpleNamespace(status="Status.EXECUTED", node_name="n", node_type="Convolution", real_time=mean)]

    first, second = [90.0, 20.0, 1.0, 2.0, 3.0], [30.0, 10.0, 4.0]
    model = Warming([*first, *second])
    for runs_ms, mean_ms in ((first, 2.0), (second, 4.0)):
        for _ in runs_ms:
            model.run()
        assert model.kernels() == {"n": ("Convolution", pytest.approx(mean_ms, rel=0.01))}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_not_there_is_refused_with_what_brings_it(runtime: str) -> None:
    missing = missing_runtime(runtime)
    if missing is None:
        check_target(Target(runtime=runtime))
        return
    assert "pip install" in missing
    with pytest.raises(InputError, match="pip install"):
        check_target(Target(runtime=runtime))


def test_more_threads_than_cores_are_refused() -> None:
    cores = script.cores()
    with pytest.raises(InputError, match=rf"^target\.threads must be between 1 and this machine's {cores} cores, but"):
        check_target(Target(threads=cores + 1))


# What a processor has


def test_where_linux_does_not_tell_a_processor_s_flags_numpy_does(tmp_path: Path) -> None:
    nowhere = tmp_path / "cpuinfo"
    by_numpy = script.told_flags(script.read_cpuinfo(nowhere))

    assert {"avx2", "avx512f", "avx512_vnni", "asimddp"} <= by_numpy.keys()
    assert script.processor(nowhere)["flags"] == [flag for flag, there in by_numpy.items() if there]
    by_linux = script.told_flags(script.read_cpuinfo())
    assert by_linux.keys() >= by_numpy.keys()
    if script.CPUINFO.is_file():
        assert {flag: by_linux[flag] for flag in by_numpy} == by_numpy
        assert by_linux.keys() == set(script.FLAGS)


@pytest.mark.parametrize(
    ("told", "session_config", "doubt"),
    [
        (("avx2", "avx512_vnni"), {"session.x64quantprecision": "1"}, r".* has avx_vnni: integers take kernels that m"),
        (("avx2",), {"session.x64quantprecision": "1"}, r".* has avx512_vnni or avx_vnni: integers take kernels that"),
        (script.FLAGS, {"session.x64quantprecision": "1"}, r"$"),
        (("avx2", "avx512_vnni"), {}, r"$"),  # it has the first
    ],
)  # fmt: skip
def test_kernels_that_may_be_slower_than_need_be_are_told(
    told: tuple[str, ...], session_config: dict[str, str], doubt: str
) -> None:
    assert re.match(doubt, script.doubt_of({"session_config": session_config}, told))


# Graphics cards, without one


def test_the_driver_of_a_graphics_card_is_part_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program of the name that says what NVIDIA's does, and then that it has no driver to talk to."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --query-gpu=name,driver_version ] && echo "NVIDIA T4, 550.54.15"\necho two\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    told = script.device("onnxruntime-cuda")["accelerator"]
    assert re.fullmatch(r"NVIDIA T4, 550\.54\.15(, (CUDA|cuDNN|TensorRT) [\w.+]+)*", told)
    assert script.device("onnxruntime")["accelerator"] is None

    program.write_text('#!/bin/sh\necho "NVIDIA-SMI has failed because it could not talk to the driver"\nexit 9\n')
    assert script.device("onnxruntime-cuda")["accelerator"] is None


def test_each_file_has_its_own_engines_and_all_share_the_times_of_layers(tmp_path: Path) -> None:
    """TensorRT finds an engine by the names of file and nodes, which policies share."""
    paths = [tmp_path / name / "model.onnx" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(str(path))
    one, other = (script.provider_options("TensorrtExecutionProvider", str(path)) for path in paths)

    assert one == script.provider_options("TensorrtExecutionProvider", str(paths[0]))
    assert one["trt_int8_enable"] == one["trt_engine_cache_enable"] == one["trt_timing_cache_enable"] == "True"
    assert one["trt_engine_cache_path"] != other["trt_engine_cache_path"]
    assert one["trt_timing_cache_path"] == other["trt_timing_cache_path"]
    assert all(Path(told[f"trt_{kind}_cache_path"]).is_dir() for told in (one, other) for kind in ("engine", "timing"))
    assert script.provider_options("CUDAExecutionProvider", str(paths[0])) == {}


@pytest.mark.skipif(missing_runtime("onnxruntime-cuda") is None, reason="there is one")
def test_what_runs_on_integers_is_read_from_the_provider_s_own_graph(tmp_path: Path) -> None:
    """Which is refused here, and not answered with the CPU's; TensorRT's cannot be written down."""
    planned = plan(tiny().anatomy, POLICIES["half on integers"])
    path, disabled = tmp_path / "model.onnx", Target().disabled_optimizers
    write_random(planned, path)

    with pytest.raises(RuntimeError, match=r"this onnxruntime has no CUDAExecutionProvider"):
        bits_used(path, planned, disabled, "onnxruntime-cuda")
    assert bits_used(path, planned, disabled, "onnxruntime-tensorrt") == bits_used(path, planned, disabled)


# The timed graph is the shipped graph


def executed(path: Path) -> list[str]:
    """The nodes that the runtime executes: kind, name, attributes, and what goes in and out.

    Constants stand by type and shape: the runtime gives one the name of another that is equal to it. Names stand
    without the numbers that it appends to them.
    """
    graph = optimised_graph(path, Target().disabled_optimizers).graph
    constants = {tensor.name: f"{tensor.data_type}{list(tensor.dims)}" for tensor in graph.initializer}

    def named(name: str) -> str:
        return constants.get(name, re.sub(r"_token_\d+", "", name))

    return sorted(
        repr((node.op_type, named(node.name), [named(n) for n in node.input], [named(n) for n in node.output],
              sorted(attribute.SerializeToString() for attribute in node.attribute)))
        for node in graph.node
    )  # fmt: skip


def observe(module: fx.GraphModule, inputs: Tensor) -> None:
    """Ranges of the activations, as a night takes them."""
    for site in quantisers(module).values():
        site.observing = True
    with torch.no_grad():
        module.eval()(inputs)
    end_observation(module)


def shipped_and_timed(engine: Compressor, policy: Policy, inputs: Tensor, folder: Path) -> tuple[list[str], list[str]]:
    """What the runtime executes of a policy's export, and of the graph that is timed for it."""
    module, planned = engine.apply(policy)
    observe(module, inputs)
    shipped, timed = folder / "shipped.onnx", folder / "timed.onnx"
    shipped.write_bytes(build_onnx(planned, bake(module, planned), batch=None))
    write_random(planned, timed)
    return executed(shipped), executed(timed)


@pytest.mark.slow
def test_a_clip_at_six_is_absorbed_in_the_timed_graph_as_in_the_export(tmp_path: Path) -> None:
    shipped, timed = shipped_and_timed(tiny(), POLICIES["half on integers"], images(32), tmp_path)
    assert shipped == timed
    assert not any("Clip" in node for node in shipped)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_resnet", "mnist_vgg"])
def test_the_runtime_makes_the_same_graph_of_random_weights_as_of_the_export(name: str, tmp_path: Path) -> None:
    network = seeded(getattr(builtin, name))
    engine = compressor_of(task_of(network, images(8, 1, 28)), step=8)
    bits = {layer.name: INT8 if number % 3 else FP32 for number, layer in enumerate(engine.anatomy.layers)}
    mixed = {name: pair for name, pair in bits.items() if pair != FP32}
    for policy in (
        Policy(model=engine.anatomy.digest),
        uniform(engine.anatomy, width=0.5, bits=INT8),
        Policy(model=engine.anatomy.digest, bits=mixed, prune={engine.anatomy.groups[0].name: 0.5}),
    ):
        shipped, timed = shipped_and_timed(engine, policy, images(32, 1, 28), tmp_path)
        assert len(shipped) > 5
        assert shipped == timed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "removes"), [("mobilenet_v3_small", True), ("squeezenet1_1", False), ("resnet18", True)]
)
def test_the_runtime_makes_the_same_graph_of_random_policies_of_torchvision_s_networks(
    name: str, removes: bool, tmp_path: Path
) -> None:
    network = seeded(lambda: models.get_model(name, weights=None, num_classes=CLASSES))
    engine = compressor_of(task_of(network, images(4, 3, 64)), step=8)
    policies = [space_of(engine.anatomy).random(np.random.default_rng(seed)) for seed in range(2)]
    assert any(policy.removed_blocks for policy in policies) == removes
    for policy in policies:
        assert policy.prune
        assert policy.bits
        shipped, timed = shipped_and_timed(engine, policy, images(4, 3, 64), tmp_path)
        assert len(shipped) > 20
        assert shipped == timed


# A machine that does something else


@pytest.mark.slow
def test_windows_that_never_agree_end_with_the_rounds(tmp_path: Path) -> None:
    write_random(plan(tiny().anatomy, POLICIES["uncompressed"]), tmp_path / "model.onnx")
    request = {
        "models": {"it": str(tmp_path / "model.onnx")}, "runtime": "onnxruntime", "threads": 1, "batch": 1,
        "disabled_optimizers": [], "least_rounds": 2, "most_rounds": 6, "window_ms": 1, "round_ms": 1, "agree": -1.0,
        "kernel_passes": 0,
    }  # fmt: skip
    assert len(script.measure(request, {})["windows_ms"]["it"]) == 6  # no two windows lie less than no share apart
    assert len(script.measure({**request, "agree": 100.0}, {})["windows_ms"]["it"]) == 2


def test_a_round_is_calm_where_the_reference_takes_what_it_can() -> None:
    assert script.calm_rounds([1.0, 1.04, 1.2], np.inf) == 2
    assert script.calm_rounds([1.0, 1.0, 1.0], 0.7) == 0  # it was faster an hour ago: something slows the machine


@pytest.mark.slow
def test_while_something_slows_the_reference_windows_that_agree_do_not_end_the_rounds(tmp_path: Path) -> None:
    for name in ("it.onnx", "reference.onnx"):
        write_random(plan(tiny().anatomy, POLICIES["uncompressed"]), tmp_path / name)
    request = {
        "models": {name: str(tmp_path / f"{name}.onnx") for name in ("reference", "it")}, "runtime": "onnxruntime",
        "threads": 1, "batch": 1, "disabled_optimizers": [], "least_rounds": 2, "most_rounds": 5, "window_ms": 1,
        "round_ms": 1, "agree": 100.0, "kernel_passes": 0,
    }  # fmt: skip
    known = {script.digest(tmp_path / "reference.onnx"): 1e-6}

    assert {len(found) for found in script.measure(request, known)["windows_ms"].values()} == {5}
    assert list(known.values()) == [1e-6]
    fresh: script.Lowest = {}
    windows = script.measure(request, fresh)["windows_ms"]["reference"]
    assert fresh == {script.digest(tmp_path / "reference.onnx"): min(windows)}


SHARED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import timer
request = json.loads(sys.argv[2])
models = [timer.load(sys.argv[3], request) for _ in range(8)]
for model in models:
    model.run()
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux lists them")
@pytest.mark.slow
def test_models_on_several_threads_share_them(tmp_path: Path) -> None:
    write_random(plan(tiny().anatomy, POLICIES["uncompressed"]), tmp_path / "model.onnx")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def threads(count: int) -> int:
        request = {"runtime": "onnxruntime", "threads": count, "disabled_optimizers": [], "batch": 1}
        words = [str(Path(script.__file__).parent), json.dumps(request), str(tmp_path / "model.onnx")]
        done = subprocess.run(
            [sys.executable, "-c", SHARED, *words], env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert threads(3) == threads(1) + 2  # three work: the one that calls and two of the pool
