"""Where evaluations run: what is refused in a sentence, and a cluster of several nodes of which one is lost."""

import ast
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fakes_jobs import Acting, job
from nightpress.evaluators.evaluate import Outcome
from nightpress.evaluators.latency.capabilities import measure_capabilities
from nightpress.evaluators.latency.target import Target, fingerprint
from nightpress.search.cluster import Needs, connect
from nightpress.search.config import AUTO, RAY, Resources, SearchConfig
from nightpress.search.jobs import Jobs
from nightpress.search.places import find_places
from nightpress.search.ray_runner import RayRunner, check_nodes
from nightpress.search.target_node import NodeTimer
from nightpress.spaces.errors import InputError
from ray_nodes import LOOPBACK, two_nodes

CORES = len(os.sched_getaffinity(0))


def test_workers_are_counted_by_what_each_takes() -> None:
    node = {"CPU": 8.0, "GPU": 2.0, "memory": 32.0 * 2**30}

    assert Needs(cpu=1).fit(node) == 8
    assert Needs(cpu=3).fit(node) == 2
    assert Needs(cpu=1, gpu=0.5).fit(node) == 4
    assert Needs(cpu=1, memory_bytes=10 * 2**30).fit(node) == 3
    assert Needs(cpu=1, gpu=1).fit({"CPU": 8.0}) == 0


def test_auto_takes_a_worker_a_core_and_a_number_divides_them(tmp_path: Path) -> None:
    places = find_places(SearchConfig(workers=AUTO), tmp_path)
    assert (places.workers, places.needs.cpu) == (CORES, 1)

    places = find_places(SearchConfig(workers=1), tmp_path)
    assert (places.workers, places.needs.cpu) == (1, CORES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SearchConfig(workers=3, resources=Resources(cpu=CORES)), rf"3 workers of {CORES} CPU each .*room for 1\."),
        (SearchConfig(workers=1, resources=Resources(memory_gb=1e6)), r"1 worker of .*, 1e\+06 GiB .*room for 0\."),
        (SearchConfig(workers=AUTO, resources=Resources(cpu=CORES + 1)), r"1 worker of .* has room for 0\."),
    ],
)  # fmt: skip
def test_more_workers_than_the_machine_has_room_for_are_refused(
    config: SearchConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"search.workers: {message}"):
        find_places(config, tmp_path)


def test_an_address_where_no_cluster_answers_is_refused_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(
        InputError, match=rf"search.address: no Ray cluster answers at 127.0.0.1:{port} \(Connection ref"
    ):
        find_places(SearchConfig(runner=RAY, address=f"127.0.0.1:{port}"), tmp_path)
    assert time.monotonic() - start < 10  # how long a name server takes to deny a name is not ours
    with pytest.raises(InputError, match=r"search.address: no Ray cluster answers at no-such-host.invalid:6379 \("):
        connect("ray://no-such-host.invalid:6379".removeprefix("ray://"), 1)


OWN_CLUSTER = """
import os, stat, sys
from nightpress.search.cluster import connect
from ray_nodes import listening

cluster = connect(None, cpus=1)
cluster.ray.get(cluster.ray.remote(lambda: None).remote())  # now there is a worker
print(listening(os.getpid()), file=sys.stderr)
path = os.environ["RAY_AUTH_TOKEN_PATH"]
modes = [oct(stat.S_IMODE(os.stat(place).st_mode)) for place in (path, os.path.dirname(path))]
print(*modes, file=sys.stderr)
print("to nobody")
address = cluster.nodes()[0]["NodeManagerAddress"] + ":" + cluster.ray.get_runtime_context().gcs_address.split(":")[1]
os.environ["RAY_AUTH_TOKEN_PATH"] = "/dev/null"
import subprocess
code = "import sys; from nightpress.search.cluster import connect; connect(sys.argv[1], 1)"
wrong = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
wrong.pop("RAY_AUTH_TOKEN_PATH")
done = subprocess.run([sys.executable, "-c", code, address], env=wrong, capture_output=True, text=True)
print(done.returncode, done.stderr.splitlines()[-1], file=sys.stderr)
cluster.close()
print(path, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_cluster_of_our_own_stays_on_loopback_and_asks_for_a_token_that_only_we_can_read() -> None:
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", OWN_CLUSTER], env=where, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    listeners, modes, refused, last = done.stderr.splitlines()[-4:]
    found = ast.literal_eval(listeners)
    assert set(found) <= LOOPBACK, found
    assert {"raylet", "gcs_server"} <= set.union(*found.values())
    assert modes == f"{oct(stat.S_IRUSR | stat.S_IWUSR)} {oct(stat.S_IRWXU)}"
    assert refused.startswith("1 ")
    assert "InputError: search.address: the Ray cluster at" in refused
    assert not Path(last).exists()
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_lost_node_loses_no_job_and_the_target_node_is_where_models_are_timed(tmp_path: Path) -> None:
    told: list[str] = []
    with two_nodes() as (cluster, nodes, kill):
        needs = Needs(cpu=1)
        check_nodes(cluster, needs, tmp_path)
        with pytest.raises(InputError, match=r"out: every node must see the run folder .* has no .*elsewhere"):
            check_nodes(cluster, needs, tmp_path / "elsewhere")
        with pytest.raises(
            InputError, match=r"search.workers: 3 workers of 1 CPU each .* the cluster has room for 2\."
        ):
            find_places(SearchConfig(runner=RAY, workers=3), tmp_path)
        assert cluster.has_target
        timer = NodeTimer(cluster, Target())
        assert timer.fingerprint() == fingerprint(Target())
        capable = measure_capabilities(Target(), timer)
        assert {(w.weights, w.activations): w.kernel for w in capable.widths}[8, 8] == "int8"
        assert len(capable.stairs) >= 2
        with pytest.raises(InputError, match=r"node nightpress_target: target.threads must be between 1 and"):
            NodeTimer(cluster, Target(threads=999)).check()

        runner = RayRunner(cluster, Acting(tmp_path), needs, None, tmp_path)
        jobs = Jobs(runner, 64, expected_seconds=lambda job: 1.0, tell=lambda what, why: told.append(what))
        assert runner.workers == 2
        for key in range(2):
            jobs.submit(key, job("sleep 3", tmp_path / str(key)))
        while len(list(tmp_path.glob("begun-sleep-*"))) < 2:
            time.sleep(0.05)
        kill(nodes[0])
        found: dict[int, object] = {}
        end = time.monotonic() + 60
        while len(found) < 2:
            assert time.monotonic() < end, f"only {sorted(found)} came"
            found |= dict(jobs.as_completed(0.5))
        runner.close()

        assert all(isinstance(result, Outcome) for result in found.values()), found
        assert len(told) == 1
        assert len(list(tmp_path.glob("begun-sleep-*"))) == 3
        time.sleep(2.5)
        assert runner.workers == 1
        assert not cluster.has_target
