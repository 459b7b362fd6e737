"""Time ten rounds of batch prediction in one process, on the stack of 2019.

In every round the process classifies the test images once for each physical core. The article
shows no code for it. TensorFlow's threads use all cores, or with --one-core a single one.

    python bench_serial.py
    python bench_serial.py --one-core
"""

import record  # First: set-up is timed from here.

import psutil
import tensorflow as tf
import time

record.parser.add_argument("--one-core", action="store_true", help="keep to one core, on Linux")
arguments = record.parse_arguments()

num_cpus = psutil.cpu_count(logical=False)
if num_cpus is None:  # Some virtual machines do not tell.
    num_cpus = psutil.cpu_count()

approach = "serial"
if arguments.one_core:
    approach = "serial+one_core"
    psutil.Process().cpu_affinity([0])  # TensorFlow's threads, which do not exist yet, inherit it.

model = tf.keras.models.load_model(arguments.model)
mnist = record.load_data(arguments.data)
x_test = mnist[1][0] / 255.0

# Not timed: importing, loading, and the first call.
model.predict(x_test)
setup_seconds = time.perf_counter() - record.STARTED

round_seconds = []
answers = []
for _ in range(arguments.rounds):
    start = time.perf_counter()
    results = [model.predict(x_test) for _ in range(num_cpus)]
    round_seconds.append(time.perf_counter() - start)
    answers += [result.argmax(axis=1).astype("uint8") for result in results]
    print(f"round {len(round_seconds)}: {round_seconds[-1]:.3f} s", flush=True)

record.record(arguments, approach, setup_seconds, round_seconds, answers)
