"""The bench scripts as a user runs them: what they print, record and leave, and what the kernel says of their threads.

Oracles: a forward pass in numpy with the weights of the .keras file; the kernel's files under /proc and /sys.
"""

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import APPROACHES, ROOT, allowed_cpus, expected_labels, run

import bench_serial

MODES = ["predict", "predict_array", "predict_on_batch"]
ALL = [(approach, mode) for approach in APPROACHES for mode in MODES]
CORES = bench_serial.physical_cores()
ENDLESS = ["--rounds", "1000000", "--mode", "predict_on_batch"]
pytestmark = pytest.mark.timeout(300)  # None takes a minute on a quiet machine.
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins processes")


@pytest.fixture(scope="module")
def runs(start):
    """A run of two rounds of each approach in each mode, at its end: {(approach, mode): Bench}."""
    begun = {}
    for mode in MODES:  # The four approaches side by side.
        begun |= {(approach, mode): start(approach, "--rounds", 2, "--mode", mode) for approach in APPROACHES}
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
        known = {
            "approach": approach,
            "mode": mode,
            "num_cpus": len(CORES),
            "nodes": 1,
            "cluster": False,
            "restarts": 0,
        }
        known |= {"start_method": multiprocessing.get_start_method() if "multi" in approach else None}
        assert {name: record[name] for name in known} == known and record["versions"] == versions
        assert 0 <= time.time() - record["time"] < 1000 and record["time"] % 1
        assert record["setup_seconds"] > 0.5  # TensorFlow is imported in it.
        assert (record["cpu_seconds"] is not None) == (approach == "serial")
        assert re.fullmatch(
            rf".+, {psutil.cpu_count(logical=False)} physical cores, {platform.system()}", record["machine"]
        )
        own = {
            "time",
            "setup_seconds",
            "round_seconds",
            "cpu_seconds",
            "accuracy",
            "labels",
            "model",
            "data",
            "machine",
        }
        assert set(record) == set(known) | own | {"versions"}
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
        assert done.stdout.count(f"\n| {approach} ") == 3  # a row in the table of each mode


@linux_only
@pytest.mark.parametrize("approach", ["ray", "multiprocessing", "multiprocessing+initializer"])
def test_each_worker_has_a_core_of_its_own_for_all_its_threads(start, approach):
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
    bench.process.terminate()
    assert bench.finish()[0] == 143 and bench.left() == []


@linux_only
def test_serial_keeps_to_the_cores_that_it_is_told_with_their_hyper_threads(start):
    bench = start(
        "serial", "--num-cpus", "1", *ENDLESS, OPENBLAS_NUM_THREADS="1"
    )  # NumPy's own threads are older, and idle.
    bench.wait_for("round 2:")
    assert bench.process.num_threads() > 1
    [cpus] = allowed_cpus(bench.process)
    with open(f"/sys/devices/system/cpu/cpu{CORES[0]}/topology/thread_siblings_list") as file:
        assert cpus == file.read().strip()
    bench.process.terminate()
    assert bench.finish()[0] == 143


# Calls the pool's function twice in one process, and prints what it did: what it read, loaded and traced (a layer's own
# code runs on symbolic tensors then, and only then, once the model is loaded).
TWO_CALLS = """
import json, sys
import bench_multiprocessing as bench
import keras
import numpy as np
import tensorflow as tf

events, models = [], []
load, load_model, call = np.load, tf.keras.models.load_model, keras.layers.Dense.call

class Observed(dict):
    def __init__(self, file):
        super().__init__({name: file[name] for name in file})
    def __getitem__(self, name):
        events.append(name)
        return super().__getitem__(name)
    def __iter__(self):
        return super().__iter__()

def observed_load_model(*arguments, **options):
    models.append(load_model(*arguments, **options))
    events.append("model")
    return models[-1]

def observed_call(self, inputs, *arguments, **options):
    if not tf.executing_eagerly():
        events.append("trace")
    return call(self, inputs, *arguments, **options)

np.load = lambda *arguments, **options: Observed(load(*arguments, **options))
tf.keras.models.load_model = observed_load_model
keras.layers.Dense.call = observed_call
for core in (bench.physical_cores()[0], bench.physical_cores()[-1]):
    del events[:]
    shape = np.shape(bench.evaluate_next_batch(core, *sys.argv[1:]))
    after = events[events.index("model") :]
    print(json.dumps([shape, after, id(models[-1]), sorted(psutil_cpus())]))
"""
CPUS = """
import os
def psutil_cpus():
    return {cpu for thread in os.listdir("/proc/self/task") for cpu in os.sched_getaffinity(int(thread))}
"""


@linux_only
@pytest.mark.parametrize("mode", ["predict", "predict_on_batch"])
def test_the_stateless_pool_keeps_nothing_between_two_calls(trained, mode):
    command = [sys.executable, "-c", CPUS + TWO_CALLS, *map(str, trained), mode]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    calls = list(map(json.loads, done.stdout.splitlines()))
    assert len(calls) == 2 and calls[0][2] != calls[1][2]
    for core, (shape, events, _, cpus) in zip((CORES[0], CORES[-1]), calls, strict=True):
        assert shape == [10000, 10]
        assert {"x_train", "y_train", "x_test", "y_test"} <= set(events)
        assert events.count("trace") >= 2  # two layers
        assert cpus == [core]  # of all threads, those that the first call started included
