"""Where evaluations run: how many at once, what each takes, and the runner that does it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..evaluators.latency.measure import Listener, Timer
from ..evaluators.latency.target import Fingerprint, Target, check_target, fingerprint
from ..spaces.errors import InputError
from .cluster import Cluster, Needs, connect
from .config import AUTO, RAY, SearchConfig
from .process import WorkerProcess
from .ray_runner import RayRunner, check_nodes
from .runner import MEMORY_SHARE, LocalRunner, Runner, machine_bytes
from .target_node import NodeTimer
from .worker import Factory


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """``workers`` is how many there are room for now and were asked for; ``needs.cpu`` the threads of each."""

    workers: int
    most: int | None
    """None where the room alone decides, which may change on a cluster."""
    needs: Needs
    cluster: Cluster | None = None
    alone: bool = False
    """Whether the cluster is this machine."""
    target_node: bool = False
    """Whether the target device is a node of the cluster; otherwise it is this machine, and all night long."""

    def start(
        self, make: Factory, run: Path, ahead: WorkerProcess | None = None, tick: Callable[[], None] = lambda: None
    ) -> Runner:
        """The runner; ``run`` is the run's folder, ``ahead`` a worker of this machine that has been started; ``tick``
        is called while it waits."""
        if self.cluster is not None:
            share = int(MEMORY_SHARE * machine_bytes() / self.workers) if self.alone else None
            return RayRunner(self.cluster, make, self.needs, self.most, run, self.needs.memory_bytes or share, tick)
        return LocalRunner(make, self.workers, self.needs.memory_bytes, ahead)

    def timer(self, target: Target, listener: Listener) -> Timer:
        """Times models on the target device, whose timings the listener hears; on this machine nothing of ours may
        train meanwhile."""
        if self.cluster is not None and self.target_node:
            return NodeTimer(self.cluster, target, listener)
        return Timer(target, listener)

    def fingerprint(self, target: Target) -> Fingerprint:
        """The target device as profiles name it."""
        if self.cluster is not None and self.target_node:
            return NodeTimer(self.cluster, target).fingerprint()
        return fingerprint(target)

    def check_target(self, target: Target) -> None:
        """Raises InputError when the target device cannot run the target."""
        if self.cluster is not None and self.target_node:
            NodeTimer(self.cluster, target).check()
        else:
            check_target(target)

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.close()


def find_places(config: SearchConfig, run: Path) -> Places:
    """Look for room, on a cluster where the config names one.

    Raises InputError when there is no room for so many workers, the cluster does not answer, or a node of it cannot
    work on the run.
    """
    cores = len(os.sched_getaffinity(0))
    most = None if config.workers == AUTO else int(config.workers)
    cpu = config.resources.cpu or (1 if most is None or config.address is not None else max(1, cores // most))
    memory_bytes = int(config.resources.memory_gb * 2**30) if config.resources.memory_gb is not None else None
    needs = Needs(cpu=cpu, gpu=config.resources.gpu, memory_bytes=memory_bytes)
    if config.runner != RAY:
        return _here(config, cores, most, needs)
    cluster = connect(config.address, cores)
    try:
        workers = _wanted(cluster.room(needs), config, needs, "the cluster")
        if config.address is not None:
            check_nodes(cluster, needs, run)
    except BaseException:
        cluster.close()
        raise
    return Places(workers=workers, most=most, needs=needs, cluster=cluster, alone=config.address is None,
                  target_node=cluster.has_target)  # fmt: skip


def _here(config: SearchConfig, cores: int, most: int | None, needs: Needs) -> Places:
    # More workers than cores are slow and harmless; more than was asked for by name is refused.
    cpus = float(cores) if config.resources.cpu is not None or most is None else float(max(cores, most * needs.cpu))
    here = {"CPU": cpus, "memory": MEMORY_SHARE * machine_bytes()}
    workers = _wanted(needs.fit(here), config, needs, "this machine")
    return Places(workers=workers, most=most, needs=needs)


def _wanted(room: int, config: SearchConfig, needs: Needs, where: str) -> int:
    """How many workers there will be. Raises InputError when there is no room for those that were asked for."""
    wanted = max(1, room) if config.workers == AUTO else int(config.workers)
    if wanted > room:
        raise InputError(
            f"search.workers: {wanted} worker{'s' * (wanted > 1)} of {needs} each were asked for, but {where} has room "
            f"for {room}."
        )
    return wanted
