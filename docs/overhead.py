"""Measure what the bench scripts cannot show by themselves: six experiments on today's stack.

    parts      what reloading costs, taken apart: the model, the data, tracing
    length     a pool that reloads, beside one that does not, for calls of four lengths
    threads    one process with a thread for each core, beside a pool and a serial process
    executors  one-worker ProcessPoolExecutors with different models, beside a pool
    memory     what each bench script takes, with all its processes
    idle       a pool beside a Ray that has nothing to do, and beside one that is suspended

    python docs/overhead.py                         # all of them, five runs of each
    python docs/overhead.py parts length --runs 10  # two of them, ten runs of each

A run is a new process with pools of its own. In a run, those that are compared take turns, round
by round: half of the rounds in one order, half of them in the opposite one. Each of them appends
a line of JSON to the output, if its answers are right; the number of the run says which lines
are to be paired. All five runs of all experiments take about 12 minutes on two cores with nothing
else to do. Cores are pinned, and memory can be measured, on Linux only.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from multiprocessing import Barrier, Pool, Process
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bench_ray
from bench_multiprocessing import (
    dataset_without_autotuner,
    digest,
    evaluate_next_batch,
    evaluate_next_batch_loaded,
    initialize,
    machine,
    physical_cores,
    pin,
)
from bench_ray import ray

ROUNDS = 10  # of each side in a run, after one that is not timed
BATCH_SIZES = [32, 100, 1_000, 10_000]  # images in a step of model.predict()
BENCH_SCRIPTS = {
    "serial": ["bench_serial.py"],
    "multiprocessing": ["bench_multiprocessing.py"],
    "multiprocessing+initializer": ["bench_multiprocessing.py", "--initializer"],
    "ray": ["bench_ray.py"],
}


def main():
    parser = argparse.ArgumentParser(description="Measure what the bench scripts cannot show.")
    names = ", ".join(EXPERIMENTS)
    parser.add_argument(
        "experiments", nargs="*", metavar="experiment", help=f"{names}; default: all of them"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each; default: %(default)s")
    parser.add_argument("--model", default="/tmp/model.keras", help="default: %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
    parser.add_argument("--output", default="overhead.jsonl", help="default: %(default)s")
    arguments = parser.parse_args()

    experiments = arguments.experiments or list(EXPERIMENTS)
    for name in experiments:
        if name not in EXPERIMENTS:
            parser.error(f"{name} is not one of {names}")
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    for file in (arguments.model, arguments.data):
        if not zipfile.is_zipfile(file):  # Both formats, .keras and .npz, are zip archives.
            parser.error(f"{file} is missing or damaged: run train_model.py")
    try:
        open(arguments.output, "a").close()  # Fail now rather than after a run.
    except OSError as error:
        parser.error(f"cannot write the results: {error}")

    for run in range(1, arguments.runs + 1):
        for name in experiments:
            start = time.perf_counter()
            process = Process(target=EXPERIMENTS[name], args=(arguments, run))
            process.start()
            process.join()
            if process.exitcode != 0:
                sys.exit(f"{name}: run {run} has failed")
            seconds = time.perf_counter() - start
            print(f"{name}, run {run} of {arguments.runs}: over after {seconds:.1f} s", flush=True)


# What reloading costs, taken apart.


def parts(arguments, run):
    """Time the steps of a call that reloads, on one core, beside the rounds of both pools.

    Reloading costs r = pool_round_seconds - initializer_round_seconds. The steps say what this is
    made of: pinning, loading the model, reading, preparing the images, and tracing the model,
    which is first_predict_seconds - second_predict_seconds. Their sum should be r.
    """
    cores = physical_cores()[:1]
    inputs = arguments.model, arguments.data
    with (
        Pool(1) as pool,
        Pool(1, initialize, (*inputs, False, cores, Barrier(1))) as initialized,
    ):
        reload = rounds_in(pool, partial(evaluate_next_batch, *inputs, False, cores), cores)
        reload_in_steps = rounds_in(pool, partial(evaluate_in_steps, *inputs, cores), cores)

        def time_steps():
            _, [(step_seconds, result)] = reload_in_steps()
            return step_seconds, [result]

        sides = {
            "pool": reload,
            "steps": time_steps,
            "initializer": rounds_in(initialized, evaluate_next_batch_loaded, cores),
        }
        seconds, labels = take_turns(sides, run)

    steps = seconds["steps"]
    step_medians = {name: np.median([step[name] for step in steps]) for name in steps[0]}
    all_labels = [*labels["pool"], *labels["steps"], *labels["initializer"]]
    mnist = dict(np.load(arguments.data))
    measured = {
        "num_cpus": 1,
        "rounds": ROUNDS,
        "pool_round_seconds": np.median(seconds["pool"]),
        "initializer_round_seconds": np.median(seconds["initializer"]),
        **step_medians,
        "needed_bytes": mnist["x_test"].nbytes,
        "unneeded_bytes": sum(mnist[name].nbytes for name in ("x_train", "y_train", "y_test")),
        "accuracy": accuracy(arguments, all_labels),
    }
    record(arguments, "parts", run, "multiprocessing", measured)


def evaluate_in_steps(filename, datafile, cores, i):
    """Do as evaluate_next_batch(), and predict once more; return the seconds of each step, too."""
    import tensorflow as tf

    start = time.perf_counter()
    pin([cores[i]])
    pinned = time.perf_counter()
    model = tf.keras.models.load_model(filename)
    model_loaded = time.perf_counter()

    archive = np.load(datafile)
    mnist = {"x_test": archive["x_test"]}
    x_test_read = time.perf_counter()
    for name in ("x_train", "y_train", "y_test"):  # No call uses them.
        mnist[name] = archive[name]
    all_read = time.perf_counter()

    x_test = dataset_without_autotuner(mnist["x_test"] / 255.0)
    prepared = time.perf_counter()
    model.predict(x_test, verbose=0)  # It traces the model.
    predicted = time.perf_counter()
    result = model.predict(x_test, verbose=0)
    predicted_again = time.perf_counter()

    step_seconds = {
        "pin_seconds": pinned - start,
        "load_model_seconds": model_loaded - pinned,
        "read_needed_seconds": x_test_read - model_loaded,
        "read_unneeded_seconds": all_read - x_test_read,
        "prepare_seconds": prepared - all_read,
        "first_predict_seconds": predicted - prepared,
        "second_predict_seconds": predicted_again - predicted,
    }
    return step_seconds, result


# Calls of four lengths.


def length(arguments, run):
    """Time rounds of both pools, on all cores, for several numbers of images in a step.

    The larger the steps, the shorter the call; what reloading costs stays the same. If that is r,
    and a call takes t, then the pool that reloads should take 1 + r/t times as long.
    """
    cores = physical_cores()
    inputs = arguments.model, arguments.data
    with (
        Pool(len(cores)) as pool,
        Pool(len(cores), initialize_lengths, (*inputs, cores, Barrier(len(cores)))) as initialized,
    ):
        sides = {}
        for size in BATCH_SIZES:
            reload = partial(evaluate_length, *inputs, size, cores)
            loaded = partial(evaluate_length_loaded, size)
            sides["multiprocessing", size] = rounds_in(pool, reload, cores)
            sides["multiprocessing+initializer", size] = rounds_in(initialized, loaded, cores)
        seconds, labels = take_turns(sides, run)

    for what, batch_size in sides:
        measured = {
            "num_cpus": len(cores),
            "batch_size": batch_size,
            "round_seconds": seconds[what, batch_size],
            "accuracy": accuracy(arguments, labels[what, batch_size]),
        }
        record(arguments, "length", run, what, measured)


def evaluate_length(filename, datafile, batch_size, cores, i):
    import tensorflow as tf

    pin([cores[i]])
    model = tf.keras.models.load_model(filename)
    mnist = dict(np.load(datafile))
    x_test = in_batches(mnist["x_test"] / 255.0, batch_size)
    return model.predict(x_test, verbose=0)


def initialize_lengths(filename, datafile, cores, barrier):
    global model, datasets
    import tensorflow as tf

    pin([cores[barrier.wait()]])
    model = tf.keras.models.load_model(filename)
    mnist = dict(np.load(datafile))
    datasets = {size: in_batches(mnist["x_test"] / 255.0, size) for size in BATCH_SIZES}
    barrier.wait()


def evaluate_length_loaded(batch_size, i):
    return model.predict(datasets[batch_size], verbose=0)


def in_batches(x_test, batch_size):
    """Do as dataset_without_autotuner(), for batches of any size."""
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    images = tf.data.Dataset.from_tensor_slices(tf.constant(x_test, "float32"))
    return images.batch(batch_size).with_options(options)


# One process with threads.


def threads(arguments, run):
    """Time rounds of one process with a thread and a model for each core.

    Beside it, in turns: a pool with an initializer, and a serial process. The threads that call
    predict() are pinned, each to a core of its own. TensorFlow's own threads serve all of them,
    and stay free to use all these cores, as in the serial process.
    """
    cores = physical_cores()
    inputs = arguments.model, arguments.data
    barrier = Barrier(len(cores))
    with (
        Pool(len(cores), initialize, (*inputs, False, cores, barrier)) as pool,
        ProcessPoolExecutor(1, initializer=load, initargs=(*inputs, cores, 1)) as serial,
        ProcessPoolExecutor(1, initializer=load, initargs=(*inputs, cores, len(cores))) as threaded,
    ):
        sides = {
            "serial": lambda: serial.submit(clock, predict_in_series, cores).result(),
            "threads": lambda: threaded.submit(clock, predict_in_threads, cores).result(),
            "multiprocessing+initializer": rounds_in(pool, evaluate_next_batch_loaded, cores),
        }
        seconds, labels = take_turns(sides, run)

    for what in sides:
        measured = {
            "num_cpus": len(cores),
            "round_seconds": seconds[what],
            "accuracy": accuracy(arguments, labels[what]),
        }
        record(arguments, "threads", run, what, measured)


def load(filename, datafile, cores, count):
    """Load so many models, and as many sets of images, into a process that may use these cores."""
    global models, x_tests, thread_pool
    import tensorflow as tf

    pin(cores)
    models = [tf.keras.models.load_model(filename) for _ in range(count)]
    mnist = dict(np.load(datafile))
    x_tests = [dataset_without_autotuner(mnist["x_test"] / 255.0) for _ in range(count)]
    thread_pool = ThreadPoolExecutor(count)


def predict_in_series(cores):
    return [models[0].predict(x_tests[0], verbose=0) for core in cores]


def predict_in_threads(cores):
    return list(thread_pool.map(predict_pinned, models, x_tests, cores))


def predict_pinned(model, x_test, core):
    if sys.platform == "linux":
        os.sched_setaffinity(0, [core])  # 0 means the thread that calls this.
    return model.predict(x_test, verbose=0)


# Workers with models of their own, by the standard library alone.


def executors(arguments, run):
    """Time rounds of executors of one worker each, every worker with a model of its own.

    Beside them, in turns: a pool with an initializer, whose workers all have the same model.
    Exits if an executor has not answered as its own model does.
    """
    cores = physical_cores()
    inputs = arguments.model, arguments.data, False
    with tempfile.TemporaryDirectory() as folder:
        filenames = [f"{folder}/{i}.keras" for i in range(len(cores))]
        with ProcessPoolExecutor(1) as process:
            own_labels = process.submit(write_models, *inputs[:2], filenames).result()

        with (
            Pool(len(cores), initialize, (*inputs, cores, Barrier(len(cores)))) as pool,
            contextlib.ExitStack() as stack,
        ):
            actors = [
                stack.enter_context(start_actor(filename, arguments.data, core))
                for filename, core in zip(filenames, cores, strict=True)
            ]

            def evaluate_next_batches():
                futures = [actor.submit(evaluate_next_batch_loaded, None) for actor in actors]
                return [future.result() for future in futures]

            sides = {
                "multiprocessing+initializer": rounds_in(pool, evaluate_next_batch_loaded, cores),
                "executors": partial(clock, evaluate_next_batches),
            }
            seconds, labels = take_turns(sides, run)

    for round_labels in labels["executors"]:
        if not np.array_equal(round_labels, own_labels):
            sys.exit("not recorded: an executor has not answered as its own model does")
    for what in sides:
        measured = {
            "num_cpus": len(cores),
            "round_seconds": seconds[what],
            "labels": [digest(batch) for batch in labels[what][-1]],
            "accuracy": accuracy(arguments, [batches[:1] for batches in labels[what]]),
        }
        record(arguments, "executors", run, what, measured)


def start_actor(filename, datafile, core):
    """Return an executor of one worker, which loads this model, and computes on this core."""
    initargs = filename, datafile, False, [core], Barrier(1)
    return ProcessPoolExecutor(1, initializer=initialize, initargs=initargs)


def write_models(filename, datafile, new_filenames):
    """Write variants of a model, and return the labels that each of them gives the test images.

    The first one is the model itself. What it calls 0, 1, ..., 9, the second one calls 1, 2, ...,
    0, and so on: no two of ten variants agree on any image.
    """
    import tensorflow as tf

    model = tf.keras.models.load_model(filename)
    mnist = dict(np.load(datafile))
    x_test = dataset_without_autotuner(mnist["x_test"] / 255.0)
    kernel, bias = model.layers[-1].get_weights()
    labels = []
    for i, new_filename in enumerate(new_filenames):
        model.layers[-1].set_weights([np.roll(kernel, i, axis=1), np.roll(bias, i)])
        model.save(new_filename)
        labels.append(np.argmax(model.predict(x_test, verbose=0), axis=1).astype("uint8"))
    return labels


# What Ray costs.


def memory(arguments, run):
    """Record the memory that each bench script takes, with all its processes, in its fourth round.

    It is the proportional set size: memory that processes share is divided among them.
    """
    order = list(BENCH_SCRIPTS)
    if run % 2 == 0:
        order.reverse()
    for what in order:
        script, *flags = BENCH_SCRIPTS[what]
        files = ["--model", arguments.model, "--data", arguments.data, "--output", os.devnull]
        command = [sys.executable, str(ROOT / script), *flags, *files]
        with psutil.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(3):
                process.stdout.readline()
            children = process.children(recursive=True)
            of_ray = not_actors(children) if what == "ray" else []  # Otherwise they are workers.
            measured = {
                "processes": 1 + len(children),
                "memory_bytes": sum(map(proportional_set_size, [process, *children])),
                "processes_of_ray": len(of_ray),
                "memory_of_ray_bytes": sum(map(proportional_set_size, of_ray)),
            }
            process.communicate()  # It ends by itself after ten rounds.
        if process.returncode != 0:
            sys.exit(f"not recorded: {script} has failed")
        psutil.wait_procs(children, timeout=120)  # The last ones of Ray end a little later.
        record(arguments, "memory", run, what, measured)


def proportional_set_size(process):
    """Return bytes: 0 if the process has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_full_info().pss
    return 0


