"""The bench scripts as a user runs them: what they print, record and leave, and what the kernel says of their threads.

Oracles: a forward pass in numpy with the weights of the .keras file; the kernel's files under /proc and /sys.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import APPROACHES, ROOT, load, run
from test_train_model import weights

pytestmark = pytest.mark.timeout(400)  # Many seconds each, and a busy machine takes a multiple.

MODES = {
    "predict_on_batch": ["--trials", "2", "--rounds", "2", "--predict-on-batch"],
    "predict": ["--trials", "1", "--rounds", "1"],
}
BOTH = [(approach, mode) for approach in APPROACHES for mode in MODES]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins processes")


@pytest.fixture(scope="module")
def runs(start):
    """A run of each approach in each mode, at its end: {(approach, mode): Bench}. The four go side by side."""
    begun = {}
    for mode, flags in MODES.items():
        begun |= {(approach, mode): start(approach, *flags) for approach in APPROACHES}
        for bench in begun.values():
            bench.finish()
    return begun


def siblings(cpu):
    """The CPUs (hyper-threads) of this CPU's core that may be used here, by the kernel's own word."""
    with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
        return expand(file.read()) & os.sched_getaffinity(0)


def expand(text):
    """{0, 1, 4} of the kernel's "0-1,4"."""
    parts = [part.split("-") for part in text.strip().split(",")]
    return {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)}


def cores():
    """The first CPU of each core that may be used here."""
    if sys.platform != "linux":
        return list(range(psutil.cpu_count(logical=False)))
    return sorted({min(siblings(cpu)) for cpu in os.sched_getaffinity(0)})


def allowed(process):
    """The sets of CPUs that the kernel lets the threads of a process run on: one, where all threads are alike."""
    found = set()
    for thread in os.listdir(f"/proc/{process.pid}/task"):
        with contextlib.suppress(OSError):  # It has just ended.
            with open(f"/proc/{process.pid}/task/{thread}/status") as file:
                found.add(re.search(r"Cpus_allowed_list:\s*(\S+)", file.read())[1])
    return found


@pytest.mark.parametrize("approach, mode", BOTH)
def test_prints_what_a_person_reads_and_nothing_else(runs, approach, mode):
    status, stdout, stderr = runs[approach, mode].finish()
    assert status == 0, stderr
    trials, rounds = int(MODES[mode][1]), int(MODES[mode][3])
    where = f"{len(cores())} cores" + f": {cores()}" * (approach != "ray")
    first, *lines, last = stdout.splitlines()
    assert first == f"{approach}: {trials} x {rounds} rounds of {mode} on stand-in data, {where}"
    records = runs[approach, mode].records()
    assert [line.strip() for line in lines if line] == [
        f"trial {record['trial'] + 1}: {record['seconds']:.3f} s, accuracy {record['accuracy']:.4f}"
        for record in records
    ]
    seconds = [record["seconds"] for record in records]
    spread = f"{np.std(seconds, ddof=1):.3f} s" if trials > 1 else "unknown"
    counts = f"{trials} trials of {rounds} rounds, {len(cores())} cores"
    setup = f"set-up {records[0]['setup_seconds']:.1f} s, not timed"
    assert last == f"mean {np.mean(seconds):.3f} s, standard deviation {spread} ({counts}); {setup}"
    progress = [f"trial {t + 1} of {trials}, round {r + 1} of {rounds} " for t in range(trials) for r in range(rounds)]
    assert stderr.split("\n") == ["", *progress]  # read_text() makes newlines of the carriage returns


