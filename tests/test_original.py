"""The article's programs on the article's stack. original/Makefile installs it, once.

The programs run in a copy of the project whose record.py has a spy: it writes a line of JSON for
each prediction. So one `make` of two rounds shows what every variant does.
"""

import contextlib
import hashlib
import json
import os
import re
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

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = ROOT / "original"
CORES = psutil.cpu_count(logical=False) or psutil.cpu_count()
POOLS = [
    "multiprocessing",
    "multiprocessing+clear_session",
    "multiprocessing+fresh_session",
    "multiprocessing+pin_once",
    "multiprocessing+initializer",
]
VARIANTS = ["serial", "serial+one_core", *POOLS, "ray"]
FIELDS = {
    *("approach", "num_cpus", "array", "time", "setup_seconds", "round_seconds", "accuracy"),
    *("labels", "model", "data", "machine", "versions"),
}
CUT_OFF = '{"approach": "ray", "num_c'  # A record that was being written when the power failed.

pytestmark = pytest.mark.timeout(900)  # The first test waits for the installation.

# On core 0 loading takes longer. So in the next round its worker comes second, and gets another
# core, if it may; and with --initializer another worker could take both of the first batches.
SPY = """

import re
import psutil

def slow_on_core_0(load_model):
    def load_later(filename):
        if psutil.Process().cpu_affinity() == [0]:
            time.sleep(0.3)
        return load_model(filename)

    return load_later


def tell_of(predict):
    def predict_and_tell(model, *arguments, **options):
        answer = predict(model, *arguments, **options)
        sessions.append(tf.keras.backend.get_session())  # Kept: no two have the same id.
        threads = []
        for thread in os.listdir("/proc/self/task"):
            with open("/proc/self/task/" + thread + "/status") as status:
                threads += re.findall("Cpus_allowed_list:.(.*)", status.read())
        call = {
            "command": " ".join(sys.argv),
            "process": os.getpid(),
            "operations": len(tf.get_default_graph().get_operations()),
            "sessions": len(set(map(id, sessions))),
            "core": psutil.Process().cpu_affinity(),
            "threads": sorted(set(threads)),
        }
        with open(__file__ + "l", "ab", buffering=0) as calls:
            calls.write((json.dumps(call) + chr(10)).encode())
        return answer

    return predict_and_tell


sessions = []
tf.keras.models.load_model = slow_on_core_0(tf.keras.models.load_model)
tf.keras.Model.predict = tell_of(tf.keras.Model.predict)
"""


def run(*command, **options):
    command = list(map(str, command))
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def python37():
    """The Python of the environment original/.venv."""
    done = run("make", "-C", ORIGINAL, ".venv/ready")
    if "make original:" in done.stderr and "stopped" not in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return ORIGINAL / ".venv/bin/python"


@pytest.fixture(scope="module")
def project(python37, tmp_path_factory):
    """A copy of what `make original` needs; its record.py has the spy."""
    project = tmp_path_factory.mktemp("project")
    skipped = shutil.ignore_patterns(".venv", "model.h5*", "__pycache__")
    shutil.copytree(ORIGINAL, project / "original", ignore=skipped)
    for name in ("original/.venv", ".venv", "analyze.py", "train_model.py"):
        (project / name).symlink_to(ROOT / name)
    with open(project / "original/record.py", "a") as file:
        file.write(SPY)
    return project


@pytest.fixture(scope="module")
def made(project, trained, tmp_path_factory):
    """Two rounds of every variant by `make`: its files, what it printed, its records, its calls.

    At the start there is a model, older than the data, and a record that was cut off.
    """
    folder = tmp_path_factory.mktemp("made")
    files = {
        "ORIGINAL_MODEL": folder / "model.h5",
        "DATA": trained[1],
        "RESULTS": folder / "results.jsonl",
        "FIGURE": folder / "figure.png",
    }
    files["ORIGINAL_MODEL"].write_text("a model of other data")
    os.utime(files["ORIGINAL_MODEL"], (0, 0))
    files["RESULTS"].write_text(CUT_OFF)
    settings = [f"{name}={path}" for name, path in files.items()]
    done = run("make", "-C", project / "original", "ROUNDS=2", "TRIALS=1", *settings)
    assert done.returncode == 0, done.stdout + done.stderr

    lines = files["RESULTS"].read_text().splitlines()
    assert lines[0] == CUT_OFF
    records = [json.loads(line) for line in lines[1:]]
    calls = (project / "original/record.pyl").read_text().splitlines()
    return files | {
        "printed": done.stdout,
        "records": {record["approach"]: record for record in records},
        "calls": list(map(json.loads, calls)),
    }


