"""An export runs where nothing of nightpress is installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import exports
import tiny
from nightpress.evaluators.task import load_task
from nightpress.export import export_trial

pytestmark = pytest.mark.slow

# Reads the session options from the export itself, as production would.
SCRIPT = """
import json, sys, pathlib
import numpy, onnxruntime
assert not any(name in sys.modules for name in ("torch", "nightpress"))
folder = pathlib.Path(sys.argv[1])
runtime = json.loads((folder / "runtime.json").read_text())
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = runtime["threads"]
for name, value in runtime["session_config"].items():
    options.add_session_config_entry(name, value)
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=runtime["providers"],
                                       disabled_optimizers=runtime["disabled_optimizers"])
data = numpy.load(sys.argv[2])
logits = session.run(["logits"], {"input": data["inputs"]})[0]
print(float((logits.argmax(axis=1) == data["targets"]).mean()))
"""


def test_a_bare_environment_reproduces_the_stated_accuracy(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    night = tiny.night(tmp_path_factory)
    stated = tiny.nightpress("export", night.run, "best", "--out", tmp_path / "export", "--json").json
    inputs, targets = load_task(night.task).test.tensors  # type: ignore[attr-defined]
    np.savez(tmp_path / "test.npz", inputs=inputs.numpy(), targets=targets.numpy())
    python = tiny.bare_python(tmp_path / "bare")
    (tmp_path / "script.py").write_text(SCRIPT)

    without = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    ran = subprocess.run(
        [python, tmp_path / "script.py", tmp_path / "export", tmp_path / "test.npz"], capture_output=True, text=True
    )

    assert "No module named 'torch'" in without.stderr
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(stated["accuracy"], abs=0.001)
    assert sys.executable != str(python)


def test_a_bare_environment_runs_the_shipped_check(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whether the speed holds depends on what else this machine does; that it is measured and compared does not."""
    run = exports.run_folder(tmp_path_factory)
    record = exports.record(run)
    export_trial(record, record.trials[2], tmp_path / "export")
    data = exports.split_file(run, tmp_path / "test.npz")

    ran = subprocess.run(
        [tiny.bare_python(tmp_path / "bare"), tmp_path / "export" / "verify.py", "--data", data, "--json"],
        capture_output=True, text=True,
    )  # fmt: skip

    answer = json.loads(ran.stdout)
    checks = {check["name"]: check for check in answer["checks"]}
    assert {name: checks[name]["state"] for name in ("files", "outputs", "accuracy")} == {
        "files": "ok", "outputs": "ok", "accuracy": "ok",
    }  # fmt: skip
    speed = checks["latency"]["numbers"]
    assert speed["ratio"] == pytest.approx(speed["reference_ms"] / speed["latency_ms"])
    assert (checks["latency"]["state"] == "ok") == (speed["ratio"] >= speed["low"])
    assert ran.returncode == (0 if checks["latency"]["state"] == "ok" else 1)
