"""A gate on the production machine: an export is checked by itself, and what does not hold is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import exports
import tiny
from nightpress.evaluators.latency.timer import processor, session_config
from nightpress.export import export_trial, verify
from nightpress.export.bundle import timer_script
from nightpress.export.verify import Check, Options, VerifyError

QUIET = Options(latency=False)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of trial 2, which runs on integers; to be read only."""
    run = exports.record(exports.run_folder(tmp_path_factory))
    out = tmp_path_factory.mktemp("exports") / "two"
    export_trial(run, run.trials[2], out)
    return out


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """An export to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "export"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = exports.run_folder(tmp_path_factory)
    return exports.split_file(run, tmp_path_factory.mktemp("data") / "test.npz")


def timer(folder: Path, export_ms: float, original_ms: float) -> Path:
    """A timing script that answers these latencies, as the real one would."""
    answer = {"windows_ms": {"export": [export_ms, export_ms * 1.1], "original": [original_ms * 1.1, original_ms]}}
    script = folder / "slow_clock.py"
    script.write_text(f"import sys\nsys.stdin.readline()\nprint({json.dumps(answer)!r})\n")
    return script


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


# The whole command


def test_an_export_that_holds(pristine: Path, data: Path, cli: tiny.Cli) -> None:
    answer = cli("verify", pristine, "--data", data, "--no-latency", "--json").json

    assert answer["dir"] == str(pristine)
    assert answer["holds"] is True
    assert {check["name"]: check["state"] for check in answer["checks"]} == {
        "files": "ok", "outputs": "ok", "accuracy": "ok",
    }  # fmt: skip
    stated = json.loads((pristine / "manifest.json").read_text())["measured"]
    accuracy = answer["checks"][2]["numbers"]
    assert accuracy["accuracy"] == pytest.approx(stated["accuracy"], abs=0.001)
    assert (accuracy["allowed"], accuracy["samples"]) == (0.001, 80)
    assert answer["checks"][1]["numbers"]["max_abs_diff"] == 0.0
    assert "session_config" not in answer["checks"][1]["text"]  # runtime.json is this processor's


def test_one_line_a_check_for_people(pristine: Path, cli: tiny.Cli) -> None:
    result = cli("verify", pristine, "--no-latency")
    assert result.code == 0
    files, outputs, accuracy = result.out.splitlines()
    assert files.startswith("ok      files: ")
    assert outputs.startswith("ok      outputs: ")
    assert accuracy == "skipped accuracy: no data was given (--data)"


def test_strict_fails_what_could_not_be_checked(pristine: Path, cli: tiny.Cli) -> None:
    assert cli("verify", pristine, "--no-latency", "--strict").code == 1


@pytest.mark.slow
def test_the_latency_is_measured_beside_the_original(pristine: Path, cli: tiny.Cli) -> None:
    answer = cli("verify", pristine, "--json")
    latency = json.loads(answer.out)["checks"][3]
    numbers = latency["numbers"]
    assert numbers["ratio"] == pytest.approx(numbers["reference_ms"] / numbers["latency_ms"])
    assert numbers["latency_ms"] > 0
    assert (latency["state"] == "ok") == (numbers["ratio"] >= numbers["low"])
    assert answer.code == (0 if latency["state"] == "ok" else 1)


# Files


@pytest.mark.parametrize("name", ["model.onnx", "card.md", "verify.py", "policy.json", "reference.onnx"])
def test_a_tampered_file_is_named(folder: Path, cli: tiny.Cli, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    result = cli("verify", folder, "--no-latency")
    assert result.code == 1
    assert result.out == f"failed  files: {name} is not the file that was exported: its SHA-256 differs\n"


def test_a_missing_file_is_named(folder: Path, cli: tiny.Cli) -> None:
    (folder / "config.pbtxt").unlink()
    result = cli("verify", folder, "--no-latency")
    assert (result.code, result.out) == (1, "failed  files: config.pbtxt is missing\n")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link/secret"])
def test_a_manifest_that_leads_out_of_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("s")
    (folder / "link").symlink_to(folder.parent)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = verify.sha256(folder.parent / "secret")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    [check] = verify.verify(folder, QUIET, timer_script())
    assert check == Check("files", "failed", f"{name!r} in manifest.json leads out of the folder")


def test_an_export_that_was_replaced_as_a_whole_is_not_the_expected_one(folder: Path, cli: tiny.Cli) -> None:
    digest = verify.sha256(folder / "manifest.json")
    assert cli("verify", folder, "--no-latency", "--expect", digest).code == 0
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"trial": 2', '"trial": 3'))
    result = cli("verify", folder, "--no-latency", "--expect", digest)
    assert result.code == 1
    assert result.out.startswith("failed  files: manifest.json is not the expected one: its SHA-256 is ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "not an export folder: it has no manifest.json"),
        ("{", "not a JSON file"),
        ("[]", "must hold a JSON object"),
        ("{}", r"its manifest\.json is not one of an export \(KeyError: 'files'\)"),
        ('{"files": 3}', r"its manifest\.json is not one of an export \(TypeError"),
    ],
)
def test_a_folder_that_is_no_export(tmp_path: Path, cli: tiny.Cli, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(VerifyError, match=reason):
        verify.verify(tmp_path, QUIET, timer_script())
    assert tiny.refused(cli("verify", tmp_path, "--no-latency"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and let it fit the files that are there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["files"] = {name: verify.sha256(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_model_that_the_runtime_cannot_load(folder: Path) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    model.graph.node[0].op_type = "Nonsense"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rewrite(folder, lambda manifest: None)
    checks = verify.verify(folder, QUIET, timer_script())
    assert [check.state for check in checks] == ["ok", "failed"]
    assert checks[1].text.startswith("ONNX Runtime ")
    assert "Nonsense" in checks[1].text


def rewrite_runtime(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change runtime.json, and let the manifest fit it."""
    runtime = json.loads((folder / "runtime.json").read_text())
    change(runtime)
    (folder / "runtime.json").write_text(json.dumps(runtime))
    rewrite(folder, lambda manifest: None)


