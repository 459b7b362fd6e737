"""Time ten rounds of batch prediction in one process that calls the model once per physical core in every round.

The serial side of benchmark 3, "expensive initialization", of "10x faster parallel Python without Python
multiprocessing". The process is serial; TensorFlow is not, it uses several threads.

The article shows no code for this one. What matters when it is compared with the others:
- model and data are loaded, and one batch is answered, before the clock starts;
- TensorFlow may use the same physical cores as the parallel scripts, hyper-threads included;
- `predict` gets its images as batches whose pipeline has no autotuner: its end can cost a call 0.3 s;
- every answer is checked; a wrong one ends the script, and its trial is not recorded.

    python train_model.py     # once
    python bench_serial.py    # five trials of ten rounds

Prints a line for each trial, then their mean and standard deviation; appends a JSON line for each to results.jsonl.
"""

import time

STARTED = time.perf_counter()  # Set-up is timed from here: the imports below belong to it.

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

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Until main() does better: no traceback out of an import.
import numpy as np
import psutil

# Keras and TensorFlow's threads as they come, whatever this machine's user has set; no GPU, for cores are the subject.
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"}
os.environ |= {"TF_USE_LEGACY_KERAS": "0", "TF_NUM_INTRAOP_THREADS": "0", "TF_NUM_INTEROP_THREADS": "0"}

filename = "/tmp/model.keras"
datafile = "/tmp/mnist.npz"

# The article's part, with its clock


def serial_rounds(model, x_test, mode, num_cpus, rounds):
    """Yield the seconds and the answers of each round: the batches of all cores, one after the other."""
    for _ in range(rounds):
        start = time.perf_counter()
        results = [predict(model, x_test, mode) for _ in range(num_cpus)]
        yield time.perf_counter() - start, results


def load(filename, datafile, mode):
    """Load what a worker needs: the model, and the 10,000 test images, scaled to 0..1, as predict() takes them."""
    import tensorflow as tf  # Not at the top: a mistyped argument need not wait for it.

    model = tf.keras.models.load_model(filename)
    mnist = dict(np.load(datafile))  # All four arrays, as the article's mnist.load_data() reads them.
    x_test = mnist["x_test"] / 255.0
    if mode == "predict_on_batch":
        return model, tf.constant(x_test, tf.float32)
    # The batches that Keras would make of the array, less its pipeline's autotuner, which can end 0.3 s late.
    options = tf.data.Options()
    options.autotune.enabled = False
    return model, tf.data.Dataset.from_tensor_slices(x_test).batch(32).with_options(options)


def predict(model, x_test, mode):
    """Return the probability of each digit for each image: (10000, 10), float32."""
    return model.predict_on_batch(x_test) if mode == "predict_on_batch" else model.predict(x_test, verbose=0)


# Cores


