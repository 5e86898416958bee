"""Light things import lightly: policies without torch, `--help` without the libraries of a night."""

import subprocess
import sys
from pathlib import Path

# fmt: off
HEAVY = frozenset({
    "onnx", "onnxruntime", "onnxscript", "openvino", "optuna", "pandas", "plotly", "pyarrow", "ray", "scipy",
    "sklearn", "timm", "torch", "torchvision",
})
# fmt: on

HELP = """
import sys
from nightpress.cli import main

sys.argv = ["nightpress", "--help"]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
if code:
    sys.exit(f"nightpress --help ended with {code!r}")
"""

SPACES = """
import importlib, pkgutil
import nightpress.spaces as package

names = [found.name for found in pkgutil.walk_packages(package.__path__, "nightpress.spaces.")]
for name in names:
    importlib.import_module(name)
assert "nightpress.spaces.space" in names, names
"""

WORDS = """
from pathlib import Path
from nightpress.reports.markdown import markdown
from nightpress.search.records import RunRecord

state = {"state": "done", "seconds": {"search": 60.0}}  # there is a figure to be drawn
run = RunRecord(path=Path("run"), config={}, state=state, trials=(), decisions=(), target=None, sensitivity=None)
assert "The night took 1 min 0 s" in markdown(run)
"""

LIST_MODULES = """
import sys
print("\\nmodules:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def heavy_after(code: str, cwd: Path) -> frozenset[str]:
    """Heavy modules that a fresh interpreter holds after `code`, run in a folder away from the checkout."""
    command = [sys.executable, "-c", code + LIST_MODULES]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    marker, *names = done.stdout.splitlines()[-1].split()
    assert marker == "modules:"
    return HEAVY.intersection(names)


def test_spaces_needs_no_heavy_library(tmp_path: Path) -> None:
    assert heavy_after(SPACES, tmp_path) == frozenset()


def test_help_needs_no_heavy_library(tmp_path: Path) -> None:
    assert heavy_after(HELP, tmp_path) == frozenset()


def test_a_report_in_words_needs_no_heavy_library(tmp_path: Path) -> None:
    assert heavy_after(WORDS, tmp_path) == frozenset()


def test_a_heavy_import_is_seen(tmp_path: Path) -> None:
    """The tests above can fail."""
    assert "pandas" in heavy_after("import pandas", tmp_path)