def test_outputs_are_judged_as_this_processor_runs_them(folder: Path) -> None:
    """As the timing script does. The option of the other processor would run the integer layers in fp32."""
    rewrite_runtime(folder, lambda runtime: runtime.update(session_config={"session.disable_quant_qdq": "1"}))
    checks = verify.verify(folder, QUIET, timer_script())
    outputs, session = named(checks, "outputs"), named(checks, "session")
    assert (outputs.state, outputs.numbers["max_abs_diff"]) == ("ok", 0.0)
    here = session_config(processor())
    assert (session.state, session.numbers) == ("skipped", {"session_config": here})
    assert session.text.endswith(f"of another processor: serve it here with {json.dumps(here)}")


@pytest.mark.parametrize("missing", ["threads", "providers"])
def test_a_runtime_file_of_something_else_is_named(folder: Path, missing: str) -> None:
    rewrite_runtime(folder, lambda runtime: runtime.pop(missing))
    with pytest.raises(VerifyError, match=rf"its runtime\.json is not one of an export \(KeyError: '{missing}'\)"):
        verify.verify(folder, QUIET, timer_script())


def test_other_outputs_than_the_exporting_machine_s(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["probe"][0][0] += 1.0

    rewrite(folder, change)
    check = named(verify.verify(folder, QUIET, timer_script()), "outputs")
    assert check.state == "failed"
    assert check.numbers["max_abs_diff"] == pytest.approx(1.0)


# Accuracy


def state_accuracy(folder: Path, value: float) -> None:
    rewrite(folder, lambda manifest: manifest["measured"].update(accuracy=value))


def test_a_lower_accuracy_than_the_stated_one_fails(folder: Path, data: Path, cli: tiny.Cli) -> None:
    stated = json.loads((folder / "manifest.json").read_text())["measured"]["accuracy"]
    state_accuracy(folder, stated + 0.0125)  # one more right of the 80
    result = cli("verify", folder, "--data", data, "--no-latency")
    assert result.code == 1
    assert result.out.splitlines()[2].startswith("failed  accuracy: ")
    assert cli("verify", folder, "--data", data, "--no-latency", "--tolerance", "0.02").code == 0


def test_another_sample_may_differ_by_its_standard_error(pristine: Path, data: Path, tmp_path: Path) -> None:
    with np.load(data) as arrays:
        np.savez(tmp_path / "few.npz", inputs=arrays["inputs"][:20], targets=arrays["targets"][:20])
        wrong = (arrays["targets"][:20] + 1) % 4
        np.savez(tmp_path / "wrong.npz", inputs=arrays["inputs"][:20], targets=wrong)
    few = named(verify.verify(pristine, Options(data=tmp_path / "few.npz", latency=False), timer_script()), "accuracy")
    bad = named(
        verify.verify(pristine, Options(data=tmp_path / "wrong.npz", latency=False), timer_script()), "accuracy"
    )
    assert (few.state, few.numbers["samples"]) == ("ok", 20)
    assert few.numbers["allowed"] > 0.05
    assert bad.state == "failed"


def test_a_metric_of_the_task_s_own_is_not_judged(folder: Path, data: Path) -> None:
    rewrite(folder, lambda manifest: manifest["measured"].update(accuracy_se=None))
    check = named(verify.verify(folder, Options(data=data, latency=False), timer_script()), "accuracy")
    assert check.state == "skipped"


@pytest.mark.parametrize("names", [("0", "1", "2", "3"), ("a", "b", "c", "d"), ("00", "01", "02", "03")])
def test_a_folder_of_class_folders(pristine: Path, data: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    with np.load(data) as arrays:
        for number, (item, label) in enumerate(zip(arrays["inputs"], arrays["targets"], strict=True)):
            part = tmp_path / names[int(label)]
            part.mkdir(exist_ok=True)
            np.save(part / f"{number}.npy", item)
    check = named(verify.verify(pristine, Options(data=tmp_path, latency=False), timer_script()), "accuracy")
    assert (check.state, check.numbers["samples"], check.numbers["allowed"]) == ("ok", 80, 0.001)


def test_images_are_resized_scaled_and_normalised(tmp_path: Path) -> None:
    for name, level in (("dark", 51), ("light", 204)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 12), (level, level, level)).save(tmp_path / name / "one.png")
    options = Options(mean=(0.5,), std=(0.25,))
    inputs, targets = verify.read_data(tmp_path, (1, 8, 6), options)
    assert targets.tolist() == [0, 1]
    np.testing.assert_allclose(inputs[0], np.full((1, 8, 6), -1.2), atol=1e-5)
    np.testing.assert_allclose(inputs[1], np.full((1, 8, 6), 1.2), atol=1e-5)
    coloured, _ = verify.read_data(tmp_path, (3, 8, 6), Options(mean=(0.2, 0.2, 0.1), std=(1.0, 2.0, 1.0)))
    np.testing.assert_allclose(coloured[0, :, 0, 0], [0.0, 0.0, 0.1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(mean=(0.1, 0.2)), "mean and std must be one number or 3, one a channel, and std must not be 0"),
        (Options(std=(0.0,)), "std must not be 0"),
    ],
)
def test_a_normalisation_that_makes_no_sense(tmp_path: Path, options: Options, reason: str) -> None:
    (tmp_path / "0").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "0" / "one.png")
    with pytest.raises(VerifyError, match=reason):
        verify.read_data(tmp_path, (3, 8, 8), options)


