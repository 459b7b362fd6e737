"""The bench scripts as a user runs them: what they print and record, and what the kernel says."""

import hashlib
import importlib.metadata
import json
import multiprocessing
import platform
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import psutil
import pytest
from conftest import APPROACHES, ENVIRONMENT, ROOT, allowed_cpus, expected_labels, run, wait_until

import bench_serial

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins processes")

CORES = bench_serial.physical_cores()
EARLIER = '{"approach": "an earlier record"}\n'

# What identifies a record here: its approach, the flag --array, and the start method.
FORK = multiprocessing.get_start_method()
RUNS = {
    # As they are, but for the second actor of Ray, which other tests have:
    ("serial", False, None): [],
    ("multiprocessing", False, FORK): [],
    ("multiprocessing+initializer", False, FORK): [],
    ("ray", False, None): ["--num-cpus", 1],
    # The article's exact call, and other ways to start the workers of a pool:
    ("serial", True, None): ["--array", "--num-cpus", 1],
    ("ray", True, None): ["--array", "--num-cpus", 1],
    ("multiprocessing", True, "spawn"): ["--array", "--num-cpus", 1],
    ("multiprocessing+initializer", True, "forkserver"): ["--array"],
}

# What a user may have set for other programs.
ODD_SETTINGS = {
    "KERAS_BACKEND": "torch",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "TF_USE_LEGACY_KERAS": "1",
    "RAY_worker_niceness": "7",
}


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """A run of two rounds of each of RUNS, at its end: {key: Bench}. All append to one file."""
    results = tmp_path_factory.mktemp("runs") / "results.jsonl"
    results.write_text(EARLIER)
    begun = {}
    for key, flags in RUNS.items():
        if len(begun) % 4 == 0:  # Four side by side: each waits for some of its time.
            for bench in begun.values():
                bench.finish()
        approach, _, start_method = key
        chosen = None if start_method == FORK else start_method
        flags = ["--rounds", 2, *flags, "--output", results]
        begun[key] = start(approach, *flags, start_method=chosen, **ODD_SETTINGS)
    for bench in begun.values():
        bench.finish()
        bench.results = results
    return begun


@pytest.fixture(scope="module")
def records(runs):
    """The records of the runs: {key: record}."""
    bench, *_ = runs.values()
    earlier, *records = bench.records()
    found = {(new["approach"], new["array"], new.get("start_method")): new for new in records}
    assert len(found) == len(records)
    return found


def test_a_run_ends_well_and_without_a_warning(runs):
    for key, bench in runs.items():
        status, stdout, stderr = bench.finish()
        assert (status, stderr) == (0, ""), key


def test_each_run_appends_its_record_and_earlier_ones_stay(runs, records):
    assert set(records) == set(RUNS)
    bench, *_ = runs.values()
    assert bench.results.read_text().startswith(EARLIER)


def test_rounds_and_a_summary_are_printed(runs, records):
    for key, bench in runs.items():
        record = records[key]
        first, second = record["round_seconds"]
        *rounds, summary = bench.finish()[1].splitlines()
        assert rounds == [f"round 1: {first:.3f} s", f"round 2: {second:.3f} s"]
        assert summary.startswith(f"{key[0]}: {first + second:.3f} s")
        assert f"{record['setup_seconds']:.1f} s" in summary
        assert f"{record['accuracy']:.1%}" in summary


def test_a_record_says_what_was_run_and_where(records):
    for (approach, array, start_method), record in records.items():
        known = {
            "approach": approach,
            "num_cpus": 1 if "--num-cpus" in RUNS[approach, array, start_method] else len(CORES),
            "array": array,
        }
        packages = ["tensorflow", "keras", "numpy"]
        if start_method:
            known["start_method"] = start_method
        if approach == "ray":
            known |= {"nodes": 1, "cluster": False}
            packages.append("ray")

        measured = {"time", "setup_seconds", "round_seconds", "accuracy", "labels", "model", "data"}
        assert set(record) == set(known) | measured | {"machine", "versions"}
        assert {name: record[name] for name in known} == known
        versions = {name: importlib.metadata.version(name) for name in packages}
        assert record["versions"] == versions | {"python": platform.python_version()}
        machine = rf".+, {psutil.cpu_count(logical=False)} physical cores, {sys.platform}"
        assert re.fullmatch(machine, record["machine"])


def test_times_fit_into_the_time_in_which_the_run_took_place(runs, records):
    for key, bench in runs.items():
        record = records[key]
        begin = bench.process.create_time()
        assert begin < record["time"] < time.time()
        assert record["setup_seconds"] > 0.5  # TensorFlow is imported in it.
        assert min(record["round_seconds"]) > 0.001
        seconds = record["setup_seconds"] + sum(record["round_seconds"])
        assert seconds < record["time"] - begin + 0.1  # The kernel's clock ticks a hundredth.


