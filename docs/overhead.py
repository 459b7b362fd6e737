"""Print what Ray costs in memory, its idle processes in time, and what our deviations from the article change."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bench_multiprocessing as mp
import bench_ray
from bench_ray import ray

COUNT = 40  # rounds of each of the two things that take turns
CORES = bench_ray.physical_cores()


def memory(arguments, script, *flags):
    """Record the proportional set size (PSS) of a bench script with all its processes, in its fourth round."""
    command = [sys.executable, script, *flags, "--model", arguments.model, "--data", arguments.data]
    command += ["--rounds", "10000", "--output", os.devnull]
    with psutil.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for _ in range(3):
            assert process.stdout.readline().startswith("round"), "the script says on stderr why it has ended"
        sizes = [(one.name(), one.memory_full_info().pss / 1e6) for one in process.children(recursive=True)]
        total = process.memory_full_info().pss / 1e6 + sum(size for _, size in sizes)
        process.terminate()
    own = [size for name, size in sizes if script == "bench_ray.py" and not name.startswith("ray::Model")]
    what = " ".join(["memory:", script, *flags])
    record(arguments, {"what": what, "megabytes": total, "of_ray": sum(own), "processes_of_ray": len(own)})


def record(arguments, result):
    """Print a result, and append it to the output as a line of JSON."""
    print(*[f"{value:.3g}" if isinstance(value, float) else value for value in result.values()], flush=True)
    print(json.dumps(result), file=arguments.output, flush=True)


def compare(arguments, what, first, second, stopped=()):
    """Let two functions take turns, the second while the processes in `stopped` are stopped, and report."""
    pairs = []
    for _ in range(COUNT + 1):
        one = seconds(first)
        with suspended(stopped):
            pairs.append((one, seconds(second)))
    report(arguments, what, pairs[1:])  # In the first pair of rounds, workers may have been set up.


@contextlib.contextmanager
def suspended(processes):
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def seconds(function):
    time.sleep(0.1)  # What the other one has left, such as Ray's backlog after a stop, is done by then.
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(arguments, what, pairs):
    """Record the ratio of the medians, with its 95 % interval: bootstrap of the pairs."""
    samples = np.transpose(pairs)
    bootstrap = stats.bootstrap(samples, ratio, paired=True, method="percentile", rng=0)
    low, high = map(float, bootstrap.confidence_interval)
    one, other = map(float, np.median(samples, axis=1))
    result = {"what": what, "ratio": one / other, "low": low, "high": high, "seconds": one, "other_seconds": other}
    record(arguments, result | {"pairs": len(pairs)})


def ratio(first, second, axis):
    return np.median(first, axis=axis) / np.median(second, axis=axis)


def pool_round(*files, initializer=mp.initialize):
    pool = mp.Pool(len(CORES), initializer, (CORES, *files))
    return lambda: pool.starmap(mp.evaluate_next_batch_initialized, [(core, *files) for core in CORES])


def load_unpinned(cores, *files):
    mp.kept["predict"] = mp.load(*files)


def first_and_second(core, *files):
    """Return the seconds of the first two calls in a new process."""
    mp.pin(core)
    predict = mp.load(*files)
    return seconds(predict), seconds(predict)


def ray_round(actors):
    return lambda: ray.get([actor.evaluate_next_batch.remote() for actor in actors])


def lower_priority(actor):
    for thread in psutil.Process().threads():
        psutil.Process(thread.id).nice(15)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="/tmp/model.keras")
    parser.add_argument("--data", default="/tmp/mnist.npz")
    parser.add_argument("--output", default="overhead.jsonl", type=argparse.FileType("w"))
    parser.set_defaults(address="local", num_cpus=None, mode="predict")
    arguments = parser.parse_args()
    files = [arguments.model, arguments.data]
    memory(arguments, "bench_serial.py")
    memory(arguments, "bench_multiprocessing.py")
    memory(arguments, "bench_multiprocessing.py", "--initializer")
    memory(arguments, "bench_ray.py", "--address", "local")

    pinned = pool_round(*files, "predict")
    unpinned = pool_round(*files, "predict", initializer=load_unpinned)
    compare(arguments, "pool with initializer, pinned / not pinned", pinned, unpinned)
    compare(arguments, "pool with initializer, predict / predict_array", pinned, pool_round(*files, "predict_array"))
    pool = mp.Pool(len(CORES), maxtasksperchild=1)
    calls = [pool.starmap(first_and_second, [(core, *files, "predict") for core in CORES], 1) for _ in range(8)]
    report(arguments, "predict, first call of a process / second", np.concatenate(calls))

    pools = psutil.Process().children(recursive=True)
    actors = bench_ray.start_actors(arguments)
    ray_round(actors)()
    of_ray = [process for process in psutil.Process().children(recursive=True) if process not in pools]
    compare(arguments, "pool with initializer, Ray idle / stopped", pinned, pinned, of_ray)
    model = bench_ray.Model.options(num_cpus=0)
    nice = [model.remote(i, *files, "predict") for i in range(len(CORES))]
    ray.get([actor.__ray_call__.remote(lower_priority) for actor in nice])
    compare(arguments, "Ray, actors of niceness 15 / 0", ray_round(nice), ray_round(actors))
    bench_ray.end(0)


if __name__ == "__main__":
    main()
