"""Time the article's stateless pool, on the stack of 2019: every call loads the model and the data again.

The article's code, with a clock and with files in place of the download. (The loader of Keras also hashes the data file
in every call; this one does not.) Every worker has answered once before the clock starts.

    python bench_multiprocessing.py --rounds 50
    python bench_multiprocessing.py --rounds 50 --clear-session   # one line more: it removes the last call's graph
    python bench_multiprocessing.py --rounds 50 --initializer     # the article's way out: each worker loads once
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


def main():
    flags = record.parser.add_mutually_exclusive_group()
    flags.add_argument("--clear-session", action="store_true", help="each call removes the graph of the last one")
    flags.add_argument("--initializer", action="store_true", help="each worker loads once")
    arguments = record.parse_arguments()
    approach = "multiprocessing"
    if arguments.clear_session:
        approach = "multiprocessing+clear_session"
    if arguments.initializer:
        approach = "multiprocessing+initializer"
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
    setup_seconds = time.perf_counter() - record.STARTED

    round_seconds = []
    answers = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        results = pool.map(evaluate, range(num_cpus))
        round_seconds.append(time.perf_counter() - start)
        answers += [result.argmax(axis=1) for result in results]
        print("round {}: {:.3f} s".format(len(round_seconds), round_seconds[-1]), flush=True)

    record.record(arguments, approach, num_cpus, setup_seconds, round_seconds, answers)


if __name__ == "__main__":
    main()
