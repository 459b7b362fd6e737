# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "keras==3.15.1",
#     "numpy==2.4.6",
#     "psutil==7.2.2",
#     "ray==2.60.0",
#     "tensorflow==2.21.0",
# ]
# ///
"""Time ten rounds of batch prediction with Ray actors, which load the model only once.

This is benchmark 3, "expensive initialization", of the article "10x faster parallel Python
without Python multiprocessing". A batch is all test images; in a round, every actor has one batch.

    python train_model.py               # once: makes the model and fetches the data
    python bench_ray.py                 # on a private Ray, which ends with the script
    python bench_ray.py --address auto  # on a running cluster, with an actor for each CPU

Prints the seconds of each round, and appends the run to results.jsonl if the answers are right.
In a Ray job, use --address auto, and give --output a full path: the job's own folder is temporary.
If an actor dies, Ray starts it again, as the article says, and the run is still recorded. That
round takes much longer than the others, so analyze.py can tell.

What differs from the article and can change the times:
- The model is a .keras file: Keras 3 refuses the article's file name, /tmp/model.
- np.load() replaces mnist.load_data(), which would also check the file's hash.
- Each actor loads and predicts once before the clock starts.
- Each actor has a physical core of its own, for all its threads (on a cluster, if its nodes are
  started as start_on_cluster() says). The article uses the CPUs 0, 1, 2, ..., which can share a
  core, and does not pin threads that already run.
- On a private Ray, actors have normal priority, like a pool's workers. Ray's default is lower.
- predict() gets a Dataset, made while loading: see dataset_without_autotuner(). So the images are
  converted to float32 only once. With --array, predict() gets the array and converts it in every
  call, as in the article.
- predict() is told to be silent, which was its default then.
"""

import time

STARTED = time.perf_counter()  # Set-up starts here, so that it includes the imports.
import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np
import psutil

# These must be set before Ray and TensorFlow are imported. They override the user's environment.
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "-1",  # No GPU: this is about processor cores.
    "KERAS_BACKEND": "tensorflow",
    "MPLBACKEND": "agg",  # Keras imports Matplotlib, which can fail with a notebook's backend.
    "TF_CPP_MIN_LOG_LEVEL": "3",  # Hide all messages but fatal errors; a few still appear.
    "TF_USE_LEGACY_KERAS": "0",  # The model was saved by Keras 3.
}
# These are for this process and a private Ray. Actors on a cluster get only those above.
RAY_SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # Under `uv run`, too, start workers with plain Python.
    # On Linux, too, a private Ray listens on 127.0.0.1 only. A cluster is not affected.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # If a port is open, but no cluster answers there, give up after a minute and a half.
    "RAY_NUM_REDIS_GET_RETRIES": "2",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # In a Ray job, our runtime_env wins over the job's.
    "RAY_USAGE_STATS_ENABLED": "0",  # Send no usage statistics.
    "RAY_worker_niceness": "0",  # Normal priority. (This name really is in lower case.)
}
os.environ.update(SETTINGS | RAY_SETTINGS)
# If there is no writable home folder, use /tmp. Ray would fail without one.
if not os.access(os.path.expanduser("~"), os.W_OK):
    os.environ["HOME"] = "/tmp"
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PACKAGES = ["keras", "numpy", "ray", "tensorflow"]  # record() notes their versions.
QUIET = {"log_to_driver": False, "logging_level": "error"}
SETUP_TIMEOUT = 600  # seconds; without a limit, Ray waits forever for a free CPU


# Each actor occupies one CPU. If it dies, Ray restarts it, up to ten times, and repeats its batch.
@ray.remote(num_cpus=1, max_restarts=10, max_task_retries=-1)
class Model:
    def __init__(self, i, filename, datafile, as_array):
        import tensorflow as tf  # Only the workers need it.

        # Pin each actor to one core. Otherwise the TensorFlow threads of all actors compete.
        cores = physical_cores()  # those of the machine that runs this actor
        pin([cores[i % len(cores)]])  # In a cluster, a machine can have more actors than cores.
        self.model = tf.keras.models.load_model(filename)
        mnist = dict(np.load(datafile))  # Reads all four arrays, as mnist.load_data() does.
        self.x_test = mnist["x_test"] / 255.0
        if not as_array:
            self.x_test = dataset_without_autotuner(self.x_test)

    def evaluate_next_batch(self):
        # Always the same images; an application would get new ones.
        return self.model.predict(self.x_test, verbose=0)


