"""bench_ray.py beside a cluster and on one: real raylets on this machine, with folders and ports of their own."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from conftest import allowed_cpus

QUICK = ("--mode", "predict_on_batch", "--rounds")


@pytest.fixture(scope="module")
def cluster():
    """A cluster whose head node has no CPU: nodes are added by the tests that need them."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True))
        patch.setenv("RAY_TMPDIR", folder)  # A short path: sockets lie in it.
        patch.setenv("RAY_AUTH_MODE", "disabled")  # Or a token in the home folder would decide who may connect.
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        stack.callback(cluster.shutdown)
        # Ray would need 15 s to see that a node is dead.
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
        ports = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}
        cluster.add_node(num_cpus=0, include_dashboard=True, **ports, _system_config=quick)
        yield cluster


@contextlib.contextmanager
def added(cluster, num_cpus=1, cores=None):
    """Add a node that may use only these cores, and has a folder for its files; take it away at the end."""
    allowed = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.sched_setaffinity(0, cores or allowed)  # The node's processes inherit it.
        node = cluster.add_node(num_cpus=num_cpus, temp_dir=folder)
        os.sched_setaffinity(0, allowed)
        try:
            yield node
        finally:
            cluster.remove_node(node)


def raylet(node):
    return node.all_processes["raylet"][0].process


def models(*nodes):
    """The actors' processes on the nodes."""
    raylets = [raylet(node).pid for node in nodes]
    processes = [process for process in psutil.process_iter(["name", "ppid"]) if process.info["ppid"] in raylets]
    return [process for process in processes if process.info["name"].startswith("ray::Model")]


def test_a_private_run_leaves_a_running_cluster_alone(cluster, start, tmp_path):
    """Without --address: a Ray of its own, on loopback, which leaves no token in the home folder."""
    bench = start("ray", *QUICK, 20, "--num-cpus", "1", RAY_AUTH_MODE=None, HOME=tmp_path)
    bench.wait_for("round 1:")
    bench.process.suspend()
    family = {process.pid: process.name() for process in bench.family()}
    assert {"gcs_server", "raylet"} <= set(family.values())
    sockets = [socket for socket in psutil.net_connections("inet") if socket.pid in family]
    listening = [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    bench.process.resume()
    assert bench.finish()[0] == 0
    assert bench.left() == [] and not (tmp_path / ".ray").exists()
    [record] = bench.records()
    assert (record["cluster"], record["num_cpus"], record["nodes"]) == (False, 1, 1)
    assert cluster.remaining_processes_alive()
    assert Path(os.environ["RAY_TMPDIR"], "ray", "ray_current_cluster").read_text() == cluster.address  # auto


def test_a_cluster_without_a_cpu_says_so(cluster, start):
    status, _, err = start("ray", "--address", cluster.address).finish()
    assert (status, err) == (1, f"the cluster at {cluster.address} has no CPU: see ray status\n")


def test_a_job_has_an_actor_on_every_cpu_of_two_nodes(cluster, start, trained, tmp_path):
    """`ray job submit` gives the script the cluster's address, in RAY_ADDRESS, and a working directory."""
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", tmp_path]
    submit += ["--address", f"http://{cluster.head_node.webui_url}", "--"]
    with added(cluster, 2, {last}) as two, added(cluster) as one:
        bench = start("ray", *QUICK, 30, before=submit)
        bench.wait_for("round 1:")
        # The first node may use one core, and advertises two CPUs.
        for node, cores in ((two, [{str(last)}, {str(last)}]), (one, [{str(first)}])):
            assert [allowed_cpus(process) for process in models(node)] == cores
            for process in models(node):
                folder = Path(process.cwd())
                assert folder.is_relative_to(node.get_session_dir_path())
                copies = {file.name: file.read_bytes() for file in folder.iterdir()}
                assert copies == {file.name: file.read_bytes() for file in trained}
        assert bench.finish()[0] == 0
    [record] = bench.records()
    assert (record["cluster"], record["num_cpus"], record["nodes"], record["restarts"]) == (True, 3, 2, 0)


def test_a_node_dies_and_one_that_joins_takes_its_actor(cluster, start):
    with added(cluster) as first, added(cluster):
        bench = start("ray", *QUICK, 15, "--address", "auto")
        bench.wait_for("round 1:")
        raylet(first).kill()
        with added(cluster):
            assert bench.finish()[0] == 0
            [record] = bench.records()
            assert (record["num_cpus"], record["nodes"], record["restarts"]) == (2, 2, 1)
