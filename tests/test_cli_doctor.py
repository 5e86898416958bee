"""What doctor says of a machine: which runtimes run, what their kernels do, how far its timings can be trusted."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tiny
from nightpress.cli.doctor import kernel_lines, noise_words
from nightpress.evaluators.latency.measure import Timing
from nightpress.evaluators.latency.target import RUNTIMES, missing_runtime

QUIET = Timing(windows_ms=(1.0, 1.01, 1.02), reference_ms=None, busy_cores=0.0)
UNSETTLED = Timing(windows_ms=(1.0, 1.3, 1.5), reference_ms=None, busy_cores=0.0)
BUSY = Timing(windows_ms=(1.0, 1.01, 1.02), reference_ms=None, busy_cores=1.25)
UNTOLD = Timing(windows_ms=(1.0, 1.01, 1.02), reference_ms=None, busy_cores=None)


@pytest.mark.parametrize(
    ("timing", "spread", "floor", "words"),
    [
        (QUIET, 0.04, 0.02, "A night here can tell models apart that differ by 3 % or more."),
        (QUIET, 0.05, 0.02, "cannot tell models apart that differ by less than 3%; each of its latencies states its"),
        (QUIET, 0.01, 0.04, "cannot tell models apart that differ by less than 6%; each of its latencies states its"),
        (UNSETTLED, 0.3, 0.1, "never agreed within 2 %: a night here marks its latencies as unsettled, and no differ"),
        (UNSETTLED, 0.3, 0.1, "no difference below 30% between two models means anything."),
        (UNSETTLED, 0.3, 0.4, "no difference below 40% between two models means anything."),
    ],
)  # fmt: skip
def test_noise_is_said_with_what_it_means(timing: Timing, spread: float, floor: float, words: str) -> None:
    said = noise_words(spread, floor, timing, 2)

    assert said.startswith(
        f"Timings: 3 windows of one model, spread over seconds, lie {spread:.1%} (median) above the lowest; measured "
        f"twice, the model differs from itself by {floor:.1%}. "
    )
    assert words in said
    assert "Other processes" not in said


@pytest.mark.parametrize(("timing", "said"), [(QUIET, False), (UNTOLD, False), (BUSY, True)])
def test_what_else_uses_the_cores_is_said(timing: Timing, said: bool) -> None:
    told = " Other processes use 1.2 of 2 cores: end them for the night."
    assert noise_words(0.01, 0.01, timing, 2).endswith(told) == said


KERNELS: dict[str, Any] = {
    "widths": [
        {"weights": 32, "activations": 32, "kernel": "fp32", "speedup": 1.0},
        {"weights": 8, "activations": 8, "kernel": "int8", "speedup": 2.714},
    ],
    "channel_steps": {"fp32": [[0, 4], [64, 16]], "INT8": [[0, 4]], "both": [[0, 4], [64, 8]]},
    "change_ms": 0.00349,
    "change_elements": 12544,
}


@pytest.mark.parametrize("settled", [True, False])
def test_kernels_are_told_in_words(settled: bool) -> None:
    [line] = kernel_lines({"onnxruntime": {**KERNELS, "settled": settled}})

    assert line == (
        "onnxruntime: 32-bit weights with 32-bit activations on fp32 kernels at 1 times the speed of fp32, 8-bit "
        "weights with 8-bit activations on int8 kernels at 2.7 times the speed of fp32; channel steps for fp32 alone "
        "4 from 0, 16 from 64, for INT8 alone 4 from 0, for both 4 from 0, 8 from 64; a change of precision costs "
        "3.5 µs on 12,544 numbers." + ("" if settled else " The windows did not agree, so the steps are not measured.")
    )  # fmt: skip


@pytest.mark.slow
def test_doctor_answers_where_a_runtime_is_installed_and_does_not_start(tmp_path: Path) -> None:
    """OpenVINO with a library missing, as onnxruntime-gpu is without its GPU."""
    if missing_runtime("openvino") is not None:
        pytest.skip("openvino is not installed, so it cannot fail to start")
    (tmp_path / "openvino.py").write_text('raise ImportError("libopenvino.so: cannot open shared object file")\n')
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    done = subprocess.run(
        tiny.command("doctor", "--fresh", "--json"), env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"packages", "machine", "runtimes", "kernels", "noise"}
    assert found["packages"]["nightpress"]
    assert {"machine", "cpu", "flags", "cores", "load", "cuda"} <= set(found["machine"])
    assert [entry["runtime"] for entry in found["runtimes"]] == list(RUNTIMES)
    missing = {entry["runtime"]: entry["missing"] for entry in found["runtimes"]}
    assert missing["onnxruntime"] is None
    assert missing["openvino"].endswith("libopenvino.so: cannot open shared object file")
    assert set(found["kernels"]) == {name for name, reason in missing.items() if reason is None}
    assert {"widths", "channel_steps", "change_ms", "staircases"} <= set(found["kernels"]["onnxruntime"])
    assert {"windows_ms", "repeat_error", "floor", "settled", "busy_cores", "meaning"} <= set(found["noise"])
