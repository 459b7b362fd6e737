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
"""Time ten rounds of batch prediction with Ray actors: stateful workers, which load only once.

This is benchmark 3, "expensive initialization", of the article "10x faster parallel Python
without Python multiprocessing". In each round, every actor classifies all test images.

    python train_model.py               # once: makes the model and fetches the data
    python bench_ray.py                 # on a private Ray, which ends with the script
    python bench_ray.py --address auto  # on a running cluster, an actor for each of its CPUs

Prints the seconds of each round, and appends the run to results.jsonl if the answers are right.
What differs from the article and can change the times:
- The data come from a file, not from mnist.load_data().
- Before the clock starts, every actor has loaded and has answered once.
- An actor keeps to a physical core with all its threads, also those that run already.
- Its priority is normal, like that of a pool's worker.
- predict() gets a Dataset without the autotuner, see without_autotuner(), instead of the array.
  With --array it gets the array.
"""

import time

STARTED = time.perf_counter()  # Set-up begins here and includes the imports below.
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
    "MPLBACKEND": "agg",  # Keras imports Matplotlib, and fails if a notebook's is not installed.
    "TF_CPP_MIN_LOG_LEVEL": "3",  # Log fatal errors only; some notices still come.
    "TF_USE_LEGACY_KERAS": "0",  # Keras 3 has made the model.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # Start workers by Python, even under `uv run`.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Keep a private Ray on 127.0.0.1.
    "RAY_NUM_REDIS_GET_RETRIES": "2",  # Give up an address at which no cluster answers.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # In a Ray job, use our working directory.
    "RAY_USAGE_STATS_ENABLED": "0",  # Send nothing.
    "RAY_worker_niceness": "0",  # Normal priority, like a pool's workers; Ray's default is lower.
}
os.environ.update(SETTINGS)
if not os.access(os.path.expanduser("~"), os.W_OK):  # Ray and Keras write into the home folder.
    os.environ["HOME"] = "/tmp"
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PACKAGES = ["keras", "numpy", "ray", "tensorflow"]  # record() notes their versions.
QUIET = {"log_to_driver": False, "logging_level": "error"}
SETUP_TIMEOUT = 600  # seconds; otherwise Ray waits forever for a free CPU


# Ray restarts an actor that has died and repeats its batch. That round takes longer.
@ray.remote(num_cpus=1, max_restarts=10, max_task_retries=-1)
class Model:
    def __init__(self, i, filename, datafile, array):
        import tensorflow as tf  # Only the workers need it.

        # Pin each actor to one core. Otherwise the threads of all the TensorFlows compete.
        cores = physical_cores()
        pin([cores[i % len(cores)]])  # A node of a cluster may have more actors than cores.
        self.model = tf.keras.models.load_model(filename)
        mnist = dict(np.load(datafile))  # Reads all four arrays, as mnist.load_data() does.
        self.x_test = mnist["x_test"] / 255.0
        if not array:
            self.x_test = without_autotuner(self.x_test)  # a Dataset from now on

    def evaluate_next_batch(self):
        # Always the same images; an application would get new ones.
        return self.model.predict(self.x_test, verbose=0)


def main():
    parser = argparse.ArgumentParser(description="Time batch prediction with Ray actors.")
    default = os.environ.get("RAY_ADDRESS") or "local"
    parser.add_argument(
        "--address", default=default, help="of a running cluster; default: %(default)s"
    )
    arguments = parse_arguments(parser)

    cluster = arguments.address != "local"
    if cluster:
        actors, nodes = start_on_cluster(arguments)
    else:
        nodes = 1
        num_cpus = len(physical_cores(arguments.num_cpus))
        ray.init(
            "local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=10
            ** 9,  # bytes; by default 30 % of all, which `ulimit -v` can forbid
            **QUIET,
        )
        inputs = arguments.model, arguments.data, arguments.array
        actors = [Model.remote(i, *inputs) for i in range(num_cpus)]

    # One round before the clock starts: the actors load, and predict for the first time.
    ray.get([actor.evaluate_next_batch.remote() for actor in actors], timeout=SETUP_TIMEOUT)
    setup_seconds = time.perf_counter() - STARTED

    round_seconds = []
    answers = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        results = ray.get([actor.evaluate_next_batch.remote() for actor in actors])
        round_seconds.append(time.perf_counter() - start)
        answers += [np.argmax(result, axis=1).astype("uint8") for result in results]
        print(f"round {len(round_seconds)}: {round_seconds[-1]:.3f} s", flush=True)

    record(arguments, "ray", setup_seconds, round_seconds, answers, nodes=nodes, cluster=cluster)


def start_on_cluster(arguments):
    """Connect to a running cluster, and start an actor for each CPU that its nodes advertise.

    Start the nodes with `ray start --num-cpus=<physical cores>`. By default they advertise
    hyper-threads, and then actors share cores. Returns the actors and the number of their nodes;
    exits if nothing answers at the address, or if the cluster has too few CPUs.
    """
    address = arguments.address
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), port), timeout=15).close()
        except OSError as error:  # Ray would try forever.
            sys.exit(f"no Ray cluster answers at {address}: {error}")

    with tempfile.TemporaryDirectory() as folder:
        # Ray copies this folder to every node, and it is the actors' working directory there.
        model = Path(shutil.copy(arguments.model, folder)).name
        data = Path(shutil.copy(arguments.data, folder)).name
        ray.init(address, runtime_env={"working_dir": folder, "env_vars": SETTINGS}, **QUIET)

    slots = [
        (node["NodeID"], i)
        for node in ray.nodes()
        for i in range(int(node["Resources"].get("CPU", 0)))  # A dead node has no resources.
    ]
    num_cpus = len(slots) if arguments.num_cpus is None else arguments.num_cpus
    if not 1 <= num_cpus <= len(slots):
        sys.exit(
            f"the cluster at {address} has {len(slots)} CPUs: not enough for {num_cpus} actors"
        )

    actors = []
    for node, i in slots[:num_cpus]:
        # Soft: if the node has died, the actor waits for a free CPU on any other node.
        on_node = NodeAffinitySchedulingStrategy(node, soft=True)
        actor = Model.options(scheduling_strategy=on_node)
        actors.append(actor.remote(i, model, data, arguments.array))
    return actors, len({node for node, _ in slots[:num_cpus]})