def calls_of(made, variant):
    """The calls of a variant in their order, the first ones included, which are not timed."""
    program, _, flag = variant.partition("+")
    if program == "ray":
        return [call for call in made["calls"] if "default_worker.py" in call["command"]]
    flag = "--" + flag.replace("_", "-")
    flags = [f"--{name.partition('+')[2].replace('_', '-')}" for name in VARIANTS if "+" in name]
    return [
        call
        for call in made["calls"]
        if f"bench_{program}.py" in call["command"]
        and [name for name in flags if name in call["command"]] == [flag] * (flag != "--")
    ]


def by_process(calls):
    """The calls of each process."""
    processes = {}
    for call in calls:
        processes.setdefault(call["process"], []).append(call)
    return list(processes.values())


def test_every_variant_is_recorded_and_analysed(made):
    assert set(made["records"]) == set(VARIANTS)
    assert made["FIGURE"].exists()
    for variant, record in made["records"].items():
        assert f"\n| {variant} " in made["printed"]  # A row of the analysis.
        assert f"\n{variant}: {sum(record['round_seconds']):.3f} s" in made["printed"]
        assert len(record["round_seconds"]) == 2
        assert record["num_cpus"] == CORES
        assert record["array"] is True
        assert min(record["round_seconds"]) > 0
        assert 0 < record["setup_seconds"] < 600


def test_a_record_has_these_fields(made):
    for variant, record in made["records"].items():
        own = {}
        if variant == "ray":
            own = {"nodes": 1, "cluster": False}
        elif variant in POOLS:
            own = {"start_method": "fork"}
        assert set(record) == FIELDS | set(own)
        assert {name: record[name] for name in own} == own


def test_a_record_names_the_versions(made):
    for variant, record in made["records"].items():
        versions = record["versions"]
        assert set(versions) - {"ray"} == {"python", "tensorflow", "keras", "numpy"}
        assert versions["tensorflow"] == "1.13.1"
        assert versions.get("ray") == ("0.6.6" if variant == "ray" else None)


def test_answers_model_data_and_machine_are_the_same_in_all_variants(made):
    for name in ("labels", "accuracy", "model", "data", "machine"):
        assert len({record[name] for record in made["records"].values()}) == 1
    with np.load(made["DATA"]) as mnist:
        names = ("x_test", "x_train", "y_test", "y_train")
        content = b"".join(mnist[name].tobytes() for name in names)
    assert made["records"]["ray"]["data"] == hashlib.sha256(content).hexdigest()


def test_labels_are_those_of_a_forward_pass_in_numpy(made):
    with h5py.File(made["ORIGINAL_MODEL"]) as file, np.load(made["DATA"]) as mnist:
        hidden = file["model_weights/dense/dense"]
        output = file["model_weights/dense_1/dense_1"]
        images = mnist["x_test"].reshape(-1, 784) / np.float32(255)
        activations = np.maximum(0, images @ hidden["kernel:0"][()] + hidden["bias:0"][()])
        scores = activations @ output["kernel:0"][()] + output["bias:0"][()]
        labels = scores.argmax(axis=1).astype(np.uint8)
        accuracy = np.mean(labels == mnist["y_test"])
    record = made["records"]["serial"]
    assert record["labels"] == hashlib.sha256(labels).hexdigest()
    assert record["accuracy"] == accuracy


