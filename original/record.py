"""What the benchmarks beside this share: arguments, signals, the check of the answers, and the record of a trial.

Nothing of it happens while the clock runs. Nothing of it runs a TensorFlow session: in the parent of a pool that must
not happen before the fork.
"""

import time

STARTED = time.perf_counter()  # The programs import this module first: set-up is timed from here.

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="1", TF2_BEHAVIOR="0")  # No notices; version 1, whatever the shell exports.

import h5py
import numpy as np
import pkg_resources
import psutil
import tensorflow as tf

tf.logging.set_verbosity(tf.logging.ERROR)  # Else it warns of functions that it uses itself and has deprecated.

parser = argparse.ArgumentParser()
parser.add_argument("--trials", type=int, default=5, help="default: %(default)s")
parser.add_argument("--rounds", type=int, default=10, help="in each trial; default: %(default)s")
parser.add_argument("--model", default="/tmp/original-model.h5", help="default: %(default)s")
parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
parser.add_argument("--output", default="original.jsonl", type=argparse.FileType("a"), help="default: %(default)s")


def announce(approach, num_cpus, arguments):
    """Say what is about to be timed; return the fields that all records share. Exit with status 1 at an unusable file.

    From here on, Ctrl-C and SIGTERM leave nothing running.
    """
    if min(arguments.trials, arguments.rounds) < 1:
        parser.error("--trials and --rounds must be at least 1")
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    print(f"{approach}: {arguments.trials} trials of {arguments.rounds} rounds on {num_cpus} cores", flush=True)
    shared = {"approach": approach, "num_cpus": num_cpus, "nodes": 1, "ray": None, "run": str(time.time_ns())}
    try:
        shared.update(model=digest(weights(arguments.model)), data=data_kind(arguments.data))
    except Exception as error:  # A foreign file can make h5py and NumPy raise anything.
        sys.exit(f"can't use {arguments.model} or {arguments.data} ({error}): name others, or train again")
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        cpu = open("/proc/cpuinfo").read().split("model name\t: ")[1].split("\n")[0]
    host = {"cpu": cpu, "physical_cores": num_cpus, "system": platform.system()}
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": tf.keras.__version__}
    versions.update(numpy=np.__version__, ray=pkg_resources.get_distribution("ray").version)
    return dict(shared, restarts=0, mode="predict", host=host, versions=versions)


def stop(number, frame):
    """End this process and all that it has started, at once; Ray and the pool would leave some of them running."""
    os.register_at_fork(after_in_child=lambda: os._exit(1))  # The pool replaces the workers that die here.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + number)


def load_data(path):
    """Read all four arrays, as tf.keras.datasets.mnist.load_data() does once it has downloaded them."""
    with np.load(path) as file:
        return (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])


def weights(filename):
    """Return what model.get_weights() returns, from the file and without TensorFlow."""
    with h5py.File(filename, "r") as file:
        layers = [file["model_weights"][name] for name in file["model_weights"].attrs["layer_names"]]
        return [layer[name][()] for layer in layers for name in layer.attrs["weight_names"]]


def data_kind(path):
    """Return which data it is: "mnist" by its content, "stand-in" by its mark, or "other-" and part of a digest."""
    train, test = load_data(path)
    content = digest(train + test)
    if content == "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16":
        return "mnist"
    if "stand_in" in np.load(path).files:
        return "stand-in"
    return f"other-{content[:8]}"


def digest(arrays):
    """Return the SHA-256, in hexadecimal, of the bytes of the arrays one after the other."""
    return hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest()


def run_trials(shared, arguments, rounds):
    """Check, record and print the trials. Exit with status 1 at a wrong answer; that trial is not recorded.

    `shared`: what announce() has returned. `rounds()`: yields, for each round of a trial, the seconds that it took and
    its results, an array (10000, 10) of class probabilities for each core.
    """
    setup = time.perf_counter() - STARTED
    y_test = load_data(arguments.data)[1][1]
    totals = []
    for trial in range(arguments.trials):
        round_seconds = []
        answers = set()
        cpu_started = time.process_time()
        for seconds, results in rounds():
            round_seconds.append(seconds)
            answers.update(result.argmax(axis=1).astype(np.uint8).tobytes() for result in results)
        cpu_seconds = time.process_time() - cpu_started
        accuracy = np.mean(results[0].argmax(axis=1) == y_test)
        if len(answers) > 1 or accuracy < 0.9:
            found = f"{len(answers)} different answers, accuracy {accuracy:.4f}"
            sys.exit(f"not recorded: {found} with {arguments.model} on {arguments.data}; train again")
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        record = dict(shared, trial=trial, time=now, seconds=sum(round_seconds), round_seconds=round_seconds)
        record.update(setup_seconds=setup, accuracy=accuracy, labels=digest(answers))
        record["cpu_seconds"] = cpu_seconds if shared["approach"] == "serial" else None
        print(json.dumps(record), file=arguments.output, flush=True)
        totals.append(record["seconds"])
        print(f"trial {trial + 1}: {totals[-1]:.3f} s, accuracy {accuracy:.4f}", flush=True)
    spread = f"{np.std(totals, ddof=1):.3f} s" if len(totals) > 1 else "unknown"
    counts = f"{arguments.trials} trials of {arguments.rounds} rounds, {len(results)} cores"
    print(f"mean {np.mean(totals):.3f} s, standard deviation {spread} ({counts}); set-up {setup:.1f} s, not timed")
