"""The article's programs on the article's stack. original/Makefile installs it once, if there is a Python 3.7."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

ORIGINAL = Path(__file__).resolve().parents[1] / "original"
pytestmark = pytest.mark.timeout(900)  # The first test waits for the installation.


def run(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def python37():
    """The Python of the environment original/.venv."""
    done = run("make", "-C", ORIGINAL, ".venv/ready")
    if "make original:" in done.stderr and "stopped" not in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return ORIGINAL / ".venv/bin/python"


@pytest.fixture(scope="module")
def files(python37, trained, tmp_path_factory):
    """One trial of three rounds by `make`: the files, what it printed, and its records by approach."""
    folder = tmp_path_factory.mktemp("original")
    files = {"ORIGINAL_MODEL": folder / "model.h5", "DATA": trained[1]}
    files |= {"RESULTS": folder / "results.jsonl", "FIGURE": folder / "figure.png"}
    done = run("make", "-C", ORIGINAL, "TRIALS=1", "ROUNDS=3", *(f"{name}={path}" for name, path in files.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    records = map(json.loads, files["RESULTS"].read_text().splitlines())
    return files | {"printed": done.stdout, "records": {record["approach"]: record for record in records}}


def test_five_variants_are_recorded_and_analysed(files):
    records = files["records"]
    pool = "multiprocessing"
    assert set(records) == {"serial", "ray", pool, f"{pool}+initializer", f"{pool}+clear_session"}
    assert files["FIGURE"].exists()
    for approach, record in records.items():
        assert f"\n| {approach} " in files["printed"]
        assert len(record["round_seconds"]) == 3 and sum(record["round_seconds"]) == record["seconds"]
        assert record["ray"] == ("private" if approach == "ray" else None)
        assert (record["cpu_seconds"] is not None) == (approach == "serial")
        assert record["num_cpus"] == record["host"]["physical_cores"] == psutil.cpu_count(logical=False)
        assert record["data"] == "stand-in"
        assert record["versions"]["tensorflow"] == "1.13.1" and record["versions"]["ray"] == "0.6.6"
    for name in ("labels", "accuracy", "model"):
        assert len({record[name] for record in records.values()}) == 1


def test_labels_are_those_of_a_forward_pass_in_numpy(files):
    with h5py.File(files["ORIGINAL_MODEL"]) as file, np.load(files["DATA"]) as data:
        hidden = file["model_weights/dense/dense"]
        output = file["model_weights/dense_1/dense_1"]
        images = data["x_test"].reshape(10000, 784) / 255
        activations = np.maximum(images @ hidden["kernel:0"][()] + hidden["bias:0"][()], 0)
        logits = activations @ output["kernel:0"][()] + output["bias:0"][()]
        accuracy = np.mean(logits.argmax(axis=1) == data["y_test"])
    two_best = logits.argsort(axis=1)[:, -2:].astype(np.uint8)
    margins = np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0]
    close = np.flatnonzero(margins < 1e-4)  # Here rounding decides: either label is right.
    assert len(close) < 5
    digests = set()
    for choice in itertools.product(*two_best[close]):
        labels = two_best[:, 1].copy()
        labels[close] = choice
        digests.add(hashlib.sha256(labels.tobytes()).hexdigest())
    assert files["records"]["serial"]["labels"] in digests
    assert files["records"]["serial"]["accuracy"] == pytest.approx(accuracy, abs=0.001)


PROBE = """
import hashlib, sys
from multiprocessing import Pool
import bench_multiprocessing as bench
import tensorflow as tf
from tensorflow.python.keras import backend

def operations(clear_session):
    bench.evaluate_next_batch(*sys.argv[1:], clear_session, 0)
    return len(tf.get_default_graph().get_operations())

def weights(filename):
    arrays = tf.keras.models.load_model(filename).get_weights()
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

def pool(*_):
    print(tf.get_default_graph().get_operations(), getattr(backend._SESSION, "session", None))
    sys.exit()

