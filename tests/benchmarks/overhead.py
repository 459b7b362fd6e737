"""Measure what this project promises about speed, two things at a time and taking turns, and print the ratios.

    make benchmark      # or: python tests/benchmarks/overhead.py --model /tmp/model.keras --data /tmp/mnist.npz

Every line: what is compared, the median of the ratios of the passes, their least and greatest, and the aim, if any.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
GFLOP = 2 * 10000 * (784 * 512 + 512 * 10) / 1e9  # of one batch: two matrix products
MATMUL = """
import os, sys, time
os.sched_setaffinity(0, [int(sys.argv[1])])
os.environ.update(TF_CPP_MIN_LOG_LEVEL="2", CUDA_VISIBLE_DEVICES="-1")
import tensorflow as tf
a = tf.random.normal((2048, 2048))
product = tf.function(lambda: tf.linalg.matmul(a, a))
product()
print("ready", flush=True)
input()
end, count, start = time.perf_counter() + 3, 0, time.perf_counter()
while time.perf_counter() < end:
    product().numpy()
    count += 1
print(count * 2 * 2048**3 / 1e9 / (time.perf_counter() - start))
"""


def compare(what, ratios, aim):
    """Print the median and the range of the ratios beside the aim."""
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} passes"
    print(f"{what}: {statistics.median(ratios):.3f} ({spread}); aim: {aim}", flush=True)


def bench(arguments, script, *flags):
    """Run one trial of a bench script in a process of its own; return its record."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "results.jsonl")
        files = ["--model", arguments.model, "--data", arguments.data, "--output", output]
        command = [sys.executable, ROOT / script, "--trials", "1", *files, *flags]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(output.read_text())


def steady(record):
    """Return the median seconds of rounds 2 to 10."""
    return statistics.median(record["round_seconds"][1:])


def matmul_rates(cores):
    """Return TensorFlow's GFLOP/s in a float32 matrix product on each core, all cores busy at the same time."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", MATMUL, str(core)], **pipes) for core in cores]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [float(process.communicate()[0]) for process in processes]


def measure_rounds(arguments, cores):
    """Compare steady rounds of Ray and of the pool with initializer, set-up with the article's, and the limit."""
    rounds = {"predict": [], "predict_on_batch": []}
    setups, shares = [], []
    article = [sys.executable, Path(__file__).with_name("article_ray.py"), arguments.model, arguments.data, len(cores)]
    for number in range(arguments.passes):
        print(f"pass {number + 1} of {arguments.passes}", file=sys.stderr, flush=True)
        for mode, flags in (("predict", []), ("predict_on_batch", ["--predict-on-batch"])):
            pool = bench(arguments, "bench_multiprocessing.py", "--initializer", *flags)
            ray = bench(arguments, "bench_ray.py", *flags)
            rounds[mode].append(steady(ray) / steady(pool))
        limit = GFLOP / statistics.mean(matmul_rates(cores))
        shares.append(limit / steady(ray))
        done = subprocess.run(list(map(str, article)), capture_output=True, text=True, check=True)
        plain = json.loads(done.stdout.splitlines()[-1])["setup_seconds"]
        setups.append(ray["setup_seconds"] / plain)
        print(f"  set-up: article {plain:.1f} s, ours {ray['setup_seconds']:.1f} s; ", end="")
        print(f"limit {1e3 * limit:.0f} ms, Ray {1e3 * steady(ray):.0f} ms a round", flush=True)
    compare("steady round, predict: Ray / pool with initializer", rounds["predict"], "at most 1.03")
    compare("steady round, predict_on_batch: Ray / pool with initializer", rounds["predict_on_batch"], "at most 1.06")
    compare("set-up: bench_ray.py / the article's script", setups, "at most 0.6")
    compare("predict_on_batch under Ray: arithmetic limit / round", shares, "at least 0.65")


