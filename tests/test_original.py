"""The article's programs on the article's stack. original/Makefile installs it once, if there is a Python 3.7."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
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
    """A run of three rounds of each variant by `make`: the files, what it printed, and its records by approach."""
    folder = tmp_path_factory.mktemp("original")
    files = {"ORIGINAL_MODEL": folder / "model.h5", "DATA": trained[1]}
    files |= {"RESULTS": folder / "results.jsonl", "FIGURE": folder / "figure.png"}
    done = run("make", "-C", ORIGINAL, "ROUNDS=3", *(f"{name}={path}" for name, path in files.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    records = map(json.loads, files["RESULTS"].read_text().splitlines())
    return files | {"printed": done.stdout, "records": {record["approach"]: record for record in records}}


def test_five_variants_are_recorded_and_analysed(files):
    records = files["records"]
    pool = "multiprocessing"
    assert set(records) == {"serial", "ray", pool, f"{pool}+initializer", f"{pool}+clear_session"}
    assert files["FIGURE"].exists()
    for approach, record in records.items():
        assert f"\n| {approach} " in files["printed"]  # a row of the analysis
        assert f"\n{approach}: {sum(record['round_seconds']):.2f} s" in files["printed"]
        assert len(record["round_seconds"]) == 3 and record["mode"] == "predict_array"
        assert (record["cpu_seconds"] is not None) == (approach == "serial")
        assert record["start_method"] == ("fork" if pool in approach else None)
        assert record["num_cpus"] == psutil.cpu_count(logical=False)
        assert record["versions"]["tensorflow"] == "1.13.1" and record["versions"].get("ray") in (None, "0.6.6")
    assert records["ray"]["versions"]["ray"] == "0.6.6"
    with np.load(files["DATA"]) as mnist:
        content = b"".join(mnist[name].tobytes() for name in ("x_test", "x_train", "y_test", "y_train"))
    for name in ("labels", "accuracy", "model", "machine"):
        assert len({record[name] for record in records.values()}) == 1
    assert records["ray"]["data"] == hashlib.sha256(content).hexdigest()


def test_accuracy_is_that_of_a_forward_pass_in_numpy(files):
    with h5py.File(files["ORIGINAL_MODEL"]) as file, np.load(files["DATA"]) as data:
        hidden = file["model_weights/dense/dense"]
        output = file["model_weights/dense_1/dense_1"]
        images = data["x_test"].reshape(10000, 784) / 255
        activations = np.maximum(images @ hidden["kernel:0"][()] + hidden["bias:0"][()], 0)
        logits = activations @ output["kernel:0"][()] + output["bias:0"][()]
        accuracy = np.mean(logits.argmax(axis=1) == data["y_test"])
    assert files["records"]["serial"]["accuracy"] == pytest.approx(accuracy, abs=0.0005)  # Rounding may decide a tie.


def growth(python, tmp_path, *arguments):
    """The records of some calls of growth.py under a Python."""
    output = tmp_path / "growth.jsonl"
    done = run(python, ORIGINAL / "growth.py", "--output", output, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    calls = list(map(json.loads, output.read_text().splitlines()))
    output.unlink()
    assert [call["call"] for call in calls] == list(range(1, len(calls) + 1))
    for call in calls:
        assert 0 < call["load_seconds"] + call["predict_seconds"] <= call["seconds"]
        assert call["resident_bytes"] > 1e8
    return calls


def test_on_the_stack_of_2019_a_call_leaves_operations_unless_the_session_is_cleared(python37, files, tmp_path):
    names = ["--model", files["ORIGINAL_MODEL"], "--data", files["DATA"], "--calls", 3, "--collect"]
    calls = growth(python37, tmp_path, *names, "--profile", 3)
    assert [call["operations"] for call in calls] == [664, 1326, 1988]
    assert calls[2]["objects"] > calls[1]["objects"] > calls[0]["objects"]
    assert ["profile" in call for call in calls] == [False, False, True]
    in_load, in_predict = calls[2]["profile"]["load_model"], calls[2]["profile"]["predict"]
    assert in_predict["TF_SessionRunCallable"][0] == 313 and "TF_SessionRunCallable" not in in_load
    assert in_load["ExtendSession"][0] + in_predict["ExtendSession"][0] == 10
    assert in_load["TF_SessionRun_wrapper"][0] + in_predict["TF_SessionRun_wrapper"][0] == 9
    cleared = growth(python37, tmp_path, *names, "--clear-session")
    assert [call["operations"] for call in cleared] == [664] * 3
    assert cleared[2]["objects"] == cleared[1]["objects"]


@pytest.mark.parametrize("flag", ["--collect", "--clear-session"])
def test_today_nothing_is_kept_that_garbage_collection_does_not_free(trained, tmp_path, flag):
    calls = growth(sys.executable, tmp_path, "--model", trained[0], "--data", trained[1], "--calls", 4, flag)
    assert [call["operations"] for call in calls] == [None] * 4
    assert abs(calls[3]["objects"] - calls[1]["objects"]) < 100  # Without the flag a call leaves about 1,600.


@pytest.mark.parametrize("program", ["bench_serial.py", "growth.py"])
def test_a_model_planted_where_one_works_is_not_used(python37, trained, tmp_path, program):
    copy = tmp_path / "project/original"
    shutil.copytree(ORIGINAL, copy, ignore=shutil.ignore_patterns(".venv", "model.h5*"))
    (tmp_path / "original").mkdir()
    for planted in ("model.h5", "original/model.h5"):
        (tmp_path / planted).write_text("code")
    done = run(python37, copy / program, "--data", trained[1], cwd=tmp_path)
    assert done.returncode == 1 and f"cannot use {copy / 'model.h5'} or" in done.stderr


def living(started, mark):
    """The living processes of those started or with the mark in their environment (where Redis writes its title)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process in started or process.environ().get("MARK") == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


SIGNALS = [("bench_ray.py", signal.SIGTERM, os.kill), ("make", signal.SIGTERM, os.kill)]
SIGNALS += [(f"bench_{name}.py", signal.SIGINT, os.killpg) for name in ("ray", "multiprocessing")]  # As by Ctrl-C.


@pytest.mark.parametrize("program, number, send", SIGNALS)
def test_a_signal_leaves_nothing_running(python37, files, tmp_path, program, number, send):
    model, data, results = files["ORIGINAL_MODEL"], files["DATA"], tmp_path / "results.jsonl"
    command = [python37, ORIGINAL / program, "--rounds", "9999"]
    command += ["--model", model, "--data", data, "--output", results]
    if program == "make":
        command = ["make", "-C", ORIGINAL, "ROUNDS=9999"]
        command += [f"ORIGINAL_MODEL={model}", f"DATA={data}", f"RESULTS={results}"]
    mark = uuid.uuid4().hex
    environment = {**os.environ, "MARK": mark}
    with subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE) as process:
        while b"round 1:" not in process.stdout.readline():
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


@pytest.mark.parametrize("uname, words", [("Linux aarch64", "x86-64"), ("Linux x86_64", "no Python 3.7")])
def test_what_cannot_work_is_told_before_anything_is_installed(tmp_path, uname, words):
    shutil.copytree(ORIGINAL, tmp_path / "original", ignore=shutil.ignore_patterns(".venv"))
    (tmp_path / "uname").write_text(f"#!/bin/sh\necho {uname}\n")
    (tmp_path / "uname").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = run("make", "-C", tmp_path / "original", "PYTHON37=false", env=environment)
    assert done.returncode == 2 and not (tmp_path / "original" / ".venv").exists()
    assert done.stderr.startswith("make original: ") and words in done.stderr.splitlines()[0]