for clear_session in (False, True):
    print([Pool(1).map(operations, [clear_session] * 3)])
print(Pool(1).map(weights, sys.argv[1:2]), flush=True)
bench.Pool = pool
sys.argv[1:] = ["--model", sys.argv[1], "--data", sys.argv[2], "--output", "/dev/null"]
bench.main()
"""


def test_the_graph_grows_with_every_call_unless_it_is_cleared(python37, files):
    version_2 = os.environ | {"TF2_BEHAVIOR": "1"}  # as TensorFlow 2 leaves it to the processes that it starts
    done = run(python37, "-c", PROBE, files["ORIGINAL_MODEL"], files["DATA"], cwd=ORIGINAL, env=version_2)
    growing, cleared, weights, _, parent = done.stdout.splitlines()
    assert growing == "[[664, 1326, 1988]]"
    assert cleared == "[[664, 664, 664]]"
    assert weights == str([files["records"]["serial"]["model"]])
    assert parent == "[] None"  # The parent has no operations and no session when it forks the pool.


def test_a_wrong_answer_is_not_recorded(python37, files, tmp_path):
    with np.load(files["DATA"]) as arrays:
        np.savez(tmp_path / "wrong.npz", **{**arrays, "y_test": (arrays["y_test"] + 1) % 10})
    command = [python37, ORIGINAL / "bench_serial.py", "--rounds", 1, "--model", files["ORIGINAL_MODEL"]]
    done = run(*command, "--data", "wrong.npz", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("not recorded: 1 different answers, accuracy 0.0") and "wrong.npz" in done.stderr
    assert (tmp_path / "original.jsonl").read_text() == ""


def living(started, mark):
    """The living processes of those started or with the mark in their environment (where Redis writes its title)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process in started or process.environ().get("MARK") == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("program", "number", "send"),
    [
        ("bench_ray.py", signal.SIGINT, os.killpg),  # Ctrl-C goes to the whole process group.
        ("bench_ray.py", signal.SIGTERM, os.kill),
        ("bench_multiprocessing.py", signal.SIGINT, os.killpg),
        ("make", signal.SIGTERM, os.kill),
    ],
)
def test_a_signal_leaves_nothing_running(python37, files, tmp_path, program, number, send):
    model, data, results = files["ORIGINAL_MODEL"], files["DATA"], tmp_path / "results.jsonl"
    command = [python37, ORIGINAL / program, "--trials", "99", "--rounds", "1"]
    command += ["--model", model, "--data", data, "--output", results]
    if program == "make":
        command = ["make", "-C", ORIGINAL, "TRIALS=99", "ROUNDS=1"]
        command += [f"ORIGINAL_MODEL={model}", f"DATA={data}", f"RESULTS={results}"]
    mark = uuid.uuid4().hex
    environment = {**os.environ, "MARK": mark}
    with subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE) as process:
        while b"trial 1" not in process.stdout.readline():
            assert process.poll() is None
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 1
        send(process.pid, number)
        process.communicate(timeout=30)
    assert process.returncode in (128 + number, -number)
    end = time.monotonic() + 10
    while living(started, mark) and time.monotonic() < end:
        time.sleep(0.1)
    left = living(started, mark)
    for survivor in left:
        survivor.kill()
    assert not left


@pytest.mark.parametrize(
    ("folder", "uname", "words"),
    [("lab", "Linux aarch64", "x86-64"), ("my lab", "Linux x86_64", "space"), ("lab", "Linux x86_64", "no Python 3.7")],
)
def test_what_cannot_work_is_told_before_anything_is_installed(tmp_path, folder, uname, words):
    copy = tmp_path / folder / "original"
    shutil.copytree(ORIGINAL, copy, ignore=shutil.ignore_patterns(".venv"))
    (tmp_path / "uname").write_text(f"#!/bin/sh\necho {uname}\n")
    (tmp_path / "uname").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = run("make", "-C", copy, "PYTHON37=false", env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("make original: ") and words in done.stderr.splitlines()[0]
    assert not (copy / ".venv").exists()
