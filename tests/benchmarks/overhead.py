"""What the harness and Ray cost beyond the work itself, on a machine that is idle otherwise: two things in turns."""

import argparse
import contextlib
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bench_multiprocessing as mp
import bench_ray
from bench_ray import ray

GFLOP = 2 * 10000 * (784 * 512 + 512 * 10) / 1e9  # of one batch: two matrix products
IN_REPLY = {"env_vars": {"RAY_max_direct_call_object_size": "1000000"}}  # bytes; Ray's default is 100 kB


@ray.remote(num_cpus=0)
class Empty:
    def __init__(self, core):
        bench_ray.pin(core)

    def evaluate_next_batch(self):
        return np.zeros((10000, 10), np.float32)

    def batch_seconds(self):
        """Return the seconds of one batch at the speed of TensorFlow's float32 matrix product."""
        import tensorflow as tf

        a = tf.random.normal((2048, 2048))
        tf.linalg.matmul(a, a).numpy()
        start = time.perf_counter()
        for _ in range(3):
            tf.linalg.matmul(a, a).numpy()
        return (time.perf_counter() - start) * GFLOP / (3 * 2 * 2048**3 / 1e9)


def bare_rounds(actors):
    while True:
        start = time.perf_counter()
        results = ray.get([actor.evaluate_next_batch.remote() for actor in actors])
        yield time.perf_counter() - start, results


def signalled_rounds(rounds, processes, number):
    """Send the processes a signal before each round, and let them go on after it."""
    while True:
        try:
            send(processes, number)
            result = next(rounds)
        finally:
            send(processes, signal.SIGCONT)
        time.sleep(0.2)  # They make up for what they have missed.
        yield result


def send(processes, number):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends workers that it does not need.
            process.send_signal(number)


def compare(what, first, second, count):
    """Print the ratio of the median rounds of two generators, and the median difference with its 95 % interval."""
    seconds = np.array([(next(first)[0], next(second)[0]) for _ in range(count)])[count // 10 :]
    one, other = 1e3 * np.median(seconds, axis=0)
    reach = 98 / np.sqrt(len(seconds))  # in percentiles, by the binomial distribution
    low, difference, high = 1e3 * np.percentile(seconds[:, 0] - seconds[:, 1], [50 - reach, 50, 50 + reach])
    print(f"{what}: {one / other:.3f} ({one:.2f} / {other:.2f} ms a round)")
    print(f"    difference {difference:+.2f} ms a round ({low:+.2f} to {high:+.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=bench_ray.filename)
    parser.add_argument("--data", default=bench_ray.datafile)
    parser.add_argument("--passes", type=int, default=5, help="of 20 rounds each; default %(default)s")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # bench_ray.py has set another; SIGTERM will be the same.
    cores = bench_ray.physical_cores()
    count = 20 * arguments.passes
    task = (arguments.model, arguments.data, "predict")
    queue = multiprocessing.SimpleQueue()
    for core in cores:
        queue.put(core)
    problems = multiprocessing.SimpleQueue()
    pool = multiprocessing.Pool(len(cores), mp.set_up, (queue, problems, True, *task))
    for problem in filter(None, [problems.get() for _ in cores]):
        sys.exit(problem)
    workers = multiprocessing.active_children()
    tasks = [(core, *task) for core in cores]
    rounds = mp.pool_rounds(pool, workers, mp.evaluate_next_batch_initialized, tasks, 2 * count)

    task = (arguments.model, arguments.data, "predict_on_batch")
    stored = bench_ray.ray_rounds(bench_ray.start_actors("local", len(cores), *task), None, 2 * count)
    products = [Empty.remote(core) for core in cores]
    limit = ([np.mean(ray.get([product.batch_seconds.remote() for product in products]))] for _ in range(count))
    compare("predict_on_batch, arithmetic limit / Ray (aim: at least 0.8)", limit, stored, count)
    in_reply = bench_ray.Model.options(num_cpus=0, runtime_env=IN_REPLY)
    replied = bench_ray.ray_rounds([in_reply.remote(i, *task) for i in range(len(cores))], None, count)
    compare("predict_on_batch, answers in Ray's replies / in its object store", replied, stored, count)

    children = psutil.Process().children(recursive=True)
    of_ray = [process for process in children if process.pid not in {worker.pid for worker in workers}]
    idle = signalled_rounds(rounds, of_ray, signal.SIGCONT)
    stopped = signalled_rounds(rounds, of_ray, signal.SIGSTOP)
    compare("pool with initializer, beside an idle Ray / a stopped one", idle, stopped, count)

    as_model = Empty.options(max_restarts=10, max_task_retries=-1)  # like bench_ray.Model
    for num_actors in (1, 2, 8, 32):
        places = [cores[i % len(cores)] for i in range(num_actors)]
        ours = bench_ray.ray_rounds([as_model.remote(core) for core in places], None, count)
        bare = bare_rounds([Empty.remote(core) for core in places])
        compare(f"{num_actors} actors, harness / bare calls (aim: at most +1 ms)", ours, bare, count)


if __name__ == "__main__":
    main()
