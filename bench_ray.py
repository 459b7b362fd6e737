"""Time ten rounds of batch prediction by Ray actors, one per physical core: in each round every actor predicts a batch.

The Ray side of benchmark 3, "expensive initialization", of "10x faster parallel Python without Python
multiprocessing". An actor keeps its state: it loads the model and the data once, in its constructor.

Differences from the article that matter:
- each actor, with all its threads, is pinned to one physical core (on Linux);
- loading and one warm-up batch happen before the clock starts;
- the images come from a file, and from a tf.data pipeline like Keras's own, with autotuning turned off;
- an actor that dies is restarted and its batch retried, ten times at most; Ray does neither by default;
- all answers must agree and be accurate; otherwise the script ends.

    python train_model.py                # once
    python bench_ray.py                  # five trials of ten rounds, on a private Ray that ends with the script
    python bench_ray.py --address auto   # one actor on every CPU of a running cluster; RAY_ADDRESS does the same

Prints a line for each trial, then the mean and standard deviation of those in which no actor was restarted; appends one
JSON line per trial to results.jsonl.
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
import shutil
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # No traceback for Ctrl-C during the imports; main() does better.
import numpy as np
import psutil

# Whatever the user's environment says. With the last two set, Ray would not start. No GPU: this is about CPU cores.
SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"}
SETTINGS |= {"TF_USE_LEGACY_KERAS": "0", "TF_NUM_INTRAOP_THREADS": "0", "PYTHONOPTIMIZE": "", "PYTHONWARNINGS": ""}
os.environ |= SETTINGS
# A private Ray then listens on loopback only, as it does on macOS, for which Ray has this switch. Actors run at normal
# priority, like a pool's workers. Log lines that match "." are dropped: Ray also raises what it would print on stdout.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
import ray

filename = "/tmp/model.keras"
datafile = "/tmp/mnist.npz"

# The article's code, with the clock


@ray.remote(num_cpus=1, max_restarts=10, max_task_retries=-1)
class Model:
    def __init__(self, i, filename, datafile, mode):
        # Pin first: TensorFlow sizes its thread pools by the cores that it may use.
        cores = physical_cores()
        pin(cores[i % len(cores)])
        self.mode = mode
        self.model, self.x_test = load(filename, datafile, mode)
        self.evaluate_next_batch()  # The first call traces the model.

    def evaluate_next_batch(self):
        # The same images in each round; an application would have new ones.
        return predict(self.model, self.x_test, self.mode)


def ray_rounds(actors, wait, rounds):
    """Yield the seconds and the answers of each round. Raises GetTimeoutError after `wait` seconds."""
    for _ in range(rounds):
        start = time.perf_counter()
        results = ray.get([actor.evaluate_next_batch.remote() for actor in actors], timeout=wait)
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


def pin(core):
    """Move this process to one core, with every thread: threads that exist do not follow the first one."""
    if sys.platform == "linux":
        for thread in psutil.Process().threads():
            with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
                psutil.Process(thread.id).cpu_affinity([core])


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


QUIET = {"log_to_driver": False, "logging_level": "CRITICAL"}  # Errors are raised; the logs repeat them.


def place(actor):
    """Return the node and the process of an actor: a pair that no other actor has, nor its replacement."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


def start_actors(address, num_cpus, model, data, mode):
    """Start Ray, or connect to a cluster and send it both files; then create an actor per CPU on every live node.

    If a node dies, Ray restarts its actors elsewhere.
    """
    if address == "local":
        os.environ["RAY_AUTH_TOKEN"] = os.urandom(16).hex()  # Otherwise Ray writes one to the home folder.
        # Ray 2.60 would start a part of the dashboard nevertheless, and wait for it: the impossible port prevents that.
        ray.init(address, num_cpus=num_cpus, include_dashboard=False, dashboard_port=-1, **QUIET)
    else:
        with tempfile.TemporaryDirectory() as folder:  # Ray copies it to each node, as working directory.
            model = os.path.basename(shutil.copy(model, f"{folder}/model.keras"))
            data = os.path.basename(shutil.copy(data, f"{folder}/mnist.npz"))
            ray.init(address, runtime_env={"working_dir": folder, "env_vars": SETTINGS}, **QUIET)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # Ray has replaced it.
    actors = []
    for node in ray.nodes():
        on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        for i in range(int(node["Resources"].get("CPU", 0))):  # A dead node has no resources.
            actors.append(Model.options(scheduling_strategy=on_node).remote(i, model, data, mode))
    return actors


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS") or "local", help="of a cluster, or auto")
    parser.add_argument("--wait", type=int, default=600, metavar="SECONDS", help="for a round; default %(default)s")
    arguments, cores = parse_arguments(parser)
    kind = "private" if arguments.address == "local" else "cluster"
    if arguments.num_cpus and kind == "cluster":
        parser.error("--num-cpus is for a private Ray: on a cluster every CPU gets an actor")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: end(128 + number))  # 130 or 143, and no traceback
    try:
        record, y_test = describe(arguments, "ray", len(cores), kind)
        write(f"ray: {record['mode']} on {record['data']} data, Ray at {arguments.address}", sys.stdout)
        actors = start_actors(arguments.address, len(cores), arguments.model, arguments.data, record["mode"])
        record["num_cpus"] = len(actors)
        if not actors:
            end(1, f"the cluster at {arguments.address} has no CPU: see ray status\n")

        def workers():
            places = ray.get([actor.__ray_call__.remote(place) for actor in actors], timeout=arguments.wait)
            record["nodes"] = len(dict(places))
            return places

        workers()  # This waits until all are set up.
        run_trials(arguments, record, y_test, workers, ray_rounds, actors, arguments.wait)
    except ray.exceptions.GetTimeoutError:
        end(1, f"no answer after {arguments.wait} s (--wait): see ray status whether every actor has a CPU\n")
    except Exception as error:
        end(1, explain(error, arguments))
    end(0)


if __name__ == "__main__":
    main()
