# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "keras==3.15.1",
#     "numpy==2.4.6",
#     "psutil==7.2.2",
#     "tensorflow==2.21.0",
# ]
# ///
"""Time ten rounds of batch prediction with multiprocessing.Pool.

This is benchmark 3, "expensive initialization", of the article "10x faster parallel Python
without Python multiprocessing". A batch is all test images; in a round, every core has one batch.
By default, each call loads the model and the data again. With --initializer, each worker loads
them once: the article mentions this, but shows no code.

    python train_model.py                          # once: makes the model and fetches the data
    python bench_multiprocessing.py                # load in every call
    python bench_multiprocessing.py --initializer  # load once

Prints the seconds of each round, and appends the run to results.jsonl if the answers are right.
If a worker dies in a round, the script ends, and records nothing.

What differs from the article and can change the times:
- The model is a .keras file: Keras 3 refuses the article's file name, /tmp/model.
- np.load() replaces mnist.load_data(), which would also check the file's hash in every call.
- The pool does one round before the clock starts.
- Each call runs on a physical core of its own, with all threads of its worker. In the article,
  only the main thread moves to the call's CPU: TensorFlow's threads stay on that of the worker's
  first call. The article's CPUs 0, 1, 2, ... can also share a core.
- predict() gets a Dataset, made while loading: see dataset_without_autotuner(). With --initializer,
  this also converts the images to float32 only once. With --array, predict() gets the array and
  converts it in every call, as in the article.
- predict() is told to be silent, which was its default then.
"""

import time

STARTED = time.perf_counter()  # Set-up starts here, so that it includes the imports.
import argparse
import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import signal
import sys
import zipfile
from functools import partial
from importlib.metadata import packages_distributions, version
from multiprocessing import Barrier, Pool, active_children, get_start_method
from pathlib import Path
from threading import Thread, main_thread

import numpy as np
import psutil

# These must be set before TensorFlow is imported. They override the user's environment.
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "-1",  # No GPU: this is about processor cores.
    "KERAS_BACKEND": "tensorflow",
    "MPLBACKEND": "agg",  # Keras imports Matplotlib, which can fail with a notebook's backend.
    "TF_CPP_MIN_LOG_LEVEL": "3",  # Hide all messages but fatal errors; a few still appear.
    "TF_USE_LEGACY_KERAS": "0",  # The model was saved by Keras 3.
}
os.environ.update(SETTINGS)
# If there is no writable home folder, use /tmp. (If none is known, Keras makes one named ~ here.)
if not os.access(os.path.expanduser("~"), os.W_OK):
    os.environ["HOME"] = "/tmp"

PACKAGES = ["keras", "numpy", "tensorflow"]  # record() notes their versions.

# Otherwise TensorFlow warns in every call that it is tracing a model again. Forked workers inherit
# this; spawned ones run this line themselves.
logging.getLogger("tensorflow").setLevel("ERROR")


def evaluate_next_batch(filename, datafile, as_array, cores, i):
    import tensorflow as tf  # Not at the top: a process forked after TensorFlow starts can hang.

    # Pin each call to one core. Otherwise the TensorFlow threads of all workers compete.
    pin([cores[i]])
    model = tf.keras.models.load_model(filename)
    mnist = dict(np.load(datafile))  # Reads all four arrays, as mnist.load_data() does.
    x_test = mnist["x_test"] / 255.0
    if not as_array:
        x_test = dataset_without_autotuner(x_test)
    # Always the same images; an application would get new ones.
    return model.predict(x_test, verbose=0)