def not_actors(processes):
    """Return those of Ray's processes that are not our actors: its servers and idle workers."""
    return [process for process in processes if not process.name().startswith("ray::Model")]


def idle(arguments, run):
    """Time rounds of a pool with an initializer while Ray's own processes are idle or suspended.

    Ray's actors have loaded the model, have answered once, and wait; they are never suspended.
    """
    cores = physical_cores()
    inputs = arguments.model, arguments.data, False
    with (
        Pool(len(cores), initialize, (*inputs, cores, Barrier(len(cores)))) as pool,
        ProcessPoolExecutor(1) as driver,
    ):
        evaluate_next_batches = rounds_in(pool, evaluate_next_batch_loaded, cores)
        of_ray = list(map(psutil.Process, driver.submit(start_ray, inputs, cores).result()))

        def beside_idle():
            evaluate_next_batches()  # Not timed: Ray catches up with what it could not do.
            return evaluate_next_batches()

        def beside_suspended():
            with suspended(of_ray):
                evaluate_next_batches()
                return evaluate_next_batches()

        sides = {
            "beside idle Ray": beside_idle,
            "beside suspended Ray": beside_suspended,
        }
        seconds, labels = take_turns(sides, run)
        driver.submit(ray.shutdown).result()
        psutil.wait_procs(of_ray, timeout=120)

    for what in sides:
        measured = {
            "num_cpus": len(cores),
            "processes_of_ray": len(of_ray),
            "round_seconds": seconds[what],
            "accuracy": accuracy(arguments, labels[what]),
        }
        record(arguments, "idle", run, what, measured)


