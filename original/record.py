"""What the programs beside this share: arguments, signals, the data, the check of the answers, and the record.

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

# In the project's folder, not in /tmp: Keras of 2019 runs code that a model's file contains.
MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.h5")
parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
parser.add_argument("--model", default=MODEL, help="default: %(default)s")
parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
parser.add_argument("--output", default="original.jsonl", type=argparse.FileType("a"), help="default: %(default)s")


def parse_arguments():
    """Return the arguments. From here on, Ctrl-C and SIGTERM leave nothing running.

    Exits with status 1 if a file cannot be used, before anything is set up.
    """
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("argument --rounds: must be at least 1")
    try:
        weights(arguments.model)
        load_data(arguments.data)
    except Exception as error:  # A foreign file can make h5py and NumPy raise anything.
        sys.exit("cannot use {} or {} ({}): name others, or train again".format(arguments.model, arguments.data, error))
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return arguments


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


def digest(arrays):
    """Return the SHA-256, in hexadecimal, of the bytes of the arrays one after the other."""
    return hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest()


def record(arguments, approach, num_cpus, setup_seconds, round_seconds, answers, cpu_seconds=None):
    """Check the answers, append the record of this run to the output, and print the sum of its rounds.

    answers: the labels (10000,) of every batch. Exits with status 1 at a wrong answer.
    """
    (x_train, y_train), (x_test, y_test) = load_data(arguments.data)
    labels = np.array(answers, np.uint8)
    accuracy = np.mean(labels == y_test)
    if accuracy < 0.9 or (labels != labels[0]).any():
        sys.exit(
            "not recorded: wrong answers, accuracy {:.4f}, by {} on {}: train again".format(
                accuracy, arguments.model, arguments.data
            )
        )
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = file.read().split("model name\t: ")[1].split("\n")[0]
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": tf.keras.__version__}
    versions.update(numpy=np.__version__)
    start_method = None
    if approach == "ray":
        versions["ray"] = pkg_resources.get_distribution("ray").version
    elif approach != "serial":
        start_method = "fork"
    fields = {"approach": approach, "mode": "predict_array", "num_cpus": num_cpus, "accuracy": accuracy}
    fields.update(nodes=1, cluster=False, restarts=0, start_method=start_method, cpu_seconds=cpu_seconds)
    fields.update(time=time.time(), setup_seconds=setup_seconds, round_seconds=round_seconds, versions=versions)
    fields.update(labels=digest(labels[:1]), model=digest(weights(arguments.model)))
    fields.update(data=digest([x_test, x_train, y_test, y_train]))
    fields.update(machine="{}, {} physical cores, {}".format(processor, num_cpus, platform.system()))
    print(json.dumps(fields), file=arguments.output, flush=True)
    print("{}: {:.2f} s, after {:.1f} s of set-up".format(approach, sum(round_seconds), setup_seconds), flush=True)
