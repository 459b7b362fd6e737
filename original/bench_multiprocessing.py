"""Time ten rounds of batch prediction by a multiprocessing.Pool, on the stack of 2019.

The article's program, with a clock, and with files in place of the download. Its function is
stateless: every call loads the model and the data. Each flag changes one thing about it:

    python bench_multiprocessing.py                  # the article's program
    python bench_multiprocessing.py --clear-session  # a new graph and a new session in every call
    python bench_multiprocessing.py --fresh-session  # a new session in every call, the old graph
    python bench_multiprocessing.py --pin-once       # a worker keeps one core in all calls
    python bench_multiprocessing.py --initializer    # a worker keeps its core, model and data
"""

import record  # First: set-up is timed from here.

from multiprocessing import Barrier, Pool
import psutil
import sys
import tensorflow as tf
import time

flags = record.parser.add_mutually_exclusive_group()
flags.add_argument(
    "--clear-session", action="store_true", help="a new graph and session in every call"
)
flags.add_argument("--fresh-session", action="store_true", help="a new session in every call")
flags.add_argument("--pin-once", action="store_true", help="pin each worker before its first call")
flags.add_argument("--initializer", action="store_true", help="load once in each worker")
arguments = record.parse_arguments()

num_cpus = psutil.cpu_count(logical=False)
if num_cpus is None:  # Some virtual machines do not tell.
    num_cpus = psutil.cpu_count()

filename = arguments.model
datafile = arguments.data
barrier = Barrier(num_cpus)  # At which each worker waits for all others.


def evaluate_next_batch(i):
    # On Linux, pin the process to a core: TensorFlow's threads would compete for all of them.
    if sys.platform == "linux" and not arguments.pin_once:
        psutil.Process().cpu_affinity([i])
    if arguments.clear_session:
        tf.keras.backend.clear_session()
    if arguments.fresh_session:
        tf.keras.backend.set_session(None)  # Keras makes a new one, for the graph that is there.
    model = tf.keras.models.load_model(filename)
    mnist = record.load_data(datafile)
    x_test = mnist[1][0] / 255.0
    return model.predict(x_test)


def pin():
    # Before TensorFlow has any thread: all that it starts will be on this core, too.
    if sys.platform == "linux":
        psutil.Process().cpu_affinity([barrier.wait()])  # It gives each worker another number.


def initialize():
    global model, x_test  # of this worker, for all its calls
    pin()
    model = tf.keras.models.load_model(filename)
    mnist = record.load_data(datafile)
    x_test = mnist[1][0] / 255.0


def evaluate_next_batch_loaded(i):
    return model.predict(x_test)


def evaluate_first_batch(i):
    barrier.wait()  # So that no worker takes two of the first batches, and another one none.
    return evaluate(i)


approach = "multiprocessing"
initializer = None
evaluate = evaluate_next_batch
if arguments.clear_session:
    approach = "multiprocessing+clear_session"
if arguments.fresh_session:
    approach = "multiprocessing+fresh_session"
if arguments.pin_once:
    approach = "multiprocessing+pin_once"
    initializer = pin
if arguments.initializer:
    approach = "multiprocessing+initializer"
    initializer = initialize
    evaluate = evaluate_next_batch_loaded

pool = Pool(num_cpus, initializer)  # It forks: the workers know all that stands above.

# Not timed: starting, and the first call; with --initializer also loading.
pool.map(evaluate_first_batch, range(num_cpus))
setup_seconds = time.perf_counter() - record.STARTED

round_seconds = []
answers = []
for _ in range(arguments.rounds):
    start = time.perf_counter()
    results = pool.map(evaluate, range(num_cpus))
    round_seconds.append(time.perf_counter() - start)
    answers += [result.argmax(axis=1).astype("uint8") for result in results]
    print(f"round {len(round_seconds)}: {round_seconds[-1]:.3f} s", flush=True)

record.record(arguments, approach, setup_seconds, round_seconds, answers, start_method="fork")
