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
"""Time ten rounds of batch prediction by Ray actors: stateful workers, which load the model once.

Benchmark 3, "expensive initialization", of "10x faster parallel Python without Python
multiprocessing". In every round each actor, on a core of its own, classifies the test images.

    python train_model.py               # once: makes the model and fetches the data
    python bench_ray.py                 # on a private Ray, which ends with the script
    python bench_ray.py --address auto  # on a running cluster, an actor for each of its CPUs

Prints the seconds of each round, and appends the run to results.jsonl if the answers are right.
The call is the article's, but for tf.data's autotuner: see without_autotuner().
"""

import time

STARTED = time.perf_counter()  # Set-up counts from here; the imports below are a part of it.
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

# Before TensorFlow and Ray are imported; whatever the user exports for other programs.
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "-1",  # No GPU: this is about processor cores.
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # Errors only.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # Under `uv run`, Ray would start its workers by uv.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # A private Ray listens on loopback alone.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # `ray job submit` may have set a working directory.
    "RAY_USAGE_STATS_ENABLED": "0",  # Sends nothing.
    "RAY_worker_niceness": "0",  # The priority of a pool's workers; Ray's default is lower.
}
os.environ.update(SETTINGS)
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PACKAGES = ["keras", "numpy", "ray", "tensorflow"]
SETUP_TIMEOUT = 600  # seconds; Ray would wait for ever if no CPU of a cluster were free
QUIET = {"log_to_driver": False, "logging_level": "error"}


# Ray restarts an actor that has died and repeats its batch: that round takes longer.
@ray.remote(num_cpus=1, max_restarts=10, max_task_retries=-1)
class Model:
    def __init__(self, i, filename, datafile, array):
        import tensorflow as tf  # Here: the script itself does without, and starts sooner.

        # A core for each actor: TensorFlow's threads would compete for all of them.
        cores = physical_cores()
        pin(cores[i % len(cores)])
        self.model = tf.keras.models.load_model(filename)
        mnist = dict(np.load(datafile))  # All four arrays, as mnist.load_data() reads them.
        self.x_test = mnist["x_test"] / 255.0
        if not array:
            self.x_test = without_autotuner(self.x_test)

    def evaluate_next_batch(self):
        # Always the same images; an application would get new ones.
        return self.model.predict(self.x_test, verbose=0)


def main():
    parser = argparse.ArgumentParser(description="Time batch prediction by Ray actors.")
    default = os.environ.get("RAY_ADDRESS", "local")
    parser.add_argument("--address", default=default, help="of a cluster; default: %(default)s")
    arguments = parse_arguments(parser)

    cluster = arguments.address != "local"
    if cluster:
        actors, nodes = start_on_cluster(arguments)
    else:
        num_cpus = len(physical_cores(arguments.num_cpus))
        ray.init("local", num_cpus=num_cpus, include_dashboard=False, **QUIET)
        inputs = arguments.model, arguments.data, arguments.array
        actors = [Model.remote(i, *inputs) for i in range(num_cpus)]
        nodes = 1
    # Not timed: starting, loading, and the first call, which traces the model.
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

    Nodes advertise hyper-threads, and actors then share cores, unless these are started by
    `ray start --num-cpus=<physical cores>`. Return the actors and the number of their nodes.
    SystemExit: nothing answers at the address, or the cluster has too few CPUs.
    """
    address = arguments.address
    if address != "auto":
        host, _, port = address.rpartition("/")[2].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), port), timeout=15).close()
        except OSError as error:  # Ray would try for ever.
            sys.exit(f"no Ray cluster answers at {address}: {error}")

    with tempfile.TemporaryDirectory() as folder:
        # Ray copies the folder to every node, and runs the actors in it.
        model = Path(shutil.copy(arguments.model, folder)).name
        data = Path(shutil.copy(arguments.data, folder)).name
        ray.init(address, runtime_env={"working_dir": folder, "env_vars": SETTINGS}, **QUIET)

    slots = [
        (node["NodeID"], i)
        for node in ray.nodes()
        for i in range(int(node["Resources"].get("CPU", 0)))  # A dead node has none.
    ]
    num_cpus = len(slots) if arguments.num_cpus is None else arguments.num_cpus
    if not 1 <= num_cpus <= len(slots):
        sys.exit(f"--num-cpus {num_cpus}: the cluster at {address} has {len(slots)} CPUs")

    actors = []
    nodes = set()
    for node, i in slots[:num_cpus]:
        on_node = NodeAffinitySchedulingStrategy(node, soft=True)  # Soft: if the node has died,
        actor = Model.options(scheduling_strategy=on_node)  # the actor restarts on another.
        actors.append(actor.remote(i, model, data, arguments.array))
        nodes.add(node)
    return actors, len(nodes)


def pin(core):
    """Keep this process, with all its threads, on one CPU: on Linux only, as in the article.

    A pool's worker can get another core in its next call: the threads that TensorFlow has started
    by then have to follow.
    """
    if sys.platform == "linux":
        for thread in psutil.Process().threads():
            with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
                psutil.Process(thread.id).cpu_affinity([core])


# From here on: the same in all bench scripts.


def physical_cores(count=None):
    """Return one CPU of each physical core that this process may use, or of the first `count`.

    A container's CPU quota (cgroup v2) is heeded: with a quota of two cores, two are returned.
    SystemExit: there are fewer than `count`.
    """
    if sys.platform == "linux":
        allowed = sorted(psutil.Process().cpu_affinity())
    else:
        allowed = range(psutil.cpu_count(logical=False) or 1)

    first_cpu = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else cpu
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
    """Return the batches that model.predict() makes of an array, as a Dataset.

    With an array comes tf.data's autotuner. On a pinned core, a call can wait for it at its end
    for as long as the call itself has taken. For a Dataset it can be switched off.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    images = tf.data.Dataset.from_tensor_slices(tf.constant(x_test, "float32"))
    return images.batch(32).with_options(options)


def parse_arguments(parser):
    """Add the flags that all bench scripts have; parse them, and check them."""
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--num-cpus", type=int, help="physical cores to use; default: all")
    parser.add_argument("--array", action="store_true", help="let model.predict() autotune")
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
        open(arguments.output, "a").close()
    except OSError as error:  # Now, not after the run.
        parser.error(f"cannot write the results: {error}")
    return arguments


def record(arguments, approach, setup_seconds, round_seconds, answers, **details):
    """Check the answers, which are the labels (images,) of every batch, and record the run.

    Append a line of JSON to the output. SystemExit: there are wrong answers; nothing is recorded.
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
    distribution = packages_distributions()  # TensorFlow's can be tensorflow-cpu.

    run = {
        "approach": approach,
        "num_cpus": len(answers) // len(round_seconds),
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
            **{name: version(distribution[name][0]) for name in PACKAGES},
        },
        **details,
    }
    with open(arguments.output, "a") as output:
        # Begin with a line of its own, even where the last record was cut off.
        print("", json.dumps(run), sep="\n", file=output)
    seconds = sum(round_seconds)
    print(
        f"{approach}: {seconds:.3f} s, after {setup_seconds:.1f} s of set-up; {accuracy:.1%} right"
    )


def digest(*parts):
    """Return the SHA-256 of the bytes of all parts. A file's would differ by the dates in it."""
    return hashlib.sha256(b"".join(map(bytes, parts))).hexdigest()


if __name__ == "__main__":
    main()
