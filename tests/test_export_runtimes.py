"""What else reads an export: other versions of ONNX, Triton's own protobuf, OpenVINO, ONNX Runtime in Node."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import exports
import tiny
from nightpress.evaluators.latency.target import Target, target_to_dict
from nightpress.evaluators.latency.timer import cores
from nightpress.evaluators.onnx_graph import build_onnx, random_tensors
from nightpress.export import Options, export_trial, verify
from nightpress.export.origin import Origin, origin_of
from nightpress.export.triton import config_pbtxt
from nightpress.export.versions import needs_options
from nightpress.search.records import LEAST_AGREEMENT, RunRecord
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import INT8, Policy

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "production.md"
NODE_RUNTIME = "1.30.0"
"""Of onnxruntime-node and onnxruntime-web, which the documentation's program was seen to run with."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return exports.record(exports.run_folder(tmp_path_factory))


@pytest.fixture(scope="module")
def exported(run: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trial 2 runs on integers."""
    out = tmp_path_factory.mktemp("exports") / "two"
    export_trial(run, run.trials[2], out)
    return out


def outputs(path: Path, inputs: np.ndarray | None = None) -> np.ndarray:
    session = verify.open_session(path, target_to_dict(Target()))
    assert not isinstance(session, str), session
    return verify.outputs(session, verify.probe_inputs((1, 8, 8), 16) if inputs is None else inputs)


# Versions of ONNX


@pytest.mark.parametrize("opset", [13, 17, 21, 24])
@pytest.mark.parametrize("trial", [0, 2])
def test_another_opset_is_the_same_model(
    run: RunRecord, exported: Path, tmp_path: Path, opset: int, trial: int
) -> None:
    data = export_trial(run, run.trials[trial], tmp_path / "out", Options(opset=opset))

    model = onnx.load(str(tmp_path / "out" / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert {p.key: p.value for p in model.metadata_props}["nightpress.policy"] == run.trials[trial].digest
    assert data["size_bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size
    verified = run.trials[trial].verified
    assert verified is not None
    np.testing.assert_array_equal(outputs(tmp_path / "out" / "model.onnx"), outputs(run.path / verified.model_file))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["opset"], manifest["ir_version"]) == (opset, model.ir_version)


def test_the_file_is_as_it_was_measured_where_nothing_is_asked(run: RunRecord, exported: Path) -> None:
    verified = run.trials[2].verified
    assert verified is not None
    assert (exported / "model.onnx").read_bytes() == (run.path / verified.model_file).read_bytes()


def test_another_ir_version(run: RunRecord, tmp_path: Path) -> None:
    export_trial(run, run.trials[2], tmp_path / "out", Options(ir_version=10))
    assert onnx.load(str(tmp_path / "out" / "model.onnx")).ir_version == 10


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(opset=12), r"--opset must be between 13 and \d+, but got 12\."),
        (Options(opset=10_000), r"--opset must be between 13 and \d+, but got 10000\."),
        (Options(ir_version=3), r"--ir-version must be between 8, the first with opset 17, and \d+, but got 3\."),
        (Options(ir_version=10_000), r"--ir-version must be between 8, .* but got 10000\."),
        (Options(opset=21, ir_version=9), r"--ir-version must be between 10, the first with opset 21, and"),
    ],
)
def test_versions_that_nothing_reads(run: RunRecord, tmp_path: Path, options: Options, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        export_trial(run, run.trials[2], tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_onnx_knows_and_the_runtime_does_not(run: RunRecord, tmp_path: Path) -> None:
    """ONNX is ahead of ONNX Runtime most of the time: its newest opset is under development there."""
    newest = onnx.defs.onnx_opset_version()
    try:
        export_trial(run, run.trials[2], tmp_path / "out", Options(opset=newest))
    except InputError as error:
        assert f"the model cannot ship with opset {newest}" in str(error)  # noqa: PT017  either answer is right
        assert list(tmp_path.iterdir()) == []
    else:
        assert np.isfinite(outputs(tmp_path / "out" / "model.onnx")).all()


def test_an_fp32_layer_between_integers_needs_the_session_options(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """ONNX Runtime would quantise its weights: see runtime.json and config.pbtxt."""
    anatomy = tiny.place(tmp_path_factory).anatomy
    found: list[bool] = []
    for kept in ({"block.conv1"}, set[str]()):
        bits = {layer.name: INT8 for layer in anatomy.layers if layer.name not in kept}
        planned = plan(anatomy, Policy(model=anatomy.digest, bits=bits))
        path = tmp_path / f"{len(kept)}.onnx"
        path.write_bytes(build_onnx(planned, random_tensors(planned), batch=None))
        found.append(needs_options(path, Target()))
    assert found == [True, False]


# Triton


def parsed(text: str) -> Any:
    """Read by Triton's own protobuf."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    return text_format.Parse(text, messages.ModelConfig())


def test_triton_s_protobuf_reads_the_configuration(exported: Path) -> None:
    config = parsed((exported / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 64)
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    for field, values in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(t.name, list(t.dims)) for t in field] == [(v.name, list(v.shape[1:])) for v in values]
        assert {t.data_type for t in field} == {11}  # TYPE_FP32
    assert config.HasField("dynamic_batching")
    assert [(group.kind, group.count) for group in config.instance_group] == [(2, cores())]  # KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "1"


def origin(run: RunRecord, **fields: Any) -> Origin:
    return replace(origin_of(run, run.trials[2]), **fields)


def test_batches_threads_and_cores_of_the_target_reach_triton(run: RunRecord) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["scores"])], "g",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", 3, 32, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.UINT8, ["n", 3, 32, 16])],
    )  # fmt: skip
    target = Target(threads=4, batch=128, disabled_optimizers=("WeightBiasQuantization",))
    given = origin(run, name='a "quoted"\nname: "x"', target=target, device={"cores": 16})
    config = parsed(config_pbtxt(helper.make_model(graph), given, 2.5, needs_options=True))
    assert config.name == "a__quoted__name___x_"
    assert config.max_batch_size == 128
    assert list(config.dynamic_batching.preferred_batch_size) == [128]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    assert config.instance_group[0].count == 4
    assert [(t.data_type, list(t.dims)) for t in config.input] == [(2, [3, 32, 16])]  # TYPE_UINT8


