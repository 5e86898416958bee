"""Evaluations as Ray tasks, on this machine or on a cluster."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluators.evaluate import Job, Outcome
from ..spaces.errors import InputError
from .cluster import Cluster, Needs
from .worker import OUT_OF_MEMORY, WORKER_LOST, Factory, Failure, Worker, settle

PROBE_SECONDS = 60.0
WAIT_SECONDS = 0.25


class RayRunner:
    """A task an evaluation. The evaluator's factory is stored in the cluster once, and a worker process that has made
    its evaluator keeps it. Nodes may come and go: Ray starts what waits where there is room.

    ``workers`` None takes all the room there is. ``run`` is the run's folder; every node must see it under this path.
    ``memory_bytes`` caps each worker, by default at what it needs. ``tick`` is called now and then while it waits.
    """

    def __init__(
        self, cluster: Cluster, make: Factory, needs: Needs, workers: int | None, run: Path,
        memory_bytes: int | None = None, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        ray = cluster.ray
        self._tick = tick
        self._memory_bytes = memory_bytes or needs.memory_bytes
        self._cluster, self._needs, self._most = cluster, needs, workers
        self._run = str(run.absolute())
        self._make = ray.put(make)
        memory = {"memory": needs.memory_bytes} if needs.memory_bytes else {}
        # Repetitions are the driver's to decide, and a worker that has used a GPU keeps its evaluator, too.
        self._task: Any = ray.remote(
            num_cpus=needs.cpu, num_gpus=needs.gpu, max_retries=0, max_calls=0, **memory
        )(_evaluate)  # fmt: skip
        self._keys: dict[Any, int] = {}

    @property
    def workers(self) -> int:
        room = self._cluster.room(self._needs)
        return room if self._most is None else min(room, self._most)

    @property
    def progress(self) -> float:
        return 0.0  # a worker elsewhere tells nothing before it is done

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        job = replace(job, folder=job.folder.absolute())
        reference = self._task.remote([self._make], self._run, job, cap_seconds, self._memory_bytes)
        self._keys[reference] = key

    def paused(self) -> AbstractContextManager[None]:
        """On one machine, once all that was submitted is over: Ray's workers cannot be stopped in between. A cluster
        times on a node of its own."""
        rest = list(self._keys) if len(self._cluster.nodes()) == 1 else []
        while rest:
            self._tick()
            rest = self._cluster.ray.wait(rest, num_returns=len(rest), timeout=WAIT_SECONDS)[1]
        return nullcontext()

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        if not self._keys:
            return
        wait = self._cluster.ray.wait
        done, rest = wait(list(self._keys), num_returns=1, timeout=timeout_seconds)
        if done and rest:
            done = [*done, *wait(rest, num_returns=len(rest), timeout=0)[0]]
        for reference in done:
            yield self._keys.pop(reference), self._result(reference)

    def close(self) -> None:
        for reference in self._keys:
            self._cluster.ray.cancel(reference, force=True)
        self._keys.clear()

    def _result(self, reference: Any) -> Outcome | Failure:
        errors = self._cluster.ray.exceptions
        try:
            return self._cluster.ray.get(reference)
        except errors.OutOfMemoryError as error:
            return Failure(OUT_OF_MEMORY, first_line(error))
        except errors.RayTaskError as error:
            return Failure(type(error.cause).__name__, first_line(error.cause))
        except errors.RayError as error:  # of a worker or node that has ended
            return Failure(WORKER_LOST, first_line(error))


_worker: tuple[object, Worker] | None = None  # this process's, with the name of the factory that made it


def _evaluate(
    made_by: Sequence[Any], run: str, job: Job, cap_seconds: float | None, memory_bytes: int | None
) -> Outcome | Failure:
    """One job in a worker process of Ray's. The factory comes as a reference in a list, so that it is fetched once."""
    global _worker
    import ray

    if _worker is None or _worker[0] != made_by[0]:
        settle(memory_bytes)
        _worker = (made_by[0], Worker(ray.get(made_by[0])))
    if not Path(run).is_dir():  # writing there would leave the results on this node
        return Failure(WORKER_LOST, f"node {socket.gethostname()} does not see the run folder {run}")
    return _worker[1](job, cap_seconds)


def check_nodes(cluster: Cluster, needs: Needs, run: Path) -> None:
    """Ask each node with room for a worker whether it can work on the run. Raises InputError naming one that cannot."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = cluster.ray
    nodes = [node for node in cluster.nodes() if needs.fit(node["Resources"])]
    asked: dict[Any, str] = {}
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(_sees)
        asked[task.remote(str(run.absolute()))] = node["NodeManagerHostname"]
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    for reference in late:
        raise InputError(f"search.address: node {asked[reference]} does not answer within {PROBE_SECONDS:.0f} s.")
    for reference in done:
        try:
            seen = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise InputError(
                f"search.address: node {asked[reference]} cannot run nightpress: {first_line(error)}."
            ) from None
        if not seen:
            raise InputError(
                f"out: every node must see the run folder under the same path, but node {asked[reference]} has no "
                f"{run.absolute()}."
            )


def _sees(run: str) -> bool:
    return Path(run).is_dir()


def first_line(error: BaseException) -> str:
    """What Ray says of an error, without the rest."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
