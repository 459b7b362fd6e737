# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "numpy==2.4.6", "psutil==7.2.2", "tensorflow==2.21.0"]
# ///
"""Time ten rounds of batch prediction by a multiprocessing.Pool: in each round every physical core predicts a batch.

The Pool's side of benchmark 3, "expensive initialization", of "10x faster parallel Python without Python
multiprocessing". Its function is stateless: every call loads the model and the images. With --initializer each worker
loads them once, which the article names as a way out in some cases, and shows no code for.
Appends the run to results.jsonl if all answers agree and 90 % are right. Not for notebooks: it ends its own process.

    python train_model.py                          # once; leaves /tmp/model.keras and /tmp/mnist.npz
    python bench_multiprocessing.py                # loads in every call
    python bench_multiprocessing.py --initializer  # loads once
"""

import time

STARTED = time.perf_counter()  # Set-up counts from here: the imports below are part of it.
import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
from importlib.metadata import version
from multiprocessing import Pool, active_children, current_process, get_start_method
from pathlib import Path

signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # If the caller ignores it, the death of a worker cannot be seen.
import numpy as np
import psutil

# Whatever the user's environment says. No GPU: this is about processor cores.
os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow", "TF_USE_LEGACY_KERAS": "0"}
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "0"}
os.environ |= {"KERAS_NNX_ENABLED": "false", "TF_XLA_FLAGS": ""}
VERSIONS = {name: version(name) for name in ("keras", "numpy", "tensorflow")}
kept = {}  # With --initializer: what a worker keeps for its calls.


def evaluate_next_batch(core, filename, datafile, mode):
    # A call cannot rely on what an earlier one has left: it pins its process, and loads the model and the images.
    pin(core)
    return load(filename, datafile, mode)()


def initialize(cores, *files):
    pin(cores[(int(current_process().name.rpartition("-")[2]) - 1) % len(cores)])  # ForkPoolWorker-1, or similar
    with contextlib.suppress(Exception):  # The pool would replace the worker forever. Its first call fails instead.
        kept["predict"] = load(*files)


def evaluate_next_batch_initialized(core, *files):
    kept["predict"] = kept.get("predict") or load(*files)
    return kept["predict"]()


def main():
    parser = argparse.ArgumentParser(description="Time batch prediction by a multiprocessing.Pool.")
    parser.add_argument("--initializer", action="store_true", help="load once in each worker, not in every call")
    arguments = parse_arguments(parser)
    cores = physical_cores()[: arguments.num_cpus]
    files = [arguments.model, arguments.data, arguments.mode]
    approach = "multiprocessing+initializer" if arguments.initializer else "multiprocessing"
    evaluate = evaluate_next_batch_initialized if arguments.initializer else evaluate_next_batch
    tasks = [(core, *files) for core in cores]
    pool = Pool(len(cores), initialize if arguments.initializer else None, (cores, *files))
    os.register_at_fork(after_in_child=lambda: os._exit(1))  # Under fork no replacements: starmap() ends the script.
    workers = active_children()
    answered = set()
    while len(answered) < len(cores):  # Until all are set up: a fast worker may take a slow one's task.
        answered.update(starmap(pool, workers, warm_up, [(evaluate, *task) for task in tasks]))
    setup_seconds = time.perf_counter() - STARTED

    round_seconds = []
    answers = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        results = starmap(pool, workers, evaluate, tasks)
        round_seconds.append(time.perf_counter() - start)
        answers += [np.argmax(result, axis=1) for result in results]
        print(f"round {len(round_seconds)}: {round_seconds[-1]:.3f} s", flush=True)

    record(arguments, approach, len(cores), setup_seconds, round_seconds, answers, start_method=get_start_method())
    end(0)


def warm_up(evaluate, *task):
    """Answer a first batch; return this worker's process id."""
    evaluate(*task)
    return os.getpid()


def starmap(pool, workers, function, tasks):
    """Do as pool.starmap, but end the script if a worker has died: pool.starmap would wait forever (CPython 96062)."""
    results = pool.starmap_async(function, tasks)
    while not results.ready():
        results.wait(1)
        if any(worker.exitcode is not None for worker in workers):
            end(1, f"a worker has died: {workers}; SIGKILL can mean that memory ran out\n")
    return results.get()


def pin(cpu):
    """Move this process to one CPU, with every thread: threads that exist do not follow the first one."""
    for thread in Path("/proc/self/task").glob("*"):  # None on macOS, which cannot pin.
        with contextlib.suppress(OSError):  # It has just ended, or the system refuses.
            os.sched_setaffinity(int(thread.name), [cpu])
    if sys.platform == "linux" and os.sched_getaffinity(0) != {cpu}:
        raise PermissionError("this system refuses to pin threads to a core (sched_setaffinity)")


