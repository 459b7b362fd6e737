"""bench_ray.py on clusters: real raylets on this machine, each with folders of its own, as if it were a machine.

The cluster, its files and its ports are the tests' own: another Ray on the machine does not notice it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

pytestmark = pytest.mark.timeout(400)  # A busy machine; on a quiet one none takes a minute.
LIMIT = 30  # seconds that bench_ray.py waits for a round, set-up included: four actors start on two busy cores


@pytest.fixture(scope="module")
def cluster():
    """A cluster with one node of one CPU, and a dashboard, which takes jobs, on loopback."""
    folder = tempfile.mkdtemp(dir="/tmp")  # A short path: sockets lie in it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # Or a token in the home folder would decide who may connect.
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        ports = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}
        # Ray would need 15 s to see that a node is dead.
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
        cluster.add_node(num_cpus=1, include_dashboard=True, _system_config=quick, **ports)
        yield cluster
        cluster.shutdown()
    shutil.rmtree(folder)


@contextlib.contextmanager
def added(cluster, num_cpus=1, cores=None):
    """Add a node, which may use only these cores, and has a folder for its files; take it away at the end."""
    allowed = os.sched_getaffinity(0)
    folder = tempfile.mkdtemp(dir="/tmp")
    os.sched_setaffinity(0, cores or allowed)  # Its processes inherit it.
    try:
        node = cluster.add_node(num_cpus=num_cpus, temp_dir=folder)
    finally:
        os.sched_setaffinity(0, allowed)
    try:
        yield node
    finally:
        cluster.remove_node(node)
        shutil.rmtree(folder)


def raylet(node):
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def models(node):
    """The actors' processes on the node."""
    found = []
    for process in raylet(node).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
            found += [process] if process.name().startswith("ray::Model") else []
    return found