def physical_cores():
    """Return one CPU for each physical core that this process may use, sorted; no more than a container's quota."""
    if not hasattr(psutil.Process, "cpu_affinity"):  # macOS
        return list(range(psutil.cpu_count(logical=False) or 1))
    cores = sorted({core_of(cpu): cpu for cpu in psutil.Process().cpu_affinity()}.values())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores[: max(1, int(quota) // int(period))]
    except (OSError, ValueError):  # No such file, or "max": no quota.
        return cores


def core_of(cpu):
    """Return what is the same for all CPUs (hyper-threads) of a physical core, and for them alone."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.read_text() if siblings.exists() else cpu  # Topology unknown: every CPU counts as a core.


def keep_to(cores):
    """Let this process use these physical cores alone, with their hyper-threads."""
    if hasattr(psutil.Process, "cpu_affinity"):
        wanted = {core_of(core) for core in cores}
        psutil.Process().cpu_affinity([cpu for cpu in psutil.Process().cpu_affinity() if core_of(cpu) in wanted])


# The harness, the same in all bench scripts

ACCURACY_FLOOR = 0.9  # on the test images; below it, model or data is not what it should be
MNIST_SHA256 = "c868f4cc70f1ec2961bd3b26437ea3a5d0e93cba4d95b336c6d475dd9dabb021"  # of its arrays' bytes


def end(status, message=""):
    """Print the message on stderr, kill every process that this script has started, and leave.

    The script always ends here. To end a pool or Ray in order can hang, if a process is dead or still starting.
    """
    print(end=message, file=sys.stderr, flush=True)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(status)


def write(line, file):
    """Write a line at once, to stdout or to the file of records. If that fails, end the script, the line on stderr."""
    try:
        print(line, file=file, flush=True)
    except OSError as error:
        end(1, f"{line}\ncannot write this to {file.name}: {error.strerror} (--output names the file of records)\n")


def parse_arguments(parser):
    """Parse the flags that all bench scripts share, and the parser's own. Return them, and the cores to use."""
    cores = physical_cores()
    parser.add_argument("--trials", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="in a trial; default %(default)s")
    parser.add_argument("--num-cpus", type=int, metavar="N", choices=range(1, len(cores) + 1), help="default: all")
    parser.add_argument("--predict-on-batch", action="store_true", help="one call on float32 images, not 313")
    parser.add_argument("--model", default=filename, metavar="FILE", help="default %(default)s")
    parser.add_argument("--data", default=datafile, metavar="FILE", help="default %(default)s")
    parser.add_argument("--output", type=argparse.FileType("a"), default="results.jsonl", help="%(default)s")
    arguments = parser.parse_args()
    if min(arguments.trials, arguments.rounds) < 1:
        parser.error("--trials and --rounds must be at least 1")
    return arguments, cores[: arguments.num_cpus]


def describe(arguments, approach, num_cpus, ray):
    """Return what all records of a run say, and the right labels (10000,).

    ray: "private", "cluster" or None. The model is told by its weights alone: the rest of its file holds the date.
    """
    mnist = dict(np.load(arguments.data))
    digest = hashlib.sha256(b"".join(mnist[name].tobytes() for name in sorted(mnist))).hexdigest()
    kind = "stand-in" if "stand_in" in mnist else f"other-{digest[:8]}"
    cpu = platform.processor()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    found = importlib.metadata.packages_distributions()
    names = found.keys() & {"tensorflow", "keras", "numpy", "ray"}  # Two of the scripts do without Ray.
    versions = {name: importlib.metadata.version(found[name][0]) for name in names}
    record = {"approach": approach, "num_cpus": num_cpus, "nodes": 1, "ray": ray, "run": f"{time.time_ns()}"}
    record["model"] = hashlib.sha256(zipfile.ZipFile(arguments.model).read("model.weights.h5")).hexdigest()
    record["mode"] = "predict_on_batch" if arguments.predict_on_batch else "predict"
    record["data"] = "mnist" if digest == MNIST_SHA256 else kind
    record["host"] = {"cpu": cpu, "physical_cores": psutil.cpu_count(logical=False), "system": platform.system()}
    record["versions"] = versions | {"python": platform.python_version()}
    return record, mnist["y_test"]


def run_trials(arguments, record, y_test, workers, rounds, *task):
    """Time, check, record and print the trials, then their mean and standard deviation. ValueError: a wrong answer.

    record: the fields that all trials share. y_test: the right labels (10000,). workers(): what tells each worker
    from its replacement. rounds(*task, number of rounds): yields the seconds and the answers of each round.
    """
    record["setup_seconds"] = time.perf_counter() - STARTED
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
                blame = "model" if record["data"] == "mnist" else f"model, or {record['data']} data"
                raise ValueError(f"wrong {blame}: accuracy {accuracy:.3f}, {len(digests)} different answers")
            if sys.stderr.isatty():  # The trial's line takes the place of this one.
                print(end=f"round {len(round_seconds)} of {arguments.rounds}\r", file=sys.stderr, flush=True)
        record["cpu_seconds"] = time.process_time() - cpu_started if record["approach"] == "serial" else None
        total = sum(round_seconds)
        restarts = len(set(workers()) - before)
        record |= {"trial": trial, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": total}
        record |= {"round_seconds": round_seconds, "accuracy": accuracy, "labels": digests.pop(), "restarts": restarts}
        write(json.dumps(record), arguments.output)
        write(f"trial {trial + 1}: {total:.3f} s, accuracy {accuracy:.4f}, {restarts} restarts", sys.stdout)
        if not restarts:  # Otherwise it does not measure speed.
            totals.append(total)
    deviation = f"{np.std(totals, ddof=1):.3f} s" if len(totals) > 1 else "unknown"
    counts = f"{len(totals)} trials of {arguments.rounds} rounds, {record['num_cpus']} cores"
    setup = f"set-up {record['setup_seconds']:.1f} s, not timed"
    write(f"mean {np.mean(totals or [np.nan]):.3f} s, standard deviation {deviation} ({counts}); {setup}", sys.stdout)


def explain(error, arguments):
    """Return a line for an exception of NumPy, Keras, Ray or a worker: its cause, both files, and what makes them."""
    lines = str(error).strip().splitlines()
    causes = [line for line in lines if "Error: " in line]  # Ray's message holds a traceback.
    sentence = [type(error).__name__, *lines[:1], *causes][-1].split(". ")[0]  # Keras goes on with unsafe advice.
    return f"{sentence} (model {arguments.model}, data {arguments.data}: python train_model.py makes both)\n"


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
