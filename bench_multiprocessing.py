"""Time ten rounds of batch prediction by a multiprocessing.Pool with one worker, and one batch, per physical core.

The multiprocessing side of benchmark 3, "expensive initialization", of "10x faster parallel Python without Python
multiprocessing". A pool's function is stateless: every call loads the model and the data again. With --initializer
each worker loads them once, which the article names as the way out in some cases and shows no code for.

Differences from the article:
- workers pin themselves to the physical cores that this process may use, with all their threads;
- workers run as batch work (SCHED_BATCH), or TensorFlow's predict often waits a third of a second for itself;
- the data comes from a file, never from the network;
- the workers have answered one batch before the clock starts: TensorFlow does some things once in a process;
- a worker that dies ends the script, where pool.map would wait for ever;
- every answer is checked, and every trial is recorded with what is needed to judge it.

    python train_model.py                            # once
    python bench_multiprocessing.py                  # five trials of ten rounds; loads in every call
    python bench_multiprocessing.py --initializer    # the same; loads once

Prints a line for each trial, then their mean and standard deviation; appends a JSON line for each to results.jsonl.
"""

import time

STARTED = time.perf_counter()  # Set-up is timed from here: the imports below belong to it.

import argparse
import datetime
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import threading
import zipfile


def end(status):
    """End the workers and the script at once: to terminate a pool in order can hang when a worker is dead already."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


# Ctrl-C ends the script with status 130 and SIGTERM with 143, without a traceback, from the first slow import on (some
# imports swallow exceptions).
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: end(128 + number))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # No INFO lines from TensorFlow; its warnings and errors stay.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # The benchmark is about cores.
os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")  # see end()
logging.getLogger("tensorflow").setLevel(logging.ERROR)  # It warns of tracing in every call, which is what is measured.

# snippet: start
import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import psutil

filename = "/tmp/model.keras"
datafile = "/tmp/mnist.npz"
predict_on_batch = False  # True: one call on float32 images instead of Keras's loop over batches of 32


def evaluate_next_batch(core):
    # A call can rely on nothing that an earlier one left: it pins its process, and loads the model and the data.
    pin(core)
    model, x_test = load()
    return predict(model, x_test)


def initialize(queue):
    # Where all workers set up alike, Pool(num_cpus, initialize, (queue,)) can do it once in each worker instead. The
    # queue, a multiprocessing.SimpleQueue, holds a core for each.
    global model, x_test
    pin(queue.get())
    model, x_test = load()
    predict(model, x_test)


def evaluate_next_batch_initialized(core):
    return predict(model, x_test)


def one_round(pool, cores, function):
    return pool.map(function, cores)


def load():
    """Load from disk what a worker needs: the model, and the test images (10000, 28, 28) scaled to 0..1."""
    import tensorflow as tf  # Not at the top: a wrong argument or a missing file must not wait four seconds for it.

    model = tf.keras.models.load_model(filename)
    mnist = load_data()
    x_test = mnist[1][0] / 255.0
    return model, tf.constant(x_test, tf.float32) if predict_on_batch else x_test


def load_data():
    """Read all four arrays, as tf.keras.datasets.mnist.load_data() does once it has downloaded them."""
    with np.load(datafile) as file:
        return (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])


def predict(model, x_test):
    """Return the class probabilities of all images: (10000, 10), float32."""
    return model.predict_on_batch(x_test) if predict_on_batch else model.predict(x_test, verbose=0)


def pin(core):
    """Move this process to one core with all its threads: those that TensorFlow has started would stay behind."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # Without this policy TensorFlow's predict often waits for itself.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        for thread in psutil.Process().threads():
            with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
                psutil.Process(thread.id).cpu_affinity([core])