@pytest.mark.parametrize("approach, mode", BOTH)
def test_records_every_field(runs, trained, approach, mode):
    trials, rounds = int(MODES[mode][1]), int(MODES[mode][3])
    records = runs[approach, mode].records()
    assert [record["trial"] for record in records] == list(range(trials))
    assert len({record["run"] for record in records}) == 1
    sha = hashlib.sha256(trained[0].read_bytes()).hexdigest()
    versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy", "ray")}
    pool = approach.startswith("multiprocessing")
    known = {"approach": approach, "num_cpus": len(cores()), "restarts": 0, "predict": mode, "images": 10000}
    known |= {"model": sha, "data": "stand-in", "cores": cores(), "nodes": 1}
    known |= {"pinned": approach != "serial" and sys.platform == "linux"}
    known |= {"start_method": multiprocessing.get_start_method() if pool else None}
    known |= {"versions": versions | {"python": platform.python_version()}}
    own = {"trial", "run", "time", "seconds", "round_seconds", "setup_seconds", "cpu_seconds", "memory_bytes", "host"}
    own |= {"accuracy", "predictions"}
    for record in records:
        assert {name: record[name] for name in known} == known
        assert set(record) == set(known) | own
        moment = datetime.datetime.fromisoformat(record["time"])
        ago = datetime.datetime.now(datetime.UTC) - moment
        assert moment.utcoffset() == datetime.timedelta(0) and 0 <= ago.total_seconds() < 1000
        times = record["round_seconds"]
        assert len(times) == rounds and min(times) > 0.001 and record["seconds"] == pytest.approx(sum(times))
        assert record["setup_seconds"] > 0.5  # TensorFlow is imported in it
        assert 0 < record["cpu_seconds"] <= (record["seconds"] + 1) * psutil.cpu_count()
        assert 1e8 < record["memory_bytes"] < psutil.virtual_memory().total and type(record["memory_bytes"]) is int
        assert type(record["run"]) is str and type(record["accuracy"]) is float
        host = record["host"]
        assert type(host.pop("load")) is float and type(host.pop("cpu")) is str
        assert host == {
            "name": platform.node(),
            "platform": platform.platform(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cpus": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        }


def test_predictions_are_those_of_a_forward_pass_in_numpy(runs, trained):
    kernel, bias, kernel_1, bias_1 = weights(trained[0])
    with np.load(trained[1]) as mnist:
        x_test, y_test = mnist["x_test"].reshape(-1, 784) / np.float32(255), mnist["y_test"]
    labels = np.argmax(np.maximum(0, x_test @ kernel + bias) @ kernel_1 + bias_1, axis=1)
    digest, accuracy = hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest(), np.mean(labels == y_test)
    found = {(*key, one["predictions"], one["accuracy"]) for key, bench in runs.items() for one in bench.records()}
    assert found == {(approach, mode, digest, accuracy) for approach, mode in BOTH}


def test_runs_have_names_of_their_own(runs):
    assert len({bench.records()[0]["run"] for bench in runs.values()}) == len(BOTH)


def test_nothing_is_left(runs):
    assert {key: bench.left() for key, bench in runs.items()} == dict.fromkeys(BOTH, [])


def test_analyze_accepts_the_records(runs):
    done = run("analyze.py", *(bench.results for bench in runs.values()))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for approach in APPROACHES:
        assert done.stdout.count(f"| {approach} ") >= 2  # a row in the table of each mode


def test_a_machine_that_hides_its_physical_cores_still_makes_a_record(trained, monkeypatch):
    bench, count = load("bench_serial"), psutil.cpu_count
    monkeypatch.setattr(bench, "filename", str(trained[0]))
    monkeypatch.setattr(bench, "datafile", str(trained[1]))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: count() if logical else None)
    host = bench.announce("serial", "", argparse.Namespace(trials=1, rounds=1))["host"]
    assert host["physical_cores"] == host["logical_cpus"] == os.cpu_count()


def test_a_script_that_does_without_ray_makes_a_record_where_ray_is_not_installed(trained, monkeypatch):
    bench, find = load("bench_serial"), importlib.util.find_spec
    monkeypatch.setattr(bench, "filename", str(trained[0]))
    monkeypatch.setattr(bench, "datafile", str(trained[1]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    versions = bench.announce("serial", "", argparse.Namespace(trials=1, rounds=1))["versions"]
    assert set(versions) == {"tensorflow", "keras", "numpy", "python"}


@pytest.mark.parametrize("script, initializer", [("ray", None), ("multiprocessing", False), ("multiprocessing", True)])
def test_a_worker_has_answered_a_batch_when_it_is_set_up(script, initializer, monkeypatch):
    bench, asked = load(f"bench_{script}"), []
    monkeypatch.setattr(bench, "pin", lambda core: None)
    monkeypatch.setattr(bench, "load", lambda: ("model", "images"))
    monkeypatch.setattr(bench, "predict", lambda *what: asked.append(what))
    if script == "ray":
        bench.Model.__ray_metadata__.modified_class(0)
    else:
        queue, problems = multiprocessing.SimpleQueue(), multiprocessing.SimpleQueue()
        queue.put(0)
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # The tests' own stay.
        bench.work(argparse.Namespace(initializer=initializer), queue, problems)
        assert problems.get() is None
    assert asked == [("model", "images")]


@linux_only
def test_each_worker_has_a_core_of_its_own_for_all_its_threads(start):
    long = ["--trials", "1", "--rounds", "100000", "--predict-on-batch"]
    begun = [start("ray", *long), start("multiprocessing+initializer", *long)]
    for bench in begun:
        bench.wait_for("round 3 of")
    for _ in range(3):
        for bench in begun:
            workers = bench.workers()
            assert min(process.num_threads() for process in workers) > 1
            assert {os.sched_getscheduler(process.pid) for process in workers} == {os.SCHED_BATCH}
            assert sorted(map(allowed, workers), key=str) == [{str(core)} for core in sorted(cores(), key=str)]
        time.sleep(0.3)
    end(begun)


@linux_only
def test_workers_of_the_stateless_pool_pin_themselves_in_every_call(start):
    bench = start("multiprocessing", "--trials", "1", "--rounds", "100000")
    bench.wait_for("round 3 of")
    workers, alike, end_of_test = bench.workers(), 0, time.monotonic() + 60
    assert len(workers) == len(cores())
    while alike < 10 and time.monotonic() < end_of_test:
        # A call that begins moves threads one by one: what stays the same for a while within a round counts.
        first = bench.err.read_text(), [allowed(process) for process in workers]
        time.sleep(0.1)
        if first == (bench.err.read_text(), [allowed(process) for process in workers]):
            alike += 1
            assert sorted(first[1], key=str) == [{str(core)} for core in sorted(cores(), key=str)]
    assert alike == 10
    end([bench])


@linux_only
def test_serial_keeps_to_the_cores_that_it_is_told(start):
    bench = start("serial", "--num-cpus", "1", "--trials", "1", "--rounds", "100000", "--predict-on-batch")
    bench.wait_for("round 3 of")
    assert bench.process.num_threads() > 1
    assert os.sched_getscheduler(bench.process.pid) == os.SCHED_BATCH
    [cpus] = allowed(bench.process)
    assert expand(cpus) == siblings(cores()[0])
    end([bench])


def end(begun):
    """End the runs as `kill` does."""
    for bench in begun:
        bench.family()
        bench.process.send_signal(signal.SIGTERM)
    for bench in begun:
        assert bench.finish()[0] == 143
        assert bench.left() == []


# Calls the pool's function twice in a new process, on two cores, and prints what it did: what it loaded, read and
# traced (a layer's own code runs on symbolic tensors then, and only then, once the model is loaded).
TWO_CALLS = """
import json, os, sys
import bench_multiprocessing as bench
import keras
import numpy as np
import tensorflow as tf

bench.filename, bench.datafile, bench.predict_on_batch = sys.argv[1], sys.argv[2], sys.argv[3] == "predict_on_batch"
events, models = [], []
load, load_model, call = np.load, tf.keras.models.load_model, keras.layers.Dense.call

class Observed:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def __getitem__(self, name):
        events.append(name)
        return self.file[name]

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
    shape = bench.evaluate_next_batch(core).shape
    after = events[events.index("model") :]
    cpus = {str(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
    print(json.dumps([shape, after, list(cpus), id(models[-1])]))
print(len(os.listdir("/proc/self/task")))
"""


@linux_only
@pytest.mark.parametrize("mode", MODES)
def test_the_stateless_pool_keeps_nothing_between_two_calls(trained, mode):
    command = [sys.executable, "-c", TWO_CALLS, *trained, mode]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    *calls, threads = map(eval, done.stdout.splitlines())
    assert len(calls) == 2 and threads > 1
    for core, (shape, events, cpus, _) in zip((cores()[0], cores()[-1]), calls, strict=True):
        assert shape == [10000, 10]
        reads = ["x_train", "y_train", "x_test", "y_test"]
        assert events[:5] == ["model", *reads]
        assert events.count("trace") >= 2 and set(events[5:]) == {"trace"}  # of two layers, for each size of a batch
        assert cpus == [str({core})]  # of all threads, those that the first call started included
    assert calls[0][3] != calls[1][3]
