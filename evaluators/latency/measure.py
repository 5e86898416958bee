"""Measured latency: models are timed beside the uncompressed one, in a process that does nothing else."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...spaces.anatomy import Anatomy
from ...spaces.plan import Plan, plan
from ...spaces.policy import Policy
from ..onnx_graph import build_onnx, random_tensors
from .target import Fingerprint, Target, fingerprint

REFERENCE = "reference"
AT_ONCE = 32  # models open at the same time, to bound memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Windows of one model in ms. The latency is the lowest; the repeat error how far the second lowest lies
    above it, as a share; ``reference_ms`` the uncompressed model's lowest window in the same session."""

    windows_ms: tuple[float, ...]
    reference_ms: float | None

    @property
    def latency_ms(self) -> float:
        return min(self.windows_ms)

    @property
    def repeat_error(self) -> float:
        lowest = sorted(self.windows_ms)[:2]
        return lowest[-1] / lowest[0] - 1

    @property
    def ratio(self) -> float | None:
        return self.reference_ms / self.latency_ms if self.reference_ms else None

    def halves_ms(self) -> tuple[float, float]:
        """Two independent measurements of the same model: the lowest of the even and of the odd windows."""
        return min(self.windows_ms[::2]), min(self.windows_ms[1::2] or self.windows_ms)


class MeasurementError(RuntimeError):
    """The timing process ended or the runtime refused a model; the text is its reason in one line."""


class Timer:
    """A child process that times models. Training must pause while it works: that is its owner's promise."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("timer.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fingerprint(self) -> Fingerprint:
        """The device that it times on."""
        return fingerprint(self.target)

    def close(self) -> None:
        """End the child."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # what a dead child did not read
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def time(
        self,
        models: Mapping[str, Path],
        reference: Path | None,
        *,
        least_rounds: int = 4,
        most_rounds: int = 12,
    ) -> dict[str, Timing]:
        """Time model files, interleaved with the reference. Raises MeasurementError."""
        timings: dict[str, Timing] = {}
        keys = list(models)
        for start in range(0, len(keys), AT_ONCE):
            chunk = {key: str(models[key]) for key in keys[start : start + AT_ONCE]}
            if reference is not None:
                chunk[REFERENCE] = str(reference)
            windows = self._ask(chunk, least_rounds, most_rounds)
            reference_ms = min(windows[REFERENCE]) if reference is not None else None
            timings |= {
                key: Timing(windows_ms=tuple(windows[key]), reference_ms=reference_ms)
                for key in chunk
                if key != REFERENCE
            }
            if reference is not None:
                timings[REFERENCE] = Timing(windows_ms=tuple(windows[REFERENCE]), reference_ms=reference_ms)
        return timings

    def _ask(self, models: dict[str, str], least_rounds: int, most_rounds: int) -> dict[str, list[float]]:
        request = {
            "models": models,
            "threads": self.target.threads,
            "batch": self.target.batch,
            "disabled_optimizers": list(self.target.disabled_optimizers),
            "least_rounds": least_rounds,
            "most_rounds": most_rounds,
            "window_ms": 25,
            "round_ms": 600,
            "agree": 0.02,
        }
        if self._process.stdin is None or self._process.stdout is None:
            raise MeasurementError("the timing process has no pipes")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            raise MeasurementError(f"the timing process ended with code {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MeasurementError(str(answer["error"]))
        return answer["windows_ms"]


def write_random(planned: Plan, path: Path) -> int:
    """The plan's graph with random weights, as the export would build it; returns the file's bytes."""
    data = build_onnx(planned, random_tensors(planned), batch=None)
    path.write_bytes(data)
    return len(data)


def measure_policies(
    anatomy: Anatomy, policies: Mapping[str, Policy], target: Target, timer: Timer | None = None
) -> tuple[dict[str, Timing], dict[str, int]]:
    """True latencies and file sizes (bytes) of policies, without training: the speed does not depend on the weights.

    The result also holds the uncompressed model under :data:`REFERENCE`. Raises MeasurementError.
    """
    with tempfile.TemporaryDirectory(prefix="nightpress-") as folder:
        files = {key: Path(folder) / f"{number}.onnx" for number, key in enumerate(policies)}
        sizes = {key: write_random(plan(anatomy, policies[key]), path) for key, path in files.items()}
        reference = Path(folder) / "reference.onnx"
        sizes[REFERENCE] = write_random(plan(anatomy, Policy(model=anatomy.digest)), reference)
        if timer is not None:
            return timer.time(files, reference), sizes
        with Timer(target) as own:
            return own.time(files, reference), sizes
