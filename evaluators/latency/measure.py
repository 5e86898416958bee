"""Measured latency: models are timed beside the uncompressed one, in a process that does nothing else."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ...spaces.anatomy import Anatomy
from ...spaces.plan import Plan, plan
from ...spaces.policy import Policy
from ..onnx_graph import build_onnx, random_tensors
from . import timer as script
from .target import Fingerprint, Target, fingerprint

REFERENCE = script.REFERENCE
AT_ONCE, AT_ONCE_BYTES = 32, 1 << 30  # models open at the same time and their files, to bound memory
AGREE = 0.02
"""Windows are added until the two lowest lie within this share of each other."""
LEAST_ROUNDS, MOST_ROUNDS = 4, 20
SECOND_ROUNDS = 8
"""The most of a second look, when all had their first."""
KERNEL_PASSES = 3
GRACE_SECONDS = 60.0
"""How long a child whose time is up may still be in an inference, at the least."""
BUSY_CORES = 0.2
"""Of other processes during a measurement, from which on it is worth a warning."""
WINDOW_MS, ROUND_MS = 25, 600
"""A burst of other work lasts one to two seconds: rounds are spread so that it meets few windows of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A node of the graph that the runtime really executes, fused and inserted ones included, and its milliseconds
    by the runtime's own profiler: the lowest of passes that were spread in time."""

    op_type: str
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Windows of one model in ms. The latency is the lowest; the repeat error how far the second lowest lies
    above it, as a share; ``reference_ms`` the uncompressed model's lowest window in the same session.

    ``kernels`` are there when they were asked for; ``busy_cores`` is what other processes used meanwhile, None where
    the system does not tell. Models of one ``session`` were timed in turn. ``again_ms`` are the windows of another
    session, see :meth:`with_again`.
    """

    windows_ms: tuple[float, ...]
    reference_ms: float | None
    again_ms: tuple[float, ...] = ()
    kernels: Mapping[str, Kernel] = field(default_factory=dict[str, Kernel])
    busy_cores: float | None = None
    session: str = ""

    @property
    def settled(self) -> bool:
        """Whether the two lowest windows agree. Where they never did, the machine was too noisy."""
        return len(self._all) > 1 and self.repeat_error <= AGREE

    @property
    def _all(self) -> tuple[float, ...]:
        return self.windows_ms + self.again_ms

    @property
    def latency_ms(self) -> float:
        return min(self._all)

    @property
    def repeat_error(self) -> float:
        lowest = sorted(self._all)[:2]
        return lowest[-1] / lowest[0] - 1

    @property
    def ratio(self) -> float | None:
        return self.reference_ms / self.latency_ms if self.reference_ms else None

    def halves_ms(self) -> tuple[float, float]:
        """Two independent measurements of the same model: the lowest of each session, or of the even and of the odd
        windows of the only one."""
        if self.again_ms:
            return min(self.windows_ms), min(self.again_ms)
        return min(self.windows_ms[::2]), min(self.windows_ms[1::2] or self.windows_ms)

    def with_again(self, other: "Timing") -> "Timing":
        """With what another session measured of the same model. What a neighbour on the same hardware takes for half a
        minute is not seen in windows of one session. The reference is that of the session with the lowest window; the
        order of the two looks stays, by which it shows whether the device has changed between them."""
        low = min(self, other, key=lambda timing: timing.latency_ms)
        busy = [timing.busy_cores for timing in (self, other) if timing.busy_cores is not None]
        return replace(
            self, again_ms=other.windows_ms, reference_ms=low.reference_ms, session=low.session,
            busy_cores=max(busy, default=None),
        )  # fmt: skip


def noise_warnings(timings: Mapping[str, Timing], *, elsewhere: bool = False, node: bool = False) -> list[str]:
    """What a person should know of a measurement with the reference in it: other work on the cores, and windows that
    never agreed. A kit is measured ``elsewhere``; a ``node`` of a cluster measures for the night."""
    found: list[str] = []
    busy, apart = timings[REFERENCE].busy_cores, [t.repeat_error for t in timings.values() if t.repeat_error > AGREE]
    if busy is not None and busy >= BUSY_CORES:
        load = "" if elsewhere or node else f" (load {os.getloadavg()[0]:.1f} on {script.cores()})"
        remedy = "measure the kit again without them" if elsewhere else "end them for the night"
        found.append(
            f"other processes used {busy:.1f} cores on average while latencies were measured{load}: {remedy}, or the "
            "figures hold for a busy machine"
        )
    if apart:
        who = "the device" if elsewhere else "the target's node" if node else "this machine"
        found.append(
            f"{who} is so noisy that the windows of {len(apart)} of {len(timings)} models never agreed within "
            f"{AGREE:.0%} (the two lowest lie up to {max(apart):.1%} apart): the latencies of these are marked"
        )
    return found


class MeasurementError(RuntimeError):
    """The timing process ended or the runtime refused a model; the text is its reason in one line."""


Listener = Callable[[Mapping[str, Timing]], None]


class Timer:
    """A child process that times models. Training must pause while it works: that is its owner's promise.

    ``listener`` is told of what :meth:`time` returns, with the worst timing of the reference.
    """

    _end: float | None = None
    """When all must be measured, on the monotonic clock."""

    def __init__(self, target: Target, listener: Listener | None = None) -> None:
        self.target = target
        self._listener = listener
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("timer.py")), str(os.getpid())],
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

    @contextlib.contextmanager
    def within(self, seconds: float) -> Generator[None]:
        """What is timed meanwhile is over after so many seconds, and the inference that is then running. Models that
        were not timed twice by then are left out of what :meth:`time` returns, at worst the reference too."""
        self._end = time.monotonic() + seconds
        try:
            yield
        finally:
            self._end = None

    @property
    def seconds_left(self) -> float | None:
        """What :meth:`within` leaves; None where there is no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

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
        least_rounds: int = LEAST_ROUNDS,
        most_rounds: int = MOST_ROUNDS,
        kernels: bool = False,
        window_ms: float = WINDOW_MS,
        round_ms: float = ROUND_MS,
    ) -> dict[str, Timing]:
        """Time model files, interleaved with the reference. Raises MeasurementError."""
        parts: list[dict[str, Timing]] = []
        how = settings(least_rounds, most_rounds, KERNEL_PASSES if kernels else 0, window_ms, round_ms)
        ahead = len(models)
        for chunk in _chunks(models):
            files = {REFERENCE: reference, **chunk} if reference is not None else chunk
            left = self.seconds_left
            if left is not None and left <= 0:
                break
            limit = {} if left is None else {"seconds": left * max(1, len(chunk)) / max(1, ahead)}
            parts.append(timings_of(self._ask(files, {**how, **limit})))
            ahead -= len(chunk)
        timings = joined(parts)
        if self._listener is not None and (reference is None or REFERENCE in timings):
            self._listener({**timings, **worst_reference(parts)})
        return timings

    def _ask(self, models: Mapping[str, Path], how: Mapping[str, float]) -> dict[str, Any]:
        request = {
            **how,
            **for_script(self.target),
            "models": {key: str(path) for key, path in models.items()},
        }
        if self._process.stdin is None or self._process.stdout is None:
            raise MeasurementError("the timing process has no pipes")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            self._wait_for(self._process.stdout, how.get("seconds"))
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
        return answer

    def _wait_for(self, answer: IO[str], seconds: float | None) -> None:
        """Raises MeasurementError when a child with a limit says nothing for long after it, and ends it: a single
        inference may take for ever."""
        if seconds is None:
            return
        patience = seconds + max(GRACE_SECONDS, seconds)
        if not select.select([answer], [], [], patience)[0]:
            self._process.kill()
            raise MeasurementError(
                f"the timing process had {seconds:.0f} s and has not answered for {patience:.0f} s: loading a model or "
                "a single inference takes longer than that"
            )


