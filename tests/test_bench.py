"""The bench scripts as a user runs them: what they print, record and leave, and what the kernel says of their threads.

Oracles: a forward pass in numpy with the weights of the .keras file; the kernel's files under /proc and /sys.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import APPROACHES, ROOT, allowed_cpus, expected_labels, run

import bench_serial

MODES = {"predict_on_batch": ["--trials", "2", "--rounds", "2", "--predict-on-batch"], "predict": ["--rounds", "1"]}
BOTH = [(approach, mode) for approach in APPROACHES for mode in MODES]
CORES = bench_serial.physical_cores()
pytestmark = pytest.mark.timeout(300)  # None takes a minute on a quiet machine.
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins processes")


@pytest.fixture(scope="module")
def runs(start):
    """A run of each approach in each mode, at its end: {(approach, mode): Bench}. The four go side by side."""
    begun = {}
    for mode, flags in MODES.items():
        begun |= {(approach, mode): start(approach, "--trials", "1", *flags) for approach in APPROACHES}
        for bench in begun.values():
            bench.finish()
    return begun


@pytest.mark.parametrize("approach, mode", BOTH)
def test_prints_what_a_person_reads_and_nothing_else(runs, approach, mode):
    status, stdout, stderr = runs[approach, mode].finish()
    assert (status, stderr) == (0, "")
    records = runs[approach, mode].records()
    first, *lines, last = stdout.splitlines()
    assert first.startswith(f"{approach}: {mode} on stand-in data, ")
    assert lines == [
        f"trial {one['trial'] + 1}: {one['seconds']:.3f} s, accuracy {one['accuracy']:.4f}, 0 restarts"
        for one in records
    ]
    seconds = [one["seconds"] for one in records]
    deviation = f"{np.std(seconds, ddof=1):.3f} s" if mode == "predict_on_batch" else "unknown"
    counts = f"{len(seconds)} trials of {len(records[0]['round_seconds'])} rounds, {len(CORES)} cores"
    setup = f"set-up {records[0]['setup_seconds']:.1f} s, not timed"
    assert last == f"mean {np.mean(seconds):.3f} s, standard deviation {deviation} ({counts}); {setup}"


@pytest.mark.parametrize("approach, mode", BOTH)
def test_records_every_field(runs, approach, mode):
    records = runs[approach, mode].records()
    assert [record["trial"] for record in records] == list(range(len(records)))
    assert len({record["run"] for record in records}) == 1
    versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy", "ray")}
    known = {"approach": approach, "num_cpus": len(CORES), "nodes": 1, "restarts": 0, "mode": mode}
    known |= {"ray": "private" if approach == "ray" else None, "data": "stand-in"}
    known |= {"versions": versions | {"python": platform.python_version()}}
    own = {"trial", "run", "time", "seconds", "round_seconds", "setup_seconds", "cpu_seconds", "host"}
    own |= {"accuracy", "labels", "model"}
    for record in records:
        assert {name: record[name] for name in known} == known
        assert set(record) == set(known) | own
        ago = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(record["time"])
        assert -1 <= ago.total_seconds() < 1000
        assert min(record["round_seconds"]) > 0.001
        assert record["seconds"] == pytest.approx(sum(record["round_seconds"]))
        assert record["setup_seconds"] > 0.5  # TensorFlow is imported in it.
        if approach == "serial":
            assert 0 < record["cpu_seconds"] <= (record["seconds"] + 1) * os.cpu_count()
        else:
            assert record["cpu_seconds"] is None
        assert record["host"].keys() == {"cpu", "physical_cores", "system"}
        assert record["host"]["system"] == platform.system()


def test_answers_are_those_of_a_forward_pass_in_numpy(runs, trained):
    with np.load(trained[1]) as mnist:
        labels, y_test = expected_labels(trained[0], mnist["x_test"]), mnist["y_test"]
    for record in [record for bench in runs.values() for record in bench.records()]:
        assert record["labels"] == hashlib.sha256(labels).hexdigest()
        assert record["accuracy"] == pytest.approx(np.mean(labels == y_test))


def test_runs_have_names_of_their_own_and_leave_nothing_running(runs):
    assert len({bench.records()[0]["run"] for bench in runs.values()}) == len(BOTH)
    assert {key: bench.left() for key, bench in runs.items()} == dict.fromkeys(BOTH, [])


def test_analyze_accepts_the_records(runs):
    done = run("analyze.py", *(bench.results for bench in runs.values()))
    assert (done.returncode, done.stderr) == (0, "")
    for approach in APPROACHES:
        assert done.stdout.count(f"| {approach} ") >= 2  # a row in the table of each mode


@linux_only
@pytest.mark.parametrize("approach", ["ray", "multiprocessing", "multiprocessing+initializer"])
def test_each_worker_has_a_core_of_its_own_for_all_its_threads(start, approach):
    bench = start(approach, "--trials", "100000", "--rounds", "1", "--predict-on-batch")
    bench.wait_for("trial 2:")
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
    arguments = ["--num-cpus", "1", "--trials", "100000", "--rounds", "1", "--predict-on-batch"]
    bench = start("serial", *arguments, OPENBLAS_NUM_THREADS="1")  # NumPy's own threads are older, and idle.
    bench.wait_for("trial 2:")
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
@pytest.mark.parametrize("mode", MODES)
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


def test_a_machine_that_hides_its_cores_or_lacks_ray_still_makes_a_record(trained, monkeypatch):
    arguments = type("Arguments", (), {"model": trained[0], "data": trained[1], "predict_on_batch": False})
    found = importlib.metadata.packages_distributions()
    del found["ray"]
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: found)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    record, _ = bench_serial.describe(arguments, "serial", 1, None)
    assert record["host"]["physical_cores"] is None
    assert record["versions"].keys() == {"python", "tensorflow", "keras", "numpy"}
