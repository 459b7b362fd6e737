"""The bench scripts as a user runs them: what they print, record and leave, and what the kernel says of them."""

import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import re
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import APPROACHES, allowed_cpus, expected_labels, run

import bench_multiprocessing
import bench_serial

MODES = ["predict", "predict_array", "predict_on_batch"]
# All in the default mode; the modes are known in one function, which all scripts share.
ALL = [*((name, MODES[0]) for name in APPROACHES), *((name, mode) for mode in MODES[1:] for name in ("serial", "ray"))]
CORES = bench_serial.physical_cores()
ENDLESS = ["--rounds", "1000000", "--mode", "predict_on_batch"]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins processes")


@pytest.fixture(scope="module")
def runs(start):
    """A run of two rounds of each in ALL, at its end: {(approach, mode): Bench}."""
    begun = {}
    for four in (ALL[:4], ALL[4:]):  # Four side by side.
        begun |= {(approach, mode): start(approach, "--rounds", 2, "--mode", mode) for approach, mode in four}
        for bench in begun.values():
            bench.finish()
    return begun


def test_what_is_printed_and_recorded(runs):
    """One test for all: a run is started once, and everything about it is looked at."""
    for (approach, mode), bench in runs.items():
        status, stdout, stderr = bench.finish()
        assert (status, stderr) == (0, ""), (approach, mode)
        [record] = bench.records()
        first, second = record["round_seconds"]
        assert min(first, second) > 0.001
        setup = f"set-up {record['setup_seconds']:.1f} s, {record['accuracy']:.1%} right"
        lines = [f"round 1: {first:.3f} s", f"round 2: {second:.3f} s", f"{approach}: {first + second:.3f} s, {setup}"]
        assert stdout.splitlines() == lines
        names = {"tensorflow", "keras", "numpy"} | {approach} & {"ray"}
        versions = {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}
        known = {"approach": approach, "mode": mode, "num_cpus": len(CORES), "nodes": 1, "cluster": False}
        method = multiprocessing.get_start_method() if "multi" in approach else None
        known |= {"restarts": 0, "start_method": method}
        assert {name: record[name] for name in known} == known and record["versions"] == versions
        assert 0 <= time.time() - record["time"] < 1000 and record["time"] % 1
        assert record["setup_seconds"] > 0.5  # TensorFlow is imported in it.
        assert (record["cpu_seconds"] is not None) == (approach == "serial")
        machine = rf".+, {psutil.cpu_count(logical=False)} physical cores, {platform.system()}"
        assert re.fullmatch(machine, record["machine"])
        own = "time setup_seconds round_seconds cpu_seconds accuracy labels model data machine versions"
        assert set(record) == set(known) | set(own.split())
    cpu_seconds = runs["serial", "predict"].records()[0]["cpu_seconds"]
    assert 0 < cpu_seconds <= sum(runs["serial", "predict"].records()[0]["round_seconds"]) * os.cpu_count() * 1.1


def test_answers_are_those_of_a_forward_pass_in_numpy(runs, trained):
    with np.load(trained[1]) as mnist:
        labels, y_test = expected_labels(trained[0], mnist["x_test"]), mnist["y_test"]
        data = b"".join(mnist[name].tobytes() for name in ("x_test", "x_train", "y_test", "y_train"))
    for record in [record for bench in runs.values() for record in bench.records()]:
        assert record["labels"] == hashlib.sha256(labels).hexdigest()
        assert record["accuracy"] == pytest.approx(np.mean(labels == y_test))
        assert record["data"] == hashlib.sha256(data).hexdigest()


def test_nothing_is_left_running(runs):
    assert {key: bench.left() for key, bench in runs.items()} == dict.fromkeys(ALL, [])


def test_analyze_accepts_the_records(runs):
    done = run("analyze.py", *(bench.results for bench in runs.values()))
    assert (done.returncode, done.stderr) == (0, "")
    for approach in APPROACHES:
        assert done.stdout.count(f"\n| {approach} ") == [name for name, _ in ALL].count(approach)


@linux_only
@pytest.mark.parametrize("approach", ["ray", "multiprocessing", "multiprocessing+initializer"])
def test_workers_keep_to_their_cores_with_all_threads_and_only_the_plain_pool_loads_again(start, trained, approach):
    bench = start(approach, *ENDLESS)
    bench.wait_for("round 2:")
    workers = bench.workers()
    assert len(workers) == len(CORES) and min(worker.num_threads() for worker in workers) > 1
    alike, limit = 0, time.monotonic() + 30
    while alike < 5 and time.monotonic() < limit:
        # The stateless pool pins anew in every call, thread by thread: what is the same twice within a trial counts.
        first = bench.out.read_text(), [allowed_cpus(worker) for worker in workers]
        time.sleep(0.02)
        if first == (bench.out.read_text(), [allowed_cpus(worker) for worker in workers]):
            alike += 1
            assert sorted(first[1], key=str) == sorted([{str(core)} for core in CORES], key=str)
    assert alike == 5
    # What the kernel has counted: the plain pool's workers read both files in every call, the others in none.
    done, read = bench.out.read_text().count("round "), sum(worker.io_counters().read_chars for worker in workers)
    bench.wait_for(f"round {done + 6}:")  # At least five whole rounds.
    loads = (sum(worker.io_counters().read_chars for worker in workers) - read) / sum(f.stat().st_size for f in trained)
    assert loads > 4.5 * len(workers) if approach == "multiprocessing" else loads < 0.1
    bench.process.terminate()
    assert bench.finish()[0] == 143 and bench.left() == []


@linux_only
def test_serial_keeps_to_the_cores_that_it_is_told_with_their_hyper_threads(start):
    # NumPy's own threads are older than the affinity, and idle.
    bench = start("serial", "--num-cpus", "1", *ENDLESS, OPENBLAS_NUM_THREADS="1")
    bench.wait_for("round 2:")
    assert bench.process.num_threads() > 1
    [cpus] = allowed_cpus(bench.process)
    with open(f"/sys/devices/system/cpu/cpu{CORES[0]}/topology/thread_siblings_list") as file:
        assert cpus == file.read().strip()
    bench.process.terminate()
    assert bench.finish()[0] == 143


@linux_only
def test_a_system_that_refuses_to_pin_is_told(monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: None)
    with pytest.raises(PermissionError, match="refuses to pin threads to a core"):
        bench_multiprocessing.pin(4095)