def test_numbers_that_are_none(pristine: Path, cli: tiny.Cli) -> None:
    sentence = tiny.refused(cli("verify", pristine, "--mean", "0.1,x", "--no-latency"))
    assert sentence == "mean and std must be numbers separated by commas, but got '0.1,x'."


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def broken_data(kind: str, path: Path) -> Path:
    """Data that must be refused."""
    match kind:
        case "no file":
            return path / "none.npz"
        case "no arrays":
            return write_npz(path / "a.npz", x=np.zeros(3))
        case "pickled":
            return write_npz(path / "a.npz", inputs=np.array([None]), targets=np.zeros(1))
        case "shape":
            return write_npz(path / "a.npz", inputs=np.zeros((4, 3, 8, 8)), targets=np.zeros(4))
        case "lengths":
            return write_npz(path / "a.npz", inputs=np.zeros((4, 1, 8, 8)), targets=np.zeros(3))
        case "text":
            return write_npz(path / "a.npz", inputs=np.full((4, 1, 8, 8), "x"), targets=np.zeros(4))
        case "no dimensions":
            return write_npz(path / "a.npz", inputs=np.zeros(()), targets=np.zeros(()))
        case "an array":
            np.save(path / "a.npy", np.zeros((4, 1, 8, 8)))
            return path / "a.npy"
        case "truncated":
            write_npz(path / "whole.npz", inputs=np.zeros((4, 1, 8, 8)), targets=np.zeros(4))
            (path / "a.npz").write_bytes((path / "whole.npz").read_bytes()[:999])
            return path / "a.npz"
        case "damaged":  # within a compressed array
            np.savez_compressed(path / "a.npz", inputs=np.arange(256.0).reshape(4, 1, 8, 8), targets=np.zeros(4))
            data = (path / "a.npz").read_bytes()
            (path / "a.npz").write_bytes(data[:99] + bytes([255]) * 20 + data[119:])
            return path / "a.npz"
        case "arrays of one item":
            (path / "d" / "0").mkdir(parents=True)
            write_npz(path / "a.npz", x=np.zeros((1, 8, 8))).rename(path / "d" / "0" / "one.npy")
            return path / "d"
        case "empty folder":
            (path / "empty").mkdir()
            return path / "empty"
        case _:
            (path / "d" / "0").mkdir(parents=True)
            (path / "d" / "0" / "one.npy").write_bytes(b"torn")
            return path / "d"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no file", r"none\.npz: must be an \.npz file with the arrays inputs and targets"),
        ("no arrays", "must be an .npz file with the arrays inputs and targets"),
        ("pickled", "must be an .npz file with the arrays inputs and targets"),
        ("shape", r"inputs must have shape \(n, 1, 8, 8\) with n labels, but got \(4, 3, 8, 8\) and \(4,\)"),
        ("lengths", r"but got \(4, 1, 8, 8\) and \(3,\)"),
        ("text", "inputs and targets must be numbers, but got <U1 and float64"),
        ("no dimensions", r"but got \(\) and \(\)"),
        ("an array", r"a\.npy: must be an \.npz file with the arrays inputs and targets"),
        ("truncated", r"a\.npz: must be an \.npz file with the arrays inputs and targets"),
        ("damaged", r"a\.npz: must be an \.npz file with the arrays inputs and targets"),
        ("arrays of one item", r"one\.npy: must have shape \(1, 8, 8\), but got None"),
        ("empty folder", "must hold one folder a class, with .npy files or images in it"),
        ("torn", r"one\.npy: cannot be read"),
    ],
)
def test_data_that_cannot_be_read(pristine: Path, tmp_path: Path, cli: tiny.Cli, kind: str, reason: str) -> None:
    path = broken_data(kind, tmp_path)
    with pytest.raises(VerifyError, match=reason):
        verify.verify(pristine, Options(data=path, latency=False), timer_script())
    assert tiny.refused(cli("verify", pristine, "--data", path, "--no-latency"))


