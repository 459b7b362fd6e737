"""bench_ray.py beside a cluster and on one: real nodes of Ray, all on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import allowed_cpus, wait_until

FIRST = min(os.sched_getaffinity(0))
LAST = max(os.sched_getaffinity(0))

# A network of its own, in which a host without an answer can be had, and names cannot be resolved.
SILENT = "10.9.9.9"
NETWORK = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c"]
NETWORK += [f'ip link set lo up && ip route add {SILENT} dev lo && exec "$@"', "sh"]


@pytest.fixture(scope="module", autouse=True)
def unanswered(start, tmp_path_factory):
    """Runs with an address at which no cluster answers: {kind: Bench}.

    Some have to wait for it. So they begin before the other tests of this module, and the tests
    that look at them are the last ones.
    """
    runs = {}

    def begin(kind, address, **options):
        folder = tmp_path_factory.mktemp("temporary")
        runs[kind] = start("ray", "--address", address, TMPDIR=str(folder), **options)
        runs[kind].address = address
        runs[kind].temporary = folder

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        begin("no cluster", f"127.0.0.1:{port}")
        begin("interrupted", f"127.0.0.1:{port}")
        if subprocess.run([*NETWORK, "true"], capture_output=True).returncode == 0:
            begin("refused", f"127.0.0.1:{port}", before=NETWORK)
            begin("silent", f"{SILENT}:6379", before=NETWORK)
            begin("unresolved", "nowhere.invalid:6379", before=NETWORK)
        copies = runs["interrupted"].temporary
        wait_until(lambda: list(copies.glob("*/mnist.npz")))
        runs["interrupted"].send(signal.SIGINT)
        yield runs


@pytest.fixture(scope="module")
def cluster():
    """A cluster whose head node has no CPU: nodes are added by the tests that need them."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        folder = stack.enter_context(temporary_folder())
        # Apart from any other Ray on this machine, and from the token in the home folder.
        environment = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        for name, value in environment.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        stack.callback(cluster.shutdown)
        cluster.environment = environment
        cluster.add_node(
            num_cpus=0,
            include_dashboard=True,
            dashboard_port=0,
            dashboard_agent_listen_port=0,
            # Ray would need 15 s to see that a node is dead.
            _system_config={"health_check_initial_delay_ms": 0, "health_check_period_ms": 500},
        )
        yield cluster


def temporary_folder():
    """A folder with a short path: Ray's sockets lie in it."""
    return tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)


@contextlib.contextmanager
def added(cluster, num_cpus=1, core=None):
    """Add a node that may use only this core, if any is named; take it away at the end."""
    allowed = os.sched_getaffinity(0)
    with temporary_folder() as folder:
        os.sched_setaffinity(0, allowed if core is None else {core})  # Its processes inherit it.
        try:
            node = cluster.add_node(num_cpus=num_cpus, temp_dir=folder)
        finally:
            os.sched_setaffinity(0, allowed)
        try:
            yield node
        finally:
            cluster.remove_node(node)


def raylet(node):
    return node.all_processes["raylet"][0].process


def actors(node):
    """The actors' processes on a node."""
    children = psutil.Process(raylet(node).pid).children()
    return [process for process in children if process.name().startswith("ray::Model")]