def test_answers_are_those_of_a_forward_pass_in_numpy(records, trained):
    model, data = trained
    with np.load(data) as mnist:
        labels = expected_labels(model, mnist["x_test"])
        accuracy = np.mean(labels == mnist["y_test"])
    for record in records.values():
        assert record["labels"] == hashlib.sha256(labels).hexdigest()
        assert record["accuracy"] == pytest.approx(accuracy)


def test_model_and_data_are_known_by_their_contents(records, trained):
    model, data = trained
    with zipfile.ZipFile(model) as archive:
        weights = archive.read("model.weights.h5")
    with np.load(data) as mnist:
        arrays = [mnist[name].tobytes() for name in ("x_test", "x_train", "y_test", "y_train")]
    for record in records.values():
        assert record["model"] == hashlib.sha256(weights).hexdigest()
        assert record["data"] == hashlib.sha256(b"".join(arrays)).hexdigest()


def test_nothing_is_left_running(runs):
    assert {key: bench.left() for key, bench in runs.items()} == {key: [] for key in RUNS}


def test_analyze_accepts_the_records(records, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(json.dumps(record) for record in records.values()))
    done = run("analyze.py", results)
    assert (done.returncode, done.stderr) == (0, "")
    for approach in APPROACHES:
        assert f"\n| {approach} " in done.stdout


@pytest.fixture(scope="module", params=APPROACHES)
def endless(request, start):
    """A run in its rounds, of each approach in turn. The last test that looks at it ends it.

    Serial may use one core alone, the last one.
    """
    before = ["taskset", "--cpu-list", CORES[-1]] if request.param == "serial" else []
    bench = start(request.param, "--rounds", 1_000_000, before=before)
    bench.wait_for("round 2:")
    bench.approach = request.param
    bench.cores = CORES[-1:] if request.param == "serial" else CORES
    yield bench
    bench.stop()


@linux_only
def test_each_worker_has_a_core_of_its_own_for_all_its_threads(endless):
    workers = endless.workers()
    expected = [{frozenset([core])} for core in endless.cores]
    assert len(workers) == len(expected)
    assert min(worker.num_threads() for worker in workers) > 1

    def as_expected():
        return sorted(map(allowed_cpus, workers), key=str) == sorted(expected, key=str)

    if endless.approach == "multiprocessing":
        wait_until(as_expected, seconds=60)  # It pins its workers anew in every call.
    else:
        assert as_expected()


@linux_only
def test_only_the_stateless_pool_reads_its_files_again_in_every_round(endless, trained):
    """The kernel counts the bytes that each worker has read."""

    def bytes_read():
        return sum(worker.io_counters().read_chars for worker in workers)

    workers = endless.workers()
    rounds = endless.rounds()
    read = bytes_read()
    endless.wait_for(f"round {rounds + 6}:")  # At least five whole rounds.
    files = sum(file.stat().st_size for file in trained)
    loads = (bytes_read() - read) / files / len(workers)
    if endless.approach == "multiprocessing":
        assert loads > 4.5
    else:
        assert loads < 0.1


def test_workers_have_the_priority_of_the_script(endless):
    """Ray's default is a lower one: beside other programs its rounds would be longer."""
    for worker in endless.workers():
        assert worker.nice() == endless.process.nice()


def test_a_signal_in_a_round_ends_all(endless):
    """Ctrl-C; but SIGTERM for Ray, for Ctrl-C see test_faults.py."""
    assert set(endless.workers()) <= set(endless.family())
    endless.send(signal.SIGTERM if endless.approach == "ray" else signal.SIGINT)
    status, _, _ = endless.finish(30)
    assert status not in (None, 0)
    assert endless.left() == []
    assert endless.records() == []


@pytest.fixture(scope="module")
def calls(trained):
    """Calls of the pool's function in one process, each for another core than the last one.

    A list of (core, CPUs that its threads may use afterwards, bytes that it has read).
    """
    program = """if True:
        import sys
        from bench_multiprocessing import evaluate_next_batch
        for core in sys.stdin:
            evaluate_next_batch(sys.argv[1], sys.argv[2], False, [int(core)], 0)
            print("done", flush=True)
        """
    calls = []
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, trained)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as worker:
        process = psutil.Process(worker.pid)
        for core in [CORES[0], CORES[-1], CORES[0]]:
            before = process.io_counters().read_chars
            print(core, file=worker.stdin, flush=True)
            assert worker.stdout.readline() == "done\n"
            calls.append((core, allowed_cpus(process), process.io_counters().read_chars - before))
    return calls


@linux_only
def test_threads_of_an_earlier_call_follow_to_the_next_core(calls):
    assert [cpus for core, cpus, _ in calls] == [{frozenset([core])} for core, _, _ in calls]


@linux_only
def test_a_call_of_the_stateless_pool_reads_the_model_and_all_four_arrays(calls, trained):
    files = sum(file.stat().st_size for file in trained)
    for _, _, read in calls[1:]:  # The first one imports TensorFlow.
        assert files < read < 1.05 * files