def main():
    parser = argparse.ArgumentParser(description="Time batch prediction with a pool of processes.")
    parser.add_argument("--initializer", action="store_true", help="load once in every worker")
    arguments = parse_arguments(parser)
    # Let Ctrl-C end this process at once, and forked workers, too. With Python's own handler, the
    # pool often hung.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    filename, datafile, as_array = arguments.model, arguments.data, arguments.array
    cores = physical_cores(arguments.num_cpus)
    num_cpus = len(cores)
    if arguments.initializer:
        approach = "multiprocessing+initializer"
        # initialize() uses it twice: to number the workers, and to wait until all have loaded.
        barrier = Barrier(num_cpus)
        pool = Pool(num_cpus, initialize, (filename, datafile, as_array, cores, barrier))
        evaluate = evaluate_next_batch_loaded
    else:
        approach = "multiprocessing"
        pool = Pool(num_cpus)
        # pool.map() gives each call only its number i. The other arguments are always the same.
        evaluate = partial(evaluate_next_batch, filename, datafile, as_array, cores)
    # Watch the workers. If one dies, the pool starts another, but never repeats the lost call.
    Thread(target=exit_if_one_dies, args=[pool, active_children()], daemon=True).start()

    # One round before the clock starts, because a worker's first call is slower: by default it
    # imports TensorFlow, with --initializer it makes the first prediction. Each worker gets one
    # call: by default the import keeps it busy for seconds, with --initializer all start together.
    pool.map(evaluate, range(num_cpus))
    setup_seconds = time.perf_counter() - STARTED

    round_seconds = []
    answers = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        results = pool.map(evaluate, range(num_cpus))
        seconds = time.perf_counter() - start

        round_seconds.append(seconds)
        answers += [result.argmax(axis=1) for result in results]
        print(f"round {len(round_seconds)}: {seconds:.3f} s", flush=True)

    record(
        arguments,
        approach,
        setup_seconds,
        round_seconds,
        answers,
        start_method=get_start_method(),
    )


def exit_if_one_dies(pool, workers):
    """End the script if one of the workers dies: pool.map() would wait for its answer forever.

    The pool is not used. It is passed only so that Python does not free it when main() returns:
    that would stop its workers while the main thread is alive, and look like a death.
    """
    while True:
        time.sleep(1)
        dead = [worker for worker in workers if worker.exitcode is not None]
        if dead and main_thread().is_alive():  # After that, the pool itself stops its workers.
            print(f"a worker has died, exit code {dead[0].exitcode}", file=sys.stderr)
            for child in active_children():  # also those that have replaced one
                child.kill()
            # A normal exit can hang: it waits for a lock that a dead worker holds.
            os._exit(1)


# For --initializer:


def initialize(filename, datafile, as_array, cores, barrier):
    global model, x_test  # The worker keeps them between its calls.
    import tensorflow as tf

    i = barrier.wait()  # Returns a different number in each worker: 0, 1, 2, ...
    pin([cores[i]])
    model = tf.keras.models.load_model(filename)
    mnist = dict(np.load(datafile))
    x_test = mnist["x_test"] / 255.0
    if not as_array:
        x_test = dataset_without_autotuner(x_test)
    # Wait until all workers have loaded. Otherwise an early one could take two batches of the
    # untimed round, and a late one would make its first, slower prediction while the clock runs.
    barrier.wait()


def evaluate_next_batch_loaded(i):  # i is not used: initialize() has pinned the worker.
    return model.predict(x_test, verbose=0)


# Everything below is the same in all bench scripts, so that each works alone: change all three.


def pin(cpus):
    """Keep all threads of this process on these CPUs. On Linux only, like the article's pinning.

    On Linux, each thread has an affinity of its own. Setting a process's affinity changes only
    its main thread. Others that already run keep theirs; a new one inherits its starter's.
    """
    if sys.platform == "linux":
        for thread in psutil.Process().threads():
            with contextlib.suppress(ProcessLookupError):  # It has just ended.
                os.sched_setaffinity(thread.id, cpus)