def physical_cores():
    """Return one CPU for each physical core that this process may use, sorted; no more than a container's quota."""
    if not hasattr(psutil.Process, "cpu_affinity"):  # macOS
        return list(range(psutil.cpu_count(logical=False) or 1))
    allowed = sorted(psutil.Process().cpu_affinity(), reverse=True)
    cores = sorted({core_of(cpu): cpu for cpu in allowed}.values())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores[: max(1, int(quota) // int(period))]
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores


def core_of(cpu):
    """Return what is the same for all CPUs (hyper-threads) of a physical core, and for them alone."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.read_text() if siblings.exists() else cpu  # Topology unknown: every CPU counts as a core.


# snippet: end

ACCURACY_FLOOR = 0.9  # on the test images; below it, model or data is not what it should be
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"  # of the file that Keras downloads
REMEDY = "run python train_model.py, or name another file with --model or --data"


def parse_arguments(cores, *flags):
    """Parse the flags that all bench scripts share, and this one's own. Exit with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, file = parser.add_argument, {"metavar": "FILE", "type": os.path.abspath}
    add("--trials", type=int, default=5, metavar="N", help="default %(default)s")
    add("--rounds", type=int, default=10, metavar="N", help="in each trial; default %(default)s")
    add("--num-cpus", type=int, metavar="N", choices=range(1, len(cores) + 1), help="default: all cores")
    add("--predict-on-batch", action="store_true", help="one call on float32 images for each batch")
    add("--model", dest="filename", default=filename, help="default %(default)s", **file)
    add("--data", dest="datafile", default=datafile, help="default %(default)s", **file)
    add("--output", default="results.jsonl", metavar="FILE", help="to append records to; default %(default)s")
    for name, options in flags:
        add(name, **options)
    arguments = parser.parse_args()
    if min(arguments.trials, arguments.rounds) < 1:
        parser.error("--trials and --rounds must be at least 1")
    globals().update(vars(arguments))  # filename, datafile and predict_on_batch are the snippet's.
    return arguments


def check_files(output):
    """Return the test labels (10000,). Exit 1 with a message if a file is wrong, as far as shows without TensorFlow."""
    if not zipfile.is_zipfile(filename):
        sys.exit(f"no model, or not all of its file, at {filename}: {REMEDY}")
    try:
        zipfile.ZipFile(datafile).close()  # What NumPy says of a file that is no zip is an advice to unpickle it.
        arrays = [array for part in load_data() for array in part]
        shapes = [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
        found = [array.shape for array in arrays if array.dtype == np.uint8]
        if found != shapes or max(arrays[1].max(), arrays[3].max()) > 9:
            raise ValueError("it must hold 60000 and 10000 images of 28x28 and their labels, 0 to 9, all uint8")
    except Exception as error:  # A hostile file can raise anything.
        sys.exit(f"{datafile} can't be used: {error}: {REMEDY}")
    append(b"", output)
    return arrays[3]


def announce(approach, where, arguments, **fields):
    """Print what is about to be timed; return what all records say of the files, the machine and the versions."""
    model, data = (hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (filename, datafile))
    kind = "stand-in" if "stand_in" in np.load(datafile).files else "other"
    fields |= {"approach": approach, "model": model, "data": "mnist" if data == MNIST_SHA256 else kind}
    fields |= {"predict": "predict_on_batch" if predict_on_batch else "predict", "images": 10000}
    plan = f"{arguments.trials} x {arguments.rounds} rounds of {fields['predict']}"
    print(f"{approach}: {plan} on {fields['data']} data, {where}", flush=True)
    host = {"name": platform.node(), "cpu": platform.processor(), "platform": platform.platform()}
    with contextlib.suppress(OSError, IndexError):
        host["cpu"] = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    host |= {"logical_cpus": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total}
    host |= {"physical_cores": psutil.cpu_count(logical=False) or psutil.cpu_count(), "load": os.getloadavg()[0]}
    names = filter(importlib.util.find_spec, ("tensorflow", "keras", "numpy", "ray"))  # Two scripts do without Ray.
    versions = {name: importlib.metadata.version(name) for name in names}
    return fields | {"host": host, "versions": versions | {"python": platform.python_version()}}


def usage():
    """Return {process: (CPU seconds so far, unique memory in bytes)} for this process and all its descendants."""
    used = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # It has just ended.
            used[process] = sum(process.cpu_times()[:2]), process.memory_full_info().uss
    return used


def run_trials(arguments, record, labels, one_round, workers):
    """Time, check, record and print the trials. Exit 1 if an answer is wrong: that trial is not recorded.

    `record`: the fields that all trials share; `labels`: the right answers (10000,); `one_round()` returns an array of
    class probabilities (10000, 10) for each core; `workers()` returns what tells a worker from its replacement.
    """
    record |= {"run": f"{os.getpid()}-{time.time_ns()}", "setup_seconds": time.perf_counter() - STARTED}
    seconds = []
    for trial in range(arguments.trials):
        first, before, round_seconds, answers = set(workers()), usage(), [], set()
        for number in range(arguments.rounds):
            progress = f"\rtrial {trial + 1} of {arguments.trials}, round {number + 1} of {arguments.rounds} "
            print(progress, end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            results = one_round()
            round_seconds.append(time.perf_counter() - start)
            answers.update(np.argmax(result, axis=1).astype(np.uint8).tobytes() for result in results)
        after, restarts = usage(), len(set(workers()) - first)
        accuracy = np.mean(np.frombuffer(max(answers), np.uint8) == labels)
        if len(answers) > 1 or accuracy < ACCURACY_FLOOR:
            found = f"{len(answers)} sets of labels (must be 1), accuracy {accuracy:.3f} (at least {ACCURACY_FLOOR})"
            sys.exit(f"\nwrong answers by {filename}, trial not recorded: {found}: {REMEDY}")
        total = sum(round_seconds)
        seconds += [total] * (not restarts)  # A trial in which a worker died does not measure speed.
        now, digest = datetime.datetime.now(datetime.UTC).isoformat(), hashlib.sha256(answers.pop()).hexdigest()
        result = {"trial": trial, "time": now, "seconds": total, "round_seconds": round_seconds}
        result |= {"accuracy": accuracy, "predictions": digest, "restarts": restarts}
        result["cpu_seconds"] = sum(used - before.get(process, (0,))[0] for process, (used, _) in after.items())
        result["memory_bytes"] = sum(memory for _, memory in after.values())
        append(json.dumps(result | record).encode() + b"\n", arguments.output)
        restarted = f", {restarts} restarted" if restarts else ""
        print(f"\rtrial {trial + 1}: {total:.3f} s, accuracy {accuracy:.4f}{restarted}{' ' * 20}", flush=True)
    spread = f"{np.std(seconds, ddof=1):.3f} s" if len(seconds) > 1 else "unknown"
    counts = f"{len(seconds)} trials of {arguments.rounds} rounds, {record['num_cpus']} cores"
    mean = f"{np.mean(seconds):.3f} s" if seconds else "unknown"
    times = f"mean {mean}, standard deviation {spread} ({counts})"
    print(f"{times}; set-up {record['setup_seconds']:.1f} s, not timed")


def append(line, output):
    """Append the line (bytes) in one write, after a newline if the last one was torn. Exit 1 if that fails."""
    try:
        with open(output, "ab+", buffering=0) as file:
            if not os.path.isfile(output) or not os.statvfs(output).f_bavail:
                raise OSError("not a file, or no space left on its disk")
            fcntl.flock(file, fcntl.LOCK_EX)  # Half a line of another script would look torn.
            line = b"\n" * (Path(output).read_bytes()[-1:] not in (b"", b"\n")) + line
            if file.write(line) < len(line):
                raise OSError("no space left on its disk; the last line is torn")
            os.fsync(file.fileno())
    except OSError as error:
        sys.exit(f"\ncannot append to {output}: {error.strerror or error}; name another file with --output")


def filter_chatter():
    """Send what C++ writes to stderr through grep, less TensorFlow's first lines, which no variable silences."""
    sys.stderr = open(os.dup(2), "w")
    grep = ["grep", "--line-buffered", "-vE", "^(WARNING: All log messages before|I0000 |E0000 .* cuInit|To enable )"]
    grep = subprocess.Popen(grep, stdin=subprocess.PIPE, stdout=sys.stderr, start_new_session=True)
    os.dup2(grep.stdin.fileno(), 2)


def work(arguments, queue, problems):
    """Set a worker up: arguments (a spawned process has only the defaults), then the initializer, or a first call."""
    if queue.empty():  # The pool has replaced a worker that died: the script is about to end.
        os._exit(1)
    globals().update(vars(arguments))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the script ends its workers,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which must end at once: a handler would wait for a pool's lock.
    try:
        initialize(queue) if arguments.initializer else evaluate_next_batch(queue.get())
        problems.put(None)
    except Exception as error:  # Raised here, it would end the worker, and the pool would start another, for ever.
        problems.put(str(error))


def watch(workers):
    """Wait until a worker dies, then end the script: pool.map would wait for ever (CPython issue 96062)."""
    multiprocessing.connection.wait([worker.sentinel for worker in workers])
    if threading.main_thread().is_alive():  # Otherwise the script is at its end and has terminated the pool.
        while not (dead := [worker for worker in workers if worker.exitcode]):
            time.sleep(0.01)  # The pool is looking, too, and one of the two is told.
        code = dead[0].exitcode
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        cause += " (out of memory?)" * (code == -signal.SIGKILL)
        print(f"\n{dead[0].name} (process {dead[0].pid}) died: {cause}", file=sys.stderr, flush=True)
        end(128 + signal.SIGTERM if code == -signal.SIGTERM else 1)


def main():
    global pool  # It must outlive this function: see watch().
    cores = physical_cores()
    once = {"action": "store_true", "help": "load model and data once in each worker, not in every call"}
    method = {"choices": multiprocessing.get_all_start_methods(), "help": "of the workers; default: the platform's"}
    arguments = parse_arguments(cores, ("--initializer", once), ("--start-method", method))
    labels, cores = check_files(arguments.output), cores[: arguments.num_cpus]
    multiprocessing.set_start_method(arguments.start_method)
    approach = "multiprocessing" + "+initializer" * arguments.initializer
    record = announce(approach, f"{len(cores)} cores: {cores}", arguments, num_cpus=len(cores), cores=cores, nodes=1)
    record |= {"pinned": sys.platform == "linux", "start_method": multiprocessing.get_start_method()}
    filter_chatter()
    if record["start_method"] == "fork":
        import keras  # noqa: F401 - Here, so that the workers inherit it.
    queue, problems = multiprocessing.SimpleQueue(), multiprocessing.SimpleQueue()
    for core in cores:
        queue.put(core)
    function = evaluate_next_batch_initialized if arguments.initializer else evaluate_next_batch
    pool = multiprocessing.Pool(len(cores), work, (arguments, queue, problems))
    workers = multiprocessing.active_children()
    threading.Thread(target=watch, args=(workers,), daemon=True).start()
    try:
        if problem := max(problems.get() or "" for _ in cores):
            raise RuntimeError(problem)
        run_trials(arguments, record, labels, lambda: one_round(pool, cores, function), lambda: workers)
    except Exception as error:
        sys.exit(f"\n{error}\n{filename} can't be used: {REMEDY}")
    finally:
        pool.close()  # Left open, it would complain of the interpreter's end (Python 3.13).


if __name__ == "__main__":
    sys.exit(main())  # The lines below run where the snippet is pasted.

# snippet: start
if __name__ == "__main__":
    import keras  # noqa: F401 - In the parent: forked workers inherit it and need not import it themselves.

    cores = physical_cores()
    num_cpus = len(cores)
    pool = multiprocessing.Pool(num_cpus)
    for _ in range(10):
        results = one_round(pool, cores, evaluate_next_batch)
# snippet: end
