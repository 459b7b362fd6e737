"""Time ten rounds of batch prediction by Ray actors: one per physical core, one batch for each in every round.

The Ray side of benchmark 3, "expensive initialization", of "10x faster parallel Python without Python
multiprocessing". An actor keeps its state: it loads the model and the data once, in its constructor.

Differences from the article:
- actors pin themselves to the physical cores that this process may use, with all their threads;
- actors run as batch work (SCHED_BATCH), or TensorFlow's predict often waits a third of a second for itself;
- the data comes from a file, never from the network;
- the actors have not only loaded but answered one batch before the clock starts;
- an actor that dies is started again, and its batch is done again: Ray does neither unless it is told to;
- TensorFlow is imported by the actors only, and Ray starts without its dashboard: the driver needs neither;
- an answer comes in the reply to its call, not through Ray's object store;
- every answer is checked, and every trial is recorded with what is needed to judge it.

    python train_model.py                # once
    python bench_ray.py                  # five trials of ten rounds, on a private Ray that ends with the script
    python bench_ray.py --address auto   # the same on every CPU of the cluster that this machine belongs to

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
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import zipfile

# Ctrl-C ends the script with status 130 and SIGTERM with 143, without a traceback, from the first slow import on (some
# imports swallow exceptions).
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os._exit(128 + number))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # No INFO lines from TensorFlow; its warnings and errors stay.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # The benchmark is about cores.
# A private Ray then listens on loopback alone, as on macOS and Windows, for which Ray has this switch.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would put actors behind all else, unlike the pool's.
# An answer, 400 kB, then comes in the reply to its call; through the object store it would take 2 ms longer.
os.environ.setdefault("RAY_max_direct_call_object_size", "1000000")
# Two attempts of 40 s to reach a cluster that isn't there; Ray would make 20.
os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
# Ray would print on stdout that an actor died, which the trial's line and record say, and errors a second time.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^(A worker died|Task .* failed)")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

# snippet: start
import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import psutil
import ray

filename = "/tmp/model.keras"
datafile = "/tmp/mnist.npz"
predict_on_batch = False  # True: one call on float32 images instead of Keras's loop over batches of 32


@ray.remote(num_cpus=1, max_restarts=10, max_task_retries=-1)
class Model:
    def __init__(self, i):
        # Pin first: TensorFlow starts as many threads as it may use cores.
        cores = physical_cores()
        self.core = cores[i % len(cores)]
        pin(self.core)
        self.model, self.x_test = load()
        predict(self.model, self.x_test)  # The first call traces the model.

    def evaluate_next_batch(self):
        # The same images in each round; an application would have new ones.
        return predict(self.model, self.x_test)


def one_round(actors):
    return [actor.evaluate_next_batch.remote() for actor in actors]


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

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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


def start_ray(address, num_cpus):
    """Start a private Ray with so many CPUs, or connect to a cluster and give it the model and the data."""
    global filename, datafile
    quiet = {"log_to_driver": False, "logging_level": "CRITICAL"}  # What goes wrong is raised, too.
    if address == "local":
        token, mark = os.urandom(16).hex(), os.urandom(16).hex()  # All users can see the mark, in ps; not the token.
        # When this script has ended, however it did, what it started is killed: parts of Ray would live for a minute.
        last = "read never; grep -ls $0 /proc/[0-9]*/environ | cut -d/ -f3 | xargs kill -9 2> /dev/null"
        subprocess.Popen(["sh", "-c", last, mark], stdin=subprocess.PIPE, start_new_session=True)
        # Without a token Ray would write one to the home folder; a process title would cover the environment in /proc.
        os.environ |= {"RAY_AUTH_TOKEN": token, "BENCH_RAY": mark, "SPT_NOENV": "1"}
        # Without this impossible port Ray would start a part of the dashboard nevertheless, and wait for it.
        ray.init(address, num_cpus=num_cpus, include_dashboard=False, dashboard_port=-1, **quiet)
    else:
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # `ray job submit --working-dir` has set one already.
        with tempfile.TemporaryDirectory() as folder:  # Ray carries it to each node, as the actors' working directory.
            filename, datafile = (os.path.basename(shutil.copy(path, folder)) for path in (filename, datafile))
            ray.init(address, runtime_env={"working_dir": folder}, **quiet)


def start_actors():
    """Start an actor for every CPU of every node, on that node; if the node dies, Ray starts them again elsewhere."""
    actors = []
    for node in ray.nodes():
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        for i in range(int(node["Resources"].get("CPU", 0)) if node["Alive"] else 0):
            actors.append(Model.options(scheduling_strategy=strategy).remote(i))
    return actors


def get(calls, wait):
    """Return the answers as ray.get does, but say so when they take long, and exit 1 after `wait` seconds."""
    patience = min(30, wait / 2)
    for seconds in (patience, wait - patience):
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            return ray.get(calls, timeout=seconds)
        print(f"\nno answer for {seconds:.0f} s: an actor may find no free CPU (see ray status)", file=sys.stderr)
    sys.exit(f"giving up after {wait} s: free some CPUs, or take a longer --wait")


def locate(actors):
    """Ask for the node id, the process id and the core of each actor."""
    place = lambda self: (ray.get_runtime_context().get_node_id(), os.getpid(), self.core)  # noqa: E731
    return [actor.__ray_call__.remote(place) for actor in actors]


def main():
    cores = physical_cores()
    address = {"default": os.environ.get("RAY_ADDRESS") or "local", "help": "auto: this machine's cluster"}
    wait = {"type": int, "default": 600, "metavar": "SECONDS", "help": "for an answer; default %(default)s"}
    arguments = parse_arguments(cores, ("--address", address), ("--wait", wait))
    local = arguments.address == "local"
    if "://" in arguments.address:
        sys.exit(f"{arguments.address} is no address for a driver: on a node of the cluster, use --address auto")
    if arguments.wait < 1:
        sys.exit("--wait must be at least 1 second")
    if arguments.num_cpus and not local:
        sys.exit("--num-cpus is for a private Ray: on a cluster every CPU gets an actor")
    labels, cores = check_files(arguments.output), cores[: arguments.num_cpus]
    where = f"{len(cores)} cores" if local else f"every CPU of the cluster at {arguments.address}"
    record = announce("ray", where, arguments, start_method=None, pinned=sys.platform == "linux")
    try:
        start_ray(arguments.address, len(cores))
    except SystemExit:  # Ray's answer to SIGTERM, with a status of its own
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:  # ConnectionError, RuntimeError or ValueError
        sys.exit(f"no Ray at {arguments.address}: {error}")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # Ray has set its own.
    try:
        actors = start_actors()
        if not actors:
            sys.exit(f"no CPU in the cluster at {arguments.address}: see ray status")

        def ask(question):
            return get(question(actors), arguments.wait)

        nodes, _, cores = zip(*ask(locate), strict=True)
        record |= {"num_cpus": len(actors), "cores": cores, "nodes": len(set(nodes))}
        if not local:
            record |= {"cpu_seconds": None, "memory_bytes": None}
        run_trials(arguments, record, labels, lambda: ask(one_round), lambda: ask(locate))
    except Exception as error:
        cause = getattr(error, "cause", None) or str(error).strip().rpartition("\n")[2]  # The rest is a traceback.
        sys.exit(f"\nRay: {cause}\n(model {arguments.filename}, data {arguments.datafile}): {REMEDY}")


if __name__ == "__main__":
    sys.exit(main())  # The lines below run where the snippet is pasted.

# snippet: start
if __name__ == "__main__":
    num_cpus = len(physical_cores())
    ray.init("local", num_cpus=num_cpus)  # "local": a cluster that is running already is left alone.
    actors = [Model.remote(i) for i in range(num_cpus)]
    for _ in range(10):
        results = ray.get(one_round(actors))
# snippet: end