def test_machine_is_named_as_by_the_bench_scripts_of_today(made, grown):
    cpuinfo = Path("/proc/cpuinfo").read_text()
    processor = re.search(r"model name\s*: (.*)", cpuinfo)[1]
    expected = f"{processor}, {psutil.cpu_count(logical=False)} physical cores, linux"
    assert made["records"]["serial"]["machine"] == expected
    assert grown["plain"][0]["machine"] == expected


def test_a_model_that_is_older_than_the_data_is_trained_again(made):
    assert h5py.is_hdf5(made["ORIGINAL_MODEL"])
    assert f"training {made['ORIGINAL_MODEL']} on" in made["printed"]


@pytest.mark.parametrize("variant", [*POOLS, "ray"])
def test_every_worker_has_answered_once_before_the_clock_starts(made, variant):
    calls = calls_of(made, variant)
    assert len(calls) == CORES * 3  # Of two rounds, and one before them.
    assert len(by_process(calls[:CORES])) == CORES


@pytest.mark.parametrize("variant", VARIANTS)
def test_which_calls_leave_operations_behind(made, variant):
    growing = ("multiprocessing", "multiprocessing+fresh_session", "multiprocessing+pin_once")
    for calls in by_process(calls_of(made, variant)):
        expected = [664] * len(calls)
        if variant in growing:
            expected = [664 + 662 * number for number in range(len(calls))]
        assert [call["operations"] for call in calls] == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_which_calls_have_a_session_of_their_own(made, variant):
    fresh = ("multiprocessing+fresh_session", "multiprocessing+clear_session")
    for calls in by_process(calls_of(made, variant)):
        expected = [1] * len(calls)
        if variant in fresh:
            expected = list(range(1, len(calls) + 1))
        assert [call["sessions"] for call in calls] == expected


@pytest.mark.parametrize("variant", ["multiprocessing+pin_once", "multiprocessing+initializer"])
def test_all_threads_of_a_worker_keep_to_a_core_of_their_own(made, variant):
    cores = []
    for calls in by_process(calls_of(made, variant)):
        [[core]] = {tuple(call["threads"]) for call in calls}
        cores.append(core)
    assert sorted(cores) == sorted(map(str, range(CORES)))


def test_the_articles_pool_pins_in_every_call(made):
    calls = calls_of(made, "multiprocessing")
    for first in range(0, len(calls), CORES):
        round_ = calls[first : first + CORES]
        assert sorted(call["core"] for call in round_) == [[core] for core in range(CORES)]


def test_serial_has_all_cores_or_one(made):
    allowed = sorted(psutil.Process().cpu_affinity())
    assert {tuple(call["core"]) for call in calls_of(made, "serial")} == {tuple(allowed)}
    assert {tuple(call["threads"]) for call in calls_of(made, "serial+one_core")} == {("0",)}


