"""OpenVINO's intermediate representation of an exported file."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = "openvino"
# OpenVINO numbers nodes by a counter of the process and writes the numbers into the file: only in a process of its
# own does a model give the same bytes each time. fp16 would change what was measured.
_CONVERT = """
import sys, openvino
openvino.save_model(openvino.convert_model(sys.argv[1]), sys.argv[2], compress_to_fp16=False)
"""


def openvino_there() -> bool:
    """Whether the package is installed."""
    return find_spec("openvino") is not None


def write_openvino(model: Path, folder: Path) -> None:
    """``openvino/model.xml`` and ``model.bin`` below ``folder``. Raises RuntimeError with OpenVINO's reason."""
    target = folder / FOLDER / "model.xml"
    target.parent.mkdir()
    command = [sys.executable, "-c", _CONVERT, str(model), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"OpenVINO cannot convert the model: {reason}")
