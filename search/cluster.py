"""A Ray cluster to work on: one of our own on this machine, or one that is there already.

Ray is imported here only. A cluster of our own listens on 127.0.0.1 alone and asks everybody for a token that only this
user can read.
"""

import atexit
import io
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..spaces.errors import InputError

log = logging.getLogger("nightpress")
TARGET = "nightpress_target"
"""A node with this resource is the target device: models are timed there, one at a time."""
OBJECT_STORE_BYTES = 80 << 20
"""Of a cluster of our own: what travels are policies and results."""
ANSWER_SECONDS = 5.0
NODES_SECONDS = 2.0
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch, on every system, between clusters that others may join and those that stay on the loopback address;
any other address that it is given, 127.0.0.2 included, it takes for the name of a node that listens everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one worker takes of a node."""

    cpu: int = 1
    gpu: float = 0.0
    memory_bytes: int | None = None

    def fit(self, resources: Mapping[str, float]) -> int:
        """How many such workers a node has room for."""
        asked = {"CPU": self.cpu, "GPU": self.gpu, "memory": self.memory_bytes or 0}
        return min(math.floor(resources.get(name, 0.0) / need + 1e-9) for name, need in asked.items() if need)

    def __str__(self) -> str:
        parts = [f"{self.cpu} CPU"]
        parts += [f"{self.gpu:g} GPU"] if self.gpu else []
        parts += [f"{self.memory_bytes / 2**30:g} GiB"] if self.memory_bytes else []
        return ", ".join(parts)


@dataclass(slots=True)
class Cluster:
    """Our connection. ``owned`` is False where the process was connected before: then it stays so."""

    ray: Any
    owned: bool
    _stdout: Any = None
    _nodes: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    _read: float = -math.inf

    def nodes(self) -> Sequence[Mapping[str, Any]]:
        """The nodes that are alive, as they were at most two seconds ago."""
        if time.monotonic() - self._read > NODES_SECONDS:
            self._nodes = [node for node in self.ray.nodes() if node["Alive"]]
            self._read = time.monotonic()
        return self._nodes

    def room(self, needs: Needs) -> int:
        """How many workers fit on the nodes that are alive."""
        return sum(needs.fit(node["Resources"]) for node in self.nodes())

    @property
    def has_target(self) -> bool:
        """Whether a node says that it is the target device."""
        return any(node["Resources"].get(TARGET) for node in self.nodes())

    def close(self) -> None:
        """Leave the cluster; one of our own ends with that."""
        if self.owned:
            self.ray.shutdown()
            self.owned = False
        if self._stdout is not None:
            sys.stdout, self._stdout = self._stdout, None


def connect(address: str | None, cpus: int) -> Cluster:
    """The cluster at ``address`` (``host:port`` or ``ray://host:port``), or one of our own with so many CPUs.

    Raises InputError when Ray is missing or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns
    if address is not None:
        _knock(address)
    secret = make_token() if address is None and "RAY_AUTH_MODE" not in os.environ else None
    imported = "ray" in sys.modules
    if address is None:
        os.environ[ONE_MACHINE] = "0"
    ray = _ray()
    if ray.is_initialized():
        return Cluster(ray, owned=False)
    if secret is not None and imported:  # it read the environment then; this is how ray itself turns tokens on later
        ray._raylet.Config.initialize("")
    settings: dict[str, Any] = {"address": address}
    if address is None:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # where it had read the environment before
        settings = {"address": "local", "num_cpus": cpus, "include_dashboard": False,
                    "object_store_memory": OBJECT_STORE_BYTES}  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(ray, owned=True, _stdout=sys.stdout)
    sys.stdout = _ToLog()  # ray prints there what happens to its workers, and stdout belongs to --json
    try:
        ray.init(**settings, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except Exception as error:  # whatever ray raises, of a wrong token, another version, a cluster that has just ended
        cluster.close()
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"the Ray cluster at {address}" if address is not None else "a Ray cluster on this machine"
        raise InputError(f"search.address: {where} cannot be used: {text.rstrip('.')}.") from error
    signal.signal(signal.SIGTERM, before)  # ray takes it over, but the night ends gracefully
    return cluster


class _ToLog(io.TextIOBase):
    def write(self, text: str) -> int:
        if text.strip():
            log.debug("ray: %s", text.strip())
        return len(text)


def _knock(address: str) -> None:
    """Ray waits long for a cluster that is not there, and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"search.address: no Ray cluster answers at {address} ({reason}).") from None


def make_token() -> Path:
    """Turn tokens on for the clusters that this process starts; the folder that holds the token. What Ray makes by
    itself would lie in the home folder for all to read."""
    folder = _token_folder()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    return folder


@cache
def _token_folder() -> Path:
    """One a process, because Ray reads the token once. It goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="nightpress-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = os.open(folder / "token", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(file, "w") as token:
        token.write(secrets.token_hex(32))
    return folder


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("search.runner: ray needs the package ray; pip install nightpress[ray].") from None
    return ray