# Everything below is the same in all bench scripts: change them together.


def pin(cpus):
    """Keep this process, with all its threads, on these CPUs. As in the article, on Linux only.

    Linux pins threads one by one: those that run already would stay where they are.
    """
    if sys.platform == "linux":
        for thread in psutil.Process().threads():
            with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
                psutil.Process(thread.id).cpu_affinity(cpus)


def physical_cores(count=None):
    """Return one CPU for each physical core that this process may use, or for `count` of them.

    A container's CPU quota (cgroup v2) counts: with a quota of two cores, two are returned.
    Exits if `count` is not between one and the number of cores.
    """
    if sys.platform == "linux":
        allowed = sorted(psutil.Process().cpu_affinity())
    else:
        allowed = range(psutil.cpu_count(logical=False) or 1)

    first_cpu = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = (
            siblings.read_text() if siblings.exists() else cpu
        )  # Hyper-threads of a core share it.
        first_cpu.setdefault(core, cpu)
    cores = list(first_cpu.values())

    cpu_max = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000" means two cores.
    if cpu_max.exists() and not cpu_max.read_text().startswith("max"):
        quota, period = map(int, cpu_max.read_text().split())
        cores = cores[: max(1, quota // period)]

    if count is None:
        return cores
    if not 1 <= count <= len(cores):
        sys.exit(f"--num-cpus {count}: this process may use 1 to {len(cores)} physical cores")
    return cores[:count]


def without_autotuner(x_test):
    """Return a Dataset of the same batches of 32 images that model.predict() makes of an array.

    For an array predict() starts tf.data's autotuner. On a pinned core, stopping the autotuner
    can take as long as the prediction itself. For a Dataset it can be switched off. predict() also
    makes an array of float64 one of float32 in every call, which is done here instead.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    images = tf.data.Dataset.from_tensor_slices(tf.constant(x_test, "float32"))
    return images.batch(32).with_options(options)


def parse_arguments(parser):
    """Add the flags that all bench scripts have, parse the command line, and check it."""
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--num-cpus", type=int, help="workers, one for each core; default: all")
    parser.add_argument(
        "--array", action="store_true", help="give predict() the array, as the article does"
    )
    parser.add_argument("--model", default="/tmp/model.keras", help="default: %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
    parser.add_argument("--output", default="results.jsonl", help="default: %(default)s")
    arguments = parser.parse_args()

    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    for file in (arguments.model, arguments.data):
        if not zipfile.is_zipfile(file):  # Both formats, .keras and .npz, are zip archives.
            parser.error(f"{file} is missing or damaged: run train_model.py")
    try:
        open(arguments.output, "a").close()  # It is better to fail now than after the run.
    except OSError as error:
        parser.error(f"cannot write the results: {error}")
    return arguments


def record(arguments, approach, setup_seconds, round_seconds, answers, **details):
    """Append the run to the output, as a line of JSON, if its answers are right; exit if not.

    answers: for each call in each round, the predicted labels, an array of shape (images,).
    """
    mnist = np.load(arguments.data)
    if not all(np.array_equal(labels, answers[0]) for labels in answers):
        sys.exit("not recorded: the answers differ between workers or between rounds")
    accuracy = np.mean(answers[0] == mnist["y_test"])
    if accuracy < 0.9:
        sys.exit(
            f"not recorded: {accuracy:.1%} of the answers are right, fewer than 90 %. Was "
            f"{arguments.model} trained on {arguments.data}, and are its pixels 0 to 255?"
        )

    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model_name = re.search(r"model name\s*: (.*)", cpuinfo)  # ARM has none.
    processor = model_name[1] if model_name else platform.machine()
    physical = psutil.cpu_count(logical=False)
    cores = f"{physical} physical cores" if physical else f"{os.cpu_count()} CPUs"
    distributions = packages_distributions()  # For example, tensorflow can be tensorflow-cpu.

    run = {
        "approach": approach,
        "num_cpus": len(answers) // len(round_seconds),  # a call for each core in each round
        "array": arguments.array,
        "time": time.time(),
        "setup_seconds": setup_seconds,
        "round_seconds": round_seconds,
        "accuracy": accuracy,
        "labels": digest(answers[0]),
        "model": digest(zipfile.ZipFile(arguments.model).read("model.weights.h5")),
        "data": digest(mnist["x_test"], mnist["x_train"], mnist["y_test"], mnist["y_train"]),
        "machine": f"{processor}, {cores}, {sys.platform}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(distributions[name][0]) for name in PACKAGES},
        },
        **details,
    }
    with open(arguments.output, "a") as output:
        print(json.dumps(run), file=output)
    seconds = sum(round_seconds)
    print(
        f"{approach}: {seconds:.3f} s, after {setup_seconds:.1f} s of set-up; {accuracy:.1%} right"
    )


def digest(*parts):
    """Return the SHA-256 of the contents. That of a whole file changes with the dates in it."""
    return hashlib.sha256(b"".join(map(bytes, parts))).hexdigest()


if __name__ == "__main__":
    main()