def start_ray(inputs, cores):
    """Start a private Ray with an actor for each core; return the ids of Ray's own processes."""
    global actors  # Ray would end those that nobody refers to.
    os.environ["PYTHONPATH"] = str(ROOT)  # Ray's workers import bench_ray, too.
    ray.init("local", num_cpus=len(cores), include_dashboard=False, **bench_ray.QUIET)
    actors = [bench_ray.Model.remote(i, *inputs) for i in range(len(cores))]
    ray.get([actor.evaluate_next_batch.remote() for actor in actors])
    children = psutil.Process().children(recursive=True)
    return [process.pid for process in not_actors(children)]


@contextlib.contextmanager
def suspended(processes):
    try:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray has ended an idle worker.
                process.suspend()
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


EXPERIMENTS = {
    "parts": parts,
    "length": length,
    "threads": threads,
    "executors": executors,
    "memory": memory,
    "idle": idle,
}


# What the experiments share.


def clock(function, *arguments):
    """Call a function; return the seconds that it took, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def rounds_in(pool, function, cores):
    """Return a function that computes a round in a pool; it returns the seconds and the results."""
    # pool.map() would wait forever for the answer of a worker that has died.
    return partial(clock, lambda: pool.map_async(function, range(len(cores))).get(timeout=600))


def take_turns(sides, run):
    """Let several sides compute ROUNDS rounds each, and return what they measured and answered.

    sides: {name: function}. The function computes a round, and returns what it has measured,
    which is the seconds in most cases, and the results: for each batch probabilities (images, 10).
    Return {name: [what was measured in a round, ...]} and {name: [labels of a round, ...]}. The
    labels of a round are a list of arrays (images,), one for each batch.
    The second half of the rounds has the opposite order of the first half, and every other run
    begins with that one.
    """
    measured = {name: [] for name in sides}
    labels = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        order = list(sides)
        if (run % 2 == 0) != (number > ROUNDS // 2):
            order.reverse()
        for name in order:
            round_measured, results = sides[name]()
            if number > 0:  # In round 0 the workers import TensorFlow, and trace their models.
                measured[name].append(round_measured)
                labels[name].append([np.argmax(x, axis=1).astype("uint8") for x in results])
    return measured, labels


def accuracy(arguments, labels):
    """Return the share of right answers; exit if answers differ, or if too many are wrong.

    labels: a list for each round, with an array (images,) for each batch.
    """
    expected = labels[0][0]
    if not all(np.array_equal(batch, expected) for batches in labels for batch in batches):
        sys.exit("not recorded: the answers differ between workers or between rounds")
    share = np.mean(expected == np.load(arguments.data)["y_test"])
    if share < 0.9:
        sys.exit(f"not recorded: {share:.1%} of the answers are right, fewer than 90%")
    return share


def record(arguments, experiment, run, what, measured):
    """Append to the output, as a line of JSON, what a run has measured; print it, lists as medians.

    measured: {name of a field: value}.
    """
    line = {
        "experiment": experiment,
        "run": run,
        "what": what,
        **measured,
        **conditions(arguments.model, arguments.data),
        "time": time.time(),
    }
    with open(arguments.output, "a") as output:
        print(json.dumps(line), file=output)

    numbers = []
    for name, value in measured.items():
        if name.endswith("_seconds"):
            numbers.append(f"{name.removesuffix('_seconds')} {np.median(value):.3f} s")
        if name.endswith("_bytes"):
            numbers.append(f"{name.removesuffix('_bytes')} {value / 1e6:.0f} MB")
    title = f"{experiment}, run {run}, {what}"
    if "batch_size" in measured:
        title += f", batches of {measured['batch_size']}"
    print(f"{title}: {', '.join(numbers)}", flush=True)


@cache
def conditions(filename, datafile):
    """Return what a record says of the model, the data, the machine and the versions."""
    mnist = np.load(datafile)
    distributions = packages_distributions()  # For example, tensorflow can be tensorflow-cpu.
    return {
        "model": digest(zipfile.ZipFile(filename).read("model.weights.h5")),
        "data": digest(mnist["x_test"], mnist["x_train"], mnist["y_test"], mnist["y_train"]),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(distributions[name][0]) for name in bench_ray.PACKAGES},
        },
    }


if __name__ == "__main__":
    main()
