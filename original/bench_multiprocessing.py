"""Time the article's stateless pool, on the stack of 2019: every call loads the model and the data again.

The article's code, with a clock and with files in place of the download. (The loader of Keras also hashes the data file
in every call; this one does not.) Every worker has answered once before the clock starts. One pool serves all trials,
as in the original benchmark.

    python bench_multiprocessing.py
    python bench_multiprocessing.py --clear-session   # one line more: each call removes the last one's graph
    python bench_multiprocessing.py --initializer     # the way out that the article names: each worker loads once
"""

import record  # First: the time of the set-up runs from here.

from functools import partial
from multiprocessing import JoinableQueue, Pool
import psutil
import sys
import tensorflow as tf
import time

num_cpus = psutil.cpu_count(logical=False) or psutil.cpu_count()


def evaluate_next_batch(filename, datafile, clear_session, i):
    # On Linux each worker keeps to one core: otherwise the threads of all their TensorFlows compete.
    if sys.platform == "linux":
        psutil.Process().cpu_affinity([i])
    if clear_session:
        tf.keras.backend.clear_session()
    model = tf.keras.models.load_model(filename)
    mnist = record.load_data(datafile)
    x_test = mnist[1][0] / 255.0
    return model.predict(x_test)


loaded = {}  # what a worker keeps with --initializer


def initialize(cores, filename, datafile):
    i = cores.get()
    if sys.platform == "linux":
        psutil.Process().cpu_affinity([i])
    loaded["model"] = tf.keras.models.load_model(filename)
    mnist = record.load_data(datafile)
    loaded["x_test"] = mnist[1][0] / 255.0
    predict_loaded(i)
    cores.task_done()


def predict_loaded(i):
    return loaded["model"].predict(loaded["x_test"])


def pool_rounds(pool, evaluate, rounds):
    for _ in range(rounds):
        start = time.perf_counter()
        results = pool.map(evaluate, range(num_cpus))
        yield time.perf_counter() - start, results


def main():
    flags = record.parser.add_mutually_exclusive_group()
    flags.add_argument("--clear-session", action="store_true", help="each call removes the graph of the last one")
    flags.add_argument("--initializer", action="store_true", help="each worker loads once")
    arguments = record.parser.parse_args()
    approach = "multiprocessing"
    if arguments.initializer:
        approach = "multiprocessing+initializer"
    elif arguments.clear_session:
        approach = "multiprocessing+clear_session"
    shared = record.announce(approach, num_cpus, arguments)
    if arguments.initializer:
        evaluate = predict_loaded
        cores = JoinableQueue()
        for i in range(num_cpus):
            cores.put(i)
        pool = Pool(num_cpus, initialize, (cores, arguments.model, arguments.data))
        cores.join()  # Every worker has loaded, and answered once.
    else:
        evaluate = partial(evaluate_next_batch, arguments.model, arguments.data, arguments.clear_session)
        pool = Pool(num_cpus)
        pool.map(evaluate, range(num_cpus))
    record.run_trials(shared, arguments, partial(pool_rounds, pool, evaluate, arguments.rounds))


if __name__ == "__main__":
    main()
