"""bench_ray.py beside a cluster and on one: real raylets on this machine, each with folders of its own.

The cluster, its files and its ports are the tests' own: another Ray on the machine does not notice it.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
from conftest import allowed_cpus

WAIT = 20  # seconds that bench_ray.py waits for an answer


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
        cluster.add_node(num_cpus=0, dashboard_port=0, dashboard_agent_listen_port=0, _system_config=quick)
        yield cluster


@contextlib.contextmanager
def added(cluster, num_cpus=1, cores=None):
    """Add a node that may use only these cores, and has a folder for its files; take it away at the end."""
    allowed = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.sched_setaffinity(0, cores or allowed)  # The node's processes inherit it.
        try:
            node = cluster.add_node(num_cpus=num_cpus, temp_dir=folder)
        finally:
            os.sched_setaffinity(0, allowed)
        try:
            yield node
        finally:
            cluster.remove_node(node)


def raylet(node):
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def models(node):
    """The actors' processes on the node."""
    found = []
    for process in raylet(node).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
            if process.name().startswith("ray::Model"):
                found.append(process)
    return found


def listening(processes):
    """The addresses on which the processes listen, by the kernel's word."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    address = ip_address(socket.laddr.ip)
                    found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def digests(files):
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def wait_until(bench, condition):
    """Wait until a record of the run fulfils the condition."""
    end = time.monotonic() + 50
    while not any(condition(record) for record in bench.records()):
        assert bench.process.poll() is None and time.monotonic() < end, bench.finish(0)
        time.sleep(0.1)


@pytest.fixture
def files(trained, tmp_path):
    """Copies of model and data, to be deleted; both have the same base name, in two folders."""
    copies = [tmp_path / "a" / "x.keras", tmp_path / "b" / "x.keras"]
    for path, copy in zip(trained, copies, strict=True):
        copy.parent.mkdir()
        shutil.copy(path, copy)
    return copies


def test_a_private_run_leaves_a_running_cluster_alone(cluster, start, tmp_path):
    """Without --address: a Ray of its own, on loopback, which leaves no token in the home folder."""
    newest = Path(os.environ["RAY_TMPDIR"], "ray", "ray_current_cluster")
    before = set(psutil.Process().children(recursive=True))
    flags = ("--num-cpus", "1", "--predict-on-batch", "--trials", "1000", "--rounds", "2")
    bench = start("ray", *flags, RAY_AUTH_MODE=None, HOME=tmp_path)
    bench.wait_for("trial 1:")
    family = bench.family()
    assert {"gcs_server", "raylet"} <= {process.name() for process in family}
    assert listening(family) == {"127.0.0.1"}
    bench.process.terminate()
    assert bench.finish()[0] == 143
    assert bench.left() == []
    record = bench.records()[0]
    assert (record["ray"], record["nodes"]) == ("private", 1)
    assert not (tmp_path / ".ray").exists()
    assert before <= set(psutil.Process().children(recursive=True))
    assert cluster.remaining_processes_alive()
    assert newest.read_text() == cluster.address  # which --address auto means


def test_a_cluster_without_a_cpu_says_so(cluster, start):
    status, _, err = start("ray", "--address", cluster.address).finish()
    assert (status, err) == (1, f"the cluster at {cluster.address} has no CPU: see ray status\n")


def test_an_actor_on_every_cpu_of_three_nodes(cluster, start, files):
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    model, data = files
    sent = digests(files)
    with added(cluster, 2, {last}) as two, added(cluster) as one, added(cluster) as another:
        flags = ("--model", model, "--data", data, "--predict-on-batch", "--trials", "1000", "--rounds", "2")
        bench = start("ray", *flags, RAY_ADDRESS=cluster.address)
        bench.wait_for("trial 1:")
        found = {}
        for node in (two, one, another):
            found[node] = [allowed_cpus(process) for process in models(node)]
            for process in models(node):
                folder = Path(process.cwd())
                assert folder.is_relative_to(node.get_session_dir_path())
                assert digests(folder.iterdir()) == sent
        # The first node may use one core, and advertises two CPUs.
        assert found == {two: [{str(last)}, {str(last)}], one: [{str(first)}], another: [{str(first)}]}
        bench.process.terminate()
        assert bench.finish()[0] == 143
    for record in bench.records():
        assert (record["ray"], record["num_cpus"], record["nodes"], record["restarts"]) == ("cluster", 4, 3, 0)


def test_nodes_die_and_another_joins(cluster, start, files):
    model, data = files
    flags = ("--model", model, "--data", data, "--predict-on-batch", "--trials", "10000", "--wait", WAIT)
    with added(cluster) as first, added(cluster) as second:
        bench = start("ray", "--address", "auto", *flags)
        bench.wait_for("trial 1:")
        model.unlink()
        data.unlink()
        with added(cluster, 2) as joined:
            raylet(first).kill()
            raylet(second).kill()
            wait_until(bench, lambda record: record["nodes"] == 1)
            assert len(models(joined)) == 2
            for actor in models(joined):
                assert Path(actor.cwd()).is_relative_to(joined.get_session_dir_path())
            raylet(joined).kill()
            status, _, err = bench.finish()
    assert status == 1
    assert f"{WAIT} s (--wait)" in err and "Traceback" not in err
    records = bench.records()
    assert [record["trial"] for record in records] == list(range(len(records)))
    assert sum(record["restarts"] for record in records) == 2
    nodes = [record["nodes"] for record in records]
    assert nodes == sorted(nodes, reverse=True) and set(nodes) == {2, 1}
    assert {record["num_cpus"] for record in records} == {2}