def measure_idle_ray(arguments, cores, rounds=3):
    """Compare rounds of the pool with initializer beside an idle private Ray, running and stopped (SIGSTOP).

    The ratio is what Ray's mere presence costs on these cores, whoever uses them.
    """
    import keras  # noqa: F401 - The workers inherit it.
    import psutil

    import bench_multiprocessing
    import bench_ray

    bench_multiprocessing.filename, bench_multiprocessing.datafile = arguments.model, arguments.data
    queue = multiprocessing.SimpleQueue()
    for core in cores:
        queue.put(core)
    ratios = []
    with multiprocessing.get_context("fork").Pool(len(cores), bench_multiprocessing.initialize, (queue,)) as pool:
        workers = set(psutil.Process().children(recursive=True))
        bench_ray.start_ray("local", len(cores))
        others = set(psutil.Process().children(recursive=True)) - workers
        # The shell goes on: when this process ends, however it does, it ends the others, stopped or not.
        others = [process for process in others if process.name() != "sh"]

        def seconds():
            start = time.perf_counter()
            bench_multiprocessing.one_round(pool, cores, bench_multiprocessing.evaluate_next_batch_initialized)
            return time.perf_counter() - start

        for _ in range(4 * arguments.passes):
            running = statistics.median(seconds() for _ in range(rounds))
            for process in others:
                process.suspend()
            stopped = statistics.median(seconds() for _ in range(rounds))
            for process in others:
                process.resume()
            ratios.append(running / stopped)
    compare(
        "steady round of the pool, predict: beside an idle Ray / beside the same, stopped",
        ratios,
        "none, it is a floor",
    )


def measure_harness(num_actors, rounds=100):
    """Print the milliseconds of a round in the harness and in bare Ray calls, with nothing to predict, taking turns."""
    import numpy as np
    import ray

    import bench_ray

    answer = np.zeros((10000, 10), np.float32)
    bench_ray.load = lambda: (None, None)
    bench_ray.predict = lambda model, x_test: answer.copy()
    ray.cloudpickle.register_pickle_by_value(bench_ray)

    @ray.remote(num_cpus=0)
    class Bare:
        def answer(self):
            return answer.copy()

    bench_ray.start_ray("local", num_actors)
    actors, bare = bench_ray.start_actors(), [Bare.remote() for _ in range(num_actors)]
    calls = [lambda: bench_ray.one_round(actors), lambda: [actor.answer.remote() for actor in bare]]
    times = np.empty((rounds + 5, 2))
    for number in range(rounds + 5):
        for which in (number % 2, 1 - number % 2):
            start = time.perf_counter()
            ray.get(calls[which]())
            times[number, which] = 1e3 * (time.perf_counter() - start)
    ours, theirs = np.median(times[5:], axis=0)
    difference = np.median(times[5:, 0] - times[5:, 1])
    print(f"harness, {num_actors} actors: {ours:.1f} ms, bare {theirs:.1f} ms, ", end="")
    print(f"median difference {difference:+.1f} ms; aim: at most +1 ms", flush=True)


def measure_analysis(arguments, count=100_000):
    """Print the seconds and the megabytes that analyze.py takes for many records."""
    record = bench(arguments, "bench_serial.py", "--rounds", "1", "--predict-on-batch")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for number in range(count):
            moment = f"2026-01-01T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}.{number:06}+00:00"
            approach = ("serial", "ray")[number % 2]
            file.write(json.dumps(record | {"approach": approach, "run": str(number), "time": moment}) + "\n")
        file.flush()
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, ROOT / "analyze.py", file.name], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)  # which tells the memory of this one child
        seconds = time.perf_counter() - start
    found = f"{seconds:.1f} s, {used.ru_maxrss / 1024:.0f} MB, exit status {status}"
    print(f"analyze.py, {count} records: {found}; aim: under 5 s and 500 MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="/tmp/model.keras")
    parser.add_argument("--data", default="/tmp/mnist.npz")
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    from bench_serial import physical_cores

    measure_rounds(arguments, physical_cores())
    measure_analysis(arguments)
    parts = [(measure_idle_ray, (arguments, physical_cores()))]
    parts += [(measure_harness, (num_actors,)) for num_actors in (1, 2, 8, 32)]
    for target, args in parts:  # Each in a process of its own: Ray keeps a token as long as its process lives.
        process = multiprocessing.get_context("spawn").Process(target=target, args=args)
        process.start()
        process.join()


if __name__ == "__main__":
    main()