def test_a_private_ray_listens_on_loopback_alone_and_leaves_a_running_cluster_alone(cluster, start):
    flags = ["--num-cpus", 1, "--rounds", 20]
    bench = start("ray", *flags, RAY_ADDRESS=cluster.address, **cluster.environment)
    bench.wait_for("round 1:")
    bench.process.suspend()
    family = {process.pid: process.name() for process in bench.family()}
    assert {"gcs_server", "raylet"} <= set(family.values())
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("inet")
        if connection.pid in family and connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}

    bench.process.resume()
    assert bench.finish()[0] == 0
    assert bench.left() == []
    [record] = bench.records()
    assert (record["cluster"], record["num_cpus"], record["nodes"]) == (False, 1, 1)

    assert cluster.remaining_processes_alive()
    found_by_auto = Path(cluster.environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
    assert found_by_auto.read_text() == cluster.address


def test_a_cluster_without_a_cpu_is_told(cluster, start):
    bench = start("ray", "--address", cluster.address, **cluster.environment)
    status, stdout, stderr = bench.finish()
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert f"{cluster.address} has 0 CPUs" in stderr
    assert bench.records() == []


def test_a_node_dies_and_one_that_joins_takes_its_actor(cluster, start):
    """Without --num-cpus there is an actor for every CPU of the cluster."""
    with added(cluster) as first, added(cluster) as second:
        bench = start("ray", "--rounds", 15, "--address", "auto", **cluster.environment)
        bench.wait_for("round 1:")
        assert len(actors(first)) == len(actors(second)) == 1
        raylet(first).kill()
        with added(cluster):
            status, _, stderr = bench.finish()
            assert (status, stderr) == (0, "")
    [record] = bench.records()
    assert len(record["round_seconds"]) == 15
    assert (record["cluster"], record["num_cpus"], record["nodes"]) == (True, 2, 2)


@pytest.fixture(scope="module")
def two_nodes(cluster):
    """Two nodes of two CPUs, all that the cluster has now; each may use one core: {core: node}."""
    with added(cluster, 2, FIRST) as first, added(cluster, 2, LAST) as last:
        yield {FIRST: first, LAST: last}


def test_a_number_of_cpus_that_the_cluster_has_not_is_told(cluster, two_nodes, start):
    flags = ["--address", cluster.address, "--num-cpus", 5]
    bench = start("ray", *flags, **cluster.environment)
    status, stdout, stderr = bench.finish()
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert f"{cluster.address} has 4 CPUs: too few" in stderr
    assert bench.records() == []


@pytest.mark.skipif(FIRST == LAST, reason="needs two cores")
def test_a_job_uses_as_many_cpus_of_the_cluster_as_it_is_told(
    cluster, two_nodes, start, trained, tmp_path
):
    """More than the one core that the script itself may use.

    `ray job submit` tells `--address auto` the address, and gives the script a working directory.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    before += ["--address", f"http://{cluster.head_node.webui_url}", "--working-dir", tmp_path]
    before += ["--", "env", f"TMPDIR={temporary}", "taskset", "--cpu-list", FIRST]
    flags = ["--address", "auto", "--num-cpus", 3, "--rounds", 200]
    bench = start("ray", *flags, before=before, **cluster.environment)
    bench.wait_for("round 1:")

    assert sorted(len(actors(node)) for node in two_nodes.values()) == [1, 2]
    for core, node in two_nodes.items():
        for actor in actors(node):
            assert allowed_cpus(actor) == {frozenset([core])}
            folder = Path(actor.cwd())
            assert folder.is_relative_to(node.get_session_dir_path())
            copies = {file.name: file.read_bytes() for file in folder.iterdir()}
            assert copies == {file.name: file.read_bytes() for file in trained}

    assert bench.finish()[0] == 0
    assert list(temporary.iterdir()) == []
    [record] = bench.records()
    assert (record["cluster"], record["num_cpus"], record["nodes"]) == (True, 3, 2)


@pytest.mark.parametrize("kind", ["refused", "silent", "unresolved"])
def test_an_address_at_which_nothing_answers_is_told(unanswered, kind):
    if kind not in unanswered:
        pytest.skip("needs Linux with util-linux, iproute2, and the right to have namespaces")
    bench = unanswered[kind]
    status, stdout, stderr = bench.finish()
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert bench.address in stderr
    seconds = bench.err.stat().st_mtime - bench.process.create_time()
    assert seconds < 15 + 25  # The script has to be imported, on a busy machine.
    assert list(bench.temporary.iterdir()) == []
    assert bench.records() == []


def test_an_address_at_which_something_else_listens_is_told(unanswered):
    """Ray gives up after more than a minute."""
    bench = unanswered["no cluster"]
    status, stdout, stderr = bench.finish()
    assert (status, bench.rounds()) == (1, 0), stdout + stderr
    assert bench.address in stderr.strip().splitlines()[-1]
    assert list(bench.temporary.iterdir()) == []
    assert bench.records() == []


def test_ctrl_c_while_it_connects_leaves_no_copies_of_the_files(unanswered):
    bench = unanswered["interrupted"]
    status, _, _ = bench.finish()
    assert status not in (None, 0)
    assert bench.left() == []
    assert list(bench.temporary.iterdir()) == []