# From here on: the same in all bench scripts.
def load(filename, datafile, mode):
    """Load the model and the test images; return a function that predicts: () -> class scores (10000, 10)."""
    import tensorflow as tf  # Here, not at the top: it takes seconds, and only the processes that predict need it.

    tf.get_logger().setLevel("ERROR")  # It warns of a model that is traced in every call: that is what we measure.
    model = tf.keras.models.load_model(filename)
    x_test = dict(np.load(datafile))["x_test"] / 255.0  # All arrays are read, as by the article's mnist.load_data().
    if mode == "predict_array":  # The article's call. It can end 0.3 s late: Keras waits for tf.data's autotuner.
        return lambda: model.predict(x_test, verbose=0)
    images = tf.constant(x_test, "float32")  # Keras would convert float64 in every call.
    if mode == "predict_on_batch":  # One step for all images: little but arithmetic.
        return lambda: model.predict_on_batch(images)
    options = tf.data.Options()
    options.autotune.enabled = False
    batches = tf.data.Dataset.from_tensor_slices(images).batch(32).with_options(options)  # 313 steps, as in Keras.
    return lambda: model.predict(batches, verbose=0)


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
    """Return a key that the CPUs (hyper-threads) of one physical core share; each CPU's own, if that is unknown."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.read_text() if siblings.exists() else cpu


def parse_arguments(parser):
    """Add the flags that all scripts have, and parse. From here on exceptions and signals end the script by end()."""
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default %(default)s")
    parser.add_argument("--num-cpus", type=int, choices=range(1, len(physical_cores()) + 1), metavar="N", help="or all")
    parser.add_argument("--mode", choices=["predict", "predict_array", "predict_on_batch"], default="predict")
    parser.add_argument("--model", default="/tmp/model.keras", metavar="FILE", help="default %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", metavar="FILE", help="default %(default)s")
    parser.add_argument("--output", type=argparse.FileType("a"), default="results.jsonl", help="default %(default)s")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or not arguments.model.endswith(".keras"):
        parser.error("--rounds must be at least 1, and --model must name a .keras file")

    def explain(kind, error, traceback):
        # Errors of Ray's workers end with a traceback. What Keras says after its first sentence can be unsafe advice.
        sentences = str(error).strip().replace("\n", ". ").split(". ")
        cause = next((sentence for sentence in reversed(sentences) if "Error: " in sentence), sentences[0])
        files = f"model {arguments.model}, data {arguments.data}, output {arguments.output.name}"
        end(1, f"{kind.__name__}: {cause} ({files}; train_model.py makes fitting ones, python -X dev tells more)\n")

    sys.excepthook = sys.excepthook if sys.flags.dev_mode else explain
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: end(128 + signum))  # 130 or 143, and no traceback
    return arguments


def record(arguments, approach, num_cpus, setup_seconds, round_seconds, answers, **more):
    """Check the answers, which are the labels (10000,) of every batch; append the record of the run to the output."""
    mnist = np.load(arguments.data)
    labels = np.array(answers, np.uint8)
    accuracy = np.mean(labels == mnist["y_test"].ravel())
    if accuracy < 0.9 or (labels != labels[0]).any():
        raise ValueError(f"wrong answers: {accuracy:.1%} right; needed: 90 %, all equal, of pixels 0 to 255 over 255")
    data = b"".join(mnist[name].tobytes() for name in ("x_test", "x_train", "y_test", "y_train"))
    weights = np.load(arguments.model)["model.weights.h5"]  # It reads any zip archive. The rest contains a date.
    cpuinfo = "".join(path.read_text() for path in Path("/proc").glob("cpuinfo")) or f"model name: {os.uname().machine}"
    names = dict.fromkeys(re.findall("(?m)^(?:model name|CPU implementer|CPU part).*: (.*)", cpuinfo))  # ARM has two.
    fields = {"approach": approach, "mode": arguments.mode, "num_cpus": num_cpus, "accuracy": accuracy}
    fields |= {"nodes": 1, "cluster": False, "restarts": 0, "start_method": None, "cpu_seconds": None} | more
    fields |= {"time": time.time(), "setup_seconds": setup_seconds, "round_seconds": round_seconds}
    fields |= {"labels": hashlib.sha256(labels[0]).hexdigest(), "model": hashlib.sha256(weights).hexdigest()}
    fields |= {"data": hashlib.sha256(data).hexdigest(), "versions": VERSIONS | {"python": sys.version.split()[0]}}
    fields |= {"machine": f"{' '.join(names)}, {psutil.cpu_count(logical=False)} physical cores, {os.uname().sysname}"}
    print(json.dumps(fields), file=arguments.output, flush=True)
    print(f"{approach}: {sum(round_seconds):.3f} s, set-up {setup_seconds:.1f} s, {accuracy:.1%} right", flush=True)


def end(status, message=""):
    """Kill all processes that this script has started, and leave. A clean shutdown of a pool or of Ray can hang."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # It has just ended.
            process.kill()
    with contextlib.suppress(OSError):  # stderr may be closed.
        os.write(2, message.encode())
    os._exit(status)


if __name__ == "__main__":
    main()