# GPUs


@pytest.fixture(scope="module")
def for_gpu(run: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for CUDA: making it needs none, as its outputs are those of the CPU."""
    out = tmp_path_factory.mktemp("exports") / "gpu"
    config = {**run.config, "target": {**run.config["target"], "runtime": "onnxruntime-cuda"}}
    export_trial(replace(run, config=config), run.trials[2], out)
    return out


def test_triton_starts_one_instance_on_each_gpu(for_gpu: Path) -> None:
    config = parsed((for_gpu / "config.pbtxt").read_text())
    assert [(group.kind, group.count) for group in config.instance_group] == [(1, 1)]  # KIND_GPU


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_where_the_provider_is_missing_the_latency_is_skipped(for_gpu: Path) -> None:
    checks = verify.verify(for_gpu, verify.Options(), for_gpu / "timer.py")
    assert (checks[-1].name, checks[-1].state) == ("latency", "skipped")
    assert checks[-1].text == (
        "it was measured in onnxruntime-cuda, and the onnxruntime here has no CUDAExecutionProvider"
    )


# OpenVINO


@pytest.mark.slow
def test_openvino_loads_the_onnx_file_and_agrees(exported: Path, run: RunRecord, tmp_path: Path) -> None:
    """Its integer kernels round otherwise, so answers are compared: on the test split, as the night compares torch."""
    openvino = pytest.importorskip("openvino", reason="openvino is in the extra 'test'")
    with np.load(exports.split_file(run.path, tmp_path / "test.npz")) as arrays:
        inputs, targets = arrays["inputs"], arrays["targets"]
    compiled = openvino.compile_model(str(exported / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ours, theirs = outputs(exported / "model.onnx", inputs), compiled(inputs)[0]
    assert theirs.shape == (80, 4)
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= LEAST_AGREEMENT
    assert (theirs.argmax(1) == targets).mean() >= (ours.argmax(1) == targets).mean() - 0.03


@pytest.mark.slow
def test_openvino_s_files_are_the_same_each_time(run: RunRecord, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is in the extra 'test'")
    made = [export_trial(run, run.trials[0], tmp_path / name, Options(openvino=True)) for name in ("one", "two")]
    assert {"openvino/model.xml", "openvino/model.bin"} <= set(made[0]["files"])
    assert made[0]["manifest"] == made[1]["manifest"]
    assert "openvino " in (tmp_path / "one" / "LICENSES.txt").read_text()
    compiled = openvino.compile_model(
        str(tmp_path / "one" / "openvino" / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    theirs = compiled(verify.probe_inputs((1, 8, 8), 16))[0]
    np.testing.assert_allclose(theirs, outputs(tmp_path / "one" / "model.onnx"), atol=1e-3)  # fp32 on both sides


@pytest.mark.slow
def test_an_openvino_target_needs_no_option(run: RunRecord, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is in the extra 'test'")
    config = {**run.config, "target": {**run.config["target"], "runtime": "openvino"}}
    data = export_trial(replace(run, config=config), run.trials[2], tmp_path / "out")
    assert "openvino/model.xml" in data["files"]
    checks = verify.verify(tmp_path / "out", verify.Options(), tmp_path / "out" / "timer.py")
    assert "times as fast as the original" in checks[-1].text


WITHOUT_OPENVINO = """
import sys
sys.modules["openvino"] = None  # importing it fails, and find_spec finds nothing, as where it is not installed
from nightpress.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_without_openvino_its_files_are_left_out_with_a_sentence(run: RunRecord, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_OPENVINO, "export", run.path, "2", "--out", tmp_path / "out", "--openvino"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50)
    assert "openvino is not installed" in done.stderr
    assert not (tmp_path / "out" / "openvino").exists()


@pytest.mark.slow
def test_the_documentation_s_openvino_runs(exported: Path, tiny_batch: np.ndarray) -> None:
    pytest.importorskip("openvino", reason="openvino is in the extra 'test'")
    names: dict[str, Any] = {"batch": tiny_batch}
    exec(program("python", "import openvino").replace('"plates-export/', f'"{exported}/'), names)
    assert (names["logits"].argmax(1) == outputs(exported / "model.onnx")[:3].argmax(1)).all()


def test_the_documentation_s_triton_repository_is_read(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "plates-export").symlink_to(exported)
    [block] = [b.split("```")[0] for b in DOCS.read_text().split("```\n") if "tritonserver" in b]
    commands = [line for line in block.splitlines() if not line.startswith("tritonserver")]
    subprocess.run(["sh", "-ec", "\n".join(commands)], cwd=tmp_path, check=True)
    models = tmp_path / "models" / "plates"
    assert parsed((models / "config.pbtxt").read_text()).name == "plates"
    assert (models / "1" / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()


# Documentation's programs


def program(language: str, mark: str) -> str:
    """The block of production.md in a language that holds a mark."""
    blocks = DOCS.read_text().split(f"```{language}\n")[1:]
    [found] = [block.split("```")[0] for block in blocks if mark in block]
    return found


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, Path], subprocess.CompletedProcess[str]]:
    """Runs a program in Node beside an export, with one of ONNX Runtime's packages installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")

    def call(package: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
        home = Path(sys.prefix) / f"node-{NODE_RUNTIME}"  # kept: one download an environment
        if not (home / "node_modules" / package).is_dir():
            home.mkdir(exist_ok=True)
            wanted = f"{package}@{NODE_RUNTIME}"
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(home), wanted]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
            except subprocess.TimeoutExpired:
                shutil.rmtree(home / "node_modules" / package, ignore_errors=True)  # half of it is taken for all of it
                pytest.skip(f"npm did not install {wanted} within 50 s")
            if done.returncode:
                pytest.skip(f"npm cannot install {wanted}: {done.stderr.strip()[-200:]}")
        script = tmp_path_factory.mktemp("node") / "program.cjs"
        script.write_text(text)
        (script.parent / "node_modules").symlink_to(home / "node_modules")
        return subprocess.run(
            ["node", str(script), str(folder)], capture_output=True, text=True, check=False, timeout=50
        )

    return call


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_node_agrees_with_python(
    exported: Path, package: str, node: Callable[[str, str, Path], subprocess.CompletedProcess[str]]
) -> None:
    text = program("js", "onnxruntime-node").replace('"onnxruntime-node"', json.dumps(package))
    done = node(package, text, exported)
    assert done.returncode == 0, done.stderr
    theirs = np.array(json.loads(done.stdout), np.float32)
    probe = json.loads((exported / "manifest.json").read_text())["probe"]
    np.testing.assert_allclose(theirs.reshape(2, -1), probe, atol=1e-3)


CPP_MAIN = """
#include <iostream>
int main(int, char** argv) {
  std::vector<float> pixels;
  for (float value; std::cin >> value;) pixels.push_back(value);
  for (float value : infer(argv[1], pixels, {3, 1, 8, 8})) std::cout << value << " ";
}
"""


@pytest.mark.slow
def test_the_documentation_s_cpp_agrees_with_python(exported: Path, tiny_batch: np.ndarray, tmp_path: Path) -> None:
    """Against the library that the Python package brings; it has no headers, Debian 13's package has."""
    headers = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
    if shutil.which("g++") is None or not (headers / "onnxruntime_cxx_api.h").is_file():
        pytest.skip(f"no g++, or no onnxruntime_cxx_api.h in {headers}: apt-get install g++ libonnxruntime-dev")
    [library] = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    (tmp_path / "main.cpp").write_text(program("cpp", "onnxruntime_cxx_api.h") + CPP_MAIN)
    # By its path: the linker looks for a name without a version. The library asks for it by its soname.
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    build = ["g++", "-std=c++17", "-I", str(headers), "main.cpp", str(library), f"-Wl,-rpath,{tmp_path}", "-o", "main"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=50)
    done = subprocess.run(
        [tmp_path / "main", exported / "model.onnx"], input=" ".join(map(str, tiny_batch.ravel())), text=True,
        capture_output=True, check=True, timeout=50,
    )  # fmt: skip
    theirs = np.array(done.stdout.split(), np.float32).reshape(3, -1)
    np.testing.assert_allclose(theirs, outputs(exported / "model.onnx")[:3], atol=1e-4)


def test_the_documentation_s_python_runs(exported: Path, tiny_batch: np.ndarray) -> None:
    names: dict[str, Any] = {"folder": str(exported), "batch": tiny_batch}
    exec(program("python", "disabled_optimizers"), names)
    np.testing.assert_allclose(names["logits"], outputs(exported / "model.onnx")[:3], atol=1e-5)


@pytest.fixture
def tiny_batch() -> np.ndarray:
    return verify.probe_inputs((1, 8, 8), 16)[:3]


def test_the_documentation_s_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `nightpress x` of the page is a command, with the options that stand behind it."""
    lines = [line for block in DOCS.read_text().split("```\n") for line in block.splitlines()]
    calls = [line.split() for line in lines if line.startswith("nightpress ")]
    assert len(calls) >= 5
    for call in calls:
        shown = tiny.call(call[1], "--help", capsys=capsys).out
        for word in call[2:]:
            if word.startswith("--"):
                assert word in shown, f"nightpress {call[1]} has no {word}"