# Latency


@pytest.mark.parametrize(
    ("export_ms", "state", "more"),
    [(0.1, "ok", ""), (0.5, "failed", ""), (0.01, "ok", ", so it gains more on this machine")],
)
def test_only_a_smaller_gain_than_stated_fails(
    pristine: Path, tmp_path: Path, export_ms: float, state: str, more: str
) -> None:
    """Stated are 0.4 ms against 0.1 ms."""
    check = named(verify.verify(pristine, Options(), timer(tmp_path, export_ms, 0.4)), "latency")
    assert check.state == state
    assert check.text.endswith(f"stated 4.00 within 3.60 to 4.44{more}")
    assert check.numbers["ratio"] == pytest.approx(0.4 / export_ms)


def test_a_timer_that_dies_is_a_failed_check(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "dead.py").write_text("raise SystemExit(3)")
    check = named(verify.verify(pristine, Options(), tmp_path / "dead.py"), "latency")
    assert (check.state, check.text) == ("failed", "it could not be measured: the timing process ended")


def test_an_export_without_its_original_is_not_measured(folder: Path, tmp_path: Path) -> None:
    (folder / "reference.onnx").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["reference.onnx"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check = named(verify.verify(folder, Options(), timer(tmp_path, 1, 1)), "latency")
    assert check.state == "skipped"


def test_the_original_is_shipped_without_its_weights(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = exports.run_folder(tmp_path_factory)
    original = (run / "artifacts" / "reference.onnx").stat().st_size
    assert (pristine / "reference.onnx").stat().st_size < original / 3
    kinds = [sorted(n.op_type for n in optimised(path)) for path in
             (run / "artifacts" / "reference.onnx", pristine / "reference.onnx")]  # fmt: skip
    assert kinds[0] == kinds[1]


def optimised(path: Path) -> list[onnx.NodeProto]:
    from nightpress.evaluators.runtime import optimised_graph

    return list(optimised_graph(path, ("WeightBiasQuantization",)).graph.node)


# By itself


def test_the_shipped_script_gives_the_same_answer(pristine: Path, data: Path, cli: tiny.Cli) -> None:
    ours = cli("verify", pristine, "--data", data, "--no-latency", "--json").json
    done = subprocess.run(  # -P: Python does not look for modules beside the script
        [sys.executable, "-P", "verify.py", "--data", data, "--no-latency", "--json"], cwd=pristine,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checks"] == ours["checks"]


def test_the_shipped_script_says_what_is_wrong_in_one_sentence(pristine: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, pristine / "verify.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"verify: {tmp_path}: not an export folder: it has no manifest.json.\n"


@pytest.mark.parametrize("kind", ["an array", "truncated"])
def test_the_shipped_script_refuses_data_as_the_command_does(
    pristine: Path, tmp_path: Path, cli: tiny.Cli, kind: str
) -> None:
    path = broken_data(kind, tmp_path)
    done = subprocess.run(
        [sys.executable, pristine / "verify.py", "--data", path, "--no-latency"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"verify: {tiny.refused(cli('verify', pristine, '--data', path, '--no-latency'))}\n"


def test_the_shipped_script_says_which_library_is_missing(pristine: Path) -> None:
    done = subprocess.run(  # -I -S: without the packages that are installed here
        [sys.executable, "-I", "-S", pristine / "verify.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "verify: numpy is not installed: pip install numpy onnxruntime\n"