def physical_cores(count=None):
    """Return one CPU of each physical core that this process may use: all, or the first `count`.

    A container's CPU quota (cgroup v2) is a limit, too. Exits if there are fewer than `count`.
    """
    if sys.platform == "linux":
        allowed = sorted(os.sched_getaffinity(0))
    else:
        allowed = range(psutil.cpu_count(logical=False) or 1)  # Only their number matters there.

    first_cpu = {}
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        # All hyper-threads of a core have the same siblings, such as "0,8".
        siblings = path.read_text() if path.exists() else cpu
        first_cpu.setdefault(siblings, cpu)
    cores = list(first_cpu.values())

    cpu_max = Path("/sys/fs/cgroup/cpu.max")
    if cpu_max.exists():
        quota, period = cpu_max.read_text().split()  # "200000 100000" is two cores.
        if quota != "max":
            cores = cores[: max(1, int(quota) // int(period))]

    if count is not None and count > len(cores):
        sys.exit(f"--num-cpus {count}: only {len(cores)} physical cores are available")
    return cores[:count]


def dataset_without_autotuner(x_test):
    """Return the images as a Dataset, 32 in a step, as model.predict() would take them.

    Given an array, each predict() converts it to float32, makes a Dataset of it, and starts and
    stops tf.data's autotuner. On a pinned core, the stop can take as long as the prediction. In
    a Dataset of our own, the autotuner can be switched off.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    images = tf.data.Dataset.from_tensor_slices(tf.constant(x_test, "float32"))
    return images.batch(32).with_options(options)


def parse_arguments(parser):
    """Add the flags that all bench scripts have, parse the command line, and check it."""
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument(
        "--num-cpus", type=int, help="batches in a round; default: one per core (cluster: CPU)"
    )
    parser.add_argument("--array", action="store_true", help="give predict() a plain array")
    parser.add_argument("--model", default="/tmp/model.keras", help="default: %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
    parser.add_argument("--output", default="results.jsonl", help="default: %(default)s")
    arguments = parser.parse_args()

    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.num_cpus is not None and arguments.num_cpus < 1:
        parser.error("--num-cpus must be at least 1")
    for file in (arguments.model, arguments.data):
        if not zipfile.is_zipfile(file):  # Both formats, .keras and .npz, are zip archives.
            parser.error(f"{file} is missing or damaged: run train_model.py")
    try:
        open(arguments.output, "a").close()  # Fail now rather than after the run.
    except OSError as error:
        parser.error(f"cannot write the results: {error}")
    return arguments


def record(arguments, approach, setup_seconds, round_seconds, answers, **details):
    """Append the run to the output, as a line of JSON, if its answers are right; exit if not.

    answers: for each call, the predicted labels, an array of integers, of shape (images,).
    """
    mnist = np.load(arguments.data)
    accuracy = check(arguments, answers, mnist["y_test"])
    distributions = packages_distributions()  # tensorflow can come from tensorflow-cpu.
    run = {
        "approach": approach,
        "num_cpus": len(answers) // arguments.rounds,  # batches in a round
        "array": arguments.array,
        "time": time.time(),
        "setup_seconds": setup_seconds,
        "round_seconds": round_seconds,
        "accuracy": accuracy,
        "labels": digest(answers[0].astype("uint8")),  # analyze.py checks that all agree.
        # analyze.py compares only runs with the same model and data. These are not digests of
        # whole files, which contain dates.
        "model": digest(zipfile.ZipFile(arguments.model).read("model.weights.h5")),
        "data": digest(mnist["x_test"], mnist["x_train"], mnist["y_test"], mnist["y_train"]),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(distributions[name][0]) for name in PACKAGES},
        },
        **details,
    }
    with open(arguments.output, "a") as output:
        print(json.dumps(run), file=output)

    print(
        f"{approach}: {sum(round_seconds):.3f} s, after {setup_seconds:.1f} s of set-up; "
        f"{accuracy:.1%} right"
    )


def check(arguments, answers, y_test):
    """Return the share of right answers; exit if answers differ, or if too many are wrong."""
    if not all(np.array_equal(labels, answers[0]) for labels in answers):
        sys.exit("not recorded: the answers differ between workers or between rounds")
    accuracy = np.mean(answers[0] == y_test)
    if accuracy < 0.9:  # One epoch of training gives more than 0.95.
        sys.exit(
            f"not recorded: only {accuracy:.1%} of the answers are right. Was {arguments.model} "
            f"trained on {arguments.data}, and are the pixels 0 to 255?"
        )
    return accuracy


def machine():
    """Return the processor, its cores and the system."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model_name = re.search(r"model name\s*: (.*)", cpuinfo)  # ARM has no such line.
    processor = model_name[1] if model_name else platform.machine()
    physical = psutil.cpu_count(logical=False)
    cores = f"{physical} physical cores" if physical else f"{os.cpu_count()} CPUs"
    return f"{processor}, {cores}, {sys.platform}"


def digest(*parts):
    """Return the SHA-256 of the parts, which are arrays or bytes."""
    return hashlib.sha256(b"".join(map(bytes, parts))).hexdigest()


if __name__ == "__main__":
    main()