def order(number, variants=VARIANTS):
    """The variants in the order of a pass."""
    environment = {**os.environ, "VARIANTS": " ".join(variants)}
    done = run(ORIGINAL / "run.sh", "order", number, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_in_as_many_passes_as_variants_each_follows_each_other_one_once():
    passes = [order(number) for number in range(1, len(VARIANTS) + 1)]
    pairs = [pair for variants in passes for pair in zip(variants, variants[1:], strict=False)]
    assert all(sorted(variants) == sorted(VARIANTS) for variants in passes)
    assert len(set(pairs)) == len(pairs)


def test_a_pass_has_that_order(made):
    assert list(made["records"]) == order(1)


def grow(python, model, data, folder, runs):
    """Run growth.py with several sets of flags at the same time, two calls more than one.

    Return the calls of each run; of one that ends with a status other than 0, what it said.
    """
    started = {}
    for name, flags in runs.items():
        command = [python, ORIGINAL / "growth.py", "--model", model, "--data", data, *flags]
        command += ["--calls", 3, "--output", folder / f"{name}.jsonl"]
        started[name] = subprocess.Popen(
            list(map(str, command)), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    found = {}
    for name, process in started.items():
        _, stderr = process.communicate(timeout=300)
        found[name] = stderr
        if process.returncode == 0:
            lines = (folder / f"{name}.jsonl").read_text().splitlines()
            found[name] = list(map(json.loads, lines))
    return found


@pytest.fixture(scope="module")
def grown(python37, made, tmp_path_factory):
    """Runs of growth.py on the stack of 2019."""
    runs = {
        "plain": ["--collect", "--parts", "--profile", "3"],
        "clear_session": ["--collect", "--clear-session"],
        "fresh_session": ["--fresh-session"],
        "without_autotuner": ["--without-autotuner"],
    }
    folder = tmp_path_factory.mktemp("grown")
    return grow(python37, made["ORIGINAL_MODEL"], made["DATA"], folder, runs)


@pytest.fixture(scope="module")
def grown_today(trained, tmp_path_factory):
    """Runs of growth.py on the stack of today."""
    runs = {
        "collect": ["--collect"],
        "clear_session": ["--clear-session"],
        "without_autotuner": ["--without-autotuner", "--parts"],
        "fresh_session": ["--fresh-session"],
    }
    return grow(sys.executable, *trained, tmp_path_factory.mktemp("today"), runs)


def test_growth_counts_operations(grown, grown_today):
    growing = [664, 664 + 662, 664 + 2 * 662]
    assert [call["operations"] for call in grown["plain"]] == growing
    assert [call["operations"] for call in grown["fresh_session"]] == growing
    assert [call["operations"] for call in grown["clear_session"]] == [664] * 3
    assert [call["operations"] for call in grown_today["collect"]] == [None] * 3


def test_growth_begins_with_an_imported_graph(python37, made, grown, tmp_path):
    """In the default graph it counts, and elsewhere it does not; the calls are right in both."""
    files = made["ORIGINAL_MODEL"], made["DATA"]
    saved = tmp_path / "graph"
    grow(python37, *files, tmp_path, {"saved": ["--fresh-session", "--save-graph", saved]})
    runs = {"default": ["--import-graph", saved], "apart": ["--import-apart", saved]}
    imported = grow(python37, *files, tmp_path, runs)
    alone = [664, 664 + 662, 664 + 2 * 662]
    earlier = grown["plain"][-1]["operations"]
    assert [call["operations"] for call in imported["default"]] == [earlier + n for n in alone]
    assert [call["operations"] for call in imported["apart"]] == alone


def test_growth_counts_objects(grown, grown_today):
    plain = [call["objects"] for call in grown["plain"]]
    cleared = [call["objects"] for call in grown["clear_session"]]
    assert min(np.diff(plain)) > 10_000
    assert cleared[1] == cleared[2]
    for flag in ("collect", "clear_session"):
        objects = [call["objects"] for call in grown_today[flag]]
        assert abs(objects[2] - objects[1]) < 100  # Without the flag a call leaves about 1,600.


def test_growth_takes_a_call_apart(grown, grown_today):
    for calls in (grown["plain"], grown_today["without_autotuner"]):
        for call in calls:
            assert set(call["read_seconds"]) == {"x_train", "y_train", "x_test", "y_test"}
            parts = [*call["read_seconds"].values(), call["load_seconds"], call["predict_seconds"]]
            assert min(parts) > 0
            assert call["seconds"] > sum(parts)
        first = min(call["predict_seconds"] for call in calls)
        again = min(call["predict_again_seconds"] for call in calls)
        assert 0 < again < first  # The model is traced in its first call.
    assert grown["fresh_session"][0]["predict_again_seconds"] is None


def test_growth_profiles_the_calls_that_are_named(grown, trained):
    assert [call["profile"] is not None for call in grown["plain"]] == [False, False, True]
    in_load = grown["plain"][2]["profile"]["load_model"]
    in_predict = grown["plain"][2]["profile"]["predict"]
    assert in_load["ExtendSession"][0] + in_predict["ExtendSession"][0] == 10
    assert in_load["TF_SessionRun_wrapper"][0] + in_predict["TF_SessionRun_wrapper"][0] == 9
    with np.load(trained[1]) as mnist:
        steps = -(-len(mnist["x_test"]) // 32)  # Of 32 images, as Keras does.
    assert in_predict["TF_SessionRunCallable"][0] == steps
    assert "TF_SessionRunCallable" not in in_load


def test_growth_refuses_what_a_tensorflow_does_not_have(grown, grown_today):
    assert "TensorFlow 1.13.1 has no such option" in grown["without_autotuner"]
    assert "TensorFlow 2 predicts without a session" in grown_today["fresh_session"]


def test_growth_switches_the_autotuner_off(tmp_path):
    program = (
        "import growth, numpy as np\n"
        "batches = growth.without_autotuner(np.ones((100, 28, 28)))\n"
        "print(batches.options().autotune.enabled, *map(len, batches))\n"
    )
    done = run(sys.executable, "-c", program, env={**os.environ, "PYTHONPATH": str(ORIGINAL)})
    assert done.stdout.split() == ["False", "32", "32", "32", "4"], done.stderr


@pytest.mark.parametrize("program", ["bench_serial.py", "growth.py"])
def test_a_model_planted_where_one_works_is_not_used(project, trained, tmp_path, program):
    (tmp_path / "original").mkdir()
    for planted in ("model.h5", "original/model.h5"):
        (tmp_path / planted).write_text("code")
    python = project / "original/.venv/bin/python"
    done = run(python, project / "original" / program, "--data", trained[1], cwd=tmp_path)
    assert done.returncode == 2
    assert f"{project / 'original/model.h5'} is missing" in done.stderr


@pytest.mark.parametrize(
    "program, number, send",
    [
        ("bench_ray.py", signal.SIGTERM, os.kill),
        ("make VARIANTS=ray", signal.SIGTERM, os.kill),
        ("make VARIANTS=multiprocessing", signal.SIGINT, os.killpg),  # As Ctrl-C does.
    ],
)
def test_a_signal_leaves_nothing_running(python37, made, tmp_path, program, number, send):
    results = tmp_path / "results.jsonl"
    if program.startswith("make"):
        command = [*program.split(), "-C", ORIGINAL, "ROUNDS=9999", f"RESULTS={results}"]
        command += [f"{name}={made[name]}" for name in ("ORIGINAL_MODEL", "DATA")]
    else:
        command = [*in_a_network_of_its_own(), python37, ORIGINAL / program, "--rounds", 9999]
        command += ["--model", made["ORIGINAL_MODEL"], "--data", made["DATA"], "--output", results]

    mark = uuid.uuid4().hex
    out = tmp_path / "out"
    with open(out, "w") as stdout:
        process = psutil.Popen(
            list(map(str, command)),
            env={**os.environ, "MARK": mark},
            start_new_session=True,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
        )
    started = [process]
    try:
        wait_until(lambda: "round 1:" in out.read_text(), seconds=200)
        started += process.children(recursive=True)
        assert len(started) > 2
        send(process.pid, number)
        wait_until(lambda: not living(started, mark), seconds=5)
        # 2: make sometimes hears of its recipe's end first.
        assert process.wait(5) in (128 + number, -number, 2)
    finally:
        for survivor in living(started, mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()


def wait_until(condition, seconds):
    """Wait until the function returns something true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def living(started, mark):
    """The processes that were started, or have the mark in their environment, and are no zombies.

    Redis writes its title where its environment was.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process in started or process.environ().get("MARK") == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def in_a_network_of_its_own():
    """What stands before a command, so that Ray listens on nothing but loopback; if it can be."""
    command = ["unshare", "-rn", str(ORIGINAL / "run.sh"), "loopback"]
    if run(*command, "true").returncode == 0:
        return command
    return []


@pytest.mark.parametrize(
    "uname, words",
    [("Linux aarch64", "x86-64"), ("Linux x86_64", "no Python 3.7")],
)
def test_what_cannot_work_is_told_before_anything_is_installed(tmp_path, uname, words):
    folder = tmp_path / "original"
    shutil.copytree(ORIGINAL, folder, ignore=shutil.ignore_patterns(".venv"))
    (tmp_path / "uname").write_text(f"#!/bin/sh\necho {uname}\n")
    (tmp_path / "uname").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    done = run("make", "-C", folder, "PYTHON37=false", env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("make original: ")
    assert words in done.stderr.splitlines()[0]
    assert not (folder / ".venv").exists()
