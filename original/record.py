"""What the programs beside this share: arguments, data, the check of the answers, and the record.

Nothing here runs while the clock does. Nothing here starts a TensorFlow session: a pool forks its
workers, and with a session that has run before the fork they can hang.
"""

import time

STARTED = time.perf_counter()  # The programs import this module first: set-up counts from here.

import argparse
import hashlib
import json
import os
import platform
import sys
import zipfile

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # No notices.
# Whatever the user exports: TensorFlow 1's own behaviour, and a thread for every core.
os.environ["TF2_BEHAVIOR"] = "0"
os.environ.pop("OMP_NUM_THREADS", None)  # Keras of 2019 takes its number of threads from it.

import h5py
import numpy as np
import tensorflow as tf
from machine import machine

# TensorFlow would warn of functions that it has deprecated, and calls itself.
tf.logging.set_verbosity(tf.logging.ERROR)

# In this folder, not in /tmp: Keras runs code that a model's file contains.
MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.h5")

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
parser.add_argument("--model", default=MODEL, help="default: %(default)s")
parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
parser.add_argument(
    "--output",
    default="original.jsonl",
    type=argparse.FileType("ab", bufsize=0),  # Unbuffered, so that a line is written at once.
    help="default: %(default)s",
)


def parse_arguments():
    """Return the arguments. What cannot be used ends the program, before anything is set up."""
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not h5py.is_hdf5(arguments.model):
        parser.error(f"{arguments.model} is missing or damaged: run original/train_model.py")
    if not zipfile.is_zipfile(arguments.data):  # The format .npz is a zip archive.
        parser.error(f"{arguments.data} is missing or damaged: run train_model.py")
    return arguments


def load_data(datafile):
    """Return (x_train, y_train), (x_test, y_test), as tf.keras.datasets.mnist.load_data() does."""
    with np.load(datafile) as file:
        return (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])


def record(arguments, approach, setup_seconds, round_seconds, answers, **more):
    """Check the answers, the labels (uint8) of every batch; append the run to the output."""
    (x_train, y_train), (x_test, y_test) = load_data(arguments.data)
    if not all(np.array_equal(labels, answers[0]) for labels in answers):
        sys.exit("not recorded: the answers differ from worker to worker or from round to round")
    accuracy = np.mean(answers[0] == y_test)
    if accuracy < 0.9:
        sys.exit(f"not recorded: {accuracy:.1%} of the answers are right, fewer than 90%")
    run = {
        "approach": approach,
        "num_cpus": len(answers) // len(round_seconds),
        "array": True,  # The call is the article's: model.predict(x_test) of an array.
        "time": time.time(),
        "setup_seconds": setup_seconds,
        "round_seconds": round_seconds,
        "accuracy": accuracy,
        "labels": digest(answers[0]),
        "model": digest(*weights(arguments.model)),
        "data": digest(x_test, x_train, y_test, y_train),
        "machine": machine(),
        "versions": versions(),
        **more,
    }
    arguments.output.write(f"{json.dumps(run)}\n".encode())
    print(f"{approach}: {sum(round_seconds):.3f} s, after {setup_seconds:.1f} s of set-up")


def digest(*parts):
    """Return the SHA-256 of the bytes of all parts. A file's would differ by the dates in it."""
    return hashlib.sha256(b"".join(map(bytes, parts))).hexdigest()


def weights(filename):
    """Return what model.get_weights() returns, without TensorFlow."""
    with h5py.File(filename, "r") as file:
        group = file["model_weights"]
        layers = [group[name] for name in group.attrs["layer_names"]]
        return [layer[name][()] for layer in layers for name in layer.attrs["weight_names"]]


def versions():
    """Return the versions of what decides how fast the programs are."""
    found = {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": tf.keras.__version__,
        "numpy": np.__version__,
    }
    if "ray" in sys.modules:
        found["ray"] = sys.modules["ray"].__version__
    return found
