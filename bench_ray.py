# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "numpy==2.4.6", "psutil==7.2.2", "ray==2.60.0", "tensorflow==2.21.0"]
# ///
"""Time ten rounds of batch prediction by Ray actors: in each round every core predicts a batch.

The Ray side of benchmark 3, "expensive initialization", of "10x faster parallel Python without Python multiprocessing".
An actor keeps its state: it loads the model and the images once, in its constructor.
Appends the run to results.jsonl if all answers agree and 90 % are right. Not for notebooks: it ends its own process.

    python train_model.py               # once; leaves /tmp/model.keras and /tmp/mnist.npz
    python bench_ray.py                 # on a private Ray, which ends with the script
    python bench_ray.py --address auto  # an actor on every CPU of a running cluster; RAY_ADDRESS does the same
"""

import time

STARTED = time.perf_counter()  # Set-up counts from here: the imports below are part of it.
import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

# Whatever the user's environment says. No GPU: this is about processor cores.
PRESET = {"CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow", "TF_USE_LEGACY_KERAS": "0", "PYTHONOPTIMIZE": ""}
PRESET |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "0", "KERAS_NNX_ENABLED": "false", "TF_XLA_FLAGS": ""}
VERSIONS = {name: version(name) for name in ("keras", "numpy", "ray", "tensorflow")}
TIMEOUT = 600  # seconds for a round; where no CPU is free, or a cluster has died, Ray would wait for ever
# Ray would start workers by `uv run` if this script was, refuse our working directory in a job, fail with warnings on.
os.environ |= PRESET | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1", "PYTHONWARNINGS": ""}
# Loopback alone, by Ray's switch for macOS; normal priority, as a pool's workers; no errors printed that are raised.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
import ray


@ray.remote(num_cpus=1, max_restarts=10, max_task_retries=-1)
class Model:
    def __init__(self, i, filename, datafile, mode):
        # Pin first: TensorFlow sizes its thread pools by the cores that it may use.
        cores = physical_cores()
        pin(cores[i % len(cores)])
        self.predict = load(filename, datafile, mode)  # The model and the images: once, here.

    def evaluate_next_batch(self):
        return self.predict()  # The same images in each round; an application would have new ones.


def main():
    parser = argparse.ArgumentParser(description="Time batch prediction by Ray actors.")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS") or "local", help="of a cluster, or auto")
    arguments = parse_arguments(parser)
    actors = start_actors(arguments)
    ray.get([actor.evaluate_next_batch.remote() for actor in actors], timeout=TIMEOUT)  # Wait until all are set up.
    setup_seconds = time.perf_counter() - STARTED

    round_seconds = []
    answers = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        results = ray.get([actor.evaluate_next_batch.remote() for actor in actors], timeout=TIMEOUT)
        round_seconds.append(time.perf_counter() - start)
        answers += [np.argmax(result, axis=1) for result in results]
        print(f"round {len(round_seconds)}: {round_seconds[-1]:.3f} s", flush=True)

    places = ray.get([actor.__ray_call__.remote(place) for actor in actors], timeout=TIMEOUT)
    more = {"nodes": len(dict(places)), "cluster": arguments.address != "local", "restarts": sum(r for _, r in places)}
    record(arguments, "ray", len(actors), setup_seconds, round_seconds, answers, **more)
    end(0)


def start_actors(arguments):
    """Start Ray, or connect to a cluster and send it both files; return an actor for each CPU of every live node."""
    files = [arguments.model, arguments.data]
    quiet = {"log_to_driver": False, "logging_level": "CRITICAL"}  # Errors are raised; the logs repeat them.
    if arguments.address == "local":
        os.environ["RAY_AUTH_TOKEN"] = os.urandom(16).hex()  # Otherwise Ray writes one to the home folder.
        # Port -1 keeps even a part of the dashboard from starting. Ray's own store, 30 % of the memory, can be too big.
        options = {"include_dashboard": False, "dashboard_port": -1, "object_store_memory": 10**9}
        ray.init("local", num_cpus=arguments.num_cpus or len(physical_cores()), **options, **quiet)
    else:
        with tempfile.TemporaryDirectory() as folder:  # Ray copies it to each node, as working directory.
            files = [os.path.basename(shutil.copy(file, folder)) for file in files]
            ray.init(arguments.address, runtime_env={"working_dir": folder, "env_vars": PRESET}, **quiet)
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # Ray has replaced it.
    # A dead node has no resources.
    slots = [(node["NodeID"], i) for node in ray.nodes() for i in range(int(node["Resources"].get("CPU", 0)))]
    if not slots:
        end(1, f"the cluster at {arguments.address} has no CPU: see ray status\n")
    on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    return [
        Model.options(scheduling_strategy=on_node(node, soft=True)).remote(i, *files, arguments.mode)
        for node, i in slots[: arguments.num_cpus]
    ]


def place(actor):
    """Return the node on which an actor is, and whether Ray has restarted it."""
    return ray.get_runtime_context().get_node_id(), ray.get_runtime_context().was_current_actor_reconstructed


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
