"""Time ten rounds of batch prediction in one process: in each round it predicts one batch per physical core.

The serial side of benchmark 3, "expensive initialization", of "10x faster parallel Python without Python
multiprocessing". The process is serial; TensorFlow is not, it uses several threads. The article shows no code for it.

What matters when it is compared with the others:
- loading and one warm-up batch happen before the clock starts;
- TensorFlow may use the same physical cores as the parallel scripts, hyper-threads included;
- the images come from a tf.data pipeline like Keras's own, with autotuning turned off;
- all answers must agree and be accurate; otherwise the script ends, and the trial is not recorded.

    python train_model.py     # once
    python bench_serial.py    # five trials of ten rounds

Prints a line for each trial, then their mean and standard deviation; appends one JSON line per trial to results.jsonl.
"""

import time

STARTED = time.perf_counter()  # Set-up counts from here: the imports below are part of it.

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import zipfile
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback for Ctrl-C during the imports; main() does better.
import numpy as np
import psutil

# Whatever the user's environment says. With the last two set, Ray would not start. No GPU: this is about CPU cores.
SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"}
SETTINGS |= {"TF_USE_LEGACY_KERAS": "0", "TF_NUM_INTRAOP_THREADS": "0", "PYTHONOPTIMIZE": "", "PYTHONWARNINGS": ""}
os.environ |= SETTINGS

filename = "/tmp/model.keras"
datafile = "/tmp/mnist.npz"

# The article's code, with the clock


def serial_rounds(model, x_test, mode, num_cpus, rounds):
    """Yield the seconds and the answers of each round: the batches of all cores, one after the other."""
    for _ in range(rounds):
        start = time.perf_counter()
        results = [predict(model, x_test, mode) for _ in range(num_cpus)]
        yield time.perf_counter() - start, results


def load(filename, datafile, mode):
    """Load what a worker needs: the model, and the 10,000 test images, scaled to 0..1, as predict() takes them."""
    import tensorflow as tf  # Here, not at the top: it takes seconds, and only the processes that predict need it.

    model = tf.keras.models.load_model(filename)
    mnist = dict(np.load(datafile))  # All four arrays, which the article's mnist.load_data() reads, too.
    x_test = np.float32(mnist["x_test"] / 255.0)  # Keras would convert float64 images in every call.
    if mode == "predict_on_batch":
        return model, tf.constant(x_test)
    # The batches that Keras would make of the array, without autotuning: its end can delay a call by 0.3 s.
    options = tf.data.Options()
    options.autotune.enabled = False
    return model, tf.data.Dataset.from_tensor_slices(x_test).batch(32).with_options(options)


def predict(model, x_test, mode):
    """Return the probability of each digit for each image: (10000, 10), float32."""
    return model.predict_on_batch(x_test) if mode == "predict_on_batch" else model.predict(x_test, verbose=0)


# Cores


