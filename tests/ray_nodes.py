"""A Ray cluster of several nodes on this machine, to lose one of."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nightpress.search.cluster import OBJECT_STORE_BYTES, TARGET, Cluster, connect, make_token

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
"""127.0.0.1 as ``/proc/net/tcp`` and ``tcp6`` write it."""
LISTEN = "0A"
# How soon a node that has fallen silent counts as lost; Ray's own settings take twice as long.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def two_nodes() -> Generator[tuple[Cluster, list[Any], Any]]:
    """Our connection, the two nodes with a CPU each, of which the first is the target device, and what kills a node.

    The head has no CPU. What the cluster is told by the environment is undone at the end.
    """
    before = dict(os.environ)
    os.environ |= {**HEALTH, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent)}
    imported = "ray" in sys.modules
    make_token()
    import ray
    from ray.cluster_utils import Cluster as Nodes

    if imported:  # it read the environment then
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]

    small = {"object_store_memory": OBJECT_STORE_BYTES}
    nodes: Any = Nodes(initialize_head=True, head_node_args={**small, "num_cpus": 0, "include_dashboard": False})
    try:
        workers = [nodes.add_node(**small, num_cpus=1, resources={TARGET: 1}), nodes.add_node(**small, num_cpus=1)]
        cluster = connect(nodes.address, 1)
        try:
            yield cluster, workers, lambda node: nodes.remove_node(node, allow_graceful=False)
        finally:
            cluster.close()
    finally:
        nodes.shutdown()
        os.environ.clear()
        os.environ.update(before)


def listening(root: int) -> dict[str, set[str]]:
    """Addresses, as :data:`LOOPBACK` writes them, on which a process and what it started listen, each with the names
    of the processes."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    owners: dict[str, int] = {}
    for process in family:
        with suppress(OSError):
            owners |= {file.readlink().name: process for file in Path(f"/proc/{process}/fd").iterdir()}
    found: dict[str, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and (owner := owners.get(f"socket:[{fields[9]}]")):
                name = Path(f"/proc/{owner}/comm").read_text().strip()
                found.setdefault(fields[1].partition(":")[0], set()).add(name)
    return found
