"""Timing on the node of a cluster that is the target device, alone there, whatever other nodes train meanwhile."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from ..evaluators.latency.measure import REFERENCE, Listener, MeasurementError, Timer, Timing
from ..evaluators.latency.target import Fingerprint, Target, check_target, fingerprint
from ..spaces.errors import InputError
from .cluster import TARGET, Cluster
from .ray_runner import first_line

T = TypeVar("T")
LOST_SECONDS = 60.0
"""How long the target may be away before the measurement fails."""


class NodeTimer(Timer):
    """A timer whose models travel to the target node, each once a call; nothing is started on this machine."""

    def __init__(self, cluster: Cluster, target: Target, listener: Listener | None = None) -> None:
        self.target = target
        self._cluster = cluster
        self._listener = listener

    def close(self) -> None:
        """Nothing to end: the timing process lived as long as its call."""

    def check(self) -> None:
        """Raises InputError when the node cannot run the target."""
        error = self._there(_check, self.target)
        if error is not None:
            raise InputError(f"node {TARGET}: {error}")

    def fingerprint(self) -> Fingerprint:
        return self._there(fingerprint, self.target)

    def time(self, models: Mapping[str, Path], reference: Path | None, **settings: Any) -> dict[str, Timing]:
        files = {**models, REFERENCE: reference} if reference is not None else models
        stored = [(key, self._cluster.ray.put(path.read_bytes())) for key, path in files.items()]
        timings = self._there(_time, self.target, stored, settings, self.seconds_left)
        if self._listener is not None:
            self._listener(timings)
        return timings

    def _there(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on the target node. Raises MeasurementError when it is lost."""
        ray, errors = self._cluster.ray, self._cluster.ray.exceptions
        reference = ray.remote(num_cpus=0, resources={TARGET: 1}, max_retries=0)(function).remote(*arguments)
        seen = time.monotonic()
        while not ray.wait([reference], timeout=1.0)[0]:
            if self._cluster.has_target:
                seen = time.monotonic()
            elif time.monotonic() - seen > LOST_SECONDS:
                ray.cancel(reference, force=True)
                raise MeasurementError(f"no node has had the resource {TARGET} for {LOST_SECONDS:.0f} s")
        try:
            return ray.get(reference)
        except errors.RayTaskError as error:
            raise MeasurementError(first_line(error.cause)) from error
        except errors.RayError as error:
            raise MeasurementError(f"the target node was lost: {first_line(error)}") from error


def _check(target: Target) -> str | None:
    try:
        check_target(target)
    except InputError as error:
        return str(error)
    return None


def _time(
    target: Target, stored: Sequence[tuple[str, Any]], settings: Mapping[str, Any], seconds: float | None
) -> dict[str, Timing]:  # fmt: skip
    """On the target node: write the files, time them in a process of its own, within so many seconds if any."""
    import ray

    with tempfile.TemporaryDirectory(prefix="nightpress-") as folder:
        files = {key: Path(folder) / f"{number}.onnx" for number, (key, _) in enumerate(stored)}
        for key, reference in stored:
            files[key].write_bytes(ray.get(reference))
        reference = files.pop(REFERENCE, None)
        with Timer(target) as timer, nullcontext() if seconds is None else timer.within(seconds):
            return timer.time(files, reference, **settings)