def cores_of(process):
    """The sets of CPUs on which the kernel lets the threads of the process run."""
    found = set()
    for file in Path(f"/proc/{process.pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # It has just ended.
            found |= {line.split()[1] for line in file.read_text().splitlines() if "Cpus_allowed_list" in line}
    return found


def listening(process):
    """(program, address, port) of each socket on which the process or one that it started listens; print them."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
            program = [part for part in one.cmdline() if not part.startswith("-")]
            program = Path(program[1] if "python" in program[0] and len(program) > 1 else program[0]).name.strip()
            for socket in one.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    address = ip_address(socket.laddr.ip)
                    found.add((program, str(getattr(address, "ipv4_mapped", None) or address), socket.laddr.port))
    print(*sorted(found), sep="\n")
    return found


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """A function that copies model and data into a folder that can be deleted."""

    def files():
        folder = tmp_path_factory.mktemp("driver")
        return [Path(shutil.copy(path, folder)) for path in trained]

    return files


@pytest.fixture(scope="module")
def alone(start, cluster):
    """The record of a run without --address, and what it left and listened on, while the cluster runs beside it."""
    pointer = Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    assert pointer.read_text() == cluster.address
    before = {(process.pid, process.create_time()) for process in psutil.Process().children(recursive=True)}
    bench = start("ray", "--predict-on-batch", "--trials", "1", RAY_AUTH_MODE=None)
    bench.wait_for("round 2 of 10")
    sockets = listening(bench.process)
    status, out, err = bench.finish()
    assert status == 0, err
    after = {(process.pid, process.create_time()) for process in psutil.Process().children(recursive=True)}
    [record] = bench.records()
    return {
        "record": record,
        "sockets": sockets,
        "left": bench.left(),
        "unharmed": before <= after and pointer.read_text() == cluster.address and cluster.remaining_processes_alive(),
    }


def test_a_local_run_uses_a_ray_of_its_own_beside_a_cluster(alone):
    assert alone["record"]["num_cpus"] == len(alone["record"]["cores"]) > 0
    assert alone["record"]["nodes"] == 1 and alone["record"]["cpu_seconds"] > 0
    assert alone["unharmed"]
    assert alone["left"] == []


def test_a_local_run_listens_on_loopback_alone(alone):
    programs = {program for program, _, _ in alone["sockets"]}
    assert programs >= {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "bench_ray.py"}
    assert [program for program in programs if program.startswith("ray::Model")]
    assert {address for _, address, _ in alone["sockets"]} == {"127.0.0.1"}


def test_every_cpu_of_three_nodes(cluster, start, files, alone):
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    model, data = files()
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (model, data)}
    with added(cluster, 2, {last}) as two, added(cluster) as one:
        nodes = (cluster.head_node, two, one)
        bench = start(
            "ray", "--address", cluster.address, "--model", model, "--data", data, "--trials", "1", "--rounds", "6"
        )
        bench.wait_for("round 1 of 6")
        model.unlink()
        data.unlink()
        bench.wait_for("round 2 of 6")
        actors = [models(node) for node in nodes]
        assert [len(processes) for processes in actors] == [1, 2, 1]
        pinned = [[cores_of(process) for process in processes] for processes in actors]
        # The second node may use one core, and advertises two CPUs.
        assert pinned == [[{str(first)}], [{str(last)}] * 2, [{str(first)}]]
        for node, processes in zip(nodes, actors, strict=True):
            for process in processes:
                folder = Path(process.cwd())
                assert folder.is_relative_to(node.get_session_dir_path())
                assert {
                    path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
                } == digests
        sockets = listening(psutil.Process())
        status, out, err = bench.finish()
    assert status == 0, err
    [record] = bench.records()
    assert (record["num_cpus"], record["nodes"], record["restarts"]) == (4, 3, 0)
    assert sorted(record["cores"]) == sorted([first, last, last, first])
    assert record["cpu_seconds"] is record["memory_bytes"] is None
    assert record["predictions"] == alone["record"]["predictions"]
    assert ("dashboard.py", *cluster.webui_url.split(":")) in [(name, at, str(port)) for name, at, port in sockets]
    assert cluster.webui_url.startswith("127.0.0.1:"), "who reaches the dashboard can run commands"


def test_a_node_dies_and_another_joins(cluster, start, files, alone):
    model, data = files()
    arguments = ("--predict-on-batch", "--trials", "10000", "--wait", LIMIT)
    with added(cluster) as doomed:
        bench = start("ray", "--address", "auto", "--model", model, "--data", data, *arguments, RAY_ADDRESS="")
        bench.wait_for("trial 1:")
        model.unlink()
        data.unlink()
        while not bench.err.read_text().endswith("round 2 of 10 "):
            time.sleep(0.005)
        raylet(doomed).kill()
        done = len(bench.records())
        with added(cluster) as joined:
            bench.wait_for("1 restarted")  # An actor may outlive its raylet for a second, which is some trials.
            [actor] = models(joined)
            assert Path(actor.cwd()).is_relative_to(joined.get_session_dir_path())
            raylet(joined).kill()
            status, out, err = bench.finish()
    assert status == 1 and "no answer for" in err and f"giving up after {LIMIT} s" in err and "Traceback" not in err
    records = bench.records()
    assert [record["trial"] for record in records] == list(range(len(records)))
    restarts = [record["restarts"] for record in records]
    assert sorted(restarts) == [0] * (len(records) - 1) + [1] and restarts.index(1) >= done
    assert {record["predictions"] for record in records} == {alone["record"]["predictions"]}
    assert {(record["num_cpus"], record["nodes"]) for record in records} == {(2, 2)}


def test_a_busy_cluster_is_waited_for_so_long(cluster, start):
    code = "import ray, time; ray.init(); ray.get(ray.remote(lambda: time.sleep(99)).remote())"
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    busy = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    workers = raylet(cluster.head_node).children
    try:
        while not any("lambda" in process.name() for process in workers()):
            assert busy.poll() is None
            time.sleep(0.1)
        bench = start("ray", "--wait", "4", RAY_ADDRESS=cluster.address)
        status, out, err = bench.finish()
    finally:
        busy.kill()
        busy.wait()
    assert status == 1 and f"every CPU of the cluster at {cluster.address}" in out
    assert err.count("no answer for 2 s: ") == 2 and "giving up after 4 s" in err and "Traceback" not in err
    assert bench.records() == []


def test_a_job_of_the_cluster(cluster, trained, tmp_path, alone):
    """`ray job submit`, with a working directory of its own; the job gets the cluster's address from Ray."""
    (tmp_path / "work").mkdir()
    shutil.copy(ROOT / "bench_ray.py", tmp_path / "work")
    files = ["--model", trained[0], "--data", trained[1], "--output", tmp_path / "results.jsonl"]
    script = [sys.executable, "bench_ray.py", *files, "--trials", "1", "--rounds", "2"]
    submit = ["job", "submit", "--address", f"http://{cluster.webui_url}", "--working-dir", tmp_path / "work", "--"]
    command = [Path(sys.executable).parent / "ray", *submit, *script]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every CPU of the cluster" in done.stdout and "set-up" in done.stdout
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert (record["num_cpus"], record["nodes"], record["cpu_seconds"]) == (1, 1, None)
    assert record["predictions"] == alone["record"]["predictions"]


def test_the_address_for_jobs_is_refused(start, cluster):
    bench = start("ray", RAY_ADDRESS=f"http://{cluster.webui_url}")
    status, out, err = bench.finish()
    assert status == 1 and cluster.webui_url in err and "--address auto" in err and "Traceback" not in err


def test_a_cluster_without_a_cpu_says_so(cluster, start):
    """The last test here: Ray notes its newest cluster as the one that "auto" means."""
    from ray.cluster_utils import Cluster

    empty = Cluster()
    empty.add_node(num_cpus=0, dashboard_port=0, dashboard_agent_listen_port=0)
    address = empty.address
    try:
        status, _, stderr = start("ray", "--address", address).finish()
    finally:
        empty.shutdown()
    assert (status, stderr) == (1, f"no CPU in the cluster at {address}: see ray status\n")