def physical_cores():
    """Return one CPU for each physical core that this process may use, sorted, within a container's CPU quota."""
    if not hasattr(psutil.Process, "cpu_affinity"):  # macOS
        return list(range(psutil.cpu_count(logical=False) or 1))
    cores = sorted({core_of(cpu): cpu for cpu in psutil.Process().cpu_affinity()}.values())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores[: max(1, int(quota) // int(period))]
    except (OSError, ValueError):  # No such file, or "max": no quota.
        return cores


def core_of(cpu):
    """Return a key that the CPUs (hyper-threads) of one physical core share, and no others."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.read_text() if siblings.exists() else cpu  # Topology unknown: every CPU counts as a core.


def keep_to(cores):
    """Restrict this process to these physical cores, with their hyper-threads."""
    if hasattr(psutil.Process, "cpu_affinity"):
        wanted = {core_of(core) for core in cores}
        psutil.Process().cpu_affinity([cpu for cpu in psutil.Process().cpu_affinity() if core_of(cpu) in wanted])


# The harness, the same in all bench scripts

ACCURACY_FLOOR = 0.9  # on the test images; below it, model or data is not what it should be
MNIST_SHA256 = "c868f4cc70f1ec2961bd3b26437ea3a5d0e93cba4d95b336c6d475dd9dabb021"  # of its arrays' bytes


def end(status, message=""):
    """Kill every process that this script has started, print the message on stderr, and leave.

    A run always ends here: a clean shutdown of a pool or of Ray can hang if a process is dead or still starting.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    sys.stderr.write(message)
    os._exit(status)


def write(line, file):
    """Write and flush a line, to stdout or to the records. If that fails, show it on stderr and end the script."""
    try:
        print(line, file=file, flush=True)
    except OSError as error:
        end(1, f"{line}\ncannot write this to {file.name}: {error.strerror} (--output names the file of records)\n")


def parse_arguments(parser):
    """Add the flags that all bench scripts share, parse the command line, and return it and the cores to use."""
    cores = physical_cores()
    parser.add_argument("--trials", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="of a trial; default %(default)s")
    parser.add_argument("--num-cpus", type=int, metavar="N", choices=range(1, len(cores) + 1), help="default: all")
    parser.add_argument("--predict-on-batch", action="store_true", help="one call for 10,000 images, not 313")
    parser.add_argument("--model", default=filename, metavar="FILE", help="default %(default)s")
    parser.add_argument("--data", default=datafile, metavar="FILE", help="default %(default)s")
    parser.add_argument("--output", type=argparse.FileType("a"), default="results.jsonl", help="%(default)s")
    arguments = parser.parse_args()
    if min(arguments.trials, arguments.rounds) < 1:
        parser.error("--trials and --rounds must be at least 1")
    return arguments, cores[: arguments.num_cpus]


def describe(arguments, approach, num_cpus, kind_of_ray):
    """Return the fields that all records of a run share, and the correct labels (10000,).

    The model is identified by its weights: the rest of its file contains a date.
    """
    mnist = dict(np.load(arguments.data))
    digest = hashlib.sha256(b"".join(mnist[name].tobytes() for name in sorted(mnist))).hexdigest()
    kind = "stand-in" if "stand_in" in mnist else f"other-{digest[:8]}"
    cpu = platform.processor()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    found = importlib.metadata.packages_distributions()
    names = found.keys() & {"tensorflow", "keras", "numpy", "ray"}  # Ray may be missing: only bench_ray.py needs it.
    versions = {name: importlib.metadata.version(found[name][0]) for name in names}
    record = {"approach": approach, "num_cpus": num_cpus, "nodes": 1, "ray": kind_of_ray, "run": f"{time.time_ns()}"}
    record["model"] = hashlib.sha256(zipfile.ZipFile(arguments.model).read("model.weights.h5")).hexdigest()
    record["mode"] = "predict_on_batch" if arguments.predict_on_batch else "predict"
    record["data"] = "mnist" if digest == MNIST_SHA256 else kind
    record["host"] = {"cpu": cpu, "physical_cores": psutil.cpu_count(logical=False), "system": platform.system()}
    record["versions"] = versions | {"python": platform.python_version()}
    return record, mnist["y_test"]


def run_trials(arguments, record, y_test, workers, rounds, *task):
    """Time, check, record and print the trials, then their mean and deviation. Raises ValueError on wrong answers.

    record: the fields that all trials share. y_test: the correct labels (10000,). workers(): an identifier for each
    worker, which changes if it is replaced. rounds(*task, count): yields the seconds and the answers of each round.
    """
    setup = record["setup_seconds"] = time.perf_counter() - STARTED
    totals = []
    for trial in range(arguments.trials):
        before = set(workers())
        cpu_started = time.process_time()
        round_seconds = []
        digests = set()
        for seconds, results in rounds(*task, arguments.rounds):
            round_seconds.append(seconds)
            labels = np.argmax(results, axis=2).astype(np.uint8)  # (num_cpus, 10000)
            digests.update(hashlib.sha256(row).hexdigest() for row in labels)
            accuracy = np.mean(labels == y_test)
            if len(digests) > 1 or accuracy < ACCURACY_FLOOR:
                suspect = "model" if record["data"] == "mnist" else f"model or the {record['data']} data"
                raise ValueError(f"wrong answers: accuracy {accuracy:.3f}, {len(digests)} versions, by the {suspect}")
            if sys.stderr.isatty():  # The trial's line takes the place of this one.
                print(f"round {len(round_seconds)} of {arguments.rounds}", end="\r", file=sys.stderr, flush=True)
        record["cpu_seconds"] = time.process_time() - cpu_started if record["approach"] == "serial" else None
        total = sum(round_seconds)
        restarts = len(set(workers()) - before)
        record |= {"trial": trial, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": total}
        record |= {"round_seconds": round_seconds, "accuracy": accuracy, "labels": digests.pop(), "restarts": restarts}
        write(json.dumps(record), arguments.output)
        write(f"trial {trial + 1}: {total:.3f} s, accuracy {accuracy:.4f}, {restarts} restarts", sys.stdout)
        if not restarts:  # Otherwise the seconds include a worker's second set-up.
            totals.append(total)
    deviation = f"{np.std(totals, ddof=1):.3f} s" if len(totals) > 1 else "unknown"
    counts = f"{len(totals)} trials of {arguments.rounds} rounds, {record['num_cpus']} cores); set-up {setup:.1f} s"
    write(f"mean {np.mean(totals or [np.nan]):.3f} s, standard deviation {deviation} ({counts}, not timed", sys.stdout)


def explain(error, arguments):
    """Return one line about an exception of NumPy, Keras, Ray or a worker: its cause, the files, their remedy."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Ray's message contains a traceback. What Keras says after the first sentence can be unsafe advice.
    cause = next((line for line in reversed(lines) if "Error: " in line), lines[0]).split(". ")[0]
    return f"{cause} (model {arguments.model}, data {arguments.data}: python train_model.py makes both)\n"


def main():
    arguments, cores = parse_arguments(argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: end(128 + number))  # 130 or 143, and no traceback
    try:
        record, y_test = describe(arguments, "serial", len(cores), None)
        mode = record["mode"]
        write(f"serial: {mode} on {record['data']} data, cores {cores}", sys.stdout)
        keep_to(cores)
        model, x_test = load(arguments.model, arguments.data, mode)
        predict(model, x_test, mode)  # The first call traces the model.
        run_trials(arguments, record, y_test, lambda: [os.getpid()], serial_rounds, model, x_test, mode, len(cores))
    except Exception as error:
        end(1, explain(error, arguments))
    end(0)


if __name__ == "__main__":
    main()