def settings(
    least_rounds: int = LEAST_ROUNDS, most_rounds: int = MOST_ROUNDS, kernel_passes: int = KERNEL_PASSES,
    window_ms: float = WINDOW_MS, round_ms: float = ROUND_MS,
) -> dict[str, float]:  # fmt: skip
    """How the timing script measures."""
    return {
        "least_rounds": max(least_rounds, kernel_passes), "most_rounds": max(most_rounds, kernel_passes),
        "window_ms": window_ms, "round_ms": round_ms, "agree": AGREE, "kernel_passes": kernel_passes,
    }  # fmt: skip


def for_script(target: Target) -> dict[str, Any]:
    """What the timing script needs to know of a target."""
    return {"runtime": target.runtime, "threads": target.threads, "batch": target.batch,
            "disabled_optimizers": list(target.disabled_optimizers)}  # fmt: skip


def _chunks(models: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Models that may be open at the same time; at least one."""
    chunk: dict[str, Path] = {}
    size_bytes = 0
    for key, path in models.items():
        more = path.stat().st_size if path.is_file() else 0  # the runtime says what is wrong with a missing file
        if chunk and (len(chunk) == AT_ONCE or size_bytes + more > AT_ONCE_BYTES):
            yield chunk
            chunk, size_bytes = {}, 0
        chunk[key] = path
        size_bytes += more
    yield chunk


def timings_of(answer: Mapping[str, Any]) -> dict[str, Timing]:
    """What the timing script answered, typed."""
    windows: dict[str, list[float]] = answer["windows_ms"]
    reference_ms = min(windows[REFERENCE]) if REFERENCE in windows else None
    return {
        key: Timing(
            windows_ms=tuple(found),
            reference_ms=reference_ms,
            kernels={n: Kernel(op_type=kind, ms=ms) for n, (kind, ms) in answer["kernels"].get(key, {}).items()},
            busy_cores=answer["busy_cores"],
            session=answer.get("session", ""),
        )
        for key, found in windows.items()
    }


def joined(parts: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Models that were timed in parts. The reference was in each: its windows are those of the last one, its busy cores
    those of the worst."""
    timings = {key: timing for part in parts for key, timing in part.items()}
    if REFERENCE in timings:
        timings[REFERENCE] = replace(timings[REFERENCE], busy_cores=_busiest(parts))
    return timings


def worst_reference(parts: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """The reference in the part that agreed least, for those who are told what disturbed a measurement."""
    references = [part[REFERENCE] for part in parts if REFERENCE in part]
    worst = max(references, key=lambda timing: timing.repeat_error, default=None)
    return {} if worst is None else {REFERENCE: replace(worst, busy_cores=_busiest(parts))}


def _busiest(parts: Sequence[Mapping[str, Timing]]) -> float | None:
    found = [part[REFERENCE].busy_cores for part in parts if REFERENCE in part]
    return max((busy for busy in found if busy is not None), default=None)


def write_random(planned: Plan, path: Path) -> int:
    """The plan's graph with random weights, as the export would build it; returns the file's bytes."""
    data = build_onnx(planned, random_tensors(planned), batch=None)
    path.write_bytes(data)
    return len(data)


def measure_policies(
    anatomy: Anatomy, policies: Mapping[str, Policy], target: Target, timer: Timer | None = None,
    *, kernels: bool = False, most_rounds: int = MOST_ROUNDS,
) -> tuple[dict[str, Timing], dict[str, int]]:  # fmt: skip
    """True latencies and file sizes (bytes) of policies, without training: the speed does not depend on the weights.

    The result also holds the uncompressed model under :data:`REFERENCE`. Raises MeasurementError.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="nightpress-") as folder:
            files = {key: Path(folder) / f"{number}.onnx" for number, key in enumerate(policies)}
            sizes = {key: write_random(plan(anatomy, policies[key]), path) for key, path in files.items()}
            reference = Path(folder) / "reference.onnx"
            sizes[REFERENCE] = write_random(plan(anatomy, Policy(model=anatomy.digest)), reference)
            if timer is not None:
                return timer.time(files, reference, kernels=kernels, most_rounds=most_rounds), sizes
            with Timer(target) as own:
                return own.time(files, reference, kernels=kernels, most_rounds=most_rounds), sizes
    except OSError as error:  # no room for the files: what a night can do without must not end it
        raise MeasurementError(f"the models to be timed cannot be written: {error.strerror or error}") from error