def main():
    parser = argparse.ArgumentParser(description="Time batch prediction with Ray actors.")
    parser.add_argument("--address", help="of a cluster, or auto; default: start a private Ray")
    arguments = parse_arguments(parser)

    if arguments.address is None:
        filename, datafile, as_array = arguments.model, arguments.data, arguments.array
        num_cpus = len(physical_cores(arguments.num_cpus))
        ray.init(
            "local",  # Never join a cluster that is already running.
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=10**9,  # The default, 30% of the memory, can exceed `ulimit -v`.
            **QUIET,
        )
        actors = [Model.remote(i, filename, datafile, as_array) for i in range(num_cpus)]
        nodes = 1
    else:
        actors, nodes = start_on_cluster(arguments)

    # One round before the clock starts: the actors load, and make the first, slower prediction.
    ray.get([actor.evaluate_next_batch.remote() for actor in actors], timeout=SETUP_TIMEOUT)
    setup_seconds = time.perf_counter() - STARTED

    round_seconds = []
    answers = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        results = ray.get([actor.evaluate_next_batch.remote() for actor in actors])
        seconds = time.perf_counter() - start

        round_seconds.append(seconds)
        answers += [result.argmax(axis=1) for result in results]
        print(f"round {len(round_seconds)}: {seconds:.3f} s", flush=True)

    cluster = arguments.address is not None
    record(arguments, "ray", setup_seconds, round_seconds, answers, nodes=nodes, cluster=cluster)


def start_on_cluster(arguments):
    """Connect to a running cluster, and start an actor for each CPU that its nodes offer.

    Start the nodes with `ray start --num-cpus=<physical cores>`: by default, a node counts its
    hyper-threads as CPUs, and then two actors share a core. Every node needs the packages listed
    at the top. The record describes the machine and the packages of this script.

    Returns the actors and the number of their nodes. Exits if nothing answers at a host and port,
    or if the cluster has too few CPUs.
    """
    address = arguments.address
    if address != "auto":  # It is host:6379, [::1]:6379, or ray://host:10001.
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            # A host can have two addresses, and the timeout is for each.
            socket.create_connection((host.strip("[]"), port), timeout=7).close()
        except OSError as error:  # Ray would take much longer to say so.
            sys.exit(f"no Ray cluster answers at {address}: {error}")

    with tempfile.TemporaryDirectory() as folder:
        # ray.init() uploads this folder, and the actors run in copies of it.
        shutil.copy(arguments.model, f"{folder}/model.keras")
        shutil.copy(arguments.data, f"{folder}/mnist.npz")
        ray.init(address, runtime_env={"working_dir": folder, "env_vars": SETTINGS}, **QUIET)

    # Ray could place the actors by itself. But to pin an actor, we must know how many are already
    # on its node. So there is a slot for each CPU: the ID of its node, and its number there.
    slots = []
    for node in ray.nodes():
        if node["Alive"]:
            cpus = int(node["Resources"].get("CPU", 0))
            slots += [(node["NodeID"], i) for i in range(cpus)]
    needed = arguments.num_cpus or 1
    if len(slots) < needed:
        sys.exit(f"the cluster at {address} has {len(slots)} CPUs: too few, {needed} needed")
    slots = slots[: arguments.num_cpus]  # node by node; all of them by default

    actors = []
    for node_id, i in slots:
        # Soft: if the node dies, the actor restarts on another one, once a CPU is free there.
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=True)
        on_node = Model.options(scheduling_strategy=strategy)
        actors.append(on_node.remote(i, "model.keras", "mnist.npz", arguments.array))
    return actors, len({node_id for node_id, _ in slots})


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
